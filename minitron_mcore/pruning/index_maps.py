"""Index maps of a plan: the kept positions along each logical axis of the parameter table. No torch import."""

from collections.abc import Sequence

import numpy as np

from minitron_mcore.models.parameter_table import Parameter, hf_rows, packing, size
from minitron_mcore.pruning.plan import Plan


def target_of(parameter: Parameter, plan: Plan) -> Parameter:
    """The target's parameter that a parameter of the source becomes; blocks and experts are renumbered.

    Raises:
        ValueError: the plan drops the parameter's block or expert (see `keeps`).
    """
    block = None if parameter.block is None else plan.blocks.index(parameter.block)
    kept = list(plan.experts.get(parameter.block or 0, ()))
    expert = None if parameter.expert is None else kept.index(parameter.expert)
    return Parameter(parameter.row, plan.target, block, expert)


def is_kept(plan: Plan, parameter: Parameter) -> bool:
    """Whether the plan keeps any part of a parameter of its source."""
    block, part = parameter.block, parameter.row.part
    if block is None or part is None:
        return True
    return block in plan.blocks_with(part) and (parameter.expert is None or parameter.expert in plan.experts[block])


def kept_positions(axis: str, plan: Plan, block: int | None = None, expert: int | None = None) -> np.ndarray:
    """Kept positions of an axis of the source, ascending, int64.

    Args:
        axis: of the parameter table ("hidden", "ffn", "qkv", ...).
        block, expert: numbers in the source, for axes whose positions differ between them.
    """
    arch = plan.source
    if axis == "hidden":
        return np.asarray(plan.hidden)
    if axis in ("vocab", "head_dim"):
        return np.arange(size(axis, arch))
    assert block is not None, f"positions of {axis} differ between blocks"
    if axis == "experts":
        return np.asarray(list(plan.experts[block]))
    if axis in ("ffn", "glu"):
        ffn = np.asarray(plan.ffn[block] if expert is None else plan.experts[block][expert], np.int64)
        return ffn if axis == "ffn" else np.concatenate([ffn, arch.ffn + ffn])
    heads = _expand_units(plan.heads[block], arch.head_dim)
    if axis == "heads":
        return heads
    keys = _expand_units(plan.groups[block], arch.head_dim)
    starts = np.cumsum((0, *hf_rows("qkv", arch)[:-1]))
    keep = np.zeros(size("qkv", arch), dtype=bool)
    for start, rows in zip(starts, (heads, keys, keys), strict=True):
        keep[start + rows] = True
    return np.flatnonzero(keep[packing("qkv", arch)])


def merge_partners(plan: Plan, block: int) -> np.ndarray:
    """For each position of the source's axis qkv, the position that is merged into it (see `Plan.merged`), or itself; int64."""
    arch = plan.source
    position_of_row = np.argsort(packing("qkv", arch))  # of each Hugging Face row
    partners = np.arange(size("qkv", arch))
    for pair in plan.merged.get(block, {}).items():
        kept, dropped = (position_of_row[_expand_units([head], arch.head_dim)] for head in pair)
        partners[kept] = dropped
    return partners


def _expand_units(units: Sequence[int], width: int) -> np.ndarray:
    """Positions of the channels of units that are `width` channels wide."""
    return (np.asarray(units, np.int64)[:, None] * width + np.arange(width)).reshape(-1)
