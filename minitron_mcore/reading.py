"""Files in JSON, YAML and safetensors, and format versions of artefacts: every error of reading becomes one UserError."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from minitron_mcore.errors import UserError

MAX_JSON_BYTES = 64 << 20
FORMAT_VERSION = 1
"""Written as `format_version` into each artefact: model.json, scores.safetensors, plan.json, depth.json, search.json, index.json
of a teacher cache and lineage.json of an export."""


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _type_and_message(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def damage_as_user_error(
    path: str | Path, remedy: str, describe: Callable[[BaseException], str] = _type_and_message
) -> Iterator[None]:
    """Convert an exception of the block, which reads a file or uses its content, to a UserError of one sentence.

    Errors that no content of a file causes keep their traceback: missing memory, names and assertions in code.

    Args:
        path: names the file in the message.
        remedy: ends the message.
        describe: the reason in the message, from the exception.
    """
    try:
        yield
    except (UserError, MemoryError, NameError, AssertionError):
        raise
    except Exception as error:  # libraries have their own types, and content of another form fails where it is used
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does not import torch
            raise
        raise UserError(
            f"{path} is damaged or incomplete, or has another format ({describe(error)[:300]}): {remedy}."
        ) from error


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
        raise UserError(f"{path} cannot be read as JSON ({_type_and_message(error)}): {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__} {str(content)[:40]!r} where a JSON object is expected: {remedy}."
        )
    return content


def check_format_version(content: dict[str, Any], path: str | Path, remedy: str) -> None:
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


def read_json_lines(path: str | Path, remedy: str) -> list[dict[str, Any]]:
    """The objects in a JSONL file, one per line; an incomplete last line is ignored.

    Raises:
        UserError: see `read_json`; the message has the line's number.
    """
    rows: list[dict[str, Any]] = []
    try:
        text = Path(path).read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].split("\n")[:-1]:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"{type(row).__name__} where a JSON object is expected")
            rows.append(row)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {len(rows) + 1}, cannot be read as JSON ({_type_and_message(error)}): {remedy}."
        ) from error
    return rows


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Refuses aliases (*name): with them a short text can stand for an endless or enormous value."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which no file of this package contains")
        return super().compose_node(parent, index)


def read_yaml(path: str | Path, remedy: str) -> dict[str, Any]:
    """The mapping in a YAML file of plain values.

    Raises:
        UserError: the file cannot be read, is not YAML, contains aliases or tags of objects, is nested too deeply, or holds
            something else than a mapping.
    """
    with damage_as_user_error(path, remedy):
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__} where a mapping is expected")
        return content


@contextmanager
def open_tensors(path: str | Path, framework: str, remedy: str) -> Iterator[safe_open]:
    """An opened safetensors file.

    Args:
        framework: of its tensors, "pt" or "np".

    Raises:
        UserError: the file is truncated or has another format, or the block raises an exception.
    """
    with damage_as_user_error(path, remedy), safe_open(path, framework) as file:
        yield file
