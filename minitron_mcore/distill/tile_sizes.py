"""Sizes of the loss's chunks (tokens whose logits exist at a time) and of the tiles within a chunk. No torch import."""

import math
from collections.abc import Iterator

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Default budget for both models' logits of a chunk. A larger one gives longer products and fewer additions to the head's
gradient.

Every chunk but the first reads and writes the head's fp32 gradient: 8 V_r H bytes. With V 128,256 and H 3072 that takes 0.94 ms of
an H100's memory bandwidth, 7 % of the 14 ms of products for the 2,048 tokens of 1 GiB. 1 GiB of logits and the fp32 gradient
are 1.8 GB more than the bf16 gradient that is returned; a budget of 2 GiB would make it 2.9 GB.
"""
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 32 << 20}
"""Elements of a tile: its four fp32 buffers fit into a CPU core's cache, or are enough to fill a GPU."""
TILE_BUFFERS = 4


def chunk_tokens(num_tokens: int, row_bytes: int, budget: int) -> int:
    """Tokens of a chunk whose logits, `row_bytes` a token, fit into `budget` bytes; all chunks have about the same size."""
    most = max(1, budget // row_bytes)
    return max(1, math.ceil(num_tokens / max(1, math.ceil(num_tokens / most))))


def tile_tokens(num_tokens: int, num_rows: int, device: str) -> int:
    """Tokens of a tile, with a logit for each of the head's `num_rows` rows on this rank."""
    return max(1, min(TILE_ELEMENTS[device] // num_rows, num_tokens))


def slices(length: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, length)) for first in range(0, length, size))
