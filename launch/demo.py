"""The whole way on a laptop: SmolLM2-135M from its GGUF to a distilled 100 M Hugging Face folder, on tensor-parallel CPU ranks.

python launch/demo.py            # what `make demo` runs; artefacts in runs/demo
"""

import json
import shutil
import sys
import time
from pathlib import Path

from minitron_mcore.cli import demo
from minitron_mcore.cli.pipeline import stage
from minitron_mcore.errors import UserError
from minitron_mcore.reporting import page, tables

ROOT = Path("runs/demo")
RANKS = 3  # 9 heads and 3 key/value groups: 1 or 3
MODELS = {"teacher": ROOT / "teacher_hf", "just pruned": ROOT / "pruned_hf", "distilled": ROOT / "hf"}


def main() -> None:
    start = time.monotonic()
    shutil.rmtree(ROOT, ignore_errors=True)
    teacher = demo.fetch_teacher(MODELS["teacher"])
    train, heldout = demo.write_stdlib_text(ROOT / "text")
    model = ["+model=smollm2_135m", f"model.hf={teacher}", f"work_dir={ROOT}"]
    text = [f"data.train=[{train}]", f"data.heldout=[{heldout}]", f"data.cache={ROOT}/cache"]
    sharded = [*model, f"parallel=tp{RANKS}"]
    stage("convert", *sharded, processes=RANKS)
    stage("importance", *sharded, *text, "importance=small", processes=RANKS)
    stage("plan", *sharded, "prune=smollm2_100m")
    stage("prune", *sharded, processes=RANKS)
    stage("distill", *sharded, *text, "distill=small", processes=RANKS)
    stage("export", *model)
    stage("export", *model, f"source={ROOT}/prune", f"out_dir={MODELS['just pruned']}")
    rows = []
    for name, folder in MODELS.items():
        out_dir = ROOT / f"evaluate_{folder.name}"
        stage("evaluate", *model, *text, "evaluate=small", f"source={folder}", f"out_dir={out_dir}", "dtype=fp32")
        found = json.loads((out_dir / "evaluation.json").read_text())
        figures = found["files"][0]
        rows.append(
            {"model": name, "parameters": found["parameters"]}
            | {key: figures[key] for key in ("loss", "perplexity", "bits_per_byte")}
            | {"folder": str(folder)}
        )
    steps = [json.loads(line) for line in (ROOT / "distill/metrics.jsonl").read_text().splitlines()]
    speed = sorted(step["tokens_per_second"] for step in steps)[len(steps) // 2]
    page.write(ROOT, ROOT / "report.html")
    lost, won = rows[1]["loss"] - rows[0]["loss"], rows[1]["loss"] - rows[2]["loss"]
    tables.table(
        "SmolLM2-135M-Instruct (dequantised from Q4_1), pruned and distilled; held-out text of the standard library",
        rows,
        [
            f"distilled on {steps[-1]['tokens']:,} tokens at {speed:.0f} tokens/s; "
            f"won back {won / lost:.0%} of the loss that pruning cost",
            f"pictures: {ROOT}/importance/importance.png, {ROOT}/distill/losses.png",
            f"checkpoints: {ROOT}/convert, {ROOT}/prune, {ROOT}/distill; plan: {ROOT}/plan/plan.json; text: {ROOT}/text",
            f"everything on one page: {ROOT}/report.html",
            f"{(time.monotonic() - start) / 60:.1f} minutes in all",
        ],
    )
    tables.write_json(ROOT / "demo.json", {"models": rows, "tokens_per_second": speed})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
