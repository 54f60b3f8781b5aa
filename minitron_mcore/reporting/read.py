"""Read the files that stages wrote to a work_dir. Folders are classified by the files in them."""

import base64
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minitron_mcore import reading
from minitron_mcore.errors import UserError
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


def read_json(path: Path) -> dict:
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
