"""The folder that a stage writes, from the claim by its rank 0 to its end.

A stage that resumes (distill, correct, search, depth, teacher_cache) writes in place. A stage that makes one artefact writes to
NAME.part, which is renamed to NAME when it is complete. Nothing in a folder is removed except by its owner (see `owner`).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from safetensors import SafetensorError

from minitron_mcore.checkpoint import disk, owner, stage_record, steps
from minitron_mcore.checkpoint.stage_record import COMPLETE, CONFIG
from minitron_mcore.config.identity import differences
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.parallel import process_groups
from minitron_mcore.reading import read_yaml

_BEGINNING = (CONFIG, stage_record.INPUTS, "model.json", "hf", "plans")
"""What a run writes before its first result."""


@contextmanager
def claim_run_folder(out_dir: str | Path, settings: dict[str, Any], share: str = "") -> Iterator[bool]:
    """Own `out_dir` during the block, which writes in place or resumes (collective if torch.distributed is initialised).

    Args:
        settings: `identity.resolved` of the run, written to config.yaml.
        share: name of the part of the run that this process does, if other processes do others at the same time.

    Yields:
        True if the folder has a step.

    Raises:
        UserError: another process that still runs owns the folder, or it holds results of another run or other files.
    """
    out_dir, resumed, claim = Path(out_dir), False, None
    with process_groups.raise_on_all_ranks():
        if process_groups.rank() == 0:
            claim = _claim(out_dir, settings, share)
            resumed = bool(steps.published(out_dir))
    resumed = process_groups.from_rank_0(resumed)
    try:
        yield resumed
    finally:
        if claim:
            claim.release()


@contextmanager
def new_run_folder(out_dir: str | Path, settings: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `out_dir` for the block to fill, which becomes a finished `out_dir` at its end (collective as above).

    An unfinished one, which a stage left that was killed, is replaced. If the block raises, it is removed.

    Yields:
        out_dir.part, which rank 0 has made.

    Raises:
        UserError: another process that still runs owns out_dir.part; out_dir is not empty; in a stage of one process, the block
            cannot write. Ranks have to tell each other (`writing` inside `raise_on_all_ranks`).
    """
    out_dir, claim = Path(out_dir), None
    part = Path(f"{out_dir}.part")
    with process_groups.raise_on_all_ranks():
        if process_groups.rank() == 0:
            claim = _claim_part(out_dir, part, settings)
    try:
        with nullcontext() if dist.is_initialized() else writing(out_dir):
            yield part
        if dist.is_initialized():
            process_groups.barrier()
        with process_groups.raise_on_all_ranks():
            if claim:
                with writing(out_dir):
                    finish(part)
                    _publish(claim, part, out_dir)
    except BaseException:
        if claim:
            claim.stop()
            shutil.rmtree(part, ignore_errors=True)
        raise


def finish(out_dir: str | Path) -> None:
    """Mark a run as finished (rank 0). Runs that resume call this themselves after their last step."""
    if process_groups.rank() == 0:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        stage_record.finish(out_dir, {"ranks": ranks, "device": process_groups.device_name()})


def _claim(out_dir: Path, settings: dict[str, Any], share: str) -> owner.Claim:
    _refuse_foreign(out_dir)
    with writing(out_dir):
        claim = owner.Claim(out_dir, share)
    try:
        inputs = stage_record.inputs(settings)
        if (out_dir / CONFIG).is_file():
            _refuse_other_run(out_dir, settings, inputs)
        _write_beginning(out_dir, settings, inputs)
    except BaseException:
        claim.release()
        raise
    return claim


def _claim_part(out_dir: Path, part: Path, settings: dict[str, Any]) -> owner.Claim:
    _refuse_foreign(out_dir)
    _refuse_finished(out_dir, settings)
    inputs = stage_record.inputs(settings)
    with writing(part):
        claim = owner.Claim(part)
    try:
        _refuse_finished(out_dir, settings)  # it may have been published while this process claimed
        with writing(part):
            claim.clear()
        _write_beginning(part, settings, inputs)
    except BaseException:
        claim.stop()
        shutil.rmtree(part, ignore_errors=True)
        raise
    return claim


def _refuse_other_run(out_dir: Path, settings: dict[str, Any], inputs: dict[str, stage_record.Input]) -> None:
    """Refuse results of other settings or inputs. A run that was stopped before its first result may be begun with others."""
    stored = read_yaml(out_dir / CONFIG, f"choose another out_dir, or remove {out_dir}")
    if _has_results(out_dir) or stored.get("stage") != settings.get("stage"):
        if changes := differences(stored, settings):
            raise UserError(
                f"{out_dir} holds another run ({'; '.join(changes)}): give the old values to resume it, choose another out_dir, "
                "or remove it."
            )
        refuse(stage_record.changed_inputs(out_dir, inputs))
    else:
        (out_dir / stage_record.INPUTS).unlink(missing_ok=True)


def _write_beginning(folder: Path, settings: dict[str, Any], inputs: dict[str, stage_record.Input]) -> None:
    with writing(folder):
        disk.replace_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
        stage_record.record_inputs(folder, inputs)


def _publish(claim: owner.Claim, part: Path, out_dir: Path) -> None:
    """Rename the folder, and remove its claim, which a finished folder does not need."""
    claim.stop()
    disk.sync(part)
    os.rename(part, out_dir)
    disk.sync(out_dir.parent)
    (out_dir / claim.path.name).unlink()


def _refuse_foreign(out_dir: Path) -> None:
    names = [
        path.name for path in out_dir.glob("*") if path.suffix != ".part" and not path.name.startswith(owner.PREFIX)
    ]
    if names and CONFIG not in names:
        raise UserError(f"out_dir {out_dir} is not empty and holds no run of ours: choose another out_dir.")


def _refuse_finished(out_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse an `out_dir` of a run."""
    if not (out_dir / CONFIG).is_file():
        return
    remedy = "choose another out_dir, or remove it"
    changes = differences(read_yaml(out_dir / CONFIG, remedy), settings)
    kind = f"another run ({'; '.join(changes)})" if changes else "a finished run"
    kind = kind if (out_dir / COMPLETE).is_file() else "an unfinished run"
    raise UserError(f"out_dir {out_dir} already holds {kind}: {remedy}.")


def _has_results(out_dir: Path) -> bool:
    """Whether a run has got further than its beginning: checkpoints, metrics, a report of a failure."""
    others = (p for p in out_dir.iterdir() if p.name not in _BEGINNING and not p.name.startswith(owner.PREFIX))
    return any(path.is_dir() or path.stat().st_size for path in others if path.suffix != ".part")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """An OSError of the block, such as a full disk or a missing permission, as a UserError; safetensors raises its own error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder} cannot be written ({reason}): choose another out_dir, or make room.") from error
