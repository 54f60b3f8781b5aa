"""Distillation from a teacher's answers on disk: a failure means that what was cached is not what the teacher says."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitron_mcore.checkpoint import disk
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import (
    HiddenStateLossConfig,
    ParallelConfig,
    PruneConfig,
)
from minitron_mcore.config.stages import DistillRun, TeacherCacheRun
from minitron_mcore.data import datasets
from minitron_mcore.distill import cache, cache_writer, checks
from minitron_mcore.distill.cache import open_teacher
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers.cached_teacher import (
    CASES,
    KINDS,
    ONE,
    SETTINGS,
    K,
    World,
    assert_same,
    distill,
    joined,
    loss_on_rank,
    record,
    write_text,
)
from tests.helpers.cutting import write_family
from tests.helpers.full_disk import full_disk


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_loss_on_given_entries_equals_dense_fp64(tp):
    cases = list(CASES.values())
    ranks = on_ranks(loss_on_rank, tp, ParallelConfig(tensor=tp), cases) if tp > 1 else [loss_on_rank(cases)]
    for (name, case), *results in zip(CASES.items(), *ranks, strict=True):
        for x, y in zip(joined(results), case.reference(), strict=True):
            assert (x.double() - y).abs().max() <= 1e-5 * y.abs().max(), (name, x, y)


LAYOUTS = {
    "tp2_sp_dp2": (ParallelConfig(tensor=2, sequence=True), ("hidden", "hidden_int8")),
    "interleaved_cp2": (ParallelConfig(pipeline=2, virtual=2, context=2), ("top", "most", "drawn")),
}
"""On four ranks; which kinds of cache are written there."""


def record_and_die(config: TeacherCacheRun) -> None:
    """The rank that is about to put file 3 in its place dies."""
    replace = os.replace

    def dying(part, path):
        if str(path).endswith("3.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)

    os.replace = dying
    record(config)


def record_on_full_disks(config: TeacherCacheRun) -> tuple[list[str], list[str]]:
    """Write while the disk is full for rank 1's files, then for the index, then for none: the sentences, and the first's files."""

    def fill(module, name: str) -> None:
        usual = getattr(module, name)

        def write(*args):
            setattr(module, name, usual)
            with full_disk(400):
                usual(*args)

        setattr(module, name, write)

    sentences, left = [], []
    for rank, *written in ((1, cache_writer, "save_file"), (0, disk, "write_json")):
        if process_groups.rank() == rank:
            fill(*written)
        with pytest.raises(UserError) as refused:
            record(config)
        sentences.append(str(refused.value))
        left = left or sorted(path.name for path in Path(config.out_dir).glob("*.safetensors"))
        torch.distributed.barrier()
    record(config)
    return sentences, left


def record_damage_and_mend(killed: TeacherCacheRun, whole: TeacherCacheRun) -> None:
    """Go on with one; write another, change a bit of it, write again."""
    record(killed, whole)
    if process_groups.rank() == 0:
        change_last_bit(Path(whole.out_dir) / "samples_0000001.safetensors")
    torch.distributed.barrier()
    record(whole)


def change_last_bit(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)


def ask_for_the_device_off_the_main_thread(*configs: DistillRun) -> list[str]:
    """Threads that ask for the current CUDA device, of which each has its own: cached runs, a cut, a look for hung ranks."""
    from minitron_mcore.parallel import hang_watchdog
    from minitron_mcore.pruning import apply
    from minitron_mcore.pruning.plan import make_plan
    from tests.helpers.cutting import random_scores

    asked, main = [], threading.main_thread()

    def watched(call):
        def recorded(*args):
            if threading.current_thread() is not main:
                asked.append(f"{call.__name__} in {traceback.extract_stack(limit=2)[0]}")
            return call(*args)

        return recorded

    for module, name in ((process_groups, "device"), (torch.cuda, "current_device")):
        setattr(module, name, watched(getattr(module, name)))
    assert distill(*configs) == [None] * len(configs)
    opened = open_checkpoint(configs[0].student)
    plan = make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), PruneConfig(ffn=12))
    apply.prune(opened, plan, f"{configs[0].out_dir}_cut", configs[0].parallel)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: hang_watchdog._waits(hang_watchdog._main_frame())).result()
    return asked


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    path = tmp_path_factory.mktemp("world")
    write_family(path, {"student": PruneConfig(hidden=24, ffn=18)})
    found = World(path, write_text(path))
    for parallel, names in LAYOUTS.values():
        on_ranks(record, 4, parallel, *(found.writer(name, parallel, **KINDS[name]) for name in names))
    live = [found.run("live", "teacher"), found.run("live_top", "teacher", changes={"top_k": K})]
    # The live runs are of the caches' order of samples, as all runs of the same steps are.
    cached = [found.run(f"from_{name}", name) for name in KINDS]
    assert on_ranks(distill, 1, ONE, *live, *cached) == [[None] * 7]
    return found


def test_cached_runs_are_live_ones(world):
    every = ("kd_loss", "lm_loss", "grad_norm", "teacher_entropy", "lr")
    assert_same(world.history("from_hidden"), world.history("live"), 2e-5, every)
    assert_same(world.history("from_hidden_int8"), world.history("live"), 3e-2)
    assert_same(world.history("from_top"), world.history("live_top"), 1e-3)
    assert_same(world.history("from_most"), world.history("live"), 1e-3, every)


def drawn_entries(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`cache_writer.entries` of one distribution over 101 ids, 3 exact and 9 drawn, for `rows` tokens."""
    group = process_groups.tp_group()
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(101, generator=g) * 3).expand(rows, -1)
    uniform = torch.rand(rows, 9, generator=g, dtype=torch.float64)
    own = logits.split([50, 51, 0][: group.size()] if group.size() > 1 else 101, 1)[group.rank()]
    return cache_writer.entries(own, 3, uniform, 50 * group.rank(), group)


def test_drawn_entries_are_the_teachers_distribution_on_average():
    """Within five standard errors for each id, whatever the shards, one of them empty."""
    rows = 4000
    ids, log_probs = on_ranks(drawn_entries, 1, ONE, rows)[0]
    g = torch.Generator().manual_seed(0)
    wanted = (torch.randn(101, generator=g) * 3).double().softmax(0)
    assert all(len(set(row)) == 12 for row in ids[:200].tolist())
    probs = torch.zeros(rows, 101, dtype=torch.float64).scatter_(1, ids, log_probs[:, :-1].exp())
    assert (probs.sum(1) - 1).abs().max() < 1e-6 and log_probs[:, -1].max() == -math.inf
    top = wanted.topk(3).indices
    assert (probs[:, top] - wanted[top]).abs().max() < 1e-6
    tail = 1 - wanted[top].sum()
    error = (wanted * (tail - wanted) / 9 / rows).clamp(min=0).sqrt()
    far = ((probs.mean(0) - wanted).abs() > 5 * error + 1e-6).nonzero().flatten().tolist()
    assert not set(far) - set(top.tolist()), (far, probs.mean(0)[far], wanted[far])
    for sharded, log_sharded in on_ranks(drawn_entries, 3, ParallelConfig(tensor=3), rows):
        same = (sharded == ids).all(1)
        assert same.float().mean() > 0.999
        assert (log_sharded.exp() - log_probs.exp())[same].abs().max() < 1e-6


def test_draws_depend_on_the_sample_only(world):
    on_ranks(record, 1, ONE, world.writer("drawn_by_one", **KINDS["drawn"]))
    for n in range(6):
        ours, theirs = (
            load_file(world.path / name / f"samples_{n:07d}.safetensors") for name in ("drawn", "drawn_by_one")
        )
        assert (ours["ids"] == theirs["ids"]).float().mean() > 0.99
    kd = [[line["kd_loss"] for line in world.history(name)] for name in ("from_drawn", "live")]
    # The divergence from a drawn distribution is larger by what the draws leave out of the entropy.
    assert all(0 < b < a for a, b in zip(*kd, strict=True)), kd


@pytest.mark.default_cases("tp2_sp_dp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(world, layout):
    parallel, names = LAYOUTS[layout][0], ("hidden", "top")
    runs = [world.run(f"{layout}_{name}", name, parallel) for name in names]
    assert on_ranks(distill, 4, parallel, *runs) == [[None] * 2] * 4
    for name in names:
        assert_same(world.history(f"{layout}_{name}"), world.history(f"from_{name}"), 2e-5)


def test_threads_do_not_ask_for_the_current_device(world):
    runs = [world.run(f"threads_{name}", name) for name in ("hidden", "top")]
    assert on_ranks(ask_for_the_device_off_the_main_thread, 2, ONE, *runs) == [[]] * 2


def test_resumed_shorter_and_longer_runs(world):
    """A run of fewer steps sees the first samples of the cache; one of more begins with them again, and without warm-up or decay
    and with nothing learned its seventh step is its third."""
    still = {"peak_lr": 1e-12, "min_lr": 1e-12, "steps": 7}
    half, whole = (world.run("parts", "top", changes={"stop_after": stop}) for stop in (2, None))
    short = world.run("short", "top", changes={"steps": 2, "global_batch": 8, "min_lr": 1e-2, "peak_lr": 1e-2})
    assert on_ranks(distill, 1, ONE, half, whole, world.run("long", "top", changes=still), short) == [[None] * 4]
    for a, b in zip(world.history("parts"), world.history("from_top"), strict=True):
        assert all(a[key] == b[key] for key in ("step", "tokens", "kd_loss", "lm_loss", "grad_norm", "lr"))
    long = world.history("long")
    assert_same(long[4:], long[:3], 1e-6, ("kd_loss", "lm_loss"))
    first = [row["kd_loss"] for row in long[:2]]
    assert len(set(first)) == 2 and len(world.history("short")) == 2


def test_killed_and_damaged_caches_are_completed_to_the_same_bytes(world):
    kind = KINDS["top"]
    killed, whole = world.writer("killed", **kind), world.writer("whole", **kind)
    with pytest.raises(RankError, match="died with exit code -9|Connection reset by peer"):
        on_ranks(record_and_die, 2, ONE, killed)
    left = sorted(path.name for path in (world.path / "killed").glob("samples_*.safetensors"))
    assert left and len(left) < 6
    before = {name: (world.path / "killed" / name).stat().st_mtime_ns for name in left}
    with pytest.raises(UserError, match="killed is incomplete: run the same"):
        open_teacher(world.path / "killed")
    on_ranks(record_damage_and_mend, 2, ONE, killed, whole)
    assert before == {name: (world.path / "killed" / name).stat().st_mtime_ns for name in left}, "written again"
    a, b = (
        {
            file.name: file.read_bytes()
            for file in (world.path / name).iterdir()
            if file.suffix in (".json", ".safetensors")
        }
        for name in ("killed", "whole")
    )
    assert a == b and len(a) == 8
    assert {path.name for path in (world.path / "killed").iterdir()} >= {"hf", ".complete", "config.yaml"}


def test_a_full_disk_is_one_sentence_on_all_ranks_and_the_same_command_continues(world):
    on_disk, *_ = found = on_ranks(record_on_full_disks, 2, ONE, world.writer("full", **KINDS["hidden"]), timeout=60)
    assert found == [on_disk] * 2
    sentences, left = on_disk
    folder = world.path / "full"
    assert len(sentences) == 2 and all(text.count("\n") == 0 and "File too large" in text for text in sentences)
    assert sentences[0].startswith(f"rank 1: {folder} cannot be written") and sentences[0].endswith("or make room.")
    assert left and "samples_0000000.safetensors" in left and "samples_0000001.safetensors" not in left
    assert len(list(folder.glob("*.safetensors"))) == 7 and not list(folder.glob("*.part"))
    assert open_teacher(folder).kind == "hidden" and (folder / ".complete").is_file()


def test_what_a_cache_cannot_teach_is_refused_before_work(world):
    missing, damaged = (shutil.copytree(world.path / "top", world.path / name) for name in ("missing", "damaged"))
    (missing / "samples_0000004.safetensors").unlink()
    change_last_bit(damaged / "samples_0000000.safetensors")
    states = HiddenStateLossConfig(weight=1.0)
    cases = [
        ({"teacher": "missing"}, "missing/samples_0000004.safetensors of the teacher cache is missing: run the same"),
        (
            {"teacher": "damaged"},
            "damaged/samples_0000000.safetensors of the teacher cache was changed after it was written: run",
        ),
        (
            {"text": {"seed": 5}},
            "is of the samples .* with data.seed 1234, but this run's data.train, data.seed 5 and data.document_mask false give",
        ),
        ({"text": {"train": world.text[:1]}}, "with data.seed 1234, but this run's data.train"),
        (
            {"changes": {"sequence_length": 8}},
            "sequence_length is 8, but the teacher cache .*top is of samples of 12 tokens",
        ),
        (
            {"changes": {"divergence": "reverse_kl"}},
            "divergence reverse_kl at temperature 1 cannot be computed from",
        ),
        ({"changes": {"temperature": 2.0}}, "divergence forward_kl at temperature 2 cannot be computed from"),
        ({"changes": {"top_k": 4}}, "top_k is 4, but the teacher's 8 largest .* give top_k 8 or null"),
        ({"changes": {"top_k": 25}, "teacher": "drawn"}, "distill.top_k is 25, but .* has 20 tail draws: give null"),
        (
            {"changes": {"hidden_state_loss": states}, "teacher": "hidden"},
            "the teacher cache .*hidden has no intermediate states",
        ),
    ]
    runs = [world.run("refused", **{"teacher": "top"} | kwargs) for kwargs, _ in cases]
    for sentences in on_ranks(distill, 2, ONE, *runs):
        for sentence, (_, expected) in zip(sentences, cases, strict=True):
            assert sentence and re.search(expected, sentence) and "\n" not in sentence, (expected, sentence)
    assert {path.name for path in (world.path / "refused").iterdir()} <= {"config.yaml", "inputs.json", ".claim.4"}


def test_what_is_refused_without_ranks(world):
    top, arch = open_teacher(world.path / "top"), open_checkpoint(world.path / "teacher").arch
    fewer = dataclasses.replace(arch, vocab=90)
    (found,) = top.problems(fewer, SETTINGS)
    assert "the student's vocabulary has 90 tokens" in found and "of 101: write one of kind=hidden" in found
    assert not list(open_teacher(world.path / "hidden").problems(fewer, SETTINGS))
    (found,) = checks.cache_problems(world.writer("x", kind="topk", top_k=101), arch)
    assert (
        "top_k is 101 and tail_draws 0; their sum must be at least 1 and below the teacher's vocabulary of 101" in found
    )
    (found,) = checks.cache_problems(world.writer("x", kind="hidden", top_k=101, file_samples=0), arch)
    assert "file_samples is 0; it must be at least 1" in found
    (found,) = checks.cache_problems(world.writer("x", kind="hidden", tail_draws=4), arch)
    assert "tail_draws is 4, but kind hidden has no drawn entries" in found
    broken = shutil.copytree(world.path / "top", world.path / "broken")
    (broken / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json cannot be read as JSON"):
        open_teacher(broken)


def test_files_hold_what_the_index_says(world):
    for name, kind in KINDS.items():
        index = json.loads((world.path / name / "index.json").read_text())
        assert index["format_version"] == 1
        files = [load_file(world.path / name / f"samples_{n:07d}.safetensors") for n in range(6)]
        sizes = [tensor.shape[:2] for file in files for tensor in file.values()]
        assert {tuple(size) for size in sizes} == {(3, 12), (1, 12)} and index["kind"] == kind["kind"]
        held = sum(tensor.numel() * tensor.element_size() for file in files for tensor in file.values())
        assert held == 16 * 12 * index["bytes_a_token"]


def test_packed_entries_are_off_by_what_is_stated():
    """With ids beyond 16 bits and the least and most likely entries."""
    g = torch.Generator().manual_seed(0)
    log_probs = (torch.randn(50, 256_000, generator=g) * 4).log_softmax(1)
    log_probs, ids = log_probs[:, torch.randperm(256_000, generator=g)].topk(64)
    tail = (1 - log_probs.exp().sum(1, keepdim=True)).log()
    packed = cache.pack_top(ids, torch.cat((log_probs, tail), 1), 256_000)
    assert sum(x.element_size() * x.shape[1] for x in packed.values()) == checks.cache_bytes("topk", 64, 256_000, 0, 0)
    found, values = cache.unpack_top(packed)
    assert torch.equal(found, ids) and (values[:, :-1] - log_probs).abs().max() <= 2.5e-4 * 2
    assert (values.exp().sum(1) - 1).abs().max() < 1e-5
    steps = packed["log_probs"].int().float() * -cache.STEP
    assert (steps[:, :-1] - log_probs).abs().max() <= 2.5e-4
    far = cache.pack_top(ids[:, :1], torch.tensor([[0.0, -math.inf]]).expand(50, 2), 256_000)
    assert cache.unpack_top(far)[1][:, 1].max() <= -31 and cache.unpack_top(far)[1][:, 0].abs().max() < 1e-6


def test_an_order_begins_again_after_its_last_sample(world):
    """Micro-batches across its end, too; and its name is that of its folder."""
    prefixes, weights = [entry.split()[1] for entry in world.text], [0.3, 0.7]
    order = datasets.SampleOrder(prefixes, weights, seed=1234, sequence_length=12, num_samples=5)
    samples = datasets.Samples(order, str(world.path / "cache"), vocab_size=101)
    share = dict(consumed_samples=4, dp_rank=1, dp_size=2)
    batches = list(datasets.train_batches(samples, micro_batch_size=2, global_batch_size=4, num_samples=12, **share))
    assert [batch["samples"].tolist() for batch in batches] == [[1, 2], [0, 1]]
    assert torch.equal(batches[0]["tokens"][0], batches[1]["tokens"][1])
    assert (world.path / "cache" / f"order-{order.digest()}").is_dir()
