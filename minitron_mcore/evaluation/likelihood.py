"""Log-likelihoods of tokens under a sharded model."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import batched, count, groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch, forward

from megatron.core.tensor_parallel import (  # isort: skip
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

_CHUNK_LOGITS = 2**25  # fp32 logits held at once: 128 MB
_LENGTH_MULTIPLE = 32  # of padded sequences


class Request(NamedTuple):
    """Tokens to score: each label is predicted from the tokens up to its position."""

    tokens: Sequence[int]
    """Input of the model."""
    positions: Sequence[int]
    labels: Sequence[int]


class Likelihoods:
    """Requests as batches for a sharded model.

    Requests with the same tokens share a row; rows are sorted by length. Data-parallel rank r takes every dp-th micro-batch, and
    all ranks make the same number of passes of the same shapes. The ranks of a model replica process the same rows.
    """

    def __init__(self, model: Model, arch: Architecture, requests: Sequence[Request], micro_batch: int):
        self.model, self.arch, self.requests = model, arch, requests
        self.batches = list(self._batches(micro_batch))

    def _batches(self, micro_batch: int) -> Iterator[Batch]:
        config, dp = self.model.config, process_groups.dp_group()
        multiple = math.lcm(_LENGTH_MULTIPLE, 2 * config.context_parallel_size * config.tensor_model_parallel_size)
        sharers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(self.requests):
            sharers[tuple(request.tokens)].append(number)
        rows = sorted(sharers.items(), key=lambda row: len(row[0]))
        batch_size = micro_batch * dp.size()
        own = slice(dp.rank() * micro_batch, (dp.rank() + 1) * micro_batch)
        for some in batched(rows, batch_size):
            length = -(-len(some[-1][0]) // multiple) * multiple
            batch = {"tokens": torch.zeros(batch_size, length, dtype=torch.int64)}
            for plane in range(max(len(numbers) for _, numbers in some)):
                labels = torch.zeros(batch_size, length, dtype=torch.int64)
                predicted, number = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels[:, 0])
                for row, (tokens, numbers) in enumerate(some):
                    batch["tokens"][row, : len(tokens)] = torch.tensor(tokens)
                    if plane < len(numbers):
                        number[row] = numbers[plane]
                        request = self.requests[numbers[plane]]
                        labels[row, request.positions] = torch.tensor(request.labels)
                        predicted[row, request.positions] = True
                batch |= {f"labels {plane}": labels, f"predicted {plane}": predicted, f"request {plane}": number}
            yield {key: value[own].to(process_groups.device()) for key, value in batch.items()}

    def compute(self) -> tuple[Tensor, Tensor]:
        """Score all requests (collective).

        Returns:
            Sum of log p over the labels of each request, in nats, fp64 [N], and whether every label is the model's most likely
            token, bool [N]; on the CPU, the same on every rank.
        """
        total = torch.zeros(len(self.requests), 2, dtype=torch.float64, device=process_groups.device())

        def on_output(hidden: Tensor, batch: Batch) -> None:
            if self.model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
            for plane in count():
                if (at := batch.get(f"predicted {plane}")) is None:
                    break
                requests = batch[f"request {plane}"][:, None].expand_as(at)[at]
                found = self._log_p(hidden.transpose(0, 1)[at], batch[f"labels {plane}"][at])
                total.index_add_(0, requests, found.double())

        for _, same in groupby(self.batches, key=lambda batch: batch["tokens"].shape):
            forward(self.model, list(same), on_output)
        process_groups.from_last_stage(total)
        dist.all_reduce(total, group=process_groups.dp_cp_group())
        return total[:, 0].cpu(), (total[:, 1] == 0).cpu()

    def _log_p(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p of `labels` [T], and 1 where another token is more likely: [T, 2] from hidden states [T, H], over the sharded head
        (collective over tensor-parallel ranks)."""
        head, tp = self.model.head(), process_groups.tp_group()
        first = tp.rank() * len(head)
        padding = torch.arange(len(head), device=head.device) >= self.arch.vocab - first
        rows = max(1, _CHUNK_LOGITS // len(head))
        chunks = []
        for states, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = (states @ head.t()).float().masked_fill_(padding, -torch.inf)
            own = targets[:, None] - first
            held = (own >= 0) & (own < len(head))
            label = logits.gather(1, own.clamp(0, len(head) - 1)).masked_fill(~held, -torch.inf)
            best = torch.cat([logits.amax(1, keepdim=True), label], dim=1)
            dist.all_reduce(best, dist.ReduceOp.MAX, group=tp)
            log_p = -vocab_parallel_cross_entropy(logits, targets, tp_group=tp)
            chunks.append(torch.stack([log_p, (best[:, 1] < best[:, 0]).float()], dim=1))
        return torch.cat(chunks)
