"""Greedy continuation of a text by a sharded checkpoint: to read what a model says, and to hold it against other runtimes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_mcore import runtime
from minitron_mcore.errors import UserError
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import LanguageModel
from minitron_mcore.schedule import Batch, forward

from megatron.core.tensor_parallel import (  # isort: skip
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)


def generate(model: LanguageModel, arch: Architecture, prompt: Tensor, count: int, eos: int | None = None) -> Tensor:
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
    tokens = prompt.to(runtime.device())
    for _ in range(count):
        tokens = torch.cat([tokens, _next(model, arch, tokens)], dim=1)
        if eos is not None and (tokens[:, -1] == eos).all():
            break
    return tokens


def _next(model: LanguageModel, arch: Architecture, tokens: Tensor) -> Tensor:
    """[B, 1]"""
    batch, length = tokens.shape
    found = torch.zeros(batch, 1, dtype=torch.int64, device=tokens.device)

    def on_output(hidden: Tensor, _: Batch) -> None:
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=runtime.tp_group())
        logits = gather_from_tensor_model_parallel_region(
            hidden[length - 1] @ model.head().t(), group=runtime.tp_group()
        )
        found.copy_(logits[:, : arch.vocab].argmax(dim=1, keepdim=True))

    # Under sequence parallelism ranks share the positions evenly; those behind the last token change nothing before them.
    forward(model, [{"tokens": F.pad(tokens, (0, -length % runtime.tp_group().size()))}], on_output)
    return runtime.from_last_stage(found)
