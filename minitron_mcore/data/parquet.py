"""Texts in a column of a parquet file, read by pyarrow, which is an optional dependency."""

import os
from collections.abc import Iterator
from typing import Any

from minitron_mcore.data.optional import optional_import
from minitron_mcore.errors import UserError
from minitron_mcore.reading import damage_as_user_error

SUFFIX = ".parquet"
_ROWS = 128  # decoded at once
_REMEDY = "is it complete? Write it again"


def _open(path: str, column: str) -> Any:
    """The pyarrow.parquet.ParquetFile of a file with a column of strings.

    Raises:
        UserError: pyarrow is not installed; the file is damaged or has no such column.
    """
    parquet = optional_import("pyarrow.parquet", path)
    with damage_as_user_error(path, _REMEDY):
        file = parquet.ParquetFile(path)
        kinds = dict(zip(file.schema_arrow.names, map(str, file.schema_arrow.types), strict=True))
    if kinds.get(column) not in ("string", "large_string"):
        shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(f'{path} has no column "{column}" of strings, but {shown[:300]}: name another column.')
    return file


def row_group_bytes(path: str, column: str) -> list[int]:
    """Uncompressed size of a column in each row group. Raises as `_open` does."""
    file = _open(path, column)
    with damage_as_user_error(path, _REMEDY):
        number = [leaf.path for leaf in map(file.metadata.schema.column, range(file.metadata.num_columns))].index(
            column
        )
        groups = [file.metadata.row_group(n).column(number) for n in range(file.num_row_groups)]
        return [group.total_uncompressed_size for group in groups]


def texts(path: str, column: str, start: int, stop: int | None, line_mb: int) -> Iterator[tuple[str, int]]:
    """The texts of row groups `start` up to `stop` (None: all from `start`) that are not empty.

    Yields:
        (text, position in the stored file in bytes from the start of these row groups, estimated from the number of rows)

    Raises:
        UserError: see `_open`; a row without text, or with text longer than `line_mb` MiB.
    """
    file = _open(path, column)
    size, groups = os.path.getsize(path), range(start, file.num_row_groups if stop is None else stop)
    with damage_as_user_error(path, _REMEDY):
        row = first = sum(file.metadata.row_group(group).num_rows for group in range(start))
        for batch in file.iter_batches(_ROWS, groups, [column]) if groups else ():
            for value in batch.column(0):
                row += 1
                text = value.as_py()
                if text is None:
                    raise UserError(f'{path}, row {row}: no string in column "{column}": leave such rows out.')
                if len(text) > line_mb << 20:
                    raise UserError(
                        f"{path}, row {row} is longer than {line_mb} MiB: shorten it, or raise data.line_mb (it is read into "
                        "memory as a whole)."
                    )
                if text:
                    yield text, size * (row - first) // file.metadata.num_rows
