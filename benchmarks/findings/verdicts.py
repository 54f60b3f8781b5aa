"""A finding of the papers: its arms, what is claimed of them, and whether that holds here.

    python benchmarks/findings/NAME.py    run what is not finished, print the table, write results/NAME.json

A claim compares two arms by the mean of their losses on four texts (each counted once): the difference of each seed is taken first,
since both arms read the same samples, then mean and standard error over the seeds. It is decided where the 95 % interval (Student's
t) excludes 0.
"""

import math
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import RESULTS, ROOT, TEXTS, Arm, Bench, texts
from common import Figure, parser, write

from minitron_mcore.checkpoint import disk
from minitron_mcore.cli import demo
from minitron_mcore.reporting import tables

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""By degrees of freedom."""


@dataclass(frozen=True)
class Claim:
    """Arm `lower` has a lower loss than arm `upper`."""

    lower: str
    upper: str
    key: str = "after"
    """Or "before" training."""
    expected: bool = True
    """False: the papers found no benefit of `lower`."""


def main(name: str, description: str, arms: dict[str, Arm], claims: list[Claim]) -> None:
    """Measure a finding, print and write it."""
    options = parser(description)
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = options.parse_args()
    if len(options.seeds) > 1 + max(T_95):
        sys.exit(f"--seeds names {len(options.seeds)}; verdicts are for {1 + max(T_95)} or fewer.")
    if missing := [path for path in texts() if not path.is_file()]:
        sys.exit(f"skipped: {missing[0]} is not there.")
    rows = measure(arms, options.seeds[:1] if options.quick else options.seeds, options.quick)
    tables.table(description.splitlines()[0], shown(rows))
    if claims:
        tables.table("what the papers found", [words(judged(claim, rows)) for claim in claims])
    result = {"finding": name, "seeds": options.seeds, "rows": rows}
    disk.write_json((ROOT.with_name("findings_quick") if options.quick else RESULTS) / f"{name}.json", result)
    write(figures(name, rows), options.json)


def figures(name: str, rows: list[dict[str, Any]]) -> list[Figure]:
    """Mean losses over the seeds, for `minitron report`."""
    return [
        Figure(name, f"{key} training", row["arm"], "loss", statistics.fmean(row[key]), "nats/token")
        for row in rows
        for key in ("before", "after")
    ]


def measure(arms: dict[str, Arm], seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Run what is not finished; a row for each arm: losses before and after training by seed, and those of each text."""
    os.environ["OMP_NUM_THREADS"] = "1"
    demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    demo.write_stdlib_text(ROOT.parent / "cache/stdlib")
    benches = [Bench(seed, quick) for seed in seeds]
    first = next(iter(arms.values()))
    benches[0].checkpoint(first.cut)  # tokenises the text and converts the teacher, which all runs share
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda bench: (bench.cache(), bench.losses(first.cut)), benches))
        jobs = [(bench, arm) for bench in benches for arm in arms.values()]
        list(pool.map(lambda job: (job[0].losses(job[1]), job[0].losses(job[1].cut)), jobs))
    rows = []
    for name, arm in arms.items():
        before, after = ([bench.losses(made) for bench in benches] for made in (arm.cut, arm))
        row = {"arm": name, "before": [*map(_mean, before)], "after": [*map(_mean, after)]}
        row |= {"texts": {text: [losses[text] for losses in after] for text in TEXTS}}
        rows.append(row | {"curve": [bench.curve(arm) for bench in benches]})
    return rows


def _mean(losses: dict[str, float]) -> float:
    return statistics.fmean(losses.values())


def difference(row: dict, base: dict, key: str = "after") -> tuple[float, float]:
    """Mean over the seeds of row - base, paired, and its standard error."""
    paired = [a - b for a, b in zip(row[key], base[key], strict=True)]
    error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
    return statistics.fmean(paired), error


def judged(claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim, its difference and "holds": True, False, or None where it is not decided."""
    lower, upper = (next(row for row in rows if row["arm"] == arm) for arm in (claim.lower, claim.upper))
    value, error = difference(lower, upper, claim.key)
    seeds = len(lower[claim.key])
    is_decided = seeds > 1 and abs(value) > T_95[seeds - 1] * error
    holds = (value < 0) == claim.expected if is_decided else None
    return vars(claim) | {"difference": value, "error": error, "holds": holds}


def words(claim: dict[str, Any]) -> dict[str, str]:
    """A judged claim as a row of a table."""
    return {
        "claim on the losses": f"{claim['lower']} {'<' if claim['expected'] else '>='} {claim['upper']}",
        "training": claim["key"],
        "difference": f"{claim['difference']:+.3f} +- {claim['error']:.3f}",
        "verdict": {True: "holds", False: "does not hold", None: "not decided"}[claim["holds"]],
    }


def shown(rows: list[dict[str, Any]]) -> list[dict[str, str | float]]:
    """The table: means over the seeds, and the difference from the first arm with its standard error."""
    table = []
    for row in rows:
        value, error = difference(row, rows[0])
        cells = {"arm": row["arm"], "before": statistics.fmean(row["before"]), "after": statistics.fmean(row["after"])}
        spread = "" if math.isnan(error) else f" +- {error:.3f}"
        cells |= {"difference": "" if row is rows[0] else f"{value:+.3f}{spread}"}
        table.append(cells | {text: statistics.fmean(losses) for text, losses in row["texts"].items()})
    return table
