"""Signals at every long stage: a failure means that a stage goes on, loses what it had, or cannot be told from a failed one."""

import shutil
import signal
from pathlib import Path

import pytest

from minitron_mcore.errors import STOPPED_STATUS
from tests.helpers import tiny_run
from tests.helpers.launching import fork

COMMON = [
    *(*tiny_run.STAGES, "parallel=tp2", "importance.samples=8", "importance.micro_batch=2"),
    *("evaluate.max_windows=4", "evaluate.micro_batch=2", "depth.windows=2", "search.steps=3"),
    *tiny_run.training(steps=4, micro_batch=1, save_every=100),
]
STAGES = {
    # stage -> options; stop points at which rank 1 gets a signal, with what is then printed; printed by the run that ends
    "importance": (
        [],
        [(3, "after 2 of 4 micro-batches: the same command starts it again.")],
        "scores: runs/tiny/importance",
    ),
    "depth": ([], [(2, "after 1 of at most 6 points: the same command continues.")], "resuming after 1 points"),
    "teacher_cache": (
        ["kind=hidden", "file_samples=2"],
        [(3, "after 4 of 8 samples: the same command continues.")],
        "resuming after 3 complete files",
    ),
    "synthesize": (
        tiny_run.SYNTHESIZE,
        [(2, "after 2 of 6 answers: the same command continues.")],
        "answers of runs/tiny/convert",
    ),
    "search": (
        [],
        [
            (3, "in the evaluation of text.txt after 2 of 4 windows: the same command continues."),
            (4, "after 1 of 2 candidates are measured: the same command continues."),
            (12, "after step 2 of 3, which is saved: the same command continues."),
            (6, "in the evaluation of text.txt after 2 of 4 windows: the same command continues."),
        ],
        "resuming after step 3",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model's checkpoint."""
    root = tmp_path_factory.mktemp("made")
    tiny_run.write(root)
    fork(root, "convert", *COMMON, processes=2)
    return root


@pytest.mark.default_cases("importance", "teacher_cache")
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_on_one_rank_stops_all_and_the_same_command_goes_on(tmp_path, made, stage):
    folder = shutil.copytree(made, tmp_path / "copy")
    if stage == "search":
        fork(folder, "importance", *COMMON, processes=2)
    options, stops, end = STAGES[stage]
    for point, message in stops:
        stopped = fork(
            folder, stage, *COMMON, *options, processes=2, fails=STOPPED_STATUS, stop_at=(point, signal.SIGTERM)
        )
        assert f"stopped by a signal {message}" in stopped.splitlines() and "Traceback" not in stopped
        assert not (folder / f"runs/tiny/{stage}/.complete").exists()
    output = fork(folder, stage, *COMMON, *options, processes=2)
    assert end in output and (folder / f"runs/tiny/{stage}/.complete").exists(), output
