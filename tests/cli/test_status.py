"""`minitron status`: a failure means that it says something else about a folder than its files do, or that it becomes slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minitron_mcore.checkpoint import owner, stage_record
from minitron_mcore.cli import status
from minitron_mcore.errors import UserError


def write(folder: Path, stage: str = "distill", lines: int = 0, **figures) -> Path:
    """A stage's folder; `lines` steps of 1000 tokens, 500 tokens/s, of 100."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"stage": stage, "distill": {"steps": 100}}))
    steps = [{"step": n, "tokens": 1000 * n, "kd_loss": 2.0, "lm_loss": 3.0 - n / 100} for n in range(1, lines + 1)]
    usual = {"tokens_per_second": 500.0, "data_seconds": 0.1, "slowest_rank": 3, "memory_gib": 1.5}
    usual |= {"slowest_rank_seconds": 1.1, "mean_rank_seconds": 1.0, "heldout_loss": None}
    text = "".join(json.dumps(usual | step | figures) + "\n" for step in steps)
    if lines:
        (folder / "metrics.jsonl").write_text(text + '{"step": ')  # being written
    return folder


def write_step(folder: Path, number: int, size: int = 5) -> None:
    (step := folder / f"step_{number:07d}").mkdir()
    (step / "data").write_text("x" * size)
    (step / "integrity.json").write_text(json.dumps({"files": {"data": "0" * 64}, "sizes": {"data": 5}}))


def claim_and_die(folder: Path) -> None:
    if (child := os.fork()) == 0:
        owner.Claim(folder)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.fixture
def root(tmp_path):
    """A work_dir in which one stage has finished, one runs, and others have ended in all ways."""
    root = tmp_path / "runs"
    stage_record.finish(write(root / "convert", "convert"))
    write(root / "plan", "plan")
    write(root / "distill", lines=40, slowest_rank_seconds=3.0, data_seconds=1.0, heldout_loss=2.5)
    write_step(root / "distill", 20)
    write_step(root / "distill", 30, size=3)
    (root / "distill/bad_batches").mkdir()
    for rank in (0, 1):
        (root / f"distill/bad_batches/step_0000007_rank_{rank}.safetensors").touch()
    failed = write(root / "students/a", lines=3)
    (failed / "failure.json").write_text(json.dumps({"kind": "hung", "message": "rank 2 does not answer"}))
    claim_and_die(write(root / "students/b", lines=1))
    (root / "broken").mkdir()
    (root / "broken/config.yaml").write_text("stage: [")
    (root / "foreign").mkdir()
    (root / "foreign/config.yaml").write_text("a: 1")
    return root


def test_states_figures_and_health(root, capsys):
    claim = owner.Claim(root / "distill")
    rows = {row["folder"].removeprefix(f"{root}/"): row for row in status.status(root)}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        **{"convert": "finished", "plan": "stopped", "distill": "running", "broken": "damaged"},
        **{"students/a": "failed", "students/b": "killed"},
    }
    distill = rows["distill"]
    expected = {"step": 40, "steps": 100, "tokens_per_second": 500.0, "seconds_left": 120.0, "lm_loss": 2.6}
    expected |= {"checkpoint": "step_0000020", "heldout_loss": 2.5, "memory_gib": 1.5}
    assert expected.items() <= distill.items()
    sentences = [
        "1 steps were not finite, the last step_0000007",
        "data has 3 bytes, 5 were written",
        "rank 3 is slow: 3 s",
    ]
    sentences.append("waits for data 33% of the time")
    assert len(distill["health"]) == 4
    assert all(part in text for part, text in zip(sentences, distill["health"], strict=True)), distill["health"]
    assert rows["students/a"]["health"] == ["rank 2 does not answer"] and rows["students/a"]["seconds_left"] is None
    assert "ended" in rows["students/b"]["health"][0] and "config.yaml" in rows["broken"]["health"][0]
    os.utime(claim.path, (1000, 1000))
    assert any("has not beaten for" in text for text in status.status(root / "distill")[0]["health"])
    status.main([str(root)])
    output = capsys.readouterr().out
    assert "40 of 100" in output and "0:02:00" in output and "students/a: rank 2 does not answer" in output
    claim.release()
    assert status.status(root / "distill")[0]["state"] == "stopped"
    with pytest.raises(UserError, match="no stage has written to"):
        status.status(root / "foreign")


def test_needs_no_torch_and_a_reader_may_end(root):
    code = "import sys; from minitron_mcore.cli import console; console.main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "status", str(root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {row["stage"] for row in json.loads(done.stdout)} == {"convert", "plan", "distill", None}
    ended = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ended.stdout.close()
    assert ended.communicate()[1] == b"" and ended.returncode == 0
