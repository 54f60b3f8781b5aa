"""Write docs/findings.md from results/*.json; with --check, fail where the page is out of date."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

from arms import RESULTS, STEPS
from verdicts import judged, shown, words

from minitron_mcore.reporting import tables

PAGE = Path(__file__).parents[2] / "docs/findings.md"
ORDER = (
    "divergence",
    "initialisation",
    "axes",
    "width_depth",
    "importance_rounds",
    "statistic",
    "hidden_states",
    "depth_metric",
    "temperature",
    "top_k",
    "sampled_logits",
    "correction",
    "schedule",
)
HEAD = f"""# The papers' findings at 135 M parameters

<!-- Written by benchmarks/findings/page.py from benchmarks/findings/results. -->

What arXiv 2407.14679 and arXiv 2408.11796 report of models with 8 to 15 B parameters and 1.8 to 94 B tokens, tried on
SmolLM2-135M with {STEPS * 1024:,} tokens: a cut to 100 M parameters, then {STEPS} steps of 4 x 256 tokens on a blend of books,
technical prose and code (peak learning rate 8e-4), where nothing else is said. So few tokens show the start of a recovery,
not its end.

Losses are nats a token, the mean of four held-out texts that count alike: books, technical prose, WikiText-2 and code, 8
windows of 512 tokens each. Each arm ran with three seeds, which draw the calibration text and the training samples; arms of
one seed read the same samples. Differences are means over the seeds of the difference to the first arm, with their standard
error; where one is negative, the arm named first has the lower loss. A claim is decided where the 95 % interval of its
difference excludes 0 (Student's t, two degrees of freedom). Claims were written down before the runs, unless said otherwise;
one in twenty would be decided by chance alone.
"""


def page() -> str:
    results = [
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ORDER if (RESULTS / f"{name}.json").is_file()
    ]
    rows = [words(judged(claim, each["rows"])) for each in results for claim in _module(each).CLAIMS]
    missing = [f"`{name}.py`" for name in ORDER if not (RESULTS / f"{name}.json").is_file()]
    parts = [HEAD, _table(rows), f"Not run yet, in benchmarks/findings: {', '.join(missing)}." if missing else ""]
    for result in results:
        title, text = _module(result).__doc__.split("\n", 1)
        parts += [f"## {title.rstrip('.')}\n", f"`python benchmarks/findings/{result['finding']}.py`", text]
        parts += [_table(shown(result["rows"])), _crossing(result)]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _module(result: dict) -> ModuleType:
    return importlib.import_module(result["finding"])


def _table(rows: list[dict]) -> str:
    return tables.markdown(rows).replace("+-", "±")


def _crossing(result: dict) -> str:
    """From which step on the second of two arms with swapped places stays behind, by seed."""
    if result["finding"] != "width_depth":
        return ""
    first, second = (row["curve"] for row in result["rows"])
    behind = [
        [n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a > b] for pair in zip(first, second, strict=True)
    ]
    steps = ", ".join(str(max(found, default=-1) + 1) for found in behind)
    return f"Loss on the training samples, each before its step: width is below depth for good after {steps} steps (by seed)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE} is out of date: python benchmarks/findings/page.py")


if __name__ == "__main__":
    main()
