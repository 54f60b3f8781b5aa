"""Check of the counts in a GGUF file's header against the file's size and the limits below.

The gguf package creates objects for all array elements that a header claims, even beyond the end of the file.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path

MAX_FIELDS = MAX_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 20
"""Of all arrays together. Llama 3's tokens, types and merges have half as many."""
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> bytes per value."""


def check(path: Path) -> None:
    """
    Raises:
        ValueError, struct.error: a count exceeds the file or a limit, or a value type is unknown.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"
        tensors, fields = struct.unpack_from(f"{order}QQ", data, 8)
        _check_limit("tensors", tensors, MAX_TENSORS)
        _check_limit("fields", fields, MAX_FIELDS)
        position, elements = 24, 0
        for _ in range(fields):
            position = _end_of_string(data, position, order)
            (kind,), count, position = struct.unpack_from(f"{order}I", data, position), 1, position + 4
            if kind == ARRAY:
                (kind, count), position = struct.unpack_from(f"{order}IQ", data, position), position + 12
                elements += count
                _check_limit("array elements", elements, MAX_ELEMENTS)
            if kind == STRING:
                for _ in range(count):
                    position = _end_of_string(data, position, order)
            elif kind in SIZES:
                position += count * SIZES[kind]
            else:
                raise ValueError(f"a field has the type {kind}")
            if position > len(data):
                raise ValueError(f"a field reaches to byte {position} of {len(data)}")


def _end_of_string(data: mmap.mmap, position: int, order: str) -> int:
    return position + 8 + struct.unpack_from(f"{order}Q", data, position)[0]


def _check_limit(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"it claims {count:,} {what}, at most {limit:,} are read")
