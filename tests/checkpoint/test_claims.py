"""One owner of a run folder: a failure means that two runs write one folder, or that a run's results are removed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from minitron_mcore.checkpoint import claim, disk, owner, stage_record
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers.full_disk import full_disk

ONE = ParallelConfig()
RUN = {"stage": "test", "seed": 1}


def write_claim(folder: Path, beat: float = 0.0, **changes) -> None:
    """A claim of another process, the only one, `beat` seconds old."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"{owner.PREFIX}*"):
        earlier.unlink()
    path = folder / f"{owner.PREFIX}.1"
    path.write_text(json.dumps(owner._this_process() | changes))
    os.utime(path, (time.time() - beat,) * 2)


def contend(folder: Path) -> list[bool]:
    """Whether this rank got each folder: new, or of a dead, an ended or a living owner."""
    won = []
    for path in sorted(folder.iterdir()):
        dist.barrier()
        try:
            mine = owner.Claim(path)
        except UserError:
            mine = None
        won.append(mine is not None)
        dist.barrier()
        if mine:
            mine.release()
    return won


def test_a_full_disk_is_one_sentence_in_a_stage_of_one_process(tmp_path):
    sentence = f"{tmp_path}/out cannot be written .File too large.: choose another out_dir, or make room"
    with pytest.raises(UserError, match=sentence), claim.new_run_folder(tmp_path / "out", RUN) as folder, full_disk(30):
        disk.replace_text(folder / "plan.json", "x" * 100)
    assert not list(tmp_path.iterdir())


def test_of_simultaneous_starts_one_wins(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number in range(30):
        kind, folder = ("new", "dead", "ended", "living")[number % 4], tmp_path / f"{number:02d}"
        folder.mkdir()
        if kind in ("dead", "living"):
            write_claim(folder, pid=gone.pid if kind == "dead" else os.getppid(), started=-1.0)
        if kind == "ended":
            owner.Claim(folder).release()
    for number, winners in enumerate(zip(*on_ranks(contend, 4, ONE, tmp_path), strict=True)):
        assert sum(winners) == (0 if number % 4 == 3 else 1), (number, winners)


def test_a_living_owner_is_named_and_a_dead_one_replaced(tmp_path):
    far = {"host": "node7", "pid": 4711}
    write_claim(tmp_path / "far", beat=30, **far)
    with pytest.raises(UserError, match=r"process 4711 on node7, last heartbeat 3\d s ago.* start again in (90|89) s"):
        owner.Claim(tmp_path / "far")
    write_claim(tmp_path / "far", beat=130, **far)
    owner.Claim(tmp_path / "far").release()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        here = {"pid": process.pid, "started": owner.psutil.Process(process.pid).create_time()}
        process.send_signal(signal.SIGSTOP)
        for beat in (0, 1000):  # a stopped process does not beat, and may go on
            write_claim(tmp_path / "here", beat=beat, **here)
            with pytest.raises(UserError, match=f"process {process.pid} on .* last heartbeat {beat} s ago"):
                owner.Claim(tmp_path / "here")
        write_claim(tmp_path / "here", beat=1000, **here | {"started": 1.0})  # an earlier process of this number
        owner.Claim(tmp_path / "here").release()
        write_claim(tmp_path / "here", **here)
        process.kill()
        while owner.psutil.Process(process.pid).status() != "zombie":
            time.sleep(0.01)
        mine = owner.Claim(tmp_path / "here")
        assert owner.owner(tmp_path / "here").pid == os.getpid()
        mine.release()
    finally:
        process.kill()
        process.wait()
    assert owner.owner(tmp_path / "here") is None and len(list((tmp_path / "here").iterdir())) == 1


def lose(folder: Path) -> None:
    owner.BEAT_SECONDS = 0.05
    owner.Claim(folder)
    path, beats = folder / f"{owner.PREFIX}.1", set()
    while len(beats) < 3:
        beats.add(path.stat().st_mtime_ns)
    path.rename(folder / f"{owner.PREFIX}.2")
    time.sleep(60)


def test_the_owner_beats_and_ends_when_it_lost_its_folder(tmp_path):
    with pytest.raises(RankError, match="died with exit code 2"):
        on_ranks(lose, 1, ONE, tmp_path / "run")


def test_a_crash_before_the_first_save_keeps_what_was_written(tmp_path):
    out_dir, files = tmp_path / "run", {"metrics.jsonl": "{}\n", "failure.json": "{}", "hf/config.json": "{}"}

    def run(settings: dict, fails: bool = False) -> None:
        with claim.claim_run_folder(out_dir, settings) as resumed:
            assert not resumed and yaml.safe_load((out_dir / "config.yaml").read_text()) == settings
            (out_dir / "hf").mkdir(exist_ok=True)
            for name, text in files.items() if fails else ():
                (out_dir / name).write_text(text)
            if fails:
                raise RuntimeError

    run(RUN)
    run(RUN | {"seed": 2})  # nothing was trained with the other seed
    with pytest.raises(RuntimeError):
        run(RUN, fails=True)
    assert all((out_dir / name).read_text() == text for name, text in files.items())
    with pytest.raises(UserError, match=r"holds another run \(seed was 1, is 2\): give the old values"):
        run(RUN | {"seed": 2})
    run(RUN)
    assert all((out_dir / name).is_file() for name in files)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").touch()
    for begin in (claim.claim_run_folder, claim.new_run_folder):
        with (
            pytest.raises(UserError, match="foreign is not empty and holds no run of ours"),
            begin(tmp_path / "foreign", RUN),
        ):
            pass


def make(out_dir: Path, ends: str = "") -> None:
    with claim.new_run_folder(out_dir, RUN) as folder:
        assert not out_dir.exists() and [path.name for path in folder.iterdir()].count("half") == 0
        (folder / "half").mkdir()
        (folder / "half/a").write_text("a")
        if ends:
            with pytest.raises(
                UserError, match=f"run.part belongs to a run that is still going: process {os.getpid()}"
            ):
                make(out_dir)
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "half").rename(folder / "whole")


def test_an_artefact_appears_whole_or_not_at_all(tmp_path):
    out_dir, part = tmp_path / "run", tmp_path / "run.part"
    with pytest.raises(RankError, match="died with exit code -9"):
        on_ranks(make, 1, ONE, out_dir, "killed")
    assert {path.name for path in part.iterdir()} == {
        "config.yaml",
        "inputs.json",
        "half",
        ".claim.1",
    } and not out_dir.exists()
    on_ranks(make, 1, ONE, out_dir)
    assert {path.name for path in out_dir.iterdir()} == {
        "config.yaml",
        "inputs.json",
        "whole",
        ".complete",
    } and not part.exists()
    for settings, kind in ((RUN, "a finished run"), (RUN | {"seed": 2}, r"another run \(seed was 1, is 2\)")):
        with (
            pytest.raises(UserError, match=f"out_dir .*run already holds {kind}: choose another"),
            claim.new_run_folder(out_dir, settings),
        ):
            pass
    assert (out_dir / "whole/a").read_text() == "a"
    costs = stage_record.costs(out_dir)
    assert 0 <= costs["seconds"] < 60 and costs["ranks"] == 1 and costs["device"]


def test_a_manifest_of_an_earlier_version(tmp_path):
    """It holds no costs, and hashes of files that change later; other files are compared."""
    for name in ("README.md", "other"):
        (tmp_path / name).write_text("new")
    seen = {"bytes": 3, "sha256": "0" * 64}
    record = {"format_version": 1, "files": {"README.md": seen | {"bytes": 9}, "other": seen}}
    (tmp_path / ".complete").write_text(json.dumps(record))
    (sentence,) = stage_record.damaged_outputs(tmp_path)
    assert "other has another content" in sentence
    assert stage_record.costs(tmp_path) == {"seconds": None, "ranks": None, "device": None}
    (tmp_path / ".complete").write_text("")
    assert stage_record.costs(tmp_path) == {"seconds": None, "ranks": None, "device": None}
