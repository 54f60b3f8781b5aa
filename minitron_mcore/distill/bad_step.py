"""The exception of a step whose loss or gradient is not finite."""

import math

from torch import Tensor

from minitron_mcore.parallel.megatron_patches import training

from megatron.core.optimizer import ChainedOptimizer  # isort: skip


class BadStep(Exception):
    """A step that cannot be taken, on all ranks alike; weights, optimizer and schedule are those of the step before.

    `what` is "loss", which the micro-batches' own statistics show, "gradient", or another sum; `sums` are these statistics on
    last-stage ranks, empty elsewhere.
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
