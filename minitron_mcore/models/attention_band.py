"""Sizes of the blocks in which attention with a sliding window is computed (see `layer_spec.banded_attention`). No torch import."""

BAND_ALIGNMENT = 16
"""Keys: a multiple of it is as many bytes as attention's kernels want their rows to begin at, in any dtype."""


def attention_band(queries: int, keys: int, window: int) -> tuple[int, int]:
    """Rows and columns of the mask of a block of queries in `models.spec.banded_attention`: a block's queries, and the keys that it
    meets at most."""
    rows = min(queries, max(128, min(1024, window // 2)) if window < keys else 128)
    columns = min(keys, rows + window + BAND_ALIGNMENT)
    return rows, -(-columns // BAND_ALIGNMENT) * BAND_ALIGNMENT
