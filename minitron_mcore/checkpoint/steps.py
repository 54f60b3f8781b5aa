"""The steps of a run folder: which are on disk, which is the newest, which may be removed. No torch import.

A step is written as `step_N.part`. It is renamed to `step_N` once its files, its manifest (integrity.json: hash and size of each
file) and the folder are on disk. It is complete if it has a published name and a manifest, and every file in the manifest has its
size. Hashes are compared when a step is loaded (see `run_folder.verify`).
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from minitron_mcore.checkpoint import disk
from minitron_mcore.errors import UserError
from minitron_mcore.reading import damage_as_user_error, read_json

MANIFEST, NEWEST = "integrity.json", "newest"
BEST = "best.json"
"""The step with the lowest held-out loss ("step"), and the one before it ("previous") until then; written by the training loop."""


class Step(NamedTuple):
    """A published step. Its folder may be damaged."""

    number: int
    path: Path

    def problem(self) -> str:
        """Why the step is not complete, in one sentence; empty if it is. Hashes are not compared."""
        try:
            hashes, sizes = read_manifest(self.path)
        except UserError as error:
            return str(error)
        for name in hashes:
            file = self.path / name
            if not file.is_file():
                return f"the checkpoint {self.path} is damaged or incomplete (no {name} in it): make it again."
            size = file.stat().st_size
            if size != sizes.get(name, size):
                return (
                    f"the checkpoint {self.path} is damaged or incomplete ({name} has {size} bytes, {sizes[name]} were "
                    "written): make it again."
                )
        return ""


def published(out_dir: str | Path) -> list[Step]:
    """The published steps of a run folder, the newest first; empty if there are none or no folder."""
    found = [(re.fullmatch(r"step_(\d{1,18})", path.name), path) for path in Path(out_dir).glob("step_*")]
    return sorted((Step(int(name[1]), path) for name, path in found if name and path.is_dir()), reverse=True)


def newest_complete(out_dir: str | Path) -> Step | None:
    """The newest complete step of a run folder; None if there is none."""
    return next((step for step in published(out_dir) if not step.problem()), None)


def part_folder(out_dir: str | Path, number: int) -> Path:
    """Folder of a step until it is published."""
    return Path(out_dir) / f"step_{number:07d}.part"


def read_manifest(step_dir: Path) -> tuple[dict[str, str], dict[str, int]]:
    """The sha256 and the size in bytes of each file of a step, by name. Manifests of older versions have no sizes.

    Raises:
        UserError: the manifest is missing or damaged, or lists something else than files in the folder.
    """
    remedy = "make the checkpoint again"
    content = read_json(step_dir / MANIFEST, remedy)
    with damage_as_user_error(step_dir / MANIFEST, remedy):
        hashes, sizes = content["files"], content.get("sizes", {})
        if outside := [name for name in hashes if Path(name).name != name]:
            raise ValueError(f"it lists {outside[0]}, which is not a file name")
        if not all(isinstance(digest, str) for digest in hashes.values()):
            raise ValueError("not all of its hashes are text")
        if not all(type(size) is int for size in sizes.values()):
            raise ValueError("not all of its sizes are whole numbers")
    return hashes, sizes


def publish(part: Path) -> Step:
    """Rename a written step to its published name (one process). Its files must be on disk already.

    A step of the same number, which a resume has refused, is replaced.

    Raises:
        UserError: the step is not complete; it is not published.
    """
    path, refused = part.with_suffix(""), part.with_suffix(".refused")
    step = Step(int(path.name.removeprefix("step_")), path)
    if problem := step._replace(path=part).problem():
        raise UserError(problem)
    disk.sync(part)
    if path.exists():
        os.replace(path, refused)
    os.replace(part, path)
    disk.sync(path.parent)
    return step


def best(out_dir: str | Path) -> int | None:
    """Number of the published step with the lowest held-out loss; None if there is no record or it names no published step.

    Raises:
        UserError: the record is damaged.
    """
    path = Path(out_dir) / BEST
    if not path.is_file():
        return None
    remedy = "remove it"
    record, numbers = read_json(path, remedy), {step.number for step in published(out_dir)}
    with damage_as_user_error(path, remedy):
        return next((number for number in (record["step"], record.get("previous")) if number in numbers), None)


def removable(
    numbers: Iterable[int], newest: int, keep_last: int, keep_every: int | None, lowest: int | None
) -> list[int]:
    """Steps that may be removed once `newest` is on disk, in ascending order.

    Those after `newest` were refused by the resume that led to it. Of the others the `keep_last` newest, multiples of `keep_every`
    and `lowest`, the one with the lowest held-out loss, stay.
    """
    old, refused = sorted(n for n in numbers if n <= newest), sorted(n for n in numbers if n > newest)
    kept = {*old[-keep_last:], lowest} | {n for n in old if keep_every and n % keep_every == 0}
    return [n for n in old if n not in kept] + refused


def remove_old(step: Step, keep_last: int, keep_every: int | None) -> None:
    """Remove what `removable` names, and leftovers, after `publish` has returned `step` (one process).

    A folder gets an unpublished name first, so that a removal that is interrupted leaves no incomplete step.
    """
    out_dir = step.path.parent
    by_number = {each.number: each.path for each in published(out_dir)}
    for number in removable(by_number, step.number, keep_last, keep_every, best(out_dir)):
        os.replace(by_number[number], by_number[number].with_suffix(".removed"))
    remove_leftovers(out_dir)


def remove_leftovers(out_dir: str | Path) -> None:
    """Remove what interrupted saves and removals have left, while no step is written (one process)."""
    for suffix in ("part", "refused", "removed"):
        for path in Path(out_dir).glob(f"step_*.{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
