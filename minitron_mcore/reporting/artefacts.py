"""What stages wrote to a work_dir: folders by the files in them, their lineage, and the models by role with sizes and losses."""

import base64
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minitron_mcore import reading
from minitron_mcore.checkpoint import lineage, stage_record, steps
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
    "benchmark": "benchmark.json",
    "checkpoint": "model.json",
    "export": "minitron/lineage.json",
    "stage": "config.yaml",
}
"""Kind of folder -> the file that identifies it; a folder may be of several kinds."""
FIGURES = "figures"
"""Folder of a work_dir with files of benchmarks/*.py --json."""
PNG = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
    caption: str
    alt: str
    """Alternative text for screen readers."""
    data: str
    """The PNG in base64."""


def folders(work_dir: str | Path, figures: Iterable[str] = ()) -> dict[str, list[Path]]:
    """The folders below `work_dir` of each of `KINDS`, the oldest first, and under FIGURES the files with figures.

    Args:
        figures: files of figures beside those in `work_dir`/figures.

    Raises:
        UserError: a folder or a file does not exist, or no stage wrote to the folder.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise UserError(
            f"no folder {work_dir}: give the one that the stages wrote to (work_dir=/path), or name its recipe or model "
            "(+recipe=NAME, +model=NAME)."
        )
    if missing := [path for path in figures if not Path(path).is_file()]:
        raise UserError(f"figures names {missing[0]}, which is no file: give files of benchmarks/*.py --json FILE.")
    by_kind = classified(work_dir) | {FIGURES: [*sorted(work_dir.glob(f"{FIGURES}/*.jsonl")), *map(Path, figures)]}
    if not any(by_kind.values()):
        raise UserError(
            f"{work_dir} has nothing to report: no folder in it holds one of {', '.join(KINDS.values())}. Run a stage first, "
            "or give another work_dir."
        )
    return by_kind


def classified(work_dir: Path) -> dict[str, list[Path]]:
    """The folders below `work_dir` of each of `KINDS`, the oldest first; of kind "stage" also a benchmark's of each model."""
    finished = (path for path in work_dir.glob("*") if os.path.isdir(path) and path.suffix != ".part")
    below = sorted(finished, key=lambda path: (_time(path), path.name))
    by_kind = {kind: [path for path in below if os.path.isfile(path / file)] for kind, file in KINDS.items()}
    measured = (path for folder in by_kind["benchmark"] for path in sorted(folder.glob(f"*/{KINDS['stage']}")))
    by_kind["stage"] += [path.parent for path in measured]
    return by_kind


def locator(folders: dict[str, list[Path]]) -> Callable[[str], Path]:
    """A function from a recorded path to the resolved path where it is now.

    A path inside the work_dir that the stages recorded is in the present one, which may be a copy or have another name.
    """
    present: dict[Path, Path] = {}
    for folder in folders["stage"]:
        config = stage_config(folder)
        recorded = Path(str(config.get("work_dir")))
        if config.get("out_dir") and Path(str(config["out_dir"])) == recorded / folder.name:
            present[recorded] = folder.parent

    def locate(path: str) -> Path:
        for recorded, root in present.items():
            if Path(path).is_relative_to(recorded):
                return (root / Path(path).relative_to(recorded)).resolve()
        return Path(path).resolve()

    return locate


def stage_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a stage's folder; {} without one."""
    path = folder / KINDS["stage"]
    return reading.read_yaml(path, REMEDY) if path.is_file() else {}


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
    try:
        same = read_json(path).get("fingerprint") == identity["fingerprint"]
    except UserError:
        return f"{path.parent} (not readable now)"
    return f"{path.parent}" if same else f"{path.parent} (holds other weights now)"


def shown_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Training settings of a lineage by full name, without nulls and sections that are off: those whose first setting is 0."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if not isinstance(value, dict):
            flat[name] = value
        elif next(iter(value.values()), None):
            flat |= {f"{name}.{key}": each for key, each in value.items()}
    return {key: value for key, value in flat.items() if value is not None}


class Model(NamedTuple):
    """A model of the run."""

    role: str
    """teacher: the recorded one, else the converted or corrected model at the beginning; source: of the pruning or training, if it
    is not the teacher; pruned, distilled or trained (without a teacher): the last model on the way that was made so"""
    lineage: dict[str, Any]
    """{} where it is not known."""
    folder: Path | None
    """The checkpoint's, if it is in the work_dir."""
    arch: Architecture | None
    losses: dict[str, dict[str, Any]]
    """Name of a held-out file -> its row of evaluation.json."""
    paths: frozenset[Path]
    """Resolved folders with these weights: checkpoints, exported folders, the folder that was converted."""

    @property
    def parameters(self) -> int | None:
        return parameter_table.count(self.arch) if self.arch else None


def models(folders: dict[str, list[Path]], made: list[lineage.Step] | None = None) -> list[Model]:
    """A model by its role, the last, after its teacher and what it was made from, back to the last pruning; [] without any
    checkpoint.

    Args:
        folders: see `folders`.
        made: `lineage.history` of the model; default: that of all folders, of which it then is the last result (see `_result`).

    Raises:
        UserError: a damaged file.
    """
    everything, locate = history(folders) if made is None else made, locator(folders)
    steps = {step.identity["fingerprint"]: step for step in everything}
    own = made[-1].identity["fingerprint"] if made else _result(steps)
    checkpoints, archs = {}, {}
    for folder in folders["checkpoint"]:
        path = folder / KINDS["checkpoint"]
        record = read_json(path)
        with damage_as_user_error(path):
            checkpoints[record["fingerprint"]] = folder
            archs[record["fingerprint"]] = Architecture(**record["architecture"])
            parameter_table.count(archs[record["fingerprint"]])
    for step in steps.values():
        if before := step.lineage.get("before"):
            archs.setdefault(step.lineage["parents"]["source"]["fingerprint"], Architecture(**before))
    weights, evaluations = _weights(folders, steps, locate), _evaluations(folders, locate)
    rows = []
    for role, fingerprint in _roles(steps, own).items() if own else ():
        paths = frozenset(path for path, of in weights.items() if of == fingerprint)
        losses = {name: row for path, files in evaluations if path in paths for name, row in files.items()}
        record = steps[fingerprint].lineage if fingerprint in steps else {}
        rows.append(Model(role, record, checkpoints.get(fingerprint), archs.get(fingerprint), losses, paths))
    return rows


def name_of(model: Model) -> str | None:
    """Name of a model's first ancestor: `model.name` of the stage that made the checkpoint, else that of the converted folder."""
    named = stage_config(model.folder).get("model") if model.folder else None
    if isinstance(named, dict) and named.get("name"):
        return str(named["name"])
    first = lineage.model_chain(model.lineage)[0] if model.lineage else {}
    path = next((parent["path"] for parent in first.get("parents", {}).values() if parent), None)
    return Path(path).name if path else None


def _result(steps: dict[str, lineage.Step]) -> str | None:
    """Fingerprint of the last trained model of which no other was made; without one of the last pruned one, else of the last."""
    parents = [parent for step in steps.values() for parent in step.lineage["parents"].values() if parent]
    used = {parent.get("fingerprint") for parent in parents}
    ends = [fingerprint for fingerprint in steps if fingerprint not in used]
    rank = {"distilled": 2, "trained": 2, "pruned": 1}
    return max(reversed(ends), key=lambda each: rank.get(lineage.operation(steps[each].lineage) or "", 0), default=None)


def _roles(steps: dict[str, lineage.Step], own: str) -> dict[str, str]:
    """Role -> fingerprint, as in `models`, for the model `own`."""
    chain: list[str] = []  # from the model to its first ancestor
    teachers: list[str] = []
    fingerprint: str | None = own
    while fingerprint and fingerprint not in chain:
        chain.append(fingerprint)
        parents = steps[fingerprint].lineage["parents"] if fingerprint in steps else {}
        teachers += [parent["fingerprint"] for role, parent in parents.items() if role == "teacher" and parent]
        fingerprint = (parents.get("student") or parents.get("source") or {}).get("fingerprint")
    made = [lineage.operation(steps[each].lineage) if each in steps else None for each in chain]
    original = next(each for each, how in zip(chain, made, strict=True) if how in (None, "corrected"))
    cut = made.index("pruned") if "pruned" in made else None
    source = original if cut is None else chain[cut + 1]
    roles = {"teacher": (teachers or [original])[0]}
    roles |= {"source": source} if source != roles["teacher"] else {}
    for each, how in reversed(list(zip(chain, made, strict=True))[: None if cut is None else cut + 1]):
        if how not in (None, "corrected"):
            roles.pop(how, None)
            roles[how] = each
    return roles


def _weights(
    folders: dict[str, list[Path]], steps: dict[str, lineage.Step], locate: Callable[[str], Path]
) -> dict[Path, str]:
    """Resolved folder -> fingerprint of its weights."""
    weights = {locate(step.identity["path"]): fingerprint for fingerprint, step in steps.items()}
    for fingerprint, step in steps.items():
        for parent in step.lineage["parents"].values():
            if parent and "fingerprint" not in parent:  # a folder that was converted
                weights[locate(parent["path"])] = fingerprint
    return weights | weights_of(folders)


def _evaluations(
    folders: dict[str, list[Path]], locate: Callable[[str], Path]
) -> list[tuple[Path, dict[str, dict[str, Any]]]]:
    """(resolved folder of the model, held-out file's name -> row) of evaluations that are not outdated, the oldest first."""
    evaluations = []
    for folder in folders["evaluation"]:
        path = folder / KINDS["evaluation"]
        record = read_json(path)
        with damage_as_user_error(path):
            files = {os.path.basename(row["file"]): row for row in record["files"]}
            if not is_outdated(folder, model := locate(record["source"])):
                evaluations.append((model, files))
    return evaluations


def is_outdated(evaluation: Path, model: Path) -> bool:
    """Whether the checkpoint in `model` has another step than when it was evaluated.

    By the fingerprint that the stage recorded; without one, by the times of evaluation and step.
    """
    if not (newest := steps.newest_complete(model)):
        return False
    recorded = stage_record.recorded_inputs(evaluation).get("source")
    if recorded:
        return recorded.fingerprint != stage_record.inputs({"source": str(model)})["source"].fingerprint
    return (evaluation / KINDS["evaluation"]).stat().st_mtime < (newest.path / steps.MANIFEST).stat().st_mtime
