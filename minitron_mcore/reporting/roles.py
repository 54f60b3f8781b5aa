"""The models of a work_dir by role: the teacher, the pruned model and the distilled one, with their sizes and losses."""

import os
from pathlib import Path
from typing import NamedTuple

from minitron_mcore.checkpoint import lineage
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reporting import family_tree
from minitron_mcore.reporting.read import KINDS, damage_as_user_error, read_json


class Model(NamedTuple):
    """A model of the run."""

    role: str
    """teacher, source (of the pruning, if it is not the teacher), pruned or distilled"""
    lineage: dict
    """{} where it is not known."""
    folder: Path | None
    """The checkpoint's, if it is in the work_dir."""
    parameters: int | None
    losses: dict[str, dict]
    """Name of a held-out file -> its row of evaluation.json."""
    paths: frozenset[Path]
    """Resolved folders with these weights: checkpoints, exported folders, the folder that was converted."""


def models(folders: dict[str, list[Path]]) -> list[Model]:
    """The last distilled model of a work_dir (see `read.folders`), its teacher and its student; [] without any checkpoint.

    Raises:
        UserError: a damaged file.
    """
    steps = {step.identity["fingerprint"]: step for step in family_tree.steps(folders)}
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
    if made.get(pruned) == "pruned":
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
    return weights | family_tree.weights_of(folders)


def _evaluations(folders: dict[str, list[Path]]) -> list[tuple[Path, dict[str, dict]]]:
    """(resolved folder of the model, held-out file's name -> row), the oldest first."""
    evaluations = []
    for folder in folders["evaluation"]:
        path = folder / KINDS["evaluation"]
        record = read_json(path)
        with damage_as_user_error(path):
            files = {os.path.basename(row["file"]): row for row in record["files"]}
            evaluations.append((Path(record["source"]).resolve(), files))
    return evaluations
