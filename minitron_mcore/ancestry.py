"""Who was made from whom: lineages as `checkpoint.describe` writes them, read as a line of steps. No torch import."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from minitron_mcore.reading import readable


class Step(NamedTuple):
    """One checkpoint on the way from the parent to the delivered one; its folder may be gone."""

    lineage: dict
    identity: dict
    """Its path, fingerprint and training step."""


def history(lineage: dict, identity: dict) -> list[Step]:
    """A checkpoint's ancestors, its teachers and theirs among them, each after what it was made from; itself last."""
    found = {}
    for role, kept in (("source", "ancestry"), ("student", "ancestry"), ("teacher", "teacher")):
        if lineage["parents"].get(role) and lineage.get(kept):
            found |= {s.identity["fingerprint"]: s for s in history(lineage[kept], lineage["parents"][role])}
    return [*found.values(), Step(lineage, identity)]


def line(lineage: dict) -> list[dict]:
    """The lineages of the model itself, without its teachers', the parent's first."""
    return [*(line(lineage["ancestry"]) if "ancestry" in lineage else []), lineage]


def deed(lineage: dict) -> str | None:
    """What made a checkpoint of its parents: pruned, distilled, trained; None is converted."""
    if "plan" in lineage:
        return "pruned"
    if "settings" in lineage:
        return "distilled" if lineage["parents"]["teacher"] else "trained"
    return None


def plans(folder: str | Path) -> dict[str, str]:
    """Text of each plan that a checkpoint's own line was cut by, under the digest that its lineage has of it."""
    folder, texts = Path(folder), []
    for file in (folder / "plan.json", *sorted(folder.glob("plans/*.json"))):
        if file.is_file():
            with readable(file, "make the checkpoint again"):
                texts.append(file.read_text(encoding="utf-8"))
    return {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts}
