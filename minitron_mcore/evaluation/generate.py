"""Greedy generation by a sharded model."""

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
    """Append `count` tokens greedily (collective); the same on all ranks.

    Each rank holds its shards of the model. There is no key/value cache: each token costs a pass over all tokens before it.

    Args:
        prompt: [B, P] int64, without padding.
        eos: stops when every row ends in it.

    Returns:
        [B, P + n] int64, n <= count.

    Raises:
        UserError: the prompt is empty, or the model has too few positions.
    """
    if not 0 < prompt.shape[1] <= arch.max_positions - count:
        raise UserError(
            f"a prompt of {prompt.shape[1]} tokens and {count} more: the model has {arch.max_positions} positions, and the "
            "prompt must not be empty."
        )
    tokens = prompt.to(process_groups.device())
    for _ in range(count):
        tokens = torch.cat([tokens, _next_token(model, arch, tokens)], dim=1)
        if eos is not None and (tokens[:, -1] == eos).all():
            break
    return tokens


def _next_token(model: Model, arch: Architecture, tokens: Tensor) -> Tensor:
    """The most likely next token [B, 1]."""
    tp, cp = process_groups.tp_group(), process_groups.cp_group()
    token = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)

    def on_output(hidden: Tensor, batch: Batch) -> None:
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp)
        # Zero except on the context-parallel rank that holds the last token.
        last = (hidden * batch["last"].t()[..., None]).sum(0)
        dist.all_reduce(last, group=cp)
        logits = gather_from_tensor_model_parallel_region(last @ model.head().t(), group=tp)
        token.copy_(logits[:, : arch.vocab].argmax(dim=1, keepdim=True))

    # Ranks split the positions evenly; causal attention ignores the padding after the last token.
    padded = F.pad(tokens, (0, -tokens.shape[1] % (2 * cp.size() * tp.size())))
    last = torch.zeros_like(padded)
    last[:, tokens.shape[1] - 1] = 1
    forward(model, [{"tokens": padded, "last": last}], on_output)
    return process_groups.from_last_stage(token)
