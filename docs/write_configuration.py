"""Write docs/configuration.md from the dataclasses of minitron_mcore/config; with --check, fail where the file is out of date."""

import dataclasses
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import yaml
from omegaconf import MISSING

from minitron_mcore.cli.compose import CONF, LAUNCH_FILES
from minitron_mcore.cli.help import Setting, choices, launch_docstring, settings
from minitron_mcore.config.stages import Run

DOCS = Path(__file__).parent
PAGE, NOTES = DOCS / "configuration.md", DOCS / "configuration-notes.md"


def page() -> str:
    """The notes, then the settings of all stages, of each stage and of each section, one table each."""
    common = {field.name for field in dataclasses.fields(Run)}
    rows = settings(Run)
    lines = ["# Configuration", "", "<!-- Written by docs/write_configuration.py; edit configuration-notes.md. -->", ""]
    lines += [NOTES.read_text().strip(), "", "## Settings of every stage", ""]
    lines += _table("", [row for row in rows if not dataclasses.is_dataclass(row.type)], {})
    for stage, schema in LAUNCH_FILES.items():
        own = [row for row in settings(schema) if row.name not in common]
        lines += ["", f"## Stage `{stage}`", "", launch_docstring(stage).partition("\n\n")[0].replace("\n", " ")]
        if reads := getattr(schema, "reads", ()):
            lines += ["", f"Its folder's `config.yaml` keeps the sections {', '.join(f'`{name}`' for name in reads)}."]
        lines += ["", *_table("", own, yaml.safe_load((CONF / f"stage/{stage}.yaml").read_text()))]
    for row in rows:
        if dataclasses.is_dataclass(row.type):
            lines += _section(row, row.name)
    return "\n".join(lines) + "\n"


def _section(section: Setting, key: str) -> Iterator[str]:
    rows = settings(section.type)
    yield from ("", f"## Section `{key}`", "", section.text, "")
    if files := sorted(path.stem for path in (CONF / key).glob("*.yaml")):
        yield from (f"Config group `{key}=`: {', '.join(f'`{name}`' for name in files)}.", "")
    yield from _table(f"{key}.", [row for row in rows if not dataclasses.is_dataclass(row.type)], {})
    for row in rows:
        if dataclasses.is_dataclass(row.type):
            yield from _section(row, f"{key}.{row.name}")


def _table(prefix: str, rows: list[Setting], defaults: dict) -> Iterator[str]:
    if not rows:
        return
    yield from ("| setting | default | what it is |", "|---|---|---|")
    for row in rows:
        default = defaults.get(row.name, row.default)
        text = row.text
        if allowed := choices(row.type):
            text += (
                " Values: " + "; ".join(f"`{k}`{f' ({v.rstrip(".")})' if v else ''}" for k, v in allowed.items()) + "."
            )
        yield f"| `{prefix}{row.name}` | {_shown(default)} | {text.strip().replace('|', chr(92) + '|')} |"


def _shown(value: object) -> str:
    if value == MISSING:
        return ""
    plain = value.value if isinstance(value, Enum) else value
    return f"`{'null' if plain is None else str(plain).lower() if isinstance(plain, bool) else plain}`"


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page())
    elif not PAGE.is_file() or PAGE.read_text() != page():
        sys.exit("docs/configuration.md is out of date: run `python docs/write_configuration.py`.")
