"""Floating-point operations and memory of serving a model, computed from its architecture. Imports no torch.

A multiplication and an addition are two operations; norms, activations and the softmax are not counted. `parameter_table` counts
parameters, `estimate` the memory of training.
"""

import functools
import math

from minitron_mcore.config.search import BudgetConfig, Storage
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture

BYTES = {Storage.fp32: 4.0, Storage.bf16: 2.0, Storage.fp8: 1.0, Storage.int4: 0.5}
"""Bytes per number, without the scales and zero points of quantized formats."""


def weight_bytes(arch: Architecture, storage: Storage = Storage.bf16) -> int:
    """Bytes of all weights."""
    return round(parameter_table.count(arch) * BYTES[storage])


def kv_cache_bytes(arch: Architecture, context: int = 1, batch: int = 1, storage: Storage = Storage.bf16) -> int:
    """Bytes of the keys and values of `batch` sequences of `context` tokens; a sliding window limits the tokens kept."""
    kept = min(context, arch.window or context)
    return round(2 * len(arch.blocks_with("attention")) * arch.groups * arch.head_dim * kept * batch * BYTES[storage])


def prefill_flops(arch: Architecture, context: int, batch: int = 1) -> int:
    """Operations of a forward pass over `batch` prompts of `context` tokens, with the output head on each last token only."""
    body = context * forward_flops(arch, context, head=False)
    return round(batch * (body + 2 * arch.vocab * arch.hidden))


def decode_flops(arch: Architecture, context: int, batch: int = 1) -> int:
    """Operations of generating one token for each of `batch` sequences; it attends to `context` positions, including its own."""
    attended = min(context, arch.window or context)
    weights = matrix_parameters(arch) + arch.vocab * arch.hidden
    return batch * (2 * weights + 4 * len(arch.blocks_with("attention")) * arch.heads * arch.head_dim * attended)


def figures(arch: Architecture, budget: BudgetConfig) -> dict[str, int]:
    """All counts by name, at the context, batch and storage formats of `budget`."""
    context, batch = budget.context, budget.batch
    return {
        "parameters": parameter_table.count(arch),
        "without_embeddings": parameter_table.count(arch, embeddings=False),
        "weight_bytes": weight_bytes(arch, budget.weights),
        "kv_cache_bytes": kv_cache_bytes(arch, context, batch, budget.kv_cache),
        "prefill_flops": prefill_flops(arch, context, batch),
        "decode_flops": decode_flops(arch, context, batch),
    }


@functools.cache
def matrix_parameters(arch: Architecture) -> int:
    """Number of matrix weights that one token uses in all blocks: of the experts, only those it is routed to."""
    share = arch.experts_per_token / arch.experts if arch.experts else 1
    inside = (p for p in parameter_table.parameters(arch) if p.block is not None and len(p.shape) == 2)
    return round(sum(math.prod(p.shape) * (1 if p.expert is None else share) for p in inside))


def forward_flops(arch: Architecture, sequence_length: int, head: bool = True) -> float:
    """Operations of a forward pass per token, averaged over a sequence; forward and backward are three times that.

    Two per matrix weight, and attention's two products over the positions that the causal mask and the window allow.
    """
    window = min(arch.window or sequence_length, sequence_length)
    attended = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
    weights = matrix_parameters(arch) + head * arch.vocab * arch.hidden
    return 2 * weights + 4 * len(arch.blocks_with("attention")) * arch.heads * arch.head_dim * attended
