"""A depth study from a checkpoint to a finished folder:

out_dir/
  points.jsonl   what is measured, then a point a line, written as it is measured
  depth.json     the whole model, every run of blocks, the choices (see `study`)
  depth.png      loss and accuracy against the last dropped block
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from minitron_mcore import checkpoint, evaluate, pictures_depth, ranges, report, runtime
from minitron_mcore.config import DepthMetric
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.importance import study
from minitron_mcore.importance.choices import Question, Quiz, read
from minitron_mcore.importance.depth import Meter
from minitron_mcore.importance.scores import load_scores
from minitron_mcore.launching import plain
from minitron_mcore.plan.target import spans
from minitron_mcore.reading import read_json_lines, readable
from minitron_mcore.runs import DepthRun
from minitron_mcore.textfiles import Limits
from minitron_mcore.tokenizer import Tokenizer, open_tokenizer


class Points:
    """The points of a study, each written as it is measured, so that a stopped study goes on.

    The file's first line says what is measured; each of the others is a point.
    """

    FILE = "points.jsonl"

    def __init__(self, out_dir: str | Path, meter: Meter, total: int, **subject: str):
        """
        Args:
            out_dir: claimed folder.
            total: points that will be asked for, at most.
            subject: what is measured; points of another are not taken up.

        Raises:
            UserError: the folder has points of another subject.
        """
        self.path, self.meter = Path(out_dir) / self.FILE, meter
        with runtime.agreed():
            found = [self._read(subject) if runtime.rank() == 0 else {}]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        self.found = found[0]
        if self.found:
            runtime.log(f"depth: going on after {len(self.found)} points")
        self.measured = 0
        self.progress = runtime.Progress("depth", max(0, total - len(self.found)), "points")

    def _read(self, subject: dict) -> dict[tuple[int, ...], dict]:
        if not self.path.is_file():
            checkpoint.replace_text(self.path, json.dumps(subject) + "\n")
            checkpoint.replace_text(
                self.path.with_name("latest"), self.FILE
            )  # the folder stays when the run ends early
            return {}
        remedy = "remove its folder and study again"
        first, *lines = read_json_lines(self.path, remedy) or [{}]
        with readable(self.path, remedy):
            whole, _, cut = self.path.read_text().rpartition("\n")
            found = {tuple(map(int, point["dropped"])): point for point in lines}
            for point in lines:
                figures = [point[name] for name in study.FIGURES if name != "accuracy" or point[name] is not None]
                if not all(type(figure) in (int, float) for figure in figures):
                    raise TypeError(f"figures {figures} are no numbers")
        if first != subject:
            raise UserError(
                f"{self.path} has points of another model, text or questions: choose another out_dir, or remove it."
            )
        if cut:  # the run ended while it wrote this
            checkpoint.replace_text(self.path, whole + "\n")
        return found

    def __call__(self, dropped: Sequence[int]) -> dict:
        """The point without these blocks, measured unless it was before (collective); the same on every rank."""
        if tuple(dropped) not in self.found:
            point = [self.meter(dropped)]
            if dist.is_initialized():
                dist.broadcast_object_list(point, src=0)  # what is decided must not hang on a rank's last bit
            if runtime.rank() == 0:
                with self.path.open("a") as file:
                    file.write(json.dumps(point[0]) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self.found[tuple(dropped)] = point[0]
            self.measured += 1
            self.progress.update(self.measured)
        return self.found[tuple(dropped)]


def run(config: DepthRun) -> None:
    """A study from its checkpoint to its finished folder, or from where a stopped one ended (collective).

    Raises:
        UserError: see `study.problems`, `evaluate.windows`, `choices.read`, `scores.load_scores` and `checkpoint.claimed`.
    """
    settings = config.depth
    source = checkpoint.open_checkpoint(config.source, wanted=config.model.architecture)
    arch, blocks = source.arch, source.arch.blocks
    length = ranges.positions("depth.sequence_length", settings.sequence_length, model=arch)
    refuse([*study.problems(config, blocks), *length])
    with runtime.agreed():
        words = open_tokenizer(config.data, source.hf, arch.vocab)
        windows = _windows(config, words)
        questions = read(settings.choices, settings.limit, Limits.of(config.data)) if settings.choices else []
        cosines = _cosines(config, source)
    with checkpoint.claimed(config.out_dir, plain(config), resume=True):
        model = checkpoint.build_model(source, config.parallel, config.dtype.value)
        quiz = Quiz(model, arch, questions, words, settings.micro_batch) if questions else None
        points = Points(
            config.out_dir,
            Meter(model, arch, windows, settings.micro_batch, quiz),
            study.count(settings, blocks),
            model=source.fingerprint,
            data=_digest(windows, questions),
        )
        ranked = study.ranking(settings.metric, cosines, len(questions))
        baseline = points([])
        sweep = [
            {"size": size, "first": dropped[0]} | points(dropped)
            for size in study.swept(settings, blocks)
            for dropped in study.runs(blocks, size)
        ]
        chosen = study.decide(settings, blocks, points, ranked)
        chance = quiz.chance if quiz else None
        found = {
            "model": source.fingerprint,
            "metric": settings.metric.value,
            "kind": settings.kind.value,
            "baseline": {"loss": baseline["loss"], "accuracy": baseline["accuracy"]},
            "chance": chance,
            "tokens": int(windows.mask.sum()),
            "questions": len(questions),
            "sweep": sweep,
            "chosen": chosen,
            "drop": {str(row["size"]): row["dropped"] for row in chosen if row["taken"]},
        }
        if runtime.rank() == 0:
            warnings = study.warnings(chosen, settings.metric, ranked, chance, len(questions))
            _write(Path(config.out_dir), found, list(warnings))
        checkpoint.finish(config.out_dir)


def _windows(config: DepthRun, words: Tokenizer) -> evaluate.Windows:
    """Those of all held-out files, of each as many as asked for, spread evenly over it."""
    if not config.data.heldout:
        raise UserError("data.heldout is empty: give text files, data.heldout=[a.jsonl,b.txt].")
    parts = []
    for path in config.data.heldout:
        found = evaluate.windows(path, words, config.depth.sequence_length, Limits.of(config.data))
        kept = torch.arange(min(config.depth.windows, len(found.tokens)))
        kept = kept * len(found.tokens) // len(kept)
        parts.append([column[kept] for column in found])
    return evaluate.Windows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _cosines(config: DepthRun, source: checkpoint.Checkpoint) -> list[float]:
    if config.depth.metric != DepthMetric.cosine:
        return []
    vectors = load_scores(config.scores, source.arch, source.fingerprint).vectors
    return [float(vectors[f"blocks.{block}.block"]) for block in range(source.arch.blocks)]


def _digest(windows: evaluate.Windows, questions: Sequence[Question]) -> str:
    hasher = hashlib.sha256(windows.tokens.numpy().tobytes() + windows.mask.numpy().tobytes())
    hasher.update(repr([tuple(question) for question in questions]).encode())
    return hasher.hexdigest()[:16]


def _write(out_dir: Path, found: dict, warnings: Sequence[str]) -> None:
    report.write_json(out_dir / study.FILE, found)
    pictures_depth.plot_depth(found, out_dir / "depth.png")
    full = {"drop": 0, "kind": "the whole model"} | found["baseline"]
    shown = [name for name in study.FIGURES if name != "accuracy" or found["questions"]]
    rows = [{key: value for key, value in full.items() if value is not None}]
    rows += [
        {
            "drop": row["size"],
            "kind": row["kind"],
            "taken": "*" if row["taken"] else "",
            "blocks": spans(row["dropped"]),
        }
        | {name: row[name] for name in shown}
        for row in found["chosen"]
    ]
    notes = [f"figures: {out_dir}/{study.FILE}", f"picture: {out_dir}/depth.png", *warnings]
    if found["questions"]:
        error = (0.25 / found["questions"]) ** 0.5
        notes.insert(
            0, f"accuracy on {found['questions']} questions: standard error {error:.3f}, chance {found['chance']:.3f}"
        )
    report.table(f"depth by {found['metric']}, {found['tokens']:,} tokens, {len(found['sweep'])} runs", rows, notes)
