"""The report as one self-contained HTML file: inline styles and images, no script, no external resource, all values escaped."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from minitron_mcore.checkpoint import disk, run_folder
from minitron_mcore.errors import UserError
from minitron_mcore.reporting import tables
from minitron_mcore.reporting.artefacts import folders
from minitron_mcore.reporting.content import Section
from minitron_mcore.reporting.sections import CODE, sections

GENERATOR = "minitron_mcore report"
_TEMPLATE = Path(__file__).with_name("page.html")


def collect(work_dir: str | Path, figures: Sequence[str] = ()) -> list[Section]:
    """The sections of the report on `work_dir`, with files of figures.

    Raises:
        UserError: see `artefacts.folders` and `sections`.
    """
    report = sections(folders(work_dir, figures))
    if not report:
        raise UserError(f"{work_dir} has nothing to report yet: every file that a stage wrote there is empty.")
    return report


def write(work_dir: str | Path, html: str | Path, figures: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Write the report on `work_dir`, with files of figures, to the file `html`; returns the rows of `contents`.

    Raises:
        UserError: see `collect` and `check`.
    """
    work_dir, html = Path(work_dir), Path(html)
    check(html)
    report = collect(work_dir, figures)
    save(work_dir, report, html)
    return contents(report)


def save(folder: Path, report: list[Section], html: Path) -> None:
    """Write the page of a report on `folder`."""
    html.parent.mkdir(parents=True, exist_ok=True)
    text = render(folder, report).encode("utf-8", "replace").decode()  # JSON may contain unpaired surrogates
    disk.replace_text(html, text)


def check(html: Path) -> None:
    """Raise UserError if `html` is a folder, or a file that is not an older report."""
    if html.is_dir() or (html.is_file() and GENERATOR not in html.read_text(errors="replace")[:2000]):
        raise UserError(
            f"{html} exists and is not a report of this package: give another file (html=/path/report.html)."
        )


def contents(report: list[Section]) -> list[dict[str, Any]]:
    """Rows for a table: the sections and the number of their parts."""
    return [{"section": section.title, "parts": len(section.parts)} for section in report]


def render(work_dir: Path, report: list[Section]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"cell": tables.format_value, "label": tables.label, "columns": tables.columns, "css": _css}
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=work_dir.resolve().name,
        folder=str(work_dir),
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        sections=report,
        generator=GENERATOR,
        versions=", ".join(f"{name} {version}" for name, version in run_folder.versions().items()),
    )


def _css(rows: list[dict[str, Any]], column: str) -> str:
    """CSS class of a column: code, number or neither."""
    if column in CODE:
        return "c"
    return "n" if tables.is_numeric(rows, column) else ""
