"""Cases of the distillation loss, their formula in fp64, and the loss on the ranks of a layout."""

import contextlib
import functools
from dataclasses import dataclass, fields, replace
from itertools import batched
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from minitron_mcore.config.settings import Divergence
from minitron_mcore.distill import tile_sizes
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, distillation_loss
from minitron_mcore.parallel import process_groups


def chunk_bytes(tokens: int | None, *heads: Tensor) -> int | None:
    """Budget for the logits of so many tokens."""
    return tokens and tokens * sum(len(head) * head.element_size() for head in heads)


@contextlib.contextmanager
def tiles_of(elements: int | None):
    """Tiles of so many logits inside the block."""
    sizes = dict.fromkeys(tile_sizes.TILE_ELEMENTS, elements) if elements else {}
    with mock.patch.dict(tile_sizes.TILE_ELEMENTS, sizes):
        yield


@dataclass(frozen=True)
class Case:
    """Sizes and options of one problem: every rank makes the same whole tensors and cuts its rows from them."""

    tokens: int = 37
    vocab: int = 1000
    padded: int = 1008
    hidden: int = 24
    teacher_hidden: int = 32
    spread: float = 3.0
    """Standard deviation of the logits."""
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = Divergence.forward_kl
    jsd_beta: float = 0.5
    top_k: int | None = None
    chunk_tokens: int | None = None
    tile_elements: int | None = None
    """Logits of a tile; None: the default, which holds all of a small case."""
    masked: float = 0.0
    """Part of the tokens that is ignored; their labels are -100, their hidden states NaN and infinite."""
    dtype: torch.dtype = torch.float32

    def tensors(self) -> list[Tensor]:
        """Student hidden and head, teacher hidden and head, labels, mask."""
        g = torch.Generator().manual_seed(self.tokens)

        def states(width: int) -> tuple[Tensor, Tensor]:
            hidden = torch.randn(self.tokens, width, generator=g, dtype=torch.float64)
            head = torch.randn(self.padded, width, generator=g, dtype=torch.float64) * self.spread / width**0.5
            return hidden.to(self.dtype), head.to(self.dtype)

        student, teacher = states(self.hidden), states(self.teacher_hidden)
        labels = torch.randint(self.vocab, (self.tokens,), generator=g)
        mask = (torch.rand(self.tokens, generator=g) >= self.masked).float()
        labels[mask == 0] = -100
        student[0][mask == 0], teacher[0][mask == 0] = torch.inf, torch.nan
        if self.kd_weight == 0:
            teacher = None, None
        return [*student, *teacher, labels, mask]

    def placed(self) -> list[Tensor]:
        """The same on this rank's device."""
        return [None if tensor is None else tensor.to(process_groups.device()) for tensor in self.tensors()]

    def run(self, tensors: list[Tensor], group=None) -> tuple[Tensor, Tensor]:
        names = [field.name for field in fields(LossConfig)]
        models = [None if hidden is None else FactoredLogits(hidden, head) for hidden, head in batched(tensors[:4], 2)]
        options = {name: getattr(self, name) for name in names if hasattr(self, name)}
        config = LossConfig(**options, chunk_bytes=chunk_bytes(self.chunk_tokens, *(x.head for x in models if x)))
        with tiles_of(self.tile_elements):
            return distillation_loss(*models, *tensors[4:], vocab_size=self.vocab, tp_group=group, config=config)


CASES = {
    "kl, chunks that don't divide the tokens": Case(chunk_tokens=10),
    "several tiles": Case(131, 49_999, 50_004, 128, 8),
    "masked": Case(masked=0.4, lm_weight=1.0, chunk_tokens=10),
    "kl and lm mixed": Case(kd_weight=0.7, lm_weight=0.3),
    "temperature": Case(temperature=2.0),
    "temperature, mixed": Case(temperature=2.0, kd_weight=0.7, lm_weight=0.3, masked=0.2),
    "large logits": Case(spread=30.0, lm_weight=0.5),
    "lm only": Case(kd_weight=0.0, lm_weight=1.0, masked=0.2),
    "a rank of padding only": Case(vocab=100, padded=192, lm_weight=0.5, temperature=3.0),
}


KINDS = {
    "forward_kl": Case(),
    "reverse_kl": Case(divergence=Divergence.reverse_kl),
    "jsd": Case(divergence=Divergence.jsd),
    "jsd, beta 0.2": Case(divergence=Divergence.jsd, jsd_beta=0.2),
    "mse": Case(divergence=Divergence.mse),
    "cosine": Case(divergence=Divergence.cosine),
    "top 20": Case(top_k=20),
    "top 1": Case(top_k=1),
}


def shapes(case: Case) -> dict[str, Case]:
    """What could go wrong, for any divergence."""
    temperature = 1.0 if case.divergence in (Divergence.mse, Divergence.cosine) else 2.0
    mixed = replace(case, kd_weight=0.7, lm_weight=0.3, temperature=temperature, masked=0.3)
    return {
        "mixed": replace(case, kd_weight=0.7, lm_weight=0.3, masked=0.3, chunk_tokens=10),
        "temperature": replace(mixed, chunk_tokens=10),
        "a rank of padding only": replace(case, vocab=100, padded=192, lm_weight=0.5, temperature=temperature),
        "large logits": replace(case, spread=10.0 if case.divergence == Divergence.jsd else 30.0),
        "several tiles": replace(case, hidden=12, teacher_hidden=8, tile_elements=4096),
    }


ALL = CASES | {f"{name}, {shape}": case for name, kind in KINDS.items() for shape, case in shapes(kind).items()}


# Where teacher and student have nothing in common jsd's gradients vanish: these may lose twice what a dense fp32 one does.
VANISHING = "jsd, large logits", "jsd, beta 0.2, large logits"


def formula(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of all tokens, from their logits."""
    s, t = ((logits / case.temperature).log_softmax(-1) for logits in (student, teacher))
    if case.top_k:
        top = t.topk(case.top_k).indices
        s, t = (
            torch.cat((x.gather(1, top), x.scatter(1, top, -torch.inf).logsumexp(-1, keepdim=True)), 1) for x in (s, t)
        )
    match case.divergence:
        case Divergence.forward_kl:
            return (t.exp() * (t - s)).sum()
        case Divergence.reverse_kl:
            return (s.exp() * (s - t)).sum()
        case Divergence.jsd:
            m = (case.jsd_beta * t.exp() + (1 - case.jsd_beta) * s.exp()).log()
            return (case.jsd_beta * t.exp() * (t - m) + (1 - case.jsd_beta) * s.exp() * (s - m)).sum()
        case Divergence.mse:
            return (student - teacher).square().mean(-1).sum()
        case Divergence.cosine:
            return (1 - torch.nn.functional.cosine_similarity(student, teacher)).sum()


@functools.cache
def reference(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, stats, gradients of hidden and head (all rows): the formula, dense, in fp64, over unmasked tokens only."""
    student, head, teacher, teacher_head, labels, mask = case.tensors()
    keep = mask != 0
    hidden, weight = student.double().requires_grad_(), head.double().requires_grad_()
    logits = (hidden[keep] @ weight.t())[:, : case.vocab]
    lm = -logits.log_softmax(-1).gather(1, labels[keep, None]).sum()
    kd = entropy = torch.zeros((), dtype=torch.float64)
    if teacher is not None:
        wanted = (teacher[keep].double() @ teacher_head.double().t())[:, : case.vocab]
        kd, t = formula(case, logits, wanted), (wanted / case.temperature).log_softmax(-1)
        entropy = -(t.exp() * t).sum()
    loss = case.kd_weight * case.temperature**2 * kd + case.lm_weight * lm
    loss.backward()
    return loss.detach(), torch.stack((kd, lm, entropy)).detach(), hidden.grad, weight.grad


def dense_error(case: Case) -> float:
    """What fp32 costs the gradients when the divergence alone is computed densely, by the largest element of each."""
    student, head, teacher, teacher_head, *_ = case.tensors()
    leaves = student.requires_grad_(), head.requires_grad_()
    formula(case, (student @ head.t())[:, : case.vocab], (teacher @ teacher_head.t())[:, : case.vocab]).backward()
    pairs = zip(leaves, reference(case)[2:], strict=True)
    return max(((leaf.grad - exact).abs().max() / exact.abs().max()).item() for leaf, exact in pairs)


def on_rank(cases: list[Case]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return [one_on_rank(case) for case in cases]


def one_on_rank(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four of this rank: its part of the hidden states' gradient, its rows of the head's."""
    tensors, group = case.placed(), process_groups.tp_group()
    rows = slice(group.rank() * case.padded // group.size(), (group.rank() + 1) * case.padded // group.size())
    for head in (1, 3):
        tensors[head] = None if tensors[head] is None else tensors[head][rows].clone()
    hidden, head = tensors[0].requires_grad_(), tensors[1].requires_grad_()
    loss, stats = case.run(tensors, group)
    loss.backward()
    return tuple(x.cpu() for x in (loss.detach(), stats, hidden.grad, head.grad))


def relative_errors(case: Case, results: list[tuple]) -> list[float]:
    """Of loss, stats, both gradients, by the largest element of each (each part of stats by itself)."""
    loss, stats, hidden, head = reference(case)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1]), "ranks disagree"
    ours = *results[0][:2], sum(r[2].double() for r in results), torch.cat([r[3] for r in results])
    assert ours[0].dtype == ours[1].dtype == torch.float32 and results[0][2].dtype == ours[3].dtype == case.dtype

    def error(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()

    parts = [(x[None], y[None]) for x, y in zip(ours[1], stats, strict=True)]
    return [error(x, y) for x, y in [(ours[0], loss), *parts, (ours[2], hidden), (ours[3], head)]]


def same_model_on_rank(cases: list[Case]) -> list[tuple[Tensor, Tensor, Tensor]]:
    group, results = process_groups.tp_group(), []
    for case in cases:
        tensors = case.placed()
        head = tensors[1].chunk(group.size())[group.rank()].clone().requires_grad_()
        hidden = tensors[0].clone().requires_grad_()
        loss, stats = case.run([hidden, head, hidden.detach(), head.detach(), *tensors[4:]], group)
        loss.backward()
        results.append(tuple(x.cpu() for x in (stats / case.tokens, hidden.grad, head.grad)))
    return results


SMALL = dict(dtype=torch.bfloat16, lm_weight=0.5, masked=0.2, chunk_tokens=10)


BF16 = {name: replace(case, **SMALL) for name, case in KINDS.items()}


def tied_on_rank(case: Case) -> Tensor:
    """Gradient of this rank's rows of one matrix that is embedding and head; what lies between is a tanh."""
    from megatron.core.tensor_parallel import mappings

    tensors, group = case.placed(), process_groups.tp_group()
    rows = case.padded // group.size()
    weight = tensors[1].chunk(group.size())[group.rank()].clone().requires_grad_()
    place = tensors[4] - group.rank() * rows
    inside = (place >= 0) & (place < rows)
    embedded = weight[place.clamp(0, rows - 1)] * inside[:, None]
    hidden = mappings.reduce_from_tensor_model_parallel_region(embedded).tanh()
    hidden = mappings.copy_to_tensor_model_parallel_region(hidden)
    case.run([hidden, weight, tensors[2], tensors[3].chunk(group.size())[group.rank()], *tensors[4:]], group)[
        0
    ].backward()
    return weight.grad.cpu()


def tied_reference(case: Case) -> Tensor:
    _, head, *rest = case.tensors()
    weight = head.double().requires_grad_()
    logits = (weight[rest[2]].tanh() @ weight.t())[:, : case.vocab].log_softmax(-1)
    teacher = (rest[0].double() @ rest[1].double().t())[:, : case.vocab].log_softmax(-1)
    (teacher.exp() * (teacher - logits)).sum().backward()
    return weight.grad


class Head(torch.nn.Module):
    """Called with the ids [T] of an embedding table of its own or, tied, of the head; what lies between is a tanh."""

    def __init__(self, case: Case, tied: bool):
        super().__init__()
        self.case, self.weight = case, torch.nn.Parameter(case.placed()[1])
        self.weight.zero_out_wgrad = tied  # as megatron-core's models say of tied weights
        self.embedding = self.weight if tied else torch.nn.Parameter(self.weight.detach().flip(0).contiguous())

    def forward(self, ids: Tensor, fused: bool) -> Tensor:
        _, _, *rest = self.case.placed()
        hidden = torch.nn.functional.embedding(ids, self.embedding).tanh()
        student, teacher = FactoredLogits(hidden, self.weight), FactoredLogits(*rest[:2])
        budget = chunk_bytes(self.case.chunk_tokens, student.head, teacher.head)
        config = LossConfig(chunk_bytes=budget, gradient_accumulation_fusion=fused)
        return distillation_loss(student, teacher, *rest[2:], vocab_size=self.case.vocab, config=config)[0]


def main_grads(tied: bool, fused: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of two microbatches whose loss is scaled, with megatron-core's DistributedDataParallel around the head."""
    case = Case(chunk_tokens=10, dtype=dtype)
    config = TransformerConfig(num_layers=1, hidden_size=case.hidden, num_attention_heads=1)
    head = Head(case, tied)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), head)
    model.zero_grad_buffer()
    for seed in (0, 1):
        ids = torch.randint(case.vocab, (case.tokens,), generator=torch.Generator().manual_seed(seed))
        (0.25 * model(ids.to(process_groups.device()), fused)).backward()
    assert head.weight.grad_added_to_main_grad == fused and all(p.grad is None for p in head.parameters())
    return [parameter.main_grad.cpu().clone() for parameter in head.parameters()]


def fusion_on_rank(dtype: torch.dtype = torch.float32) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [(main_grads(tied, False, dtype), main_grads(tied, True, dtype)) for tied in (False, True)]
