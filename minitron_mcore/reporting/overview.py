"""The first section of the page: figures of the run, the models by role, and the next commands."""

import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from minitron_mcore.checkpoint import lineage
from minitron_mcore.pruning.plan import compare
from minitron_mcore.reporting import artefacts, tables
from minitron_mcore.reporting.artefacts import Model
from minitron_mcore.reporting.content import Tile
from minitron_mcore.reporting.costs import TOTAL, total, trained
from minitron_mcore.reporting.tables import duration, percent, short, short_flops

_COMMON = re.compile(r"\+?(model|recipe|work_dir|runs)[.=]")
_DATA = re.compile(r"data[.=]")
_COUNTS = ("parameters", "without embeddings")
"""Rows of `plan.compare` that are no sizes of a block."""
_TRAINING = {"distilled": "distillation", "trained": "training"}
"""Role -> what made the model."""
_OPERATIONS = ("pruned", *_TRAINING)
"""Roles that are named after what made the model."""


class Kept(NamedTuple):
    """What a student kept of its teacher beside the loss."""

    benchmarks: tuple[float, float, int] | None = None
    """See `measurements.Benchmarks.kept`."""
    speedups: Mapping[str, Sequence[float]] = MappingProxyType({})
    """What was measured -> ratios to the teacher's speed."""


def recovered(models: list[Model]) -> float | None:
    """Fraction of the loss increase from pruning that the training of the last model removed.

    Returns:
        None where a loss is missing, where the last model is not a trained one, or where pruning did not raise the loss.
    """
    losses, own = losses_by_role(models), models[-1].role if models else ""
    if own not in _TRAINING or not {"teacher", "pruned", own} <= set(losses) or losses["pruned"] <= losses["teacher"]:
        return None
    return (losses["pruned"] - losses[own]) / (losses["pruned"] - losses["teacher"])


def compared_file(models: list[Model]) -> str | None:
    """The held-out file on which most of the models were evaluated."""
    names = [name for model in models for name in model.losses]
    return max(names, key=names.count, default=None)


def losses_by_role(models: list[Model]) -> dict[str, float]:
    """Role -> loss on `compared_file`, in nats per token, for the models that were evaluated on it."""
    name = compared_file(models)
    return {model.role: model.losses[name]["loss"] for model in models if name in model.losses}


def headline(models: list[Model]) -> str:
    """The run in a few sentences: the models and their losses."""
    losses, roles = losses_by_role(models), [model.role for model in models]
    name, operations = artefacts.name_of(models[0]) if models else None, [role for role in roles if role in _OPERATIONS]
    sentences = [f"{name or 'A model'}, {' and '.join(operations)}."] if operations else []
    if (share := recovered(models)) is None:
        sentences.append("" if sentences or not models else "Models by role.")
    else:
        own = models[-1].role
        sentences.append(
            f"Pruning raised the loss from {losses['teacher']:.3f} to {losses['pruned']:.3f} nats per token. "
            f"{_TRAINING[own].capitalize()} lowered it to {losses[own]:.3f} and recovered {percent(share)} of the increase."
        )
    return " ".join(filter(None, sentences))


def tiles(models: list[Model], costs: list[dict[str, Any]], kept: Kept) -> dict[str, list[Tile]]:
    """Figures under the headings Model, Cost and Kept, as far as they are known.

    Args:
        costs: `costs.rows` of the work_dir.
    """
    groups = {"Model": _size_tiles(models), "Cost": _cost_tiles(models, costs), "Kept": _kept_tiles(models, kept)}
    return {heading: found for heading, group in groups.items() if (found := list(group))}


def _size_tiles(models: list[Model]) -> Iterator[Tile]:
    ends = {model.role: model.arch for model in models if model.arch}
    teacher, student = ends.get("teacher"), next((ends[role] for role in reversed(ends) if role in _OPERATIONS), None)
    if not teacher or not student:
        return
    table = {row["axis"]: row for row in compare(teacher, student)}
    before, after = table["parameters"]["of"], table["parameters"]["kept"]
    yield Tile("parameters", f"{short(before)} → {short(after)}", f"{percent(after / before)} of the teacher's")
    cut = [row for axis, row in table.items() if row["kept"] != row["of"] and axis not in _COUNTS]
    if cut:
        shares = ", ".join(f"{row['axis']} {percent(row['share'])}" for row in cut)
        yield Tile("sizes", shares, ", ".join(f"{row['axis']} {row['kept']:,} of {row['of']:,}" for row in cut))


def _cost_tiles(models: list[Model], costs: list[dict[str, Any]]) -> Iterator[Tile]:
    last = models[-1] if models else None
    what = _TRAINING.get(last.role, "") if last else ""
    training = trained(last.folder) if last and last.folder and what else {}
    if training:
        yield Tile(what, f"{short(training['tokens'])} tokens", f"{training['steps']:,} steps")
    if training.get("FLOPs"):
        yield Tile("operations", short_flops(training["FLOPs"]), f"of the {what}: student and teacher")
    if minutes := total(costs).get("minutes"):
        number = sum(row["minutes"] is not None for row in costs)
        share = f", of which {what} {duration(training['seconds'] / 60)}" if training.get("seconds") else ""
        yield Tile("time", duration(minutes), f"{number} stages{share}" if number > 1 else what or "one stage")
    if ranks := [row["ranks"] for row in costs if row["ranks"]]:
        devices = dict.fromkeys(row["device"] for row in costs if row["device"])
        yield Tile("ranks", f"{max(ranks)}", f"at most, on {', '.join(devices)}")


def _kept_tiles(models: list[Model], kept: Kept) -> Iterator[Tile]:
    losses = losses_by_role(models)
    if losses:
        ends: list[str] = [role for role in dict.fromkeys(("teacher", models[-1].role)) if role in losses]
        ends = ends or list(losses)
        between = ", ".join(f"{role} {loss:.2f}" for role, loss in losses.items() if role not in ends)
        names = " → ".join(ends) + (f" ({between})" if between else "")
        values = " → ".join(f"{losses[role]:.2f}" for role in ends)
        yield Tile("loss", values, f"{names}, nats per token of {compared_file(models)}")
    if (removed := recovered(models)) is not None:
        yield Tile("recovered", percent(removed), "of the loss increase from pruning")
    if kept.benchmarks and kept.benchmarks[0]:
        teacher, student, number = kept.benchmarks
        note = f"of the teacher's mean over {number}: {100 * teacher:.1f} → {100 * student:.1f}"
        yield Tile("benchmarks", percent(student / teacher), note)
    for name, ratios in kept.speedups.items():
        note = "of the teacher's" + (f", mean of {len(ratios)} lengths" if len(ratios) > 1 else "")
        yield Tile(f"throughput, {name}", f"{statistics.mean(ratios):.2f}\N{NO-BREAK SPACE}x", note)


def rows(models: list[Model]) -> list[dict[str, Any]]:
    """Rows for a table: size, loss and perplexity of the models of which one is known; columns without a value are left out."""
    name, teacher = compared_file(models), next((m.parameters for m in models if m.role == "teacher"), None)
    table = []
    for model in models:
        size, row = model.parameters, model.losses.get(name or "", {})
        if not size and not row:
            continue
        share = percent(size / teacher) if size and teacher else None
        table.append({"model": model.role, "parameters": size, "of the teacher": share})
        table[-1] |= {key: row.get(key) for key in ("loss", "perplexity", "bits_per_byte")}
    return tables.without_empty(table)


def cost_rows(costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a table: `costs.rows` that have a figure, and their sum."""
    known = [row for row in costs if any(row[key] is not None for key in ("minutes", "tokens", "FLOPs"))]
    known += [{"stage": TOTAL, **total(known)}] if len(known) > 1 else []
    shown = {"minutes": duration, "FLOPs": short_flops}
    table = [
        {
            "time" if key == "minutes" else key: shown[key](value) if key in shown and value else value
            for key, value in row.items()
        }
        for row in known
    ]
    return tables.without_empty(table)


def commands(models: list[Model], folders: dict[str, list[Path]]) -> Iterator[dict[str, Any]]:
    """Rows {next, command}: the next stage, missing evaluations, and uses of the result."""
    if not models:
        return
    roles, last = {model.role for model in models}, models[-1]
    options = lineage.stage_of(last.lineage.get("command", ""))[1]
    common = [option for option in options if _COMMON.match(option)]
    data = [option for option in options if _DATA.match(option)]

    def row(purpose: str, stage: str, *more: str) -> dict[str, Any]:
        return {"next": purpose, "command": shlex.join(["python", f"launch/{stage}.py", *common, *more])}

    exported = [folder for folder in folders["export"] if folder.resolve() in last.paths]
    if last.role in _TRAINING:
        has_default_name = not last.folder or last.folder.name == "distill"
        paths = [] if has_default_name else [f"source={last.folder}", f"out_dir={last.folder}_hf"]
        yield from [] if exported else [row("Export to a Hugging Face folder", "export", *paths)]
    elif "pruned" not in roles:
        stage = "prune" if folders["plan"] else "plan" if folders["importance"] else "importance"
        yield row(f"Run the next stage, {stage}", stage, *(data if stage == "importance" else []))
    else:
        yield row("Distil the pruned model", "distill", *data)
    for model in models:
        if not model.losses and model.folder:
            out_dir = model.folder.parent / f"evaluate_{model.role}"
            yield row(
                f"Evaluate the {model.role} model", "evaluate", *data, f"source={model.folder}", f"out_dir={out_dir}"
            )
    if last.folder and last.role in _OPERATIONS:
        yield row("Continue a prompt", "generate", f"source={last.folder}", "prompt=Hello")
    for folder in exported[-1:]:
        yield {"next": "Serve the exported model", "command": shlex.join(["vllm", "serve", str(folder)])}
