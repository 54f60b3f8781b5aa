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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import (
    DataConfig,
    DistillConfig,
    Dtype,
    HiddenStateLossConfig,
    ParallelConfig,
    PruneConfig,
)
from minitron_mcore.config.stages import DistillRun, TeacherCacheRun
from minitron_mcore.data import datasets
from minitron_mcore.distill import cache, checks
from minitron_mcore.distill.cache import open_teacher
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, TopKLogProbs, distillation_loss
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.testing import RankError, on_ranks
from tests import models
from tests.test_prune import write_family

pytestmark = pytest.mark.xdist_group("teacher_cache")  # one worker, so that its models are made once

ONE = ParallelConfig()


@dataclass(frozen=True)
class Case:
    """A loss on given entries: every rank makes the same whole tensors and cuts its rows from them."""

    k: int = 20
    tokens: int = 37
    vocab: int = 1000
    padded: int = 1008
    spread: float = 3.0
    lm_weight: float = 0.3
    masked: float = 0.3
    chunk_tokens: int | None = 10
    dtype: torch.dtype = torch.float32

    def tensors(self) -> list[Tensor]:
        """Student hidden and head, labels, mask, ids, log-probabilities, log of the tail."""
        g = torch.Generator().manual_seed(self.k)
        hidden = torch.randn(self.tokens, 24, generator=g)
        head = torch.randn(self.padded, 24, generator=g) * self.spread / 24**0.5
        teacher = (torch.randn(self.tokens, self.vocab, generator=g) * self.spread).double().log_softmax(1)
        log_probs, ids = teacher.topk(self.k)
        log_tail = teacher.scatter(1, ids, -torch.inf).logsumexp(1)
        labels = torch.randint(self.vocab, (self.tokens,), generator=g)
        mask = (torch.rand(self.tokens, generator=g) >= self.masked).float()
        labels[mask == 0], hidden[mask == 0] = -100, torch.inf
        log_probs[mask == 0], log_tail[mask == 0] = torch.nan, torch.nan
        return [hidden.to(self.dtype), head.to(self.dtype), labels, mask, ids, log_probs.float(), log_tail.float()]

    def reference(self) -> list[Tensor]:
        """Loss, stats, gradients of hidden and head, dense and in fp64, over unmasked tokens only."""
        hidden, head, labels, mask, ids, log_probs, log_tail = self.tensors()
        keep = mask != 0
        hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()
        s = (hidden[keep] @ head[: self.vocab].t()).log_softmax(1)
        lm = -s.gather(1, labels[keep, None]).sum()
        rest = s.scatter(1, ids[keep], -torch.inf).logsumexp(1, keepdim=True)
        t = torch.cat((log_probs[keep], log_tail[keep, None]), 1).double()
        s, p = torch.cat((s.gather(1, ids[keep]), rest), 1), t.exp()
        kd, entropy = (p * (t - s)).nansum(), -(p * t).nansum()  # an empty tail is 0 times infinity
        loss = 0.7 * kd + self.lm_weight * lm
        loss.backward()
        return [loss.detach(), torch.stack((kd, lm, entropy)).detach(), hidden.grad, head.grad]


CASES = {
    "20": Case(),
    "1": Case(k=1),
    "large logits": Case(spread=30.0),
    "a rank of padding only": Case(vocab=100, padded=192),
    "all but one": Case(k=99, vocab=100, padded=102),
    "several tiles": Case(tokens=131, vocab=49_999, padded=50_004, chunk_tokens=None),
}


def loss_on_rank(cases: list[Case]) -> list[list[Tensor]]:
    """Of this rank, or of a whole head where there are no groups."""
    group, found = process_groups.tp_group() if torch.distributed.is_initialized() else None, []
    for case in cases:
        hidden, head, labels, mask, *top = (x.to(process_groups.device()) for x in case.tensors())
        head = (head.chunk(group.size())[group.rank()].clone() if group else head).requires_grad_()
        hidden.requires_grad_()
        config = LossConfig(kd_weight=0.7, lm_weight=case.lm_weight, chunk_tokens=case.chunk_tokens)
        models, sizes = (
            (FactoredLogits(hidden, head), TopKLogProbs(*top)),
            {"vocab_size": case.vocab, "tp_group": group},
        )
        loss, stats = distillation_loss(*models, labels, mask, **sizes, config=config)
        loss.backward()
        found.append([x.cpu() for x in (loss.detach(), stats, hidden.grad, head.grad)])
    return found


def joined(results: list[list[Tensor]]) -> list[Tensor]:
    """All ranks' results as `Case.reference` has them."""
    assert all(torch.equal(result[n], results[0][n]) for result in results for n in (0, 1)), "ranks disagree"
    return [*results[0][:2], sum(r[2].double() for r in results), torch.cat([r[3] for r in results])]


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_loss_on_given_entries_equals_dense_fp64(tp):
    cases = list(CASES.values())
    ranks = on_ranks(loss_on_rank, tp, ParallelConfig(tensor=tp), cases) if tp > 1 else [loss_on_rank(cases)]
    for (name, case), *results in zip(CASES.items(), *ranks, strict=True):
        for x, y in zip(joined(results), case.reference(), strict=True):
            assert (x.double() - y).abs().max() <= 1e-5 * y.abs().max(), (name, x, y)


SETTINGS = DistillConfig(
    steps=4, global_batch=4, micro_batch=1, sequence_length=12, peak_lr=1e-2, min_lr=1e-3, warmup_steps=1, save_every=100
)  # fmt: skip
K, MOST = 8, models.SIZES["vocab_size"] - 1
KINDS = {
    "hidden": {"kind": "hidden"},
    "hidden_int8": {"kind": "hidden_int8"},
    "top": {"kind": "topk", "top_k": K},
    "most": {"kind": "topk", "top_k": MOST},
}
LAYOUTS = {
    "tp2_sp_dp2": (ParallelConfig(tensor=2, sequence=True), ("hidden", "hidden_int8")),
    "interleaved_cp2": (ParallelConfig(pipeline=2, virtual=2, context=2), ("top", "most")),
}
"""On four ranks; which kinds of cache are written there."""


def write_text(folder: Path) -> list[str]:
    """Two files of different lengths, blended: fewer samples of them are another order."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    g, entries = np.random.default_rng(0), []
    for name, documents in (("0.3 a", 9), ("0.7 b", 20)):
        path = folder / name[-1]
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=DType.optimal_dtype(models.SIZES["vocab_size"]))
        for _ in range(documents):
            builder.add_document(torch.from_numpy(g.integers(0, models.SIZES["vocab_size"], 31)), [31])
        builder.finalize(f"{path}.idx")
        entries.append(f"{name[:-1]}{path}")
    return entries


@dataclass
class World:
    """A teacher, its student, their text, and caches of the teacher."""

    path: Path
    text: list[str]
    dtype: Dtype = Dtype.fp32

    def data(self, **changes) -> DataConfig:
        return DataConfig(**{"train": self.text, "cache": str(self.path / "cache")} | changes)

    def writer(self, name: str, parallel=ONE, **changes) -> TeacherCacheRun:
        """4 steps of 4 samples of 12 tokens, in files of 3 samples."""
        sizes = dict(steps=4, global_batch=4, micro_batch=2, sequence_length=12, file_samples=3)
        where = dict(teacher=str(self.path / "teacher"), out_dir=str(self.path / name), dtype=self.dtype)
        return TeacherCacheRun(parallel=parallel, data=self.data(), **where, **sizes | changes)

    def run(self, name: str, teacher: str, parallel=ONE, changes=None, text=None) -> DistillRun:
        settings = dataclasses.replace(SETTINGS, **changes or {})
        where = dict(
            student=str(self.path / "student"), teacher=str(self.path / teacher), out_dir=str(self.path / name)
        )
        return DistillRun(parallel=parallel, data=self.data(**text or {}), distill=settings, dtype=self.dtype, **where)

    def history(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.path / name / "metrics.jsonl").read_text().splitlines()]


def record(*configs: TeacherCacheRun) -> None:
    from minitron_mcore.distill import cache_writer

    for config in configs:
        cache_writer.run(config, open_checkpoint(config.teacher))


def record_and_die(config: TeacherCacheRun) -> None:
    """The rank that is about to put file 3 in its place dies."""
    replace = os.replace

    def dying(part, path):
        if str(path).endswith("3.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)

    os.replace = dying
    record(config)


def record_damage_and_mend(killed: TeacherCacheRun, whole: TeacherCacheRun) -> None:
    """Go on with one; write another, change a bit of it, write again."""
    record(killed, whole)
    if process_groups.rank() == 0:
        damage(Path(whole.out_dir) / "samples_0000001.safetensors")
    torch.distributed.barrier()
    record(whole)


def damage(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)


def distill(*runs: DistillRun) -> list[str | None]:
    """Train; the sentence of each run that is refused."""
    from minitron_mcore.distill import run

    found = []
    for config in runs:
        try:
            run.train([config], config.distill, [open_checkpoint(config.student)], open_teacher(config.teacher))
            found.append(None)
        except UserError as error:
            found.append(str(error))
    return found


def ask_for_the_device_off_the_main_thread(*configs: DistillRun) -> list[str]:
    """Threads that ask for the current CUDA device, of which each has its own: cached runs, a cut, a look for hung ranks."""
    from minitron_mcore.parallel import hang_watchdog
    from minitron_mcore.pruning import apply
    from minitron_mcore.pruning.plan import make_plan
    from tests.test_prune import random_scores

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
        pool.submit(hang_watchdog._main_thread).result()
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
    assert on_ranks(distill, 1, ONE, *live, *cached) == [[None] * 6]
    return found


def assert_same(
    ours: list[dict], theirs: list[dict], rel: float, keys=("kd_loss", "lm_loss", "grad_norm", "lr")
) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in keys:
            assert math.isclose(a[key], b[key], rel_tol=rel), (key, a, b)


def test_cached_runs_are_live_ones(world):
    every = ("kd_loss", "lm_loss", "grad_norm", "teacher_entropy", "lr")
    assert_same(world.history("from_hidden"), world.history("live"), 2e-5, every)
    assert_same(world.history("from_hidden_int8"), world.history("live"), 3e-2)
    assert_same(world.history("from_top"), world.history("live_top"), 1e-3)
    assert_same(world.history("from_most"), world.history("live"), 1e-3, every)


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
    with pytest.raises(RankError, match="died with exit code -9"):
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
    assert a == b and len(a) == 7
    assert {path.name for path in (world.path / "killed").iterdir()} >= {"hf", ".complete", "latest", "config.yaml"}


def test_what_a_cache_cannot_teach_is_refused_before_work(world):
    missing, damaged = (shutil.copytree(world.path / "top", world.path / name) for name in ("missing", "damaged"))
    (missing / "samples_0000004.safetensors").unlink()
    damage(damaged / "samples_0000000.safetensors")
    states = HiddenStateLossConfig(weight=1.0)
    cases = [
        ({"teacher": "missing"}, "missing/samples_0000004.safetensors of the teacher cache is missing: run the same"),
        (
            {"teacher": "damaged"},
            "damaged/samples_0000000.safetensors of the teacher cache was changed after it was written: run",
        ),
        (
            {"text": {"seed": 5}},
            "is of the samples .* with data.seed 1234, but this run's data.train and data.seed 5 give",
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
        (
            {"changes": {"hidden_state_loss": states}, "teacher": "hidden"},
            "the teacher cache .*hidden has no intermediate states",
        ),
    ]
    runs = [world.run("refused", **{"teacher": "top"} | kwargs) for kwargs, _ in cases]
    for sentences in on_ranks(distill, 2, ONE, *runs):
        for sentence, (_, expected) in zip(sentences, cases, strict=True):
            assert sentence and re.search(expected, sentence) and "\n" not in sentence, (expected, sentence)
    assert not (world.path / "refused").exists()


def test_what_is_refused_without_ranks(world):
    top, arch = open_teacher(world.path / "top"), open_checkpoint(world.path / "teacher").arch
    fewer = dataclasses.replace(arch, vocab=90)
    (found,) = top.problems(fewer, SETTINGS)
    assert "the student's vocabulary has 90 tokens" in found and "of 101: write one of kind=hidden" in found
    assert not list(open_teacher(world.path / "hidden").problems(fewer, SETTINGS))
    (found,) = checks.cache_problems(world.writer("x", kind="topk", top_k=101), arch)
    assert "top_k is 101; it must be at least 1 and below the teacher's vocabulary of 101" in found
    (found,) = checks.cache_problems(world.writer("x", kind="hidden", top_k=101, file_samples=0), arch)
    assert "file_samples is 0; it must be at least 1" in found
    broken = shutil.copytree(world.path / "top", world.path / "broken")
    (broken / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json cannot be read as JSON"):
        open_teacher(broken)


def test_files_hold_what_the_index_says(world):
    for name, kind in KINDS.items():
        index = json.loads((world.path / name / "index.json").read_text())
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
    order = dict(seed=1234, sequence_length=12)
    batches = list(
        datasets.train_batches(
            prefixes, weights, cache=str(world.path / "cache"), vocab_size=101, micro_batch_size=2, global_batch_size=4,
            num_samples=12, order_samples=5, consumed_samples=4, dp_rank=1, dp_size=2, **order,
        )
    )  # fmt: skip
    assert [batch["samples"].tolist() for batch in batches] == [[1, 2], [0, 1]]
    assert torch.equal(batches[0]["tokens"][0], batches[1]["tokens"][1])
    name = datasets.order_hash(prefixes, weights, num_samples=5, **order)
    assert (world.path / "cache" / f"order-{name}").is_dir()
