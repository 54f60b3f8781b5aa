"""The exception of a step whose loss or gradient is not finite."""

import math

from torch import Tensor


class BadStep(Exception):
    """A step that cannot be taken, on all ranks alike; weights, optimizer and schedule are those of the step before.

    `what` is "loss", which the micro-batches' own statistics show, "gradient", or another sum; `sums` are these statistics on
    last-stage ranks, empty elsewhere.
    """

    def __init__(self, what: str, value: float, sums: list[Tensor]):
        super().__init__(f"{what} {value}")
        self.what, self.value, self.sums = what, value, sums


def guard_gradient(optimizer) -> None:
    """Make a ChainedOptimizer of megatron-core raise BadStep where the gradient's norm over all ranks is not finite.

    It takes the norm before it changes anything, but goes on whatever the norm is.
    """
    norm_of = optimizer.get_grad_norm

    def checked() -> float:
        norm = float(norm_of())
        if not math.isfinite(norm):
            raise BadStep("gradient", norm, [])
        return norm

    optimizer.get_grad_norm = checked
