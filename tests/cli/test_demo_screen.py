"""The demo's commands and its last screen: a failure means that `make demo` breaks after minutes, or ends without its results."""

import json
import runpy
from pathlib import Path

import pytest

from minitron_mcore.cli import compose
from tests.helpers.launching import conf


@pytest.fixture
def demo(tmp_path, monkeypatch) -> dict:
    """The names in launch/demo.py."""
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(compose.LAUNCH / "demo.py"))


def test_every_command_composes_and_reads_what_was_written(demo):
    steps = demo["commands"](Path("runs/demo/teacher_hf"), Path("train.jsonl"), Path("heldout.jsonl"))
    assert len(steps) == 13 and [stage for stage, *_ in steps][-3:] == ["generate"] * 3
    written = {"runs/demo/teacher_hf"}
    with conf():
        for stage, overrides, processes in steps:
            config = compose.compose(stage, overrides)
            inputs = {getattr(config, name, None) for name in ("source", "scores", "plan", "student", "teacher")} - {
                None
            }
            assert inputs <= written and processes in (1, config.parallel.tensor)
            written.add(getattr(config, "out_dir", None))
    assert {str(path) for pair in demo["MODELS"].values() for path in pair} <= written


def test_the_last_screen(demo, capsys):
    root = demo["ROOT"]
    (root / "distill").mkdir(parents=True)
    steps = [{"tokens": 1024 * n, "tokens_per_second": 100.0 + n} for n in (1, 2, 3)]
    (root / "distill/metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    for loss, (folder, _) in zip((2.0, 4.0, 2.5), demo["MODELS"].values(), strict=True):
        (root / f"evaluate_{folder.name}").mkdir()
        figures = {"loss": loss, "perplexity": 1.0, "bits_per_byte": 1.0}
        file = root / f"evaluate_{folder.name}/evaluation.json"
        file.write_text(json.dumps({"parameters": 7, "files": [figures]}))
        demo["text_file"](folder).write_text(f"The import statement\nfrom {folder.name}")
    demo["show"](demo["evaluations"](), 3.0)
    output = capsys.readouterr().out
    assert "recovered 75% of the loss that pruning added" in output and "3,072 tokens at 102 tokens/s" in output
    ends = ["teacher: The import statement from teacher_hf", "just pruned: The import statement from pruned_hf"]
    ends.append("distilled: The import statement from hf")
    assert [line.strip() for line in output.splitlines() if line.strip()][-3:] == ends
    assert json.loads((root / "demo.json").read_text())["continuations"]["distilled"].endswith("from hf")
