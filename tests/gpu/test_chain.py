"""The whole way on a CUDA device through the launch files, against the same on the CPU.

A failure means that a stage breaks on GPUs, or that their students are worth something else.
"""

import inspect
import json
import math
import os
import runpy
from pathlib import Path
from unittest import mock

import pytest

from minitron_mcore.parallel import process_groups
from tests.gpu.world import ROOT, on_cpu, shared
from tests.helpers import tiny_run
from tests.helpers.launching import config_of, words
from tests.helpers.text_files import write_jsonl

pytestmark = pytest.mark.gpu

COMMAND = [
    *(*tiny_run.STAGES, "data.train=[text.jsonl]", "data.heldout=[text.jsonl]", "importance.samples=8"),
    *("prune.hidden=24", "prune.ffn=18", "prune.blocks=4"),
    *tiny_run.training(steps=6, global_batch=4, warmup_steps=1, log_every=1),
]


def stage(name: str, *overrides: str) -> None:
    """A launch file's own function, in this process and the world that it has."""
    with shared(), mock.patch.object(process_groups, "distributed_context", shared):
        inspect.unwrap(runpy.run_path(str(ROOT / "launch" / f"{name}.py"))["main"])(
            config_of(name, *COMMAND, *overrides)
        )


def chain(folder: Path) -> dict:
    """Every stage in `folder`; metrics of the steps, kept indices, losses of the exported folder and of the checkpoint."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("convert", "importance", "plan", "prune"):
            stage(name)
        stage("distill", "distill.stop_after=3")
        stage("distill")
        stage("export")
        stage("evaluate")
        stage("evaluate", "source=runs/tiny/distill", "out_dir=runs/tiny/evaluate_checkpoint")
    finally:
        os.chdir(before)
    run = folder / "runs/tiny"
    return {
        "steps": [json.loads(line) for line in (run / "distill/metrics.jsonl").read_text().splitlines()],
        "plan": json.loads((run / "plan/plan.json").read_text()),
        "losses": [
            json.loads((run / name / "evaluation.json").read_text())["files"][0]["loss"]
            for name in ("evaluate", "evaluate_checkpoint")
        ],
    }


def test_whole_way_ends_as_on_the_cpu(tmp_path):
    """Convert, importance, plan, prune, distill with a stop and a resume, export, evaluate."""
    for name in ("device", "cpu"):
        tiny_run.write(tmp_path / name)
        write_jsonl(tmp_path / name / "text.jsonl", [words(40, seed) for seed in range(60)])
    (theirs,) = on_cpu(tmp_path / "reference", (chain, tmp_path / "cpu"))
    ours = chain(tmp_path / "device")
    assert [row["step"] for row in ours["steps"]] == list(range(1, 7))
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert all(math.isclose(a[key], b[key], rel_tol=1e-4) for key in ("kd_loss", "lm_loss", "grad_norm")), (a, b)
    kept = [key for key in ours["plan"] if key in ("hidden", "ffn", "heads", "blocks")]
    assert kept and all(ours["plan"][key] == theirs["plan"][key] for key in kept)
    for a, b in zip(ours["losses"], theirs["losses"], strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)
    assert math.isclose(*ours["losses"], rel_tol=1e-5)
