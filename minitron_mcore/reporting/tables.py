"""Printed tables and JSON files of stages. Plots are in `plots`, the HTML report in `page`."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron_mcore.parallel.rendezvous import is_rank_zero

Row = Mapping[str, Any]
_PIPED_WIDTH = 160
_MOST_COLUMNS = 10
_NUMBER = re.compile(r"-?[\d.,]+( ± [\d.]+)?(\s(%|x|[kMBT]|[GTPEZY]?FLOP|s|min|h))?")
_UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}
_PREFIXES = {"Y": 1e24, "Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9}
TRAINING_FIGURES = (
    *("step", "tokens", "kd_loss", "lm_loss", "heldout_loss", "heldout_kl"),
    *("hidden_state_loss", "teacher_entropy", "grad_norm", "lr"),
)
"""Figures of a training step that tables show, in their order."""


def format_value(value: object) -> str:
    """A value as text: integers in full with separators, floats with four significant digits, None as ""."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.4g}"


def table(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Print a table and notes below it (rank 0). Columns are the union of the rows' keys; piped output has a fixed width."""
    if not is_rank_zero():
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, no_color=True, width=_PIPED_WIDTH)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(_grid(rows, box.SIMPLE_HEAD))
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def markdown(rows: Sequence[Row]) -> str:
    """The rows of `table` as a Markdown table."""
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(_grid(rows, box.MARKDOWN))
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def _grid(rows: Sequence[Row], style: box.Box) -> Table:
    shown = Table(box=style)
    for column in columns(rows):
        shown.add_column(label(column), justify="right" if is_numeric(rows, column) else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(format_value(row.get(column))) for column in columns(rows)))
    return shown


def columns(rows: Sequence[Row]) -> list[str]:
    """The union of the rows' keys, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def without_empty(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows without columns that are None in all of them."""
    known = [key for key in columns(rows) if any(row.get(key) is not None for row in rows)]
    return [{key: row.get(key) for key in known} for row in rows]


def turned(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with many columns as columns: a row for each key but the first, whose values are the headings."""
    first, *keys = columns(rows)
    if len(keys) <= _MOST_COLUMNS:
        return list(map(dict, rows))
    return [{first: label(key)} | {str(row[first]): format_value(row.get(key)) for row in rows} for key in keys]


def label(column: str) -> str:
    """Heading of a column."""
    return column.replace("_", " ")


def is_numeric(rows: Sequence[Row], column: str) -> bool:
    """Whether a column is right-aligned: numbers, also as text, with a standard error, a unit prefix or a per cent sign."""
    values = [row.get(column) for row in rows]
    return all(isinstance(value, int | float | None) or _NUMBER.fullmatch(str(value)) for value in values)


def percent(share: float) -> str:
    """0.745 as 75 %."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def short(count: float) -> str:
    """1,340,000 as 1.34 M."""
    for unit, factor in _UNITS.items():
        if count >= factor:
            return f"{count / factor:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{count:.3g}"


def short_flops(operations: float) -> str:
    """1.34e15 floating-point operations as 1.34 PFLOP."""
    prefix = next((prefix for prefix, factor in _PREFIXES.items() if operations >= factor), "")
    return f"{operations / _PREFIXES.get(prefix, 1):.3g}\N{NO-BREAK SPACE}{prefix}FLOP"


def duration(minutes: float) -> str:
    """Minutes as text: seconds below a minute, hours from two hours."""
    if minutes < 1:
        return f"{60 * minutes:.0f}\N{NO-BREAK SPACE}s"
    return f"{minutes:.1f}\N{NO-BREAK SPACE}min" if minutes < 120 else f"{minutes / 60:.1f}\N{NO-BREAK SPACE}h"
