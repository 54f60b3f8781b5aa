"""What a model costs: parameters and bytes of a rank, floating-point operations of a token. Pure formulas, no torch import.

Bytes are those of tensors alive at the step's worst moment, layer by layer as autograd keeps them:

    weights      of the student, in the run's dtype (bf16: 2, fp32: 4); under fp8 2 more for each weight of a layer's matrix, its
                 8-bit copy and that one's transpose
    gradients    megatron-core's buffer: 4 a parameter, 2 with performance.grad_reduce_in_fp32=false
    optimizer    Adam's two moments in fp32 and, of bf16 weights, an fp32 copy: 12 or 8 a parameter, over the data-parallel (and
                 context-parallel) ranks where the optimizer is distributed; an expert's over the ranks that hold it. The
                 precision-aware one: 2 for the lower half of the copy, moments of 4 or 2 each
    teacher      its weights in its own layout (under teacher_fp8 1 more for each weight of a layer's matrix), and of its head the
                 rows that go with the student's; with performance.teacher_offload these rows only
    hand-off     its hidden states, final ones and those that blocks are compared with, of every micro-batch that it is ahead
    activations  what the backward pass waits for, of every micro-batch in flight (1F1B: as many as stages follow, itself included;
                 interleaved: more, each of one chunk), without what is recomputed
    workspace    on the last stage the loss; elsewhere the gradients of one block with what one layer, or one group of layers,
                 recomputes, or the loss between blocks; an offloaded teacher during its turn, an fp32 copy of bf16 gradients
                 in the optimizer's, where these take more than the activations that are not there then

The projection between blocks of different widths counts as the student's, whole on every rank.

Device "cuda" has the fused norms and activations of megatron-core and Transformer Engine; "cpu" is what torch does without them.
CUDA's own context, NCCL's buffers and the allocator's holes come on top.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from minitron_mcore.config.performance import PerformanceConfig, Recompute, RecomputeMethod
from minitron_mcore.config.settings import Device, Dtype, ParallelConfig
from minitron_mcore.distill import checks, tile_sizes
from minitron_mcore.models import attention_band, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """All but the models that decides what a rank holds."""

    parallel: ParallelConfig
    world: int
    dtype: Dtype
    micro_batch: int
    sequence_length: int
    device: Device = Device.cuda
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number in the run's dtype."""
        return 2 if self.dtype == Dtype.bf16 else 4

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return max(1, self.world // max(1, self.parallel.tensor * self.parallel.pipeline * self.parallel.context))

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on a context-parallel rank."""
        return self.micro_batch * self.sequence_length // self.parallel.context

    @property
    def sequence_shards(self) -> int:
        """Ranks that share the tokens between the matrices."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def last(self) -> int:
        return self.parallel.pipeline - 1


def parameters(arch: Architecture, setting: Setting, stage: int) -> tuple[int, int]:
    """Parameters in the memory of a rank of a pipeline stage, padding included: (experts' own, all others)."""
    tp, own = setting.parallel.tensor, range(arch.experts // setting.parallel.expert)
    counts = [0, 0]
    for parameter in sharding.parameters_on_rank(arch, setting.parallel, stage, own):
        counts[parameter.expert is None] += local_elements(parameter, tp)
    if arch.tied and 0 < stage == setting.last:
        counts[True] += parameter_table.padded_vocab(arch, tp) // tp * arch.hidden  # its copy of the embedding table
    return counts[False], counts[True]


def local_elements(parameter: parameter_table.Parameter, tp: int) -> int:
    """A tensor-parallel rank's elements of a parameter."""
    if "vocab" in parameter.row.axes:
        return parameter_table.padded_vocab(parameter.arch, tp) // tp * parameter.arch.hidden
    return math.prod(parameter.shape) // (1 if parameter.row.tp_dim is None else tp)


def model_states(arch: Architecture, setting: Setting, stage: int, distributed: bool, more: int = 0) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on a rank of a stage; `distributed`: the optimizer's state is shared out; `more`:
    parameters beside the model's."""
    experts, others = parameters(arch, setting, stage)
    others += more
    config, each = setting.performance, 12 if setting.dtype == Dtype.bf16 else 8
    if config.precision_aware_optimizer:
        each = 10 if config.exp_avg_dtype == Dtype.fp32 else 6
    optimizer = each * _owned(setting, (experts, others), distributed)
    copies = 2 * matrices(arch, setting, stage) if config.fp8 else 0
    return {
        "weights": setting.dtype_bytes * (experts + others) + copies,
        "gradients": (4 if config.grad_reduce_in_fp32 else 2) * (experts + others),
        "optimizer": math.ceil(optimizer),
    }


def _owned(setting: Setting, counts: tuple[int, int], distributed: bool) -> float:
    """Of (experts', other) parameters of a rank those whose optimizer state it holds."""
    shares = (
        setting.world // (setting.parallel.pipeline * setting.parallel.expert),
        setting.replicas * setting.parallel.context,
    )
    return sum(n / (max(1, share) if distributed else 1) for n, share in zip(counts, shares, strict=True))


def matrices(arch: Architecture, setting: Setting, stage: int) -> int:
    """A rank's weights of the matrices in its layers, which is what runs in 8 bits."""
    own = range(arch.experts // setting.parallel.expert)
    inside = (
        p
        for p in sharding.parameters_on_rank(arch, setting.parallel, stage, own)
        if p.block is not None and len(p.shape) == 2
    )
    return sum(local_elements(parameter, setting.parallel.tensor) for parameter in inside)


def _norm(width: float, arch: Architecture, setting: Setting) -> float:
    """Bytes of one norm's input that its backward pass needs, and of its statistics."""
    if setting.device == Device.cpu and arch.traits.norm == "RMSNorm":
        return 8 * width + 4  # torch takes it apart: the input in fp32, and the same divided by its length
    return setting.dtype_bytes * width + 8


def mlp_activations(arch: Architecture, setting: Setting) -> float:
    """Bytes kept of one token that goes through an MLP or an expert, of ffn channels that the ranks share or not."""
    fused = setting.device == Device.cuda
    channels = (3 if fused else 5) if arch.traits.gated else 2
    if not arch.experts:
        return setting.dtype_bytes * channels * arch.ffn / setting.parallel.tensor
    routed = setting.dtype_bytes * (arch.hidden + (channels + (not fused)) * arch.ffn) + 24
    # Balanced routing: a rank's experts see as many tokens as the rank sends out.
    return (arch.experts_per_token * routed + 5 * arch.experts) / setting.sequence_shards


def _attention(arch: Architecture, setting: Setting, again: bool) -> float:
    """Bytes kept of one token between attention's two matrices, of a tensor-parallel rank's heads; `again`: what comes after the
    rotary embedding is recomputed."""
    b, tp, dim = setting.dtype_bytes, setting.parallel.tensor, arch.head_dim
    heads, groups = arch.heads / tp, arch.groups / tp
    gathered = setting.device == Device.cpu and setting.parallel.context > 1 and not again
    # Queries, keys and values as one matrix makes them; queries and keys turned; the output. Where keys and values are gathered:
    # queries turned; keys and values of the whole sequence; the output by parts and as one.
    kept = (heads + 2 * groups) + (heads + groups) + heads
    if gathered:
        kept = heads + 2 * setting.parallel.context * groups + 2 * heads
        # Queries by blocks, but for the first rank's first half without a window: a view of that keeps them all.
        parts = 2 * setting.parallel.context
        kept += heads / parts if (arch.window or math.inf) >= setting.sequence_length / parts else 0
    elif setting.device == Device.cpu and arch.window and arch.window < setting.sequence_length and not again:
        kept += heads  # the output by blocks too
    norms = 0
    if arch.traits.qk_norm:
        norms = (heads + groups) * _norm(dim, arch, setting)
        if setting.device == Device.cuda or setting.dtype == Dtype.fp32:
            # Keys are read where they lie, beside the values that are kept anyway, unless these were gathered elsewhere.
            kept += heads + groups if gathered else -groups
    return b * dim * kept + norms + (0 if again else 4 * heads)  # and each head's log-sum-exp


def layer_activations(arch: Architecture, setting: Setting, part: str, again: Sequence[str] = ()) -> float:
    """Bytes that one "attention" or "mlp" layer keeps of a micro-batch for its backward pass, on one rank.

    Args:
        again: modules that are recomputed (see `performance.PerformanceConfig`).
    """
    b, context = setting.dtype_bytes, setting.parallel.context
    length = setting.sequence_length // context
    # The norm before it: its input, and its output, which is the input of the matrices.
    output = 0 if "layernorm" in again else b * arch.hidden
    token = (_norm(arch.hidden, arch, setting) + output) / setting.sequence_shards
    if part == "mlp":
        return (token + (0 if {"mlp", "moe"} & set(again) else mlp_activations(arch, setting))) * setting.tokens
    if "mlp" in again and setting.device == Device.cpu:
        # megatron-core recomputes the MLP that an attention layer has not: its input stays, as the next fused norm's does anyway.
        token += b * arch.hidden / setting.sequence_shards
    core = "core_attn" in again
    token += _attention(arch, setting, core)
    rotary = 4 * b * arch.head_dim * arch.rotary_fraction  # cosine and sine of a position, for queries and for keys
    return token * setting.tokens + rotary * length


def attention_masks(arch: Architecture, setting: Setting) -> float:
    """Bytes of the masks that the attention layers of a rank share on a CPU, on average over context-parallel ranks."""
    context, length = setting.parallel.context, setting.sequence_length
    part = length // (2 * context if context > 1 else 1)
    total = 0
    for rank in range(context if setting.device == Device.cpu and arch.blocks_with("attention") else 0):
        # Each of a rank's two parts of the queries meets the keys up to its end.
        ends = ((rank + 1) * part, (2 * context - rank) * part) if context > 1 else (length,)
        windows = {(end, min(arch.window or end, end)) for end in ends}
        bands = {
            (window, *attention_band.attention_band(part, end, window))
            for end, window in windows
            if (part, window) != (end, end)
        }
        total += sum(rows * columns for _, rows, columns in bands)
    return setting.dtype_bytes * arch.heads / arch.groups * total / context


def _border(arch: Architecture, setting: Setting) -> float:
    """Bytes of a micro-batch's hidden states between two layers."""
    return setting.dtype_bytes * arch.hidden * setting.tokens / setting.sequence_shards


def recomputation(arch: Architecture, setting: Setting, blocks: Sequence[int]) -> tuple[float, float]:
    """Of a chunk with these blocks and of a micro-batch: bytes that its layers keep, and the most that one layer, or one group of
    layers, makes again and holds in the backward pass."""
    config, parts = setting.performance, [part for block, part in arch.layers if block in blocks]
    whole = [layer_activations(arch, setting, part) for part in parts]
    if config.recompute == Recompute.none:
        return sum(whole), 0
    if config.recompute == Recompute.selective:
        kept = [layer_activations(arch, setting, part, config.recompute_modules) for part in parts]
        return sum(kept), max((a - b for a, b in zip(whole, kept, strict=True)), default=0)
    many, border = config.recompute_layers, _border(arch, setting)
    if config.recompute_method == RecomputeMethod.block:
        return border * len(whole[:many]) + sum(whole[many:]), max(whole[:many], default=0)
    groups = [sum(group) for group in itertools.batched(whole, many)]
    return border * len(groups), max(groups, default=0)


def activations(arch: Architecture, setting: Setting, stage: int, micro_batches: int) -> float:
    """Bytes that a rank of a stage keeps for the backward passes of all micro-batches in flight."""
    pipeline, chunks = setting.parallel.pipeline, setting.parallel.virtual
    border = _border(arch, setting)
    full = setting.performance.recompute == Recompute.full  # the input of a chunk is that of its first group
    kept = [
        recomputation(arch, setting, blocks)[0]
        + border * ((stage + v > 0 and not full) + (stage < setting.last or v < chunks - 1))
        for v, blocks in enumerate(sharding.rank_chunks(arch, setting.parallel, stage))
    ]
    if stage == setting.last:
        kept[-1] += (_norm(arch.hidden, arch, setting) * setting.tokens) / setting.sequence_shards
    # megatron-core's order: chunk by chunk for a group of micro-batches; so many passes forward before the first one backward.
    passes = micro_batches * chunks
    order = [n // pipeline % chunks for n in range(passes)]
    ahead = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline if chunks > 1 else pipeline - stage - 1
    ahead = min(ahead + 1, passes)
    made = [0, *itertools.accumulate(kept[v] for v in order)]
    freed = [0, *itertools.accumulate(kept[-1 - v] for v in order)]
    return attention_masks(arch, setting) + max(made[n + ahead] - freed[n] for n in range(passes - ahead + 1))


def hand_off(
    teacher: Architecture, setting: Setting, stage: int, micro_batches: int, ahead: int, blocks: int = 0
) -> float:
    """Bytes of the teacher's hidden states that a rank of a stage holds; `blocks`: those of which it wants the outputs."""
    held = micro_batches if setting.parallel.pipeline > 1 else min(ahead, micro_batches)
    each = setting.dtype_bytes * teacher.hidden * setting.tokens / setting.sequence_shards
    return held * each * (blocks + (stage == setting.last))


def teacher_weights(
    student: Architecture, teacher: Architecture, setting: Setting, teacher_parallel: ParallelConfig | None, stage: int
) -> int:
    """Bytes of a teacher of layout `other` on a rank of the student's `stage`, of these the one that has most (see
    `distill.teacher.cut_head`); None: on ranks of its own."""
    if teacher_parallel is None:
        rows = parameter_table.padded_vocab(student, setting.parallel.tensor) // setting.parallel.tensor
        return setting.dtype_bytes * rows * teacher.hidden * (stage == setting.last)
    own, most = dataclasses.replace(setting, parallel=teacher_parallel), 0
    copy = 1 if setting.performance.teacher_fp8 else 0
    rows, owned = (
        parameter_table.padded_vocab(arch, s.parallel.tensor) for arch, s in ((student, setting), (teacher, own))
    )
    same, last = (rows, setting.parallel.tensor) == (owned, teacher_parallel.tensor), stage == setting.last
    # Pipeline stages are the outermost axis: each is a stretch of the ranks.
    ranks, each = (max(1, setting.world // layout.pipeline) for layout in (setting.parallel, teacher_parallel))
    for place in range(stage * ranks // each, ((stage + 1) * ranks - 1) // each + 1):
        elements = sum(parameters(teacher, own, place))
        if not (last and place == own.last and same):
            freed = place == own.last and not (teacher.tied and place == 0)
            elements -= freed * owned // teacher_parallel.tensor * teacher.hidden
            elements += last * rows // setting.parallel.tensor * teacher.hidden
        most = max(most, setting.dtype_bytes * elements + copy * matrices(teacher, own, place))
    return most


def states_workspace(teacher: Architecture, setting: Setting) -> float:
    """Bytes that the loss between two blocks takes in its backward pass: about eight fp32 tensors as wide as the teacher."""
    return 32 * teacher.hidden * setting.tokens / setting.sequence_shards


def loss_workspace(student: Architecture, teacher: Architecture | None, setting: Setting, top_k: int = 0) -> float:
    """Bytes that the loss takes beside the student's activations (see `distill.losses`)."""
    b, tokens = setting.dtype_bytes, setting.tokens
    rows = parameter_table.padded_vocab(student, setting.parallel.tensor) // setting.parallel.tensor
    width = student.hidden + (teacher.hidden if teacher else 0)
    bytes_a_token = b * rows * (2 if teacher else 1)
    chunk = tile_sizes.chunk_tokens(tokens, bytes_a_token, setting.device)
    if budget := setting.performance.loss_chunk_mb:
        chunk = tile_sizes.even(tokens, budget << 20, bytes_a_token)
    head, several, tiles, block = rows * student.hidden, chunk < tokens, 0, 0
    if setting.device == Device.cpu:  # elsewhere the Triton kernels, which have no buffers
        tiles = 4 * tile_sizes.TILE_BUFFERS * tile_sizes.tile_tokens(tokens, rows, setting.device) * rows
        # A block of the head's gradient, and an fp32 copy to add it to the fp32 sum.
        block = (b + 4 * several) * min(2 * tile_sizes.TILE_ELEMENTS[setting.device], head)
    whole = b * tokens * (width if setting.parallel.sequence else 0)  # gathered hidden states
    # Of a token's k largest logits: their places and the numbers of them, 20 bytes for each rank's while they are sorted.
    places = top_k * (12 + 20 * (setting.parallel.tensor if teacher else 1))
    at_chunk = chunk * (bytes_a_token + b * width + places) + block + (4 if several else b) * head
    at_end = (4 + b if several else b) * head
    return whole + b * tokens * student.hidden + tiles + max(at_chunk, at_end)


def block_workspace(arch: Architecture, setting: Setting) -> float:
    """Bytes that one block's MLP takes in its backward pass: gradients of its channels, and of one matrix."""
    tp = 1 if arch.experts else setting.parallel.tensor
    share = arch.experts_per_token / setting.sequence_shards if arch.experts else 1 / tp
    return setting.dtype_bytes * (
        setting.tokens * (2 * arch.hidden + 3 * arch.ffn * share) + arch.hidden * arch.ffn / tp
    )


def training(
    student: Architecture,
    teacher: Architecture | None,
    setting: Setting,
    micro_batches: int,
    ahead: int = 1,
    distributed: bool = True,
    pairs: Sequence[tuple[int, int]] = (),
    teacher_parallel: ParallelConfig | None = None,
    remote_teacher: bool = False,
    top_k: int = 0,
) -> list[dict[str, float]]:
    """Bytes of a training step on a rank of each pipeline stage, by kind and in all (see the head of this file).

    Args:
        teacher: None trains on the text alone.
        micro_batches: of a step, on one data-parallel rank.
        ahead: micro-batches that the teacher runs at a time.
        distributed: the optimizer's state is shared out over data-parallel ranks.
        pairs: blocks of student and teacher whose outputs are compared (`checks.state_pairs`).
        other: the teacher's layout, where it is not the student's.
        apart: it has ranks of its own, and the student's only rows of its head.
        top_k: of the divergence; 0 is the whole vocabulary.
    """
    rows, projection = [], 0
    if pairs and student.hidden != teacher.hidden:
        projection = student.hidden * teacher.hidden
    routes = set(checks.state_routes(student, teacher, pairs, setting.parallel, teacher_parallel))
    for stage in range(setting.parallel.pipeline):
        row = model_states(student, setting, stage, distributed, projection)
        wanted = sum(target == stage for _, _, target in routes)
        row |= {"teacher": 0, "hand-off": 0}
        if teacher:
            row["teacher"] = teacher_weights(
                student, teacher, setting, None if remote_teacher else teacher_parallel or setting.parallel, stage
            )
            row["hand-off"] = hand_off(teacher, setting, stage, micro_batches, ahead, wanted)
        aside = 0
        if teacher and setting.performance.teacher_offload:
            aside = row["teacher"]
            row["teacher"] = teacher_weights(student, teacher, setting, None, stage)
            aside -= row["teacher"]
        if not (setting.performance.grad_reduce_in_fp32 or setting.performance.precision_aware_optimizer):
            aside = max(aside, 4 * _owned(setting, parameters(student, setting, stage), distributed))
        row["activations"] = activations(student, setting, stage, micro_batches)
        rank_chunks = sharding.rank_chunks(student, setting.parallel, stage)
        work = block_workspace(student, setting) + max(recomputation(student, setting, own)[1] for own in rank_chunks)
        if wanted:
            work = max(work, states_workspace(teacher, setting))
        if stage == setting.last:
            work = max(work, loss_workspace(student, teacher, setting, top_k))
        if setting.device == Device.cpu and distributed:
            # gloo adds up a copy of the gradients, when the activations are gone.
            work = max(work, row["gradients"] - row["activations"] - row["hand-off"])
        row["workspace"] = max(work, aside - row["activations"])
        rows.append(row | {"total": sum(row.values())})
    return rows
