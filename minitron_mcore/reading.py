"""Readers of small files that come from users or other programs; what they raise is a UserError."""

import json
from pathlib import Path
from typing import Any

from minitron_mcore.errors import UserError

MAX_JSON_BYTES = 64 << 20


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; `remedy` ends the message.

    Raises:
        UserError: the file cannot be read, is larger than MAX_JSON_BYTES, is not UTF-8 or JSON, is nested too deeply, or holds
            something else than an object.
    """
    try:
        if (size := Path(path).stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size:,} bytes: expected JSON of at most {MAX_JSON_BYTES:,}.")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({type(error).__name__}: {first_line(error)}): {remedy}."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__} {str(content)[:40]!r} where a JSON object is expected: {remedy}."
        )
    return content


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
