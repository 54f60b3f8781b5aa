"""Text files of every kind that is read, document by document."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from minitron_mcore.errors import UserError

_LINES, _WHOLE = (".jsonl", ".jsonl.gz"), (".txt", ".md", ".py", ".raw")
_ENCODE_CHARS = 2_000_000  # encoded at once: an encoding takes some hundred bytes a token


def is_prefix(path: str) -> bool:
    """True where `path` is the prefix of a Megatron .bin/.idx pair."""
    return os.path.isfile(f"{path}.bin") and os.path.isfile(f"{path}.idx")


def check_readable(path: str) -> None:
    """Refuse, with a UserError, what is neither a text file nor the prefix of a .bin/.idx pair."""
    if is_prefix(path):
        return
    if not os.path.isfile(path):
        raise UserError(f"{path} is neither a file nor the prefix of a .bin/.idx pair: check the path.")
    if not path.endswith(_LINES + _WHOLE):
        raise UserError(f"{path} is of no known kind: text files end in {', '.join(_LINES + _WHOLE)}.")


def _each_document(path: str) -> Iterator[tuple[str, int]]:
    """Each document that has text, and the position reached in the file (in bytes as stored)."""
    number = 1
    try:
        if path.endswith(_WHOLE):
            if data := Path(path).read_bytes():
                yield data.decode("utf-8"), len(data)
            return
        with open(path, "rb") as file, gzip.open(file) if path.endswith(".gz") else file as lines:
            for line in lines:
                if line.strip():
                    text = json.loads(line)["text"]
                    text.encode("utf-8")  # a lone surrogate passes JSON and stops the tokenizer
                    if text:
                        yield text, file.tell()
                number += 1
    except (UnicodeError, ValueError) as error:
        raise UserError(f"{path}, line {number}: {error}: write UTF-8 text, as JSON where it is .jsonl.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}, line {number}: no string under "text": write one {{"text": ...}} a line.') from error
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): is it complete?") from error


def documents(path: str) -> Iterator[tuple[list[str], int]]:
    """Documents of a text file, some millions of characters at a time, and the position reached in the file.

    Raises:
        UserError: see `check_readable`; a file that is cut short, not UTF-8 or, if .jsonl, not JSON with a "text".
    """
    check_readable(path)
    texts, chars, position = [], 0, 0
    for text, position in _each_document(path):
        texts.append(text)
        chars += len(text)
        if chars >= _ENCODE_CHARS:
            yield texts, position
            texts, chars = [], 0
    if texts:
        yield texts, position
