"""What stages wrote to a work_dir: folders by the files in them, their lineage, and the models by role with sizes and losses."""

import base64
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minitron_mcore import reading
from minitron_mcore.checkpoint import lineage
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.plan import Plan
from minitron_mcore.reading import check_format_version

KINDS = {
    "importance": "scores.safetensors",
    "plan": "plan.json",
    "depth": "depth.json",
    "search": "search.json",
    "training": "metrics.jsonl",
    "comparison": "compare.json",
    "evaluation": "evaluation.json",
    "checkpoint": "model.json",
    "export": "minitron/lineage.json",
}
"""Kind of folder -> the file that identifies it; a folder may be of several kinds."""
PNG = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
    caption: str
    alt: str
    """Alternative text for screen readers."""
    data: str
    """The PNG in base64."""


def folders(work_dir: str | Path) -> dict[str, list[Path]]:
    """The folders below `work_dir` of each of `KINDS`, the oldest first.

    Raises:
        UserError: the folder does not exist, or no stage wrote to it.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise UserError(
            f"no folder {work_dir}: give the one that the stages wrote to (work_dir=/path), or name its recipe or model "
            "(+recipe=NAME, +model=NAME)."
        )
    finished = (path for path in work_dir.iterdir() if path.is_dir() and path.suffix != ".part")
    below = sorted(finished, key=lambda path: (_time(path), path.name))
    by_kind = {kind: [path for path in below if (path / file).is_file()] for kind, file in KINDS.items()}
    if not any(by_kind.values()):
        raise UserError(
            f"{work_dir} has nothing to report: no folder in it holds one of {', '.join(KINDS.values())}. Run a stage first, "
            "or give another work_dir."
        )
    return by_kind


def _time(folder: Path) -> float:
    """Time at which a stage claimed a folder."""
    claim = folder / "config.yaml"
    return (claim if claim.is_file() else folder).stat().st_mtime


REMEDY = "make it again, or move it out of the work_dir"
damage_as_user_error = partial(reading.damage_as_user_error, remedy=REMEDY)
read_lines = partial(reading.read_json_lines, remedy=REMEDY)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of this format version; UserError for anything else."""
    content = reading.read_json(path, REMEDY)
    check_format_version(content, path, "make it again")
    return content


def pictures(folder: Path, known: dict[str, tuple[str, str]]) -> list[Picture]:
    """All PNG files of a folder, by name.

    Args:
        known: file name -> (caption, alternative text); other files are captioned by their name.
    """
    images = []
    for path in sorted(folder.glob("*.png")):
        words = re.sub(r"[_-]+", " ", path.stem)
        caption, alt = known.get(
            path.name, (f"{words[:1].upper()}{words[1:]}.", f"{words}: its figures are in the tables of this section")
        )
        with damage_as_user_error(path):
            data = path.read_bytes()
            if not data.startswith(PNG):
                raise ValueError("not a PNG")
        images.append(Picture(caption, alt, base64.b64encode(data).decode()))
    return images


def history(folders: dict[str, list[Path]]) -> list[lineage.Step]:
    """All checkpoints in these folders and their ancestors, each once and after its parents."""
    merged: dict[str, lineage.Step] = {}
    for path in (folder / KINDS[kind] for kind in ("checkpoint", "export") for folder in folders[kind]):
        record = read_json(path)
        with damage_as_user_error(path):
            identity = {"path": str(path.parent), "step": ""} | {
                k: v for k, v in record.items() if k in ("path", "step")
            }
            for step in lineage.history(record["lineage"], identity | {"fingerprint": record["fingerprint"]}):
                merged.setdefault(step.identity["fingerprint"], step)
    return list(merged.values())


def weights_of(folders: dict[str, list[Path]]) -> dict[Path, str]:
    """Resolved folder -> fingerprint, of the checkpoints and exported folders of the work_dir."""
    kinds = ("export", "checkpoint")
    return {f.resolve(): str(read_json(f / KINDS[kind]).get("fingerprint")) for kind in kinds for f in folders[kind]}


def lineage_rows(
    folders: dict[str, list[Path]], scores: dict[Path, Scores], plans: dict[Path, Plan]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for two tables: each artefact with its parents, and the commands that made them."""
    made = history(folders)
    names = {
        fingerprint: folder.name for folder, fingerprint in weights_of(folders).items()
    }  # checkpoints before exports
    weights = [_weights_row(step, names) for step in made]
    lines = [row for row in weights if row["how"] == "converted"]
    for folder, of in scores.items():
        lines.append(_line("scores", of.digest(), "scored", f"weights {of.metadata.get('fingerprint')}", folder.name))
    for folder, plan in plans.items():
        lines.append(
            _line("plan", plan.digest(), "planned", f"weights {plan.fingerprint}, scores {plan.scores}", folder.name)
        )
    lines += [row for row in weights if row["how"] != "converted"]
    commands = [{"hash": step.identity["fingerprint"], **_command(step.lineage)} for step in made]
    for folder in folders["export"]:
        path = folder / KINDS["export"]
        record = read_json(path)
        with damage_as_user_error(path):
            kept = sorted(file.stem.removeprefix("plan_") for file in path.parent.glob("plan_*.json"))
            line = _line("folder", record["fingerprint"], "exported", f"weights {record['fingerprint']}", folder.name)
            lines.append(line | ({"with": f"plan {', '.join(kept)}"} if kept else {}))
            commands.append({"hash": record["fingerprint"], **_command(record)})
    return lines, commands


def _line(what: str, digest: str, how: str, of: str, folder: str) -> dict[str, Any]:
    return {"what": what, "hash": digest, "how": how, "from": of, "with": "", "folder": folder}


def _command(record: dict[str, Any]) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return {"command": record.get("command", ""), "versions": versions}


def _weights_row(step: lineage.Step, names: dict[str, str]) -> dict[str, Any]:
    record, fingerprint = step.lineage, step.identity["fingerprint"]
    parents = {role: parent for role, parent in record["parents"].items() if parent}
    of = [_parent(role, parent) for role, parent in parents.items()]
    used = [f"{kind} {record[kind]}" for kind in ("plan", "scores") if kind in record]
    used += [f"data {record['data']['hash']}"] if "data" in record else []
    row = _line(
        "weights", fingerprint, lineage.operation(record) or "converted", ", ".join(of), names.get(fingerprint, "")
    )
    return row | {"with": ", ".join(used), "folder": row["folder"] or _elsewhere(step.identity)}


def _parent(role: str, parent: dict[str, Any]) -> str:
    """A parent by its fingerprint; a converted folder by its hash and path."""
    if "fingerprint" in parent:
        return f"{role} {parent['fingerprint']}"
    return f"{role} {parent['sha256']} in {parent['path']}"


def _elsewhere(identity: dict[str, Any]) -> str:
    """Path of weights outside the work_dir, and whether they are still there."""
    path = Path(identity["path"]) / KINDS["checkpoint"]
    if not path.is_file():
        return f"{path.parent} (not there now)"
    same = read_json(path).get("fingerprint") == identity["fingerprint"]
    return f"{path.parent}" if same else f"{path.parent} (holds other weights now)"


class Model(NamedTuple):
    """A model of the run."""

    role: str
    """teacher, source (of the pruning, if it is not the teacher), pruned or distilled"""
    lineage: dict[str, Any]
    """{} where it is not known."""
    folder: Path | None
    """The checkpoint's, if it is in the work_dir."""
    parameters: int | None
    losses: dict[str, dict[str, Any]]
    """Name of a held-out file -> its row of evaluation.json."""
    paths: frozenset[Path]
    """Resolved folders with these weights: checkpoints, exported folders, the folder that was converted."""


def models(folders: dict[str, list[Path]]) -> list[Model]:
    """The last distilled model of a work_dir (see `read.folders`), its teacher and its student; [] without any checkpoint.

    Raises:
        UserError: a damaged file.
    """
    steps = {step.identity["fingerprint"]: step for step in history(folders)}
    checkpoints, sizes = {}, {}
    for folder in folders["checkpoint"]:
        path = folder / KINDS["checkpoint"]
        record = read_json(path)
        with damage_as_user_error(path):
            checkpoints[record["fingerprint"]] = folder
            sizes[record["fingerprint"]] = parameter_table.count(Architecture(**record["architecture"]))
    for step in steps.values():
        if before := step.lineage.get("before"):
            source = step.lineage["parents"]["source"]["fingerprint"]
            sizes.setdefault(source, parameter_table.count(Architecture(**before)))
    weights, evaluations = _weights(folders, steps), _evaluations(folders)
    rows = []
    for role, fingerprint in _roles(steps).items():
        paths = frozenset(path for path, of in weights.items() if of == fingerprint)
        losses = {name: row for path, files in evaluations if path in paths for name, row in files.items()}
        record = steps[fingerprint].lineage if fingerprint in steps else {}
        rows.append(Model(role, record, checkpoints.get(fingerprint), sizes.get(fingerprint), losses, paths))
    return rows


def _roles(steps: dict[str, lineage.Step]) -> dict[str, str]:
    """Role -> fingerprint."""
    made = {fingerprint: lineage.operation(step.lineage) for fingerprint, step in steps.items()}
    last = {deed: fingerprint for fingerprint, deed in made.items()}
    distilled, pruned, source, teacher = last.get("distilled"), last.get("pruned"), None, next(reversed(made), None)
    if distilled:
        parents = steps[distilled].lineage["parents"]
        pruned, teacher = parents["student"]["fingerprint"], parents["teacher"]["fingerprint"]
    if pruned and made.get(pruned) == "pruned":
        source = steps[pruned].lineage["parents"]["source"]["fingerprint"]
        teacher = teacher if distilled else source
    roles = {"teacher": teacher, "source": source, "pruned": pruned, "distilled": distilled}
    return {role: of for role, of in roles.items() if of and not (role == "source" and of == teacher)}


def _weights(folders: dict[str, list[Path]], steps: dict[str, lineage.Step]) -> dict[Path, str]:
    """Resolved folder -> fingerprint of its weights."""
    weights = {Path(step.identity["path"]).resolve(): fingerprint for fingerprint, step in steps.items()}
    for fingerprint, step in steps.items():
        for parent in step.lineage["parents"].values():
            if parent and "fingerprint" not in parent:  # a folder that was converted
                weights[Path(parent["path"]).resolve()] = fingerprint
    return weights | weights_of(folders)


def _evaluations(folders: dict[str, list[Path]]) -> list[tuple[Path, dict[str, dict[str, Any]]]]:
    """(resolved folder of the model, held-out file's name -> row), the oldest first."""
    evaluations = []
    for folder in folders["evaluation"]:
        path = folder / KINDS["evaluation"]
        record = read_json(path)
        with damage_as_user_error(path):
            files = {os.path.basename(row["file"]): row for row in record["files"]}
            evaluations.append((Path(record["source"]).resolve(), files))
    return evaluations
