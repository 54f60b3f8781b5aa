"""The distillation loop, for one student or several that share the teacher's hidden states."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from minitron_mcore.checkpoint import claim
from minitron_mcore.config.settings import LogConfig
from minitron_mcore.distill import failures, metrics
from minitron_mcore.distill.heldout import HeldOutLosses, HeldOutText
from minitron_mcore.distill.profile import StepProfiler
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.errors import NotFinite, Stopped
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reporting import tables


def train(
    trainers: Mapping[Path, Trainer],
    batches: Iterator[Batch],
    out_dir: Path,
    heldout_text: HeldOutText | None = None,
    log: LogConfig | None = None,
) -> list[list[dict[str, float]]]:
    """Run to `config.steps` (or `stop_after`), writing metrics (see `metrics`) and checkpoints (collective).

    Several students take turns, one step each. The teacher's outputs of a step are then kept for all of them; for a single student
    they are computed a few micro-batches ahead.

    Args:
        trainers: by output folder, claimed and described; new or resumed, with the same layout, config and teacher. A student with
            more steps than another waits.
        batches: micro-batches of this data-parallel rank, from the position of the student with the fewest steps.
        out_dir: for profiles (see `profile`).
        heldout_text: measured every `config.eval_every` steps and after the last, in the figures as "heldout_loss" and, of a live
            teacher, "heldout_kl".
        log: None for the defaults.

    Returns:
        For each trainer, the figures of the steps that this call ran, without skipped ones. After a signal on any rank the call
        ends with the running step, saved: the trainers then have fewer steps than asked for.

    Raises:
        NotFinite: see `failures.Guard`; all students are saved after their last good step.
    """
    student_runs = [
        StudentRun(trainer, folder, log or LogConfig(), heldout_text) for folder, trainer in trainers.items()
    ]
    behind = min(trainers.values(), key=lambda trainer: trainer.step)
    config, teacher, first = behind.config, behind.teacher, behind.step
    last = min(config.steps, config.stop_after or config.steps)
    per_step = config.global_batch // (config.micro_batch * process_groups.dp_group().size())
    progress = process_groups.Progress("train", last - first, "steps")
    profiler = StepProfiler(behind.performance.profile, out_dir)
    with stop_signal.at_stop_points(), hang_watchdog.phase(Phase.step, lambda: f"step {behind.step + 1}"):
        for student_run in student_runs:
            student_run.finish_measurement()
        for step in range(first, last):
            if stop_signal.requested_on_any_rank():
                break
            profiler.before(step + 1)
            start = time.monotonic()
            micro_batches = [next(batches) for _ in range(per_step)]
            data_seconds = time.monotonic() - start
            with_teacher_outputs = (
                list(teacher.add_teacher_outputs(micro_batches)) if teacher and len(student_runs) > 1 else None
            )
            training = [student_run for student_run in student_runs if student_run.trainer.step == step]
            shared_seconds = (time.monotonic() - start) / len(training)
            try:
                messages = [
                    student_run.step(micro_batches, with_teacher_outputs, data_seconds, shared_seconds)
                    for student_run in training
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

    def __init__(self, trainer: Trainer, out_dir: Path, log: LogConfig, heldout_text: HeldOutText | None):
        self.trainer, self.out_dir, self.saved = trainer, out_dir, trainer.step
        self.guard, self.history = failures.Guard(trainer.config, trainer.phases[-1], out_dir), []
        with process_groups.raise_on_all_ranks(), claim.writing(out_dir):
            is_writer = process_groups.rank() == 0
            self.metrics = metrics.MetricsWriter(out_dir, trainer.step, log) if is_writer else None
        self.heldout = HeldOutLosses(heldout_text, out_dir, trainer.step) if heldout_text else None
        self.heldout_message = ""

    def step(
        self,
        batches: list[Batch],
        with_teacher_outputs: Sequence[Batch] | None,
        data_seconds: float,
        shared_seconds: float,
    ) -> str:
        """Run one step, write metrics and checkpoints (collective); its part of the progress line.

        Args:
            data_seconds: for how long this rank waited for `batches`.
            shared_seconds: this student's share of the time that the step took before.
        """
        trainer, config = self.trainer, self.trainer.config
        run = partial(trainer.train_step, batches, with_teacher_outputs)
        figures = self.guard.step(trainer.step + 1, run, trainer.bad_gradient, batches)
        if figures is None:
            trainer.skip_step()
        trainer.finish_save(wait=False)
        last = trainer.step == min(config.steps, config.stop_after or config.steps)
        if figures:
            figures |= trainer.speeds(shared_seconds + figures["step_seconds"])
            figures |= metrics.rank_figures(data_seconds, trainer.work_seconds)
            self.history.append(figures)
        try:
            is_lowest = self.measure(figures)
        finally:  # a signal may stop the measurement
            if figures and self.metrics and (trainer.step % config.log_every == 0 or last or "heldout_loss" in figures):
                self.metrics.write(figures | trainer.saver.figures())
        if trainer.step % config.save_every == 0 or last or is_lowest:
            self.save()
        return _progress(figures) + self.heldout_message if figures else ""

    def finish_measurement(self) -> None:
        """Measure and write the held-out loss of the step that this run resumes after, if a signal stopped that (collective)."""
        self.measure()
        loss = self.heldout.losses.get(self.trainer.step) if self.heldout else None
        with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
            if self.metrics and loss is not None:
                self.metrics.amend({"step": self.trainer.step, "heldout_loss": loss})

    def measure(self, figures: dict[str, float] | None = None) -> bool:
        """Add the held-out figures to `figures` if it is due after this step and not measured yet (collective).

        Returns:
            Whether the loss is the lowest so far.
        """
        step, config = self.trainer.step, self.trainer.config
        if not self.heldout or step == 0 or (step % config.eval_every and step < config.steps):
            return False
        if self.heldout.has_measured(step):
            return False
        measured, is_lowest = self.heldout.measure(self.trainer)
        self.heldout_message = f", held-out {measured['heldout_loss']:.3f}"
        if figures:
            figures |= measured
        return is_lowest

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
    return [{k: row[k] for k in tables.TRAINING_FIGURES if k in row} | {"median tokens/s": speed} for row in rows]
