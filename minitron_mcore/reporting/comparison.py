"""Training runs side by side: what differs in their settings, inputs and sizes, and what they reached.

OUT/compare.json, compare.csv   the rows
OUT/losses.png                  losses and learning rate against tokens
OUT/report.html                 a page with the section, which `minitron report` adds to a work_dir's page if OUT lies in it
"""

import csv
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import disk, lineage, stage_record
from minitron_mcore.errors import UserError
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reading import FORMAT_VERSION
from minitron_mcore.reporting import artefacts, costs, measurements, overview, page, plots, sections, tables
from minitron_mcore.reporting.artefacts import KINDS, damage_as_user_error, read_json, read_lines

LOSSES = ("kd_loss", "lm_loss", "heldout_loss")
_PATHS = ("out_dir", "work_dir", "runs", "student", "students", "teacher", "teachers", "source", "changed", "stage")
_PATH_SECTIONS = ("log.", "model.", "data.cache", "data.train", "data.heldout", "data.tokenizer")
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")


def write(folders: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Compare the runs in `folders`, write the files into `out`, and return the rows.

    Raises:
        UserError: see `find_runs`; a damaged file; OUT/report.html is another file.
    """
    page.check(out / "report.html")
    runs = find_runs(folders)
    rows = compare(runs)
    out.mkdir(parents=True, exist_ok=True)
    plots.plot_losses({name: folder / KINDS["training"] for name, folder in runs.items()}, out / "losses.png")
    disk.write_json(out / KINDS["comparison"], {"format_version": FORMAT_VERSION, "runs": rows})
    with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, tables.columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    page.save(out, [sections.comparisons([out])], out / "report.html")
    return rows


def find_runs(folders: Sequence[str]) -> dict[str, Path]:
    """Training runs by name: the parts of their paths in which they differ.

    Each folder is a run, or holds runs up to three levels below; of those the distillations count, if there are any.

    Raises:
        UserError: a folder without a run, or fewer than two runs.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        runs = [path.parent for depth in _DEPTHS for path in sorted(folder.glob(f"{depth}{KINDS['training']}"))]
        if not runs:
            raise UserError(
                f"{folder} holds no training run ({KINDS['training']}): give folders of distill, or work_dirs."
            )
        distilled = [run for run in runs if artefacts.stage_config(run).get("stage") == "distill"]
        found += [run for run in distilled or runs if run not in found]
    if len(found) < 2:
        raise UserError(f"{', '.join(folders)} holds one training run, {found[0]}: give at least two.")
    parts = [list(Path(os.path.abspath(run)).parts) for run in found]
    common = [set(column) for column in zip(*parts, strict=False)]
    names = ["/".join(p for n, p in enumerate(own) if n >= len(common) or len(common[n]) > 1) for own in parts]
    return dict(zip(names, found, strict=True))


def compare(runs: dict[str, Path]) -> list[dict[str, Any]]:
    """A row for each run: what it reached, then settings, inputs and sizes in which the runs differ."""
    given = {name: dict(_given(folder)) for name, folder in runs.items()}
    keys = dict.fromkeys(key for values in given.values() for key in values)
    differing = [key for key in keys if len({str(values.get(key)) for values in given.values()}) > 1]
    return [
        {"run": name} | _reached(folder) | {key: given[name].get(key) for key in differing}
        for name, folder in runs.items()
    ]


def _given(folder: Path) -> Iterator[tuple[str, Any]]:
    """Everything that a run was given, by name: settings, fingerprints of its inputs, sizes of its model."""
    for key, value in _flat(artefacts.stage_config(folder)):
        if key not in _PATHS and not key.startswith(_PATH_SECTIONS):
            yield key, value
    for name, each in stage_record.recorded_inputs(folder).items():
        yield name, each.fingerprint
    path = folder / KINDS["checkpoint"]
    if path.is_file():
        record = read_json(path)
        with damage_as_user_error(path):
            arch = Architecture(**record["architecture"])
            yield "parameters", parameter_table.count(arch)
            yield from (pair for pair in _flat(record["architecture"]) if isinstance(pair[1], int))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, int | float | None) else str(value)


def _reached(folder: Path) -> dict[str, Any]:
    """Steps, tokens, last losses, speed and cost of a run, and what its model kept: evaluations and benchmarks."""
    path = folder / KINDS["training"]
    lines = read_lines(path)
    with damage_as_user_error(path):
        last = lines[-1] if lines else {}
        row: dict[str, Any] = {"state": "finished" if stage_record.is_complete(folder) else "unfinished"}
        row |= {key: last.get(key) for key in ("step", "tokens")}
        row |= {key: next((x[key] for x in reversed(lines) if x.get(key) is not None), None) for key in LOSSES}
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        row["tokens_per_second"] = statistics.median(speeds) if speeds else None
    training = costs.trained(folder)
    row |= {"minutes": training.get("seconds", 0.0) / 60 or None, "FLOPs": training.get("FLOPs")}
    return row | _kept(folder)


def _kept(folder: Path) -> dict[str, Any]:
    """Held-out losses of a run's model, the share of the loss that it recovered, and its share of the teacher's benchmarks."""
    path = folder / KINDS["checkpoint"]
    if not path.is_file():
        return {}
    beside, record = artefacts.classified(folder.parent), read_json(path)
    with damage_as_user_error(path):
        identity = {"path": str(folder), "step": "", "fingerprint": record["fingerprint"]}
        made = lineage.history(record["lineage"], identity)
    models = artefacts.models(beside, made)
    row = {f"loss on {name}": figures["loss"] for name, figures in models[-1].losses.items()}
    row["recovered"] = overview.recovered(models)
    for measured in beside["benchmark"]:
        results = measurements.read_benchmarks(measured, models, artefacts.locator(beside))
        if share := results.kept():
            row["benchmarks kept"] = share[1] / share[0] if share[0] else None
    return row
