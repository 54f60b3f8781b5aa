"""Runs that meet damage, a full disk or a kill: a failure means that steps are lost, or that a run silently starts anew."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from minitron_mcore.checkpoint import disk, run_folder, steps
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.stages import SearchRun
from minitron_mcore.depth.point_log import PointLog
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.search.results import CandidateStore
from minitron_mcore.search.space import Candidate
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers.cutting import ONE
from tests.helpers.full_disk import full_disk
from tests.helpers.training import CONFIG, distill, micro_batches
from tests.helpers.weights import tensors

STEPWISE = dataclasses.replace(CONFIG, save_every=1, keep_last=3)


@pytest.fixture(scope="module")
def pair(pair_of):
    return pair_of(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pair):
    """A run of four steps on two ranks, whose last three are on disk."""
    out_dir = tmp_path_factory.mktemp("trained") / "run"
    on_ranks(distill, 2, ONE, *pair, STEPWISE, ONE, out_dir)
    return out_dir


def numbers(out_dir):
    return [step.number for step in steps.published(out_dir)]


def distill_logging(student, teacher, config, parallel, out_dir):
    """Resume; what rank 0 logs of skipped steps, or is refused with, and the steps that were run."""
    logged, log = [], process_groups.log
    process_groups.log = lambda text: logged.append(text) or log(text)
    try:
        history = distill(student, teacher, config, parallel, out_dir, True)
    except UserError as error:
        return str(error), None
    return [text for text in logged if text.startswith("warning")], [figures["step"] for figures in history]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_steps_are_skipped_and_named(tmp_path, pair, trained):
    """Down to the last valid one: the run then ends as if nothing had happened. Without one it is refused, and nothing removed."""
    whole, out_dir = tensors(trained), shutil.copytree(trained, tmp_path / "run")
    rows = (out_dir / "metrics.jsonl").read_text()
    assert numbers(out_dir) == [4, 3, 2]
    assert all({"save_seconds", "saved_bytes"} <= json.loads(row).keys() for row in rows.splitlines())
    flip(max((out_dir / "step_0000004").glob("*.distcp"), key=lambda file: file.stat().st_size))
    (out_dir / "step_0000003" / steps.MANIFEST).unlink()
    (out_dir / "model.json").unlink()
    (skipped, run), (_, others) = on_ranks(distill_logging, 2, ONE, *pair, STEPWISE, ONE, out_dir)
    assert run == others == [3, 4]
    assert len(skipped) == 2 and "step_0000004" in skipped[0] and "is not what was written" in skipped[0]
    assert "step_0000003/integrity.json" in skipped[1] and "continuing from step_0000002" in skipped[1]
    found = tensors(out_dir)
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    losses = [[json.loads(row)["kd_loss"] for row in text.splitlines()] for text in (rows, _metrics(out_dir))]
    assert losses[0] == losses[1], "cut after step 2 and written again"

    for step in steps.published(out_dir):
        (step.path / ".metadata").unlink()
    (refused, none), other = on_ranks(distill_logging, 2, ONE, *pair, STEPWISE, ONE, out_dir)
    assert none is None and other == (refused, None) and "\n" not in refused
    assert all(f"step_000000{number}" in refused and "no .metadata" in refused for number in (2, 3, 4))
    assert numbers(out_dir) == [4, 3, 2] and _metrics(out_dir).count("\n") == 4


def _metrics(out_dir):
    return (out_dir / "metrics.jsonl").read_text()


def trainer_and_step(student):
    """A trainer without a teacher, and a function that takes a step."""
    config, dp = dataclasses.replace(CONFIG, kd_weight=0.0, lm_weight=1.0), process_groups.dp_group()
    trainer = Trainer(open_checkpoint(student), None, config, ONE, "fp32")
    batches = micro_batches(config, 0, dp.rank(), dp.size())
    return trainer, lambda: trainer.train_step([next(batches) for _ in range(config.global_batch // dp.size())])


def save_on_a_disk_that_forgets(student, out_dir):
    """Save step 1; step 2 while a byte of each file changes as it is closed. What is raised, and the steps that are left."""
    trainer, step = trainer_and_step(student)
    step()
    trainer.save(out_dir)
    step()
    close = disk.NewFile.close

    def forget(self):
        close(self)
        if "distcp" in str(self.name):
            flip(Path(self.name))

    disk.NewFile.close = forget
    try:
        trainer.save(out_dir)
    except UserError as error:
        return str(error), numbers(out_dir)


def test_what_is_not_on_disk_is_no_step(tmp_path, pair):
    [(message, left)] = on_ranks(save_on_a_disk_that_forgets, 1, ONE, pair[0], tmp_path / "run")
    assert "__0_0.distcp is not what was written" in message and left == [1]


def save_until_the_disk_is_full(student, out_dir, limit, backgrounds):
    """Save step 1; step 2 where rank 1 may write no file above `limit` bytes, or where the disk is full. What each save raises."""
    trainer, step = trainer_and_step(student)
    step()
    trainer.save(out_dir)
    step()
    hard, messages = resource.getrlimit(resource.RLIMIT_FSIZE)[1], []
    if process_groups.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    for background in backgrounds:
        trainer.saver.background = background
        try:
            trainer.save(out_dir)
            trainer.finish_save()
        except UserError as error:
            messages.append(str(error))
    before = numbers(out_dir)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if backgrounds == [False, True]:
        trainer.save(out_dir)
        trainer.finish_save()
    trainer.resume(out_dir)
    return messages, before, trainer.step


def test_a_save_that_cannot_be_written_leaves_the_previous_step(tmp_path, pair):
    """Rank 1 alone fails, at once and in the background; both ranks say so. Later saves work."""
    found = on_ranks(save_until_the_disk_is_full, 2, ONE, pair[0], tmp_path / "run", 5000, [False, True])
    assert found[0] == found[1]
    messages, before, resumed = found[0]
    assert len(messages) == 2 and all("File too large" in text and "rank 1" in text for text in messages)
    assert before == [1] and resumed == 2 and not list((tmp_path / "run").glob("*.part"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk(tmp_path, pair, trained):
    """It holds one step and a half."""
    out_dir, files = tmp_path / "small", (trained / "step_0000004").iterdir()
    out_dir.mkdir()
    size = 1.5 * sum(file.stat().st_size // 4096 + 1 for file in files)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={4 * size:.0f}k", "tmpfs", out_dir], check=False
    ).returncode:
        pytest.skip("mount is refused here")
    try:
        found = on_ranks(save_until_the_disk_is_full, 2, ONE, pair[0], out_dir, resource.RLIM_INFINITY, [False])
    finally:
        subprocess.run(["umount", out_dir], check=True)
    messages, before, resumed = found[0]
    assert "No space left on device" in messages[0] and found[1] == found[0] and before == [1] and resumed == 1


def write_on_rank_0_alone(source, folder) -> list[str]:
    """What rank 0 writes for all ranks, while its disk is full: a checkpoint's description, a study's point, a search's result."""
    opened = open_checkpoint(source)
    store = CandidateStore(SearchRun(out_dir=str(folder), source=str(source)), opened, None, "text")
    points = PointLog(folder, lambda dropped: {"dropped": list(dropped), "loss": 1.0}, 1, False, model="m")
    candidate, sentences = Candidate(opened.arch, ()), []
    store._digests[candidate] = "digest"
    (folder / "candidates").mkdir(exist_ok=True)
    for write in (
        lambda: run_folder.describe(folder, opened.arch, "fingerprint", {}, opened.hf),
        lambda: points([]),
        lambda: store.write(candidate, "measured.json", {"zero_shot_loss": 1.0}),
    ):
        try:
            with full_disk(30) if process_groups.rank() == 0 else contextlib.nullcontext():
                write()
        except UserError as error:
            sentences.append(str(error))
    return sentences


def test_rank_0s_full_disk_is_one_sentence_on_all_ranks(tmp_path, pair):
    first, second = on_ranks(write_on_rank_0_alone, 2, ONE, pair[0], tmp_path, timeout=60)
    assert first == second and len(first) == 3
    assert all(
        text.startswith(f"rank 0: {tmp_path}") and "cannot be written (File too large)" in text for text in first
    )


def killed_while(at, student, teacher, config, parallel, out_dir):
    """Rank 1 or 0 is killed while step 3 is written, renamed, or followed by the removal of older steps."""
    end = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    write, replace, remove = disk.NewFile.write, os.replace, shutil.rmtree
    if at == "write" and process_groups.rank() == 1:
        disk.NewFile.write = lambda self, data: end() if "step_0000003" in str(self.name) else write(self, data)
    if at == "rename":
        os.replace = lambda source, target: end() if "step_0000003.part" in str(source) else replace(source, target)
    if at == "removal":
        shutil.rmtree = lambda path, **options: end() if "removed" in str(path) else remove(path, **options)
    distill(student, teacher, config, parallel, out_dir)


@pytest.mark.default_cases("write")
@pytest.mark.parametrize("at", ["write", "rename", "removal"])
def test_a_killed_writer(tmp_path, pair, trained, at):
    left = [3, 2] if at == "removal" else [2, 1]
    out_dir, config = tmp_path / "run", dataclasses.replace(STEPWISE, keep_last=2)
    with pytest.raises(RankError):
        on_ranks(killed_while, 2, ONE, at, *pair, config, ONE, out_dir)
    assert numbers(out_dir) == left and all(not step.problem() for step in steps.published(out_dir))
    assert len(list(out_dir.glob("step_*"))) == 3, "what was being written or removed has another name"
    on_ranks(distill, 2, ONE, *pair, config, ONE, out_dir, True)
    assert numbers(out_dir) == [4, 3] and len(list(out_dir.glob("step_*"))) == 2
    whole, found = tensors(trained), tensors(out_dir)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_folders_of_older_versions_open(tmp_path, trained):
    """They have `latest`, and manifests without sizes. A reader never takes an older step by itself."""
    out_dir = shutil.copytree(trained, tmp_path / "run")
    for step in steps.published(out_dir):
        manifest = json.loads((step.path / steps.MANIFEST).read_text())
        manifest.pop("sizes")
        (step.path / steps.MANIFEST).write_text(json.dumps(manifest))
    (out_dir / "latest").write_text("step_0000003")
    assert open_checkpoint(out_dir).step == "step_0000004"
    whole, found = tensors(trained), tensors(out_dir)
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    (out_dir / "step_0000004/.metadata").unlink()
    with pytest.raises(UserError, match=r"step_0000004 is .*no .metadata in it.*move it away to use step_0000003"):
        open_checkpoint(out_dir)
