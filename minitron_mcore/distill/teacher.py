"""The frozen teacher: it runs its own forward-only schedule ahead of the student and hands over final hidden states, not logits."""

import itertools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

from torch import Tensor, nn

from minitron_mcore import runtime, schedule
from minitron_mcore.distill.states import States
from minitron_mcore.models.build import Model
from minitron_mcore.schedule import Batch


class Teacher:
    """A model in the student's layout that never trains.

    What it leaves behind of a micro-batch lies on last-stage ranks only: the final norm's output [S_r, B, H], S_r = S / CP or
    S / CP / TP under sequence parallelism, in the teacher's dtype. Its head's rows [V_r, H] lie there too, sharded as the
    student's. States of its blocks lie where the student's are compared with them (see `states`).
    """

    def __init__(self, model: Model, ahead: int, states: States | None = None):
        """`ahead`: micro-batches that the teacher runs at a time."""
        self.model, self.ahead, self.states = model.eval().requires_grad_(False), ahead, states

    @property
    def head(self) -> nn.Parameter:
        return self.model.head()

    def feed(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """A step's micro-batches with "teacher_hidden" added on last-stage ranks, and what `states` adds (collective).

        With one stage the teacher runs when a micro-batch is asked for, `ahead` at a time. With several it runs the whole step
        at once: a later stage waits for the student's message before it asks for its micro-batch.
        """
        if runtime.pp_group().size() > 1:
            return self._run(batches)
        return (
            batch for at in range(0, len(batches), self.ahead) for batch in self._run(batches[at : at + self.ahead])
        )

    def _run(self, batches: Sequence[Batch]) -> list[Batch]:
        hidden: list[Tensor] = []
        recorded = self.states.recorded(self.model, batches) if self.states else nullcontext([{} for _ in batches])
        with recorded as states:
            schedule.forward(self.model, batches, lambda output, batch: hidden.append(output))
        parts = itertools.zip_longest(batches, states, hidden)
        return [batch | inner | {"teacher_hidden": final} for batch, inner, final in parts]
