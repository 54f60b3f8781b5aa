"""Bytes that autograd keeps of forward passes, layer by layer. Pure formulas, no torch import.

On "cuda" norms and activations are the fused ones of megatron-core and Transformer Engine; on "cpu" torch keeps their intermediate
results too.
"""

import itertools
from collections.abc import Sequence

from minitron_mcore.config.performance import Recompute, RecomputeMethod
from minitron_mcore.config.settings import Device, Dtype
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models import attention_band, sharding
from minitron_mcore.models.architecture import Architecture


def _norm(width: float, arch: Architecture, setting: Setting) -> float:
    """Of a norm over `width` channels, for one token: its input and statistics."""
    if setting.device == Device.cpu and arch.traits.norm == "RMSNorm":
        return 8 * width + 4  # the input in fp32, and the same divided by its length
    return setting.dtype_bytes * width + 8


def mlp(arch: Architecture, setting: Setting) -> float:
    """Of an MLP or its experts, for one token: the gate's and up projection's outputs and the activation's result."""
    fused = setting.device == Device.cuda
    channels = (3 if fused else 5) if arch.traits.gated else 2
    if not arch.experts:
        return setting.dtype_bytes * channels * arch.ffn / setting.parallel.tensor
    # Balanced routing: a rank's experts receive as many tokens as the rank sends. Each copy of a token has an input and 24 bytes of
    # routing indices; the router keeps five numbers an expert.
    routed = setting.dtype_bytes * (arch.hidden + (channels + (not fused)) * arch.ffn) + 24
    return (arch.experts_per_token * routed + 5 * arch.experts) / setting.sequence_shards


def _attention(arch: Architecture, setting: Setting, core_recomputed: bool) -> float:
    """Of attention between its two matrices, for one token: queries, keys and values, rotated queries and keys, the output.

    `core_recomputed`: everything after the rotary embedding but the output is recomputed.
    """
    tp, context = setting.parallel.tensor, setting.parallel.context
    heads, groups, cpu = arch.heads / tp, arch.groups / tp, setting.device == Device.cpu and not core_recomputed
    kept, by_torch = 3 * heads + 3 * groups, cpu or (setting.document_mask and not core_recomputed)
    if by_torch and context > 1:
        # Rotated queries, the output in parts and as a whole; keys and values of the whole sequence.
        kept = 3 * heads + 2 * context * groups
    elif by_torch and (setting.document_mask or (arch.window and arch.window < setting.sequence_length)):
        kept += heads  # the output in parts as well
    norms = (heads + groups) * _norm(arch.head_dim, arch, setting) if arch.traits.qk_norm else 0
    if norms and cpu and context > 1 and setting.dtype == Dtype.fp32:
        kept += heads + groups  # the first matrix's output too: fp32 norms keep it, bf16 norms a copy in fp32
    log_sum_exps = 0 if core_recomputed else 4 * heads
    return setting.dtype_bytes * arch.head_dim * kept + norms + log_sum_exps


def layer(arch: Architecture, setting: Setting, part: str, recomputed: Sequence[str] = ()) -> float:
    """Of one "attention" or "mlp" layer, for a micro-batch on one rank.

    Args:
        recomputed: modules that are recomputed (see `performance.PerformanceConfig`).
    """
    b = setting.dtype_bytes
    # The norm's input, and its output, which is the input of the matrices.
    norm = _norm(arch.hidden, arch, setting) + (0 if "layernorm" in recomputed else b * arch.hidden)
    token = norm / setting.sequence_shards
    if part == "mlp":
        return setting.tokens * (token + (0 if {"mlp", "moe"} & set(recomputed) else mlp(arch, setting)))
    if "mlp" in recomputed and setting.device == Device.cpu:
        # megatron-core keeps the input of a recomputed MLP, in an attention layer of an absent one. Fused norms keep it anyway.
        token += b * arch.hidden / setting.sequence_shards
    token += _attention(arch, setting, "core_attn" in recomputed)
    rotary = 4 * b * arch.head_dim * arch.rotary_fraction  # cosine and sine of a position, for queries and for keys
    return setting.tokens * token + rotary * (setting.sequence_length // setting.parallel.context)


def document_masks(arch: Architecture, setting: Setting) -> float:
    """Of the masks of a micro-batch under data.document_mask, which a rank's layers share, if one document fills the sample.

    A mask has a number for each query head of a group, each query, and each key that the query's block of r queries uses (see
    `layer_spec.document_attention`). Of Q queries whose last one is at position E, these are E - (Q - r) / 2 keys on average, in a
    window of w positions at most w + r.
    """
    context, length = setting.parallel.context, setting.sequence_length
    queries = length // (2 * context) if context > 1 else length
    numbers = 0.0
    for end in (queries, length)[context == 1 :]:  # of the first context-parallel rank; all ranks' sums are equal
        window = min(arch.window or end, end)
        rows, _ = attention_band.attention_band(queries, end, window)
        numbers += queries * min(end - (queries - rows) / 2, window + rows)
    return setting.dtype_bytes * setting.micro_batch * (arch.heads // arch.groups) * numbers


def border(arch: Architecture, setting: Setting) -> float:
    """Of the hidden states of a micro-batch between two layers."""
    return setting.dtype_bytes * arch.hidden * setting.rank_tokens


def chunk(arch: Architecture, setting: Setting, blocks: Sequence[int]) -> tuple[float, float]:
    """Of a micro-batch in a model chunk with these blocks: bytes kept until the backward pass, and bytes recomputed at a time."""
    config, parts = setting.performance, [part for block, part in arch.layers if block in blocks]
    whole = [layer(arch, setting, part) for part in parts]
    if config.recompute == Recompute.none:
        return sum(whole), 0
    if config.recompute == Recompute.selective:
        kept = [layer(arch, setting, part, config.recompute_modules) for part in parts]
        return sum(kept), max((a - b for a, b in zip(whole, kept, strict=True)), default=0)
    size, each = config.recompute_layers, border(arch, setting)
    if config.recompute_method == RecomputeMethod.block:
        return each * len(whole[:size]) + sum(whole[size:]), max(whole[:size], default=0)
    groups = [sum(group) for group in itertools.batched(whole, size)]
    return each * len(groups), max(groups, default=0)


def in_flight(setting: Setting, number: int, micro_batches: int) -> int:
    """The most forward passes of a pipeline stage's chunks that wait for their backward passes.

    1F1B runs one more than there are later stages before the first backward pass, the interleaved schedule more.
    """
    pipeline, chunks = setting.parallel.pipeline, setting.parallel.virtual
    ahead = 2 * (pipeline - number - 1) + (chunks - 1) * pipeline if chunks > 1 else pipeline - number - 1
    return min(ahead + 1, micro_batches * chunks)


def stage(arch: Architecture, setting: Setting, number: int, micro_batches: int) -> float:
    """Of a pipeline stage's rank: the most that all micro-batches in flight keep for their backward passes."""
    pipeline, chunks = setting.parallel.pipeline, setting.parallel.virtual
    full = setting.performance.recompute == Recompute.full  # the input of a chunk is that of its first group
    kept = [
        chunk(arch, setting, blocks)[0]
        + border(arch, setting) * ((number + v > 0 and not full) + (number < setting.last or v < chunks - 1))
        for v, blocks in enumerate(sharding.rank_chunks(arch, setting.parallel, number))
    ]
    if number == setting.last:
        kept[-1] += _norm(arch.hidden, arch, setting) * setting.rank_tokens
    # megatron-core's schedules process a group of micro-batches chunk by chunk.
    passes, ahead = micro_batches * chunks, in_flight(setting, number, micro_batches)
    order = [n // pipeline % chunks for n in range(passes)]
    allocated = [0, *itertools.accumulate(kept[v] for v in order)]
    freed = [0, *itertools.accumulate(kept[-1 - v] for v in order)]
    return max(allocated[n + ahead] - freed[n] for n in range(passes - ahead + 1))
