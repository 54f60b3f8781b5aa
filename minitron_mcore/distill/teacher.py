"""The frozen teacher: runs its own forward-only schedule ahead of the student and outputs hidden states instead of logits."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.checkpoint import run_folder, streaming
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks, hidden_state_loss
from minitron_mcore.distill.teacher_transfer import SameLayout, TwoLayouts
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups, schedule
from minitron_mcore.parallel.schedule import Batch


class Teacher:
    """A frozen model in the student's layout or one of its own.

    Its outputs for a micro-batch are on the student's last-stage ranks, sharded as the student's: the final norm's output
    [S_r, B, H], S_r = S / CP or S / CP / TP under sequence parallelism, in the teacher's dtype. Its head's rows [V_r, H] are there
    too, sharded as the student's. Outputs of its blocks are where the student's are compared with them (see `hidden_state_loss`).
    """

    def __init__(
        self,
        model: Model,
        arch: Architecture,
        ahead: int,
        head: Tensor | None = None,
        layout: process_groups.Layout | None = None,
        transfer: SameLayout | TwoLayouts | None = None,
    ):
        """
        Args:
            ahead: micro-batches that the teacher runs at a time.
            head: replaces the model's (see `cut_head`).
            layout, transfer: of the model, if its layout is not the student's.
        """
        self.model, self.arch, self.ahead, self._head = model.eval().requires_grad_(False), arch, ahead, head
        self.layout, self.transfer = layout, transfer or SameLayout(model)
        self.routes: list[checks.Route] = []
        """Blocks whose outputs are transferred, in ascending order."""
        self.offloaded: OffloadedWeights | None = None

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
        """Build it in `config.teacher_parallel` or the student's layout `parallel`, and load its weights (collective).

        Raises:
            UserError: a layout that does not divide it; a damaged checkpoint.
        """
        teacher_parallel = config.teacher_parallel or parallel
        layout = process_groups.Layout.of(teacher_parallel) if teacher_parallel != parallel else None
        with process_groups.use_layout(layout):
            model = run_folder.build_model(source, teacher_parallel, dtype, performance.frozen())
        head, transfer = cut_head(model, source, student, layout), None
        if layout:
            student_places = process_groups.places()
            with process_groups.use_layout(layout):
                places = student_places, process_groups.places()
            empty = next(model.parameters()).new_empty(0, source.arch.hidden)
            transfer = TwoLayouts(
                (parallel, teacher_parallel), places, process_groups.rank(), dist.all_to_all_single, empty
            )
        teacher = cls(model, source.arch, config.teacher_ahead, head, layout, transfer)
        if performance.teacher_offload:
            teacher.offload()
        return teacher

    def offload(self) -> None:
        """From now on keep the weights in host memory between passes, except for a head that the loss uses."""
        kept = {id(self.head)} if process_groups.is_last_stage() else set()
        self.offloaded = OffloadedWeights([weight for weight in self.model.parameters() if id(weight) not in kept])

    @property
    def head(self) -> Tensor:
        return self.model.head() if self._head is None else self._head

    def add_teacher_outputs(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """A step's micro-batches, with "teacher_hidden" on last-stage ranks and the outputs of `routes` (collective).

        If the student has one pipeline stage, the teacher runs `ahead` micro-batches whenever the iterator needs one. Otherwise it
        runs the whole step at once: a later stage requests a micro-batch only after the student's message arrived.
        """
        if process_groups.pp_group().size() > 1:
            return self._run(batches)
        return (
            batch for at in range(0, len(batches), self.ahead) for batch in self._run(batches[at : at + self.ahead])
        )

    def _run(self, batches: Sequence[Batch]) -> list[Batch]:
        teacher_batches, last = self.transfer.teacher_batches(batches), process_groups.pp_group().size() - 1
        with process_groups.use_layout(self.layout), self.offloaded or contextlib.nullcontext():
            outputs = forward(self.model, self.arch, teacher_batches, self.routes, last)
        return attach(batches, outputs, self.transfer)


class OffloadedWeights:
    """Frozen weights that are on their device inside the `with` block only, otherwise in host memory, pinned if CUDA is there.

    Since they never change, leaving the block frees the device's copies without copying back.
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


@dataclass(frozen=True)
class TeacherOutput:
    """One kind of the teacher's hidden states."""

    key: str
    """In a batch."""
    states: Sequence[Tensor]
    """This rank's shard [S_t, B, H_t] for each micro-batch of its teacher replica; empty off the stage `source`."""
    source: int
    """The teacher's pipeline stage that computes them."""
    target: int
    """The student's pipeline stage that needs them."""


def forward(
    model: Model, arch: Architecture, batches: Sequence[Batch], routes: Sequence[checks.Route], last: int
) -> list[TeacherOutput]:
    """The teacher's forward passes, in its own layout (collective over its replica); `last`: the student's last stage."""
    hidden: list[Tensor] = []
    with hidden_state_loss.record_outputs(model, arch, {block for block, *_ in routes}) as outputs:
        schedule.forward(model, batches, lambda output, batch: hidden.append(output))
    # The interleaved schedule may append padding micro-batches (see `schedule.forward`): drop their outputs.
    blocks = [
        TeacherOutput(hidden_state_loss.batch_key(block), outputs[block][: len(batches)], *stages)
        for block, *stages in routes
    ]
    return [TeacherOutput("teacher_hidden", hidden, process_groups.pp_group().size() - 1, last), *blocks]


def attach(
    batches: Sequence[Batch], outputs: Sequence[TeacherOutput], transfer: SameLayout | TwoLayouts
) -> list[Batch]:
    """The student's micro-batches with this rank's shards of the teacher's outputs (collective)."""
    attached = [batch | {"teacher_hidden": None} for batch in batches]
    for output in outputs:
        received = transfer.transfer(output.states, output.source, output.target, batches)
        for batch, states in zip(attached, received, strict=True):
            batch |= {} if states is None else {output.key: states}
    return attached


def cut_head(
    model: Model, source: Checkpoint, student: Architecture, layout: process_groups.Layout | None = None
) -> Tensor | None:
    """The teacher head's rows [V_r, H_t] of the student's shard; None if the model's own shard equals it, and off the last stage.

    Tensor-parallel rank r of TP holds rows r * V_s / TP .. (r + 1) * V_s / TP of both heads, V_s the student's padded
    vocabulary; rows beyond the teacher's vocabulary are zeros. The model's own shard, cut at V_t / TP_t, is freed unless it is
    also its embedding.

    Args:
        layout: the teacher's, if it is not the student's.
    """
    tp, arch, last = process_groups.tp_group(), source.arch, process_groups.is_last_stage()
    padded = parameter_table.padded_vocab(student, tp.size())
    with process_groups.use_layout(layout):
        teacher_tp, own_head = process_groups.tp_group(), model.head() if process_groups.is_last_stage() else None
        embedding = arch.tied and process_groups.is_first_stage()
    teacher_padded = parameter_table.padded_vocab(arch, teacher_tp.size())
    if last and own_head is not None and (padded, tp.size()) == (teacher_padded, teacher_tp.size()):
        return None
    if own_head is not None and not embedding:
        own_head.data = own_head.new_empty(0)
    return head_rows(source, student, next(model.parameters())) if last else None


def head_rows(source: Checkpoint, student: Architecture, like: Tensor) -> Tensor:
    """Read this rank's rows [V_r, H_t] of a teacher's head (see `cut_head`), with the dtype and device of `like`."""
    tp, arch = process_groups.tp_group(), source.arch
    head = like.new_zeros(parameter_table.padded_vocab(student, tp.size()) // tp.size(), arch.hidden)
    start = tp.rank() * len(head)
    if (rows := min(len(head), arch.vocab - start)) > 0:
        head[:rows] = read_head(source, start, rows)
    return head


def read_head(source: Checkpoint, start: int, rows: int) -> Tensor:
    """Rows [rows, H] of a checkpoint's output head, or of the embedding table that is tied to it, from `start` on."""
    name = "embedding.word_embeddings.weight" if source.arch.tied else "output_layer.weight"
    parameter = next(parameter for parameter in parameter_table.parameters(source.arch) if parameter.name == name)
    return streaming.Reader(source).read(parameter, (start, 0), (rows, source.arch.hidden))
