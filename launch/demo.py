"""Prune and distill SmolLM2-135M to 100 M parameters on CPU ranks; what `make demo` runs.

minitron demo    # the results are in runs/demo
"""

import json
import sys
import time
from pathlib import Path

from minitron_mcore.checkpoint import disk, owner
from minitron_mcore.cli import demo
from minitron_mcore.cli.pipeline import run_stage
from minitron_mcore.errors import Stopped, UserError
from minitron_mcore.export import model_card
from minitron_mcore.reporting import page, tables

ROOT = Path("runs/demo")
RANKS = 3  # divides the model's 9 heads and 3 key/value groups
MODELS = {
    "teacher": (ROOT / "teacher_hf", ROOT / "convert"),
    "just pruned": (ROOT / "pruned_hf", ROOT / "prune"),
    "distilled": (ROOT / "hf", ROOT / "distill"),
}
"""Hugging Face folder and checkpoint of each model."""
PROMPT = "The import statement"


def commands(teacher: Path, train: Path, heldout: Path) -> list[tuple[str, list[str], int]]:
    """Stage, overrides and number of processes of every step."""
    model = ["model=smollm2_135m", f"model.hf={teacher}", f"work_dir={ROOT}"]
    text = [f"data.train=[{train}]", f"data.heldout=[{heldout}]", f"data.cache={ROOT}/cache"]
    sharded = [*model, f"parallel=tp{RANKS}"]
    steps = [
        ("convert", sharded, RANKS),
        ("importance", [*sharded, *text, "importance=small"], RANKS),
        ("plan", [*sharded, "prune=smollm2_100m"], 1),
        ("prune", sharded, RANKS),
        ("distill", [*sharded, *text, "distill=small"], RANKS),
        ("export", model, 1),
        ("export", [*model, f"source={ROOT}/prune", f"out_dir={MODELS['just pruned'][0]}"], 1),
    ]
    for folder, _ in MODELS.values():
        overrides = ["evaluate=small", f"source={folder}", f"out_dir={ROOT}/evaluate_{folder.name}", "dtype=fp32"]
        steps.append(("evaluate", [*model, *text, *overrides], 1))
    for folder, checkpoint in MODELS.values():
        overrides = [f"source={checkpoint}", f"prompt='{PROMPT}'", "tokens=40", f"text_file={text_file(folder)}"]
        steps.append(("generate", [*model, *overrides], 1))
    return steps


def text_file(folder: Path) -> Path:
    """The continuation by the model of this Hugging Face folder."""
    return ROOT / f"{folder.name}.txt"


def evaluations() -> list[dict]:
    """A row for each model: parameters, and figures of the held-out text."""
    rows = []
    for name, (folder, _) in MODELS.items():
        evaluation = json.loads((ROOT / f"evaluate_{folder.name}/evaluation.json").read_text())
        figures = evaluation["files"][0]
        rows.append(
            {"model": name, "parameters": evaluation["parameters"]}
            | {key: figures[key] for key in ("loss", "perplexity", "bits_per_byte")}
            | {"folder": str(folder)}
        )
    return rows


def show(rows: list[dict], minutes: float) -> None:
    """Print and save the results: figures, then each model's continuation of the same prompt."""
    steps = [json.loads(line) for line in (ROOT / "distill/metrics.jsonl").read_text().splitlines()]
    speed = sorted(step["tokens_per_second"] for step in steps)[len(steps) // 2]
    teacher, pruned, distilled = (row["loss"] for row in rows)
    tables.table(
        "SmolLM2-135M-Instruct (dequantised from Q4_1), pruned and distilled; held-out text of the standard library",
        rows,
        [
            f"distilled on {steps[-1]['tokens']:,} tokens at {speed:.0f} tokens/s; "
            f"recovered {(pruned - distilled) / (pruned - teacher):.0%} of the loss that pruning added",
            f"report on all stages: {ROOT}/report.html",
            f"{minutes:.1f} minutes in all",
        ],
    )
    texts = {name: text_file(folder).read_text(encoding="utf-8") for name, (folder, _) in MODELS.items()}
    print(f'\ngreedy continuations of "{PROMPT}"')
    for name, text in texts.items():
        print(f"\n  {name}: {' '.join(text.split())}")
    disk.write_json(ROOT / "demo.json", {"models": rows, "tokens_per_second": speed, "continuations": texts})


def main() -> None:
    start = time.monotonic()
    with owner.Claim(ROOT) as claim:
        claim.clear()
        teacher = demo.fetch_teacher(MODELS["teacher"][0])
        steps = commands(teacher, *demo.write_stdlib_text(ROOT / "text"))
        for number, (stage, overrides, processes) in enumerate(steps, 1):
            run_stage(stage, *overrides, processes=processes, number=number, total=len(steps))
        page.write(ROOT, ROOT / "report.html")
        model_card.update_results(ROOT)
        show(evaluations(), (time.monotonic() - start) / 60)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped)
        sys.exit(stopped.exit_status)
