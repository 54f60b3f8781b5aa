"""One cut against two: SmolLM2-135M -> 100 M at once, and by way of 115 M, with as many tokens in all (65,536).

Each arm is a recipe (smollm2_100m; smollm2_115m, then smollm2_100m_chained) run by launch/pipeline.py below runs/iterative, where
finished stages are kept: remove the folder to start anew. The 135 M model teaches throughout. Text is the standard library's,
perplexity that of the exported folders in transformers, fp32, on what was held out. About 20 minutes on two cores;
--quick takes two steps an arm, about five, and shows only that it runs.
"""

import json
import subprocess
import sys
from pathlib import Path

from common import Figure, arguments, write

from minitron_mcore.cli import demo
from minitron_mcore.cli.compose import LAUNCH
from minitron_mcore.cli.pipeline import run_stage
from minitron_mcore.reporting import tables

RECIPES = ("smollm2_100m", "smollm2_115m", "smollm2_100m_chained")
QUICK = ["distill.steps=2", "distill.warmup_steps=1", "importance.samples=8", "evaluate.max_windows=2"]


def main() -> None:
    options = arguments(__doc__)
    root = Path("runs/iterative_quick" if options.quick else "runs/iterative")
    teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    train, heldout = demo.write_stdlib_text(root / "text")
    settings = [f"runs={root}", f"model.hf={teacher}", f"data.train=[{train}]", f"data.cache={root}/cache"]
    settings += QUICK if options.quick else []
    arms = ["--multirun", f"+recipe={','.join(RECIPES)}"]
    subprocess.run([sys.executable, str(LAUNCH / "pipeline.py"), *arms, *settings], check=True)

    models = {"teacher": (teacher, 0), "115 M on the way": (root / RECIPES[1] / "hf", 1)}
    models |= {"100 M, one cut": (root / RECIPES[0] / "hf", 1), "100 M, two cuts": (root / RECIPES[2] / "hf", 2)}
    steps = {name: _last_step(root / name)["tokens"] for name in RECIPES}
    seen = [0, steps[RECIPES[1]], steps[RECIPES[0]], steps[RECIPES[1]] + steps[RECIPES[2]]]
    rows, figures = [], []
    for tokens, (name, (folder, cuts)) in zip(seen, models.items(), strict=True):
        out_dir = root / f"evaluate_{name.replace(' ', '_').replace(',', '')}"
        if not (out_dir / "evaluation.json").is_file():
            where = [f"source={folder}", f"out_dir={out_dir}", f"data.heldout=[{heldout}]", "dtype=fp32"]
            run_stage("evaluate", f"+recipe={RECIPES[0]}", *settings, *where)
        found = json.loads((out_dir / "evaluation.json").read_text())
        measured = {key: found["files"][0][key] for key in ("loss", "perplexity", "bits_per_byte")}
        rows.append({"model": name, "cuts": cuts, "parameters": found["parameters"], "tokens": tokens} | measured)
        for metric, unit in (("loss", "nats/token"), ("perplexity", "1"), ("bits_per_byte", "bits/byte")):
            figures.append(Figure("iterative", f"smollm2 {tokens} tokens", name, metric, measured[metric], unit))
    tables.table("held-out text of the standard library", rows)
    write(figures, options.json)


def _last_step(run: Path) -> dict:
    return json.loads((run / "distill/metrics.jsonl").read_text().splitlines()[-1])


if __name__ == "__main__":
    main()
