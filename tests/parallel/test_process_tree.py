"""Processes whose parent is killed: a failure means that a rank outlives its run, or ends without saving."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minitron_mcore.errors import STOPPED_STATUS
from tests.helpers import tiny_run
from tests.helpers.launching import ROOT, fork

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "minitron_mcore.cli.torchrun", "--standalone"]
RANK = """
import os, sys, time
from pathlib import Path
from minitron_mcore.parallel import stop_signal
with stop_signal.at_stop_points():
    Path(sys.argv[1], f"started{os.environ['RANK']}").touch()
    while not stop_signal._received:
        time.sleep(0.05)
    Path(sys.argv[1], f"saved{os.environ['RANK']}").touch()
    time.sleep(600 if os.environ["RANK"] == "1" else 0)
"""
PARENT = """
import os, sys
from minitron_mcore.parallel import process_tree
sys.exit(process_tree.run_child(sys.argv[1:], os.environ))
"""


def descendants_gone(root: subprocess.Popen, ready, number: int, seconds: float) -> int:
    """Signal `root` when `ready()`. Fail unless it and all Python processes below it end within `seconds`; its status."""
    while not ready():
        assert root.poll() is None
        time.sleep(0.05)
    tree = psutil.Process(root.pid).children(recursive=True)
    root.send_signal(number)
    _, alive = psutil.wait_procs([process for process in tree if "python" in process.name()], seconds)
    names = [" ".join(process.cmdline()) for process in alive]
    for process in alive:
        process.kill()
    assert not names
    return root.wait(seconds)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, STOPPED_STATUS), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stage_ends_with_its_pipeline(tmp_path, number, status):
    """Rank 0 saves and ends; rank 1 reaches no stop point, so torchrun kills it after its time to shut down."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [
        sys.executable,
        "-c",
        PARENT,
        *TORCHRUN,
        "--nproc-per-node=2",
        "--shutdown-timeout=3",
        str(tmp_path / "rank.py"),
        str(tmp_path),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as parent:
        ready = lambda: len(list(tmp_path.glob("started*"))) == 2  # noqa: E731
        assert descendants_gone(parent, ready, number, 30) == status
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_a_rank_saves_and_ends_after_torchrun_is_killed(tmp_path):
    tiny_run.write(tmp_path)
    fork(tmp_path, "convert", *tiny_run.MODEL)
    sizes = dict(steps=100_000, global_batch=2, micro_batch=1, sequence_length=16, warmup_steps=0, save_every=100_000)
    command = [*TORCHRUN, str(ROOT / "launch/distill.py"), *tiny_run.STAGES, "student=runs/tiny/convert"]
    command += [f"distill.{key}={value}" for key, value in sizes.items()]
    env, metrics = os.environ | {"PYTHONPATH": str(ROOT)}, tmp_path / "runs/tiny/distill/metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        torchrun = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        descendants_gone(
            torchrun, lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, signal.SIGKILL, 30
        )
    told = (tmp_path / "log").read_text()
    assert f"its parent {torchrun.pid} has ended" in told and "stopped by a signal after step" in told, told
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert Path(metrics.parent, f"step_{steps[-1]:07d}").is_dir()
