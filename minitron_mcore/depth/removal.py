"""Metrics of a model without some of its blocks, without a second copy of the model and without full logits in memory.

`RemovalEvaluator` keeps the full model's final hidden states: each last-stage rank holds [S, B, H] of its own windows (its rows
of S under sequence parallelism) in the run's dtype. From these and the hidden states h without some blocks follow, per token:

    KL     from both distributions, in chunks of tokens (`distill.losses`)
    MSE    sum over the vocabulary of (M_full - M)^2 = d^T G d with d = h_full - h and G = W^T W [H, H], since both models share
           the head W; each tensor-parallel rank computes G of its own rows of W, without the padding

A point costs one forward pass over the windows and one over the questions' options. The full model costs one more pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mcore.distill.losses import FactoredLogits, distillation_loss
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import perplexity
from minitron_mcore.evaluation.multiple_choice import MultipleChoice
from minitron_mcore.models import build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import hang_watchdog, process_groups
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.parallel.schedule import forward

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip

_CHUNK_TOKENS = 4096  # fp32 differences of hidden states held at once


@contextmanager
def skip_blocks(model: Model, arch: Architecture, blocks: Sequence[int]) -> Iterator[None]:
    """Replace blocks by the identity inside the `with` statement; each rank replaces the layers that it holds.

    Args:
        blocks: numbers in the whole model, from 0.

    Raises:
        UserError: a block that the model does not have.
    """
    if absent := sorted(set(blocks) - set(range(arch.blocks))):
        raise UserError(f"block {absent[0]} does not exist: the model has blocks 0 to {arch.blocks - 1}.")
    skipped = [layer for layer in build.layers(model) if arch.layers[layer.layer_number - 1][0] in blocks]
    for layer in skipped:
        layer.forward = _identity
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward


def _identity(hidden_states: Tensor, **unused) -> tuple[Tensor, None]:
    return hidden_states, None


class RemovalEvaluator:
    """Evaluates a model without some of its blocks on held-out windows and, optionally, questions (collective).

    Data-parallel ranks split the windows; the ranks of a model replica process the same ones.

    Args:
        windows: [n, S] each, the same on all ranks.
        micro_batch: windows, and options of questions, per forward pass.
    """

    def __init__(
        self,
        model: Model,
        arch: Architecture,
        windows: perplexity.Windows,
        micro_batch: int,
        scorer: MultipleChoice | None = None,
    ):
        self.model, self.arch, self.scorer = model, arch, scorer
        self.num_predicted = int(windows.mask.sum())
        dp = process_groups.dp_group()
        padding = -len(windows.tokens) % (micro_batch * dp.size())
        tokens, mask = F.pad(windows.tokens, (0, 0, 0, padding)), F.pad(windows.mask, (0, 0, 0, padding))
        whole = {"tokens": tokens, "labels": tokens.roll(-1, 1), "predicted": F.pad(mask[:, 1:], (0, 1))}
        self.batches = [
            {key: value[start : start + micro_batch].to(process_groups.device()) for key, value in whole.items()}
            for start in range(dp.rank() * micro_batch, len(tokens), micro_batch * dp.size())
        ]
        self._full_squares: Tensor | None = None  # [], sum of squares of the full model's logits
        self._gram: Tensor | None = None  # [H, H] fp32, G of this rank's rows

    def __call__(self, dropped: Sequence[int]) -> dict[str, Any]:
        """The point (see `depth.study`) of the model without these blocks; the same on every rank."""
        if self._full_squares is None:
            self._run_full_model()
        sums = torch.zeros(3, dtype=torch.float64, device=process_groups.device())

        def on_output(hidden: Tensor, batch: dict[str, Any]) -> None:
            hidden, full = self._flatten(hidden), self._flatten(batch["full"])
            predicted = batch["predicted"].t().reshape(-1).float()
            head, labels = self.model.head(), batch["labels"].t().reshape(-1)
            sizes = {"vocab_size": self.arch.vocab, "tp_group": process_groups.tp_group()}
            student, teacher = FactoredLogits(hidden, head), FactoredLogits(full, head)
            _, stats = distillation_loss(student, teacher, labels, predicted, **sizes)
            sums.add_(torch.stack([stats[1].double(), stats[0].double(), self._squares(predicted, full, hidden)]))

        with (
            skip_blocks(self.model, self.arch, dropped),
            hang_watchdog.phase(Phase.step, lambda: f"the forward passes without blocks {sorted(dropped)}"),
        ):
            forward(self.model, self.batches, on_output)
            loss, kl, squares = self._reduce(sums).tolist()
            accuracy = self.scorer.accuracy() if self.scorer else None
        return {
            "dropped": sorted(dropped),
            "loss": loss / self.num_predicted,
            "kl": kl / self.num_predicted,
            "mse": squares / float(self._full_squares),
            "accuracy": accuracy,
        }

    def _run_full_model(self) -> None:
        """Add the full model's final hidden states to the batches, under "full"."""
        states: list[Tensor] = []
        total = torch.zeros(3, dtype=torch.float64, device=process_groups.device())
        if process_groups.is_last_stage():
            self._gram = self._make_gram()

        def on_output(hidden: Tensor, batch: dict[str, Any]) -> None:
            states.append(hidden)
            total[2] += self._squares(batch["predicted"].t().reshape(-1).float(), self._flatten(hidden))

        forward(self.model, self.batches, on_output)
        for batch, full in zip(self.batches, states, strict=bool(states)):
            batch["full"] = full
        self._full_squares = self._reduce(total)[2]

    def _make_gram(self) -> Tensor:
        head = self.model.head()
        own = head[: max(0, self.arch.vocab - process_groups.tp_group().rank() * len(head))]
        gram = torch.zeros(head.shape[1], head.shape[1], device=head.device)
        for rows in own.detach().split(_CHUNK_TOKENS):
            gram.addmm_(rows.float().t(), rows.float())
        return gram

    def _squares(self, predicted: Tensor, full: Tensor, hidden: Tensor | None = None) -> Tensor:
        """This rank's part of the sum of squares of the full model's logits or, with `hidden`, of their difference; fp64."""
        total = torch.zeros((), dtype=torch.float64, device=full.device)
        for at in torch.arange(len(full), device=full.device).split(_CHUNK_TOKENS):
            d = full[at].float() if hidden is None else full[at].float() - hidden[at].float()
            total += predicted[at].double() @ ((d @ self._gram) * d).sum(1).double()
        return total

    def _flatten(self, hidden: Tensor) -> Tensor:
        """[S_r, B, H] -> [S B, H], the same on all tensor-parallel ranks."""
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
        return hidden.flatten(0, 1)

    def _reduce(self, sums: Tensor) -> Tensor:
        """[loss, KL, squares] summed over all ranks: squares are per vocabulary shard, all three per replica and per
        context-parallel rank."""
        dist.all_reduce(sums[2:], group=process_groups.tp_group())
        process_groups.from_last_stage(sums)
        dist.all_reduce(sums, group=process_groups.dp_cp_group())
        return sums
