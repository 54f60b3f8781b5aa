"""Tables about a plan, from the parameter table: the tensors along each axis, and their bytes before and after."""

import dataclasses
import math
from typing import Any

from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.parameter_table import Parameter
from minitron_mcore.pruning import index_maps
from minitron_mcore.pruning.plan import Plan

COUNTED_BY = {"glu": ("ffn",), "qkv": ("heads", "groups")}
"""Axes that pack several of an architecture's sizes; any other axis has the name of its size."""
FIXED = ("vocab", "head_dim")
"""Axes that no plan cuts."""
LAYERS = {"attention layers": "{a}", "MLP layers": "{m}"}
BYTES = {"bf16": 2, "fp32": 4}


def axes(plan: Plan, dtype: str) -> list[dict[str, Any]]:
    """Rows for a table: axis, kept and total units, the tensors along it, their bytes before and after in "bf16" or "fp32".

    A tensor counts in the row of each of its axes, so the bytes of these rows overlap; the last row is the whole model.
    Attention and MLP layers have rows where a plan drops them without their blocks.
    """
    pairs = _pairs(plan)
    names = [field.name for field in dataclasses.fields(Architecture) if field.name not in FIXED]
    rows = []
    for name in names:
        if along := [pair for pair in pairs if name in _units(pair[0])]:
            kept, total = getattr(plan.target, name), getattr(plan.source, name)
            rows.append(_row(name, kept, total, along, BYTES[dtype]))
    for name, mark in LAYERS.items():
        along = [pair for pair in pairs if mark in pair[0].row.name]
        total = len({before.block for before, _ in along})
        kept = len({before.block for before, after in along if after})
        if (kept, total) != (plan.target.blocks, plan.source.blocks):
            rows.append(_row(name, kept, total, along, BYTES[dtype]))
    return [*rows, _row("in all", None, None, pairs, BYTES[dtype]) | {"of modules": None}]


def tensors(plan: Plan, dtype: str) -> list[dict[str, Any]]:
    """Rows for a table, one per kind of parameter: its name with * for numbers, axes, shape, and the number of tensors and bytes
    before and after. Each tensor counts once."""
    kinds: dict[str, list[tuple[Parameter, Parameter | None]]] = {}
    for pair in _pairs(plan):
        kinds.setdefault(pair[0].row.name, []).append(pair)
    rows = []
    for name, pairs in kinds.items():
        before, kept = pairs[0][0], [after for _, after in pairs if after]
        shape = (
            _shape(before) if not kept or kept[0].shape == before.shape else f"{_shape(before)} -> {_shape(kept[0])}"
        )
        rows.append(
            {"parameters": name.format(a="*", m="*", e="*"), "axes": ", ".join(before.row.axes), "shape": shape}
            | {"tensors before": len(pairs), "after": len(kept)}
            | _bytes(pairs, BYTES[dtype])
        )
    return rows


def counts(plan: Plan) -> str:
    """Parameters before and after, as a sentence."""
    whole, inner = (
        " -> ".join(f"{parameter_table.count(arch, embeddings):,}" for arch in (plan.source, plan.target))
        for embeddings in (True, False)
    )
    return f"parameters: {whole}; without embeddings {inner}"


def _pairs(plan: Plan) -> list[tuple[Parameter, Parameter | None]]:
    """Pairs of a parameter of the source and the target's parameter that it becomes; None if it is dropped."""
    return [
        (p, index_maps.target_of(p, plan) if index_maps.is_kept(plan, p) else None)
        for p in parameter_table.parameters(plan.source)
    ]


def _units(parameter: Parameter) -> set[str]:
    """The architecture's sizes that determine a parameter's shape or existence."""
    units = {unit for axis in parameter.row.axes for unit in COUNTED_BY.get(axis, (axis,))}
    units |= {"blocks"} if parameter.block is not None else set()
    return units | ({"experts"} if parameter.expert is not None else set())


def _row(axis: str, kept: int | None, total: int | None, pairs: list[Any], dtype_bytes: int) -> dict[str, Any]:
    share = {"kept": kept, "of": total, "share": kept / total if kept and total else None}
    modules = ", ".join(dict.fromkeys(source.row.name.split(".")[-2] for source, _ in pairs))
    return {"axis": axis} | share | {"tensors": len(pairs)} | _bytes(pairs, dtype_bytes) | {"of modules": modules}


def _bytes(pairs: list[Any], dtype_bytes: int) -> dict[str, Any]:
    before = dtype_bytes * sum(math.prod(source.shape) for source, _ in pairs)
    return {"bytes before": before, "bytes after": dtype_bytes * sum(math.prod(t.shape) for _, t in pairs if t)}


def _shape(parameter: Parameter) -> str:
    return " x ".join(map(str, parameter.shape))
