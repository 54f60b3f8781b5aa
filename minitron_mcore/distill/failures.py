"""Steps whose loss or gradient is not finite: detected on all ranks together, recorded, then skipped or fatal.

out_dir/
  bad_batches/step_0000003_rank_1.safetensors
      tokens, labels, loss_mask [M, B, S], samples [M, B] (positions in the run's order of samples), sums [M, ...]: the
      micro-batches whose sums are not finite or, where only the gradient is not, all micro-batches of the step on this rank
  failure.json     what ended the run: kind, exit_status, step, message, ranks, files
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_mcore.checkpoint import claim, disk
from minitron_mcore.config.settings import BadLoss, TrainConfig
from minitron_mcore.distill.phases import TrainingPhase
from minitron_mcore.errors import HUNG_STATUS, NotFinite
from minitron_mcore.parallel import hang_watchdog, process_groups
from minitron_mcore.parallel.megatron_patches import training
from minitron_mcore.parallel.schedule import Batch

from megatron.core.optimizer import ChainedOptimizer  # isort: skip

FOLDER, REPORT = "bad_batches", "failure.json"
_BATCH_KEYS = ("tokens", "labels", "loss_mask")


class BadStep(Exception):
    """A step whose loss or gradient is not finite, raised on all ranks; weights, optimizer and schedule are those before it.

    `what` is "loss", "gradient" or another sum's name; `sums` are the statistics of the micro-batches on last-stage ranks, empty
    elsewhere.
    """

    def __init__(self, what: str, value: float, sums: list[Tensor]):
        super().__init__(f"{what} {value}")
        self.what, self.value, self.sums = what, value, sums


def guard_gradient(optimizer: ChainedOptimizer) -> None:
    """Make an optimizer's step raise BadStep if the gradient's norm over all ranks is not finite."""

    def check(norm: float) -> None:
        if not math.isfinite(norm):
            raise BadStep("gradient", norm, [])

    training.check_gradient_norm(optimizer, check)


class Guard:
    """Runs steps. A bad step ends the run, or is skipped, at most `bad_loss_limit` times in a row (`on_bad_loss`)."""

    def __init__(self, config: TrainConfig, phase: TrainingPhase, out_dir: Path):
        self.config, self.phase, self.out_dir, self.in_a_row = config, phase, out_dir, 0
        _remove_report(out_dir)

    def step(
        self,
        number: int,
        run: Callable[[], dict[str, float]],
        bad_gradient: Callable[[], str],
        batches: list[Batch],
    ) -> dict[str, float] | None:
        """The figures of step `number`; None if it was bad and may be skipped (collective).

        Args:
            run: takes the step; raises BadStep.
            bad_gradient: name of this rank's first parameter with a gradient that is not finite, or an empty string.
            batches: the micro-batches of this data-parallel rank.

        Raises:
            NotFinite: a bad step that may not be skipped; rank 0 has written failure.json.
        """
        try:
            figures = run()
        except BadStep as bad:
            self._record(bad, number, bad_gradient() if bad.what == "gradient" else "", batches)
            return None
        self.in_a_row = 0
        return figures

    def _record(self, bad: BadStep, step: int, parameter: str, batches: list[Batch]) -> None:
        """Write the micro-batches, log the failure; raise NotFinite unless the step may be skipped."""
        self.in_a_row += 1
        with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
            written = self._write_batches(bad, step, batches)
        by_rank = process_groups.from_all_ranks((written, parameter))
        files = {rank: file for rank, (file, _) in enumerate(by_rank) if file}
        names = {rank: name for rank, (_, name) in enumerate(by_rank) if name}
        ranks = list(names or files)
        listed = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
        where = f"rank{'s' if len(ranks) > 1 else ''} {listed}{f' (first in {names[ranks[0]]})' if names else ''}"
        first, *others = files.values()
        paths = f"{first} (and {len(others)} beside it)" if others else first
        message = (
            f"the {bad.what} of step {step} is not finite ({bad.value}) on {where}: the micro-batches are in {paths}"
        )
        skips = self.config.on_bad_loss == BadLoss.skip
        if skips and self.in_a_row <= self.config.bad_loss_limit:
            process_groups.log(f"skipped: {message}; nothing was changed ({self.in_a_row} in a row)")
            return
        advice = (
            f"These were {self.in_a_row} steps in a row, more than bad_loss_limit"
            if skips
            else "Look at their text, lower peak_lr, or let the same command go past it with on_bad_loss=skip"
        )
        message = f"{message}; weights and optimizer are still those of step {step - 1}. {advice}."
        if process_groups.rank() == 0:
            write_report(self.out_dir, "not_finite", NotFinite.exit_status, step, message, ranks, list(files.values()))
        raise NotFinite(message)

    def _write_batches(self, bad: BadStep, step: int, batches: list[Batch]) -> str | None:
        """Write this rank's micro-batches, on last-stage ranks of tensor-parallel rank 0 only; the file's path."""
        if not process_groups.is_last_stage() or process_groups.tp_group().rank():
            return None
        sums = torch.stack(bad.sums) if bad.sums else torch.zeros(len(batches), 0)
        chosen = [n for n in range(len(batches)) if bad.what != "loss" or not sums[n].isfinite().all()]
        if not chosen:
            return None
        config, dp = self.config, process_groups.dp_group()
        first = [self.phase.sample(step - 1) + (n * dp.size() + dp.rank()) * config.micro_batch for n in chosen]
        samples = torch.tensor(first)[:, None] + torch.arange(config.micro_batch)
        tensors = {key: torch.stack([batches[n][key] for n in chosen]).cpu() for key in _BATCH_KEYS}
        tensors |= {"samples": samples, "sums": sums[chosen].cpu()}
        rank = process_groups.rank()
        path = self.out_dir / FOLDER / f"step_{step:07d}_rank_{rank}.safetensors"
        path.parent.mkdir(exist_ok=True)
        facts = {"step": step, "rank": rank, "what": bad.what, "value": bad.value, "micro_batches": chosen}
        save_file({key: t.contiguous() for key, t in tensors.items()}, path, {k: str(v) for k, v in facts.items()})
        return str(path)


@contextmanager
def hangs_reported(step: Callable[[], int], out_dir: Path) -> Iterator[None]:
    """Inside the block a hang writes failure.json; `step` gives the number of the running step, 0 before there is one."""

    def on_hang(message: str, ranks: list[int]) -> None:
        write_report(out_dir, "hung", HUNG_STATUS, step(), message, ranks, [])

    _remove_report(out_dir)
    with hang_watchdog.reported_to(on_hang):
        yield


def _remove_report(out_dir: Path) -> None:
    """Remove the report of the run that this one resumes (rank 0)."""
    if process_groups.rank() == 0:
        (out_dir / REPORT).unlink(missing_ok=True)


def write_report(
    out_dir: Path, kind: str, exit_status: int, step: int, message: str, ranks: list[int], files: list[str]
) -> None:
    """Write failure.json for programs, if the disk has room: torchrun's exit status is always 1."""
    report = {"kind": kind, "exit_status": exit_status, "step": step, "message": message}
    with suppress(OSError):
        disk.write_json(out_dir / REPORT, report | {"ranks": ranks, "files": files})
