"""The parameter table: one row a parameter, read by loading, export, counting and pruning alike.

A row names a parameter in Megatron-Core and in Hugging Face and gives each dimension a logical axis. An axis knows its global
size, how Hugging Face's tensors are packed into it, which ranges of it a tensor-parallel rank holds, and which of its positions
a plan keeps. All positions are those of Megatron-Core's distributed checkpoint, which no parallel layout changes:

    axis     size            packing                                             a TP rank holds
    hidden   H               -                                                   all of it
    vocab    V               - (padding rows exist in memory, never on disk)     its share of the padded rows
    ffn      F               -                                                   its share
    glu      2F              gate rows, then up rows                             its share of either
    qkv      (N + 2G) D      group by group: query heads, key, value             its groups
    heads    N D             query heads in order                                its groups' heads
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minitron_mcore.models.architecture import Architecture

if TYPE_CHECKING:
    from minitron_mcore.plan.plan import Plan


@dataclass(frozen=True)
class Row:
    """One parameter. `{a}` and `{m}` in `name` are a block's attention and MLP layer, `{i}` in `hf` the block."""

    name: str
    axes: tuple[str, ...]
    hf: tuple[str, ...]
    tp_dim: int | None = None

    @property
    def in_block(self) -> bool:
        return "{i}" in self.hf[0]


_BLOCK = "model.layers.{i}."
LLAMA = (
    Row("embedding.word_embeddings.weight", ("vocab", "hidden"), ("model.embed_tokens.weight",), 0),
    Row("decoder.layers.{a}.input_layernorm.weight", ("hidden",), (_BLOCK + "input_layernorm.weight",)),
    Row(
        "decoder.layers.{a}.self_attention.linear_qkv.weight",
        ("qkv", "hidden"),
        tuple(f"{_BLOCK}self_attn.{x}_proj.weight" for x in "qkv"),
        0,
    ),
    Row(
        "decoder.layers.{a}.self_attention.linear_proj.weight",
        ("hidden", "heads"),
        (_BLOCK + "self_attn.o_proj.weight",),
        1,
    ),
    Row("decoder.layers.{m}.pre_mlp_layernorm.weight", ("hidden",), (_BLOCK + "post_attention_layernorm.weight",)),
    Row(
        "decoder.layers.{m}.mlp.linear_fc1.weight",
        ("glu", "hidden"),
        (_BLOCK + "mlp.gate_proj.weight", _BLOCK + "mlp.up_proj.weight"),
        0,
    ),
    Row("decoder.layers.{m}.mlp.linear_fc2.weight", ("hidden", "ffn"), (_BLOCK + "mlp.down_proj.weight",), 1),
    Row("decoder.final_norm.weight", ("hidden",), ("model.norm.weight",)),
    Row("output_layer.weight", ("vocab", "hidden"), ("lm_head.weight",), 0),
)
TABLES = {"llama": LLAMA}


@dataclass(frozen=True)
class Parameter:
    """A row at one block (block None outside the blocks) of one architecture."""

    row: Row
    arch: Architecture
    block: int | None

    @property
    def name(self) -> str:
        """Key in the distributed checkpoint: layers count from 0 over all stages, two a block."""
        return self.row.name if self.block is None else self.row.name.format(a=2 * self.block, m=2 * self.block + 1)

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(name.format(i=self.block) for name in self.row.hf)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size(axis, self.arch) for axis in self.row.axes)

    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each Hugging Face tensor behind this parameter, in packing order."""
        return [(rows, *self.shape[1:]) for rows in hf_rows(self.row.axes[0], self.arch)]

    def at(self, arch: Architecture, block: int | None) -> "Parameter":
        return Parameter(self.row, arch, block)


def parameters(arch: Architecture) -> Iterator[Parameter]:
    """Every parameter of an architecture, outer ones and block by block, in Hugging Face's order."""
    for row in TABLES[arch.family]:
        if row.name == "output_layer.weight" and arch.tied:
            continue
        if not row.in_block:
            yield Parameter(row, arch, None)
    for block in range(arch.blocks):
        for row in TABLES[arch.family]:
            if row.in_block:
                yield Parameter(row, arch, block)


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


def ranges(axis: str, arch: Architecture, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
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


def kept(axis: str, plan: "Plan", block: int | None) -> np.ndarray:
    """Positions of the source's axis that a plan keeps, ascending (int64)."""
    arch = plan.source
    if axis == "hidden":
        return np.asarray(plan.hidden)
    if axis == "vocab":
        return np.arange(arch.vocab)
    if axis in ("ffn", "glu"):
        ffn = np.asarray(plan.ffn[block])
        return ffn if axis == "ffn" else np.concatenate([ffn, arch.ffn + ffn])
    heads = _spread(np.asarray(plan.heads[block]), arch.head_dim)
    if axis == "heads":
        return heads
    keep = np.zeros(size("qkv", arch), dtype=bool)
    keep[heads] = True
    keep[arch.heads * arch.head_dim :] = True  # keys and values stay: groups are not pruned
    return np.flatnonzero(keep[packing("qkv", arch)])


def _spread(units: np.ndarray, width: int) -> np.ndarray:
    return (units[:, None] * width + np.arange(width)).reshape(-1)
