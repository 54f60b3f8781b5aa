"""What a plan keeps of each parameter: positions along each logical axis of the parameter table. No torch import."""

import numpy as np

from minitron_mcore.models.parameter_table import Parameter, hf_rows, packing, size
from minitron_mcore.pruning.plan import Plan


def target_of(parameter: Parameter, plan: Plan) -> Parameter:
    """The target's parameter that a plan makes of a parameter of its source, blocks and experts renumbered.

    Raises:
        ValueError: the plan drops the parameter's block or expert (see `keeps`).
    """
    block = None if parameter.block is None else plan.blocks.index(parameter.block)
    expert = None if parameter.expert is None else list(plan.experts[parameter.block]).index(parameter.expert)
    return Parameter(parameter.row, plan.target, block, expert)


def is_kept(plan: Plan, parameter: Parameter) -> bool:
    """True where anything of a parameter of the plan's source is kept."""
    if parameter.block is not None and parameter.block not in plan.blocks_with(parameter.row.part):
        return False
    return parameter.expert is None or parameter.expert in plan.experts[parameter.block]


def kept_positions(axis: str, plan: Plan, block: int | None = None, expert: int | None = None) -> np.ndarray:
    """Positions of the source's axis that a plan keeps, ascending (int64)."""
    arch = plan.source
    if axis == "hidden":
        return np.asarray(plan.hidden)
    if axis in ("vocab", "head_dim"):
        return np.arange(size(axis, arch))
    if axis == "experts":
        return np.asarray(list(plan.experts[block]))
    if axis in ("ffn", "glu"):
        ffn = np.asarray(plan.ffn[block] if expert is None else plan.experts[block][expert])
        return ffn if axis == "ffn" else np.concatenate([ffn, arch.ffn + ffn])
    heads = _expand_units(np.asarray(plan.heads[block]), arch.head_dim)
    if axis == "heads":
        return heads
    keys = _expand_units(np.asarray(plan.groups[block]), arch.head_dim)
    starts = np.cumsum((0, *hf_rows("qkv", arch)[:-1]))
    keep = np.zeros(size("qkv", arch), dtype=bool)
    for start, rows in zip(starts, (heads, keys, keys), strict=True):
        keep[start + rows] = True
    return np.flatnonzero(keep[packing("qkv", arch)])


def merge_partners(plan: Plan, block: int) -> np.ndarray:
    """For each position of the source's axis qkv, the position of the dropped query head that is merged into it (see
    `Plan.merged`); its own where there is none (int64)."""
    arch = plan.source
    at = np.argsort(packing("qkv", arch))  # of each Hugging Face row
    found = np.arange(size("qkv", arch))
    for pair in plan.merged.get(block, {}).items():
        stays, goes = (at[_expand_units(np.asarray([head]), arch.head_dim)] for head in pair)
        found[stays] = goes
    return found


def _expand_units(units: np.ndarray, width: int) -> np.ndarray:
    return (units[:, None] * width + np.arange(width)).reshape(-1)
