"""Collectives of a rank, by stage, layout and model: calls and bytes. Pure formulas, no torch import.

A rank holds R = T / (TP x CP) of a micro-batch's T tokens with sequence parallelism, T / CP without; an element has b bytes. Per
micro-batch, F forward and B backward passes through the blocks of a pipeline stage make these collectives:

    TP     an attention or dense MLP layer: with sequence parallelism F + 2 B gathers and F + B scatters of its hidden states
           (the backward pass gathers the layer's input again), without F + B all-reduces. The embedding table and the loss's heads:
           one scatter and one gather each, one in each direction; without sequence parallelism an all-reduce each. The loss: a
           gather of six fp64 numbers a token and chunk (forward KL)
    CP     an attention layer: keys and values of a rank's tokens, passed around the ring F + 2 B times on CUDA; F gathers and
           B scatters on the CPU
    EP     a layer of experts: 2 F + 2 B all-to-alls of a rank's tokens, k copies each, on CUDA; on the CPU (all-to-all needs
           CUDA) gathers and scatters of the hidden states and routing probabilities of all EP ranks' tokens
    PP     hidden states of R tokens to the next stage, their gradient to the previous one

and per step

    DP     gradients are scattered in fp32 (or bf16) and weights gathered in b bytes, in one call each (with
           performance.overlap_grad_reduce one per bucket); with experts megatron-core gathers all weights twice. Experts' over
           the ranks that hold them
    TP     gradients of norms and routers, which sequence parallelism computes on each rank's tokens
    PP     the tied embedding table's gradient, between the first and the last stage
    DP     figures of all ranks for metrics.jsonl: a gather of three fp32 numbers a rank over the world

Left out are scalars (losses, gradient norms, flags), the hidden-state loss, and teachers in a layout or on ranks of their own.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from minitron_mcore.config.performance import Recompute
from minitron_mcore.config.settings import Device, DistillConfig
from minitron_mcore.config.stages import CacheKind
from minitron_mcore.distill import checks, tile_sizes
from minitron_mcore.estimate import memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models import parameter_table, sharding
from minitron_mcore.models.architecture import Architecture

AXES = ("TP", "CP", "EP", "PP", "DP")
LOSS_SUMS = 6
"""fp64 numbers that the loss gathers for a token: five, and one of forward KL."""
RANK_FIGURES = 3
"""fp32 numbers of a rank that `metrics.rank_figures` gathers after a step."""


@dataclass(frozen=True)
class Collective:
    """Equal collectives that a rank makes."""

    axis: str
    """One of AXES."""
    operation: str
    """all_gather, reduce_scatter, all_reduce, all_to_all or send."""
    ranks: int
    """Of the group."""
    calls: int
    size: float
    """Bytes of the whole tensor of a call: an all_gather's result, a reduce_scatter's input."""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all calls, by ring algorithms."""
        share = {"send": 1.0, "all_reduce": 2 * (self.ranks - 1) / self.ranks}
        return self.calls * self.size * share.get(self.operation, (self.ranks - 1) / self.ranks)


@dataclass(frozen=True)
class Passes:
    """Passes of one model over a micro-batch: forward passes of its blocks (two with full recomputation) and backward passes."""

    arch: Architecture
    forward: int
    backward: int
    loss: bool = True
    """The final hidden states enter a loss's head."""

    @classmethod
    def training(cls, arch: Architecture, setting: Setting) -> "Passes":
        return cls(arch, 1 + (setting.performance.recompute == Recompute.full), 1)

    @property
    def products(self) -> int:
        """Passes through the blocks in matrix products; a backward pass has two for each of a forward pass."""
        return self.forward + 2 * self.backward


def bytes_sent(collectives: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a rank sends, by axis."""
    sent = dict.fromkeys(AXES, 0.0)
    for each in collectives:
        sent[each.axis] += each.sent
    return sent


def micro_batch(passes: Passes, setting: Setting, stage: int) -> Iterator[Collective]:
    """Of a micro-batch through one model on a rank of a pipeline stage, without the loss's own."""
    arch, p = passes.arch, setting.parallel
    blocks = {block for chunk in sharding.rank_chunks(arch, p, stage) for block in chunk}
    parts = [part for block, part in arch.layers if block in blocks]
    attention, mlp = parts.count("attention"), parts.count("mlp")
    states = setting.dtype_bytes * arch.hidden * setting.tokens
    yield from _tensor_parallel(passes, setting, stage, attention + (0 if arch.experts else mlp), states)
    if p.context > 1:
        keys = 2 * setting.dtype_bytes * arch.groups * arch.head_dim / p.tensor * setting.tokens
        if setting.device == Device.cuda:
            yield Collective("CP", "send", p.context, attention * passes.products * (p.context - 1), keys)
        else:
            yield Collective("CP", "all_gather", p.context, attention * passes.forward, keys * p.context)
            yield Collective("CP", "reduce_scatter", p.context, attention * passes.backward, keys * p.context)
    if p.expert > 1 and arch.experts:
        yield from _expert_parallel(passes, setting, mlp)
    if p.pipeline > 1:
        sends = p.virtual - (stage == setting.last) + passes.backward * (p.virtual - (stage == 0))
        yield Collective("PP", "send", p.pipeline, sends, states / setting.sequence_shards)


def _tensor_parallel(passes: Passes, setting: Setting, stage: int, layers: int, states: float) -> Iterator[Collective]:
    """`states`: bytes of the hidden states of a context-parallel rank's tokens."""
    tp, forward, backward = setting.parallel.tensor, passes.forward, passes.backward
    if tp == 1:
        return
    first, head = stage == 0, passes.loss and stage == setting.last
    if setting.parallel.sequence:
        gathers = layers * (forward + 2 * backward) + first * backward + head
        yield Collective("TP", "all_gather", tp, gathers, states)
        yield Collective("TP", "reduce_scatter", tp, layers * (forward + backward) + first + head * backward, states)
    else:
        yield Collective("TP", "all_reduce", tp, layers * (forward + backward) + first + head * backward, states)


def _expert_parallel(passes: Passes, setting: Setting, layers: int) -> Iterator[Collective]:
    arch, ranks, forward, backward = passes.arch, setting.parallel.expert, passes.forward, passes.backward
    states = setting.rank_tokens * arch.hidden
    if setting.device == Device.cuda:
        copies = arch.experts_per_token * states * setting.dtype_bytes
        yield Collective("EP", "all_to_all", ranks, layers * 2 * (forward + backward), copies)
        return
    states, routing = ranks * states, ranks * setting.rank_tokens * arch.experts
    yield Collective("EP", "all_gather", ranks, layers * forward, routing)  # which experts, as bytes
    yield Collective("EP", "all_gather", ranks, layers * forward, 4 * routing)
    yield Collective("EP", "all_gather", ranks, layers * forward, setting.dtype_bytes * states)
    yield Collective("EP", "reduce_scatter", ranks, layers * forward, 4 * states)  # outputs are summed in fp32
    yield Collective("EP", "all_gather", ranks, layers * backward, 4 * states)
    yield Collective("EP", "reduce_scatter", ranks, layers * backward, setting.dtype_bytes * states)
    yield Collective("EP", "reduce_scatter", ranks, layers * backward, 4 * routing)


def training_step(
    students: Sequence[Architecture],
    teacher: Architecture | None,
    config: DistillConfig,
    setting: Setting,
    stage: int,
) -> list[Collective]:
    """Of a step on a rank of a pipeline stage, with a live teacher in the students' layout; None: cached, or no teacher."""
    count = max(1, config.global_batch // (setting.micro_batch * setting.replicas))
    found = [Collective("DP", "all_gather", setting.world, 1, 4 * RANK_FIGURES * setting.world)]
    for student in students:
        found += _times(count, micro_batch(Passes.training(student, setting), setting, stage))
        if stage == setting.last and setting.parallel.tensor > 1:
            found += _times(count, [_loss(student, teacher, setting)])
        found += _gradients(student, setting, stage)
    if teacher:
        found += _times(count, micro_batch(Passes(teacher, 1, 0), setting, stage))
    return found


def _times(count: int, collectives: Iterable[Collective]) -> list[Collective]:
    return [Collective(c.axis, c.operation, c.ranks, count * c.calls, c.size) for c in collectives]


def _loss(student: Architecture, teacher: Architecture | None, setting: Setting) -> Collective:
    tp = setting.parallel.tensor
    rows = parameter_table.padded_vocab(student, tp) // tp * setting.dtype_bytes * (2 if teacher else 1)
    chunk_mb = setting.performance.loss_chunk_mb
    budget = chunk_mb << 20 if chunk_mb else tile_sizes.CHUNK_BYTES[setting.device]
    tokens = tile_sizes.chunk_tokens(setting.tokens, rows, budget)
    return Collective("TP", "all_gather", tp, math.ceil(setting.tokens / tokens), 8 * LOSS_SUMS * tokens * tp)


def _gradients(student: Architecture, setting: Setting, stage: int) -> Iterator[Collective]:
    p, gradient = setting.parallel, 4 if setting.performance.grad_reduce_in_fp32 else 2
    experts, others = memory.parameters(student, setting, stage)
    expert_ranks = max(1, setting.world // (p.pipeline * p.expert))
    shared_table = p.pipeline > 1 and student.tied and stage in (0, setting.last)  # has a bucket of its own
    for count, ranks, buckets in (
        (others, setting.replicas * p.context, 1 + shared_table),
        (experts, expert_ranks, 1),
    ):
        if not count or ranks == 1:
            continue
        yield Collective("DP", "reduce_scatter", ranks, buckets, gradient * count / buckets)
        gathers = buckets * (1 + bool(experts))  # each optimizer, of experts and of the rest, gathers all weights
        yield Collective("DP", "all_gather", ranks, gathers, setting.dtype_bytes * count / buckets)
    if p.tensor > 1 and p.sequence:
        yield Collective("TP", "all_reduce", p.tensor, 1, gradient * _replicated(student, setting, stage))
    if shared_table:
        rows = parameter_table.padded_vocab(student, p.tensor) // p.tensor
        yield Collective("PP", "all_reduce", 2, 1, gradient * rows * student.hidden)


def _replicated(arch: Architecture, setting: Setting, stage: int) -> int:
    """Elements of the parameters that all tensor-parallel ranks hold whole: norms and routers."""
    own = sharding.parameters_on_rank(arch, setting.parallel, stage, range(0))
    return sum(math.prod(parameter.shape) for parameter in own if parameter.row.tp_dim is None)


def importance(arch: Architecture, setting: Setting, stage: int, samples: int) -> list[Collective]:
    """Of scoring `samples` samples with the default statistic, on a rank of a pipeline stage."""
    p = setting.parallel
    blocks = {block for chunk in sharding.rank_chunks(arch, p, stage) for block in chunk}
    parts = [(block, part) for block, part in arch.layers if block in blocks]
    names = [part for _, part in parts]
    norms = len(parts) * arch.hidden
    channels = [arch.heads] * names.count("attention") + [arch.ffn] * (0 if arch.experts else names.count("mlp"))
    count = math.ceil(samples / setting.replicas / setting.micro_batch)
    found = _times(count, micro_batch(Passes(arch, 1, 0, loss=False), setting, stage))
    batch, own = setting.micro_batch, norms + sum(channels) // p.tensor
    if p.tensor > 1:  # their tokens are split over the ranks, without sequence parallelism too
        found.append(Collective("TP", "all_reduce", p.tensor, count, 4 * batch * (norms + 1)))
        found += [Collective("TP", "all_gather", p.tensor, 1, 4 * size) for size in channels]
    if p.context > 1:
        found.append(Collective("CP", "all_reduce", p.context, count, 4 * batch * (own + 1)))
    if setting.replicas > 1:
        found.append(Collective("DP", "all_reduce", setting.replicas, 1, 4 * (own + 1)))
    distances = 4 * (len(parts) + len(blocks))
    for axis, ranks in (("DP", setting.replicas * p.context), ("TP", p.tensor)):
        if ranks > 1:
            found.append(Collective(axis, "all_reduce", ranks, 1, distances))
    routed, expert_ranks = 4 * arch.experts * (arch.ffn + 1), setting.world // (p.pipeline * p.expert)
    if arch.experts and expert_ranks > 1:
        found.append(Collective("DP", "all_reduce", expert_ranks, names.count("mlp"), routed // p.expert))
    if arch.experts and p.expert > 1:
        found.append(Collective("EP", "all_gather", p.expert, names.count("mlp"), routed))
    if p.pipeline > 1:
        found.append(Collective("PP", "all_reduce", p.pipeline, 1, 4 * arch.hidden))
    return found


def teacher_cache(
    arch: Architecture, cached: memory.CachedTeacher, setting: Setting, stage: int, samples: int, tail_draws: int = 0
) -> list[Collective]:
    """Of writing a cache of `samples` samples, on a pipeline stage's rank of tensor-parallel rank 0, which packs its replica's.

    `tail_draws` of the `cached` entries are drawn."""
    (kind, top_k), tp, context = cached, setting.parallel.tensor, setting.parallel.context
    count = math.ceil(samples / setting.replicas / setting.micro_batch)
    found = list(micro_batch(Passes(arch, 1, 0), setting, stage))
    if stage == setting.last and kind == CacheKind.topk and top_k and tp > 1:
        rows = parameter_table.padded_vocab(arch, tp) // tp
        tokens = tile_sizes.chunk_tokens(setting.tokens, 4 * rows, tile_sizes.CHUNK_BYTES[setting.device])
        chunks = math.ceil(setting.tokens / tokens)
        # Of each token: ids and fp64 logits, and the fp64 sum over the rest.
        found.append(Collective("TP", "all_gather", tp, 2 * chunks, 8 * top_k * tokens * tp))
        found.append(Collective("TP", "all_gather", tp, (2 if tail_draws else 1) * chunks, 8 * tokens * tp))
        if tail_draws:
            found.append(Collective("TP", "all_reduce", tp, chunks, 8 * tail_draws * tokens))
    if stage == setting.last and context > 1:
        tensors = {CacheKind.topk: 2 + (arch.vocab > 1 << 16), CacheKind.hidden: 1, CacheKind.hidden_int8: 2}[kind]
        size = checks.cache_bytes(kind, top_k or 0, arch.vocab, arch.hidden, setting.dtype_bytes)
        found.append(Collective("CP", "all_gather", context, tensors, size * setting.tokens * context / tensors))
        found.append(Collective("CP", "all_gather", context, tensors, 8 * setting.sequence_length))  # their positions
    return _times(count, found)
