"""Distillation from a teacher's answers on disk: a failure means that what was cached is not what the teacher says."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from minitron_mcore import runtime
from minitron_mcore.config import Divergence, ParallelConfig
from minitron_mcore.distill.losses import distillation_loss
from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks


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
        return [hidden, head, labels, mask, ids, log_probs.float(), log_tail.float()]

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
    group, found = runtime.tp_group(), []
    for case in cases:
        hidden, head, labels, mask, *top = case.tensors()
        head = head.chunk(group.size())[group.rank()].clone().requires_grad_()
        hidden.requires_grad_()
        loss, stats = distillation_loss(
            hidden, head, None, None, labels, mask, vocab_size=case.vocab, tp_group=group, kd_weight=0.7,
            lm_weight=case.lm_weight, chunk_tokens=case.chunk_tokens, teacher_top=tuple(top),
        )  # fmt: skip
        loss.backward()
        found.append([loss.detach(), stats, hidden.grad, head.grad])
    return found


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_loss_on_given_entries_equals_dense_fp64(tp):
    ranks = on_ranks(loss_on_rank, tp, ParallelConfig(tensor=tp), list(CASES.values()))
    for (name, case), *results in zip(CASES.items(), *ranks, strict=True):
        assert all(torch.equal(result[n], results[0][n]) for result in results for n in (0, 1)), "ranks disagree"
        ours = *results[0][:2], sum(r[2].double() for r in results), torch.cat([r[3] for r in results])
        for x, y in zip(ours, case.reference(), strict=True):
            assert (x.double() - y).abs().max() <= 1e-5 * y.abs().max(), (name, x, y)
