"""Files that other programs and people write, read in one place that turns what their readers raise into a sentence."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import safe_open

from minitron_mcore.errors import UserError


@contextmanager
def readable(path: str | Path, remedy: str) -> Iterator[None]:
    """Turn whatever a damaged file makes of its reader, or of what uses its content, into one sentence.

    Args:
        remedy: ends the sentence.

    Raises:
        UserError: instead of any exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a library has its own types; JSON of another form fails wherever it is used
        why = f"{type(error).__name__}: {first_line(error)}"[:200]
        raise UserError(f"{path} is damaged, or of another form than expected ({why}): {remedy}.") from error


def read_json(path: str | Path, remedy: str) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: a file that cannot be read, is not UTF-8 or JSON, is nested too deeply, or holds something else than an object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({type(error).__name__}: {first_line(error)}): {remedy}."
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path} holds {type(found).__name__} {str(found)[:40]!r} where a JSON object is expected: {remedy}."
        )
    return found


def read_json_lines(path: str | Path, remedy: str) -> list[dict]:
    """The objects of a JSONL file, one a line. A last line without its end is still being written, and is left out.

    Raises:
        UserError: see `read_json`, with the line's number.
    """
    found = []
    try:
        text = Path(path).read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].split("\n")[:-1]:
            found.append(json.loads(line))
            if not isinstance(found[-1], dict):
                raise TypeError(f"a {type(found.pop()).__name__} where a JSON object is expected")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {len(found) + 1}, cannot be read as JSON ({type(error).__name__}: {first_line(error)}): {remedy}."
        ) from error
    return found


def read_yaml(path: str | Path, remedy: str) -> dict:
    """The mapping in a YAML file, of plain values.

    Raises:
        UserError: a file that cannot be read, is not YAML, asks for objects, is nested too deeply, or holds something else.
    """
    with readable(path, remedy):
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__} where a mapping is expected")
        return found


@contextmanager
def open_tensors(path: str | Path, framework: str, remedy: str) -> Iterator[safe_open]:
    """A safetensors file; `framework`: "pt" or "np".

    Raises:
        UserError: a file that is cut short or of another kind; anything that fails within the block.
    """
    with readable(path, remedy), safe_open(path, framework) as file:
        yield file


def first_line(error: BaseException) -> str:
    """Of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
