"""Greedy continuation of a text by a sharded checkpoint: to read what a model says, and to hold it against other runtimes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
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


def generate(model: Model, arch: Architecture, prompt: Tensor, count: int, eos: int | None = None) -> Tensor:
    """The likeliest token, `count` times over, each after all before it (collective; the same on all ranks).

    Each rank holds its shard of the model. No keys and values are kept: every token costs a pass over all before it.

    Args:
        prompt: [B, P] int64, rows of one length.
        eos: ends the text early where every row has it in its last place.

    Returns:
        [B, P + n] int64, n <= count.

    Raises:
        UserError: no prompt, or more tokens than the model has positions.
    """
    if not 0 < prompt.shape[1] <= arch.max_positions - count:
        raise UserError(
            f"a prompt of {prompt.shape[1]} tokens and {count} more: the model has {arch.max_positions} positions, and the "
            "prompt must not be empty."
        )
    tokens = prompt.to(process_groups.device())
    for _ in range(count):
        tokens = torch.cat([tokens, _next(model, arch, tokens)], dim=1)
        if eos is not None and (tokens[:, -1] == eos).all():
            break
    return tokens


def _next(model: Model, arch: Architecture, tokens: Tensor) -> Tensor:
    """[B, 1]"""
    tp, cp = process_groups.tp_group(), process_groups.cp_group()
    found = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)

    def on_output(hidden: Tensor, batch: Batch) -> None:
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp)
        last = (hidden * batch["last"].t()[..., None]).sum(
            0
        )  # zeros but on the context-parallel rank that holds the token
        dist.all_reduce(last, group=cp)
        logits = gather_from_tensor_model_parallel_region(last @ model.head().t(), group=tp)
        found.copy_(logits[:, : arch.vocab].argmax(dim=1, keepdim=True))

    # Ranks that share the positions share them evenly; those behind the last token change nothing before them.
    padded = F.pad(tokens, (0, -tokens.shape[1] % (2 * cp.size() * tp.size())))
    last = torch.zeros_like(padded)
    last[:, tokens.shape[1] - 1] = 1
    forward(model, [{"tokens": padded, "last": last}], on_output)
    return process_groups.from_last_stage(found)
