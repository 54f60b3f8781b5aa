"""Aggregations of activations to importance scores (arXiv 2407.14679, section 2.2), over a sequence and then over samples.

    mean        1/n sum |x|
    l2          sqrt( sum x^2 )
    variance    1/n sum (x - mean)^2        of the signed values; over n, not n - 1

Both levels use the same three aggregations. Over the sequence, x are the real tokens of a sample, so a longer sample has a
larger l2. Over samples, x are the sequence scores of all calibration samples, independent of micro-batches. The paper specifies
neither.

Each aggregation is computed from partial sums of ranks and micro-batches. The variance uses sums around each part's own mean,
which avoids cancellation (Chan, Golub and LeVeque, 1979).
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_mcore.config.settings import Aggregation
from minitron_mcore.parallel import process_groups

DEGREE = {Aggregation.mean: 1, Aggregation.l2: 1, Aggregation.variance: 2}
"""The aggregation of w x is w to this power times the aggregation of x, for w >= 0."""


class Sums(NamedTuple):
    """Sufficient statistics of n values per channel, fp32 [..., C]; `count` is [..., 1]."""

    count: Tensor  # type: ignore[assignment]  # a tuple's method has this name
    """n"""
    total: Tensor
    """sum |x| for mean, sum x^2 for l2, sum x for variance"""
    squared_deviations: Tensor | None
    """sum (x - mean)^2 for variance, else None"""


def sums(x: Tensor, real: Tensor | None, how: Aggregation) -> Sums:
    """The sums of x [n, ..., C] over its first dimension.

    Args:
        real: [n, ..., 1] bool, False for values to exclude (padding); None includes all.
    """
    if real is None:
        count = torch.full((*x.shape[1:-1], 1), float(len(x)), device=x.device)
    else:
        count, x = real.sum(0, dtype=torch.float32), x * real.to(x.dtype)
    if how == Aggregation.mean:
        return Sums(count, _row_sum(x.abs()), None)
    x = x.float()
    if how == Aggregation.l2:
        return Sums(count, _row_sum(x.square()), None)
    total = _row_sum(x)
    deviations = x - total / count.clamp(min=1)
    deviations = deviations if real is None else deviations * real
    return Sums(count, total, _row_sum(deviations.square()))


def _row_sum(x: Tensor) -> Tensor:
    """fp32 sum over the first dimension, 16 rows at a time: a compiled sum reads each column down its rows, and so a memory page
    per row."""
    rows = 16
    whole = len(x) - len(x) % rows
    parts = x[:whole].reshape(-1, rows, *x.shape[1:]).sum(1, dtype=torch.float32)
    return parts.sum(0) + x[whole:].sum(0, dtype=torch.float32)


def head_norm_sums(x: Tensor, real: Tensor | None, how: Aggregation, head_dim: int) -> Sums:
    """`sums` of the L2 norms over head_dim of x [n, ..., N D]; channels of the result are the N heads."""
    # A cast inside the norm takes twice as long on a CPU. torch.compile does not trace unflatten.
    heads = x.float().reshape(*x.shape[:-1], -1, head_dim)
    return sums(torch.linalg.vector_norm(heads, dim=-1), real, how)


def pool(part: Sums, add: Callable[[list[Tensor]], list[Tensor]]) -> Sums:
    """The sums over the values of several parts.

    Args:
        part: one part per caller (each rank its own), or several parts stacked.
        add: sums tensors over all parts: over the ranks of a group, or over the stacked dimension.
    """
    count, total = add([part.count, part.total])
    if part.squared_deviations is None:
        return Sums(count, total, None)
    shift = part.total / part.count.clamp(min=1) - total / count.clamp(min=1)
    return Sums(count, total, *add([part.squared_deviations + part.count * shift.square()]))


def merge(parts: Iterable[Sums]) -> Sums:
    """`pool` of parts on this rank."""
    counts, totals, spreads = zip(*parts, strict=True)
    spread = None if spreads[0] is None else torch.stack(spreads)
    stacked = Sums(torch.stack(counts), torch.stack(totals), spread)
    return pool(stacked, lambda tensors: [x.sum(0) for x in tensors])


def aggregate(how: Aggregation, part: Sums) -> Tensor:
    """The scores [..., C]; 0 where there are no values."""
    if how == Aggregation.l2:
        return part.total.sqrt()
    total = part.total if part.squared_deviations is None else part.squared_deviations
    return total / part.count.clamp(min=1)


def cosine_distances(streams: list[Tensor], real: Tensor | None) -> Tensor:
    """1 - cos(input, output), summed over tokens, of each layer of a block and of the whole block.

    Args:
        streams: the residual stream [S, B, H] before the block's first layer and after each of its layers.
        real: [S, B, 1] bool, False on padding; None without padding.

    Returns:
        [layers + 1] fp32; the block is last.
    """
    streams = [x.float() for x in streams]
    norms = [torch.linalg.vector_norm(x, dim=-1) for x in streams]
    last = len(streams) - 1
    pairs = [*itertools.pairwise(range(last + 1)), (0, last)]
    distances = [
        _cosine_distance(norms[i], norms[j], torch.linalg.vector_norm(streams[j] - streams[i], dim=-1))
        for i, j in pairs
    ]
    return torch.stack([(x if real is None else x * real[..., 0]).sum() for x in distances])


def _cosine_distance(a: Tensor, b: Tensor, difference: Tensor) -> Tensor:
    """1 - cos of two vectors from their norms a, b and the norm of their difference; 1 where a or b is 0.

    Unlike 1 - cos computed directly, this does not cancel for nearly parallel vectors.
    """
    product = a * b
    distance = (difference.square() - (b - a).square()) / (2 * product)
    return torch.where(product > 0, distance, 1.0)


compiled = functools.cache(functools.partial(torch.compile, dynamic=False))
"""torch.compile of a function above, once per function; requires `can_compile`."""


@functools.cache
def can_compile() -> bool:
    """True where torch.compile works on this rank: on a CPU it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.square, dynamic=False)(torch.ones(3, device=process_groups.device()))
    except Exception as error:  # of the compiler, the linker or the loader
        process_groups.log(
            f"importance: torch.compile does not work here ({type(error).__name__}); scoring runs without it and is slower"
        )
        return False
    return True
