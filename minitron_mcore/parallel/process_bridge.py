"""Between two worlds of processes, of which torch.distributed knows but one each."""

import contextlib
import dataclasses
import datetime
import itertools
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist

from minitron_mcore.errors import UserError
from minitron_mcore.parallel import cpu_backend
from minitron_mcore.parallel.layout import Place

_EVER = datetime.timedelta(days=365)


class Bridge:
    """Requests and tensor transfers between the student world and the teacher world of `process_groups.distributed_context`.

    Bridge ranks number the student's processes first, then the teacher's.
    """

    def __init__(self, store: dist.Store, rank: int, first: int, size: int, timeout: datetime.timedelta):
        """`first`: ranks of the first world."""
        self.store, self.rank, self.first, self.asked = store, rank, first, 0
        # torch has groups within one world only; these are what they are made of.
        if cpu_backend.is_cpu():
            self.group = dist.ProcessGroupGloo(dist.PrefixStore("group", store), rank, size, timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = dist.ProcessGroupNCCL(dist.PrefixStore("group", store), rank, size, options)

    @property
    def is_teacher(self) -> bool:
        """This rank is of the second world."""
        return self.rank >= self.first

    def send_request(self, what: dict | None) -> None:
        """Send a request to the second world; None is the last. Called on all ranks of the first, rank 0 sends."""
        if self.rank == 0:
            self.store.set(f"request {self.asked}", json.dumps(what))
        self.asked += 1

    def receive_requests(self) -> Iterator[dict]:
        """In the second world, what the first asks for until it ends."""
        for number in itertools.count():
            if (what := self._heard(f"request {number}")) is None:
                return
            yield what

    def exchange_places(self, own: list[Place]) -> tuple[list[Place | None], list[Place | None]]:
        """(places in the first world, in the second) of each rank of the bridge, None of those in the other (collective).

        Raises:
            UserError: what the second world could not be `prepared` for.
        """
        if self.rank in (0, self.first):
            self.store.set(f"places {self.is_teacher}", json.dumps([dataclasses.astuple(place) for place in own]))
        found = [self._heard(f"places {side}") for side in (False, True)]
        if isinstance(found[1], str):
            raise UserError(found[1])
        near, far = ([Place(*x) for x in each] for each in found)
        return [*near, *[None] * len(far)], [*[None] * len(near), *far]

    @contextlib.contextmanager
    def report_user_errors(self) -> Iterator[None]:
        """In the second world, what comes before `meet`; a UserError is also the first world's, which tells the user."""
        try:
            yield
        except UserError as error:
            self.store.set("places True", json.dumps(str(error)))
            raise

    def _heard(self, key: str):
        self.store.wait([key], _EVER)
        return json.loads(self.store.get(key))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """In place, from the first world's rank 0 (collective)."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self.group.broadcast([tensor], options).wait()

    def all_to_all(self, into: torch.Tensor, out: torch.Tensor, taken: list[int], sent: list[int]) -> None:
        """As torch.distributed's `all_to_all_single`."""
        self.group.alltoall_base(into, out, taken, sent, dist.AllToAllOptions()).wait()
