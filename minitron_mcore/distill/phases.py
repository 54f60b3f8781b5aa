"""The phases of a training: stretches of steps with one batch size and one sequence length, counted in samples and tokens."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.config.settings import TrainConfig
from minitron_mcore.errors import UserError


@dataclass(frozen=True)
class TrainingPhase:
    """A phase; its lists of values are in checkpoints and in model.json."""

    first_step: int
    """Steps before it."""
    first_sample: int
    """Position in the order of samples at which it begins."""
    first_token: int
    """Tokens trained before it."""
    global_batch: int
    sequence_length: int
    order_samples: int
    """Samples of its order, which repeats after the last one."""

    def sample(self, step: int) -> int:
        """Position in the order after `step` steps of the run."""
        return self.first_sample + (step - self.first_step) * self.global_batch

    def tokens(self, step: int) -> int:
        """Tokens trained after `step` steps of the run."""
        return self.first_token + (step - self.first_step) * self.global_batch * self.sequence_length


def first(config: TrainConfig) -> TrainingPhase:
    """The phase in which a run begins."""
    return TrainingPhase(0, 0, 0, config.global_batch, config.sequence_length, config.steps * config.global_batch)


def resumed(stored: Sequence[dict[str, Any]] | None, config: TrainConfig, step: int) -> list[TrainingPhase]:
    """The phases of a run that continues after `step`: the stored ones and, if `config.phase` is one more, a new one.

    A phase of the same sequence length continues in the same order. Another length divides the text anew; its order begins at the
    position to which as many tokens lead as were trained.

    Raises:
        UserError: `config.phase` is neither the last phase nor the next.
    """
    if stored is None:
        if config.phase:
            raise UserError(
                f"phase is {config.phase}, but the checkpoint of step {step} is of an earlier version: give 0."
            )
        return [first(config)]
    phases = [TrainingPhase(**values) for values in stored]
    last = phases[-1]
    if config.phase == len(phases):
        sample, count = last.sample(step), last.order_samples
        if config.sequence_length != last.sequence_length:
            sample = -(-last.tokens(step) // config.sequence_length)
            count = sample + (config.steps - step) * config.global_batch
        tokens = last.tokens(step)
        phases.append(TrainingPhase(step, sample, tokens, config.global_batch, config.sequence_length, count))
    elif config.phase != len(phases) - 1:
        raise UserError(
            f"phase is {config.phase}, but the checkpoint of step {step} is of phase {len(phases) - 1}: give that number to go "
            f"on with it, or {len(phases)} to begin another phase."
        )
    return phases


def values(phases: Sequence[TrainingPhase]) -> list[dict[str, Any]]:
    """As `resumed` takes them."""
    return [dataclasses.asdict(phase) for phase in phases]
