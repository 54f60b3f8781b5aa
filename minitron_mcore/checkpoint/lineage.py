"""Lineages (see `run_folder.make_lineage`) as sequences of steps. No torch import."""

import hashlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from minitron_mcore.config.stages import STAGES
from minitron_mcore.reading import damage_as_user_error


class Step(NamedTuple):
    """One checkpoint in a model's history. Its folder may no longer exist."""

    lineage: dict[str, Any]
    identity: dict[str, Any]
    """Path, fingerprint and training step."""


def history(lineage: dict[str, Any], identity: dict[str, Any]) -> list[Step]:
    """All ancestors of a checkpoint, including its teachers and their ancestors, then the checkpoint itself.

    Each step comes after those that it was made from.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: a lineage has another form than `run_folder.make_lineage` gives it.
    """
    _check_form(lineage)
    steps: dict[str, Step] = {}
    for role, parent in lineage["parents"].items():
        key = "ancestry" if role in ("source", "student") else role
        if parent and lineage.get(key):
            ancestors = history(lineage[key], parent)
            steps |= {step.identity["fingerprint"]: step for step in ancestors}
    return [*steps.values(), Step(lineage, identity)]


def _check_form(lineage: dict[str, Any]) -> None:
    for role, parent in lineage["parents"].items():
        key = "fingerprint" if role.split()[0] in ("source", "student", "teacher") else "sha256"
        if parent and not all(isinstance(parent[name], str) for name in ("path", key)):
            raise ValueError(f"parent {role} {str(parent)[:40]}")
    if "data" in lineage and not isinstance(lineage["data"]["hash"], str):
        raise ValueError(f"data {str(lineage['data'])[:40]}")
    lineage.get("versions", {}).items()


def model_chain(lineage: dict[str, Any]) -> list[dict[str, Any]]:
    """The lineages of a model and its ancestors, the first ancestor's first, without teachers."""
    return [*(model_chain(lineage["ancestry"]) if "ancestry" in lineage else []), lineage]


def operation(lineage: dict[str, Any]) -> str | None:
    """How a checkpoint was made from its parents: "pruned", "distilled", "corrected" (a teacher, by the stage correct) or "trained"
    (without a teacher); None if it was converted."""
    if "plan" in lineage:
        return "pruned"
    if "settings" not in lineage:
        return None
    if lineage["parents"]["teacher"]:
        return "distilled"
    return "corrected" if stage_of(lineage.get("command", ""))[0] == "correct" else "trained"


def stage_of(command: str) -> tuple[str | None, list[str]]:
    """The stage that a command line runs, None if it runs none, and the words after the program."""
    try:
        program, *words = shlex.split(command)
    except (ValueError, AttributeError):  # no command line, or not text
        return None, []
    return next((Path(word).stem for word in (program, *words[:1]) if Path(word).stem in STAGES), None), words


def plans(folder: str | Path) -> dict[str, str]:
    """Digest -> text of the plans by which a checkpoint and its ancestors were pruned."""
    folder, texts = Path(folder), []
    for file in (folder / "plan.json", *sorted(folder.glob("plans/*.json"))):
        if file.is_file():
            with damage_as_user_error(file, "make the checkpoint again"):
                texts.append(file.read_text(encoding="utf-8"))
    return {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts}
