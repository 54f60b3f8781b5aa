"""The batch script on a simulated SLURM: a failure means that ranks do not find each other, or that a job is lost at its limit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import tiny_run
from tests.helpers.launching import ROOT, fork

BIN = ROOT / "tests/helpers/slurm/bin"
STEPS = 150


@pytest.mark.slow
def test_two_nodes_train_are_warned_requeued_and_go_on(tmp_path):
    tiny_run.write(tmp_path)
    model = [*tiny_run.NAMED, f"runs={tmp_path}/runs"]
    fork(tmp_path, "convert", *model, "model.hf=hf")
    (tmp_path / "slurm").mkdir()
    sizes = dict(steps=STEPS, global_batch=2, micro_batch=1, sequence_length=16, warmup_steps=0, save_every=1000)
    job = [*("sbatch", "--wait", "--nodes", "2", "--ntasks-per-node", "1", "--output", f"{tmp_path}/output")]
    job += [
        "launch/slurm/distill.sbatch",
        *model,
        f"data.train=[{tmp_path}/text.txt]",
        f"student={tmp_path}/runs/tiny/convert",
    ]
    job += [f"data.cache={tmp_path}/cache", *(f"distill.{key}={value}" for key, value in sizes.items())]
    path = f"{BIN}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {
        "PATH": path,
        "SIMULATED_SLURM": f"{tmp_path}/slurm",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}",
    }
    metrics, output = tmp_path / "runs/tiny/distill/metrics.jsonl", tmp_path / "output"
    with subprocess.Popen(job, cwd=ROOT, env=env) as sbatch:
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
            assert sbatch.poll() is None, output.read_text()
            time.sleep(0.05)
        (tmp_path / "slurm/100/near_limit").touch()
        status = sbatch.wait(120)
    told = output.read_text()
    assert status == 0 and "Traceback" not in told, told
    stopped = [line for line in told.splitlines() if line.startswith("stopped by a signal after step")]
    assert len(stopped) == 1 and stopped[0].endswith("the same command continues."), told
    step = int(stopped[0].split()[6])
    assert f"resuming after step {step} of" in told and 3 <= step < STEPS
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, STEPS + 1))
