"""What a served model costs, from its architecture alone: bytes of weights, keys and values, and floating-point operations of
reading a prompt and of writing on. No torch import. Parameters are counted in `models.table`, training in `plan.cost`.

An operation is a multiplication or an addition; norms, activations and the softmax are left out, as is usual.
"""

import functools
import math

from minitron_mcore.config.search import BudgetConfig, Storage
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture

BYTES = {Storage.fp32: 4.0, Storage.bf16: 2.0, Storage.fp8: 1.0, Storage.int4: 0.5}
"""Of one number. Scales and zero points of quantized formats are not counted."""


def weight_bytes(arch: Architecture, storage: Storage = Storage.bf16) -> int:
    return round(parameter_table.count(arch) * BYTES[storage])


def kv_cache_bytes(arch: Architecture, context: int = 1, batch: int = 1, storage: Storage = Storage.bf16) -> int:
    """Keys and values of `batch` sequences of `context` tokens, one token of one sequence by default; a sliding window keeps no
    more than its own positions."""
    kept = min(context, arch.window or context)
    return round(2 * len(arch.blocks_with("attention")) * arch.groups * arch.head_dim * kept * batch * BYTES[storage])


def prefill_flops(arch: Architecture, context: int, batch: int = 1) -> int:
    """Of reading `batch` prompts of `context` tokens; only the last token of each goes through the output head."""
    body = context * forward_flops(arch, context, head=False)
    return round(batch * (body + 2 * arch.vocab * arch.hidden))


def decode_flops(arch: Architecture, context: int, batch: int = 1) -> int:
    """Of one more token for each of `batch` sequences, which attends to `context` positions, its own among them."""
    attended = min(context, arch.window or context)
    weights = matrix_parameters(arch) + arch.vocab * arch.hidden
    return batch * (2 * weights + 4 * len(arch.blocks_with("attention")) * arch.heads * arch.head_dim * attended)


def figures(arch: Architecture, budget: BudgetConfig) -> dict[str, int]:
    """All counts of an architecture at the context and batch of a budget, by name."""
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
    """Weights of the matrices that one token is multiplied with in all blocks."""
    share = arch.experts_per_token / arch.experts if arch.experts else 1
    inside = (p for p in parameter_table.parameters(arch) if p.block is not None and len(p.shape) == 2)
    return round(sum(math.prod(p.shape) * (1 if p.expert is None else share) for p in inside))


def forward_flops(arch: Architecture, sequence_length: int, head: bool = True) -> float:
    """Of one token, on average over a sequence: two a weight of every matrix that it meets, and attention's two products over
    the positions that the causal mask (and the window) leaves. A training step is three times that."""
    window = min(arch.window or sequence_length, sequence_length)
    attended = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
    weights = matrix_parameters(arch) + head * arch.vocab * arch.hidden
    return 2 * weights + 4 * len(arch.blocks_with("attention")) * arch.heads * arch.head_dim * attended
