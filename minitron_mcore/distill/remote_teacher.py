"""A teacher on its own ranks: the last `teacher_ranks` processes hold only the teacher, which runs ahead of the student.

The student's ranks send the tokens of a whole step. The teacher's ranks run `teacher_ahead` micro-batches of each student replica,
transfer their outputs (see `teacher_transfer`), and start the next ones before the student needs them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks, hidden_state_loss, teacher
from minitron_mcore.distill.teacher import TeacherOutput
from minitron_mcore.distill.teacher_transfer import TwoLayouts, gather_tokens
from minitron_mcore.errors import UserError
from minitron_mcore.models import build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.parallel.schedule import Batch


class RemoteTeacher:
    """The student's side: what `teacher.Teacher` is to a trainer. The last stage holds its head's rows [V_r, H], as the
    student's."""

    def __init__(
        self,
        source: Checkpoint,
        student: Architecture,
        config: DistillConfig,
        parallel: ParallelConfig,
        dtype: str,
        performance: PerformanceConfig,
    ):
        """Exchange the ranks' places (collective over both worlds). `performance` applies on the teacher's ranks only.

        Raises:
            UserError: there are no teacher ranks, or they could not load the teacher; a damaged checkpoint.
        """
        if process_groups.bridge() is None:
            raise UserError(checks.NO_TEACHER_RANKS)
        self.bridge, self.arch, self.ahead = process_groups.bridge(), source.arch, config.teacher_ahead
        self.transfer = _transfer(source.arch, config, parallel, dtype)
        self.source_stage = (config.teacher_parallel or parallel).pipeline - 1
        self.head = teacher.head_rows(source, student, self.transfer.empty) if process_groups.is_last_stage() else None
        self.routes: list[checks.Route] = []
        """Blocks whose outputs are transferred, in ascending order."""

    def add_teacher_outputs(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """As `Teacher.add_teacher_outputs` (collective over both worlds); the teacher's ranks start with the whole step at
        once."""
        stages = process_groups.pp_group().size()
        each = self.ahead if stages == 1 else len(batches)
        outputs = [TeacherOutput("teacher_hidden", (), self.source_stage, stages - 1)]
        outputs += [TeacherOutput(hidden_state_loss.batch_key(block), (), *route) for block, *route in self.routes]
        tokens = gather_tokens(batches)
        self.bridge.send_request({"shape": tokens.shape, "each": each, "routes": self.routes, "last": stages - 1})
        self.bridge.broadcast(tokens)
        parts = (batches[at : at + each] for at in range(0, len(batches), each))
        attached = (batch for part in parts for batch in teacher.attach(part, outputs, self.transfer))
        return attached if stages == 1 else list(attached)


@stop_signal.ignored()  # the student's ranks save and end the run
def serve(
    source: Checkpoint,
    config: DistillConfig,
    parallel: ParallelConfig,
    dtype: str,
    performance: PerformanceConfig | None = None,
) -> None:
    """On the teacher's ranks: load it and serve the student's requests until its ranks end (collective over both worlds).

    Raises:
        UserError: a layout that does not divide it; a damaged checkpoint.
    """
    bridge = process_groups.bridge()
    with bridge.report_user_errors():
        options = (performance or PerformanceConfig()).frozen()
        model = run_folder.build_model(source, config.teacher_parallel or parallel, dtype, options)
        model.eval().requires_grad_(False)
    transfer = _transfer(source.arch, config, parallel, dtype)
    with hang_watchdog.phase(Phase.idle, lambda: "the wait for the student's tokens"):
        for request in bridge.receive_requests():
            with hang_watchdog.phase(Phase.step, lambda: "the teacher's pass"):
                tokens = torch.empty(request["shape"], dtype=torch.int64, device=process_groups.device())
                bridge.broadcast(tokens)
                for part in tokens.split(request["each"], dim=1):
                    shares, last = transfer.select(part), request["last"]
                    outputs = teacher.forward(model, source.arch, shares, request["routes"], last)
                    teacher.attach([{"tokens": micro_batch} for micro_batch in part[0]], outputs, transfer)


def _transfer(arch: Architecture, config: DistillConfig, parallel: ParallelConfig, dtype: str) -> TwoLayouts:
    bridge, teacher_parallel = process_groups.bridge(), config.teacher_parallel or parallel
    empty: Tensor = torch.empty(0, arch.hidden, dtype=build.DTYPES[dtype], device=process_groups.device())
    places = bridge.exchange_places(process_groups.places())
    return TwoLayouts((parallel, teacher_parallel), places, bridge.rank, bridge.all_to_all, empty)
