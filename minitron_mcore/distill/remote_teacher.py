"""A teacher on ranks of its own: the last `teacher_ranks` processes hold nothing else, and run ahead while the student learns.

The student's ranks ask for a step at a time and send its tokens; the teacher's run `teacher_ahead` micro-batches of each replica of
the student, hand over what they leave (see `handover`), and begin the next before the student asks for it.
"""

import signal
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks, hidden_state_loss
from minitron_mcore.distill import teacher as teachers
from minitron_mcore.distill.teacher_transfer import OtherLayout, gathered
from minitron_mcore.errors import UserError
from minitron_mcore.models import build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch


class DistantTeacher:
    """What the student's ranks have of it: on the last stage its head's rows [V_r, H], sharded as the student's; and after each
    `feed` what a `teacher.Teacher` would have left there."""

    def __init__(
        self,
        source: Checkpoint,
        student: Architecture,
        config: DistillConfig,
        parallel: ParallelConfig,
        dtype: str,
        performance: PerformanceConfig,
    ):
        """Learn where the teacher's ranks are (collective over both worlds); `performance` is theirs to read.

        Raises:
            UserError: there are none; what they could not load; a damaged checkpoint.
        """
        if process_groups.bridge() is None:
            raise UserError(checks.NOT_APART)
        self.bridge, self.arch, self.ahead = process_groups.bridge(), source.arch, config.teacher_ahead
        self.transfer = _transfer(source.arch, config, parallel, dtype)
        self.last = (config.teacher_parallel or parallel).pipeline - 1
        self.head = teachers.head_rows(source, student, self.transfer.empty) if process_groups.is_last_stage() else None
        self.routes: list[checks.Route] = []
        """Which blocks' states go where, ascending (see `states`)."""

    def add_teacher_outputs(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """As `Teacher.feed` (collective over both worlds); the teacher's ranks begin with the whole step at once."""
        stages = process_groups.pp_group().size()
        each = self.ahead if stages == 1 else len(batches)
        wanted = [("teacher_hidden", (), self.last, stages - 1)]
        wanted += [(hidden_state_loss.key(block), (), *route) for block, *route in self.routes]
        every = gathered(batches)
        self.bridge.send_request({"shape": every.shape, "each": each, "routes": self.routes, "last": stages - 1})
        self.bridge.broadcast(every)
        parts = (batches[at : at + each] for at in range(0, len(batches), each))
        filled = (batch for part in parts for batch in teachers.filled(part, wanted, self.transfer))
        return filled if stages == 1 else list(filled)


def serve(
    source: Checkpoint,
    config: DistillConfig,
    parallel: ParallelConfig,
    dtype: str,
    performance: PerformanceConfig | None = None,
) -> None:
    """On the teacher's ranks: load it and do what the student's ask for, until they have ended (collective over both worlds).

    Raises:
        UserError: a layout that doesn't divide it; a damaged checkpoint.
    """
    bridge = process_groups.bridge()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the student's ranks save, end the run, and with it this one
    with bridge.report_user_errors():
        options = (performance or PerformanceConfig()).frozen()
        model = run_folder.build_model(source, config.teacher_parallel or parallel, dtype, options)
        model.eval().requires_grad_(False)
    transfer = _transfer(source.arch, config, parallel, dtype)
    for asked in bridge.receive_requests():
        every = torch.empty(asked["shape"], dtype=torch.int64, device=process_groups.device())
        bridge.broadcast(every)
        for part in every.split(asked["each"], dim=1):
            given = transfer.shared_out(part)
            teacher_outputs = teachers.passes(model, source.arch, given, asked["routes"], asked["last"])
            teachers.filled([{"tokens": tokens} for tokens in part[0]], teacher_outputs, transfer)


def _transfer(arch: Architecture, config: DistillConfig, parallel: ParallelConfig, dtype: str) -> OtherLayout:
    bridge, other = process_groups.bridge(), config.teacher_parallel or parallel
    empty: Tensor = torch.empty(0, arch.hidden, dtype=build.DTYPES[dtype], device=process_groups.device())
    places = bridge.exchange_places(process_groups.places())
    return OtherLayout((parallel, other), places, bridge.rank, bridge.all_to_all, empty)
