"""The GPU campaign on a CPU. A failure means that minutes on a card would be lost to a typo or a block that hangs."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))

import pack  # noqa: E402
import run  # noqa: E402


def campaign(out: Path, *words: str) -> tuple[int, list[dict], str]:
    """Exit status, the results' lines, what was printed."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "verify", "--cpu", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    return done.returncode, [json.loads(line) for line in (out / "verify.jsonl").read_text().splitlines()], done.stdout


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_every_block_runs_at_toy_size(tmp_path):
    failed, lines, printed = campaign(tmp_path)
    assert failed == 0, (tmp_path / "logs.txt").read_text()[-5000:]
    environment, *rest = lines
    assert environment["environment"]["card"] == "none" and environment["environment"]["torch"]
    verdicts = {line["block"]: line["verdict"] for line in rest if "block" in line}
    assert verdicts == {block.name: verdicts[block.name] for block in run.CAMPAIGNS["verify"]}
    assert {name for name, verdict in verdicts.items() if verdict == "passed"} == {
        "tests",
        "kd_loss",
        "attention",
        "step",
    }
    assert {line["benchmark"] for line in rest if "metric" in line} == {"kd_loss", "attention", "distill_step"}
    assert "step" in printed.splitlines()[-2] and (tmp_path / "verify.txt").is_file()


def test_a_block_that_fails_or_hangs_ends_alone(tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    failing = tmp_path / "failing.py"
    failing.write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[1]).write_text('{\"metric\": 1}\\n')\nsys.exit('a reason')"
    )
    monkeypatch.setattr(run, "CAMPAIGN", tmp_path / "none")
    blocks = [
        run.Block("slow", str(slow), 2),
        run.Block("failing", f"{failing} {{json}}", 20),
        run.Block("engine", "-c pass", 20, engine=True),
    ]
    monkeypatch.setitem(run.CAMPAIGNS, "verify", blocks)
    monkeypatch.setattr(run.Results, "table", lambda self: "table")
    monkeypatch.setattr(sys, "argv", ["run.py", "verify", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    lines = [json.loads(line) for line in (tmp_path / "out/verify.jsonl").read_text().splitlines()][1:]
    verdicts = [line["verdict"] for line in lines if "verdict" in line]
    assert verdicts == ["stopped after 2 s", "failed with status 1", "skipped: Transformer Engine was not packed"]
    assert {"metric": 1} in lines
    assert "begun" in (tmp_path / "out/logs.txt").read_text() and "a reason" in (tmp_path / "out/logs.txt").read_text()


def test_parts_carry_whole_archives(tmp_path, monkeypatch):
    """Pieces of awkward sizes, unpacked part by part; an archive is unpacked when its last piece is there."""
    monkeypatch.setattr(pack, "PIECE", 700)
    monkeypatch.setattr(run, "CAMPAIGN", tmp_path / "campaign")
    archives, content = {}, {}
    for name, size in (("verify", 1000), ("recovery", 1500)):
        folder = tmp_path / name
        folder.mkdir()
        content[name] = random.Random(size).randbytes(size)
        (folder / f"{name}.bin").write_bytes(content[name])
        archives[name] = pack._archive(folder)
    parts = pack.split(archives, tmp_path)
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 700 for part in parts) and len(parts) > 2
    for part, ended in parts.items():
        run.unpack(part)
        for name in ended:
            assert (tmp_path / "campaign" / f"{name}.bin").read_bytes() == content[name]
    assert sum(parts.values(), []) == ["verify", "recovery"]
    assert not list((tmp_path / "campaign").glob("*.tar.xz"))
