"""Generation by a sharded model, without a key/value cache: each token costs a pass over all tokens before it."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.errors import UserError
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
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

    Each rank holds its shards of the model. Data-parallel ranks may have different prompts; those that finish first repeat passes,
    whose outputs are discarded, so that all make the same number.

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
    rows, active = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(count):
        longest = max((len(rows[row]) for row in active), default=0)
        shape = torch.tensor([len(active), longest], device=process_groups.device())
        dist.all_reduce(shape, dist.ReduceOp.MAX, group=process_groups.dp_group())
        if not shape[0]:
            break
        tokens = _next_tokens(model, arch, {row: rows[row] for row in active}, shape.tolist(), choose)
        for row, token in zip(active, tokens, strict=True):
            rows[row].append(token)
        active = [row for row in active if not is_done(rows[row][len(prompts[row]) :])]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _next_tokens(
    model: Model, arch: Architecture, rows: dict[int, list[int]], shape: Sequence[int], choose: Choice
) -> list[int]:
    """The next token of each row, by its number; a batch of `shape` [B, S] holds the rows of any data-parallel rank."""
    tp, cp = process_groups.tp_group(), process_groups.cp_group()
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=process_groups.device())

    def on_output(hidden: Tensor, batch: Batch) -> None:
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp)
        # Zero except on the context-parallel rank that holds a row's last token.
        last = (hidden * batch["last"].t()[..., None]).sum(0)
        dist.all_reduce(last, group=cp)
        logits = gather_from_tensor_model_parallel_region(last @ model.head().t(), group=tp)
        if rows:
            tokens.copy_(choose(logits[: len(rows), : arch.vocab], list(rows)))

    # Ranks split the positions evenly; causal attention ignores the padding after a row's last token.
    length = shape[1] + -shape[1] % (2 * cp.size() * tp.size())
    padded = torch.zeros(shape[0], length, dtype=torch.int64)
    last = torch.zeros_like(padded)
    for n, row in enumerate(rows.values()):
        padded[n, : len(row)], last[n, len(row) - 1] = torch.tensor(row), 1
    forward(model, [{"tokens": padded.to(tokens.device), "last": last.to(tokens.device)}], on_output)
    return process_groups.from_last_stage(tokens).tolist()
