"""A plan applied to a sharded checkpoint: every rank cuts its own shards, and nothing moves between ranks.

A rank reads the source in the layout it was started with, selects the kept positions inside its own ranges, and writes them at
offsets that count the kept positions before them. Shards may so come out of different sizes, which the distributed checkpoint
allows; a later run loads them in any layout. Blocks renumber the same way.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitron_mcore import checkpoint, runtime
from minitron_mcore.config import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import build, hf, table
from minitron_mcore.plan.plan import FILE, Plan

from torch.distributed.checkpoint import FileSystemReader  # isort: skip


def prune(source: checkpoint.Checkpoint, plan: Plan, out_dir: str | Path, parallel: ParallelConfig) -> None:
    """Write the pruned checkpoint (collective). A rank holds its shards of the source, then of the target.

    Args:
        source: the checkpoint that the plan was made for.
        plan: kept indices.
        out_dir: claimed folder.
        parallel: the layout in which to read; it leaves no trace in the result.

    Raises:
        UserError: a plan for another model, a layout that doesn't divide the source, a damaged source.
    """
    if plan.fingerprint != source.fingerprint:
        raise UserError(
            f"the plan cuts model {plan.fingerprint}, but {source.path} is {source.fingerprint}: give its own source or plan anew."
        )
    build.check_shardable(source.arch, parallel)
    mine = [p for p in hf.stage_parameters(source.arch, parallel) if table.keeps(plan, p)]
    state = {}
    for parameter, pieces in _read(source, mine).items():
        cut = [select(parameter, plan, offset, data) for offset, data in pieces]
        state |= checkpoint.sharded(parameter.at(plan), cut, hf.replica(parameter))
    fingerprint = hashlib.sha256(f"{source.fingerprint} {plan.digest()}".encode()).hexdigest()[:16]
    parents = {"source": checkpoint.identity(source)}
    checkpoint.describe(
        out_dir,
        plan.target,
        fingerprint,
        parents,
        source.hf,
        plan=plan.digest(),
        scores=plan.scores,
        statistic=plan.statistic,
        before=source.arch.to_json(),
        dropped_blocks=plan.dropped_blocks(),
        ancestry=source.lineage,
    )
    if runtime.rank() == 0:
        checkpoint.replace_text(Path(out_dir) / FILE, plan.to_json())
    checkpoint.save(out_dir, 0, state)


def _read(source: checkpoint.Checkpoint, mine: list[table.Parameter]) -> dict[table.Parameter, list]:
    """This rank's pieces (global offset, data) of the given parameters."""
    stored = FileSystemReader(source.step_dir).read_metadata().state_dict_metadata
    tp, state, pieces = runtime.tp_group(), {}, {}
    for parameter in mine:
        dim, shape = parameter.row.tp_dim, list(parameter.shape)
        if dim is not None:
            shape[dim] = sum(
                high - low for low, high in table.ranges(parameter.row.axes[dim], source.arch, tp.rank(), tp.size())
            )
        local = torch.empty(shape, dtype=stored[parameter.name].properties.dtype)
        pieces[parameter] = checkpoint.views(parameter, local, tp.rank(), tp.size())
        state |= checkpoint.sharded(parameter, pieces[parameter], hf.replica(parameter))
    loaded = checkpoint.load(source, state)
    return {
        parameter: [(offset, loaded.get(f"{parameter.name}@{n}", data)) for n, (offset, data) in enumerate(parts)]
        for parameter, parts in pieces.items()
    }


def select(
    parameter: table.Parameter, plan: Plan, offset: tuple[int, ...], data: Tensor
) -> tuple[tuple[int, ...], Tensor]:
    """The kept part of one piece, and its offset in the pruned tensor.

    Args:
        parameter: of the source.
        offset: the piece's place in the source's global tensor.
        data: the piece.
    """
    placed = []
    for dim, axis in enumerate(parameter.row.axes):
        keep = table.kept(axis, plan, parameter.block, parameter.expert)
        first, last = np.searchsorted(keep, [offset[dim], offset[dim] + data.shape[dim]])
        data = data.index_select(dim, torch.from_numpy(keep[first:last] - offset[dim]))
        placed.append(int(first))
    return tuple(placed), data
