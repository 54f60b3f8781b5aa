"""Generation by a sharded model.

A pass computes the tokens that all rows have beyond the key/value cache: first the prompts up to the end of the shortest, then one
position a pass. A row with a longer prompt gets a new token when its prompt is through. Under context parallelism there is no cache
(docs/limits.md), so each pass begins at the first token.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.errors import UserError
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.megatron_patches.key_value_cache import KeyValueCache
from minitron_mcore.parallel.schedule import Batch, forward

from megatron.core.tensor_parallel import (  # isort: skip
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

Choice = Callable[[Tensor, Sequence[int]], Tensor]
"""(logits [B, V], numbers of their rows) -> a token for each row, int64 [B]; the same on all tensor-parallel ranks."""


def greedy(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """The most likely tokens; see `Choice`."""
    return logits.argmax(dim=1)


class Sampling:
    """A `Choice` from the fewest tokens whose probabilities sum to `top_p` (nucleus sampling, arXiv 1904.09751).

    Args:
        seeds: one a row; a row's tokens depend on nothing else in the batch.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]):
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        probabilities, order = (
            (logits.double() / self.temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
        )
        sums = probabilities.cumsum(dim=1)
        kept = (sums - probabilities < self.top_p).sum(dim=1, keepdim=True)
        drawn = torch.stack([torch.rand(1, dtype=torch.float64, generator=self.generators[row]) for row in rows])
        at = torch.searchsorted(sums, drawn.to(sums.device) * sums.gather(1, kept - 1), right=True)
        return order.gather(1, at.minimum(kept - 1))[:, 0]


def generate(
    model: Model,
    arch: Architecture,
    prompts: Sequence[Sequence[int]],
    count: int,
    is_done: Callable[[list[int]], bool] = lambda new: False,
    choose: Choice = greedy,
) -> list[list[int]]:
    """Continue each prompt by at most `count` tokens (collective); the same on all ranks of a model replica.

    Each rank holds its shards of the model, and the keys and values of its heads and layers. Data-parallel ranks may have different
    prompts; those that finish first repeat passes, whose outputs are discarded, so that all make the same number.

    Args:
        prompts: B sequences of token ids; B is the same on all ranks.
        is_done: of a row's new tokens; its generation ends there.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: a prompt is empty, or the model has too few positions.
    """
    for prompt in prompts:
        if not 0 < len(prompt) <= arch.max_positions - count:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {count} more: the model has {arch.max_positions} positions, and the "
                "prompt must not be empty."
            )
    new: list[list[int]] = [[] for _ in prompts]
    longest = torch.tensor(max(map(len, prompts), default=0), device=process_groups.device())
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=process_groups.dp_group())
    passes = _Passes(model, arch, capacity=count + int(longest))
    active = [row for row in range(len(prompts)) if count]
    while (shape := _common_shape([len(prompts[row]) + len(new[row]) for row in active]))[0]:
        rows = {row: [*prompts[row], *new[row]] for row in active}
        for row, token in passes.next_tokens(rows, *shape, choose).items():
            new[row].append(token)
            if len(new[row]) == count or is_done(new[row]):
                active.remove(row)
    return new


def _common_shape(lengths: Sequence[int]) -> tuple[int, int]:
    """The most rows of any data-parallel rank, and the number of tokens that all rows of all of them have (collective)."""
    shape = torch.tensor([len(lengths), -min(lengths, default=2**31 - 1)], device=process_groups.device())
    dist.all_reduce(shape, dist.ReduceOp.MAX, group=process_groups.dp_group())
    return int(shape[0]), -int(shape[1])


class _Passes:
    """Forward passes over a batch of rows that grow, and become fewer.

    Args:
        capacity: most tokens of a row on any data-parallel rank.
    """

    def __init__(self, model: Model, arch: Architecture, capacity: int):
        self.model, self.arch = model, arch
        tp, cp = process_groups.tp_group().size(), process_groups.cp_group().size()
        # Ranks split the positions evenly; causal attention ignores the padding.
        self.multiple = 2 * cp * tp if cp > 1 else tp if model.config.sequence_parallel else 1
        self.capacity = capacity + self.multiple
        self.cache = KeyValueCache(self.capacity) if cp == 1 else None
        self.cached: list[int] = []
        """Row numbers of the last pass."""

    def next_tokens(self, rows: dict[int, list[int]], size: int, known: int, choose: Choice) -> dict[int, int]:
        """The next token, by row number, of the rows that have `known` tokens (collective).

        Args:
            rows: tokens by row number, a part of the last pass's.
            size: rows of the pass; those that this rank lacks are padding.
        """
        numbers = [*rows, *[-1] * (size - len(rows))]
        seen = self.cache.sequence_len_offset if self.cache else 0
        if self.cache and seen and numbers != self.cached:
            kept = [self.cached.index(row) if row in rows else 0 for row in numbers]
            self.cache = self.cache.take_rows(kept, self.capacity)
        self.cached = numbers
        tokens = torch.zeros(size, known - seen + (seen - known) % self.multiple, dtype=torch.int64)
        last = torch.zeros_like(tokens)
        for n, row in enumerate(rows.values()):
            tokens[n, : known - seen] = torch.tensor(row[seen:known])
        last[:, known - seen - 1] = 1
        due = [n for n, row in enumerate(rows.values()) if len(row) == known]
        chosen = self._choose(tokens, last, due, lambda logits: choose(logits, [numbers[n] for n in due]))
        if self.cache:
            self.cache.increment_sequence_len_offset(known - seen)
        return {numbers[n]: token for n, token in zip(due, chosen, strict=True)}

    def _choose(self, tokens: Tensor, last: Tensor, due: list[int], choose: Callable[[Tensor], Tensor]) -> list[int]:
        """`choose` of the logits [len(due), V] at the position that `last` [B, S] marks in `tokens` [B, S]."""
        tp, cp = process_groups.tp_group(), process_groups.cp_group()
        chosen = torch.zeros(len(due), dtype=torch.int64, device=process_groups.device())

        def on_output(hidden: Tensor, batch: Batch) -> None:
            if self.model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=tp)
            # Zero except on the context-parallel rank that holds the position.
            states = (hidden * batch["last"].t()[..., None]).sum(0)
            dist.all_reduce(states, group=cp)
            if due:
                logits = gather_from_tensor_model_parallel_region(states[due] @ self.model.head().t(), group=tp)
                chosen.copy_(choose(logits[:, : self.arch.vocab]))

        batch = {"tokens": tokens.to(chosen.device), "last": last.to(chosen.device)}
        forward(self.model, [batch], on_output, [self.cache] if self.cache else None)
        return process_groups.from_last_stage(chosen).tolist()
