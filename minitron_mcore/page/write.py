"""The sections as one HTML file: styles and pictures within, no script, nothing fetched, every value escaped."""

import datetime
from pathlib import Path

import jinja2

from minitron_mcore import checkpoint, report
from minitron_mcore.errors import UserError
from minitron_mcore.page import read
from minitron_mcore.page.sections import CODE, Section, sections

GENERATOR = "minitron_mcore report"
_TEMPLATE = Path(__file__).with_name("page.html")


def collect(work_dir: str | Path) -> list[Section]:
    """What `work_dir` has to say.

    Raises:
        UserError: see `read.folders` and `sections`.
    """
    found = sections(read.folders(work_dir))
    if not found:
        raise UserError(f"{work_dir} has nothing to report yet: every file that a stage wrote there is empty.")
    return found


def write(work_dir: str | Path, html: str | Path) -> list[dict]:
    """Write the report on `work_dir` to the file `html`, over an older report; returns rows of what is in it.

    Raises:
        UserError: see `collect`; `html` is a file that is no report.
    """
    work_dir, html = Path(work_dir), Path(html)
    check(html)
    found = collect(work_dir)
    html.parent.mkdir(parents=True, exist_ok=True)
    page = render(work_dir, found).encode("utf-8", "replace").decode()  # JSON can hold half a character
    checkpoint.replace_text(html, page)
    return contents(found)


def check(html: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        UserError: `html` is a folder, or a file that is no report.
    """
    if html.is_dir() or (html.is_file() and GENERATOR not in html.read_text(errors="replace")[:2000]):
        raise UserError(f"{html} is there and is no report of ours: give another file (html=/path/report.html).")


def contents(found: list[Section]) -> list[dict]:
    """Rows for a table: the parts of each section."""
    return [
        {
            "section": section.title,
            "of": part.name,
            "tables": sum(bool(t.rows) for t in part.tables),
            "pictures": len(part.pictures),
        }
        for section in found
        for part in section.parts
    ]


def render(work_dir: Path, found: list[Section]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"cell": report.cell, "label": report.label, "columns": report.columns, "css": _css}
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=work_dir.resolve().name,
        folder=str(work_dir),
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        sections=found,
        generator=GENERATOR,
        versions=", ".join(f"{name} {version}" for name, version in checkpoint.versions().items()),
    )


def _css(rows: list[dict], column: str) -> str:
    if column in CODE:
        return "c"
    return "n" if report.numbers(rows, column) else ""
