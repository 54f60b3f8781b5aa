"""Compare training runs: a table, a plot of their losses, a page and files with the rows."""

import argparse
from pathlib import Path


def main(arguments: list[str]) -> None:
    """`minitron compare DIR [DIR ...] [--out compare]`.

    Raises:
        UserError: see `comparison.write`.
    """
    parser = argparse.ArgumentParser(prog="minitron compare", description=__doc__)
    parser.add_argument("dir", nargs="+", help="folder of a training run, or of several")
    parser.add_argument("--out", default="compare", help="folder to write (default: %(default)s)")
    options = parser.parse_args(arguments)

    from minitron_mcore.reporting import comparison, sections, tables  # imports torch

    rows = comparison.write(options.dir, Path(options.out))
    files = ", ".join(f"{options.out}/{name}" for name in ("report.html", "losses.png", "compare.csv", "compare.json"))
    tables.table("runs side by side", sections.comparison_rows(rows), [f"files: {files}"])
