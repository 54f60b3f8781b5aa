"""JSON files and format versions of artefacts: every reading error becomes one UserError."""

import json
from pathlib import Path
from typing import Any

from minitron_mcore.errors import UserError

MAX_JSON_BYTES = 64 << 20
FORMAT_VERSION = 1
"""Written as `format_version` into each artefact: model.json, scores.safetensors, plan.json, depth.json, search.json, index.json
of a teacher cache and lineage.json of an export."""


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


def check_format_version(content: dict, path: str | Path, remedy: str) -> None:
    """Refuse an artefact whose format this version of the package does not read.

    An artefact without `format_version` (version 0) was written before artefacts had one. Its keys and their meanings are
    those of version 1, so it is read as such.

    Args:
        content: the artefact's top-level mapping.
        remedy: what to do about a refused file; ends the message.

    Raises:
        UserError: another version.
    """
    version = content.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version!r}, but this version of minitron_mcore reads {FORMAT_VERSION}: {remedy}, or "
            "use the version of minitron_mcore that wrote it."
        )


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
