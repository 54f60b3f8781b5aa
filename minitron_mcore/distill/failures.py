"""Steps whose loss or gradient is not finite: all ranks learn of it together, what caused it is kept, nothing else changes.

out_dir/
  bad_batches/step_0000003_rank_1.safetensors
      tokens, labels, loss_mask [M, B, S], samples [M, B] (positions in the run's order of samples), sums [M, ...]: the
      micro-batches whose sums are not finite, or, where only the gradient is not, all of the step on this rank
  failure.json     what ended the run: kind, exit_status, step, message, ranks, files
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.config.settings import BadLoss, TrainConfig
from minitron_mcore.distill.bad_step import BadStep
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.errors import HUNG_STATUS, NotFinite
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.hang_watchdog import HangWatchdog
from minitron_mcore.parallel.schedule import Batch

FOLDER, REPORT = "bad_batches", "failure.json"
_KEPT = ("tokens", "labels", "loss_mask")


class Guard:
    """Takes steps; a bad one ends the run, or is skipped up to so many times in a row (`on_bad_loss`, `bad_loss_limit`)."""

    def __init__(self, config: TrainConfig, out_dir: Path):
        self.config, self.out_dir, self.in_a_row = config, out_dir, 0
        _forget(out_dir)

    def step(
        self, trainer: Trainer, batches: list[Batch], with_teacher_outputs: Sequence[Batch] | None = None
    ) -> dict[str, float] | None:
        """`trainer.train_step(batches, fed)`; None where the step was skipped (collective).

        Raises:
            NotFinite: a bad step that may not be skipped; rank 0 has written failure.json.
        """
        try:
            figures = trainer.train_step(batches, with_teacher_outputs)
        except BadStep as bad:
            self._judge(bad, trainer, batches)
            trainer.skip_step()
            return None
        self.in_a_row = 0
        return figures

    def _judge(self, bad: BadStep, trainer: Trainer, batches: list[Batch]) -> None:
        """Return where the run may go on."""
        self.in_a_row += 1
        step = trainer.step + 1
        name = trainer.bad_gradient() if bad.what == "gradient" else ""
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, (self._keep(bad, step, batches), name))
        files = {rank: file for rank, (file, _) in enumerate(every) if file}
        names = {rank: name for rank, (_, name) in enumerate(every) if name}
        ranks = list(names or files)
        some = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
        where = f"rank{'s' if len(ranks) > 1 else ''} {some}{f' (first in {names[ranks[0]]})' if names else ''}"
        first, *others = files.values()
        kept = f"{first} (and {len(others)} beside it)" if others else first
        told = f"the {bad.what} of step {step} is not finite ({bad.value}) on {where}: the micro-batches are in {kept}"
        skips = self.config.on_bad_loss == BadLoss.skip
        if skips and self.in_a_row <= self.config.bad_loss_limit:
            process_groups.log(f"skipped: {told}; nothing was changed ({self.in_a_row} in a row)")
            return
        advice = (
            f"These were {self.in_a_row} steps in a row, more than bad_loss_limit"
            if skips
            else "Look at their text, lower peak_lr, or let the same command go past it with on_bad_loss=skip"
        )
        message = f"{told}; weights and optimizer are still those of step {trainer.step}. {advice}."
        if process_groups.rank() == 0:
            report(self.out_dir, "not_finite", NotFinite.exit_status, step, message, ranks, list(files.values()))
        raise NotFinite(message)

    def _keep(self, bad: BadStep, step: int, batches: list[Batch]) -> str | None:
        """Write the micro-batches that this rank saw; None where it saw none, or another tensor-parallel rank writes them."""
        if not process_groups.is_last_stage() or process_groups.tp_group().rank():
            return None
        sums = torch.stack(bad.sums) if bad.sums else torch.zeros(len(batches), 0)
        chosen = [n for n in range(len(batches)) if bad.what != "loss" or not sums[n].isfinite().all()]
        if not chosen:
            return None
        config, dp = self.config, process_groups.dp_group()
        first = [(step - 1) * config.global_batch + (n * dp.size() + dp.rank()) * config.micro_batch for n in chosen]
        samples = torch.tensor(first)[:, None] + torch.arange(config.micro_batch)
        tensors = {key: torch.stack([batches[n][key] for n in chosen]).cpu() for key in _KEPT}
        tensors |= {"samples": samples, "sums": sums[chosen].cpu()}
        path = self.out_dir / FOLDER / f"step_{step:07d}_rank_{process_groups.rank()}.safetensors"
        path.parent.mkdir(exist_ok=True)
        facts = {
            "step": step,
            "rank": process_groups.rank(),
            "what": bad.what,
            "value": bad.value,
            "micro_batches": chosen,
        }
        save_file({key: t.contiguous() for key, t in tensors.items()}, path, {k: str(v) for k, v in facts.items()})
        return str(path)


def hang_watchdog_of(trainer: Trainer, out_dir: Path) -> HangWatchdog:
    """Ends the job when a rank hangs between entering and leaving (see `Watch`)."""

    def told(message: str, ranks: list[int]) -> None:
        report(out_dir, "hung", HUNG_STATUS, trainer.step + 1, message, ranks, [])

    _forget(out_dir)
    return HangWatchdog(trainer.config.hang_minutes, lambda: f"step {trainer.step + 1}", told)


def _forget(out_dir: Path) -> None:
    """Remove the report of an earlier run that this one goes on from (rank 0)."""
    if process_groups.rank() == 0:
        (out_dir / REPORT).unlink(missing_ok=True)


def report(
    out_dir: Path, kind: str, exit_status: int, step: int, message: str, ranks: list[int], files: list[str]
) -> None:
    """Write failure.json, for programs: torchrun ends with status 1 whatever its processes end with."""
    found = {"kind": kind, "exit_status": exit_status, "step": step, "message": message}
    run_folder.replace_text(out_dir / REPORT, json.dumps(found | {"ranks": ranks, "files": files}, indent=1))
