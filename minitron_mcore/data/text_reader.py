"""Text files, read one document at a time, whole or in parts."""

import contextlib
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data import parquet
from minitron_mcore.data.optional import optional_import
from minitron_mcore.errors import UserError

_LINES, _WHOLE = (".jsonl", ".jsonl.gz", ".jsonl.zst"), (".txt", ".md", ".py", ".raw")
_BATCH_CHARS = 2_000_000  # encoding a batch needs about a hundred bytes per token
_BLOCK = 1 << 20  # bytes
MASK_SUFFIX = ".mask"
"""Behind the prefix of a .bin/.idx pair: the prefix of its loss mask (see `loss_mask`)."""


class Limits(NamedTuple):
    """Largest line and file, in MiB, that is read into memory as one document; see `DataConfig`."""

    line_mb: int = DataConfig.line_mb
    file_mb: int = DataConfig.file_mb

    @classmethod
    def of(cls, config: DataConfig) -> "Limits":
        """Those of the settings, which `ranges.problems` checks."""
        return cls(config.line_mb, config.file_mb)


class Text(str):
    """The text of a document."""

    loss_spans: tuple[tuple[int, int], ...] | None = None
    """[first, end) in characters: the parts that count in the loss; None: all of it."""
    is_chat = False
    """Whether a chat template rendered it, with all special tokens in the text (see `chat`)."""


Conversation = Callable[[object], Text]
"""The "messages" of a line as a text, or a UserError (see `ChatTemplate.conversation`)."""


class Part(NamedTuple):
    """A share of a file's documents: the lines that begin in these bytes of a .jsonl, or these row groups of a parquet file."""

    start: int = 0
    stop: int | None = None
    """None: up to the end of the file."""


WHOLE_FILE = Part()


def is_prefix(path: str) -> bool:
    """Whether `path` is the prefix of a Megatron .bin/.idx pair."""
    return os.path.isfile(f"{path}.bin") and os.path.isfile(f"{path}.idx")


def has_documents(path: str) -> bool:
    """Whether a file's name has the ending of a file with a document on each line or row."""
    return path.endswith((*_LINES, parquet.SUFFIX))


def is_text(path: str) -> bool:
    """Whether a file's name has the ending of a text file."""
    return has_documents(path) or path.endswith(_WHOLE)


def check_readable(path: str) -> None:
    """
    Raises:
        UserError: `path` is neither a text file nor the prefix of a .bin/.idx pair, or its package is not installed.
    """
    if is_prefix(path):
        return
    for present, missing in (("bin", "idx"), ("idx", "bin")):
        if os.path.isfile(f"{path}.{present}"):
            raise UserError(f"{path}.{present} is there, but {path}.{missing} is not: a .bin/.idx pair needs both.")
    if not os.path.isfile(path):
        raise UserError(f"{path} is neither a file nor the prefix of a .bin/.idx pair: check the path.")
    if not is_text(path):
        known = ", ".join((*_LINES, *_WHOLE, parquet.SUFFIX))
        raise UserError(f"{path} is of no known kind: text files end in {known}.")
    if path.endswith(".zst"):
        optional_import("pyarrow", path)


def check_size(path: str, limits: Limits) -> None:
    """
    Raises:
        UserError: `path` is a file of one document that is larger than the limit.
    """
    if path.endswith(_WHOLE) and (size := os.path.getsize(path)) > limits.file_mb << 20:
        raise UserError(
            f"{path} is one document of {size / (1 << 20):,.0f} MiB, and data.file_mb is {limits.file_mb}: write one document a "
            "line as .jsonl, or raise data.file_mb."
        )


def parts(path: str, part_bytes: int, column: str = "text") -> list[Part]:
    """Split a .jsonl or parquet file into parts of about `part_bytes`. A file of another kind is one part.

    Args:
        column: of a parquet file, whose uncompressed size counts.

    Raises:
        UserError: see `parquet.row_group_bytes`.
    """
    if path.endswith(".jsonl"):
        count = math.ceil(os.path.getsize(path) / part_bytes)
        return [Part(n * part_bytes, (n + 1) * part_bytes) for n in range(count)] or [WHOLE_FILE]
    if not path.endswith(parquet.SUFFIX):
        return [WHOLE_FILE]
    starts, filled = [0], 0
    for group, size in enumerate(parquet.row_group_bytes(path, column)):
        if filled and filled + size > part_bytes:
            starts.append(group)
            filled = 0
        filled += size
    return [Part(*ends) for ends in zip(starts, [*starts[1:], None], strict=True)]


def _where(path: str, number: int, part: Part) -> str:
    """A file and a line for a message; `number` counts from the first line of the part."""
    if part.start:  # the lines that begin before it: the first, and one behind each line end
        number += 1
        with open(path, "rb") as file:
            for start in range(0, part.start - 1, _BLOCK):
                number += file.read(min(_BLOCK, part.start - 1 - start)).count(b"\n")
    return f"{path}, line {number}"


@contextlib.contextmanager
def _decompressed(path: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The content of an opened file."""
    if path.endswith(".gz"):
        with gzip.open(file) as content:
            yield content
    elif path.endswith(".zst"):
        yield io.BufferedReader(optional_import("pyarrow", path).CompressedInputStream(file, "zstd"))
    else:
        yield file


def lines(path: str, line_mb: int, part: Part = WHOLE_FILE) -> Iterator[tuple[int, str, int]]:
    """The lines of a .jsonl file, compressed or not, that are not blank. At most `line_mb` MiB of a line are decompressed.

    Yields:
        (line number from 1 in the part, text, position in the stored file in bytes from the start of the part)

    Raises:
        UserError: a longer line, text that is not UTF-8, or a file that cannot be read completely.
    """
    number, limit = 0, line_mb << 20
    try:
        with open(path, "rb") as file, _decompressed(path, file) as content:
            if part.start:  # the line that begins before the part is read with the part before
                content.seek(part.start - 1)
                while (skipped := content.readline(_BLOCK)) and not skipped.endswith(b"\n"):
                    pass
            while (part.stop is None or content.tell() < part.stop) and (line := content.readline(limit + 1)):
                number += 1
                if len(line) > limit:
                    raise UserError(
                        f"{_where(path, number, part)} is longer than {line_mb} MiB: shorten it, or raise data.line_mb (it is "
                        "read into memory as a whole)."
                    )
                if line.strip():
                    # A file may begin with a byte order mark.
                    encoding = "utf-8-sig" if number == 1 and part.start == 0 else "utf-8"
                    yield number, line.decode(encoding), file.tell() - part.start
    except UnicodeDecodeError as error:
        raise UserError(f"{_where(path, number, part)} is not UTF-8 text ({error}): write it as UTF-8.") from error
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): is it complete?") from error


def _whole(path: str, limits: Limits) -> Iterator[tuple[str, int]]:
    """The text and size of a file that is one document; nothing for an empty file."""
    check_size(path, limits)
    try:
        data = Path(path).read_bytes()
        if data:
            yield data.decode("utf-8"), len(data)
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        reason = f"byte {data[error.start]:#04x} at position {error.start}: {error.reason}"
        raise UserError(f"{path}, line {number} is not UTF-8 text ({reason}): write it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read to its end ({error}): is it complete?") from error


def _parse(line: str, key: str, conversation: Conversation | None) -> Text:
    """The document of a line: {key: text}, with "loss_spans": [[first, end], ...] if not all of it counts in the loss; or
    {"prompt": ..., "completion": ...}, of which the completion counts; or {"messages": ...}, where `conversation` renders these.

    Raises:
        ValueError: no JSON; spans outside the text.
        KeyError, TypeError: no such text.
        UserError: see `conversation`.
    """
    fields = json.loads(line)
    if conversation and key not in fields and "messages" in fields:
        return conversation(fields["messages"])
    is_pair = key not in fields and "prompt" in fields
    parts = [fields["prompt"], fields["completion"]] if is_pair else [fields[key]]
    if not all(isinstance(part, str) for part in parts):
        raise TypeError(f"{parts}")
    text = Text("".join(parts))
    spans = [[len(parts[0]), len(text)]] if is_pair else fields.get("loss_spans")
    if spans is not None:
        text.loss_spans = tuple(_check_span(span, len(text)) for span in spans)
    return text


def _check_span(span: object, length: int) -> tuple[int, int]:
    match span:
        case [int(first), int(end)] if 0 <= first <= end <= length:
            return first, end
    raise ValueError(f"loss_spans has {span}, which is no [first, end] within the {length} characters")


def _each_document(
    path: str, limits: Limits, part: Part, key: str, conversation: Conversation | None
) -> Iterator[tuple[Text, int]]:
    """(text, position as in `documents`) of each document that is not empty."""
    if path.endswith((*_WHOLE, parquet.SUFFIX)):
        rows = (
            _whole(path, limits)
            if path.endswith(_WHOLE)
            else parquet.texts(path, key, part.start, part.stop, limits.line_mb)
        )
        yield from ((Text(text), position) for text, position in rows)
        return
    for number, line, position in lines(path, limits.line_mb, part):
        try:
            text = _parse(line, key, conversation)
            text.encode("utf-8")  # JSON allows lone surrogates, tokenizers do not
        except UserError as error:
            raise UserError(f"{_where(path, number, part)}: {error}") from error
        except UnicodeEncodeError as error:
            raise UserError(
                f"{_where(path, number, part)} is not UTF-8 text ({error.reason}): write it as UTF-8."
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{_where(path, number, part)}: {error}: write UTF-8 text, as JSON where it is .jsonl."
            ) from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{_where(path, number, part)}: no string under "{key}": write one {{"{key}": ...}} a line, {{"prompt": ..., '
                '"completion": ...}} or {{"messages": [...]}}.'
            ) from error
        if text:
            yield text, position


def documents(
    path: str,
    limits: Limits | None = None,
    part: Part = WHOLE_FILE,
    key: str = "text",
    conversation: Conversation | None = None,
) -> Iterator[tuple[list[Text], int]]:
    """Read the documents of a text file in batches of some millions of characters.

    Args:
        limits: size limits of a document; None for the defaults.
        part: share of the file to read (see `parts`).
        key: of a .jsonl line, or column of a parquet file, that holds the text.
        conversation: renders the "messages" of a .jsonl line; None: such lines are refused.

    Yields:
        (texts, position in the stored file in bytes from the start of the part)

    Raises:
        UserError: see `check_readable`; the file is truncated, not UTF-8 or, for .jsonl, a line is not JSON with a string under
            `key`; a line or the file exceeds the limits.
    """
    check_readable(path)
    texts, chars, position = [], 0, 0
    for text, position in _each_document(path, limits or Limits(), part, key, conversation):
        texts.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield texts, position
            texts, chars = [], 0
    if texts:
        yield texts, position
