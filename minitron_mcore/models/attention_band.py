"""Block sizes of `layer_spec.banded_attention`. Imports no torch, so that memory estimates can use them."""

BAND_ALIGNMENT = 16
"""Key positions; a multiple satisfies the row alignment of the attention kernels in any dtype."""


MASKS_KEPT = 4
"""Lists of masks under data.document_mask that `layer_spec` keeps for the other layers: of student and teacher, and of two parts
of a sequence under context parallelism."""


def attention_band(queries: int, keys: int, window: int) -> tuple[int, int]:
    """(rows, columns) of the mask of one block: its queries, and the most keys that they use."""
    rows = min(queries, max(128, min(1024, window // 2)) if window < keys else 128)
    columns = min(keys, rows + window + BAND_ALIGNMENT)
    return rows, -(-columns // BAND_ALIGNMENT) * BAND_ALIGNMENT
