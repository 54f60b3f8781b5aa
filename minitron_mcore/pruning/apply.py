"""A plan applied to weights: to a sharded checkpoint, where every rank cuts its own shards and nothing moves between ranks, or in
one pass from a Hugging Face folder to a Hugging Face folder.

Either way a piece is read, its kept positions are selected, and it goes to an offset that counts the kept positions before it.
Pieces of a checkpoint so come out of different sizes, which the format allows; a later run loads them in any layout. Blocks
renumber the same way.
"""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitron_mcore.checkpoint import lineage, run_folder, sharded, streaming
from minitron_mcore.checkpoint.streaming import Slice
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.formats import hf_convert
from minitron_mcore.formats.hf_folder import HFFolder, Writer
from minitron_mcore.models import architecture, build, parameter_table
from minitron_mcore.parallel import process_groups
from minitron_mcore.pruning import index_maps
from minitron_mcore.pruning.plan import FILE, Plan

BITS = {2: torch.int16, 4: torch.int32}


def prune(source: run_folder.Checkpoint, plan: Plan, out_dir: str | Path, parallel: ParallelConfig) -> None:
    """Write the pruned checkpoint (collective). A rank reads and cuts its own shards, a few pieces at a time.

    Args:
        source: the checkpoint that the plan was made for.
        plan: kept indices.
        out_dir: claimed folder.
        parallel: the layout in which to read; it leaves no trace in the result.

    Raises:
        UserError: a plan for another model, a layout that doesn't divide the source, a damaged source.
    """
    _check(plan, source.fingerprint, source.path)
    build.check_shardable(source.arch, parallel)
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
    if process_groups.rank() == 0:
        run_folder.replace_text(Path(out_dir) / FILE, plan.to_json())
    streaming.save(out_dir, pieces, hf_convert.replica, "prune")


def build_pruned(
    source: run_folder.Checkpoint,
    plan: Plan,
    parallel: ParallelConfig,
    dtype: str,
    reader: streaming.Reader | None = None,
) -> build.Model:
    """A pruned model in memory, its weights cut straight out of the source's files (collective); nothing is written.

    A rank holds its part of the target and reads, parameter by parameter, the stretch of the source that its part was kept from.

    Args:
        reader: of the source, to verify its files once for several plans.

    Raises:
        UserError: a plan for another model, a layout that doesn't divide the target, a damaged source.
    """
    _check(plan, source.fingerprint, source.path)
    gc.collect()  # a model's modules refer to each other in circles: the one before would still be there
    model = build.build(plan.target, parallel, dtype)
    origin = {
        target.name: parameter for parameter, target in _kept_parameters(plan, parameter_table.parameters(source.arch))
    }
    targets = {parameter.name: parameter for parameter in parameter_table.parameters(plan.target)}
    tp = process_groups.tp_group()
    with process_groups.raise_on_all_ranks():
        reader = reader or streaming.Reader(source)
        for name, weights in build.named_parameters(model):
            weights.data.zero_()  # the vocabulary's padding
            for offset, view in sharded.shard_views(targets[name], weights.data, tp.rank(), tp.size()):
                if view.numel():
                    view.copy_(_read_kept(reader, origin[name], plan, offset, tuple(view.shape)))
    return model


def _read_kept(
    reader: streaming.Reader, parameter: parameter_table.Parameter, plan: Plan, offset: tuple, shape: tuple
) -> Tensor:
    """What a plan keeps of the source's parameter, in a box of the target's."""
    keeps = [
        index_maps.kept_positions(axis, plan, parameter.block, parameter.expert)[low : low + length]
        for axis, low, length in zip(parameter.row.axes, offset, shape, strict=True)
    ]
    first = tuple(int(keep[0]) for keep in keeps)
    stretch = tuple(int(keep[-1]) + 1 - low for keep, low in zip(keeps, first, strict=True))
    kept = [keep - low for keep, low in zip(keeps, first, strict=True)]
    return _read_cut(reader.read, parameter, plan, (first, stretch), kept)


def cut_folder(path: str | Path, plan: Plan, out_dir: str | Path, dtype: str | None = None) -> int:
    """Hugging Face folder -> pruned Hugging Face folder in one pass on one process, bit-equal to converting, pruning and exporting;
    returns the parameter count.

    The folder is hashed while it is read: only then is it known whether the plan belongs to it, and only then the result appears.

    Args:
        path: the folder that was converted and scored for the plan.
        plan: kept indices.
        out_dir: claimed folder.
        dtype: "bf16" or "fp32" for all weights; None keeps them as they are.

    Raises:
        UserError: an unsupported or incomplete folder, a plan for another model, sizes that the Hugging Face class refuses.
    """
    path = Path(path)
    arch, _ = architecture.read_hf(path)
    folder = HFFolder(path)
    folder.check(arch)
    if arch != plan.source:
        name = next(key for key, value in arch.to_json().items() if value != plan.source.to_json()[key])
        raise UserError(
            f"the plan cuts a model whose {name} is {getattr(plan.source, name)}, but {path} has {getattr(arch, name)}: "
            "give its own folder or plan anew."
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
    """Of the weights that a plan leaves."""
    return hashlib.sha256(f"{plan.fingerprint} {plan.digest()}".encode()).hexdigest()[:16]


def cut_lineage(path: str | Path, plan: Plan) -> dict:
    """The lineage of `cut_folder`'s result, as if its two steps had been taken one by one."""
    converted = run_folder.make_lineage({HFFolder.kind: {"path": str(path), "sha256": plan.fingerprint}})
    return run_folder.make_lineage(
        {"source": {"path": str(path), "fingerprint": plan.fingerprint}}, **_lineage_details(plan, converted)
    )


def _lineage_details(plan: Plan, ancestry: dict) -> dict:
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
            f"the plan cuts model {plan.fingerprint}, but {path} is {fingerprint}: give its own source or plan anew."
        )


def _kept_parameters(
    plan: Plan, parameters: Iterable[parameter_table.Parameter]
) -> Iterator[tuple[parameter_table.Parameter, parameter_table.Parameter]]:
    """The source's parameters that a plan keeps, each with the target's that it becomes."""
    return (
        (parameter, index_maps.target_of(parameter, plan))
        for parameter in parameters
        if index_maps.is_kept(plan, parameter)
    )


def select(parameter: parameter_table.Parameter, plan: Plan, box: Slice) -> tuple[Slice, list[np.ndarray]]:
    """Where the kept part of a box of the source's parameter lies in the pruned one, and the kept positions within the box, by
    dimension."""
    offset, kept = [], []
    for axis, low, length in zip(parameter.row.axes, *box, strict=True):
        keep = index_maps.kept_positions(axis, plan, parameter.block, parameter.expert)
        first, last = np.searchsorted(keep, [low, low + length])
        offset.append(int(first))
        kept.append(keep[first:last] - low)
    return (tuple(offset), tuple(map(len, kept))), kept


def _read_cut(
    read: Callable[..., Tensor], parameter: parameter_table.Parameter, plan: Plan, box: Slice, kept: list[np.ndarray]
) -> Tensor:
    """The kept positions of a box of the source's parameter; queries with what is merged into them (`choose_heads`)."""
    data = _index_select(read(parameter, *box), kept)
    if parameter.row.axes[0] != "qkv" or parameter.block not in plan.merged:
        return data
    rows = box[0][0] + kept[0]
    others = index_maps.merge_partners(plan, parameter.block)[rows]
    if not (merged := np.flatnonzero(others != rows)).size:
        return data
    # A partner lies in the same group, so on the same tensor-parallel rank, but not always in the same box.
    low, high = int(others[merged].min()), int(others[merged].max()) + 1
    dropped = read(parameter, (low, *box[0][1:]), (high - low, *box[1][1:]))
    dropped = _index_select(dropped, [others[merged] - low, *kept[1:]]).float()
    queries = data[merged].float()
    return data.index_copy(0, torch.from_numpy(merged), (queries + (queries - dropped)).to(data.dtype))


def _index_select(data: Tensor, kept: list[np.ndarray]) -> Tensor:
    """The kept positions of each dimension."""
    bits = data.view(
        BITS[data.itemsize]
    ).numpy()  # NumPy has no bfloat16, but takes columns at three times torch's speed
    for dim, positions in enumerate(kept):
        if len(positions) < bits.shape[dim]:
            bits = bits.take(positions, axis=dim)
    return torch.from_numpy(bits).view(data.dtype)
