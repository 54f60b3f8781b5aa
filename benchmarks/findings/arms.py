"""Training runs that the findings compare, on SmolLM2-135M, one thread each, as many at a time as there are cores.

    runs/findings/seed1/CUT/{importance,plan,prune,evaluate}    a student before training
    runs/findings/seed1/ARM/{distill,evaluate}                  the same after training

A finding names its arms; those of the same name are the same run for all findings. Finished stages are kept, a stopped one goes on.
All arms of a seed read the same samples in the same order. The seed draws the calibration text and the order of the samples.
"""

import collections
import json
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from recovery import BLEND, DATA, HELDOUT

from minitron_mcore.checkpoint import disk, stage_record
from minitron_mcore.cli.pipeline import run_stage

ROOT = Path("runs/findings")
RESULTS = Path(__file__).parent / "results"
TEXTS = [*HELDOUT, "code"]
STEPS = 24
HIDDEN = ("kind=hidden",)
LOCKS: dict[Path, threading.Lock] = collections.defaultdict(threading.Lock)
"""By the folder of a stage, which several arms may need at once."""


def texts() -> list[Path]:
    """What the runs read of ../shared/data."""
    names = [*(f"{name}.jsonl.gz" for name in BLEND), *HELDOUT.values(), "wikitext2.valid.txt"]
    return [DATA / "text" / name for name in names]


@dataclass(frozen=True)
class Cut:
    """A student before training."""

    name: str = "width"
    prune: tuple[str, ...] = ("prune=smollm2_100m",)
    statistic: tuple[str, ...] = ()
    """Overrides of the importance stage."""
    source: "Cut | Arm | None" = None
    """What is cut; None: SmolLM2-135M."""
    without: tuple[str, int] | None = None
    """Blocks to drop: how they are chosen (see `Bench.dropped`), and their number."""
    random: str = ""
    """"weights": of the cut's shape, initialised by transformers; "scores": cut by random scores."""


@dataclass(frozen=True)
class Arm:
    """A student's training."""

    name: str = "kl"
    cut: Cut = Cut()
    train: tuple[str, ...] = ()
    """Overrides of the distill stage."""
    steps: int = STEPS
    teacher: "Arm | None" = None
    """A corrected teacher; None: SmolLM2-135M."""
    cache: tuple[str, ...] = HIDDEN
    """Settings of the teacher's cache, which all such arms of a seed share; empty: the teacher runs beside."""
    stage: str = "distill"
    """Or "correct": trains the teacher itself."""


class Bench:
    """The runs of one seed."""

    def __init__(self, seed: int, quick: bool):
        self.seed, self.quick = seed, quick
        self.root = (ROOT.with_name("findings_quick") if quick else ROOT) / f"seed{seed}"
        teacher = Path("runs/cache/smollm2_135m")
        blend = ",".join(f"'{weight} {DATA}/text/{name}.jsonl.gz'" for name, weight in BLEND.items())
        self.model = ["model.name=smollm2", f"model.hf={teacher}", f"work_dir={self.root}", "importance=small"]
        self.model += [f"data.train=[{blend}]", f"seed={seed}", f"data.seed={seed}"]
        held = [*(DATA / "text" / name for name in HELDOUT.values()), ROOT.parent / "cache/stdlib/heldout.jsonl"]
        self.heldout = [f"data.heldout=[{','.join(map(str, held))}]", "evaluate=small", "evaluate.max_windows=8"]
        self.heldout += ["evaluate.max_windows=1"] if quick else []

    def once(self, stage: str, out_dir: Path, *overrides: str) -> Path:
        with LOCKS[out_dir]:
            if not stage_record.is_complete(out_dir):
                run_stage(stage, *self.model, *overrides, f"out_dir={out_dir}")
        return out_dir

    def steps(self, steps: int) -> list[str]:
        steps = 2 if self.quick else steps
        return [f"distill.steps={steps}", f"distill.warmup_steps={max(1, steps // 8)}", "distill.save_every=1000"]

    def teacher(self) -> Path:
        return self.once("convert", self.root.parent / "teacher")

    def cache(self, kept: tuple[str, ...] = HIDDEN) -> Path:
        """The teacher's outputs on the samples of STEPS steps; by default the final hidden states."""
        names = [] if kept == HIDDEN else [setting.replace("=", "_") for setting in kept]
        folder = "_".join(["teacher_cache", *names])
        settings = [f"teacher={self.teacher()}", *kept, *self.steps(STEPS), "distill=small"]
        return self.once("teacher_cache", self.root / folder, *settings)

    def checkpoint(self, made: "Cut | Arm | None") -> Path:
        if made is None:
            return self.teacher()
        return self.cut(made) if isinstance(made, Cut) else self.train(made)

    def cut(self, cut: Cut) -> Path:
        folder, source = self.root / cut.name, self.checkpoint(cut.source)
        if cut.random == "weights":
            return self._initialised(folder, self.cut(Cut(prune=cut.prune)))
        scores = self.root / "_".join(
            [
                "importance",
                *([cut.source.name] if cut.source else []),
                *(setting.rpartition("=")[2] for setting in cut.statistic),
            ]
        )
        scores = self.once("importance", scores, f"source={source}", *cut.statistic)
        if cut.random == "scores":
            scores = self._random_scores(folder / "scores", scores)
        drop = [f"prune.drop_blocks={self.dropped(*cut.without)}"] if cut.without else []
        plan = self.once("plan", folder / "plan", f"source={source}", f"scores={scores}", *cut.prune, *drop)
        return self.once("prune", folder / "prune", f"source={source}", f"plan={plan}")

    def dropped(self, rule: str, count: int) -> list[int]:
        """Numbers of the blocks whose removal costs least on other text: a run of neighbours by "loss" or "accuracy" on WinoGrande,
        or by the loss of each alone, "scattered"."""
        metric = "accuracy" if rule == "accuracy" else "loss"
        settings = ["depth=small", f"source={self.teacher()}", f"data.heldout=[{DATA}/text/wikitext2.valid.txt]"]
        settings += [f"depth.metric={metric}", "depth.sizes=[15]" if rule == "accuracy" else "depth.sizes=[1,10,15]"]
        settings += ["depth.windows=1"] if self.quick else []
        settings += (
            [f"depth.choices={DATA}/eval/winogrande_winogrande_xl.validation.jsonl"] if rule == "accuracy" else []
        )
        study = self.once("depth", self.root.parent / f"depth_{metric}", *settings)
        points = json.loads((study / "depth.json").read_text())["sweep"]
        if rule == "scattered":
            single = sorted((point["loss"], point["dropped"]) for point in points if len(point["dropped"]) == 1)
            return sorted(block for _, (block,) in single[:count])
        sign = -1 if rule == "accuracy" else 1
        return min((p for p in points if len(p["dropped"]) == count), key=lambda p: (sign * p[metric], p["loss"]))[
            "dropped"
        ]

    def train(self, arm: Arm) -> Path:
        settings = [f"{arm.stage}=small", *self.steps(arm.steps)]
        if arm.stage == "correct":
            settings = [setting.replace("distill.", "correct.") for setting in settings]
            return self.once(
                "correct", self.root / arm.name / "correct", f"source={self.teacher()}", *settings, *arm.train
            )
        teacher = self.cache(arm.cache) if arm.cache and not arm.teacher else self.checkpoint(arm.teacher)
        models = [f"student={self.cut(arm.cut)}", f"teacher={teacher}"]
        return self.once("distill", self.root / arm.name / "distill", *models, *settings, *arm.train)

    def losses(self, made: "Cut | Arm | None") -> dict[str, float]:
        """Loss on each held-out text. A trained arm's weights (1.4 GB) are removed then: those that others are made from have no
        losses."""
        checkpoint = self.checkpoint(made)
        out_dir = checkpoint.parent / (f"evaluate_{checkpoint.name}" if made is None else "evaluate")
        out_dir = self.once("evaluate", out_dir, f"source={checkpoint}", *self.heldout)
        for weights in checkpoint.glob("step_*") if isinstance(made, Arm) else ():
            shutil.rmtree(weights)
        files = json.loads((out_dir / "evaluation.json").read_text())["files"]
        return {text: file["loss"] for text, file in zip(TEXTS, files, strict=True)}

    def curve(self, arm: Arm) -> list[float]:
        """Cross-entropy on each step's samples before the step, which the student has not seen."""
        lines = (self.train(arm) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["lm_loss"] for line in lines]

    def _initialised(self, folder: Path, like: Path) -> Path:
        if not stage_record.is_complete(folder / "prune"):
            from transformers import AutoConfig, AutoModelForCausalLM

            hf = self.once("export", folder / "hf", f"source={like}")
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf), dtype=torch.bfloat16)
            model.save_pretrained(folder / "random_hf")
            for file in hf.glob("tokenizer*"):
                disk.replace_text(folder / "random_hf" / file.name, file.read_text())
        return self.once("convert", folder / "prune", f"model.hf={folder}/random_hf")

    def _random_scores(self, folder: Path, scores: Path) -> Path:
        from minitron_mcore.importance.scores import FILE, Scores, read_scores, save_scores

        found, generator = read_scores(scores / FILE), torch.Generator().manual_seed(self.seed)
        drawn = {name: torch.rand(vector.shape, generator=generator) for name, vector in found.vectors.items()}
        folder.mkdir(parents=True, exist_ok=True)
        return save_scores(folder, Scores(drawn, found.metadata))
