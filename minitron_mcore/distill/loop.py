"""The distillation loop, for one student or several that share the teacher's hidden states."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.distill import failures
from minitron_mcore.distill.heldout import HeldOutLosses, HeldOutText
from minitron_mcore.distill.profile import StepProfiler
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.errors import NotFinite, Stopped
from minitron_mcore.parallel import process_groups, stop_signal
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reading import damage_as_user_error, read_json_lines


def train(
    trainers: Mapping[Path, Trainer], batches: Iterator[Batch], out_dir: Path, heldout_text: HeldOutText | None = None
) -> list[list[dict[str, float]]]:
    """Run to `config.steps` (or `stop_after`), writing metrics.jsonl, tensorboard events and checkpoints (collective).

    Several students take turns, one step each. The teacher's outputs of a step are then kept for all of them; for a single student
    they are computed a few micro-batches ahead.

    Args:
        trainers: by output folder, claimed and described; new or resumed, with the same layout, config and teacher. A student with
            more steps than another waits.
        batches: micro-batches of this data-parallel rank, from the position of the student with the fewest steps.
        out_dir: for failure.json of a hung rank, and for profiles (see `profile`).
        heldout_text: measured every `config.eval_every` steps and after the last, in the figures as "heldout_loss".

    Returns:
        For each trainer, the figures of the steps that this call ran, without skipped ones. After a signal on any rank the call
        ends with the running step, saved: the trainers then have fewer steps than asked for.

    Raises:
        NotFinite: see `failures.Guard`; all students are saved after their last good step.
    """
    student_runs = [StudentRun(trainer, folder, heldout_text) for folder, trainer in trainers.items()]
    behind = min(trainers.values(), key=lambda trainer: trainer.step)
    config, teacher, first = behind.config, behind.teacher, behind.step
    last = min(config.steps, config.stop_after or config.steps)
    per_step = config.global_batch // (config.micro_batch * process_groups.dp_group().size())
    progress = process_groups.Progress("train", last - first, "steps")
    profiler = StepProfiler(behind.performance.profile, out_dir)
    with stop_signal.at_stop_points(), failures.watched_steps(lambda: behind.step + 1, out_dir):
        for step in range(first, last):
            if stop_signal.requested_on_any_rank():
                break
            profiler.before(step + 1)
            micro_batches = [next(batches) for _ in range(per_step)]
            with_teacher_outputs = (
                list(teacher.add_teacher_outputs(micro_batches)) if teacher and len(student_runs) > 1 else None
            )
            try:
                messages = [
                    student_run.step(micro_batches, with_teacher_outputs)
                    for student_run in student_runs
                    if student_run.trainer.step == step
                ]
            except (NotFinite, Stopped):
                for student_run in student_runs:
                    student_run.save()
                    student_run.trainer.finish_save()
                raise
            profiler.after(step + 1, step + 1 == last)
            progress.update(step + 1 - first, "".join(messages))
        for student_run in student_runs:
            student_run.save()
            student_run.trainer.finish_save()
            student_run.close()
    return [student_run.history for student_run in student_runs]


class StudentRun:
    """Training state of one student: trainer, output folder and metrics writer."""

    def __init__(self, trainer: Trainer, out_dir: Path, heldout_text: HeldOutText | None = None):
        self.trainer, self.out_dir, self.saved = trainer, out_dir, trainer.step
        self.guard, self.history = failures.Guard(trainer.config, out_dir), []
        self.metrics = MetricsWriter(out_dir, trainer.step) if process_groups.rank() == 0 else None
        self.heldout = HeldOutLosses(heldout_text, out_dir, trainer.step) if heldout_text else None
        self.heldout_message = ""

    def step(self, batches: list[Batch], with_teacher_outputs: Sequence[Batch] | None) -> str:
        """Run one step, write metrics and checkpoints (collective); its part of the progress line."""
        trainer, config = self.trainer, self.trainer.config
        run = partial(trainer.train_step, batches, with_teacher_outputs)
        figures = self.guard.step(trainer.step + 1, run, trainer.bad_gradient, batches)
        if figures is None:
            trainer.skip_step()
        trainer.finish_save(wait=False)
        last = trainer.step == min(config.steps, config.stop_after or config.steps)
        heldout, is_lowest = self.measure()
        if figures:
            figures |= heldout
            self.history.append(figures)
            if self.metrics and (trainer.step % config.log_every == 0 or last or heldout):
                self.metrics.write(figures)
        if trainer.step % config.save_every == 0 or last or is_lowest:
            self.save()
        return _progress(figures) + self.heldout_message if figures else ""

    def measure(self) -> tuple[dict[str, float], bool]:
        """The held-out loss where this step is due, and whether it is the lowest so far (collective)."""
        step, config = self.trainer.step, self.trainer.config
        if not self.heldout or (step % config.eval_every and step < config.steps):
            return {}, False
        loss, is_lowest = self.heldout.measure(self.trainer)
        self.heldout_message = f", held-out {loss:.3f}"
        return {"heldout_loss": loss}, is_lowest

    def save(self) -> None:
        """Save unless this step is saved already (collective)."""
        if self.trainer.step > self.saved:
            self.trainer.save(self.out_dir)
            self.saved = self.trainer.step

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()


def _progress(figures: dict[str, float]) -> str:
    losses = f"kd {figures['kd_loss']:.3f}, lm {figures['lm_loss']:.3f}"
    return f", {losses}, {figures['tokens_per_second']:.0f} tokens/s"


def summary(history: list[dict[str, float]]) -> list[dict]:
    """Two rows for a table: the figures of the first and of the last step in `history`, each with the median tokens/s."""
    rows = [history[0], history[-1]]
    speed = sorted(h["tokens_per_second"] for h in history)[len(history) // 2]
    keys = ("step", "tokens", "kd_loss", "lm_loss", "heldout_loss", "states_loss", "teacher_entropy", "grad_norm", "lr")
    return [{k: row[k] for k in keys if k in row} | {"median tokens/s": speed} for row in rows]


class MetricsWriter:
    """Writes metrics.jsonl and tensorboard events; a resumed run removes the lines after its checkpoint."""

    def __init__(self, out_dir: Path, step: int):
        path = out_dir / "metrics.jsonl"
        # A killed run may leave an incomplete line, of a step after its checkpoint.
        lines = read_json_lines(path, "move it away") if path.is_file() else []
        with damage_as_user_error(path, "move it away"):
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
        run_folder.replace_text(path, "".join(kept))
        self.file = path.open("a")
        self.board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, figures: dict[str, float]) -> None:
        print(json.dumps(figures), file=self.file, flush=True)
        for name in figures.keys() - {"step"}:
            self.board.add_scalar(f"train/{name}", figures[name], figures["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()
