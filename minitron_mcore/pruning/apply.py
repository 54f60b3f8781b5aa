"""Apply a plan to weights: to a sharded checkpoint, where each rank cuts its own shards without communication, or in one pass from
a Hugging Face folder to a Hugging Face folder.

Both read a piece of a parameter, select its kept positions, and write it at an offset that counts the kept positions before it.
Pieces of a pruned checkpoint have different sizes, which the format allows; later runs load them in any layout.
"""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_mcore.checkpoint import claim, disk, lineage, run_folder, sharded, streaming
from minitron_mcore.checkpoint.streaming import Slice
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.formats import hf_convert
from minitron_mcore.formats.hf_folder import HFFolder, Writer
from minitron_mcore.models import architecture, build, parameter_table, sharding
from minitron_mcore.parallel import process_groups
from minitron_mcore.pruning import index_maps
from minitron_mcore.pruning.plan import FILE, Plan

_INT_OF_SIZE = {2: torch.int16, 4: torch.int32}


def prune(source: run_folder.Checkpoint, plan: Plan, out_dir: str | Path, parallel: ParallelConfig) -> None:
    """Write the pruned checkpoint (collective). Each rank reads and cuts its own shards, a few pieces at a time.

    Args:
        source: the checkpoint that the plan was made for.
        out_dir: claimed folder.
        parallel: the layout for reading; the result does not depend on it.

    Raises:
        UserError: the plan is for another model, the layout does not divide the source, or the source is damaged.
    """
    _check(plan, source.fingerprint, source.path)
    sharding.check_shardable(source.arch, parallel)
    with process_groups.raise_on_all_ranks():
        reader = streaming.Reader(source)
    tp, pieces = process_groups.tp_group(), []
    for parameter, target in _kept_parameters(plan, hf_convert.stage_parameters(source.arch, parallel)):
        for box in streaming.shard_slices(parameter, tp.rank(), tp.size()):
            placed, kept = select(parameter, plan, box)
            make = partial(_read_cut, reader.read, parameter, plan, box, kept)
            pieces.append(streaming.Piece(target, *placed, reader.dtype(parameter), make))
    parents, plans = {"source": run_folder.identity(source)}, lineage.plans(source.path)
    run_folder.describe(
        out_dir, plan.target, fingerprint(plan), parents, source.hf, plans, **_lineage_details(plan, source.lineage)
    )
    with process_groups.raise_on_all_ranks(), claim.writing(Path(out_dir)):
        if process_groups.rank() == 0:
            disk.replace_text(Path(out_dir) / FILE, plan.to_json())
    streaming.save(out_dir, pieces, hf_convert.replica, "prune")


def build_pruned(
    source: run_folder.Checkpoint,
    plan: Plan,
    parallel: ParallelConfig,
    dtype: str,
    reader: streaming.Reader | None = None,
) -> build.Model:
    """Build a pruned model in memory from the source's files (collective); nothing is written.

    Each rank holds its shards of the target. Per parameter it reads the range of the source that contains them.

    Args:
        reader: of the source; one reader verifies the files once for several plans.

    Raises:
        UserError: the plan is for another model, the layout does not divide the target, or the source is damaged.
    """
    _check(plan, source.fingerprint, source.path)
    gc.collect()  # frees a previous model, whose modules refer to each other
    model = build.build(plan.target, parallel, dtype)
    origin = {
        target.name: parameter for parameter, target in _kept_parameters(plan, parameter_table.parameters(source.arch))
    }
    targets = {parameter.name: parameter for parameter in parameter_table.parameters(plan.target)}
    tp = process_groups.tp_group()
    with process_groups.raise_on_all_ranks():
        reader = reader or streaming.Reader(source)
        for name, weights in build.named_parameters(model):
            weights.data.zero_()  # padding of the vocabulary
            for offset, view in sharded.shard_views(targets[name], weights.data, tp.rank(), tp.size()):
                if view.numel():
                    view.copy_(_read_kept(reader, origin[name], plan, offset, tuple(view.shape)))
    return model


def _read_kept(
    reader: streaming.Reader,
    parameter: parameter_table.Parameter,
    plan: Plan,
    offset: tuple[Any, ...],
    shape: tuple[Any, ...],
) -> Tensor:
    """A box of the target's parameter, from the source's."""
    positions = [
        index_maps.kept_positions(axis, plan, parameter.block, parameter.expert)[low : low + length]
        for axis, low, length in zip(parameter.row.axes, offset, shape, strict=True)
    ]
    first = tuple(int(kept[0]) for kept in positions)
    lengths = tuple(int(kept[-1]) + 1 - low for kept, low in zip(positions, first, strict=True))
    within = [kept - low for kept, low in zip(positions, first, strict=True)]
    return _read_cut(reader.read, parameter, plan, (first, lengths), within)


def cut_folder(path: str | Path, plan: Plan, out_dir: str | Path, dtype: str | None = None) -> int:
    """Prune a Hugging Face folder to a Hugging Face folder in one pass on one process; returns the number of parameters.

    The result is bit-equal to convert, prune and export. The folder is hashed while it is read; the result appears after the hash
    has matched the plan.

    Args:
        path: the folder that was converted and scored for the plan.
        out_dir: claimed folder.
        dtype: "bf16" or "fp32" for all weights; None keeps each weight's dtype.

    Raises:
        UserError: the folder is unsupported or incomplete, the plan is for another model, or the Hugging Face class cannot hold
            the target's sizes.
    """
    path = Path(path)
    arch, _ = architecture.read_hf(path)
    folder = HFFolder(path)
    folder.check(arch)
    if arch != plan.source:
        name = next(key for key, value in arch.to_json().items() if value != plan.source.to_json()[key])
        raise UserError(
            f"the plan is for a model whose {name} is {getattr(plan.source, name)}, but {path} has {getattr(arch, name)}: "
            "give the folder that the plan was made for, or make a new plan."
        )
    architecture.check_exportable(plan.target)
    origin = {target: parameter for parameter, target in _kept_parameters(plan, parameter_table.parameters(arch))}

    def rows(target: parameter_table.Parameter) -> Iterator[Callable[[], Tensor]]:
        parameter, hashing = origin[target], True
        for box in streaming.shard_slices(parameter):
            kept = select(parameter, plan, box)[1]
            yield partial(_read_cut, partial(hf_convert.read, folder, hashing), parameter, plan, box, kept)
            hashing = False

    targets = list(parameter_table.parameters(plan.target))
    writer = Writer(
        Path(out_dir), plan.target, {p: build.DTYPES[dtype] if dtype else folder.dtype(origin[p]) for p in targets}
    )
    writer.write("cut", rows)
    _check(plan, folder.fingerprint(arch), path)
    writer.finish(path)
    return parameter_table.count(plan.target)


def fingerprint(plan: Plan) -> str:
    """Fingerprint of the pruned weights, from the source's fingerprint and the plan."""
    return hashlib.sha256(f"{plan.fingerprint} {plan.digest()}".encode()).hexdigest()[:16]


def cut_lineage(path: str | Path, plan: Plan) -> dict[str, Any]:
    """The lineage of `cut_folder`'s result: that of a convert and a prune step."""
    converted = run_folder.make_lineage({HFFolder.kind: {"path": str(path), "sha256": plan.fingerprint}})
    return run_folder.make_lineage(
        {"source": {"path": str(path), "fingerprint": plan.fingerprint}}, **_lineage_details(plan, converted)
    )


def _lineage_details(plan: Plan, ancestry: dict[str, Any]) -> dict[str, Any]:
    return {
        "plan": plan.digest(),
        "scores": plan.scores,
        "statistic": plan.statistic,
        "before": plan.source.to_json(),
        "dropped_blocks": plan.dropped_blocks(),
        "dropped_attention": plan.dropped_layers("attention"),
        "dropped_mlp": plan.dropped_layers("mlp"),
        "merged_heads": sum(map(len, plan.merged.values())),
        "ancestry": ancestry,
    }


def _check(plan: Plan, fingerprint: str, path: Path) -> None:
    if plan.fingerprint != fingerprint:
        raise UserError(
            f"the plan is for model {plan.fingerprint}, but {path} is {fingerprint}: give the plan's source, or make a new plan."
        )


def _kept_parameters(
    plan: Plan, parameters: Iterable[parameter_table.Parameter]
) -> Iterator[tuple[parameter_table.Parameter, parameter_table.Parameter]]:
    """Pairs of a kept parameter of the source and the target's parameter that it becomes."""
    return (
        (parameter, index_maps.target_of(parameter, plan))
        for parameter in parameters
        if index_maps.is_kept(plan, parameter)
    )


def select(parameter: parameter_table.Parameter, plan: Plan, box: Slice) -> tuple[Slice, list[np.ndarray]]:
    """The kept part of a box of the source's parameter: its box in the pruned parameter, and the kept positions within the
    source's box, per dimension."""
    offset, kept = [], []
    for axis, low, length in zip(parameter.row.axes, *box, strict=True):
        positions = index_maps.kept_positions(axis, plan, parameter.block, parameter.expert)
        first, last = np.searchsorted(positions, [low, low + length])
        offset.append(int(first))
        kept.append(positions[first:last] - low)
    return (tuple(offset), tuple(map(len, kept))), kept


def _read_cut(
    read: Callable[..., Tensor], parameter: parameter_table.Parameter, plan: Plan, box: Slice, kept: list[np.ndarray]
) -> Tensor:
    """Read a box of the source's parameter and select its kept positions; merges query heads (see `plan.choose_heads`)."""
    data = _index_select(read(parameter, *box), kept)
    if parameter.row.axes[0] != "qkv" or parameter.block not in plan.merged:
        return data
    rows = box[0][0] + kept[0]
    partners = index_maps.merge_partners(plan, parameter.block)[rows]
    if not (merged := np.flatnonzero(partners != rows)).size:
        return data
    # A partner is in the same group and so on the same tensor-parallel rank, but may be outside the box.
    low, high = int(partners[merged].min()), int(partners[merged].max()) + 1
    dropped = read(parameter, (low, *box[0][1:]), (high - low, *box[1][1:]))
    dropped = _index_select(dropped, [partners[merged] - low, *kept[1:]]).float()
    queries = data[merged].float()
    return data.index_copy(0, torch.from_numpy(merged), (queries + (queries - dropped)).to(data.dtype))


def _index_select(data: Tensor, kept: list[np.ndarray]) -> Tensor:
    # NumPy's take is three times as fast as torch's on columns; it has no bfloat16, hence the integer view.
    bits = data.view(_INT_OF_SIZE[data.itemsize]).numpy()
    for dim, positions in enumerate(kept):
        if len(positions) < bits.shape[dim]:
            bits = bits.take(positions, axis=dim)
    return torch.from_numpy(bits).view(data.dtype)
