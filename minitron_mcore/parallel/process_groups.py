"""Where a run lives: process groups, seed, one-sentence errors, clean ends. The only reader of megatron-core's parallel state."""

import collections
import contextlib
import dataclasses
import datetime
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.parallel import cpu_backend, layout, rendezvous
from minitron_mcore.parallel.process_bridge import Bridge

cpu_backend.prepare()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def log(message: str) -> None:
    """Print one line, on rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


def device() -> torch.device:
    """Where this rank's tensors live: its CUDA device, or the CPU where there is none."""
    return torch.device("cpu") if cpu_backend.is_cpu() else torch.device("cuda", torch.cuda.current_device())


def barrier() -> None:
    """Wait for all ranks (collective); NCCL is told the device, which it would guess from the rank's number."""
    dist.barrier(**({} if cpu_backend.is_cpu() else {"device_ids": [torch.cuda.current_device()]}))


def free_bytes() -> int:
    """Of this rank's CUDA device; of a host's memory this rank's share."""
    if cpu_backend.is_cpu():
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Ranks pass this block together or fail together: a UserError on any becomes the same UserError on all (collective)."""
    error = None
    try:
        yield
    except UserError as mistake:
        error = str(mistake)
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    first = next(((r, e) for r, e in enumerate(errors) if e is not None), None)
    if first:
        raise UserError(first[1] if len(set(errors)) == 1 else f"rank {first[0]}: {first[1]}")


@contextlib.contextmanager
def distributed_context(
    parallel: ParallelConfig,
    seed: int = 1234,
    sequence_length: int | None = None,
    store: dist.Store | None = None,
    hang_minutes: float = 60.0,
    teacher_ranks: int = 0,
    teacher_parallel: ParallelConfig | None = None,
    timeout_minutes: float | None = None,
) -> Iterator[None]:
    """Join the world that torchrun describes (or a world of one) and build megatron-core's groups in it.

    An exception leaves the groups as they are: the process must end after it (see `launching.entry`).

    With `apart` there are two worlds, each with its own ranks from 0: the last so many processes make the second, and `bridge`
    joins both.

    Args:
        parallel: sizes of the model-parallel axes; data parallelism takes the rest of the world.
        seed: megatron-core's model-parallel random state starts from it.
        sequence_length: tokens of the sequences that will go through a model, where the caller knows.
        store: rendezvous for tests; otherwise the environment's, or a file's without torchrun.
        patience: minutes that a rank may work while others wait for it, of training steps and saves the longer (see `watch`);
            two more, and a collective that still waits fails by itself.
        apart: processes of the second world; 0 makes none.
        other: their layout; None is `parallel`.
        timeout_minutes: after which a collective that still waits fails, instead of the two more.

    Raises:
        UserError: a layout that doesn't fit the world or the sequences (see `layout.problems`), no process left for one world; an
            environment that describes no world (see `rendezvous.problems`).
    """
    global _bridge
    if store is None:
        rendezvous.check()
    processes, this_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    world_size = processes - teacher_ranks
    refuse(
        layout.teacher_ranks_problems(teacher_ranks, processes)
        or layout.problems(parallel, world_size, sequence_length)
    )
    if not cpu_backend.is_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if store is None and "RANK" not in os.environ:
        store = dist.FileStore(tempfile.mktemp(prefix="minitron-"), world_size)
    timeout = datetime.timedelta(minutes=timeout_minutes or hang_minutes + 2)
    if teacher_ranks:
        refuse(
            f"distill.teacher_parallel: {x}"
            for x in layout.problems(teacher_parallel or parallel, teacher_ranks, sequence_length)
        )
        store = store or next(dist.rendezvous("env://"))[0]
        _bridge = Bridge(dist.PrefixStore("bridge", store), this_rank, world_size, processes, timeout)
        if _bridge.is_teacher:
            parallel, this_rank, world_size = teacher_parallel or parallel, this_rank - world_size, teacher_ranks
        store = dist.PrefixStore(f"beyond {_bridge.is_teacher}", store)
    # Without device_id: with it NCCL makes a communicator for each of megatron-core's groups at once, most of which stay unused.
    dist.init_process_group(
        "gloo" if cpu_backend.is_cpu() else "nccl", store=store, rank=this_rank, world_size=world_size, timeout=timeout
    )
    try:
        _initialize(parallel, timeout_minutes or hang_minutes + 2)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
        barrier()
    finally:
        if _bridge and not _bridge.is_teacher:
            _bridge.send_request(None)
    # Not after an exception: NCCL's shutdown waits for collectives that the other ranks may never make.
    _bridge = None
    _layouts.clear()
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def _initialize(parallel: ParallelConfig, minutes: float = 62.0) -> None:
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,  # an expert is whole on the ranks that hold it
        distributed_timeout_minutes=minutes,
    )


@dataclass(frozen=True)
class Layout:
    """Another layout of the same ranks, for a second model beside that of `distributed_context`; `use_layout` puts it in force."""

    parallel: ParallelConfig
    state: dict[str, Any]
    """megatron-core's global variables in it."""

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Layout":
        """Make its groups, where this world doesn't have them yet (collective).

        Raises:
            UserError: a layout that doesn't fit the world (see `layout.problems`).
        """
        key = dataclasses.astuple(parallel)
        if key not in _layouts:
            refuse(layout.problems(parallel, dist.get_world_size()))
            with _swapped(_BARE):
                _initialize(parallel)
                _layouts[key] = cls(parallel, _state())
        return _layouts[key]


_layouts: dict[tuple, Layout] = {}
"""Of this world."""


@contextlib.contextmanager
def use_layout(teacher_parallel: Layout | None) -> Iterator[None]:
    """Everything inside the block happens in that layout; None is the one in force. What was in force is so again at the end.

    megatron-core takes groups as arguments in many places, but its schedules, its experts and what reads its checkpoints ask its
    global variables, and so does this file, for all others. To change these in one place is less than to hand groups to all.
    """
    with contextlib.nullcontext() if teacher_parallel is None else _swapped(teacher_parallel.state):
        yield


@contextlib.contextmanager
def _swapped(state: dict[str, Any]) -> Iterator[None]:
    before = _state()
    try:
        vars(mpu).update(state)
        yield
    finally:
        vars(mpu).update(before)


def _state() -> dict[str, Any]:
    return {name: value for name, value in vars(mpu).items() if name.startswith("_") and name.isupper()}


_BARE = _state()
"""They are so before there are groups."""


def place() -> layout.Place:
    """This rank's, in the layout in force."""
    return layout.Place(*(group().rank() for group in (pp_group, dp_group, cp_group, tp_group)))


def places() -> list[layout.Place]:
    """Of each rank of the world, in the layout in force (collective)."""
    every = [place()] * dist.get_world_size()
    dist.all_gather_object(every, place())
    return every


_bridge: Bridge | None = None


def bridge() -> Bridge | None:
    """To the other world, where there is one."""
    return _bridge


def tp_group() -> dist.ProcessGroup:
    return mpu.get_tensor_model_parallel_group()


def pp_group() -> dist.ProcessGroup:
    return mpu.get_pipeline_model_parallel_group()


def cp_group() -> dist.ProcessGroup:
    return mpu.get_context_parallel_group()


def dp_group() -> dist.ProcessGroup:
    """The ranks that see other samples; context-parallel ranks, which see other tokens of the same ones, are not among them."""
    return mpu.get_data_parallel_group()


def dp_cp_group() -> dist.ProcessGroup:
    """The ranks that hold the same parameters, experts aside, and see other tokens."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


def ep_group() -> dist.ProcessGroup:
    return mpu.get_expert_model_parallel_group()


def expert_dp_group() -> dist.ProcessGroup:
    """The ranks of this stage that hold the same experts."""
    return mpu.get_expert_data_parallel_group()


def own_experts(experts: int) -> range:
    """Those of a block's experts that this rank holds."""
    rank, share = ep_group().rank(), experts // ep_group().size()
    return range(rank * share, (rank + 1) * share)


def is_first_stage() -> bool:
    """The first stage is on this rank, maybe among others."""
    return mpu.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """The last stage is on this rank, maybe among others."""
    return mpu.is_pipeline_last_stage()


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Broadcast `tensor` in place from the last pipeline stage to all stages; returns it."""
    if pp_group().size() > 1:
        dist.broadcast(tensor, mpu.get_pipeline_model_parallel_last_rank(), group=pp_group())
    return tensor


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The group's tensors [N, ...] of one shape, joined in rank order along the first dimension: [ranks * N, ...] (collective)."""
    every = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(every, tensor.contiguous(), group=group)
    return every


def prefetch[T](jobs: Iterable[Callable[[], T]], threads: int = 4) -> Iterator[T]:
    """The jobs' results in their order, while threads do those that follow; at most `threads` + 1 results exist.

    There are more threads than cores, since they wait for the disk as often as they work.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Progress:
    """A line on rank 0 every few seconds: done / total, rate, time left. `unit` names what is counted."""

    def __init__(self, name: str, total: int, unit: str, every: float = 5.0):
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.start = self.last = time.monotonic()

    def update(self, done: int, extra: str = "") -> None:
        now = time.monotonic()
        if now - self.last < self.every and done < self.total:
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        left = datetime.timedelta(seconds=round((self.total - done) / max(rate, 1e-9)))
        log(f"{self.name}: {done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left} left{extra}")
