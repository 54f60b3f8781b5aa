"""Saving a training run: a failure means that a checkpoint depends on its layout, or that writing one costs memory or the run."""

import contextlib
import dataclasses
import json
import math
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from minitron_mcore.checkpoint import disk, run_folder, steps
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.performance import HangConfig, PerformanceConfig
from minitron_mcore.config.settings import Device, Dtype, HiddenStateLossConfig, ParallelConfig
from minitron_mcore.distill import optimizer_state
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.errors import HUNG_STATUS, UserError
from minitron_mcore.estimate import checkpoints, memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.parallel import process_groups
from minitron_mcore.testing import RankError, on_ranks, random_checkpoint
from tests.helpers import families, models
from tests.helpers.cutting import ONE
from tests.helpers.memory import peak_growth
from tests.helpers.training import CONFIG, distill, micro_batches
from tests.helpers.weights import tensors

TWO = ParallelConfig(tensor=2)


@pytest.fixture(scope="module")
def pair(pair_of):
    """Embeddings are tied and have 101 rows, which two ranks pad."""
    return pair_of(True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    at = tmp_path_factory.mktemp("experts")
    families.tiny("qwen3_moe", at / "hf")
    on_ranks(models.import_hf, 1, ONE, at / "hf", at / "model", ONE)
    return at / "model"


def relay(student, teacher, config, parallel, dtype, source, out_dir):
    """Resume from `source`, or take a step where there is none; save."""
    torch.manual_seed(0)
    # Several buckets with padding between them, as on CUDA.
    buckets = PerformanceConfig(overlap_grad_reduce=True, bucket_size=1000)
    models = open_checkpoint(student), teacher and open_checkpoint(teacher)
    trainer = Trainer(*models, config, parallel, dtype, performance=buckets)
    run_folder.describe(out_dir, trainer.arch, "test", {}, open_checkpoint(student).hf)
    if source:
        trainer.resume(source)
    else:
        dp = process_groups.dp_group()
        batches = micro_batches(config, 0, dp.rank(), dp.size())
        trainer.train_step([next(batches) for _ in range(config.global_batch // dp.size())])
    assert disk.PIECE_ELEMENTS > 500
    disk.PIECE_ELEMENTS, disk.FILE_ELEMENTS = 500, 2000
    trainer.save(out_dir)


CASES = {
    "dense": ("bf16", [(2, ONE), (4, ParallelConfig(tensor=2)), (4, ParallelConfig(pipeline=2)), (1, ONE)]),
    "states": (
        "fp32",
        [(4, ParallelConfig(tensor=2)), (2, ParallelConfig(pipeline=2)), (2, ParallelConfig(context=2))],
    ),
    "experts": (
        "fp32",
        [(4, ParallelConfig(expert=2)), (2, ParallelConfig(tensor=2, sequence=True, expert=2)), (2, ONE)],
    ),
}


@pytest.mark.default_cases("states")
@pytest.mark.parametrize("case", CASES)
def test_every_layout_reads_and_writes_the_same_state(tmp_path, request, case):
    dtype, layouts = CASES[case]
    student, teacher = (
        (request.getfixturevalue("experts"), None) if case == "experts" else request.getfixturevalue("pair")
    )
    config = dataclasses.replace(
        CONFIG, hidden_state_loss=HiddenStateLossConfig(weight=1.0 if case == "states" else 0.0)
    )
    if case != "states":
        teacher, config = None, dataclasses.replace(config, kd_weight=0.0, lm_weight=1.0)
    source, expected = None, None
    for n, (world, parallel) in enumerate(layouts):
        on_ranks(relay, world, parallel, student, teacher, config, parallel, dtype, source, tmp_path / f"{n}")
        source, found = tmp_path / f"{n}", tensors(tmp_path / f"{n}")
        expected = expected or found
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), n
    moments = {key: t for key, t in expected.items() if key.startswith("optimizer.exp_avg.")}
    assert all(tensor.any() for tensor in moments.values())
    assert ("optimizer.exp_avg.states.projection" in moments) == (case == "states")
    names = {key.removeprefix("optimizer.exp_avg.") for key in moments}
    copies = {key for key in expected if key.startswith("optimizer.param.")}
    assert names <= expected.keys() and len(copies) == (len(names) if dtype == "bf16" else 0)


@pytest.mark.parametrize("shape", [(7,), (5, 6)])
def test_boxes_are_the_range(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel()):
        for end in range(start + 1, whole.numel() + 1):
            found = list(optimizer_state.flat_slices(shape, start, end))
            parts = [whole[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].flatten() for box in found]
            assert torch.cat(parts).equal(torch.arange(start, end)) and len(found) <= 3


def save_large(source, out_dir, parallel, background):
    """Bytes that a save adds to this rank's memory; of weights, gradients and optimizer that it holds; that it wrote."""
    config = dataclasses.replace(CONFIG, kd_weight=0.0, lm_weight=1.0, async_save=background)
    opened = open_checkpoint(source)
    trainer = Trainer(opened, None, config, parallel, "bf16")
    dp = process_groups.dp_group()
    trainer.train_step([next(micro_batches(config, 0, dp.rank(), dp.size())) for _ in range(4 // dp.size())])
    disk.PIECE_ELEMENTS, disk.FILE_ELEMENTS = 1 << 17, 1 << 19
    state = [optimizer_state.local_ranges(part) for part in trainer.optimizer.chained_optimizers]
    held = sum(t.nbytes for part in state for owned in part for t in owned.state().values())
    held += sum(parameter.nbytes + parameter.main_grad.nbytes for parameter in trainer.model.parameters())
    growth = peak_growth(lambda: (trainer.save(out_dir), trainer.finish_save()))
    files = (out_dir / f"step_{trainer.step:07d}").glob(f"__{process_groups.rank()}_*.distcp")
    return growth, held, sum(file.stat().st_size for file in files)


def make_large(folder):
    from minitron_mcore.models.architecture import Architecture

    arch = Architecture("llama", 2, 480, 480, 6, 6, 80, 40001, 256, 1e-5, 1e4, None, tied=True)
    random_checkpoint(arch, folder, "bf16")


@pytest.mark.default_cases("2-True")
@pytest.mark.parametrize(("world", "background"), [(2, False), (4, False), (2, True)])
def test_a_save_needs_little_memory_and_all_ranks_write(tmp_path, world, background):
    """In the background a quarter of what the rank holds, although it writes more."""
    (tmp_path / "source").mkdir()
    on_ranks(make_large, 1, ONE, tmp_path / "source")
    found = on_ranks(save_large, world, ONE, tmp_path / "source", tmp_path / "run", ONE, background)
    for growth, held, written in found:
        assert held > 300e6 / world and written > held / 3
        assert growth < held / 4 if background else held / 10, (growth, held, written)
        assert written == pytest.approx(sum(w for *_, w in found) / world, rel=0.05)


def saving_as_planned(source, out_dir):
    """Bytes that a save with the default sizes adds to this process's memory: at once, and in the background."""
    config = dataclasses.replace(CONFIG, kd_weight=0.0, lm_weight=1.0)
    trainer = Trainer(open_checkpoint(source), None, config, ONE, "bf16")
    trainer.train_step([next(micro_batches(config, 0, 0, 1)) for _ in range(4)])
    growths = [peak_growth(lambda: trainer.save(out_dir))]
    trainer.saver.background = True
    trainer.step += 1
    return [*growths, peak_growth(lambda: (trainer.save(out_dir), trainer.finish_save()))]


def test_the_dry_run_tells_what_a_save_costs(tmp_path):
    """On the CPU, where three threads each write a file of 32 M elements from the tensors themselves: no memory."""
    (tmp_path / "source").mkdir()
    on_ranks(make_large, 1, ONE, tmp_path / "source")
    [(growth, in_background)] = on_ranks(saving_as_planned, 1, ONE, tmp_path / "source", tmp_path / "run")
    assert len(list((tmp_path / "run").glob("step_*/*.distcp"))) >= disk.THREADS
    arch = open_checkpoint(tmp_path / "source").arch
    setting = Setting(ONE, 1, Dtype.bf16, 1, CONFIG.sequence_length, Device.cpu)
    assert memory.save(arch, setting, 0) == 0 and growth < 16e6, growth
    assert in_background < memory.save(arch, setting, 0, background=True) + 16e6, in_background
    told = checkpoints.estimate([arch], dataclasses.replace(CONFIG, steps=500, keep_every=200), Dtype.bf16, disk_gbs=2)
    size = sum(file.stat().st_size for file in (tmp_path / "run/step_0000002").iterdir())
    assert told["bytes"] == pytest.approx(size, rel=0.01) and told["seconds"] == told["bytes"] / 2e9
    assert (told["kept"], told["disk"]) == (4, 5 * told["bytes"])
    on_gpu = dataclasses.replace(setting, device=Device.cuda)
    assert memory.save(arch, on_gpu, 0) == disk.THREADS * 4 * disk.PIECE_ELEMENTS


def distill_and_resume_counting(student, teacher, config, parallel, out_dir):
    """Files that this rank hashes from the disk while it saves, and while it loads."""
    hashed, sha256 = [], disk.sha256
    disk.sha256 = lambda path, **options: hashed.append(path.name) or sha256(path, **options)
    trainer = Trainer(open_checkpoint(student), open_checkpoint(teacher), config, parallel, "fp32")
    run_folder.describe(out_dir, trainer.arch, "test", {}, open_checkpoint(student).hf)
    hashed.clear()
    dp = process_groups.dp_group()
    batches = micro_batches(config, 0, dp.rank(), dp.size())
    trainer.train_step([next(batches) for _ in range(config.global_batch // dp.size())])
    trainer.save(out_dir)
    saving = hashed.copy()
    hashed.clear()
    trainer.resume(out_dir)
    return saving, hashed


def test_ranks_share_the_hashing(tmp_path, pair):
    found = on_ranks(
        distill_and_resume_counting, 3, ONE, *pair, dataclasses.replace(CONFIG, global_batch=3), ONE, tmp_path
    )
    manifest = json.loads((open_checkpoint(tmp_path).step_dir / "integrity.json").read_text())["files"]
    saving, loading = ([name for each in part for name in each] for part in zip(*found, strict=True))
    assert sorted(saving) == sorted(manifest), "what others wrote is not hashed; own files are read back"
    assert all(name.startswith(f"__{rank}_") for rank, (own, _) in enumerate(found) for name in own if "distcp" in name)
    assert sorted(loading) == sorted(manifest) and all(found[rank][1] for rank in range(3))
    assert sum(name.endswith(".distcp") for name in manifest) >= 3


def distill_with_a_slow_disk(seconds, student, teacher, config, parallel, out_dir):
    """Rank 1 takes some seconds to write."""
    write = disk.NewFile.write

    def slow(self, data):
        if process_groups.rank() == 1 and self.tell() == 0 and "distcp" in str(self.name):  # not failure.json
            time.sleep(seconds)
        return write(self, data)

    disk.NewFile.write = slow
    disk.FILE_ELEMENTS = 1 << 30  # one file
    return distill(student, teacher, config, parallel, out_dir)


@pytest.mark.parametrize("save_minutes", [1.0, 0.02])
def test_a_slow_save_is_no_hang_up_to_its_own_limit(tmp_path, pair, save_minutes):
    config, hang = dataclasses.replace(CONFIG, stop_after=1), HangConfig(step_minutes=0.04, save_minutes=save_minutes)
    refused = pytest.raises(RankError, match=f"died with exit code {HUNG_STATUS}")
    with contextlib.nullcontext() if save_minutes == 1 else refused:
        seconds = 6 if save_minutes == 1 else 60
        on_ranks(distill_with_a_slow_disk, 2, ONE, seconds, *pair, config, ONE, tmp_path / "run", timeout=90, hang=hang)
    assert bool(steps.published(tmp_path / "run")) == (save_minutes == 1)
    if save_minutes < 1:
        told = json.loads((tmp_path / "run/failure.json").read_text())
        assert told["kind"] == "hung" and told["ranks"] == [1], told


def save_in_the_background(student, teacher, config, parallel, out_dirs):
    """Save step 1 as it is; again in the background beside step 2, on a slow disk; then let rank 1's disk fail in a third save."""
    trainer = Trainer(open_checkpoint(student), open_checkpoint(teacher), config, parallel, "fp32")
    for out_dir in out_dirs:
        run_folder.describe(out_dir, trainer.arch, "test", {}, open_checkpoint(student).hf)
    batches = micro_batches(config, 0, process_groups.dp_group().rank(), 2)
    step = lambda: trainer.train_step([next(batches), next(batches)])  # noqa: E731
    step()
    trainer.save(out_dirs[0])
    slow, write = threading.Event(), disk.NewFile.write
    disk.NewFile.write = lambda self, data: slow.wait() and write(self, data)
    trainer.saver.background = True
    trainer.save(out_dirs[1])
    step()
    trainer.finish_save(wait=False)
    early = bool(steps.published(out_dirs[1]))
    slow.set()
    trainer.finish_save()
    dist.barrier()
    if process_groups.rank() == 1:
        disk.NewFile.write = lambda self, data: os.write(-1, data)
    trainer.save(out_dirs[1])
    try:
        trainer.finish_save()
    except UserError as error:
        return early, f"{error}"


def test_a_background_save_is_of_its_step_and_fails_aloud(tmp_path, pair):
    out_dirs = [tmp_path / "now", tmp_path / "background"]
    found = on_ranks(save_in_the_background, 2, ONE, *pair, CONFIG, ONE, out_dirs)
    assert [early for early, _ in found] == [False, False]
    assert [told for _, told in found] == [found[0][1]] * 2 and "Bad file descriptor" in found[0][1]
    expected, written = (tensors(out_dir) for out_dir in out_dirs)
    assert open_checkpoint(out_dirs[1]).step_dir.name == "step_0000001" and expected.keys() == written.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())


def test_a_run_that_saves_in_the_background_is_the_same(tmp_path, pair):
    runs = {}
    for name, background in (("now", False), ("background", True)):
        config = dataclasses.replace(CONFIG, async_save=background, save_every=1)
        half = dataclasses.replace(config, stop_after=2)
        on_ranks(distill, 2, ONE, *pair, half, ONE, tmp_path / name)
        on_ranks(distill, 2, ONE, *pair, config, ONE, tmp_path / name, True)
        assert open_checkpoint(tmp_path / name).step_dir.name == "step_0000004"
        assert [step.number for step in steps.published(tmp_path / name)] == [4, 3]
        runs[name] = tensors(tmp_path / name)
    assert all(torch.equal(runs["background"][key], tensor) for key, tensor in runs["now"].items())
