"""The settings of a stage and their descriptions, as `--help` and docs/configuration.md show them."""

import ast
import contextlib
import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple, get_args

import hydra
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from minitron_mcore.cli.compose import CONF, LAUNCH, LAUNCH_FILES, group_options
from minitron_mcore.config.stages import Run

GROUPS = [field.name for field in dataclasses.fields(Run) if dataclasses.is_dataclass(field.type)]
COMMON = ("model", "parallel", "recipe", "dry")
"""Sections that every stage reads; its `reads` names the others."""


class Setting(NamedTuple):
    name: str
    type: Any
    default: Any
    """`omegaconf.MISSING` where the user or conf/stage must give a value."""
    text: str


@contextlib.contextmanager
def reader_may_end() -> Iterator[None]:
    """A block that prints to a reader, such as `head`, which may end before all is written."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def launch_docstring(stage: str) -> str:
    """The docstring of launch/`stage`.py: one sentence, then commands."""
    return ast.get_docstring(ast.parse((LAUNCH / f"{stage}.py").read_text())) or ""


def descriptions(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass or member of an enum, in one line; inherited ones too."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if base.__module__ == cls.__module__]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(text, ast.Expr) and isinstance(statement, ast.AnnAssign | ast.Assign):
                target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
                texts[ast.unparse(target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


def settings(schema: type) -> list[Setting]:
    """The fields of a dataclass; those that are dataclasses themselves are sections, with the text of their class."""
    texts = descriptions(schema)
    rows = []
    for field in dataclasses.fields(schema):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        section = " ".join((inspect.getdoc(field.type) or "").split()) if dataclasses.is_dataclass(field.type) else ""
        rows.append(Setting(field.name, field.type, default, section or texts.get(field.name, "")))
    return rows


def choices(type_: Any) -> dict[str, str]:
    """The values of an enum, or of an optional one, with their descriptions; empty for other types."""
    enums = [kind for kind in (type_, *get_args(type_)) if isinstance(kind, type) and issubclass(kind, Enum)]
    texts = descriptions(enums[0]) if enums else {}
    return {member.value: texts.get(member.name, "") for kind in enums for member in kind}


def help_text(stage: str, overrides: list[str]) -> str:
    """A stage's purpose, config groups, and settings with their values on a command line.

    Hydra could print this text as its own help, but first lists all config groups, which takes 9 s.

    Raises:
        HydraException: the command line cannot be composed.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(f"stage/{stage}", overrides)
        searched = [override for override in overrides if override.startswith("hydra.searchpath=")]
        options = {group: ", ".join(group_options(group, searched)) for group in GROUPS}
    schema = LAUNCH_FILES[stage]
    sections = {*COMMON, *schema.reads} if hasattr(schema, "reads") else None
    values: Any = OmegaConf.to_container(config)
    parts = [
        launch_docstring(stage),
        "Config groups (GROUP=OPTION), from conf/ and hydra.searchpath:",
        "\n".join(f"  {group}: {names}" for group, names in options.items() if names),
        "Settings (SETTING=VALUE), with the values of this command line:",
        "\n".join(_lines(schema, values, "", sections)),
    ]
    return "\n\n".join(parts)


def _lines(schema: Any, values: dict[str, Any], prefix: str, sections: set[str] | None) -> Iterator[str]:
    """Settings first, then sections; of these only `sections`, where that is a set."""
    rows = settings(schema)
    for setting in sorted(rows, key=lambda row: dataclasses.is_dataclass(row.type)):
        key, value = f"{prefix}{setting.name}", values[setting.name]
        if dataclasses.is_dataclass(setting.type):
            if sections is None or setting.name in sections:
                yield "\n" + _filled(f"{key}: {setting.text}", "")
                yield from _lines(setting.type, value, f"{key}.", None)
            continue
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        text = setting.text
        if allowed := choices(setting.type):
            text = f"{text} One of {', '.join(allowed)}.".strip()
        yield f"  {key}={shown}"
        if text:
            yield _filled(text, " " * 6)


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(text, 118, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
