"""How the teacher's hidden states get from the ranks where its forward passes leave them to those where the student's need them.

A micro-batch's states [S, B, H_t] lie on the ranks of one stage of one replica of the teacher, shared out by context and sequence
parallelism, and go to the ranks of one stage of the replica of the student that has the micro-batch, shared out as that one's are:

    teacher's rank   [S_t, B, H_t]   S_t = S / CP_t or S / CP_t / TP_t under sequence parallelism
    student's rank   [S_r, B, H_t]   S_r = S / CP or S / CP / TP

In one layout the final states are where they are wanted, and only those between two different stages move, along the pipeline.
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
    """Student and teacher are laid out alike."""

    def __init__(self, model: torch.nn.Module):
        """`model`: this rank's part of the teacher."""
        self.config = model.config

    def given(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches that this rank's replica of the teacher runs, of those that its student's step has."""
        return batches

    def moved(
        self, kept: Sequence[Tensor], source: int, target: int, batches: Sequence[Batch]
    ) -> Sequence[Tensor | None]:
        """What the teacher's stage `source` left of each micro-batch, on the student's stage `target`; None elsewhere
        (collective over the stages). `kept`: this rank's share of each that was given, where it is of `source`."""
        group, rank = process_groups.pp_group(), process_groups.pp_group().rank()
        if rank == source == target:
            return kept
        found: list[Tensor | None] = [None for _ in batches]
        for number, batch in enumerate(batches):
            if rank == source != target:
                dist.send(kept[number].contiguous(), group_dst=target, group=group)
            elif rank == target != source:
                found[number] = self._empty(batch)
                dist.recv(found[number], group_src=source, group=group)
        return found

    def _empty(self, batch: Batch) -> Tensor:
        size, length = batch["tokens"].shape
        shares = process_groups.cp_group().size() * (
            process_groups.tp_group().size() if self.config.sequence_parallel else 1
        )
        shape = (length // shares, size, self.config.hidden_size)
        return torch.empty(shape, dtype=self.config.params_dtype, device=batch["tokens"].device)


def gathered(batches: Sequence[Batch]) -> Tensor:
    """Tokens [D, n, B, S] of the `n` micro-batches that each of the student's D replicas asks for (collective over these)."""
    own = torch.stack([batch["tokens"] for batch in batches])
    replicas = process_groups.dp_group().size()
    every = own.new_empty(replicas * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(every, own, group=process_groups.dp_group())
    return every.view(replicas, *own.shape)


class OtherLayout:
    """The teacher is laid out otherwise, on the same ranks or on others.

    Its replicas share the micro-batches that all of the student's ask for at one time: `n` of each of D make n x D, in the order of
    the student's replicas, and replica t of D_t runs the t-th stretch of them, one after the other. So all ranks ask together, and
    for equally many; where D_t doesn't divide n x D, the last replicas run some twice, for nobody (the experts of a mixture are
    shared between replicas, so none may stay out).
    """

    def __init__(
        self,
        layouts: tuple[ParallelConfig, ParallelConfig],
        places: tuple[Sequence[Place | None], Sequence[Place | None]],
        rank: int,
        exchange: Callable[[Tensor, Tensor, list[int], list[int]], object],
        empty: Tensor,
    ):
        """
        Args:
            layouts: the student's, the teacher's.
            places: in these, of each rank that has part in the exchange; None of a rank that has nothing of the model.
            rank: this one's among them.
            exchange: torch.distributed's `all_to_all_single` between them.
            empty: [0, H_t], of the states' width, dtype and device.
        """
        (self.parallel, self.other), (self.student, self.teacher) = layouts, places
        self.rank, self.exchange, self.empty = rank, exchange, empty
        self.sizes = [1 + max(place.data for place in held if place) for held in places]
        self.plans: dict[tuple[int, ...], list] = {}

    def _shared(self, count: int) -> tuple[int, int]:
        """Micro-batches in all, and of a replica of the teacher, where each replica of the student has `count`."""
        total = count * self.sizes[0]
        return total, -(-total // self.sizes[1])

    def given(self, batches: Sequence[Batch]) -> list[Batch]:
        """As `SameLayout.given`, of tokens alone (collective over the student's replicas)."""
        return self.shared_out(gathered(batches))

    def shared_out(self, every: Tensor) -> list[Batch]:
        """The micro-batches that this rank's replica of the teacher runs, of tokens [D, n, B, S]."""
        total, each = self._shared(every.shape[1])
        first = self.teacher[self.rank].data * each
        return [{"tokens": every.flatten(0, 1)[min(first + n, total - 1)]} for n in range(each)]

    def moved(self, kept: Sequence[Tensor], source: int, target: int, batches: Sequence[Batch]) -> list[Tensor | None]:
        """As `SameLayout.moved`, from wherever the teacher's replica is; one exchange for each that a replica runs (collective over
        all ranks)."""
        size, length = batches[0]["tokens"].shape
        here, empty = self.student[self.rank], self.empty[:, None].expand(0, size, -1)
        found: list[Tensor | None] = [None for _ in batches]
        if here and here.pipeline == target:
            rows = len(schedule.positions(length, self.parallel, here))
            found = [empty.new_empty(rows, *empty.shape[1:]) for _ in batches]
        for n, (takes, sends) in enumerate(self._plan(length, len(batches), source, target)):
            taken, sent = ([0] * len(self.student) for _ in range(2))
            for splits, moves in ((taken, takes), (sent, sends)):
                for rank, _, where in moves:
                    splits[rank] = len(where)
            into = empty.new_empty(sum(taken), *empty.shape[1:])
            self.exchange(into, torch.cat([empty, *(kept[n][where] for *_, where in sends)]), taken, sent)
            for (_, number, where), part in zip(takes, into.split([len(where) for *_, where in takes]), strict=True):
                found[number][where] = part
        return found

    def _plan(self, length: int, count: int, source: int, target: int) -> list:
        """By exchange, (other rank, number of the micro-batch on the student's replica, own rows) of each message that this rank
        takes, and of each that it sends, in the order of the ranks."""
        key = (length, count, source, target)
        if key not in self.plans:
            rank, self.plans[key] = self.rank, []
            for n in range(self._shared(count)[1]):
                moves = list(self._moves(n, *key))
                takes = [(by, number, rows) for by, to, number, _, rows in moves if to == rank]
                sends = [(to, number, rows) for by, to, number, rows, _ in moves if by == rank]
                self.plans[key].append([sorted(part, key=lambda move: move[0]) for part in (takes, sends)])
        return self.plans[key]

    def _moves(
        self, n: int, length: int, count: int, source: int, target: int
    ) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
        """(from, to, number of the micro-batch, rows there, rows here) of the messages of exchange `n` that this rank has part in;
        between two ranks there is one at most."""
        (total, each), device = self._shared(count), self.empty.device
        for replica in range(self.sizes[1]):
            if (item := replica * each + n) >= total:
                continue
            data, number = divmod(item, count)
            holders = collections.defaultdict(list)  # by share of the sequence
            for rank, place in enumerate(self.teacher):
                if place and (place.pipeline, place.data) == (source, replica):
                    holders[place.context, place.tensor * self.other.sequence].append(rank)
            takers = [r for r, x in enumerate(self.student) if x and (x.pipeline, x.data) == (target, data)]
            for rank, ranks in itertools.product(takers, holders.values()):
                # Of several with the same states: itself, or one that fewer others ask.
                by = rank if rank in ranks else ranks[rank % len(ranks)]
                if self.rank in (by, rank):
                    held = schedule.positions(length, self.other, self.teacher[by])
                    wanted = schedule.positions(length, self.parallel, self.student[rank])
                    _, there, here = np.intersect1d(held, wanted, assume_unique=True, return_indices=True)
                    if len(here):
                        yield by, rank, number, torch.from_numpy(there).to(device), torch.from_numpy(here).to(device)
