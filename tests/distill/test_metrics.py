"""Figures of training steps: a failure means that a field is missing, names the wrong rank, or that a logging program changes or
ends a run."""

import dataclasses
import importlib.util
import json
import time
from pathlib import Path

import pytest

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config import ranges
from minitron_mcore.config.settings import LogConfig, ParallelConfig
from minitron_mcore.config.stages import DistillRun
from minitron_mcore.distill.metrics import FIELDS, MetricsWriter
from minitron_mcore.testing import on_ranks
from tests.helpers import models, training
from tests.helpers.full_disk import full_disk

CONFIG = dataclasses.replace(training.CONFIG, lm_weight=1.0, kd_weight=0.0)
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "mlflow")}


def train_with_a_slow_rank(folder: Path, out_dir: Path, log: LogConfig, config) -> list[dict]:
    """Rank 1 computes 0.5 s longer in step 2, and waits 0.5 s for each of its batches of step 3, both ranks 0.3 s in step 4."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.loop import train
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    student, dp = open_checkpoint(folder), process_groups.dp_group()
    trainer = Trainer(student, None, config, ParallelConfig(), "fp32")
    if (out_dir / "model.json").is_file():
        trainer.resume(out_dir)
    run_folder.describe(out_dir, student.arch, "test", {}, student.hf)

    def batches():
        start = trainer.step * config.global_batch
        for batch in training.micro_batches(config, start, dp.rank(), dp.size()):
            time.sleep(0.5 if dp.rank() == 1 and trainer.step == 2 else 0.3 if trainer.step == 3 else 0)
            yield batch

    whole = trainer.chunks[0].zero_grad_buffer

    def slow():
        time.sleep(0.5 if dp.rank() == 1 and trainer.step == 1 else 0)
        whole()

    trainer.chunks[0].zero_grad_buffer = slow
    return train({out_dir: trainer}, models.placed(batches()), out_dir, log=log)[0]


def test_one_line_a_step_with_fixed_fields(tmp_path, monkeypatch):
    """And with every logging program that is installed, in its offline mode, over a stop and a resume."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    models.tiny_llama(tmp_path / "hf")
    on_ranks(models.import_hf, 1, ParallelConfig(), tmp_path / "hf", tmp_path / "base", ParallelConfig())
    log, out = LogConfig(**{name: "tests" for name, there in INSTALLED.items() if there}), tmp_path / "out"
    for stop in (3, None):
        config = dataclasses.replace(CONFIG, stop_after=stop)
        on_ranks(train_with_a_slow_rank, 2, ParallelConfig(), tmp_path / "base", out, log, config)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [list(FIELDS)] * CONFIG.steps
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, data in zip(lines[1:3], (False, True), strict=True):
        assert line["slowest_rank"] == 1 and line["slowest_rank_seconds"] > line["mean_rank_seconds"] + 0.2
        assert (line["data_seconds"] > 0.9) == data
    assert lines[3]["step_seconds"] > lines[3]["slowest_rank_seconds"] - 0.1 > 0.5, (
        "the wait for data is part of the step"
    )
    assert all(0.1 < line["memory_gib"] < 8 and line["kd_loss"] == 0 for line in lines)
    assert all(line[name] is None for line in lines for name in ("hidden_state_loss", "heldout_loss"))
    assert list((out / "tensorboard").iterdir())
    if INSTALLED["mlflow"]:
        (steps,) = [path.read_text().split("\n")[:-1] for path in out.glob("mlruns/*/*/metrics/lm_loss")]
        assert [int(step.split()[2]) for step in steps] == [1, 2, 3, 4]
        assert [float(step.split()[1]) for step in steps] == [line["lm_loss"] for line in lines]
    if INSTALLED["wandb"]:
        assert len(list(out.glob(f"wandb/offline-run-*-{(out / 'wandb.id').read_text()}"))) == 2


class Broken:
    def write(self, figures, step):
        raise ConnectionError("no server")


def test_a_program_that_fails_does_not_end_the_run(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, 0, LogConfig(tensorboard=False))
    writer.sinks["mlflow"] = Broken()
    for step in (1, 2):
        writer.write({"step": step, "lm_loss": 2.5})
    writer.close()
    assert capsys.readouterr().out.count("warning: log.mlflow ended (ConnectionError: no server)") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_a_full_disk_does_not_end_the_run_or_lose_lines(tmp_path, capsys):
    """The disk fills in the middle of a line, stays full for another one, and then has space again."""
    writer = MetricsWriter(tmp_path, 0, LogConfig(tensorboard=False))
    path = tmp_path / "metrics.jsonl"
    writer.write({"step": 1})
    with full_disk(path.stat().st_size + 20):
        for step in (2, 3):
            writer.write({"step": step})
    assert path.read_text().count("\n") == 1 and not path.read_text().endswith("\n")
    writer.write({"step": 4})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written now (File too large): training goes on") == 1


@pytest.mark.parametrize("name", INSTALLED)
def test_a_program_must_be_installed(name):
    run = DistillRun(out_dir="o", work_dir="w", student="s", teacher="t", log=LogConfig(**{name: "p"}))
    sentences = [] if INSTALLED[name] else [f"log.{name} is p, but {name} is not installed"]
    assert [text.partition(":")[0] for text in ranges.problems(run)] == sentences
