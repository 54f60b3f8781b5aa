"""The parameter table: one row a parameter (see `families`), read by loading, export, counting and pruning alike.

A row gives each dimension of a parameter a logical axis. An axis knows its global size, how Hugging Face's tensors are packed
into it, which ranges of it a tensor-parallel rank holds, and which of its positions a plan keeps. All positions are those of
Megatron-Core's distributed checkpoint, which no parallel layout changes:

    axis     size            packing                                             a TP rank holds
    hidden   H               -                                                   all of it
    vocab    V               - (padding rows exist in memory, never on disk)     its share of the padded rows
    ffn      F               -                                                   its share
    glu      2F              gate rows, then up rows                             its share of either
    qkv      (N + 2G) D      group by group: query heads, key, value             its groups
    heads    N D             query heads in order                                its groups' heads
    head_dim D               -                                                   all of it
    experts  E               -                                                   all of it

An expert's own tensors lie whole on the expert-parallel rank that holds the expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.families import Row


@dataclass(frozen=True)
class Parameter:
    """A row at one block (None outside the blocks) and one expert (None outside the experts) of one architecture."""

    row: Row
    arch: Architecture
    block: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """Key in the distributed checkpoint: layers count from 0 over all stages, two a block where none is gone."""
        if self.block is None:
            return self.row.name
        layer = self.arch.layer(self.block, self.row.part)
        return self.row.name.format(a=layer, m=layer, e=self.expert)

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(name.format(i=self.block, e=self.expert) for name in self.row.hf)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size(axis, self.arch) for axis in self.row.axes)

    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each Hugging Face tensor behind this parameter, in packing order."""
        return [(rows, *self.shape[1:]) for rows in hf_rows(self.row.axes[0], self.arch)]


def parameters(arch: Architecture) -> Iterator[Parameter]:
    """Every parameter of an architecture, outer ones and block by block, in Hugging Face's order."""
    rows = arch.traits.rows
    for row in rows:
        if not row.in_block and not (row.name == "output_layer.weight" and arch.tied):
            yield Parameter(row, arch)
    for block in range(arch.blocks):
        here = [row for row in rows if row.in_block and arch.layer(block, row.part) is not None]
        for row in (row for row in here if not row.in_expert):
            yield Parameter(row, arch, block)
        for expert in range(arch.experts):
            for row in (row for row in here if row.in_expert):
                yield Parameter(row, arch, block, expert)


def count(arch: Architecture, embeddings: bool = True) -> int:
    """Number of parameters, tied ones once; without `embeddings`, neither the embedding table nor the output head."""
    return sum(int(np.prod(p.shape)) for p in parameters(arch) if embeddings or "vocab" not in p.row.axes)


def size(axis: str, arch: Architecture) -> int:
    """Global length of a logical axis."""
    return {
        "hidden": arch.hidden,
        "vocab": arch.vocab,
        "ffn": arch.ffn,
        "glu": 2 * arch.ffn,
        "qkv": (arch.heads + 2 * arch.groups) * arch.head_dim,
        "heads": arch.heads * arch.head_dim,
        "head_dim": arch.head_dim,
        "experts": arch.experts,
    }[axis]


def hf_rows(axis: str, arch: Architecture) -> tuple[int, ...]:
    """Rows of each Hugging Face tensor that is packed into this axis."""
    if axis == "qkv":
        return arch.heads * arch.head_dim, arch.groups * arch.head_dim, arch.groups * arch.head_dim
    return (arch.ffn, arch.ffn) if axis == "glu" else (size(axis, arch),)


def packing(axis: str, arch: Architecture) -> np.ndarray:
    """For each position of the axis, its row in the concatenated Hugging Face tensors (int64, a permutation)."""
    rows = np.arange(size(axis, arch))
    if axis != "qkv":
        return rows
    q, k, v = np.split(rows, np.cumsum(hf_rows(axis, arch))[:-1])
    parts = (x.reshape(arch.groups, -1) for x in (q, k, v))
    return np.concatenate(list(parts), axis=1).reshape(-1)


def tp_slices(axis: str, arch: Architecture, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
    """Half-open ranges of the axis that a tensor-parallel rank holds, in the order of its local tensor."""
    if axis == "vocab":
        share = padded_vocab(arch, tp_size) // tp_size
        return [(min(tp_rank * share, arch.vocab), min((tp_rank + 1) * share, arch.vocab))]
    if axis == "glu":
        share = arch.ffn // tp_size
        return [(start + tp_rank * share, start + (tp_rank + 1) * share) for start in (0, arch.ffn)]
    share = size(axis, arch) // tp_size
    return [(tp_rank * share, (tp_rank + 1) * share)]


def padded_vocab(arch: Architecture, tp_size: int) -> int:
    """Rows of the embedding table in memory: the next multiple of `tp_size`."""
    return -(-arch.vocab // tp_size) * tp_size
