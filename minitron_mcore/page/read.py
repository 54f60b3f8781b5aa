"""What the stages left in a work_dir: folders told apart by what they hold. What cannot be read is refused by name."""

import base64
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from minitron_mcore import reading
from minitron_mcore.errors import UserError

KINDS = {
    "importance": "scores.safetensors",
    "plan": "plan.json",
    "depth": "depth.json",
    "search": "search.json",
    "training": "metrics.jsonl",
    "evaluation": "evaluation.json",
    "checkpoint": "model.json",
    "export": "minitron/lineage.json",
}
"""What a folder is, by the file that makes it so; a folder may be several things."""
PNG = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
    caption: str
    alt: str
    """What it shows, for who cannot see it."""
    data: str
    """The PNG in base64."""


def folders(work_dir: str | Path) -> dict[str, list[Path]]:
    """The folders below `work_dir` of each of `KINDS`, the oldest first.

    Raises:
        UserError: no such folder, or none in it that a stage wrote.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise UserError(
            f"no folder {work_dir}: give the one that the stages wrote to (work_dir=/path), or name its recipe or model "
            "(+recipe=NAME, +model=NAME)."
        )
    below = sorted((path for path in work_dir.iterdir() if path.is_dir()), key=lambda path: (_time(path), path.name))
    found = {kind: [path for path in below if (path / file).is_file()] for kind, file in KINDS.items()}
    if not any(found.values()):
        raise UserError(
            f"{work_dir} has nothing to report: no folder in it holds one of {', '.join(KINDS.values())}. Run a stage first, "
            "or give another work_dir."
        )
    return found


def _time(folder: Path) -> float:
    """When a stage began to fill a folder."""
    claim = folder / "config.yaml"
    return (claim if claim.is_file() else folder).stat().st_mtime


REMEDY = "make it again, or move it out of the work_dir"


def readable(path: Path) -> AbstractContextManager[None]:
    """See `reading.readable`."""
    return reading.readable(path, REMEDY)


def read_json(path: Path) -> dict:
    return reading.read_json(path, REMEDY)


def read_lines(path: Path) -> list[dict]:
    """A .jsonl file. A line that is being written is left out."""
    return reading.read_json_lines(path, REMEDY)


def pictures(folder: Path, known: dict[str, tuple[str, str]]) -> list[Picture]:
    """Every PNG of a folder, by name; `known` has (caption, alt) of some, the others are captioned by their file's name."""
    found = []
    for path in sorted(folder.glob("*.png")):
        words = re.sub(r"[_-]+", " ", path.stem)
        caption, alt = known.get(
            path.name, (f"{words[:1].upper()}{words[1:]}.", f"{words}: its figures are in the tables here")
        )
        with readable(path):
            data = path.read_bytes()
            if not data.startswith(PNG):
                raise ValueError("not a PNG")
        found.append(Picture(caption, alt, base64.b64encode(data).decode()))
    return found
