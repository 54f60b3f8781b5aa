"""The distillation loop: one student, or several that one pass of the teacher trains in turn from the same hidden states."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from minitron_mcore import checkpoint, runtime
from minitron_mcore.distill import failure
from minitron_mcore.distill.profile import StepProfiler
from minitron_mcore.distill.train import Trainer
from minitron_mcore.errors import NotFinite
from minitron_mcore.reading import read_json_lines, readable
from minitron_mcore.schedule import Batch


def train(trainers: Mapping[Path, Trainer], batches: Iterator[Batch], out_dir: Path) -> list[list[dict[str, float]]]:
    """Run to `config.steps` (or `stop_after`), writing metrics.jsonl, tensorboard events and checkpoints (collective).

    Several students take a step each before any takes the next. What the teacher leaves of a step's micro-batches is then held
    for all of them; a single student asks for it as it goes.

    Args:
        trainers: by their folders, claimed and described; fresh or resumed, of one layout, one config and one teacher. Those
            ahead wait for the one that is furthest behind.
        batches: micro-batches of this data-parallel rank, from the position of the one that is furthest behind on.
        out_dir: where failure.json tells of a hung rank, and steps are profiled (see `profile`).

    Returns:
        The figures of the steps that this call ran, a list a trainer, without those that it skipped.

    Raises:
        NotFinite: see `failure.Guard`; the steps before are saved, those of the other students too.
    """
    courses = [_Course(trainer, folder) for folder, trainer in trainers.items()]
    behind = min(trainers.values(), key=lambda trainer: trainer.step)
    config, teacher, first = behind.config, behind.teacher, behind.step
    last = min(config.steps, config.stop_after or config.steps)
    per_step = config.global_batch // (config.micro_batch * runtime.dp_group().size())
    progress, stop = runtime.Progress("train", last - first, "steps"), _Stop()
    profiler = StepProfiler(behind.performance.profile, out_dir)
    with failure.watched(behind, out_dir):
        for step in range(first, last):
            if stop.agreed():
                break
            profiler.before(step + 1)
            micro_batches = [next(batches) for _ in range(per_step)]
            fed = list(teacher.feed(micro_batches)) if teacher and len(courses) > 1 else None
            try:
                told = [course.take(micro_batches, fed) for course in courses if course.trainer.step == step]
            except NotFinite:
                for course in courses:
                    course.save()
                    course.trainer.finish_save()
                raise
            profiler.after(step + 1, step + 1 == last)
            progress.update(step + 1 - first, "".join(filter(None, told)))
        for course in courses:
            course.save()
            course.trainer.finish_save()
            course.close()
        if behind.step < last:
            runtime.log(f"told to stop: saved step {behind.step}; the same command goes on from there")
    return [course.history for course in courses]


class _Course:
    """A student's way through the loop: its trainer, its folder and what is written there."""

    def __init__(self, trainer: Trainer, out_dir: Path):
        self.trainer, self.out_dir, self.saved = trainer, out_dir, trainer.step
        self.guard, self.history = failure.Guard(trainer.config, out_dir), []
        self.record = _Record(out_dir, trainer.step) if runtime.rank() == 0 else None

    def take(self, batches: list[Batch], fed: Sequence[Batch] | None) -> str:
        """One step (collective); what a progress line says of it."""
        trainer, config = self.trainer, self.trainer.config
        figures = self.guard.step(trainer, batches, fed)
        trainer.finish_save(wait=False)
        last = trainer.step == min(config.steps, config.stop_after or config.steps)
        if figures:
            self.history.append(figures)
            if self.record and (trainer.step % config.log_every == 0 or last):
                self.record.write(figures)
        if trainer.step % config.save_every == 0 or last:
            self.save()
        return _progress(figures) if figures else ""

    def save(self) -> None:
        """Where there is something new (collective)."""
        if self.trainer.step > self.saved:
            self.trainer.save(self.out_dir)
            self.saved = self.trainer.step

    def close(self) -> None:
        if self.record:
            self.record.close()


def _progress(figures: dict[str, float]) -> str:
    losses = f"kd {figures['kd_loss']:.3f}, lm {figures['lm_loss']:.3f}"
    return f", {losses}, {figures['tokens_per_second']:.0f} tokens/s"


def summary(history: list[dict[str, float]]) -> list[dict]:
    """Rows for a table: the first and the last step that a run made, and its speed."""
    rows = [history[0], history[-1]]
    speed = sorted(h["tokens_per_second"] for h in history)[len(history) // 2]
    shown = ("step", "tokens", "kd_loss", "lm_loss", "states_loss", "teacher_entropy", "grad_norm", "lr")
    return [{k: row[k] for k in shown if k in row} | {"median tokens/s": speed} for row in rows]


class _Stop:
    """SIGUSR1 (SLURM's warning, see launch/slurm) or SIGTERM on any rank: all ranks save after the step and end well."""

    def __init__(self):
        self.asked = torch.zeros(1, device=runtime.device())
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, lambda *_: self.asked.fill_(1))

    def agreed(self) -> bool:
        """Collective."""
        asked = self.asked.clone()
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


class _Record:
    """metrics.jsonl and tensorboard; a resumed run drops the lines after its checkpoint, so that no step appears twice."""

    def __init__(self, out_dir: Path, step: int):
        path = out_dir / "metrics.jsonl"
        # A killed run may leave half a line, which is of a step after its checkpoint.
        lines = read_json_lines(path, "move it away") if path.is_file() else []
        with readable(path, "move it away"):
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
        checkpoint.replace_text(path, "".join(kept))
        self.file = path.open("a")
        self.board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, figures: dict[str, float]) -> None:
        print(json.dumps(figures), file=self.file, flush=True)
        for name in figures.keys() - {"step"}:
            self.board.add_scalar(f"train/{name}", figures[name], figures["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()
