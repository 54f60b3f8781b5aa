"""A model's parameters written and read in pieces, with memory for a few pieces per rank whatever the model's size.

A file's hash in the manifest is verified before the first read from the file.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_mcore.checkpoint import disk, run_folder, safe_metadata, saving, sharded, steps
from minitron_mcore.models import parameter_table

from megatron.core.dist_checkpointing.core import CheckpointingException  # isort: skip

type Slice = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset in a global tensor, shape)"""


def shard_slices(parameter: parameter_table.Parameter, tp_rank: int = 0, tp_size: int = 1) -> Iterator[Slice]:
    """Slices of the global tensor that a tensor-parallel rank holds, split by rows into at most `disk.PIECE_ELEMENTS` each.

    Splits are at multiples of one number of rows in every layout, so that readers of another layout read whole pieces.
    """
    spans = [[(0, length)] for length in parameter.shape]
    dim = parameter.row.tp_dim
    if dim is not None:
        spans[dim] = parameter_table.tp_slices(parameter.row.axes[dim], parameter.arch, tp_rank, tp_size)
    step = max(1, disk.PIECE_ELEMENTS // math.prod(parameter.shape[1:]))
    for (start, end), *rest in itertools.product(*spans):
        edges = [start, *range((start // step + 1) * step, end, step), end]
        for low, high in itertools.pairwise(edges):
            if low < high:
                yield (low, *(x for x, _ in rest)), (high - low, *(y - x for x, y in rest))


@dataclass(frozen=True)
class Piece:
    """A slice of a parameter at `offset` in the global tensor; `make` returns its values when it is written."""

    parameter: parameter_table.Parameter
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def save(
    out_dir: str | Path,
    pieces: Iterable[Piece],
    replica: Callable[[parameter_table.Parameter], tuple[int, ...]],
    name: str,
) -> None:
    """Write this rank's pieces as step 0 of a checkpoint (collective).

    Args:
        replica: replica id of this rank's pieces of a parameter; only a rank whose id is all zeros calls `make`.
        name: label of the progress.

    Raises:
        UserError: raised by `make` on any rank; on all ranks.
    """
    state: dict[str, Any] = {}
    make: saving.Make = {}
    parts: dict[parameter_table.Parameter, list[tuple[tuple[int, ...], Tensor]]] = {}
    for piece in (piece for piece in pieces if math.prod(piece.shape)):
        make[piece.parameter.name, piece.offset] = piece.make
        placeholder = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
        parts.setdefault(piece.parameter, []).append((piece.offset, placeholder))
    for parameter, placeholders in parts.items():
        state |= sharded.sharded_tensors(parameter, placeholders, replica(parameter))
    saving.StepSave(out_dir, 0, state, name, make=make).finish()


class Reader(safe_metadata.Reader):
    """Reads slices of a checkpoint's parameters, written in any layout. Safe for several threads.

    The hash of a file is compared with the manifest before the first read from it. Reads then come from the page cache.

    Raises:
        UserError: a tensor is missing, or a file is missing, truncated or changed.
    """

    def __init__(self, source: "run_folder.Checkpoint"):
        with safe_metadata.damage_as_user_error(source.step_dir):
            self.hashes, _ = steps.read_manifest(source.step_dir)
            self.locks = {name: threading.Lock() for name in self.hashes}
            self.verified: set[str] = set()
            self.folder = source.step_dir
            self.verify(".metadata")
            super().__init__(source.step_dir)

    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype:
        with safe_metadata.damage_as_user_error(self.folder):
            return self.tensors[parameter.name].properties.dtype

    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        with safe_metadata.damage_as_user_error(self.folder):
            return self.read_slice(parameter.name, offset, shape)

    def verify(self, name: str) -> None:
        if name not in self.locks:
            raise CheckpointingException(f"{steps.MANIFEST} does not list {name}")
        with self.locks[name]:
            if name in self.verified:
                return
            if disk.sha256(self.folder / name) != self.hashes[name]:
                raise CheckpointingException(f"{name} is not what was written")
            self.verified.add(name)
