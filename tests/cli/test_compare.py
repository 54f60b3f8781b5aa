"""`minitron compare`: a failure means that runs are not found, or that a difference or a result is missing or wrong."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from minitron_mcore.cli import compare
from minitron_mcore.errors import UserError
from minitron_mcore.reporting import page
from tests.helpers import models


def write(folder: Path, rate: float, teacher: str, steps: int, **sizes) -> None:
    """A distillation's folder, with an evaluation of it."""
    folder.mkdir(parents=True)
    config = {"stage": "distill", "seed": 1, "out_dir": str(folder), "distill": {"peak_lr": rate, "steps": 4}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = {"path": "runs/teacher", "fingerprint": teacher}
    (folder / "inputs.json").write_text(json.dumps({"format_version": 1, "inputs": {"teacher": record}}))
    lines = [
        {"step": n, "tokens": 8 * n, "kd_loss": rate / n, "lm_loss": 3.0, "heldout_loss": 2.5 if n == 2 else None}
        | {"lr": 1e-4, "tokens_per_second": 10.0 * n}
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    architecture = models.ARCH.to_json() | sizes
    lineage = {"parents": {}, "command": "", "versions": {}}
    model = {"format_version": 1, "fingerprint": str(folder), "architecture": architecture, "lineage": lineage}
    (folder / "model.json").write_text(json.dumps(model))
    (folder.parent / "evaluate").mkdir()
    files = [{"file": "/data/held.txt", "loss": 10 * rate}]
    evaluation = {"source": str(folder), "parameters": 1, "files": files}
    (folder.parent / "evaluate/evaluation.json").write_text(json.dumps(evaluation))


def test_a_table_a_plot_a_page_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("sweep/a/distill"), 0.1, "t1", 4)
    write(Path("sweep/b/distill"), 0.2, "t2", 3, ffn=32)
    Path("sweep/a/correct").mkdir()
    Path("sweep/a/correct/metrics.jsonl").write_text("")
    compare.main(["sweep", "--out", "sweep/compare"])
    assert "runs side by side" in capsys.readouterr().out
    rows = json.loads(Path("sweep/compare/compare.json").read_text())["runs"]
    assert [row["run"] for row in rows] == ["a", "b"]
    given = {"distill.peak_lr": 0.2, "teacher": "t2", "ffn": 32}
    reached = {
        "step": 3,
        "tokens": 24,
        "kd_loss": 0.2 / 3,
        "lm_loss": 3.0,
        "heldout_loss": 2.5,
        "tokens_per_second": 20.0,
    }
    assert (given | reached | {"loss on held.txt": 2.0}).items() <= rows[1].items()
    assert rows[0]["parameters"] != rows[1]["parameters"]
    assert not {"seed", "out_dir", "distill.steps", "hidden"} & rows[0].keys()
    with open("sweep/compare/compare.csv", newline="") as file:
        assert [row["distill.peak_lr"] for row in csv.DictReader(file)] == ["0.1", "0.2"]
    assert Path("sweep/compare/losses.png").stat().st_size > 10_000
    html = Path("sweep/compare/report.html").read_text()
    assert "Comparison" in html and "distill.peak lr" in html and html.count('src="data:image/png;base64,') == 1
    titles = [section.title for section in page.collect("sweep")]
    assert titles == ["Comparison"], "a work_dir's page has the section too"
    compare.main(["sweep/a", "sweep/b"])
    assert Path("compare/compare.json").read_text() == Path("sweep/compare/compare.json").read_text()


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a/distill"), 0.1, "t", 1)
    for folders, sentence in (
        (["a"], "a holds one training run, a/distill: give at least two"),
        (["a", "none"], "none holds no training run"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare.main(folders)
    assert not Path("compare").exists()
