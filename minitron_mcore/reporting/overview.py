"""The first section of the page: models by role, what distillation recovered, the time, and the next commands."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minitron_mcore.checkpoint import lineage
from minitron_mcore.checkpoint.run_folder import COMPLETE
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reporting import family_tree
from minitron_mcore.reporting.read import KINDS, damage_as_user_error, read_json, read_lines

_COMMON = re.compile(r"\+?(model|recipe|work_dir|runs)[.=]")
_DATA = re.compile(r"data[.=]")


class Tile(NamedTuple):
    """One figure in large print."""

    label: str
    value: str
    note: str


class Overview(NamedTuple):
    """What the first section shows; `models` is empty where the folders hold no checkpoint and descend from none."""

    headline: str
    tiles: list[Tile]
    models: list[dict]
    commands: list[dict]


def overview(found: dict[str, list[Path]]) -> Overview:
    """Sum up the folders of a work_dir (see `read.folders`) for its last distilled model, the student and the teacher.

    Raises:
        UserError: a damaged file, by name.
    """
    steps = {step.identity["fingerprint"]: step for step in family_tree.steps(found)}
    roles, sizes = _roles(steps), _sizes(found, steps)
    file, losses = _losses(found, roles, _weights(found, steps))
    rows, teacher = [], sizes.get(roles.get("teacher"))
    for role, fingerprint in roles.items():
        size, row = sizes.get(fingerprint), losses.get(role, {})
        rows.append(
            {"model": role, "parameters": size, "of the teacher": teacher and size and _percent(size / teacher)}
        )
        rows[-1] |= {"loss": row.get("loss"), "perplexity": row.get("perplexity")}
    shown = [key for key in (rows[0] if rows else []) if any(row[key] is not None for row in rows)]
    rows = [{key: row[key] for key in shown} for row in rows]
    figures = {role: row["loss"] for role, row in losses.items()}
    tiles = list(_tiles({role: sizes.get(fingerprint) for role, fingerprint in roles.items()}, figures, file))
    if minutes := _minutes(found):
        tiles.append(Tile("time", f"{minutes:.1f} min", _training(found, roles)))
    return Overview(_headline(figures), tiles, rows, list(_commands(found, steps, roles, losses)))


def recovered(losses: dict[str, float]) -> float | None:
    """Fraction of the loss increase from pruning that distillation removed; None where a loss is missing or none was lost."""
    if not {"teacher", "pruned", "distilled"} <= set(losses) or losses["pruned"] <= losses["teacher"]:
        return None
    return (losses["pruned"] - losses["distilled"]) / (losses["pruned"] - losses["teacher"])


def _roles(steps: dict[str, lineage.Step]) -> dict[str, str]:
    """Role -> fingerprint: teacher, source (of the pruning, where it is not the teacher), pruned, distilled."""
    made = {fingerprint: lineage.deed(step.lineage) for fingerprint, step in steps.items()}
    last = {deed: fingerprint for fingerprint, deed in made.items()}
    distilled, pruned, source, teacher = last.get("distilled"), last.get("pruned"), None, next(reversed(made), None)
    if distilled:
        parents = steps[distilled].lineage["parents"]
        pruned, teacher = parents["student"]["fingerprint"], parents["teacher"]["fingerprint"]
    if pruned in steps and made[pruned] == "pruned":
        source = steps[pruned].lineage["parents"]["source"]["fingerprint"]
        teacher = teacher if distilled else source
    roles = {
        "teacher": teacher,
        "source": source if source != teacher else None,
        "pruned": pruned,
        "distilled": distilled,
    }
    return {role: fingerprint for role, fingerprint in roles.items() if fingerprint}


def _sizes(found: dict[str, list[Path]], steps: dict[str, lineage.Step]) -> dict[str, int]:
    """Fingerprint -> number of parameters, of model.json, of a plan's source, or of the student that has the same size."""
    sizes = {}
    for folder in found["checkpoint"]:
        path = folder / KINDS["checkpoint"]
        record = read_json(path)
        with damage_as_user_error(path):
            sizes[record["fingerprint"]] = parameter_table.count(Architecture(**record["architecture"]))
    for step in steps.values():
        if before := step.lineage.get("before"):
            sizes.setdefault(
                step.lineage["parents"]["source"]["fingerprint"], parameter_table.count(Architecture(**before))
            )
    for fingerprint, step in reversed(steps.items()):
        student = (step.lineage["parents"].get("student") or {}).get("fingerprint")
        if student and (size := sizes.get(fingerprint) or sizes.get(student)):
            sizes |= {fingerprint: size, student: size}
    return sizes


def _weights(found: dict[str, list[Path]], steps: dict[str, lineage.Step]) -> dict[Path, str]:
    """Resolved folder -> fingerprint, of checkpoints, exported folders and the folders that were converted."""
    paths = {Path(step.identity["path"]).resolve(): fingerprint for fingerprint, step in steps.items()}
    for fingerprint, step in steps.items():
        for parent in step.lineage["parents"].values():
            if parent and "fingerprint" not in parent:
                paths[Path(parent["path"]).resolve()] = fingerprint
    return paths | family_tree.weights_of(found)


def roles_of(found: dict[str, list[Path]]) -> dict[Path, str]:
    """Resolved folder -> role of the weights in it."""
    steps = {step.identity["fingerprint"]: step for step in family_tree.steps(found)}
    roles = {fingerprint: role for role, fingerprint in _roles(steps).items()}
    return {path: roles[weights] for path, weights in _weights(found, steps).items() if weights in roles}


def _losses(
    found: dict[str, list[Path]], roles: dict[str, str], weights: dict[Path, str]
) -> tuple[str | None, dict[str, dict]]:
    """The held-out file on which most roles were evaluated, and role -> its row of evaluation.json."""
    files: dict[str, dict[str, dict]] = {}
    for folder in found["evaluation"]:
        path = folder / KINDS["evaluation"]
        record = read_json(path)
        with damage_as_user_error(path):
            fingerprint = weights.get(Path(record["source"]).resolve())
            for role in (role for role, of_role in roles.items() if of_role == fingerprint):
                for row in record["files"]:
                    files.setdefault(os.path.basename(row["file"]), {})[role] = row
    file = max(files, key=lambda name: len(files[name]), default=None)
    return file, {role: files[file][role] for role in roles if role in files[file]} if file else {}


def _tiles(sizes: dict[str, int | None], losses: dict[str, float], file: str | None) -> Iterator[Tile]:
    small = sizes.get("distilled") or sizes.get("pruned")
    if (teacher := sizes.get("teacher")) and small:
        yield Tile(
            "parameters", f"{_short(teacher)} → {_short(small)}", f"{_percent(small / teacher)} of the teacher's"
        )
    if losses:
        ends = [role for role in ("teacher", "distilled") if role in losses] or list(losses)
        between = ", ".join(f"{role} {loss:.2f}" for role, loss in losses.items() if role not in ends)
        names = " → ".join(ends) + (f" ({between})" if between else "")
        yield Tile("loss", " → ".join(f"{losses[role]:.2f}" for role in ends), f"{names}, nats per token of {file}")
    if (share := recovered(losses)) is not None:
        yield Tile("recovered", _percent(share), "of the loss increase from pruning")


def _headline(losses: dict[str, float]) -> str:
    if (share := recovered(losses)) is None:
        return "Models by role. Loss in nats per token of held-out text."
    return (
        f"Pruning raised the loss from {losses['teacher']:.3f} to {losses['pruned']:.3f} nats per token. Distillation lowered it "
        f"to {losses['distilled']:.3f} and recovered {_percent(share)} of the increase."
    )


def _minutes(found: dict[str, list[Path]]) -> float:
    """Sum over finished folders of the time between their claim and their completion."""
    total = 0.0
    for folder in {folder for folders in found.values() for folder in folders}:
        start, end = folder / "config.yaml", folder / COMPLETE
        if start.is_file() and end.is_file():
            total += max(0.0, end.stat().st_mtime - start.stat().st_mtime) / 60
    return total


def _training(found: dict[str, list[Path]], roles: dict[str, str]) -> str:
    """Time and tokens of the distillation."""
    folder = _folders(found).get(roles.get("distilled"))
    steps = read_lines(folder / KINDS["training"]) if folder in found["training"] else []
    if not steps:
        return "all finished stages"
    with damage_as_user_error(folder / KINDS["training"]):
        before = [0, *(step["tokens"] for step in steps)]
        seconds = sum((s["tokens"] - n) / s["tokens_per_second"] for s, n in zip(steps, before, strict=False))
        return f"distillation {seconds / 60:.1f} min, {steps[-1]['tokens']:,} tokens"


def _folders(found: dict[str, list[Path]]) -> dict[str, Path]:
    """Fingerprint -> the checkpoint's folder."""
    return {read_json(folder / KINDS["checkpoint"]).get("fingerprint"): folder for folder in found["checkpoint"]}


def _commands(
    found: dict[str, list[Path]], steps: dict[str, lineage.Step], roles: dict[str, str], losses: dict[str, dict]
) -> Iterator[dict]:
    """Rows {next, command}: the next stage, evaluations that are missing, and uses of the result."""
    folders, last = _folders(found), next(reversed(roles.values()), None)
    options = _options(steps[last].lineage) if last in steps else []
    common = [option for option in options if _COMMON.match(option)]
    data = [option for option in options if _DATA.match(option)]

    def row(purpose: str, stage: str, *more: str) -> dict:
        return {"next": purpose, "command": shlex.join(["python", f"launch/{stage}.py", *common, *more])}

    if not roles:
        return
    if "pruned" not in roles:
        stage = "prune" if found["plan"] else "plan" if found["importance"] else "importance"
        yield row(f"Run the next stage, {stage}", stage, *(data if stage == "importance" else []))
    elif "distilled" not in roles:
        yield row("Distil the pruned model", "distill", *data)
    elif not found["export"]:
        yield row("Export to a Hugging Face folder", "export")
    for role, fingerprint in roles.items():
        if role not in losses and (folder := folders.get(fingerprint)):
            place = f"source={folder}", f"out_dir={folder.parent}/evaluate_{role}"
            yield row(f"Evaluate the {role} model", "evaluate", *data, *place)
    if last in folders and "pruned" in roles:
        yield row("Continue a prompt", "generate", f"source={folders[last]}", "prompt=Hello")
    for folder in found["export"][-1:]:
        yield {"next": "Serve the exported model", "command": shlex.join(["vllm", "serve", str(folder)])}


def _options(record: dict) -> list[str]:
    """The overrides of the command that wrote a checkpoint."""
    try:
        return shlex.split(record.get("command", ""))[1:]
    except ValueError:  # not a command line
        return []


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _short(count: int) -> str:
    """1,340,000 as 1.34 M."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}\N{NO-BREAK SPACE}{unit}"
    return str(count)
