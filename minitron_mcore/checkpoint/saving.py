"""Writes sharded state dicts as megatron-core's distributed checkpoints, in pieces.

megatron-core's writer holds the whole state dict, and a copy of each tensor that is a view. Here each thread makes, hashes and
writes one piece after the other, so that a rank holds a few pieces whatever the model's size. Files hold a few pieces each. The
manifest has the hash and size of each file, from the process that wrote it. The format is megatron-core's:
`dist_checkpointing.load` reads it.
"""

import errno
import hashlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.checkpoint import disk, steps
from minitron_mcore.checkpoint.hf_assets import tensor_bytes
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.megatron_patches import checkpoint as patches
from minitron_mcore.parallel.megatron_patches import cpu_backend

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # isort: skip
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # isort: skip
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # isort: skip
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan  # isort: skip
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter  # isort: skip
from torch.serialization import set_crc32_options  # isort: skip

type Make = dict[tuple[str, tuple[int, ...]], Callable[[], Tensor]]
"""(key, offset) -> function that returns the values of a placeholder on the meta device, called just before they are written."""

type Files = dict[str, tuple[str, int]]
"""Name of a file -> its sha256 and size."""
type Written = tuple[list[Any], Files]
"""Results of the items that a rank wrote, and its files."""


class Save:
    """A sharded state dict that is written to a folder; `finish` completes it.

    Of replicated data each data-parallel rank writes an equal share. The constructor writes all files but the last ones: those
    whose tensors take at most `copy_bytes` on this rank are copied to host memory, and a thread writes them. The thread makes no
    collective and no CUDA calls. Tensors may change when the constructor returns.
    """

    def __init__(
        self,
        folder: Path,
        state: dict[str, Any],
        name: str,
        make: Make | None = None,
        copy_bytes: int = 0,
        read_back: bool = False,
    ):
        """Collective.

        Args:
            folder: of this checkpoint; replaced if it exists.
            make: for placeholders in `state`. Other tensors are written as they are.
            name: label of the progress.
            copy_bytes: host memory for copies on this rank.
            read_back: read each file from the disk again and compare its hash. It takes a sixth of the time of writing.

        Raises:
            UserError: the folder cannot be made.
        """
        self.folder, self.start = folder, time.monotonic()
        self.size = 0
        """Bytes of all files, on rank 0 after `finish`."""
        with process_groups.raise_on_all_ranks(), _disk_errors(folder):
            if process_groups.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        if not cpu_backend.is_cpu():
            torch.cuda.synchronize()  # the writing threads copy to the host on their own default stream
        self._strategy = _Strategy(make or {}, name, copy_bytes, read_back)
        shared = FullyParallelSaveStrategyWrapper(self._strategy, process_groups.dp_cp_group())
        dist_checkpointing.save(state, str(folder), shared, async_sharded_save=True, async_strategy="mcore")

    def is_written(self) -> bool:
        """Whether writing has ended on all ranks, with or without an error (collective)."""
        done = torch.tensor(self._strategy.writer.is_done(), dtype=torch.int32, device=process_groups.device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())

    def finish(self) -> None:
        """Wait until all ranks have written, then write the index and the manifest (collective).

        Raises:
            UserError: a rank could not write, or `make` raised it on a rank; on all ranks.
        """
        with process_groups.raise_on_all_ranks(), _disk_errors(self.folder):
            written = self._strategy.writer.wait()
        every: list[Any] | None = [None] * dist.get_world_size() if process_groups.rank() == 0 else None
        dist.gather_object(written, every)
        with process_groups.raise_on_all_ranks(), _disk_errors(self.folder):
            if every:
                self._complete(every)

    def _complete(self, every: list[Written]) -> None:
        """Write index and manifest from all ranks' (results of items, files), on rank 0.

        megatron-core's own last steps leave the other ranks waiting if rank 0 cannot write.
        """
        strategy = self._strategy
        files: Files = {}
        strategy.writer.finish(strategy.index, [results for results, _ in every])
        save_config(CheckpointingConfig(strategy.backend, strategy.version), str(self.folder))
        for _, written in every:
            files |= written
        for path in self.folder.iterdir():
            if path.name not in files:
                disk.sync(path)
                files[path.name] = disk.sha256(path), path.stat().st_size
        hashes, sizes = ({name: files[name][n] for name in sorted(files)} for n in (0, 1))
        manifest = {"algorithm": "sha256", "files": hashes, "sizes": sizes}
        disk.write_json(self.folder / steps.MANIFEST, manifest)
        self.size = sum(size for _, size in files.values())


class StepSave(Save):
    """A step of a run folder that is written; `finish` publishes it. Until then the previous step stays the newest one."""

    def __init__(self, out_dir: str | Path, step: int, state: dict[str, Any], name: str, **options: Any):
        """Collective. `options` are those of `Save`."""
        self.step = steps.Step(step, steps.part_folder(out_dir, step).with_suffix(""))
        if process_groups.rank() == 0:
            steps.remove_leftovers(out_dir)  # they may be what fills the disk
        pieces = dict_list_map_outplace(_split_into_pieces, state)
        super().__init__(steps.part_folder(out_dir, step), pieces, name, **options)

    def _complete(self, every: list[Written]) -> None:
        super()._complete(every)
        steps.publish(self.folder)


def save_state(out_dir: str | Path, step: int, state: dict[str, Any], name: str) -> None:
    """Write a sharded state dict as a step of a run folder and publish it (collective).

    Raises:
        UserError: see `Save.finish`.
    """
    StepSave(out_dir, step, state, name).finish()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raise an OSError of the block as a UserError. It may be the context of another error, such as torch.save's."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if isinstance(error, UserError) or not cause:
            raise
        raise UserError(
            f"{folder} cannot be written ({cause}): earlier steps are unchanged; mend the disk, or free space on it, and run the "
            "same command again."
        ) from error


def _split_into_pieces(value: Any) -> Any:
    """A ShardedTensor split by rows as in `streaming.shard_slices`. Other values, small tensors and regular grids are unchanged."""
    if not isinstance(value, ShardedTensor) or value.has_regular_grid or value.data.numel() <= disk.PIECE_ELEMENTS:
        return value
    first, rows = value.global_offset[0], len(value.data)
    step = max(1, disk.PIECE_ELEMENTS // math.prod(value.data.shape[1:]))
    starts = [first, *range((first // step + 1) * step, first + rows, step)]
    parts = value.data.split([b - a for a, b in itertools.pairwise([*starts, first + rows])])
    return {
        f"{start}": replace(
            value, data=part, local_shape=tuple(part.shape), global_offset=(start, *value.global_offset[1:])
        )
        for start, part in zip(starts, parts, strict=True)
    }


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's save strategy with `writer`, which it creates; `index` is the checkpoint's index (rank 0)."""

    def __init__(self, make: Make, name: str, copy_bytes: int, read_back: bool):
        super().__init__()
        self.make, self.name, self.copy_bytes, self.read_back = make, name, copy_bytes, read_back

    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path, async_strategy: str
    ) -> AsyncRequest:
        state, *_ = patches.group_by_key(sharded_state_dict, keep_only_main_replica=True)
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.writer = _Writer(checkpoint_dir, self)
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(state), self.writer, planner=planner)
        _, self.index, _ = planned
        return AsyncRequest(None, (), [])  # `Save.finish` does the rest


class _Writer(FileSystemWriter):
    """Writes files of a few pieces each in THREADS threads."""

    def __init__(self, path: str | Path, strategy: _Strategy):
        super().__init__(path)
        self.folder, self.strategy = Path(path), strategy
        self._results: list[Any] = []
        self._files: Files = {}
        self._error: Exception | None = None
        self._thread: Future[list[Any]] | None = None

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Write this rank's items, or copy them and begin to; megatron-core calls this before training continues.

        Errors are raised by `wait`, since the other ranks continue.
        """
        names = (f"{plan.storage_data.prefix}{n}.distcp" for n in itertools.count())
        files = list(zip(names, _by_file(plan.items), strict=False))
        first, copied = len(files), 0
        while first and copied + (size := sum(map(_item_bytes, files[first - 1][1]))) <= self.strategy.copy_bytes:
            first, copied = first - 1, copied + size
        try:
            progress = process_groups.Progress(self.strategy.name, first, "files")
            self._results = self._write_all(files[:first], planner.resolve_data, progress.update)
            copies = {item.index: _copied(planner.resolve_data(item)) for _, items in files[first:] for item in items}
        except Exception as error:
            self._error = error
            return
        if copies:
            pool = ThreadPoolExecutor(1)
            # Without progress, which would count as the main thread's (see `hang_watchdog.beat`).
            self._thread = pool.submit(self._write_all, files[first:], lambda item: copies.pop(item.index), int)
            pool.shutdown(wait=False)

    def is_done(self) -> bool:
        return self._thread is None or self._thread.done()

    def wait(self) -> Written:
        """What this rank wrote; or the error of writing it."""
        if self._error:
            raise self._error
        return self._results + (self._thread.result() if self._thread else []), self._files

    def _write_all(
        self, files: list[tuple[str, list[Any]]], resolve: Callable[[Any], Any], update: Callable[[int], object]
    ) -> list[Any]:
        """Results of the files' items; `update` is called with the number of written files."""
        results: list[Any] = []
        with ThreadPoolExecutor(disk.THREADS) as pool:
            for done, written in enumerate(pool.map(partial(self._write, resolve), files), 1):
                results += written
                update(done)
        return results

    def _write(self, resolve: Callable[[Any], Any], file: tuple[str, list[Any]]) -> list[Any]:
        # The manifest has a hash of the file, so the archive needs no checksums. The option is per thread.
        set_crc32_options(False)
        name, items = file
        with disk.NewFile(self.folder / name) as new:
            stream = _HashingFile(new)
            written = [self._write_item(resolve(item), name, item, stream) for item in items]
            size = new.tell()
        self._files[name] = stream.sha.hexdigest(), size
        if self.strategy.read_back and disk.sha256(self.folder / name, from_disk=True) != stream.sha.hexdigest():
            raise OSError(errno.EIO, f"{name} is not what was written")
        return written

    def _write_item(self, data: Any, name: str, item: Any, stream: Any) -> Any:
        if isinstance(data, Tensor):
            make = self.strategy.make.get((item.index.fqn, tuple(item.index.offset)))
            data = (make() if make else data.detach()).cpu()
            # A tensor that owns its storage: torch.save writes the whole storage of a view.
            data = torch.from_numpy(tensor_bytes(data)).view(data.dtype).view(data.shape)
        return patches.write_item(self.transforms, stream, data, item, name, self.serialization_format)


def _by_file(items: list[Any]) -> list[list[Any]]:
    """A plan's items as the contents of files of at most FILE_ELEMENTS."""
    files: list[list[Any]] = [[]]
    elements = 0
    for item in items:
        size = math.prod(item.tensor_data.chunk.sizes) if item.tensor_data else 0
        if elements and elements + size > disk.FILE_ELEMENTS:
            files.append([])
            elements = 0
        files[-1].append(item)
        elements += size
    return files


def _copied(data: Any) -> Any:
    return data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data


def _item_bytes(item: Any) -> int:
    tensor = item.tensor_data
    return math.prod(tensor.chunk.sizes) * tensor.properties.dtype.itemsize if tensor else 0


class _HashingFile:
    """A file whose written bytes are hashed."""

    def __init__(self, file: disk.NewFile):
        self.file, self.sha = file, hashlib.sha256()
        self.tell, self.flush = file.tell, file.flush

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        return self.file.write(data)
