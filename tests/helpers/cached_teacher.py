"""Teacher caches written and read on the ranks of a layout."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import (
    DataConfig,
    DistillConfig,
    Dtype,
    ParallelConfig,
)
from minitron_mcore.config.stages import DistillRun, TeacherCacheRun
from minitron_mcore.distill.cache import open_teacher
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, TopKLogProbs, distillation_loss
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from tests.helpers import models
from tests.helpers.loss_cases import chunk_bytes, tiles_of

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
    tile_elements: int | None = None
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
    "several tiles": Case(chunk_tokens=None, tile_elements=4096),
}


def loss_on_rank(cases: list[Case]) -> list[list[Tensor]]:
    """Of this rank, or of a whole head where there are no groups."""
    group, found = process_groups.tp_group() if torch.distributed.is_initialized() else None, []
    for case in cases:
        hidden, head, labels, mask, *top = (x.to(process_groups.device()) for x in case.tensors())
        head = (head.chunk(group.size())[group.rank()].clone() if group else head).requires_grad_()
        hidden.requires_grad_()
        budget = chunk_bytes(case.chunk_tokens, head)
        config = LossConfig(kd_weight=0.7, lm_weight=case.lm_weight, chunk_bytes=budget)
        student, teacher = FactoredLogits(hidden, head), TopKLogProbs(*top)
        sizes = {"vocab_size": case.vocab, "tp_group": group}
        with tiles_of(case.tile_elements):
            loss, stats = distillation_loss(student, teacher, labels, mask, **sizes, config=config)
        loss.backward()
        found.append([x.cpu() for x in (loss.detach(), stats, hidden.grad, head.grad)])
    return found


def joined(results: list[list[Tensor]]) -> list[Tensor]:
    """All ranks' results as `Case.reference` has them."""
    assert all(torch.equal(result[n], results[0][n]) for result in results for n in (0, 1)), "ranks disagree"
    return [*results[0][:2], sum(r[2].double() for r in results), torch.cat([r[3] for r in results])]


SETTINGS = DistillConfig(
    steps=4, global_batch=4, micro_batch=1, sequence_length=12, peak_lr=1e-2, min_lr=1e-3, warmup_steps=1, save_every=100
)  # fmt: skip


K, MOST = 8, models.SIZES["vocab_size"] - 1


KINDS = {
    "hidden": {"kind": "hidden"},
    "hidden_int8": {"kind": "hidden_int8"},
    "top": {"kind": "topk", "top_k": K},
    "most": {"kind": "topk", "top_k": MOST},
    "drawn": {"kind": "topk", "top_k": 5, "tail_draws": 20},
}


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


def assert_same(
    ours: list[dict], theirs: list[dict], rel: float, keys=("kd_loss", "lm_loss", "grad_norm", "lr")
) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in keys:
            assert math.isclose(a[key], b[key], rel_tol=rel), (key, a, b)
