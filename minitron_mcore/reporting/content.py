"""What a page consists of: sections of parts, with tables, pictures and figures in large print."""

import dataclasses
from typing import Any, NamedTuple

from minitron_mcore.reporting.artefacts import Picture


class Tile(NamedTuple):
    """One figure in large print."""

    label: str
    value: str
    note: str


@dataclasses.dataclass
class Table:
    caption: str
    rows: list[dict[str, Any]]
    folded: bool = False
    """Collapsed; for long tables."""


@dataclasses.dataclass
class Part:
    """The content of one folder."""

    name: str
    text: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    tables: list[Table] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Section:
    title: str
    text: str
    parts: list[Part]
    tiles: dict[str, list[Tile]] = dataclasses.field(default_factory=dict[str, list[Tile]])
    """Figures in large print above the parts, by heading."""
