"""Safe reading of distributed checkpoints from untrusted sources: no pickle in them can run code.

A checkpoint contains three kinds of pickle: the index `.metadata`, byte items (such as megatron-core's common state) and tensor
items. The index is read by an unpickler that creates only the index's own types, items by torch's weights-only loader. torch's
default load planner and megatron-core's loader unpickle the index and byte items without restriction, so both use `Files`.
"""

import collections
import enum
import io
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    filesystem,
    metadata,
    planner,
)

from minitron_mcore import reading
from minitron_mcore.errors import UserError
from minitron_mcore.parallel.megatron_patches.checkpoint import reading_through

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.core import CheckpointingException  # isort: skip
from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.strategies import torch as mcore  # isort: skip
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME  # isort: skip
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME  # isort: skip

MAX_INDEX_BYTES = 1 << 28
"""Size limit of `.metadata`. An 8 B model with its optimizer state needs about 5 MiB."""
_ALLOWED = {
    (module.__name__, name): getattr(module, name)
    for module, names in {
        metadata: "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata BytesStorageMetadata "
        "ChunkStorageMetadata _MEM_FORMAT_ENCODING",
        planner: "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
        filesystem: "_StorageInfo _StoragePrefix",
        mcore: "MCoreMetadata MCoreSavePlan",
        torch.serialization: "_get_layout",
        torch: "Size",
        pathlib: "PosixPath",
        collections: "OrderedDict",
    }.items()
    for name in names.split()
}
_ALLOWED["pathlib._local", "PosixPath"] = pathlib.PosixPath  # its module in Python 3.13


_UNUSED = (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8)
"""Not in an index. BYTEARRAY8 allocates the length that it claims."""
_SCALARS = (str, int, float, bytes, type(None), torch.dtype, torch.layout, enum.Enum)


def _is_flat(value: object) -> bool:
    """Whether a value is a scalar or a tuple of scalars."""
    return isinstance(value, _SCALARS) or (isinstance(value, tuple) and all(isinstance(x, _SCALARS) for x in value))


class _Unpickler(pickle._Unpickler):
    """Unpickler for the types in `_ALLOWED`.

    Based on the pure Python unpickler: the C one allocates memory for whatever memo index or length a pickle claims.

    Dictionary keys and arguments of calls must be flat. A tuple that contains another one twice, n levels deep, takes 2^n steps to
    hash, although its pickle is short.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _UNUSED}

    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise UserError(f"asks for {module}.{name}, which no checkpoint index contains: don't trust this checkpoint")

    def load_build(self) -> None:
        """Set the state of an object. Classes, functions and enum members are refused, because they are shared in this process."""
        target = self.stack[-2]
        if type(target) not in _ALLOWED.values() or isinstance(target, enum.Enum):
            name = getattr(target, "__name__", type(target).__name__)
            raise UserError(f"changes {name}, which is not part of the index: don't trust this checkpoint")
        super().load_build()

    def load_reduce(self) -> None:
        _check_arguments(self.stack[-1])
        super().load_reduce()

    def load_newobj(self) -> None:
        _check_arguments(self.stack[-1])
        super().load_newobj()

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:  # keys and values since the last mark
            _check_key(key)
        super().load_setitems()

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _check_arguments(arguments: object) -> None:
    if not isinstance(arguments, tuple) or not all(map(_is_flat, arguments)):
        raise ValueError("nested arguments")


def _check_key(key: object) -> None:
    parts = [getattr(key, name, None) for name in vars(key)] if isinstance(key, metadata.MetadataIndex) else [key]
    if not all(map(_is_flat, parts)):
        raise ValueError(f"nested values in a key of type {type(key).__name__}")


def read_metadata(folder: Path) -> metadata.Metadata:
    """Read the index of a distributed checkpoint without running code from it.

    Raises:
        UserError: the index is missing, damaged, contains other types, or refers to files outside the folder or to bytes beyond a
            file's end.
    """
    path = Path(folder) / ".metadata"
    if not path.is_file():
        raise UserError(f"{folder} is no distributed checkpoint: it has no file .metadata.")
    if (size := path.stat().st_size) > MAX_INDEX_BYTES:
        raise UserError(f"{path} has {size:,} bytes, at most {MAX_INDEX_BYTES:,} are read: is it another file?")
    try:
        index = _Unpickler(io.BytesIO(path.read_bytes())).load()
        reason = _problem(index, path.parent)
    except UserError as error:
        raise UserError(f"{path} {error}.") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f".metadata: {type(error).__name__} {error}"
    if reason:
        raise UserError(f"the checkpoint {folder} is damaged or incomplete ({reason}): copy it again.")
    return index


def _problem(index: metadata.Metadata, folder: Path) -> str:
    """Why an index does not fit the files in its folder, or "" if it does."""
    if not isinstance(index, metadata.Metadata):
        return f"{type(index).__name__} instead of an index"
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata) and not _well_formed(entry):
            return f"sizes or dtype of {key} are damaged"
    sizes = {}
    for info in index.storage_data.values():
        if (type(info.relative_path), type(info.offset), type(info.length)) != (str, int, int):  # others may never end
            return "places of other types in .metadata"
        name, end = info.relative_path, info.offset + info.length
        if name not in sizes:
            if Path(name).name != name or not (folder / name).is_file():
                return f"no {name} in it"
            sizes[name] = (folder / name).stat().st_size
        if not 0 <= info.offset <= end <= sizes[name]:
            return f"{name} has {sizes[name]} bytes, but .metadata asks for bytes {info.offset} to {end} of it"
    return "" if index.state_dict_metadata else "no tensors in it"


def _well_formed(entry: metadata.TensorStorageMetadata) -> bool:
    """Whether sizes and offsets are whole numbers, and each chunk has as many dimensions as the tensor."""
    spans = [entry.size, *(span for chunk in entry.chunks for span in (chunk.offsets, chunk.sizes))]
    whole = all(isinstance(span, tuple | list) and all(type(n) is int and n >= 0 for n in span) for span in spans)
    alike = whole and len({len(span) for span in spans}) == 1
    return alike and isinstance(entry.properties.dtype, torch.dtype)


class Files(FileSystemReader):
    """torch's reader of a distributed checkpoint, restricted to pickles of tensors and plain values.

    Raises:
        UserError: see `read_metadata`.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.index = read_metadata(folder)

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        """The index read by the constructor. torch's version would unpickle it, or a rank's own index, without restriction."""
        return self.index

    def check_complete(self, key: str) -> None:
        """Check that the stored parts of a tensor cover it exactly. Elements in a gap would be loaded as uninitialised memory.

        Raises:
            UserError: the tensor is missing, or its parts overlap, exceed it or leave a gap.
        """
        entry = self.index.state_dict_metadata.get(key)
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise UserError(f"{self.path} has no tensor {key}: make the checkpoint again.")
        spans = [zip(chunk.offsets, chunk.sizes, entry.size, strict=True) for chunk in entry.chunks]
        inside = all(0 <= low <= low + count <= size for span in spans for low, count, size in span)
        once = len({tuple(chunk.offsets) for chunk in entry.chunks}) == len(entry.chunks)
        if not inside or not once or sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise UserError(
                f"{key} in {self.path} has holes: the run that wrote it did not finish, or a file is missing."
            )

    def read_data(self, plan: LoadPlan, planner) -> torch.futures.Future:
        """
        Raises:
            CheckpointingException: an item cannot be read; names its file.
        """
        by_file = collections.defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        load_bytes = planner.load_bytes  # unpickles without restriction, so its input is sanitised
        planner.load_bytes = lambda item, data: load_bytes(item, _sanitised(data))
        try:
            for name, items in by_file.items():
                self._read_file(name, items, planner)
        finally:
            del planner.load_bytes  # breaks a reference cycle that would keep the tensors
        done = torch.futures.Future()
        done.set_result(None)
        return done

    def _read_file(self, name: str, items: list, planner) -> None:
        try:
            super().read_data(LoadPlan(items), planner)
        except Exception as error:  # a damaged item can raise nearly anything
            raise CheckpointingException(f"{name}: {_reason(error)}") from error

    def _slice_file(self, file: IO[bytes], info: filesystem._StorageInfo) -> IO[bytes]:
        if info.transform_descriptors:
            raise ValueError(f"an item is stored as {info.transform_descriptors}, but only plain items are read")
        view = _FileSlice(file, info.offset, info.length)
        with zipfile.ZipFile(view) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > info.length:  # torch would allocate the claimed size
            raise ValueError(f"an item of {info.length} bytes claims to hold {unpacked}")
        view.seek(0)
        return view


class _FileSlice(io.RawIOBase):
    """Bytes offset .. offset + length of a file as a read-only file. (torch's own view seeks wrongly from the end.)"""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence])
        return self.position

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.position)])
        self.position += count
        return count


def _sanitised(data: IO[bytes]) -> io.BytesIO:
    """A byte item, loaded by torch's weights-only loader and saved again.

    Raises:
        UnpicklingError: the item contains anything but tensors and plain values.
    """
    clean = io.BytesIO()
    torch.save(torch.load(data, map_location="cpu", weights_only=True), clean)
    clean.seek(0)
    return clean


def _load_legacy_common(folder: str) -> dict:
    try:
        return torch.load(Path(folder) / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointingException(f"{COMMON_STATE_FNAME}: {_reason(error)}") from error


def load(state: dict, files: Files) -> dict:
    """`dist_checkpointing.load` with `files` as the reader, which megatron-core has no argument for (collective).

    Raises:
        UserError: see `Files.check_complete`.
        CheckpointingException, CheckpointException and others: those that `damage_as_user_error` catches.
    """
    for key in {value.key for value in nested_values(state) if isinstance(value, ShardedTensor)}:
        files.check_complete(key)
    with reading_through(files, _load_legacy_common):
        return dist_checkpointing.load(state, str(files.path))


def manifest(step_dir: Path) -> dict[str, str]:
    """File name -> sha256 from integrity.json.

    Raises:
        CheckpointingException: the file is missing or damaged.
    """
    try:
        files = json.loads((step_dir / INTEGRITY_FNAME).read_text())["files"]
        if outside := [name for name in files if Path(name).name != name]:
            raise ValueError(f"it lists {outside[0]}, which is not a file name")
        if not all(isinstance(digest, str) for digest in files.values()):
            raise ValueError("not all of its hashes are text")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointingException(f"{INTEGRITY_FNAME}: {_reason(error)}") from error
    return files


@contextmanager
def damage_as_user_error(step_dir: Path) -> Iterator[None]:
    """`reading.damage_as_user_error` for the readers of a checkpoint."""
    with reading.damage_as_user_error(f"the checkpoint {step_dir}", "make it again", _reason):
        try:
            yield
        except CheckpointException as error:  # its message lists ranks only
            first, _ = next(iter(error.failures.values()))
            raise first from error


def _reason(error: BaseException) -> str:
    """An error of a reader in one line."""
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        name = next((part for part in str(error).split() if part.startswith("GLOBAL")), "")
        return f"it holds a pickle that asks for more than tensors and plain values {name}".strip()
    text = reading.first_line(error)[:300]
    return text if isinstance(error, CheckpointingException) else f"{type(error).__name__} {text}"


class Reader:
    """Reads slices of a distributed checkpoint's tensors. Safe for several threads.

    Raises:
        UserError: see `read_metadata`.
    """

    def __init__(self, folder: Path):
        self.folder, self.files = Path(folder), Files(folder)
        self.index = self.files.index
        self.files.set_up_storage_reader(self.index, is_coordinator=True)
        entries = self.index.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, metadata.TensorStorageMetadata)}

    def read_slice(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Read the slice of a tensor at `offset`. Only the stored shards that overlap it are read.

        Raises:
            UserError: the tensor is missing or incomplete, or a file is damaged.
        """
        self.files.check_complete(key)
        entry = self.tensors[key]
        part = torch.empty(shape, dtype=entry.properties.dtype)
        request = ShardedTensor(key, part, part.dtype, shape, tuple(entry.size), offset, None)
        load_planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with damage_as_user_error(self.folder):
            load_planner.set_up_planner({key: CheckpointableShardedTensor.from_sh_ten(request)}, self.index, True)
            plan = load_planner.create_local_plan()
            for name in {self.files.storage_data[item.storage_index].relative_path for item in plan.items}:
                self.verify(name)
            self.files.read_data(plan, load_planner).wait()
        return part

    def verify(self, name: str) -> None:
        """Called before a file is read. Subclasses raise CheckpointingException if the file has changed."""
