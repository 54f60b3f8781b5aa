"""Bytes that a rank holds in training, forward passes and saves. Pure formulas, no torch import.

Training is estimated at the worst moment of a step:

    weights      the student's, in the run's dtype (bf16: 2 bytes, fp32: 4); under fp8 2 more for each weight of a layer's
                 matrices: its 8-bit copy and the copy's transpose
    gradients    megatron-core's buffer: 4 bytes a parameter, 2 with performance.grad_reduce_in_fp32=false
    optimizer    Adam's two fp32 moments and, for bf16 weights, an fp32 copy: 12 or 8 bytes a parameter, divided by the
                 data-parallel and context-parallel ranks (an expert's by the ranks that hold it). The precision-aware
                 optimizer: 2 for the lower half of the copy, moments of 4 or 2 each
    teacher      its weights in its own layout (under teacher_fp8 1 more for each weight of a layer's matrices), and the rows of its
                 head that the loss needs; with performance.teacher_offload these rows only
    hand-off     the teacher's final hidden states, and those compared with the student's blocks, of all micro-batches it runs ahead
    activations  see `activations`
    masks        with data.document_mask: those of the micro-batches whose forward passes wait for backward passes, and those kept
                 for other layers (see `_held_masks`)
    workspace    on the last stage the loss; on others the gradients of one block and what is recomputed at a time, or the loss
                 between blocks. Or what is alive only while activations are not, if that is more: an offloaded teacher, the
                 optimizer's fp32 copy of bf16 gradients, gloo's copy of the gradients

The projection between blocks of different widths counts as the student's, whole on every rank. CUDA's context, NCCL's buffers and
the allocator's fragmentation come on top.
"""

import dataclasses
import math
from collections.abc import Sequence

from minitron_mcore.checkpoint import disk
from minitron_mcore.config.performance import Recompute
from minitron_mcore.config.settings import Device, DistillConfig, Dtype
from minitron_mcore.config.stages import CacheKind
from minitron_mcore.distill import checks, tile_sizes
from minitron_mcore.estimate import activations
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models import attention_band, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture

GIB = 2**30
CachedTeacher = tuple[CacheKind, int | None]
"""Kind and top_k of a teacher's cache."""


def parameters(arch: Architecture, setting: Setting, stage: int) -> tuple[int, int]:
    """Parameters in the memory of a rank of a pipeline stage, padding included: (experts', all others)."""
    tp, counts = setting.parallel.tensor, [0, 0]
    for parameter in _rank_parameters(arch, setting, stage):
        counts[parameter.expert is None] += _local_elements(parameter, tp)
    if arch.tied and 0 < stage == setting.last:
        counts[True] += parameter_table.padded_vocab(arch, tp) // tp * arch.hidden  # its copy of the embedding table
    return counts[False], counts[True]


def _rank_parameters(arch: Architecture, setting: Setting, stage: int) -> list[parameter_table.Parameter]:
    experts = range(arch.experts // setting.parallel.expert)
    return list(sharding.parameters_on_rank(arch, setting.parallel, stage, experts))


def _local_elements(parameter: parameter_table.Parameter, tp: int) -> int:
    """A tensor-parallel rank's elements of a parameter."""
    if "vocab" in parameter.row.axes:
        return parameter_table.padded_vocab(parameter.arch, tp) // tp * parameter.arch.hidden
    return math.prod(parameter.shape) // (1 if parameter.row.tp_dim is None else tp)


def _matrix_elements(arch: Architecture, setting: Setting, stage: int) -> int:
    """A rank's weights of the matrices in its layers: those with 8-bit copies under fp8."""
    layers = (p for p in _rank_parameters(arch, setting, stage) if p.block is not None and len(p.shape) == 2)
    return sum(_local_elements(parameter, setting.parallel.tensor) for parameter in layers)


def model_states(arch: Architecture, setting: Setting, stage: int, extra: int = 0) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on a rank of a stage; `extra`: parameters beside the model's."""
    experts, others = parameters(arch, setting, stage)
    others += extra
    config, each = setting.performance, optimizer_bytes(setting.dtype)
    if config.precision_aware_optimizer:
        each = 10 if config.exp_avg_dtype == Dtype.fp32 else 6
    copies = 2 * _matrix_elements(arch, setting, stage) if config.fp8 else 0
    return {
        "weights": setting.dtype_bytes * (experts + others) + copies,
        "gradients": (4 if config.grad_reduce_in_fp32 else 2) * (experts + others),
        "optimizer": math.ceil(each * _optimizer_share(setting, experts, others)),
    }


def optimizer_bytes(dtype: Dtype) -> int:
    """Of a parameter: Adam's two fp32 moments and, for bf16 weights, an fp32 copy."""
    return 12 if dtype == Dtype.bf16 else 8


def _optimizer_share(setting: Setting, experts: int, others: int) -> float:
    """Of a rank's parameters, experts' and others, the number whose optimizer state it holds."""
    expert_ranks = max(1, setting.world // (setting.parallel.pipeline * setting.parallel.expert))
    return experts / expert_ranks + others / (setting.replicas * setting.parallel.context)


def training(
    students: Sequence[Architecture],
    teacher: Architecture | None,
    config: DistillConfig,
    setting: Setting,
    cached: CachedTeacher | None = None,
    other_teachers: Sequence[Architecture] = (),
) -> list[dict[str, float]]:
    """Bytes on a rank of each pipeline stage: by kind (see the head of this file), "total", and "host memory of a save".

    Several students keep their states at the same time and take their steps in turn.

    Args:
        teacher: None trains on the text alone.
        cached: of the teacher, if it is not live.
        other_teachers: of several live ones.
    """
    one, rows = len(students) == 1, []
    micro_batches = _micro_batches(config, setting)
    background = setting.device == Device.cuda if config.async_save is None else config.async_save
    for stage in range(setting.parallel.pipeline):
        logits = teacher if not cached or cached[0] != CacheKind.topk else None
        ahead = config.teacher_ahead if one else micro_batches
        each = [_student(student, logits, config, setting, stage, ahead) for student in students]
        row = {kind: max(student[kind] for student in each) for kind in each[0]}
        row |= {kind: sum(student[kind] for student in each) for kind in ("weights", "gradients", "optimizer")}
        for other in other_teachers:
            added = _student(students[0], other, config, setting, stage, ahead)
            row |= {kind: row[kind] + added[kind] for kind in ("teacher", "hand-off")}
            row["workspace"] = max(row["workspace"], added["workspace"])
        if cached and teacher:
            # For one student: a micro-batch in use and two that are read ahead.
            row |= _cached_teacher(students[0], teacher, cached, setting, stage, 3 if one else micro_batches)
        saves = [save(student, setting, stage, background) for student in students]
        host = sum(saves) if background else max(saves)
        rows.append(row | {"total": sum(row.values()), "host memory of a save": host})
    return rows


def _micro_batches(config: DistillConfig, setting: Setting) -> int:
    """Of a step, on one data-parallel rank."""
    return max(1, config.global_batch // (setting.micro_batch * setting.replicas))


def _student(
    student: Architecture, teacher: Architecture | None, config: DistillConfig, setting: Setting, stage: int, ahead: int
) -> dict[str, float]:
    """Bytes by kind of one student and its teacher, which runs `ahead` micro-batches at a time."""
    micro_batches = _micro_batches(config, setting)
    compared, projection, offloaded = 0, 0, 0.0
    if teacher:
        pairs = checks.state_pairs(student, teacher, config.hidden_state_loss)
        routes = set(checks.state_routes(student, teacher, pairs, setting.parallel, config.teacher_parallel))
        compared = sum(target == stage for *_, target in routes)
        projection = student.hidden * teacher.hidden if pairs and student.hidden != teacher.hidden else 0
    row: dict[str, float] = {**model_states(student, setting, stage, projection), "teacher": 0, "hand-off": 0}
    if teacher:
        row["teacher"] = _teacher_weights(student, teacher, config, setting, stage)
        if setting.performance.teacher_offload:
            kept = _head_rows(student, teacher, setting, stage)
            offloaded, row["teacher"] = row["teacher"] - kept, kept
        held = micro_batches if setting.parallel.pipeline > 1 else min(ahead, micro_batches)
        row["hand-off"] = held * activations.border(teacher, setting) * (compared + (stage == setting.last))
    row["activations"] = activations.stage(student, setting, stage, micro_batches)
    if setting.document_mask:
        own, of_teacher = activations.document_masks(student, setting), 0.0
        if teacher and not config.teacher_ranks:
            teacher_setting = dataclasses.replace(setting, parallel=config.teacher_parallel or setting.parallel)
            of_teacher = activations.document_masks(teacher, teacher_setting)
        in_flight = activations.in_flight(setting, stage, micro_batches)
        row["masks"] = _held_masks(setting, own, max(own, of_teacher), in_flight)
    # Alive only while activations are not.
    between = offloaded
    if not (setting.performance.grad_reduce_in_fp32 or setting.performance.precision_aware_optimizer):
        between = max(between, 4 * _optimizer_share(setting, *parameters(student, setting, stage)))
    if setting.device == Device.cpu:
        between = max(between, row["gradients"])
    work = _workspace(student, teacher, setting, stage, compared)
    return row | {"workspace": max(work, between - row["activations"])}


def _held_masks(setting: Setting, own: float, largest: float, in_flight: int) -> float:
    """Bytes of the masks of `in_flight` micro-batches, of which each has `own` bytes, and of those kept for other layers.

    autograd keeps none where attention is recomputed. `attention_band.MASKS_KEPT` lists of masks are kept, of the latest
    micro-batch and others with at most `largest` bytes; under context parallelism a micro-batch has two lists.
    """
    config = setting.performance
    recomputed = config.recompute == Recompute.full
    recomputed |= config.recompute == Recompute.selective and "core_attn" in config.recompute_modules
    kept = attention_band.MASKS_KEPT // (2 if setting.parallel.context > 1 else 1)
    return own * (1 if recomputed else in_flight) + largest * (kept - 1)


def _head_rows(student: Architecture, teacher: Architecture, setting: Setting, stage: int) -> int:
    """Bytes of the rows of the teacher's head that the student's loss needs, on the last stage."""
    rows = parameter_table.padded_vocab(student, setting.parallel.tensor) // setting.parallel.tensor
    return setting.dtype_bytes * rows * teacher.hidden * (stage == setting.last)


def _teacher_weights(
    student: Architecture, teacher: Architecture, config: DistillConfig, setting: Setting, stage: int
) -> int:
    """Bytes of a live teacher on the rank of the student's `stage` that holds most of it (see `distill.teacher.cut_head`)."""
    head = _head_rows(student, teacher, setting, stage)
    if config.teacher_ranks:
        return head
    parallel = config.teacher_parallel or setting.parallel
    own, most = dataclasses.replace(setting, parallel=parallel), 0
    student_rows = parameter_table.padded_vocab(student, setting.parallel.tensor)
    teacher_rows = parameter_table.padded_vocab(teacher, parallel.tensor)
    same_rows = (student_rows, setting.parallel.tensor) == (teacher_rows, parallel.tensor)
    # Pipeline stages are the outermost axis of the ranks: a stage is a range of `each` ranks.
    student_ranks, each = (max(1, setting.world // layout.pipeline) for layout in (setting.parallel, parallel))
    for own_stage in range(stage * student_ranks // each, ((stage + 1) * student_ranks - 1) // each + 1):
        size = setting.dtype_bytes * sum(parameters(teacher, own, own_stage))
        if not (stage == setting.last and own_stage == own.last and same_rows):
            if own_stage == own.last and not (teacher.tied and own_stage == 0):  # its own head is freed
                size -= setting.dtype_bytes * (teacher_rows // parallel.tensor) * teacher.hidden
            size += head
        copies = _matrix_elements(teacher, own, own_stage) if setting.performance.teacher_fp8 else 0
        most = max(most, size + copies)
    return most


def _cached_teacher(
    student: Architecture, teacher: Architecture, cached: CachedTeacher, setting: Setting, stage: int, held: int
) -> dict[str, float]:
    """Bytes of a cached teacher: its head, where the cache has hidden states, and `held` micro-batches."""
    kind, k = cached
    if kind == CacheKind.topk:  # an id of 8 bytes and a log-probability of 4 for each entry, and the tail's
        return {"teacher": 0, "hand-off": held * setting.tokens * (12 * (k or 0) + 4) * (stage == setting.last)}
    states = held * activations.border(teacher, setting) * (stage == setting.last)
    return {"teacher": _head_rows(student, teacher, setting, stage), "hand-off": states}


def _workspace(
    student: Architecture, teacher: Architecture | None, setting: Setting, stage: int, compared: int
) -> float:
    """Bytes of temporary tensors beside the activations; `compared`: blocks whose outputs are compared with the teacher's."""
    chunks = sharding.rank_chunks(student, setting.parallel, stage)
    work = _block_gradients(student, setting) + max(activations.chunk(student, setting, blocks)[1] for blocks in chunks)
    if compared and teacher:  # about eight fp32 tensors as wide as the teacher
        work = max(work, 32 * teacher.hidden * setting.rank_tokens)
    return max(work, _loss(student, teacher, setting)) if stage == setting.last else work


def _block_gradients(arch: Architecture, setting: Setting) -> float:
    """Bytes of the gradients in the backward pass of one MLP: of its channels, its input and output, and one matrix."""
    tp = 1 if arch.experts else setting.parallel.tensor
    share = arch.experts_per_token / setting.sequence_shards if arch.experts else 1 / tp
    channels = setting.tokens * (2 * arch.hidden + 3 * arch.ffn * share)
    return setting.dtype_bytes * (channels + arch.hidden * arch.ffn / tp)


def _loss(student: Architecture, teacher: Architecture | None, setting: Setting) -> float:
    """Bytes of the loss (see `distill.losses`): the hidden states' gradient, the head's gradient, a chunk's logits and inputs."""
    b, tokens = setting.dtype_bytes, setting.tokens
    rows = parameter_table.padded_vocab(student, setting.parallel.tensor) // setting.parallel.tensor
    width, row_bytes = student.hidden, b * rows
    if teacher:
        width, row_bytes = width + teacher.hidden, 2 * row_bytes
    mib = setting.performance.loss_chunk_mb
    chunk = tile_sizes.chunk_tokens(tokens, row_bytes, mib << 20 if mib else tile_sizes.CHUNK_BYTES[setting.device])
    gathered = b * tokens * (width if setting.parallel.sequence else 0)
    head, several = rows * student.hidden, chunk < tokens
    in_chunk = chunk * (row_bytes + b * width) + (4 if several else b) * head
    at_end = (4 + b if several else b) * head  # the fp32 sum over several chunks is cast
    return gathered + b * tokens * student.hidden + max(in_chunk, at_end)


def forward_passes(arch: Architecture, setting: Setting) -> list[dict[str, float]]:
    """Bytes on a rank of each pipeline stage where a model only makes forward passes: weights, and one block's tensors."""
    token = activations.mlp(arch, setting) + 4 * setting.dtype_bytes * arch.hidden / setting.sequence_shards
    rows = []
    for stage in range(setting.parallel.pipeline):
        row = {
            "weights": setting.dtype_bytes * sum(parameters(arch, setting, stage)),
            "workspace": setting.tokens * token,
        }
        if setting.document_mask:
            each = activations.document_masks(arch, setting)
            row["masks"] = _held_masks(setting, each, each, 1)
        rows.append(row | {"total": sum(row.values())})
    return rows


def generation(arch: Architecture, setting: Setting) -> list[dict[str, float]]:
    """`forward_passes`, and "cache": keys and values of a batch's tokens, which there is none of under context parallelism."""
    rows = forward_passes(arch, setting)
    for stage, row in enumerate(rows):
        own = {block for chunk in sharding.rank_chunks(arch, setting.parallel, stage) for block in chunk}
        layers = sum(part == "attention" and block in own for block, part in arch.layers)
        each = 2 * setting.dtype_bytes * arch.groups * arch.head_dim / setting.parallel.tensor
        row["cache"] = layers * setting.tokens * each * (setting.parallel.context == 1)
        row["total"] += row["cache"]
    return rows


def depth_study(arch: Architecture, setting: Setting, windows: int) -> list[dict[str, float]]:
    """`forward_passes`, and "hidden states": on the last stage, the final states that a depth study keeps of all `windows`."""
    passes = math.ceil(windows / (setting.micro_batch * setting.replicas))
    states = [
        passes * activations.border(arch, setting) * (n == setting.last) for n in range(setting.parallel.pipeline)
    ]
    rows = zip(forward_passes(arch, setting), states, strict=True)
    return [row | {"hidden states": size, "total": row["total"] + size} for row, size in rows]


def remote_teacher(teacher: Architecture, config: DistillConfig, setting: Setting) -> list[dict[str, float]]:
    """`forward_passes` of a teacher on ranks of its own, and on its last stage the final states that are not sent yet."""
    parallel = config.teacher_parallel or setting.parallel
    own = dataclasses.replace(setting, parallel=parallel, world=config.teacher_ranks)
    requested = config.global_batch // setting.micro_batch
    if setting.parallel.pipeline == 1:
        requested = min(requested, config.teacher_ahead * setting.replicas)
    rows = []
    for stage, row in enumerate(forward_passes(teacher, own)):
        size = math.ceil(requested / own.replicas) * activations.border(teacher, own) * (stage == own.last)
        rows.append(row | {"hand-off": size, "total": row["total"] + size})
    return rows


def save(arch: Architecture, setting: Setting, stage: int, background: bool = False) -> int:
    """Bytes of host memory that a save takes on a rank beside what training holds.

    In the background there is a copy of the rank's share of the weights and of the optimizer's state; on a CPU of at most a quarter
    of what it holds (see `checkpoint.step_saver`). Otherwise, on CUDA, each thread copies the fp32 piece that it writes
    (`checkpoint.disk`).
    """
    if background:
        states, copies = model_states(arch, setting, stage), setting.replicas * setting.parallel.context
        share = math.ceil(states["weights"] / copies + states["optimizer"])
        held = sum(states.values())
        return share if setting.device == Device.cuda else min(share, max(held // 4, disk.MIN_COPY_BYTES))
    return 0 if setting.device == Device.cpu else disk.THREADS * 4 * disk.PIECE_ELEMENTS
