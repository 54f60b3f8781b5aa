"""Distributed checkpoints written and read in pieces, with memory for a few pieces per rank whatever the model's size.

megatron-core's writer holds the whole state dict, and a copy of each tensor that is a view. Here each thread makes, hashes and
writes one piece after the other. Files hold a few pieces each, and megatron-core's manifest has a hash of each file, which a
reader verifies before its first read from the file. The format is megatron-core's: `dist_checkpointing.load` reads it.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.checkpoint import disk, run_folder, safe_metadata, sharded
from minitron_mcore.checkpoint.disk import FILE_ELEMENTS, PIECE_ELEMENTS, THREADS
from minitron_mcore.checkpoint.hf_assets import tensor_bytes
from minitron_mcore.errors import UserError
from minitron_mcore.models import parameter_table
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.megatron_patches import checkpoint as patches
from minitron_mcore.parallel.megatron_patches import cpu_backend

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.core import CheckpointingException  # isort: skip
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # isort: skip
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # isort: skip
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (  # isort: skip
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME  # isort: skip
from torch.distributed.checkpoint import (  # isort: skip
    CheckpointException,
    FileSystemWriter,
    save as save_pieces,
)
from torch.serialization import set_crc32_options  # isort: skip

type Slice = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset in a global tensor, shape)"""


def shard_slices(parameter: parameter_table.Parameter, tp_rank: int = 0, tp_size: int = 1) -> Iterator[Slice]:
    """Slices of the global tensor that a tensor-parallel rank holds, split by rows into at most PIECE_ELEMENTS each.

    Splits are at multiples of one number of rows in every layout, so that readers of another layout read whole pieces.
    """
    spans = [[(0, length)] for length in parameter.shape]
    dim = parameter.row.tp_dim
    if dim is not None:
        spans[dim] = parameter_table.tp_slices(parameter.row.axes[dim], parameter.arch, tp_rank, tp_size)
    step = max(1, PIECE_ELEMENTS // math.prod(parameter.shape[1:]))
    for (start, end), *rest in itertools.product(*spans):
        edges = [start, *range((start // step + 1) * step, end, step), end]
        for low, high in itertools.pairwise(edges):
            if low < high:
                yield (low, *(x for x, _ in rest)), (high - low, *(y - x for x, y in rest))


@dataclass(frozen=True)
class Piece:
    """A slice of a parameter at `offset` in the global tensor; `make` returns its values when it is written."""

    parameter: parameter_table.Parameter
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def save(
    out_dir: str | Path, pieces: Iterable[Piece], replica: Callable[[parameter_table.Parameter], tuple], name: str
) -> None:
    """Write this rank's pieces as step 0 of a checkpoint (collective).

    Args:
        replica: replica id of this rank's pieces of a parameter; only a rank whose id is all zeros calls `make`.
        name: label of the progress.

    Raises:
        UserError: raised by `make` on any rank; on all ranks.
    """
    state, make, parts = {}, {}, {}
    for piece in (piece for piece in pieces if math.prod(piece.shape)):
        make[piece.parameter.name, piece.offset] = piece.make
        placeholder = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
        parts.setdefault(piece.parameter, []).append((piece.offset, placeholder))
    for parameter, placeholders in parts.items():
        state |= sharded.sharded_tensors(parameter, placeholders, replica(parameter))
    with unwrap_user_errors():
        _save(out_dir, 0, state, StreamingStrategy(make, name))


def save_state(out_dir: str | Path, step: int, state: dict, name: str) -> None:
    """Write a sharded state dict as a step of a checkpoint (collective). Its tensors must not change until this returns."""
    _save_live(out_dir, step, state, StreamingStrategy({}, name))


def _save_live(out_dir: str | Path, step: int, state: dict, strategy: "StreamingStrategy") -> None:
    if not cpu_backend.is_cpu():
        torch.cuda.synchronize()  # the writing threads copy to the host on their own default stream
    _save(out_dir, step, dict_list_map_outplace(_split_into_pieces, state), strategy)


def _save(out_dir: str | Path, step: int, state: dict, strategy: "StreamingStrategy") -> None:
    """Write a sharded state dict as `step_N` and set `latest` to it (collective). Older steps are then removed.

    Of replicated data each data-parallel rank writes an equal share. In the background, `_publish` is left to the caller.
    """
    part = _part_folder(out_dir, step)
    if process_groups.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    process_groups.barrier()
    shared = FullyParallelSaveStrategyWrapper(strategy, process_groups.dp_cp_group())
    if strategy.background:
        strategy.request = dist_checkpointing.save(
            state, str(part), shared, async_sharded_save=True, async_strategy="mcore"
        )
    else:
        dist_checkpointing.save(state, str(part), shared, async_strategy="mcore")
        _publish(part, strategy)


def _part_folder(out_dir: str | Path, step: int) -> Path:
    """Folder of a step until it is complete."""
    return Path(out_dir) / f"step_{step:07d}.part"


def _publish(part: Path, strategy: "StreamingStrategy") -> None:
    """Make a written step the newest one (collective)."""
    strategy.write_manifest(part)
    process_groups.barrier()
    if process_groups.rank() == 0:
        shutil.rmtree(part.with_suffix(""), ignore_errors=True)
        os.replace(part, part.with_suffix(""))
        run_folder.replace_text(part.parent / "latest", part.stem)
        for step in part.parent.glob("step_*"):
            if step.name != part.stem:
                shutil.rmtree(step)
    process_groups.barrier()


class BackgroundSave:
    """Like `save_state`, but writing runs in a thread. The constructor returns when this rank's share is in host memory.

    The previous step stays the newest one until `finish`. The thread makes no collective and no CUDA calls.
    """

    def __init__(self, out_dir: str | Path, step: int, state: dict, name: str):
        """Collective."""
        self.part, self.strategy = _part_folder(out_dir, step), StreamingStrategy({}, name, background=True)
        _save_live(out_dir, step, state, self.strategy)

    def is_written(self) -> bool:
        """Whether writing has ended on all ranks, with or without an error (collective)."""
        done = torch.tensor(self.strategy.writing.done(), dtype=torch.int32, device=process_groups.device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())

    def finish(self) -> None:
        """Wait until all ranks have written, then make the step the newest one (collective).

        Raises:
            CheckpointException: writing failed on a rank; on all ranks. The newest step stays the previous one.
        """
        for finalize in self.strategy.request.finalize_fns:
            finalize()
        _publish(self.part, self.strategy)


def _split_into_pieces(value):
    """A ShardedTensor split by rows as in `shard_slices`. Other values, small tensors and regular grids are unchanged."""
    if not isinstance(value, ShardedTensor) or value.has_regular_grid or value.data.numel() <= PIECE_ELEMENTS:
        return value
    first, rows = value.global_offset[0], len(value.data)
    step = max(1, PIECE_ELEMENTS // math.prod(value.data.shape[1:]))
    starts = [first, *range((first // step + 1) * step, first + rows, step)]
    parts = value.data.split([b - a for a, b in itertools.pairwise([*starts, first + rows])])
    return {
        f"{start}": replace(
            value, data=part, local_shape=tuple(part.shape), global_offset=(start, *value.global_offset[1:])
        )
        for start, part in zip(starts, parts, strict=True)
    }


@contextmanager
def unwrap_user_errors() -> Iterator[None]:
    """Raise the first UserError in a CheckpointException of torch instead of the exception itself."""
    try:
        yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise


class StreamingStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's save strategy with a writer that calls `make` just before it writes a piece.

    Args:
        make: (key, offset) -> function that returns the values of a placeholder on the meta device. Other tensors are written
            as they are.
        name: label of the progress.
        background: copy this rank's share to host memory and write it in a thread.
    """

    def __init__(self, make: dict[tuple, Callable[[], Tensor]], name: str, background: bool = False):
        super().__init__()
        self.make, self.name, self.background, self.hashes = make, name, background, {}
        self.request: AsyncRequest | None = None
        """In the background: the work that remains after `writing`."""
        self.writing: Future | None = None

    def save(self, sharded_state_dict: dict, checkpoint_dir: Path) -> None:
        state, writer, planner = self._prepare(sharded_state_dict, checkpoint_dir)
        save_pieces(state, storage_writer=writer, planner=planner)

    def async_save(self, sharded_state_dict: dict, checkpoint_dir: Path, async_strategy: str) -> AsyncRequest:
        state, writer, planner = self._prepare(sharded_state_dict, checkpoint_dir)
        planned, *_ = save_state_dict_async_plan(state, writer, planner=planner)
        return AsyncRequest(None, (), [partial(save_state_dict_async_finalize, *planned)])

    def _prepare(self, sharded_state_dict: dict, checkpoint_dir: Path) -> tuple:
        state, *_ = patches.group_by_key(sharded_state_dict, keep_only_main_replica=True)
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        return mcore_to_pyt_state_dict(state), _Writer(checkpoint_dir, self), planner

    def write_manifest(self, folder: Path) -> None:
        """Write the manifest of file hashes (collective). Files of pieces were hashed while they were written."""
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.hashes)
        if process_groups.rank() == 0:
            files = {name: digest for part in every for name, digest in part.items()}
            files |= {path.name: disk.sha256(path) for path in folder.iterdir() if path.name not in files}
            manifest = {"algorithm": "sha256", "files": files}
            run_folder.replace_text(folder / INTEGRITY_FNAME, json.dumps(manifest, indent=1))


class _Writer(FileSystemWriter):
    """Writes files of a few pieces each in THREADS threads."""

    def __init__(self, path: str, strategy: StreamingStrategy):
        super().__init__(path)
        self.strategy = strategy

    def write_data(self, plan, planner) -> torch.futures.Future:
        future = torch.futures.Future()
        future.set_result(self._write_all(plan, planner.resolve_data))
        return future

    def prepare_write_data(self, plan, planner) -> None:
        """Copy this rank's share and start writing. megatron-core calls this before training continues."""
        copies = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            copies[item.index] = data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data
        pool = ThreadPoolExecutor(1)
        self.strategy.writing = pool.submit(self._write_all, plan, lambda item: copies.pop(item.index))
        pool.shutdown(wait=False)

    def retrieve_write_results(self) -> list | tuple:
        """Result of `_write_all`, or its exception in torch's wrapper, as megatron-core expects."""
        try:
            return self.strategy.writing.result()
        except Exception as error:
            return patches.wrap_exception(error)

    def _write_all(self, plan, resolve: Callable) -> list:
        files, elements = [[]], 0
        for item in plan.items:
            size = math.prod(item.tensor_data.chunk.sizes) if item.tensor_data else 0
            if elements and elements + size > FILE_ELEMENTS:
                files.append([])
                elements = 0
            files[-1].append(item)
            elements += size
        progress, results = process_groups.Progress(self.strategy.name, len(files), "files"), []
        with ThreadPoolExecutor(THREADS) as pool:
            names = (f"{plan.storage_data.prefix}{n}.distcp" for n in range(len(files)))
            for done, written in enumerate(pool.map(partial(self._write, resolve), names, files), 1):
                results += written
                progress.update(done)
        return results

    def _write(self, resolve: Callable, name: str, items: list) -> list:
        # The manifest has a hash of the file, so the archive needs no checksums. The option is per thread.
        set_crc32_options(False)
        with disk.NewFile(self.path / name) as file:
            stream = _HashingFile(file)
            written = [self._write_item(resolve(item), name, item, stream) for item in items]
        self.strategy.hashes[name] = stream.sha.hexdigest()
        return written

    def _write_item(self, data, name: str, item, stream: "_HashingFile"):
        if isinstance(data, Tensor):
            make = self.strategy.make.get((item.index.fqn, tuple(item.index.offset)))
            data = (make() if make else data.detach()).cpu()
            # A tensor that owns its storage: torch.save writes the whole storage of a view.
            data = torch.from_numpy(tensor_bytes(data)).view(data.dtype).view(data.shape)
        return patches.write_item(self.transforms, stream, data, item, name, self.serialization_format)


class _HashingFile:
    """A file whose written bytes are hashed."""

    def __init__(self, file: disk.NewFile):
        self.file, self.sha = file, hashlib.sha256()
        self.tell, self.flush = file.tell, file.flush

    def write(self, data) -> int:
        self.sha.update(data)
        return self.file.write(data)


class Reader(safe_metadata.Reader):
    """Reads slices of a checkpoint's parameters, written in any layout. Safe for several threads.

    The hash of a file is compared with the manifest before the first read from it. Reads then come from the page cache.

    Raises:
        UserError: a tensor is missing, or a file is missing, truncated or changed.
    """

    def __init__(self, source: "run_folder.Checkpoint"):
        with safe_metadata.damage_as_user_error(source.step_dir):
            self.hashes = safe_metadata.manifest(source.step_dir)
            self.locks = {name: threading.Lock() for name in self.hashes}
            self.verified, self.folder = set(), source.step_dir
            self.verify(".metadata")
            super().__init__(source.step_dir)

    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype:
        with safe_metadata.damage_as_user_error(self.folder):
            return self.tensors[parameter.name].properties.dtype

    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        with safe_metadata.damage_as_user_error(self.folder):
            return self.read_slice(parameter.name, offset, shape)

    def verify(self, name: str) -> None:
        if name not in self.locks:
            raise CheckpointingException(f"{INTEGRITY_FNAME} does not list {name}")
        with self.locks[name]:
            if name in self.verified:
                return
            if disk.sha256(self.folder / name) != self.hashes[name]:
                raise CheckpointingException(f"{name} is not what was written")
            self.verified.add(name)
