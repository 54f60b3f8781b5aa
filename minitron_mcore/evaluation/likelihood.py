"""Log-likelihoods of tokens under a sharded model."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import batched, count, zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.megatron_patches.key_value_cache import KeyValueCache
from minitron_mcore.parallel.schedule import Batch, forward

from megatron.core.tensor_parallel import (  # isort: skip
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

_CHUNK_LOGITS = 2**25  # fp32 logits held at once: 128 MB
_LEAST_SHARED = 16  # tokens for which a pass of their own is worth its cost
_FAMILIES_PER_STAGE = 2  # in one pipeline run, if there is a pipeline


class Request(NamedTuple):
    """Tokens to score: each label is predicted from the tokens up to its position."""

    tokens: Sequence[int]
    """Input of the model."""
    positions: Sequence[int]
    labels: Sequence[int]


class _Family(NamedTuple):
    """Rows that begin with the same tokens, which are computed once."""

    shared: int
    """Number of these tokens."""
    rows: list[int]


class Likelihoods:
    """Requests as batches for a sharded model.

    Requests with the same tokens share a row. Rows that begin alike form a family: one pass computes what they share, as a
    key/value cache, and further passes of up to `micro_batch` rows the rest of each. Other rows are sorted by length.
    Data-parallel rank r takes every dp-th family, and all ranks make the same number of passes of the same shapes. The ranks of a
    model replica process the same rows.
    """

    def __init__(self, model: Model, arch: Architecture, requests: Sequence[Request], micro_batch: int):
        self.model, self.arch, self.requests, self.micro_batch = model, arch, requests, micro_batch
        config = model.config
        self.multiple = 2 * config.context_parallel_size * config.tensor_model_parallel_size
        sharers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            sharers[tuple(request.tokens)].append(number)
        self.rows = list(sharers.items())
        self.families = sorted(self._families(), key=lambda family: family.shared)

    def _families(self) -> Iterator[_Family]:
        """Neighbours in the order of tokens share a family where that saves tokens; rows without one form families of length 0."""
        families: list[_Family] = []
        for row in sorted(range(len(self.rows)), key=lambda row: self.rows[row][0]):
            tokens, numbers = self.rows[row]
            # What is scored is not shared.
            start = min(
                self.requests[n].positions[0] if self.requests[n].positions else len(tokens) - 1 for n in numbers
            )
            if families:
                shared, others = families[-1]
                common = min(shared, start, len(os.path.commonprefix([self.rows[others[-1]][0], tokens])))
                if common >= _LEAST_SHARED and common > (len(others) - 1) * (shared - common):
                    families[-1] = _Family(common, [*others, row])
                    continue
            families.append(_Family(start, [row]))
        has_cache, alone = self.model.config.context_parallel_size == 1, []
        for family in families:
            if has_cache and len(family.rows) > 1:
                yield family
            else:
                alone += family.rows
        for rows in batched(sorted(alone, key=lambda row: len(self.rows[row][0])), self.micro_batch):
            yield _Family(0, list(rows))

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

        dp, stages = process_groups.dp_group(), process_groups.pp_group().size()
        own = 1 if stages == 1 else _FAMILIES_PER_STAGE * stages
        for some in batched(self.families, own * dp.size()):
            self._score([*some, *[_Family(0, [])] * (own * dp.size() - len(some))], on_output)
        process_groups.from_last_stage(total)
        dist.all_reduce(total, group=process_groups.dp_cp_group())
        return total[:, 0].cpu(), (total[:, 1] == 0).cpu()

    def _score(self, families: Sequence[_Family], on_output: Callable[[Tensor, Batch], None]) -> None:
        """Forward passes over families of all data-parallel ranks, the same number for each (collective)."""
        dp, shared = process_groups.dp_group(), max(family.shared for family in families)
        own, caches = families[dp.rank() :: dp.size()], None
        if shared:
            tokens = torch.zeros(len(own), 1, self._padded(shared), dtype=torch.int64)
            for row, family in zip(tokens, own, strict=True):
                if family.rows:
                    row[0, : family.shared] = torch.tensor(self.rows[family.rows[0]][0][: family.shared])
            caches = [KeyValueCache(tokens.shape[2]) for _ in own]
            batches = [{"tokens": each} for each in tokens.to(process_groups.device())]
            forward(self.model, batches, lambda hidden, batch: None, caches)
            for cache, family in zip(caches, own, strict=True):
                cache.sequence_len_offset = family.shared
        parts = [list(batched(self._by_length(family.rows), self.micro_batch)) for family in families]
        for some in zip_longest(*parts, fillvalue=()):
            size = max(map(len, some))
            length = self._padded(
                max(
                    len(self.rows[row][0]) - family.shared
                    for family, rows in zip(families, some, strict=True)
                    for row in rows
                )
            )
            pairs = list(zip(own, some[dp.rank() :: dp.size()], strict=True))
            batches = [self._batch(family.shared, rows, size, length) for family, rows in pairs]
            copies = caches and [
                cache.take_rows([0] * size, family.shared + length) for cache, family in zip(caches, own, strict=True)
            ]
            forward(self.model, batches, on_output, copies)

    def _by_length(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda row: len(self.rows[row][0]))

    def _padded(self, length: int) -> int:
        """The least length that the ranks can split."""
        return length + -length % self.multiple

    def _batch(self, first: int, rows: Sequence[int], size: int, length: int) -> Batch:
        """The tokens of rows from position `first` on, and what is scored there; [size, length] with padding."""
        tokens = torch.zeros(size, length, dtype=torch.int64)
        batch = {"tokens": tokens}
        for plane in range(max((len(self.rows[row][1]) for row in rows), default=0)):
            labels = torch.zeros_like(tokens)
            predicted, number = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels[:, 0])
            for n, row in enumerate(rows):
                own, numbers = self.rows[row]
                tokens[n, : len(own) - first] = torch.tensor(own[first:])
                if plane < len(numbers):
                    number[n] = numbers[plane]
                    request = self.requests[numbers[plane]]
                    positions = [position - first for position in request.positions]
                    labels[n, positions] = torch.tensor(request.labels)
                    predicted[n, positions] = True
            batch |= {f"labels {plane}": labels, f"predicted {plane}": predicted, f"request {plane}": number}
        return {key: value.to(process_groups.device()) for key, value in batch.items()}

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
