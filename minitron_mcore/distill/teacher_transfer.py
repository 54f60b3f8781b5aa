"""Moves the teacher's hidden states from the ranks that compute them to the ranks where the student's loss needs them.

A micro-batch's states [S, B, H_t] lie on the ranks of one stage of one teacher replica, sharded by context and sequence
parallelism. They go to the ranks of one stage of the student replica that trains on the micro-batch, sharded in that layout:

    teacher's rank   [S_t, B, H_t]   S_t = S / CP_t or S / CP_t / TP_t under sequence parallelism
    student's rank   [S_r, B, H_t]   S_r = S / CP or S / CP / TP

With the same layout, final states need no transfer, and only states between two different stages move, along the pipeline.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.parallel import process_groups, schedule
from minitron_mcore.parallel.layout import Place
from minitron_mcore.parallel.schedule import Batch


class SameLayout:
    """Transfers where student and teacher have the same layout."""

    def __init__(self, model: torch.nn.Module):
        """`model`: this rank's part of the teacher."""
        self.config = model.config

    def teacher_batches(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches that this rank's teacher replica runs for its student replica's `batches`."""
        return batches

    def transfer(
        self, states: Sequence[Tensor], source: int, target: int, batches: Sequence[Batch]
    ) -> Sequence[Tensor | None]:
        """Move states of each micro-batch from the teacher's stage to the student's (collective over the stages).

        Args:
            states: this rank's shard [S_t, B, H_t] for each of `teacher_batches`, on ranks of the stage `source`.
            source, target: pipeline stages of the teacher and of the student.

        Returns:
            This rank's shard [S_r, B, H_t] for each of `batches` on ranks of `target`, None elsewhere.
        """
        group, rank = process_groups.pp_group(), process_groups.pp_group().rank()
        if rank == source == target:
            return states
        received: list[Tensor | None] = [None for _ in batches]
        for number, batch in enumerate(batches):
            if rank == source != target:
                dist.send(states[number].contiguous(), group_dst=target, group=group)
            elif rank == target != source:
                received[number] = self._empty(batch)
                dist.recv(received[number], group_src=source, group=group)
        return received

    def _empty(self, batch: Batch) -> Tensor:
        size, length = batch["tokens"].shape
        shards = process_groups.cp_group().size()
        shards *= process_groups.tp_group().size() if self.config.sequence_parallel else 1
        shape = (length // shards, size, self.config.hidden_size)
        return torch.empty(shape, dtype=self.config.params_dtype, device=batch["tokens"].device)


INPUTS = ("tokens", "document_starts")
"""What a model reads of a batch; the second only where attention stays within documents."""


def gather_inputs(batches: Sequence[Batch]) -> Tensor:
    """`INPUTS` [D, n, k, B, S] of the n micro-batches of each of the student's D replicas (collective over these)."""
    own = torch.stack([torch.stack([batch[key] for key in INPUTS if key in batch]) for batch in batches])
    replicas = process_groups.dp_group().size()
    tokens = own.new_empty(replicas * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(tokens, own, group=process_groups.dp_group())
    return tokens.view(replicas, *own.shape)


class TwoLayouts:
    """Transfers where the teacher has its own layout, on the student's ranks or on others.

    All student replicas request n micro-batches at the same time. The n x D micro-batches, in the order of the student's replicas,
    are divided into D_t contiguous ranges, one for each teacher replica. Where D_t does not divide n x D, the last replicas
    process duplicates whose outputs are discarded: experts are shared between replicas, so all must run equally often.
    """

    def __init__(
        self,
        layouts: tuple[ParallelConfig, ParallelConfig],
        places: tuple[Sequence[Place | None], Sequence[Place | None]],
        rank: int,
        all_to_all: Callable[[Tensor, Tensor, list[int], list[int]], object],
        empty: Tensor,
    ):
        """
        Args:
            layouts: the student's, the teacher's.
            places: in these layouts, of each rank that takes part in the exchange; None for a rank without a part of the model.
            rank: this one's among them.
            all_to_all: as torch.distributed's `all_to_all_single`, between them.
            empty: [0, H_t], with the states' width, dtype and device.
        """
        (self.parallel, self.teacher_parallel), (self.student, self.teacher) = layouts, places
        self.rank, self.all_to_all, self.empty = rank, all_to_all, empty
        self.replicas = [1 + max(place.data for place in model if place) for model in places]
        self.plans: dict[tuple[int, ...], list] = {}

    def _counts(self, count: int) -> tuple[int, int]:
        """Micro-batches in all, and of a teacher replica, where each student replica requests `count`."""
        total = count * self.replicas[0]
        return total, -(-total // self.replicas[1])

    def teacher_batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """As `SameLayout.teacher_batches`, with `INPUTS` only (collective over the student's replicas)."""
        return self.select(gather_inputs(batches))

    def select(self, inputs: Tensor) -> list[Batch]:
        """The micro-batches that this rank's teacher replica runs, of inputs [D, n, k, B, S]."""
        total, each = self._counts(inputs.shape[1])
        first = self.teacher[self.rank].data * each
        own = (inputs.flatten(0, 1)[min(first + n, total - 1)] for n in range(each))
        return [dict(zip(INPUTS, each, strict=False)) for each in own]

    def transfer(
        self, states: Sequence[Tensor], source: int, target: int, batches: Sequence[Batch]
    ) -> list[Tensor | None]:
        """As `SameLayout.transfer`; one all-to-all for each micro-batch of a teacher replica (collective over all ranks)."""
        size, length = batches[0]["tokens"].shape
        place, empty = self.student[self.rank], self.empty[:, None].expand(0, size, -1)
        received: list[Tensor | None] = [None for _ in batches]
        if place and place.pipeline == target:
            rows = len(schedule.positions(length, self.parallel, place))
            received = [empty.new_empty(rows, *empty.shape[1:]) for _ in batches]
        for n, (receives, sends) in enumerate(self._plan(length, len(batches), source, target)):
            receive_sizes, send_sizes = ([0] * len(self.student) for _ in range(2))
            for sizes, messages in ((receive_sizes, receives), (send_sizes, sends)):
                for rank, _, rows in messages:
                    sizes[rank] = len(rows)
            buffer = empty.new_empty(sum(receive_sizes), *empty.shape[1:])
            sent = torch.cat([empty, *(states[n][rows] for *_, rows in sends)])
            self.all_to_all(buffer, sent, receive_sizes, send_sizes)
            parts = buffer.split([len(rows) for *_, rows in receives])
            for (_, number, rows), part in zip(receives, parts, strict=True):
                received[number][rows] = part
        return received

    def _plan(self, length: int, count: int, source: int, target: int) -> list:
        """For each exchange, this rank's receives and sends, by peer: (peer, number of the student's micro-batch, own rows)."""
        key = (length, count, source, target)
        if key not in self.plans:
            self.plans[key] = []
            for n in range(self._counts(count)[1]):
                messages = list(self._messages(n, *key))
                receives = [(sender, number, rows) for sender, to, number, _, rows in messages if to == self.rank]
                sends = [(to, number, rows) for sender, to, number, rows, _ in messages if sender == self.rank]
                self.plans[key].append([sorted(part, key=lambda message: message[0]) for part in (receives, sends)])
        return self.plans[key]

    def _messages(
        self, n: int, length: int, count: int, source: int, target: int
    ) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
        """(sender, receiver, number of the micro-batch, sender's rows, receiver's rows) of this rank's messages in exchange `n`.

        Two ranks exchange at most one message.
        """
        (total, each), device = self._counts(count), self.empty.device
        for replica in range(self.replicas[1]):
            if (item := replica * each + n) >= total:
                continue
            data, number = divmod(item, count)
            holders = collections.defaultdict(list)  # by shard of the sequence
            for rank, place in enumerate(self.teacher):
                if place and (place.pipeline, place.data) == (source, replica):
                    holders[place.context, place.tensor * self.teacher_parallel.sequence].append(rank)
            receivers = [r for r, x in enumerate(self.student) if x and (x.pipeline, x.data) == (target, data)]
            for rank, ranks in itertools.product(receivers, holders.values()):
                # Of several ranks with the same states: the receiver itself, or one chosen to balance the load.
                sender = rank if rank in ranks else ranks[rank % len(ranks)]
                if self.rank in (sender, rank):
                    held = schedule.positions(length, self.teacher_parallel, self.teacher[sender])
                    needed = schedule.positions(length, self.parallel, self.student[rank])
                    _, theirs, own = np.intersect1d(held, needed, assume_unique=True, return_indices=True)
                    if len(own):
                        yield (
                            sender,
                            rank,
                            number,
                            torch.from_numpy(theirs).to(device),
                            torch.from_numpy(own).to(device),
                        )
