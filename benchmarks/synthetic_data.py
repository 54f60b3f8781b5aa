"""What a pruned model is best trained on: real text, or what its teacher writes, by cross-entropy or by the teacher's logits.

The real text is excerpts from the files that `recovery.py` trains on. SmolLM2-135M continues the first 12 words of each, by
`minitron synthesize`. Its answers are sampled, filtered by likelihood and length, and deduplicated. A sample is a prompt and its
answer; both are trained on. The same pruned 100 M student is trained in four arms on equally many tokens:

    cross-entropy, samples    sequence-level distillation (arXiv 1606.07947), the usual fine-tuning on synthetic data
    logits, real text         as in Minitron (arXiv 2407.14679)
    logits, samples
    logits, both              half and half

Losses are those of `recovery.py`: books and WikiText-2 that are held out, technical prose that nobody trained on, and code.

Expected from the papers: logits beat cross-entropy on the same tokens, since a token's distribution says more than one draw from it
(2407.14679). Real text beats samples on real text, since the student is tested where it was trained: the order that
2306.13649 reports for small students is about the text they write themselves, which is not measured here. Samples at a temperature
below 1 hold less of the tail of the distribution, and training on them alone loses it (2305.17493): the arm of both should lie
between. With a pruned student, far from converged, all differences are small beside what any training gives.

Finished stages below runs/synthetic_data_STEPS are kept, and a stopped one goes on: remove the folder to start anew. About
ten minutes on two cores; generation is stated apart. --quick takes two steps and 16 prompts, and shows only
that it runs.
"""

import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import recovery
from common import Figure, parser, write

from minitron_mcore.checkpoint import disk
from minitron_mcore.cli import demo
from minitron_mcore.cli.pipeline import run_stage
from minitron_mcore.reading import read_json_lines
from minitron_mcore.reporting import tables

LENGTH, BATCH, STEPS = 256, 4, 16
EXCERPT, WORDS, ANSWER = 200, 12, 96  # words of a text and of a prompt; tokens of an answer
ANSWERS = [f"synthesize.tokens={ANSWER}", "synthesize.prompt_tokens=64", "synthesize.micro_batch=16"]
ANSWERS += ["synthesize.temperature=0.8", "synthesize.keep_unfinished=true"]
ANSWERS += ["synthesize.min_tokens=32", "synthesize.min_log_likelihood=-3"]
SFT = ["distill.kd_weight=0", "distill.lm_weight=1"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} x {LENGTH} tokens")
    options = options.parse_args()
    steps, windows = (2, 1) if options.quick else (options.steps, 4)
    texts = [recovery.DATA / "text" / f"{name}.jsonl.gz" for name in recovery.BLEND]
    heldout = [recovery.DATA / "text" / file for file in recovery.HELDOUT.values()]
    if missing := [path for path in (*texts, *heldout) if not path.is_file()]:
        sys.exit(f"skipped: {missing[0]} is not there.")
    work = Work(Path(f"runs/synthetic_data_{'quick_' if options.quick else ''}{steps}"))
    # An answer and its prompt have about 100 tokens, and some are dropped; an excerpt has 250 or more.
    count = steps * BATCH * LENGTH // 80
    real = work.write_real(texts, max(count, 200))
    work.prune(real, 8 if options.quick else 64)
    samples = work.write_samples(real, 16 if options.quick else count)
    models = {"teacher": work.teacher, "just pruned": work.root / "pruned/hf"}
    for arm, (data, settings) in arms(real, samples).items():
        models[arm] = work.train(arm, data, steps, settings)
    heldout.append(demo.write_stdlib_text(work.root / "text")[1])
    rows, figures = [], []
    for name, folder in models.items():
        found = recovery.heldout_losses(work.root / "evaluate" / folder_name(name), folder, heldout, windows)
        losses = dict(zip([*recovery.HELDOUT, "code"], (file["loss"] for file in found), strict=True))
        rows.append({"model": name} | {f"{text}: loss": loss for text, loss in losses.items()})
        figures += [
            Figure("synthetic_data", f"{steps} steps, {text}", name, "loss", loss, "nats/token")
            for text, loss in losses.items()
        ]
    seconds = work.seconds["synthesize"]
    figures.append(Figure("synthetic_data", f"{steps} steps", "synthesize", "time", seconds, "s"))
    answers = (work.root / "synthesize/train.jsonl").read_text(encoding="utf-8").count("\n")
    notes = [f"{answers} answers were written in {seconds:.0f} s; training: {work.training_seconds()}"]
    tables.table(f"SmolLM2-135M -> 100 M, {steps * BATCH * LENGTH:,} tokens an arm", rows, notes)
    write(figures, options.json)


def arms(real: Path, samples: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Arm -> its training text, and its settings."""
    return {
        "cross-entropy, samples": ([f"{samples}"], SFT),
        "logits, real text": ([f"{real}"], []),
        "logits, samples": ([f"{samples}"], []),
        "logits, both": ([f"'0.5 {real}'", f"'0.5 {samples}'"], []),
    }


def folder_name(arm: str) -> str:
    return arm.replace(", ", "_").replace(" ", "_")


def excerpts(texts: list[Path]) -> Iterator[str]:
    """Parts of `EXCERPT` words, from the files in turn; not the first of a document, which is its title or front matter."""
    for some in zip(*map(_parts, texts), strict=False):
        yield from some


def _parts(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            words = json.loads(line)["text"].split(" ")
            for start in itertools.islice(range(EXCERPT, len(words) - EXCERPT, EXCERPT), 4):
                yield " ".join(words[start : start + EXCERPT])


class Work:
    """The folder of all runs; each stage is run once."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
        self.model = [
            "+model=smollm2_135m",
            f"model.hf={self.teacher}",
            f"work_dir={root}",
            "prune=smollm2_100m",
            "distill=small",
        ]
        self.times = root / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.times.read_text()) if self.times.is_file() else {}

    def once(self, name: str, out_dir: Path, *overrides: str) -> None:
        """Run a stage that is not complete, and note its seconds; those of a stage that was stopped are of its last part."""
        if not (out_dir / ".complete").is_file():
            seconds = run_stage(name, *self.model, *overrides, f"out_dir={out_dir}")
            self.seconds[str(out_dir.relative_to(self.root))] = seconds
            disk.write_json(self.times, self.seconds)

    def write_real(self, texts: list[Path], count: int) -> Path:
        """`count` excerpts."""
        real = self.root / "real.jsonl"
        if not real.is_file():
            lines = [json.dumps({"text": text}) for text in itertools.islice(excerpts(texts), count)]
            disk.replace_text(real, "\n".join(lines))
        return real

    def prune(self, real: Path, samples: int) -> None:
        """The student of all arms, by scores of some samples."""
        self.once("convert", self.root / "convert")
        self.once(
            "importance",
            self.root / "importance",
            "importance=small",
            f"importance.samples={samples}",
            f"data.train=[{real}]",
        )
        self.once("plan", self.root / "plan")
        self.once("prune", self.root / "prune")
        self.once("export", self.root / "pruned/hf", f"source={self.root}/prune")

    def write_samples(self, real: Path, count: int) -> Path:
        """The teacher's answers to the first words of `count` excerpts, as text."""
        prompts, out_dir, samples = self.root / "prompts.jsonl", self.root / "synthesize", self.root / "samples.jsonl"
        if not prompts.is_file():
            texts = [json.loads(line)["text"] for line in real.read_text(encoding="utf-8").splitlines()[:count]]
            starts = [" ".join(text.split(" ")[:WORDS]) for text in texts]
            disk.replace_text(prompts, "\n".join(json.dumps({"prompt": start}) for start in starts if start.strip()))
        self.once("synthesize", out_dir, f"prompts=[{prompts}]", *ANSWERS)
        answers = read_json_lines(out_dir / "train.jsonl", "remove the folder and run again")
        if not samples.is_file():
            lines = [json.dumps({"text": row["prompt"] + row["completion"]}) for row in answers]
            disk.replace_text(samples, "\n".join(lines))
        return samples

    def train(self, arm: str, data: list[str], steps: int, settings: list[str]) -> Path:
        """The exported folder of an arm."""
        folder = self.root / folder_name(arm)
        sizes = {"steps": steps, "global_batch": BATCH, "micro_batch": BATCH, "sequence_length": LENGTH}
        sizes |= {"warmup_steps": max(1, steps // 8), "save_every": 8}
        given = [f"distill.{key}={value}" for key, value in sizes.items()]
        self.once("distill", folder / "distill", f"data.train=[{','.join(data)}]", *given, *settings)
        self.once("export", folder / "hf", f"source={folder}/distill")
        return folder / "hf"

    def training_seconds(self) -> str:
        """Of each arm."""
        return ", ".join(
            f"{n[: -len('/distill')]} {s:.0f} s" for n, s in self.seconds.items() if n.endswith("/distill")
        )


if __name__ == "__main__":
    main()
