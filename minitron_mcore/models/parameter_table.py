"""The parameter table: one row per parameter (see `families`), used by loading, export, counting and pruning.

A row gives each dimension of a parameter a logical axis. An axis has a global size, a packing of Hugging Face tensors, and ranges
that a tensor-parallel rank holds. Positions are those of Megatron-Core's distributed checkpoint, the same in every layout:

    axis     size            packing                                             a TP rank holds
    hidden   H               -                                                   all of it
    vocab    V               - (padding rows exist in memory, not on disk)       its share of the padded rows
    ffn      F               -                                                   its share
    glu      2F              gate rows, then up rows                             its share of either
    qkv      (N + 2G) D      group by group: query heads, key, value             its groups
    heads    N D             query heads in order                                its groups' heads
    head_dim D               -                                                   all of it
    experts  E               -                                                   all of it

An expert's tensors are not sharded: the expert-parallel rank that holds the expert has them whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.families import Row


@dataclass(frozen=True)
class Parameter:
    """A row of the table for one architecture, block (None outside the blocks) and expert (None outside the experts)."""

    row: Row
    arch: Architecture
    block: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """Key in the distributed checkpoint. Layers count from 0 over all stages; a block has up to two."""
        if self.block is None:
            return self.row.name
        layer = self.arch.layer(self.block, self.row.part)
        return self.row.name.format(a=layer, m=layer, e=self.expert)

    @property
    def hf(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors that are packed into this parameter, in order."""
        return tuple(name.format(i=self.block, e=self.expert) for name in self.row.hf)

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return tuple(size(axis, self.arch) for axis in self.row.axes)

    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors named by `hf`."""
        return [(rows, *self.shape[1:]) for rows in hf_rows(self.row.axes[0], self.arch)]


def parameters(arch: Architecture) -> Iterator[Parameter]:
    """All parameters: first those outside the blocks, then block by block. A tied output head is not listed."""
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
    """Number of parameters, tied ones once; `embeddings=False` omits the embedding table and the output head."""
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
    """Number of rows of each Hugging Face tensor that is packed into this axis."""
    if axis == "qkv":
        return arch.heads * arch.head_dim, arch.groups * arch.head_dim, arch.groups * arch.head_dim
    return (arch.ffn, arch.ffn) if axis == "glu" else (size(axis, arch),)


def packing(axis: str, arch: Architecture) -> np.ndarray:
    """For each position of the axis, its row in the concatenated Hugging Face tensors: a permutation, int64 [size]."""
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
