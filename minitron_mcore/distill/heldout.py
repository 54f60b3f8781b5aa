"""Measures students in training on held-out text, and records the step with the lowest loss. A live teacher's divergence is
measured beside it, and decides nothing.

out_dir/best.json   step and heldout_loss of the lowest; previous: the step that was the lowest before it, or null, which stays on
                    disk until `step` is saved; text: what was measured; measured: loss by step
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from minitron_mcore.checkpoint import claim, disk
from minitron_mcore.checkpoint.steps import BEST
from minitron_mcore.distill.loss_fn import LossFunction
from minitron_mcore.distill.remote_teacher import RemoteTeacher
from minitron_mcore.distill.teacher import Teacher
from minitron_mcore.distill.teachers import SeveralTeachers
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
from minitron_mcore.reading import damage_as_user_error, read_json


def losses(out_dir: Path, text: dict[str, Any] | None = None) -> dict[int, float]:
    """Measured losses by step, in ascending order; none if they are of another `text` (None: any).

    Raises:
        UserError: a damaged best.json.
    """
    path = out_dir / BEST
    if not path.is_file():
        return {}
    record = read_json(path, "remove it")
    with damage_as_user_error(path, "remove it"):
        same = text is None or record["text"] == text
        return {int(n): float(loss) for n, loss in record["measured"].items()} if same else {}


def lowest_step(losses: dict[int, float]) -> int:
    """The earliest step with the lowest loss."""
    return min(losses, key=lambda step: (losses[step], step))


class HeldOutText(Protocol):
    """Held-out text (`evaluation.heldout.HeldOut`)."""

    @property
    def identity(self) -> dict[str, Any]:
        """Identifies the text and its windows, JSON-ready: losses of equal identity can be compared."""

    def measure(self, model: Model, arch: Architecture, loss_fn: LossFunction | None = None) -> dict[str, float]:
        """Figures of a sharded model in nats a token (collective): "heldout_loss" and, with the loss function of its training,
        "heldout_kl", the divergence KL(teacher || model)."""


class HeldOutLosses:
    """The measurements of one student, in out_dir/best.json."""

    def __init__(self, text: HeldOutText, out_dir: Path, step: int):
        """Read those of the run that this one resumes after `step` (collective).

        Raises:
            UserError: a damaged best.json.
        """
        self.text, self.path, self.losses = text, out_dir / BEST, {}
        with process_groups.raise_on_all_ranks():
            earlier = losses(out_dir, text.identity) if process_groups.rank() == 0 else {}
        self.losses = process_groups.from_rank_0({n: loss for n, loss in earlier.items() if n <= step})

    def has_measured(self, step: int) -> bool:
        """Whether the loss after this step is known; from rank 0 (collective)."""
        return process_groups.from_rank_0(step in self.losses)

    def measure(self, trainer: Trainer) -> tuple[dict[str, float], bool]:
        """Figures of the student after this step (see `HeldOutText.measure`), and whether its loss is the lowest so far; from
        rank 0 (collective). The divergence is measured if the teacher is live and has all of the student's token ids.

        Raises:
            UserError: best.json cannot be written.
        """
        trainer.gather_weights()
        is_live = isinstance(trainer.teacher, Teacher | SeveralTeachers | RemoteTeacher)
        is_live &= trainer.vocab == trainer.arch.vocab
        figures = self.text.measure(trainer.model, trainer.arch, trainer.loss_fn if is_live else None)
        loss = figures["heldout_loss"]
        with process_groups.raise_on_all_ranks(), claim.writing(self.path.parent):
            outcome = [(figures, process_groups.rank() == 0 and self._record(trainer.step, loss))]
        dist.broadcast_object_list(outcome, src=0)
        self.losses[trainer.step] = outcome[0][0]["heldout_loss"]
        return outcome[0]

    def _record(self, step: int, loss: float) -> bool:
        """Write best.json (rank 0); whether the loss is the lowest."""
        is_lowest = math.isfinite(loss) and all(loss < other for other in self.losses.values())
        process_groups.log(f"held-out loss after step {step}: {loss:.4f}{' (the lowest)' if is_lowest else ''}")
        if math.isfinite(loss):
            self.losses[step] = loss
            lowest = lowest_step(self.losses)
            before = {n: loss for n, loss in self.losses.items() if n < lowest}
            record = {"step": lowest, "heldout_loss": self.losses[lowest]}
            record |= {"previous": lowest_step(before) if before else None, "text": self.text.identity}
            disk.replace_text(self.path, json.dumps(record | {"measured": self.losses}))
        return is_lowest
