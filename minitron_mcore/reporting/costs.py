"""What the stages of a work_dir took: time, tokens, floating-point operations, ranks and their device."""

from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import stage_record
from minitron_mcore.config.stages import STAGES
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import flops
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reporting.artefacts import (
    KINDS,
    damage_as_user_error,
    read_json,
    read_lines,
    stage_config,
)

TOTAL = "total"


def rows(folders: dict[str, list[Path]], scores: dict[Path, Scores]) -> list[dict[str, Any]]:
    """A row for each stage in the pipeline's order: minutes, tokens, operations, ranks and device, None where no file holds them.

    Minutes are those of the last start, or those of all training steps, whichever is more.

    Args:
        folders: see `artefacts.folders`.
        scores: folder -> scores of the importance stages.

    Raises:
        UserError: a damaged file.
    """
    table = []
    for folder in folders["stage"]:
        config = stage_config(folder)
        if "stage" not in config:  # of another program
            continue
        training = trained(folder)
        recorded = stage_record.costs(folder)
        seconds = max(recorded.pop("seconds") or 0.0, training.get("seconds", 0.0))
        name = f"{folder.parent.name}/{folder.name}" if folder.parent in folders["benchmark"] else folder.name
        row = {"stage": str(config["stage"]), "folder": name, "minutes": seconds / 60 or None}
        row |= (
            {"tokens": training["tokens"], "FLOPs": training["FLOPs"]}
            if training
            else _read(folder, config, folders, scores)
        )
        table.append(row | recorded)
    order = list(STAGES)
    return sorted(table, key=lambda row: order.index(row["stage"]) if row["stage"] in order else len(order))


def total(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of `rows` over all stages; {} where no stage has one."""
    sums = {key: [row[key] for row in table if row.get(key) is not None] for key in ("minutes", "tokens", "FLOPs")}
    return {key: sum(values) for key, values in sums.items() if values}


def trained(folder: Path) -> dict[str, Any]:
    """Steps, tokens, seconds and operations of a training run, from its metrics; {} for a folder without steps.

    Seconds are those of steps and of saves that training waited for, in all starts of the run; a step without a line counts as the
    next one that has a line. Operations are those of the student's forward and backward passes and of a live teacher's forward
    passes.
    """
    path = folder / KINDS["training"]
    if not path.is_file() or not (lines := read_lines(path)):
        return {}
    with damage_as_user_error(path):
        seconds, operations, before = 0.0, 0.0, {"step": 0, "tokens": 0}
        for line in lines:
            steps, tokens = line["step"] - before["step"], line["tokens"] - before["tokens"]
            before = line
            if line.get("step_seconds"):
                spent = steps * line["step_seconds"]
            elif line.get("tokens_per_second"):  # of an older version
                spent = tokens / line["tokens_per_second"]
            else:
                continue
            seconds += spent + (line.get("save_seconds") or 0.0)
            operations += 1e12 * spent * ((line.get("student_tflops") or 0.0) + (line.get("teacher_tflops") or 0.0))
        last = lines[-1]
        return {
            "steps": int(last["step"]),
            "tokens": int(last["tokens"]),
            "seconds": seconds,
            "FLOPs": operations or None,
        }


def _read(
    folder: Path, config: dict[str, Any], folders: dict[str, list[Path]], scores: dict[Path, Scores]
) -> dict[str, Any]:
    """Tokens that a stage without training passed through a model, and their operations where the model is known."""
    if folder in scores:
        known = scores[folder].metadata
        arch = _architecture(str(known.get("fingerprint")), folders)
        with damage_as_user_error(folder / KINDS["stage"]):
            length = config.get("importance", {}).get("sequence_length")
            tokens = int(known["tokens"]) if "tokens" in known else None
            operations = tokens * flops.forward_flops(arch, length) if tokens and arch and length else None
            return {"tokens": tokens, "FLOPs": operations}
    path = folder / KINDS["evaluation"]
    if path.is_file():
        record = read_json(path)
        with damage_as_user_error(path):
            return {"tokens": sum(row.get("tokens") or 0 for row in record["files"]) or None, "FLOPs": None}
    return {"tokens": None, "FLOPs": None}


def _architecture(fingerprint: str, folders: dict[str, list[Path]]) -> Architecture | None:
    """The architecture of a checkpoint in the work_dir."""
    for folder in folders["checkpoint"]:
        path = folder / KINDS["checkpoint"]
        record = read_json(path)
        with damage_as_user_error(path):
            if record["fingerprint"] == fingerprint:
                return Architecture(**record["architecture"])
    return None
