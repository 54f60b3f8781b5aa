"""How the loss cuts its tokens: into chunks, whose logits exist at a time, and these into tiles. No torch import."""

import math
from collections.abc import Iterator

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Both logits of a chunk together. More makes longer products and adds to the head's gradient less often.

Every chunk but the first reads and writes the head's fp32 gradient: 8 V_r H bytes. With V 128,256 and H 3072 that is 0.94 ms of
an H100's memory bandwidth, 7 % of the 14 ms of products of the 2,048 tokens in 1 GiB, and it may overlap with these. 1 GiB of
logits and that gradient are 1.8 GB more than the bf16 gradient that is returned; 2 GiB would be 2.9 GB.
"""
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 32 << 20}
"""Elements of a tile: its four fp32 buffers stay near a CPU's core, or are enough to fill a GPU."""
TILE_BUFFERS = 4


def chunk_tokens(num_tokens: int, bytes_a_token: int, device: str) -> int:
    """Tokens whose logits, of so many bytes a token, fit into the budget, evened out over the chunks."""
    return even(num_tokens, CHUNK_BYTES[device], bytes_a_token)


def even(num_tokens: int, budget: int, bytes_a_token: int) -> int:
    """The same for a budget of so many bytes."""
    most = max(1, budget // bytes_a_token)
    return max(1, math.ceil(num_tokens / max(1, math.ceil(num_tokens / most))))


def tile_tokens(num_tokens: int, num_rows: int, device: str) -> int:
    """Tokens of a tile, with a logit for each of the head's rows on this rank."""
    return max(1, min(TILE_ELEMENTS[device] // num_rows, num_tokens))


def slices(length: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, length)) for first in range(0, length, size))
