"""Depth studies of SmolLM2-135M: runs of 1, 2, 4, 8 and half of its blocks by loss, held against an independent trial; single
blocks and half by accuracy on WinoGrande.

Both are run by launch/depth.py on one process below runs/depth, where a stopped one goes on: remove the folder to start anew. Text
is ../shared/data's WikiText-2 validation set, 4 windows of 512 spread over it; questions are its first 200 of WinoGrande (standard
error 0.035). The trial took 4 windows of 512 of WikiText-2 too, but it is not known which; so transformers, with the layers
deleted, is asked for the same points on the study's own windows. --quick takes one window, single blocks and no questions.
"""

import json
import sys
from pathlib import Path

from common import Figure, arguments, write
from torch import nn

from minitron_mcore.cli import demo
from minitron_mcore.cli.pipeline import run_stage
from minitron_mcore.data import tokenizer
from minitron_mcore.depth.study import format_ranges
from minitron_mcore.evaluation import perplexity
from minitron_mcore.evaluation.windows import file_windows
from minitron_mcore.reporting import tables

DATA = Path(__file__).parents[2] / "shared/data"
TEXT, QUESTIONS = DATA / "text/wikitext2.valid.txt", DATA / "eval/winogrande_winogrande_xl.validation.jsonl"
RUNS = {12: 4.55, 10: 5.77, 16: 6.08, 22: 19.96, 20: 14.78}
TRIAL = {(): 3.20, (0,): 10.98, (1,): 6.17, (29,): 5.48, (11,): 4.73, (28,): 4.69}
TRIAL |= {tuple(range(first, first + 8)): loss for first, loss in RUNS.items()} | {tuple(range(14, 29)): 22.27}
"""Its loss without these blocks; 3.3 to 3.9 without any other single one."""


def main() -> None:
    options = arguments(__doc__)
    if missing := [path for path in (TEXT, QUESTIONS) if not path.is_file()]:
        sys.exit(f"skipped: {missing[0]} is not there.")
    root = Path("runs/depth_quick" if options.quick else "runs/depth")
    teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    model = ["+model=smollm2_135m", f"model.hf={teacher}", f"work_dir={root}"]
    if not (root / "convert/.complete").is_file():
        run_stage("convert", *model)
    command = [*model, "depth=small", f"data.heldout=[{TEXT}]"]
    quick = ["depth.windows=1", "depth.sizes=[1]"] if options.quick else []
    run_stage("depth", *command, f"out_dir={root}/loss", "depth.kind=best", "dtype=fp32", *quick)
    by_loss = json.loads((root / "loss/depth.json").read_text())
    figures = _compared(by_loss, _by_transformers(teacher, 1 if options.quick else 4))
    if not options.quick:
        asked = ["depth.sizes=[1,0.5]", "depth.metric=accuracy", "depth.kind=best", f"depth.choices={QUESTIONS}"]
        run_stage("depth", *command, f"out_dir={root}/accuracy", *asked)
        figures += _by_accuracy(json.loads((root / "accuracy/depth.json").read_text()))
    write(figures, options.json)


def _by_transformers(folder: Path, windows: int) -> dict[tuple[int, ...], float]:
    """Loss of the trial's points in transformers, on the windows of the study."""
    model, found = perplexity.HFModel(str(folder)), {}
    cuts = {str(TEXT): file_windows(str(TEXT), tokenizer.load(folder), 512)}
    layers = list(model.model.model.layers)
    for dropped in TRIAL:
        model.model.model.layers = nn.ModuleList(layer for n, layer in enumerate(layers) if n not in dropped)
        settings = {"micro_batch": 4, "max_windows": windows}
        found[dropped] = perplexity.evaluate_windows(cuts, model.nll, **settings)[0]["loss"]
    return found


def _compared(study: dict, by_transformers: dict[tuple[int, ...], float]) -> list[Figure]:
    found = {tuple(point["dropped"]): point["loss"] for point in study["sweep"]} | {(): study["baseline"]["loss"]}
    rows = [
        {
            "without": format_ranges(dropped) or "none",
            "minitron": found[dropped],
            "transformers": by_transformers[dropped],
            "trial": loss,
        }
        for dropped, loss in TRIAL.items()
        if dropped in found
    ]
    others = [loss for dropped, loss in found.items() if len(dropped) == 1 and dropped not in TRIAL]
    largest = max(abs(row["minitron"] - row["transformers"]) for row in rows)
    notes = [
        f"largest difference from transformers {largest:.1e}",
        f"without any other single block {min(others):.2f} to {max(others):.2f} (the trial: 3.3 to 3.9)",
    ]
    tables.table(f"loss on {study['tokens']:,} tokens of WikiText-2", rows, notes)
    return [
        Figure("depth", f"without {row['without']}", name, "loss", row[name], "nats/token")
        for row in rows
        for name in ("minitron", "transformers", "trial")
    ]


def _by_accuracy(study: dict) -> list[Figure]:
    points = [{"size": 0, "dropped": []} | study["baseline"], *study["sweep"]]
    return [
        Figure(
            "depth",
            f"without {format_ranges(point['dropped']) or 'none'}",
            "minitron",
            "winogrande",
            point["accuracy"],
            "1",
        )
        for point in points
    ]


if __name__ == "__main__":
    main()
