"""Tables of dry runs in the tutorials: a failure means that a page's figures are not what its commands print today."""

import re
import shlex
from pathlib import Path

import pytest

from minitron_mcore.cli import dry_run
from tests.helpers.launching import config_of

TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"


def commands(page: str, word: str) -> list[list[str]]:
    """Overrides of the page's dry runs with `word` in the line."""
    lines = re.findall(r"^    (.*dry_run=true.*)$", (TUTORIALS / page).read_text(), re.MULTILINE)
    return [[part for part in shlex.split(line) if "=" in part] for line in lines if word in line]


@pytest.mark.parametrize(("stage", "name"), [("distill", "distillation"), ("correct", "teacher correction")])
def test_what_fits_in_a_week(stage, name):
    [shortened] = commands("llama-in-a-week.md", f"{stage}.steps")
    full = [word for word in shortened if not word.startswith(f"{stage}.steps")]
    for length, overrides in (("full", full), ("shortened", shortened)):
        figures = dry_run.plan(config_of(stage, *overrides))
        [row] = [row for row in figures["layouts"] if (row["TP"], row["PP"], row["CP"]) == (2, 1, 1)]
        steps, tokens = (figures["operations"][key] for key in ("steps", "tokens"))
        days = f"{row['days']:#.3g}" if row["days"] >= 1 else f"{row['days']:.2f}"
        cells = [f"{name}, {length}", f"{steps:,}", f"{tokens / 1e9:.1f} B", f"{row['GiB']:.1f}", days]
        assert f"| {' | '.join(cells)} |" in (TUTORIALS / "llama-in-a-week.md").read_text()


def test_candidates_of_the_search():
    [overrides] = commands("size.md", "search.budget")
    figures = dry_run.plan(config_of("search", *overrides))
    assert len(figures["candidates"]) == 4 and f"{figures['operations']['days']:.1f} days" == "2.7 days"
    for row in figures["candidates"]:
        blocks, hidden, ffn, _ = re.findall(r"\d+", row["candidate"])
        cells = [f"{blocks}, {hidden}, {ffn}", f"{row['parameters'] / 1e9:.3f} B", f"{row['weights GB']:.2f}"]
        cells += [f"{row['KV cache GB']:.2f}", f"{row['prefill TFLOP']:.1f}", f"{row['decode GFLOP']:.1f}"]
        assert f"| {' | '.join(cells)} |" in (TUTORIALS / "size.md").read_text()


def test_parameters_of_both_cuts():
    counts = [dry_run.plan(config_of("plan", *words))["models"]["target"] for words in commands("size.md", "prune.")]
    for label, key in (("parameters", "parameters"), ("without embeddings", "without_embeddings")):
        cells = [label, *(f"{count[key]:,}" for count in counts)]
        assert f"| {' | '.join(cells)} |" in (TUTORIALS / "size.md").read_text()
