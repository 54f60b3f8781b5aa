"""Requests and tensor transfers between student and teacher processes, which form separate torch.distributed worlds."""

import contextlib
import dataclasses
import datetime
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from minitron_mcore.errors import UserError
from minitron_mcore.parallel.layout import Place
from minitron_mcore.parallel.megatron_patches.groups import joint_group

_NO_TIMEOUT = datetime.timedelta(days=365)


class Bridge:
    """Joins the student world and the teacher world of `process_groups.distributed_context`.

    Bridge ranks number the student's processes first, then the teacher's. Requests go from student to teacher.
    """

    def __init__(self, store: dist.Store, rank: int, students: int, size: int, timeout: datetime.timedelta):
        """Collective over both worlds.

        Args:
            rank: this process's bridge rank.
            students: number of processes in the student world.
            size: number of processes in both.
            timeout: of a transfer.
        """
        self.store, self.rank, self.students, self.sent_requests = store, rank, students, 0
        self.group = joint_group(store, rank, size, timeout)

    @property
    def is_teacher(self) -> bool:
        """Whether this process is in the teacher world."""
        return self.rank >= self.students

    def send_request(self, request: dict[str, Any] | None) -> None:
        """Send a request, or None to end the teacher's loop; call on all student ranks, of which rank 0 sends."""
        if self.rank == 0:
            self.store.set(f"request {self.sent_requests}", json.dumps(request))
        self.sent_requests += 1

    def receive_requests(self) -> Iterator[dict[str, Any]]:
        """On teacher ranks, the student's requests; waits for each without a timeout."""
        for number in itertools.count():
            if (request := self._receive(f"request {number}")) is None:
                return
            yield request

    def exchange_places(self, own: list[Place]) -> tuple[list[Place | None], list[Place | None]]:
        """Exchange where each rank is in its layout (collective over both worlds).

        Args:
            own: of each rank of this world.

        Returns:
            (place in the student's layout, place in the teacher's) by bridge rank; None for ranks of the other world.

        Raises:
            UserError: the error that the teacher world sent through `report_user_errors`.
        """
        if self.rank in (0, self.students):
            self.store.set(f"places {self.is_teacher}", json.dumps([dataclasses.astuple(place) for place in own]))
        student, teacher = (self._receive(f"places {side}") for side in (False, True))
        if isinstance(teacher, str):
            raise UserError(teacher)
        no_student, no_teacher = [None] * len(teacher), [None] * len(student)
        return [*(Place(*x) for x in student), *no_student], [*no_teacher, *(Place(*x) for x in teacher)]

    @contextlib.contextmanager
    def report_user_errors(self) -> Iterator[None]:
        """On teacher ranks, for work before `exchange_places`: a UserError is also raised in the student world."""
        try:
            yield
        except UserError as error:
            self.store.set("places True", json.dumps(str(error)))
            raise

    def _receive(self, key: str) -> Any:
        self.store.wait([key], _NO_TIMEOUT)
        return json.loads(self.store.get(key))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Broadcast in place from bridge rank 0 (collective over both worlds)."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self.group.broadcast([tensor], options).wait()

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        """As torch.distributed's `all_to_all_single`, over both worlds."""
        self.group.alltoall_base(output, input, output_splits, input_splits, dist.AllToAllOptions()).wait()
