"""Process groups of a run, collectives over them, and small helpers of multi-process code.

This is the only module that reads megatron-core's parallel state. A "stage" here is a pipeline stage.
"""

import contextlib
import dataclasses
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from minitron_mcore.config.performance import HangConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.config.stages import Run
from minitron_mcore.errors import Stopped, UserError, refuse
from minitron_mcore.parallel import hang_watchdog, layout, rendezvous
from minitron_mcore.parallel.hang_watchdog import HangWatchdog
from minitron_mcore.parallel.megatron_patches import cpu_backend, groups
from minitron_mcore.parallel.process_bridge import Bridge

from megatron.core import parallel_state as mpu  # isort: skip
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # isort: skip


def rank() -> int:
    """This process's rank in its world; before there is one, its RANK variable."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def log(message: str) -> None:
    """Print one line, on rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


def device() -> torch.device:
    """The device of this rank's tensors: its CUDA device, or the CPU without CUDA."""
    return torch.device("cpu") if cpu_backend.is_cpu() else torch.device("cuda", torch.cuda.current_device())


def device_name() -> str:
    """Name of this rank's CUDA device; without CUDA, the host's processor and the threads of a rank."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return cpu if cpu_backend.is_cpu() else torch.cuda.get_device_name()


def barrier() -> None:
    """Wait for all ranks (collective). NCCL would guess the device from the rank, so pass it."""
    dist.barrier(device_ids=None if cpu_backend.is_cpu() else [torch.cuda.current_device()])


def free_bytes() -> int:
    """Free memory of this rank's CUDA device; without CUDA, the host's free memory divided by its ranks."""
    return free_host_bytes() if cpu_backend.is_cpu() else torch.cuda.mem_get_info()[0]


def free_host_bytes() -> int:
    """The host's free memory divided by its ranks."""
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def from_rank_0[T](value: T) -> T:
    """Rank 0's value, on all ranks (collective if torch.distributed is initialised)."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks[T](value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The ranks' values, in the order of ranks (collective if torch.distributed is initialised).

    Args:
        group: None: all ranks.
    """
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A UserError that a rank raises inside the block is raised on all ranks at its end (collective)."""
    error = None
    try:
        yield
    except UserError as mistake:
        error = str(mistake)
    errors = from_all_ranks(error)
    first = next(((r, e) for r, e in enumerate(errors) if e is not None), None)
    if first:
        raise UserError(first[1] if len(set(errors)) == 1 else f"rank {first[0]}: {first[1]}")


def on_rank_0[T](work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the other ranks wait. All ranks return its result or raise its UserError (collective)."""
    if not dist.is_initialized():
        return work()
    # A separate group, because the work, such as tokenisation, can exceed the default group's timeout.
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    outcome: list[Any] = [None, None]  # result, message
    if rank() == 0:
        try:
            outcome[0] = work()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    result: T = outcome[0]
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return result


@contextlib.contextmanager
def distributed_context(
    parallel: ParallelConfig,
    seed: int = 1234,
    sequence_length: int | None = None,
    store: dist.Store | None = None,
    teacher_ranks: int = 0,
    teacher_parallel: ParallelConfig | None = None,
    hang: HangConfig | None = None,
    timeout_minutes: float | None = None,
) -> Iterator[None]:
    """Initialize torch.distributed and megatron-core's groups inside the block.

    The world is the launcher's (see `rendezvous`), or one process without a launcher. After an exception other than a Stopped that
    all ranks raise, the groups stay as they are, and the process must end (see `cli.main.entry`).

    With `teacher_ranks` there are two worlds, each with ranks from 0: the last `teacher_ranks` processes form the teacher's, and
    `bridge` connects both.

    Args:
        parallel: sizes of the model-parallel axes; data parallelism takes the remaining ranks.
        seed: of megatron-core's model-parallel random state.
        sequence_length: tokens of the sequences that the model will see, to check the layout; None: not checked.
        store: rendezvous store of a test; None: the environment's, or a file without torchrun.
        teacher_ranks: processes of the teacher's world; 0: none.
        teacher_parallel: the teacher's layout; None: `parallel`.
        hang: limits of the `HangWatchdog` that runs inside the block; None: the defaults.
        timeout_minutes: timeout of collectives; None: two minutes more than the longest of these limits.

    Raises:
        UserError: the layout does not fit the world or the sequences (`layout.problems`), a world has no process, or the
            environment is incomplete (`rendezvous.problems`); ranks are missing.
    """
    global _bridge, _timeout_minutes
    if store is None:
        rendezvous.read_launcher()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    refuse(_world_problems((parallel, teacher_parallel or parallel), processes, teacher_ranks, sequence_length))
    if not cpu_backend.is_cpu():
        # SLURM may show each task its own device only.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    hang = hang or HangConfig()
    _timeout_minutes = timeout_minutes or max(dataclasses.astuple(hang)) + 2
    stopped = None
    with hang_watchdog.stops_in_waits():
        watched = _join_world(store, processes, teacher_ranks)
        try:
            with HangWatchdog(hang, watched, int(os.environ.get("RANK", 0)), processes):
                _initialize(teacher_parallel or parallel if _bridge and _bridge.is_teacher else parallel)
                model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
                try:
                    yield
                except Stopped as signal:
                    stopped = signal
                    if not stopped.on_all_ranks:
                        raise
                barrier()
        finally:
            if _bridge and not _bridge.is_teacher:
                _bridge.send_request(None)
        # Not after an exception: NCCL's shutdown waits for collectives that other ranks may never make.
        _bridge = None
        _layouts.clear()
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
    if stopped:
        raise stopped


_timeout_minutes = 62.0  # of collectives


def _join_world(store: Any, processes: int, teacher_ranks: int) -> Any:
    """Initialize torch.distributed, and the bridge where there are teacher ranks; the store of all processes (collective).

    Raises:
        UserError: ranks are missing.
    """
    global _bridge
    rank, timeout = int(os.environ.get("RANK", 0)), datetime.timedelta(minutes=_timeout_minutes)
    world_rank, world_size, own_store = rank, processes - teacher_ranks, store
    try:
        if store is None and "RANK" not in os.environ:
            store = own_store = dist.FileStore(tempfile.mktemp(prefix="minitron-"), world_size)
        if teacher_ranks:
            store = store or next(dist.rendezvous("env://", timeout=timeout))[0]
            _bridge = Bridge(dist.PrefixStore("bridge", store), rank, world_size, processes, timeout)
            if _bridge.is_teacher:
                world_rank, world_size = rank - world_size, teacher_ranks
            own_store = dist.PrefixStore(f"world {_bridge.is_teacher}", store)
        # No device_id: with it NCCL would create a communicator for each of megatron-core's groups at once; most stay unused.
        backend = "gloo" if cpu_backend.is_cpu() else "nccl"
        dist.init_process_group(backend, store=own_store, rank=world_rank, world_size=world_size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"rank {rank} did not find the other {processes - 1} ranks at {where} within {_timeout_minutes:g} minutes "
            f"({str(error).splitlines()[0]}): start all of them, with an address that every node can reach."
        ) from None
    return store or groups.default_store()


def stage_context(
    config: Run,
    sequence_length: int | None = None,
    teacher_ranks: int = 0,
    teacher_parallel: ParallelConfig | None = None,
) -> contextlib.AbstractContextManager[None]:
    """`distributed_context` with the settings that all stages have."""
    return distributed_context(
        config.parallel,
        config.seed,
        sequence_length,
        teacher_ranks=teacher_ranks,
        teacher_parallel=teacher_parallel,
        hang=config.hang,
        timeout_minutes=config.performance.nccl_timeout_minutes,
    )


def _world_problems(
    layouts: tuple[ParallelConfig, ParallelConfig], processes: int, teacher_ranks: int, sequence_length: int | None
) -> Iterator[str]:
    """Why the layouts of student and teacher do not fit their worlds."""
    if wrong := layout.teacher_ranks_problems(teacher_ranks, processes):
        yield from wrong
        return
    yield from layout.problems(layouts[0], processes - teacher_ranks, sequence_length)
    if teacher_ranks:
        wrong = [*layout.problems(layouts[1], teacher_ranks, sequence_length)]
        yield from (f"distill.teacher_parallel: {problem}" for problem in wrong)


def _initialize(parallel: ParallelConfig) -> None:
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,  # an expert is whole on the ranks that hold it
        distributed_timeout_minutes=_timeout_minutes,
    )


@dataclass(frozen=True)
class Layout:
    """A second layout of the same ranks, for another model; `use_layout` makes it current."""

    parallel: ParallelConfig
    state: dict[str, Any]
    """megatron-core's global variables in this layout (`groups.snapshot`)."""

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Layout":
        """The layout with its groups, which are created once per world (collective).

        Raises:
            UserError: the layout does not fit the world (`layout.problems`).
        """
        key = dataclasses.astuple(parallel)
        if key not in _layouts:
            refuse(layout.problems(parallel, dist.get_world_size()))
            with groups.swapped(groups.UNINITIALIZED):
                _initialize(parallel)
                _layouts[key] = cls(parallel, groups.snapshot())
        return _layouts[key]


_layouts: dict[tuple[Any, ...], Layout] = {}  # of the current world


@contextlib.contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Make a layout current inside the block, for megatron-core and for this module's functions; None changes nothing."""
    with contextlib.nullcontext() if layout is None else groups.swapped(layout.state):
        yield


def place() -> layout.Place:
    """This rank's place in the current layout."""
    return layout.Place(*(group().rank() for group in (pp_group, dp_group, cp_group, tp_group)))


def places() -> list[layout.Place]:
    """Place of each rank in the current layout (collective over the world)."""
    return from_all_ranks(place())


_bridge: Bridge | None = None


def bridge() -> Bridge | None:
    """The connection between student and teacher worlds; None if there is one world."""
    return _bridge


def tp_group() -> dist.ProcessGroup:
    return mpu.get_tensor_model_parallel_group()


def pp_group() -> dist.ProcessGroup:
    return mpu.get_pipeline_model_parallel_group()


def cp_group() -> dist.ProcessGroup:
    return mpu.get_context_parallel_group()


def dp_group() -> dist.ProcessGroup:
    """Ranks with the same parameters and other samples; without context-parallel ranks."""
    return mpu.get_data_parallel_group()


def dp_cp_group() -> dist.ProcessGroup:
    """Ranks with the same parameters (except experts) and other tokens: data and context parallel."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


def ep_group() -> dist.ProcessGroup:
    return mpu.get_expert_model_parallel_group()


def expert_dp_group() -> dist.ProcessGroup:
    """Ranks of this stage with the same experts."""
    return mpu.get_expert_data_parallel_group()


def own_experts(experts: int) -> range:
    """Indices of the experts that this rank holds, of the `experts` of each block."""
    rank, share = ep_group().rank(), experts // ep_group().size()
    return range(rank * share, (rank + 1) * share)


def is_first_stage() -> bool:
    """Whether this rank holds the first pipeline stage."""
    return mpu.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Whether this rank holds the last pipeline stage."""
    return mpu.is_pipeline_last_stage()


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Broadcast `tensor` in place from the last pipeline stage to all stages (collective); returns it."""
    if pp_group().size() > 1:
        dist.broadcast(tensor, mpu.get_pipeline_model_parallel_last_rank(), group=pp_group())
    return tensor


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate the ranks' tensors [N, ...] of one shape along dimension 0: [ranks * N, ...] (collective)."""
    every = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(every, tensor.contiguous(), group=group)
    return every


class Progress:
    """Prints done / total, rate and remaining time on rank 0, at most once in `every` seconds; `unit` names what is counted. On all
    ranks an update is progress for the hang watchdog."""

    def __init__(self, name: str, total: float, unit: str, every: float = 5.0):
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.start = self.last = time.monotonic()

    def update(self, done: float, extra: str = "") -> None:
        hang_watchdog.beat()
        now = time.monotonic()
        if now - self.last < self.every and done < self.total:
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        remaining = datetime.timedelta(seconds=round((self.total - done) / max(rate, 1e-9)))
        log(f"{self.name}: {done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {remaining} left{extra}")
