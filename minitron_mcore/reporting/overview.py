"""The first section of the page: figures of the run, the models by role, and the next commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minitron_mcore.checkpoint.stage_record import COMPLETE
from minitron_mcore.reporting import tables
from minitron_mcore.reporting.artefacts import KINDS, Model, damage_as_user_error, read_lines

_COMMON = re.compile(r"\+?(model|recipe|work_dir|runs)[.=]")
_DATA = re.compile(r"data[.=]")


class Tile(NamedTuple):
    """One figure in large print."""

    label: str
    value: str
    note: str


def recovered(losses: dict[str, float]) -> float | None:
    """Fraction of the loss increase from pruning that distillation removed.

    Args:
        losses: role -> nats per token.

    Returns:
        None where a role is missing, or where pruning did not raise the loss.
    """
    if not {"teacher", "pruned", "distilled"} <= set(losses) or losses["pruned"] <= losses["teacher"]:
        return None
    return (losses["pruned"] - losses["distilled"]) / (losses["pruned"] - losses["teacher"])


def compared_file(models: list[Model]) -> str | None:
    """The held-out file on which most of the models were evaluated."""
    names = [name for model in models for name in model.losses]
    return max(names, key=names.count, default=None)


def losses_by_role(models: list[Model]) -> dict[str, float]:
    """Role -> loss on `compared_file`, in nats per token, for the models that were evaluated on it."""
    name = compared_file(models)
    return {model.role: model.losses[name]["loss"] for model in models if name in model.losses}


def headline(models: list[Model]) -> str:
    """The run in one or two sentences."""
    losses = losses_by_role(models)
    if (share := recovered(losses)) is None:
        return "Models by role. Loss in nats per token of held-out text."
    return (
        f"Pruning raised the loss from {losses['teacher']:.3f} to {losses['pruned']:.3f} nats per token. Distillation lowered it "
        f"to {losses['distilled']:.3f} and recovered {_percent(share)} of the increase."
    )


def tiles(models: list[Model], folders: dict[str, list[Path]]) -> Iterator[Tile]:
    """Sizes, losses, recovered loss and time, as far as they are known."""
    sizes, losses = {model.role: model.parameters for model in models}, losses_by_role(models)
    pruned, teacher = sizes.get("distilled") or sizes.get("pruned"), sizes.get("teacher")
    if teacher and pruned:
        share = f"{_percent(pruned / teacher)} of the teacher's"
        yield Tile("parameters", f"{_short(teacher)} → {_short(pruned)}", share)
    if losses:
        ends: list[str] = [role for role in ("teacher", "distilled") if role in losses]
        ends = ends or list(losses)
        between = ", ".join(f"{role} {loss:.2f}" for role, loss in losses.items() if role not in ends)
        names = " → ".join(ends) + (f" ({between})" if between else "")
        values = " → ".join(f"{losses[role]:.2f}" for role in ends)
        yield Tile("loss", values, f"{names}, nats per token of {compared_file(models)}")
    if (removed := recovered(losses)) is not None:
        yield Tile("recovered", _percent(removed), "of the loss increase from pruning")
    times = [_minutes(folder) for folder in {folder for kind in folders.values() for folder in kind}]
    if sum(times):
        yield Tile("time", f"{sum(times):.1f} min", _training(models) or "all finished stages")


def rows(models: list[Model]) -> list[dict[str, Any]]:
    """Rows for a table: size, loss and perplexity of each model; columns without a value are left out."""
    name, teacher = compared_file(models), next((m.parameters for m in models if m.role == "teacher"), None)
    table = []
    for model in models:
        size, row = model.parameters, model.losses.get(name or "", {})
        share = _percent(size / teacher) if size and teacher else None
        table.append({"model": model.role, "parameters": size, "of the teacher": share})
        table[-1] |= {key: row.get(key) for key in ("loss", "perplexity")}
    return tables.without_empty(table)


def commands(models: list[Model], folders: dict[str, list[Path]]) -> Iterator[dict[str, Any]]:
    """Rows {next, command}: the next stage, missing evaluations, and uses of the result."""
    if not models:
        return
    roles, last = {model.role for model in models}, models[-1]
    options = _options(last.lineage)
    common = [option for option in options if _COMMON.match(option)]
    data = [option for option in options if _DATA.match(option)]

    def row(purpose: str, stage: str, *more: str) -> dict[str, Any]:
        return {"next": purpose, "command": shlex.join(["python", f"launch/{stage}.py", *common, *more])}

    if "pruned" not in roles:
        stage = "prune" if folders["plan"] else "plan" if folders["importance"] else "importance"
        yield row(f"Run the next stage, {stage}", stage, *(data if stage == "importance" else []))
    elif "distilled" not in roles:
        yield row("Distil the pruned model", "distill", *data)
    elif not folders["export"]:
        yield row("Export to a Hugging Face folder", "export")
    for model in models:
        if not model.losses and model.folder:
            out_dir = model.folder.parent / f"evaluate_{model.role}"
            yield row(
                f"Evaluate the {model.role} model", "evaluate", *data, f"source={model.folder}", f"out_dir={out_dir}"
            )
    if last.folder and "pruned" in roles:
        yield row("Continue a prompt", "generate", f"source={last.folder}", "prompt=Hello")
    for folder in [folder for folder in folders["export"] if folder.resolve() in last.paths][-1:]:
        yield {"next": "Serve the exported model", "command": shlex.join(["vllm", "serve", str(folder)])}


def _options(lineage: dict[str, Any]) -> list[str]:
    """The overrides of the command that wrote a checkpoint."""
    try:
        return shlex.split(lineage.get("command", ""))[1:]
    except (ValueError, AttributeError):  # not a command line, or not text
        return []


def _minutes(folder: Path) -> float:
    """Time between a folder's claim and its completion; 0 if it is not finished."""
    start, end = folder / "config.yaml", folder / COMPLETE
    if not start.is_file() or not end.is_file():
        return 0.0
    return max(0.0, end.stat().st_mtime - start.stat().st_mtime) / 60


def _training(models: list[Model]) -> str:
    """Time and tokens of the distillation; "" if there is none in the work_dir."""
    folder = next((model.folder for model in models if model.role == "distilled"), None)
    path = folder and folder / KINDS["training"]
    if not path or not path.is_file() or not (steps := read_lines(path)):
        return ""
    with damage_as_user_error(path):
        before = [0, *(step["tokens"] for step in steps[:-1])]
        seconds = sum((s["tokens"] - n) / s["tokens_per_second"] for s, n in zip(steps, before, strict=True))
        return f"distillation {seconds / 60:.1f} min, {steps[-1]['tokens']:,} tokens"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _short(count: int) -> str:
    """1,340,000 as 1.34 M."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}\N{NO-BREAK SPACE}{unit}"
    return str(count)
