"""Show what the stages below a folder are doing, from their files alone.

Each row is a folder that a stage writes: its state, steps, speed, remaining time, last good checkpoint, losses and what is wrong.
"""

import argparse
import collections
import datetime
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import owner, stage_record, steps
from minitron_mcore.errors import UserError
from minitron_mcore.reading import damage_as_user_error, read_json, read_json_lines, read_yaml
from minitron_mcore.reporting import tables

LOSSES = ("kd_loss", "lm_loss", "heldout_loss")
SLOW_RATIO = 1.5
"""A rank is slow if its seconds exceed this multiple of the mean."""
STALE_SECONDS = 60.0
"""Age of a heartbeat that is worth a warning; an owner beats every `owner.BEAT_SECONDS`."""
DATA_SHARE = 0.2
"""Share of the time that training may wait for data."""
_KEYS = (
    *("folder", "stage", "state", "step", "steps", "tokens_per_second", "seconds_left", "checkpoint", *LOSSES),
    *("memory_gib", "health"),
)
_RECENT = 20
"""Lines of metrics.jsonl from which speed and health are estimated."""
_DEPTHS = ("", "*/", "*/*/")
_REMEDY = "make it again, or move it out of the folder"


def main(arguments: list[str]) -> None:
    """`minitron status DIR [--json]`; exits with 0 whatever the states are.

    Raises:
        UserError: no stage has written to a folder; a damaged file.
    """
    parser = argparse.ArgumentParser(prog="minitron status", description=__doc__)
    parser.add_argument("dir", nargs="+", help="folder of a stage, a work_dir, or the folder of several")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    options = parser.parse_args(arguments)
    rows = [row for folder in options.dir for row in status(Path(folder))]
    if options.json:
        return print(json.dumps(rows, indent=1))
    notes = [f"{row['folder']}: {sentence}" for row in rows for sentence in row["health"]]
    tables.table(", ".join(options.dir), tables.without_empty([_shown(row) for row in rows]), notes)


def status(root: Path) -> list[dict[str, Any]]:
    """A row for each folder of a stage at or up to two levels below `root`, JSON-ready."""
    found = {path.parent for depth in _DEPTHS for path in root.glob(f"{depth}config.yaml")}
    rows = []
    for folder in sorted(found):
        try:
            rows += _row(folder)
        except UserError as error:
            rows.append(dict.fromkeys(_KEYS) | {"folder": str(folder), "state": "damaged", "health": [str(error)]})
    if not rows:
        raise UserError(f"no stage has written to {root} or to a folder in it: give a work_dir, such as runs/NAME.")
    return rows


def _row(folder: Path) -> list[dict[str, Any]]:
    """The row of a folder; none for a config.yaml of another program."""
    config = read_yaml(folder / "config.yaml", _REMEDY)
    if "stage" not in config:
        return []
    with damage_as_user_error(folder, _REMEDY):
        return [_figures(folder, config)]


def _figures(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    metrics, report = folder / "metrics.jsonl", folder / "failure.json"
    lines = read_json_lines(metrics, _REMEDY) if metrics.is_file() else []
    failure = read_json(report, _REMEDY) if report.is_file() else None
    holder = owner.owner(folder)
    last, newest = lines[-1] if lines else {}, steps.newest_complete(folder)
    total = config.get(config["stage"], {}).get("steps", config.get("steps"))
    speeds = [line["tokens_per_second"] for line in lines[-_RECENT:] if line.get("tokens_per_second")]
    speed = statistics.median(speeds) if speeds else None
    remaining = (total - last["step"]) * last["tokens"] / last["step"] if speed and total else None
    is_running = holder is not None and holder.is_running
    figures = {
        "folder": str(folder),
        "stage": config["stage"],
        "state": _state(folder, holder, failure),
        "step": last.get("step"),
        "steps": total,
        "tokens_per_second": speed,
        "seconds_left": remaining / speed if is_running and speed and remaining is not None else None,
        "checkpoint": newest.path.name if newest else None,
        "memory_gib": last.get("memory_gib"),
        "health": [*_health(folder, lines[-_RECENT:], holder, failure)],
    }
    figures |= {key: next((line[key] for line in reversed(lines) if line.get(key) is not None), None) for key in LOSSES}
    return {key: figures[key] for key in _KEYS}


def _state(folder: Path, holder: owner.Owner | None, failure: dict[str, Any] | None) -> str:
    if stage_record.is_complete(folder):
        return "finished"
    if holder and holder.is_running:
        return "running"
    if failure:
        return "failed"
    return "killed" if holder else "stopped"


def _health(
    folder: Path, recent: list[dict[str, Any]], holder: owner.Owner | None, failure: dict[str, Any] | None
) -> Iterator[str]:
    """What is wrong, in sentences."""
    if failure:
        yield str(failure.get("message"))
    if bad := sorted({path.name[: len("step_0000000")] for path in folder.glob("bad_batches/step_*")}):
        yield f"{len(bad)} steps were not finite, the last {bad[-1]}."
    published = steps.published(folder)
    if published and (problem := published[0].problem()):
        yield problem
    if holder and holder.is_running and holder.age > STALE_SECONDS:
        yield f"process {holder.pid} on {holder.host} has not beaten for {holder.age:.0f} s."
    elif holder and not holder.is_running and not stage_record.is_complete(folder):
        yield f"process {holder.pid} on {holder.host} ended {holder.age:.0f} s ago without a word: the same command continues."
    slow = [line for line in recent if _is_slow(line)]
    if 2 * len(slow) > len(recent):
        rank, _ = collections.Counter(line["slowest_rank"] for line in slow).most_common(1)[0]
        seconds = [statistics.median(line[f"{key}_seconds"] for line in slow) for key in ("slowest_rank", "mean_rank")]
        yield f"rank {rank} is slow: {seconds[0]:.3g} s a step, {seconds[1]:.3g} s on average."
    waits = [_data_share(line) for line in recent if line.get("data_seconds") and line.get("tokens_per_second")]
    if waits and statistics.median(waits) > DATA_SHARE:
        yield f"training waits for data {statistics.median(waits):.0%} of the time."


def _is_slow(line: dict[str, Any]) -> bool:
    seconds, mean = line.get("slowest_rank_seconds"), line.get("mean_rank_seconds")
    return bool(seconds and mean and seconds > SLOW_RATIO * mean)


def _data_share(line: dict[str, Any]) -> float:
    """Data wait over the time of the step; in files of an older version that begins when the batches are there."""
    if line.get("step_seconds"):
        return float(line["data_seconds"] / max(line["step_seconds"], line["data_seconds"]))
    seconds = line["tokens"] / line["step"] / line["tokens_per_second"]
    return float(line["data_seconds"] / (line["data_seconds"] + seconds))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the table shows it."""
    left = row["seconds_left"]
    return {
        "folder": row["folder"],
        "state": row["state"],
        "step": f"{row['step'] or 0} of {row['steps']}" if row["steps"] else None,
        "tokens/s": row["tokens_per_second"],
        "left": None if left is None else str(datetime.timedelta(seconds=round(left))),
        "checkpoint": row["checkpoint"],
        **{key: row[key] for key in LOSSES},
        "memory_gib": row["memory_gib"],
        "health": "!" if row["health"] else None,
    }
