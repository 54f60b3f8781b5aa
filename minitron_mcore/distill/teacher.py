"""The frozen teacher: it runs its own forward-only schedule ahead of the student and hands over hidden states, not logits."""

import contextlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.checkpoint import run_folder, streaming
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks, hidden_state_loss
from minitron_mcore.distill.teacher_transfer import OtherLayout, SameLayout
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups, schedule
from minitron_mcore.parallel.schedule import Batch


class Teacher:
    """A model that never trains, in the student's layout or one of its own.

    What it leaves behind of a micro-batch lies on the student's last-stage ranks only, shared out as the student's: the final
    norm's output [S_r, B, H], S_r = S / CP or S / CP / TP under sequence parallelism, in the teacher's dtype. Its head's rows
    [V_r, H] lie there too, sharded as the student's. States of its blocks lie where the student's are compared with them (see
    `states`).
    """

    def __init__(
        self,
        model: Model,
        arch: Architecture,
        ahead: int,
        head: Tensor | None = None,
        layout: process_groups.Layout | None = None,
        transfer: SameLayout | OtherLayout | None = None,
    ):
        """`ahead`: micro-batches that the teacher runs at a time; `head`: instead of the model's (see `cut_head`); `layout`: the
        model's, where it isn't the student's, and then how its states get from one to the other."""
        self.model, self.arch, self.ahead, self._head = model.eval().requires_grad_(False), arch, ahead, head
        self.layout, self.transfer = layout, transfer or SameLayout(model)
        self.routes: list[checks.Route] = []
        """Which blocks' states go where, ascending (see `states`)."""
        self.hosted: HostedWeights | None = None

    @classmethod
    def load(
        cls,
        source: Checkpoint,
        student: Architecture,
        config: DistillConfig,
        parallel: ParallelConfig,
        dtype: str,
        performance: PerformanceConfig,
    ) -> "Teacher":
        """Build it in the layout of `student`, or its own, and load its weights (collective).

        Raises:
            UserError: a layout that doesn't divide it; a damaged checkpoint.
        """
        own = config.teacher_parallel or parallel
        layout = process_groups.Layout.of(own) if own != parallel else None
        with process_groups.use_layout(layout):
            model = run_folder.build_model(source, own, dtype, performance.frozen())
        head, transfer = cut_head(model, source, student, layout), None
        if layout:
            student_places = process_groups.places()
            with process_groups.use_layout(layout):
                places = student_places, process_groups.places()
            empty = next(model.parameters()).new_empty(0, source.arch.hidden)
            transfer = OtherLayout((parallel, own), places, process_groups.rank(), dist.all_to_all_single, empty)
        teacher = cls(model, source.arch, config.teacher_ahead, head, layout, transfer)
        if performance.teacher_offload:
            teacher.offload()
        return teacher

    def offload(self) -> None:
        """From now on keep the weights, but for a head that the loss uses, in host memory between passes."""
        kept = {id(self.head)} if process_groups.is_last_stage() else set()
        self.hosted = HostedWeights([weight for weight in self.model.parameters() if id(weight) not in kept])

    @property
    def head(self) -> Tensor:
        return self.model.head() if self._head is None else self._head

    def add_teacher_outputs(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """A step's micro-batches with "teacher_hidden" added on last-stage ranks, and what `routes` add (collective).

        With one stage of the student the teacher runs when a micro-batch is asked for, `ahead` at a time. With several it runs the
        whole step at once: a later stage waits for the student's message before it asks for its micro-batch.
        """
        if process_groups.pp_group().size() > 1:
            return self._run(batches)
        return (
            batch for at in range(0, len(batches), self.ahead) for batch in self._run(batches[at : at + self.ahead])
        )

    def _run(self, batches: Sequence[Batch]) -> list[Batch]:
        given, last = self.transfer.given(batches), process_groups.pp_group().size() - 1
        with process_groups.use_layout(self.layout), self.hosted or contextlib.nullcontext():
            teacher_outputs = passes(self.model, self.arch, given, self.routes, last)
        return filled(batches, teacher_outputs, self.transfer)


class HostedWeights:
    """Frozen weights that lie in host memory, pinned where CUDA is, and on their device inside the `with` block only.

    They never change, so leaving the block copies nothing back: it frees the device's copies.
    """

    def __init__(self, weights: Sequence[Tensor]):
        self.weights, self.device = weights, process_groups.device()
        self.host = [
            torch.empty_like(weight, device="cpu", pin_memory=self.device.type == "cuda").copy_(weight)
            for weight in weights
        ]
        self.__exit__()

    def __enter__(self) -> None:
        for weight, host in zip(self.weights, self.host, strict=True):
            weight.data = host.to(self.device, non_blocking=True, copy=True)

    def __exit__(self, *_) -> None:
        for weight, host in zip(self.weights, self.host, strict=True):
            weight.data = host


TeacherOutputs = tuple[str, Sequence[Tensor], int, int]
"""States of one kind: their key in a batch, what this rank has of each micro-batch that its replica of the teacher ran, the
teacher's stage that left them, the student's stage that wants them."""


def passes(
    model: Model, arch: Architecture, given: Sequence[Batch], routes: Sequence[checks.Route], last: int
) -> list[TeacherOutputs]:
    """The teacher's forward passes, in its own layout (collective over its replica); `last`: the student's last stage."""
    hidden: list[Tensor] = []
    with hidden_state_loss.recorded(model, arch, {block for block, *_ in routes}) as found:
        schedule.forward(model, given, lambda output, batch: hidden.append(output))
    # What follows them is padding, where the interleaved schedule needed more (see `schedule.forward`).
    inner = [(hidden_state_loss.key(block), found[block][: len(given)], *stages) for block, *stages in routes]
    return [("teacher_hidden", hidden, process_groups.pp_group().size() - 1, last), *inner]


def filled(
    batches: Sequence[Batch], teacher_outputs: Sequence[TeacherOutputs], transfer: SameLayout | OtherLayout
) -> list[Batch]:
    """The student's micro-batches with what the teacher left for this rank (collective)."""
    with_teacher_outputs = [batch | {"teacher_hidden": None} for batch in batches]
    for key, kept, source, target in teacher_outputs:
        for batch, moved in zip(with_teacher_outputs, transfer.moved(kept, source, target, batches), strict=True):
            batch |= {} if moved is None else {key: moved}
    return with_teacher_outputs


def cut_head(
    model: Model, source: Checkpoint, student: Architecture, layout: process_groups.Layout | None = None
) -> Tensor | None:
    """The rows of a teacher's head that go with the student's; None where its own shards are these, and off the student's last
    stage.

    Tensor-parallel rank r of TP holds rows r * V_s / TP .. (r + 1) * V_s / TP of either, V_s the student's padded vocabulary; ids
    that the teacher doesn't have are zeros. The teacher was loaded at its own V_t / TP, maybe in a `layout` of its own, so the rows
    are read again by their place in the whole head. The model's own head goes, unless it is its embedding too.
    """
    tp, arch, last = process_groups.tp_group(), source.arch, process_groups.is_last_stage()
    padded = parameter_table.padded_vocab(student, tp.size())
    with process_groups.use_layout(layout):
        theirs, own = process_groups.tp_group(), model.head() if process_groups.is_last_stage() else None
        embedding = arch.tied and process_groups.is_first_stage()
    same = (padded, tp.size()) == (parameter_table.padded_vocab(arch, theirs.size()), theirs.size())
    if last and own is not None and same:
        return None
    if own is not None and not embedding:
        own.data = own.new_empty(0)
    return head_rows(source, student, next(model.parameters())) if last else None


def head_rows(source: Checkpoint, student: Architecture, like: Tensor) -> Tensor:
    """This rank's rows of a teacher's head, read by their place (see `cut_head`); `like`: of their dtype, on their device."""
    tp, arch = process_groups.tp_group(), source.arch
    name = "embedding.word_embeddings.weight" if arch.tied else "output_layer.weight"
    parameter = next(parameter for parameter in parameter_table.parameters(arch) if parameter.name == name)
    head = like.new_zeros(parameter_table.padded_vocab(student, tp.size()) // tp.size(), arch.hidden)
    start = tp.rank() * len(head)
    if (rows := min(len(head), arch.vocab - start)) > 0:
        head[:rows] = streaming.Reader(source).read(parameter, (start, 0), (rows, arch.hidden))
    return head
