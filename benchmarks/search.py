"""An architecture search on SmolLM2-135M: 100 M parameters within 3 %, depth against width against speed.

Candidates of conf/search/smollm2_100m.yaml are cut from one set of scores and ranked by their loss on held-out text of the standard
library; the best four are trained for 16 steps of 1,024 tokens and ranked again. Everything lies below runs/search, where what is
finished is kept: remove the folder to start anew. About 15 minutes on two cores; --quick takes two candidates and two steps.
"""

import json
from pathlib import Path

from common import Figure, arguments, write

from minitron_mcore.cli import demo
from minitron_mcore.cli.pipeline import run_stage

QUICK = ["search.blocks=[28,30]", "search.hidden=[504]", "search.ffn=[1152]", "search.best=1", "search.steps=2"]
QUICK += ["distill.warmup_steps=1", "search.speed.repetitions=1", "importance.samples=8", "evaluate.max_windows=2"]
QUICK += ["search.budget.tolerance=0.06"]


def main() -> None:
    options = arguments(__doc__)
    root = Path("runs/search_quick" if options.quick else "runs/search")
    teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    train, heldout = demo.write_stdlib_text(root / "text")
    settings = ["+recipe=smollm2_100m", f"runs={root}", f"model.hf={teacher}", f"data.train=[{train}]"]
    settings += [f"data.cache={root}/cache", "search=smollm2_100m", "evaluate.max_windows=12", "distill.warmup_steps=2"]
    settings += QUICK if options.quick else []
    run_stage("pipeline", *settings, "stages=[convert,importance]")
    run_stage("search", *settings, f"data.heldout=[{heldout}]")
    found = json.loads((root / "smollm2_100m/search/search.json").read_text())
    metrics = {"zero_shot_loss": "nats/token", "loss": "nats/token"}
    metrics |= {f"{kind}_tokens_per_second": "tokens/s" for kind in ("prefill", "decode")}
    write(
        [
            Figure("search", "smollm2 100 M", row["name"], metric, row[metric], unit)
            for row in found["candidates"]
            for metric, unit in metrics.items()
            if row[metric] is not None
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
