"""Hydra's --multirun: each job is a stage in processes of its own, so that one that fails does not stop the others.

multirun/HOST-PID/          hydra.sweep.dir, if it is not given
  multirun.yaml             Hydra's config of the sweep
  jobs/N.json               overrides, exit status and seconds of job N; no status while it runs
  .submitit/                logs of jobs that submitit starts
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from minitron_mcore.checkpoint import disk
from minitron_mcore.cli import stage_process
from minitron_mcore.cli.compose import search_path
from minitron_mcore.errors import STOPPED_STATUS, Stopped, UserError
from minitron_mcore.parallel.rendezvous import is_rank_zero
from minitron_mcore.reading import read_json
from minitron_mcore.reporting import tables

PROCESSES = "MINITRON_NPROC"
"""Environment variable with the number of processes of each job (`minitron STAGE --nproc N --multirun`)."""
_DIR = "hydra.sweep.dir="


def is_requested(arguments: list[str]) -> bool:
    """Whether a command line asks for a sweep."""
    return bool({"--multirun", "-m"} & {*arguments})


def is_job() -> bool:
    """Whether this process composes a job of a sweep, which `run_job` runs."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def run(main: Callable[[], None]) -> None:
    """Run a sweep by Hydra's `main`, whose jobs call `run_job`; print a table of them.

    Raises:
        UserError: a job failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a sweep starts its jobs' processes itself: give minitron STAGE --nproc N --multirun.")
    given = [argument.removeprefix(_DIR) for argument in sys.argv if argument.startswith(_DIR)]
    folder = Path(given[-1] if given else f"multirun/{platform.node()}-{os.getpid()}")
    sys.argv += [] if given else [f"{_DIR}{folder}"]
    try:
        main()
    finally:
        rows = _rows(folder)
        if rows:
            tables.table("jobs of the sweep", rows, [f"records: {folder}/jobs"])
    failed = [row for row in rows if row["status"] != "finished"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} jobs did not finish; their messages stand above or in their logs."
        )


def run_job(stage: str) -> None:
    """Run the job that Hydra has composed, and record how it ended. A failure raises no exception, so the other jobs run.

    Raises:
        Stopped: a signal stopped the job.
    """
    job = HydraConfig.get()
    path = Path(job.sweep.dir) / "jobs" / f"{job.job.num}.json"
    overrides = [*search_path(), *job.overrides.task]
    record, start = {"job": int(job.job.num), "overrides": overrides}, time.monotonic()
    if is_rank_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.replace_text(path, json.dumps(record))
        print(f"\njob {record['job']}\n$ {stage_process.shown(stage, overrides, _processes())}", flush=True)
    status = stage_process.run(stage, overrides, _processes())
    if is_rank_zero():
        record |= {"status": status, "seconds": time.monotonic() - start}
        disk.replace_text(path, json.dumps(record))
    if status == STOPPED_STATUS:
        raise Stopped("the sweep stopped; the same command continues.")


def _processes() -> int:
    return int(os.environ.get(PROCESSES, 1))


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Rows for a table: the overrides in which jobs differ, and how each ended."""
    paths = sorted((folder / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    records = [read_json(path, "remove it") for path in paths]
    shared = set.intersection(*({*record["overrides"]} for record in records)) if records else set()
    rows = []
    for record in records:
        row = {"job": record["job"]}
        for override in record["overrides"]:
            if override not in shared or len(records) == 1:
                key, _, value = override.partition("=")
                row[key.lstrip("+")] = value
        rows.append(row | {"status": _status(record.get("status")), "seconds": record.get("seconds")})
    return rows


def _status(status: int | None) -> str:
    known = {None: "still runs, or was killed", 0: "finished", STOPPED_STATUS: "stopped"}
    return known.get(status, f"failed ({status})")
