"""Text files, read one document at a time."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minitron_mcore.config.settings import DataConfig
from minitron_mcore.errors import UserError

_LINES, _WHOLE = (".jsonl", ".jsonl.gz"), (".txt", ".md", ".py", ".raw")
_BATCH_CHARS = 2_000_000  # encoding a batch needs about a hundred bytes per token


class Limits(NamedTuple):
    """Largest line and file, in MiB, that is read into memory as one document; see `DataConfig`."""

    line_mb: int = DataConfig.line_mb
    file_mb: int = DataConfig.file_mb

    @classmethod
    def of(cls, config: DataConfig) -> "Limits":
        """
        Raises:
            UserError: a limit is below 1.
        """
        for name in cls._fields:
            if getattr(config, name) < 1:
                raise UserError(f"data.{name} is {getattr(config, name)}; it must be at least 1.")
        return cls(config.line_mb, config.file_mb)


def is_prefix(path: str) -> bool:
    """Whether `path` is the prefix of a Megatron .bin/.idx pair."""
    return os.path.isfile(f"{path}.bin") and os.path.isfile(f"{path}.idx")


def check_readable(path: str) -> None:
    """
    Raises:
        UserError: `path` is neither a text file nor the prefix of a .bin/.idx pair.
    """
    if is_prefix(path):
        return
    for present, missing in (("bin", "idx"), ("idx", "bin")):
        if os.path.isfile(f"{path}.{present}"):
            raise UserError(f"{path}.{present} is there, but {path}.{missing} is not: a .bin/.idx pair needs both.")
    if not os.path.isfile(path):
        raise UserError(f"{path} is neither a file nor the prefix of a .bin/.idx pair: check the path.")
    if not path.endswith(_LINES + _WHOLE):
        raise UserError(f"{path} is of no known kind: text files end in {', '.join(_LINES + _WHOLE)}.")


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


def lines(path: str, line_mb: int) -> Iterator[tuple[int, str, int]]:
    """The lines of a .jsonl or .jsonl.gz file that are not blank. At most `line_mb` MiB of a line are decompressed.

    Yields:
        (line number from 1, text, position in the stored file in bytes)

    Raises:
        UserError: a longer line, text that is not UTF-8, or a file that cannot be read completely.
    """
    number, limit = 0, line_mb << 20
    try:
        with open(path, "rb") as file, gzip.open(file) if path.endswith(".gz") else file as content:
            while line := content.readline(limit + 1):
                number += 1
                if len(line) > limit:
                    raise UserError(
                        f"{path}, line {number} is longer than {line_mb} MiB: shorten it, or raise data.line_mb (it is read into "
                        "memory as a whole)."
                    )
                if line.strip():
                    # A file may begin with a byte order mark.
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), file.tell()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number} is not UTF-8 text ({error}): write it as UTF-8.") from error
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


def _each_document(path: str, limits: Limits) -> Iterator[tuple[str, int]]:
    """(text, position in the stored file in bytes) of each document that is not empty."""
    if path.endswith(_WHOLE):
        yield from _whole(path, limits)
        return
    for number, line, position in lines(path, limits.line_mb):
        try:
            text = json.loads(line)["text"]
            text.encode("utf-8")  # JSON allows lone surrogates, tokenizers do not
        except UnicodeEncodeError as error:
            raise UserError(f"{path}, line {number} is not UTF-8 text ({error.reason}): write it as UTF-8.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}: write UTF-8 text, as JSON where it is .jsonl.") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}, line {number}: no string under "text": write one {{"text": ...}} a line.'
            ) from error
        if text:
            yield text, position


def documents(path: str, limits: Limits | None = None) -> Iterator[tuple[list[str], int]]:
    """Read the documents of a text file in batches of some millions of characters.

    Args:
        limits: size limits of a document; None for the defaults.

    Yields:
        (texts, position in the stored file in bytes)

    Raises:
        UserError: see `check_readable`; the file is truncated, not UTF-8 or, for .jsonl, a line is not JSON with a string "text";
            a line or the file exceeds the limits.
    """
    check_readable(path)
    texts, chars, position = [], 0, 0
    for text, position in _each_document(path, limits or Limits()):
        texts.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield texts, position
            texts, chars = [], 0
    if texts:
        yield texts, position
