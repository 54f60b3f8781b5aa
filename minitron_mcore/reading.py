"""Small files that other programs and people write, read in one place that turns what their readers raise into a sentence."""

import json
from pathlib import Path

from minitron_mcore.errors import UserError


def read_json(path: str | Path, remedy: str) -> dict:
    """The object in a JSON file.

    Args:
        remedy: ends the sentence.

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


def first_line(error: BaseException) -> str:
    """Of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
