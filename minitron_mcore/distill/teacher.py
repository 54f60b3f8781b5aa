"""The frozen teacher: it runs its own forward-only schedule ahead of the student and hands over final hidden states, not logits."""

import itertools
from collections.abc import Iterable, Sequence

from torch import Tensor

from minitron_mcore import checkpoint, runtime, schedule, stream
from minitron_mcore.checkpoint import Checkpoint
from minitron_mcore.config import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks, states
from minitron_mcore.models import table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.schedule import Batch


class Teacher:
    """A model in the student's layout that never trains.

    What it leaves behind of a micro-batch lies on last-stage ranks only: the final norm's output [S_r, B, H], S_r = S / CP or
    S / CP / TP under sequence parallelism, in the teacher's dtype. Its head's rows [V_r, H] lie there too, sharded as the
    student's. States of its blocks lie where the student's are compared with them (see `states`).
    """

    def __init__(self, model: Model, arch: Architecture, ahead: int, head: Tensor | None = None):
        """`ahead`: micro-batches that the teacher runs at a time; `head`: instead of the model's (see `cut_head`)."""
        self.model, self.arch, self.ahead, self._head = model.eval().requires_grad_(False), arch, ahead, head
        self.routes: list[checks.Route] = []
        """Which blocks' states go where, ascending (see `states`)."""

    @classmethod
    def load(
        cls, source: Checkpoint, student: Architecture, config: DistillConfig, parallel: ParallelConfig, dtype: str
    ) -> "Teacher":
        """Build it in the layout of `student` and load its weights (collective).

        Raises:
            UserError: a layout that doesn't divide it; a damaged checkpoint.
        """
        model = checkpoint.build_model(source, parallel, dtype)
        return cls(model, source.arch, config.teacher_ahead, cut_head(model, source, student))

    @property
    def head(self) -> Tensor:
        return self.model.head() if self._head is None else self._head

    def feed(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """A step's micro-batches with "teacher_hidden" added on last-stage ranks, and what `routes` add (collective).

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
        with states.recorded(self.model, self.arch, self.routes, batches) as found:
            schedule.forward(self.model, batches, lambda output, batch: hidden.append(output))
        parts = itertools.zip_longest(batches, found, hidden)
        return [batch | inner | {"teacher_hidden": final} for batch, inner, final in parts]


def cut_head(model: Model, source: Checkpoint, student: Architecture) -> Tensor | None:
    """The rows of a teacher's head that go with the student's; None where its own shards are these, and off the last stage.

    Tensor-parallel rank r of TP holds rows r * V_s / TP .. (r + 1) * V_s / TP of either, V_s the student's padded vocabulary; ids
    that the teacher doesn't have are zeros. The teacher was loaded at its own V_t / TP, so the rows are read again by their place
    in the whole head. The model's own head goes, unless it is its embedding too.
    """
    tp, arch = runtime.tp_group(), source.arch
    padded = table.padded_vocab(student, tp.size())
    if not runtime.is_last_stage() or padded == table.padded_vocab(arch, tp.size()):
        return None
    own = model.head()
    name = "embedding.word_embeddings.weight" if arch.tied else "output_layer.weight"
    parameter = next(parameter for parameter in table.parameters(arch) if parameter.name == name)
    head = own.new_zeros(padded // tp.size(), arch.hidden)
    start = tp.rank() * len(head)
    if (rows := min(len(head), arch.vocab - start)) > 0:
        head[:rows] = stream.Reader(source).read(parameter, (start, 0), (rows, arch.hidden))
    if not (arch.tied and runtime.is_first_stage()):
        own.data = own.new_empty(0)
    return head
