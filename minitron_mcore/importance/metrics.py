"""The formulas behind scores: how values become one number over the sequence and then over samples (arXiv 2407.14679, section 2.2).

    mean        1/n sum |x|
    l2          sqrt( sum x^2 )
    variance    1/n sum (x - mean)^2        of the values as they are, with their signs; over n, not n - 1

Both levels take the same three. Over the sequence x are a sample's real tokens, so a longer sample has the larger l2; over samples
x are the sequence's scores of all calibration samples, however they came in micro-batches. The paper says neither which.

Every aggregation is worked out from sums of parts, which are put together wherever the values lie: on ranks, in micro-batches. A
variance comes from sums around each part's own mean, so that nothing large cancels (Chan, Golub and LeVeque, 1979).
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
"""An aggregation of w x is w to this power times that of x, for w >= 0."""


class Sums(NamedTuple):
    """What an aggregation needs to know of n values x, in fp32. Channels [C] are last; `count` has 1 there."""

    count: Tensor
    """n"""
    total: Tensor
    """sum |x| for mean, sum x^2 for l2, sum x for variance"""
    spread: Tensor | None
    """sum (x - mean)^2 for variance, else None"""


def sums(x: Tensor, real: Tensor | None, how: Aggregation) -> Sums:
    """Of x [n, ..., C] over its first dimension.

    Args:
        real: [n, ..., 1] bool, False where x is no value; None where all are.
    """
    if real is None:
        count = torch.full((*x.shape[1:-1], 1), float(len(x)), device=x.device)
    else:
        count, x = real.sum(0, dtype=torch.float32), x * real.to(x.dtype)
    if how == Aggregation.mean:
        return Sums(count, _total(x.abs()), None)
    x = x.float()
    if how == Aggregation.l2:
        return Sums(count, _total(x.square()), None)
    total = _total(x)
    away = x - total / count.clamp(min=1)
    away = away if real is None else away * real
    return Sums(count, total, _total(away.square()))


def _total(x: Tensor) -> Tensor:
    """The sum in fp32 over the first dimension, a few rows at a time: compiled, a column is read down its rows, each of which
    may lie in a page of its own."""
    rows = 16
    whole = len(x) - len(x) % rows
    parts = x[:whole].reshape(-1, rows, *x.shape[1:]).sum(1, dtype=torch.float32)
    return parts.sum(0) + x[whole:].sum(0, dtype=torch.float32)


def head_norm_sums(x: Tensor, real: Tensor | None, how: Aggregation, head_dim: int) -> Sums:
    """Of the L2 norms over head_dim of x [n, ..., N D]; `sums` has the rest."""
    # Cast before: as part of the norm it takes twice as long on a CPU. Not unflatten, which torch.compile does not look into.
    heads = x.float().reshape(*x.shape[:-1], -1, head_dim)
    return sums(torch.linalg.vector_norm(heads, dim=-1), real, how)


def pool(part: Sums, summed: Callable[[list[Tensor]], list[Tensor]]) -> Sums:
    """The sums of several parts' values together.

    Args:
        part: one part, or several stacked.
        summed: adds tensors up over all parts: over the ranks of a group, or over the dimension in which they are stacked.
    """
    count, total = summed([part.count, part.total])
    if part.spread is None:
        return Sums(count, total, None)
    shift = part.total / part.count.clamp(min=1) - total / count.clamp(min=1)
    return Sums(count, total, *summed([part.spread + part.count * shift.square()]))


def merge(parts: Iterable[Sums]) -> Sums:
    """All parts' values together."""
    stacked = Sums(*(None if fields[0] is None else torch.stack(fields) for fields in zip(*parts, strict=True)))
    return pool(stacked, lambda tensors: [x.sum(0) for x in tensors])


def aggregate(how: Aggregation, found: Sums) -> Tensor:
    """The score [..., C]; 0 of no values."""
    if how == Aggregation.l2:
        return found.total.sqrt()
    return (found.total if how == Aggregation.mean else found.spread) / found.count.clamp(min=1)


def cosine_distances(streams: list[Tensor], real: Tensor | None) -> Tensor:
    """1 - cosine between a block's input and output, summed over tokens.

    Args:
        streams: the residual stream [S, B, H] before a block's first layer and after each of its layers.
        real: [S, B, 1] bool, False on padding; None without.

    Returns:
        [layers + 1] fp32: of each layer, then of the block.
    """
    streams = [x.float() for x in streams]
    lengths = [torch.linalg.vector_norm(x, dim=-1) for x in streams]
    last = len(streams) - 1
    pairs = [*itertools.pairwise(range(last + 1)), (0, last)]
    found = [
        _distance(lengths[i], lengths[j], torch.linalg.vector_norm(streams[j] - streams[i], dim=-1)) for i, j in pairs
    ]
    return torch.stack([(x if real is None else x * real[..., 0]).sum() for x in found])


def _distance(a: Tensor, b: Tensor, change: Tensor) -> Tensor:
    """1 - cosine of vectors of lengths a and b that differ by one of length `change`; 1 where either is 0.

    Nothing cancels where the change is small, as it does in 1 - cosine worked out directly.
    """
    product = a * b
    found = (change.square() - (b - a).square()) / (2 * product)
    return torch.where(product > 0, found, 1.0)


compiled = functools.cache(functools.partial(torch.compile, dynamic=False))
"""A function above as one pass over its arguments, compiled at its first call with each shape: to be had where `compiles`."""


@functools.cache
def can_compile() -> bool:
    """True where torch.compile works on this rank: on a CPU it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.square, dynamic=False)(torch.ones(3, device=process_groups.device()))
    except Exception as error:  # whatever the compiler, the linker or the loader says
        process_groups.log(
            f"importance: torch.compile does not work here ({type(error).__name__}), so collecting takes longer"
        )
        return False
    return True
