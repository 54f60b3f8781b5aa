"""What a model loses without some of its blocks, measured: no second copy of it is made, and no logits are held.

Beside the model a study keeps the full model's final hidden states: on each last-stage rank [S, B, H] of its own windows, its
rows of S under sequence parallelism, in the run's dtype. From them and the states without some blocks h follow, token by token,

    KL     both distributions, a chunk of tokens at a time (`distill.losses`)
    MSE    sum over the vocabulary of (M_full - M)^2 = d^T G d with d = h_full - h and the head's G = W^T W [H, H], as both
           models have the same head W; each tensor-parallel rank makes G of its own rows of W, without the padding

A point costs one forward pass over the windows and one over the questions' options; the full model one more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import forward

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip

PARTS = ("attention", "mlp")
_CHUNK_TOKENS = 4096  # fp32 differences of hidden states held at once


@contextmanager
def skipping(model: Model, arch: Architecture, blocks: Sequence[int], parts: Sequence[str] = PARTS) -> Iterator[None]:
    """Inside the block the residual stream goes past these blocks, as if they were deleted; each rank skips those it holds.

    Args:
        blocks: counted from 0 over the whole model.
        parts: "attention", "mlp": which layer of each of the blocks; both is the whole block.

    Raises:
        UserError: a block that the model doesn't have, another part.
    """
    if absent := sorted(set(blocks) - set(range(arch.blocks))):
        raise UserError(f"block {absent[0]} is not there: the model has blocks 0 to {arch.blocks - 1}.")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"a block has no part {unknown[0]!r}: give some of {', '.join(PARTS)}.")
    gone = []
    for layer in build.layers(model):
        block, part = arch.layers[layer.layer_number - 1]
        if block in blocks and part in parts:
            gone.append(layer)
    for layer in gone:
        layer.forward = _past
    try:
        yield
    finally:
        for layer in gone:
            del layer.forward


def _past(hidden_states: Tensor, **unused) -> tuple[Tensor, None]:
    return hidden_states, None


class Meter:
    """Measures a model without some of its blocks on one set of windows, and maybe questions (collective).

    Data-parallel ranks share out the windows; ranks of a model replica see the same ones.

    Args:
        windows: [n, S] each, the same on all ranks.
        micro_batch: windows, and options of questions, of a forward pass.
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
        missing = -len(windows.tokens) % (micro_batch * dp.size())
        tokens, mask = F.pad(windows.tokens, (0, 0, 0, missing)), F.pad(windows.mask, (0, 0, 0, missing))
        whole = {"tokens": tokens, "labels": tokens.roll(-1, 1), "predicted": F.pad(mask[:, 1:], (0, 1))}
        self.batches = [
            {key: value[start : start + micro_batch].to(process_groups.device()) for key, value in whole.items()}
            for start in range(dp.rank() * micro_batch, len(tokens), micro_batch * dp.size())
        ]
        self._full: Tensor | None = None  # [], the sum of squares of the full model's logits
        self._gram: Tensor | None = None  # [H, H] fp32, G of this rank's rows

    def __call__(self, dropped: Sequence[int]) -> dict:
        """The point (see `study`) without these blocks; the same on every rank."""
        if self._full is None:
            self._keep()
        sums = torch.zeros(3, dtype=torch.float64, device=process_groups.device())

        def on_output(hidden: Tensor, batch: dict) -> None:
            hidden, full = self._states(hidden), self._states(batch["full"])
            predicted = batch["predicted"].t().reshape(-1).float()
            head, labels = self.model.head(), batch["labels"].t().reshape(-1)
            tp = process_groups.tp_group()
            sizes = {"vocab_size": self.arch.vocab, "tp_group": tp}
            student, teacher = FactoredLogits(hidden, head), FactoredLogits(full, head)
            _, stats = distillation_loss(student, teacher, labels, predicted, **sizes)
            sums.add_(torch.stack([stats[1].double(), stats[0].double(), self._squares(predicted, full, hidden)]))

        with skipping(self.model, self.arch, dropped):
            forward(self.model, self.batches, on_output)
            loss, kl, squares = self._sum(sums).tolist()
            accuracy = self.scorer.accuracy() if self.scorer else None
        return {
            "dropped": sorted(dropped),
            "loss": loss / self.num_predicted,
            "kl": kl / self.num_predicted,
            "mse": squares / float(self._full),
            "accuracy": accuracy,
        }

    def _keep(self) -> None:
        """Run the full model; its final hidden states join the batches."""
        kept: list[Tensor] = []
        total = torch.zeros(3, dtype=torch.float64, device=process_groups.device())
        if process_groups.is_last_stage():
            self._gram = self._make_gram()

        def on_output(hidden: Tensor, batch: dict) -> None:
            kept.append(hidden)
            total[2] += self._squares(batch["predicted"].t().reshape(-1).float(), self._states(hidden))

        forward(self.model, self.batches, on_output)
        for batch, full in zip(self.batches, kept, strict=bool(kept)):
            batch["full"] = full
        self._full = self._sum(total)[2]

    def _make_gram(self) -> Tensor:
        head = self.model.head()
        own = head[: max(0, self.arch.vocab - process_groups.tp_group().rank() * len(head))]
        gram = torch.zeros(head.shape[1], head.shape[1], device=head.device)
        for rows in own.detach().split(_CHUNK_TOKENS):
            gram.addmm_(rows.float().t(), rows.float())
        return gram

    def _squares(self, predicted: Tensor, full: Tensor, hidden: Tensor | None = None) -> Tensor:
        """This rank's part of the sum of squares of the full model's logits, or of their difference; fp64."""
        total = torch.zeros((), dtype=torch.float64, device=full.device)
        for at in torch.arange(len(full), device=full.device).split(_CHUNK_TOKENS):
            d = full[at].float() if hidden is None else full[at].float() - hidden[at].float()
            total += predicted[at].double() @ ((d @ self._gram) * d).sum(1).double()
        return total

    def _states(self, hidden: Tensor) -> Tensor:
        """[S_r, B, H] -> [S B, H], the same on all tensor-parallel ranks."""
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
        return hidden.flatten(0, 1)

    def _sum(self, sums: Tensor) -> Tensor:
        """[loss, KL, squares] over all ranks: each vocabulary part has its own squares, each replica its own windows,
        each context-parallel rank its share of them."""
        dist.all_reduce(sums[2:], group=process_groups.tp_group())
        process_groups.from_last_stage(sums)
        dist.all_reduce(sums, group=process_groups.dp_cp_group())
        return sums
