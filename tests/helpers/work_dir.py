"""A work_dir with the files of every stage, for the report."""

import json
import shutil
from pathlib import Path

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.importance.scores import Scores, save_scores
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.apply import fingerprint
from minitron_mcore.pruning.plan import Plan, make_plan
from minitron_mcore.reporting import plots
from tests.helpers.cutting import random_scores

ARCH = Architecture("llama", 5, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, tied=False)
EVIL = "<img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
SWEEP = [
    {"size": 1, "first": n, "dropped": [n], "loss": loss, "kl": loss - 3, "mse": 0.1, "accuracy": accuracy}
    for n, (loss, accuracy) in enumerate([(9.5, 0.5), (3.25, 0.55), (3.5, 0.65), (4.0, 0.6), (8.0, 0.5)])
] + [{"size": 2, "first": n, "dropped": [n, n + 1], "loss": 10.0 - n, "kl": 1.0, "mse": 0.2} for n in range(4)]
DEPTH = {
    "model": "f" * 16,
    "metric": "loss",
    "kind": "contiguous",
    "baseline": {"loss": 3.125, "accuracy": None},
    "sweep": SWEEP,
    "drop": {"1": [1], "2": [3, 4]},
}
CANDIDATES = [
    {
        "name": name,
        "sizes": {"blocks": 5, "hidden": hidden, "ffn": 20},
        "parameters": 1000 + hidden,
        "zero_shot_loss": z,
    }
    | {"without_embeddings": hidden, "steps": steps, "losses": [], "loss": loss, "decode_tokens_per_second": None}
    for name, hidden, z, steps, loss in [
        ("wide", 32, 5.5, [8, 16], 4.75),
        (EVIL, 28, 5.25, [8, 16], 5.0),
        ("c", 24, 7.0, [], None),
    ]
]
WRITTEN = ("importance", "plan", "depth", "search", "distill", "evaluate", "out")


def made(folder: Path, name: str, parents: dict, **details) -> dict:
    """model.json of a checkpoint; its lineage."""
    folder.mkdir()
    run_folder.describe(folder, ARCH, name, parents, folder, **details)
    return json.loads((folder / "model.json").read_text())["lineage"]


def planned() -> tuple[Scores, Plan]:
    known = {"fingerprint": "f" * 16, "samples": "77", "data": EVIL}
    scores = Scores(random_scores(ARCH).vectors, known)
    return scores, make_plan(ARCH, "f" * 16, scores, PruneConfig(hidden=24, ffn=17, drop_blocks=[1, 3]))


def write(root: Path) -> Path:
    """A work_dir with something of every stage."""
    for name in WRITTEN:
        (root / name).mkdir(parents=True)
    scores, plan = planned()
    file = save_scores(root / "importance", scores)
    plots.plot_importance(file, root / "importance" / "importance.png")
    (root / "plan" / "plan.json").write_text(plan.to_json())
    plots.plot_plan(plan, scores.vectors, root / "plan" / "plan.png")
    converted = made(root / "convert", "f" * 16, {"huggingface": {"path": "/models/Tiny", "sha256": "f" * 16}})
    source = {"path": str(root / "convert"), "fingerprint": "f" * 16, "step": "step_0000000"}
    cut = {"plan": plan.digest(), "scores": plan.scores, "ancestry": converted}
    pruned = made(root / "prune", fingerprint(plan), {"source": source}, **cut)
    (root / "prune" / "plan.json").write_text(plan.to_json())
    student = {"path": str(root / "prune"), "fingerprint": fingerprint(plan), "step": "step_0000000"}
    away = {"path": str(root / "gone"), "fingerprint": "0123456789abcdef", "step": "step_0000004"}
    training = {"settings": {"peak_lr": 0.0123, "steps": 30}, "data": {"files": [], "hash": "dada"}}
    taught = {"parents": {"source": away}, "versions": {}, "command": EVIL}
    lineages = {"ancestry": pruned, "teacher": taught}
    shutil.rmtree(root / "distill")
    distilled = made(root / "distill", "d" * 16, {"student": student, "teacher": away}, **training, **lineages)
    steps = [
        {"step": n, "tokens": 64 * n, "kd_loss": 4.5 / n, "lm_loss": 2.5 + 2 / n, "lr": 1e-3, "grad_norm": 1.0}
        for n in range(1, 31)
    ]
    lines = [json.dumps(step) for step in steps]
    (root / "distill" / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:9]]))  # a run is writing
    (root / "distill" / "losses of <b>.png").write_bytes((root / "plan" / "plan.png").read_bytes())
    (root / "depth" / "depth.json").write_text(json.dumps(DEPTH))
    (root / "depth" / "loss_by_last_block.png").write_bytes((root / "plan" / "plan.png").read_bytes())
    (root / "search" / "search.json").write_text(json.dumps({"model": "f" * 16, "candidates": CANDIDATES}))
    figures = {"file": "/text/heldout.jsonl", "tokens": 11, "bytes": 44, "loss": 2.25, "perplexity": 9.488}
    evaluation = {"source": str(root / "out"), "parameters": 29400, "files": [figures, figures | {"file": EVIL}]}
    (root / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation))
    (root / "out" / "minitron").mkdir()
    (root / "out" / "minitron" / f"plan_{plan.digest()}.json").write_text(plan.to_json())
    record = {
        "path": str(root / "distill"),
        "step": "step_0000030",
        "fingerprint": "d" * 16,
        "command": "launch/export.py x",
    }
    (root / "out" / "minitron" / "lineage.json").write_text(json.dumps(record | {"lineage": distilled}))
    return root
