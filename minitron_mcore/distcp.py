"""Distributed checkpoints from untrusted sources: no pickle in them runs code.

Three kinds of pickle stand in one: the index `.metadata`, byte items (megatron-core's common state is one) and tensor items. The
index is read by an unpickler that makes only that format's own types, items by torch's weights-only loader. torch's default load
planner and megatron-core's loader unpickle the index and byte items without restriction, so both read through `Files`.
"""

import collections
import enum
import io
import json
import math
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

from minitron_mcore import disk, host
from minitron_mcore.errors import UserError

host.prepare()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import serialization  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as mcore  # noqa: E402
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME  # noqa: E402
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME  # noqa: E402

MAX_INDEX_BYTES = 1 << 28
"""Of `.metadata`; an 8 B model with its optimizer state needs some 5 MiB."""
_ADMITTED = {
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
_ADMITTED["pathlib._local", "PosixPath"] = pathlib.PosixPath  # Python 3.13's name of it


_UNUSED = (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET)
_SCALARS = (str, int, float, bytes, type(None), torch.dtype, torch.layout, enum.Enum)


def _flat(value: object) -> bool:
    """A scalar, or a tuple of such."""
    return isinstance(value, _SCALARS) or (isinstance(value, tuple) and all(isinstance(x, _SCALARS) for x in value))


class _Unpickler(pickle._Unpickler):
    """The pure Python unpickler: unlike the C one it allocates nothing for a memo index or a length that a pickle only claims.

    What is hashed while it reads is flat: of tuples or objects that share their parts, n of them take 2^n steps to hash.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _UNUSED}

    def find_class(self, module: str, name: str):
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise UserError(
            f"asks for {module}.{name}, which has no place in a checkpoint's index: don't trust this checkpoint"
        )

    def load_build(self) -> None:
        """Set the state of an object, but not of a class, a function or an enum's member, which live on in this process."""
        target = self.stack[-2]
        if type(target) not in _ADMITTED.values() or isinstance(target, enum.Enum):
            name = getattr(target, "__name__", type(target).__name__)
            raise UserError(f"changes {name}, which is not its own: don't trust this checkpoint")
        super().load_build()

    def load_call(self) -> None:
        if not isinstance(self.stack[-1], tuple) or not all(map(_flat, self.stack[-1])):
            raise ValueError("nested arguments")
        pickle._Unpickler.load_reduce(self)

    def load_new(self) -> None:
        if not isinstance(self.stack[-1], tuple) or not all(map(_flat, self.stack[-1])):
            raise ValueError("nested arguments")
        pickle._Unpickler.load_newobj(self)

    def load_item(self) -> None:
        _check_key(self.stack[-2])
        pickle._Unpickler.load_setitem(self)

    def load_items(self) -> None:
        for key in self.stack[::2]:  # those since the mark
            _check_key(key)
        pickle._Unpickler.load_setitems(self)

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_call,
        pickle.NEWOBJ[0]: load_new,
        pickle.SETITEM[0]: load_item,
        pickle.SETITEMS[0]: load_items,
    }


def _check_key(key: object) -> None:
    parts = [getattr(key, name, None) for name in vars(key)] if isinstance(key, metadata.MetadataIndex) else [key]
    if not all(map(_flat, parts)):
        raise ValueError(f"a {type(key).__name__} of nested parts as a key")


def read_metadata(folder: Path) -> metadata.Metadata:
    """The index of a distributed checkpoint; nothing in it is run.

    Raises:
        UserError: no index, a damaged one, one that holds anything but an index, points outside its folder or beyond a file's end.
    """
    path = Path(folder) / ".metadata"
    if not path.is_file():
        raise UserError(f"{folder} is no distributed checkpoint: it has no file .metadata.")
    if (size := path.stat().st_size) > MAX_INDEX_BYTES:
        raise UserError(f"{path} has {size:,} bytes, at most {MAX_INDEX_BYTES:,} are read: is it another file?")
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        reason = _problem(found, path.parent)
    except UserError as error:
        raise UserError(f"{path} {error}.") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f".metadata: {type(error).__name__} {error}"
    if reason:
        raise UserError(f"the checkpoint {folder} is damaged or incomplete ({reason}): copy it again.")
    return found


def _problem(index: metadata.Metadata, folder: Path) -> str:
    """What is wrong with an index, or nothing: it has tensors, and its files are in the folder and as long as it says."""
    if not isinstance(index, metadata.Metadata):
        return f"a {type(index).__name__} in place of an index"
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata) and not _well_formed(entry):
            return f"sizes or dtype of {key} are damaged"
    sizes = {}
    for info in index.storage_data.values():
        name, end = info.relative_path, info.offset + info.length
        if name not in sizes:
            if Path(name).name != name or not (folder / name).is_file():
                return f"no {name} in it"
            sizes[name] = (folder / name).stat().st_size
        if not 0 <= info.offset <= end <= sizes[name]:
            return f"{name} has {sizes[name]} bytes, but .metadata asks for bytes {info.offset} to {end} of it"
    return "" if index.state_dict_metadata else "no tensors in it"


def _well_formed(entry: metadata.TensorStorageMetadata) -> bool:
    """Sizes are whole numbers, as many in each chunk as in the tensor."""
    spans = [entry.size, *(span for chunk in entry.chunks for span in (chunk.offsets, chunk.sizes))]
    whole = all(isinstance(span, tuple | list) and all(type(n) is int and n >= 0 for n in span) for span in spans)
    alike = whole and len({len(span) for span in spans}) == 1
    return alike and isinstance(entry.properties.dtype, torch.dtype)


class Files(FileSystemReader):
    """torch's reader of a distributed checkpoint's files, whose pickles make tensors and plain values only.

    Raises:
        UserError: see `read_metadata`.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.index = read_metadata(folder)

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        """Once, above: torch would unpickle it here, or another file of a rank's own."""
        return self.index

    def check_whole(self, key: str) -> None:
        """Refuse a tensor with holes, which would keep what its memory held before.

        Raises:
            UserError: its parts overlap, reach beyond it or don't fill it; there is no such tensor.
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
            CheckpointingException: an item that cannot be read, by its file.
        """
        by_file = collections.defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        hand_on = planner.load_bytes  # unpickles anything: it gets what is known to be harmless
        planner.load_bytes = lambda item, data: hand_on(item, _plain(data))
        try:
            for name, items in by_file.items():
                self._read_file(name, items, planner)
        finally:
            del planner.load_bytes  # a cycle of references, which would hold the tensors
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
        view = _Item(file, info.offset, info.length)
        with zipfile.ZipFile(view) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > info.length:  # torch allocates what the archive claims
            raise ValueError(f"an item of {info.length} bytes claims to hold {unpacked}")
        view.seek(0)
        return view


class _Item(disk.Seekable):
    """Bytes offset..offset + length of a file, as a file. (zipfile seeks from the end, which torch's own view gets wrong.)"""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        super().__init__(length)
        self.file, self.offset = file, offset

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])
        self.at += count
        return count


def _plain(data: IO[bytes]) -> io.BytesIO:
    """A byte item, written anew from what torch's weights-only loader makes of it.

    Raises:
        UnpicklingError: it holds anything but tensors and plain values.
    """
    clean = io.BytesIO()
    torch.save(torch.load(data, map_location="cpu", weights_only=True), clean)
    clean.seek(0)
    return clean


def _legacy_common(folder: str) -> dict:
    try:
        return torch.load(Path(folder) / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointingException(f"{COMMON_STATE_FNAME}: {_reason(error)}") from error


def load(state: dict, files: Files) -> dict:
    """`dist_checkpointing.load` through `files` (collective), which megatron-core has no argument for.

    Raises:
        UserError: see `Files.check_whole`.
        CheckpointingException, CheckpointException and others: see `undamaged`.
    """
    for key in {value.key for value in nested_values(state) if isinstance(value, ShardedTensor)}:
        files.check_whole(key)
    ours = {
        (serialization, "_get_filesystem_reader"): lambda *args, **kwargs: files,
        (mcore, "_get_filesystem_reader"): lambda *args, **kwargs: files,
        (serialization, "load_common"): _legacy_common,
    }
    theirs = {(module, name): getattr(module, name) for module, name in ours}
    try:
        for (module, name), function in ours.items():
            setattr(module, name, function)
        return dist_checkpointing.load(state, str(files.path))
    finally:
        for (module, name), function in theirs.items():
            setattr(module, name, function)


def manifest(step_dir: Path) -> dict[str, str]:
    """File name -> sha256, as the writer noted them in integrity.json.

    Raises:
        CheckpointingException: none, or a damaged one.
    """
    try:
        files = json.loads((step_dir / INTEGRITY_FNAME).read_text())["files"]
        if outside := [name for name in files if Path(name).name != name]:
            raise ValueError(f"it lists {outside[0]}, which is no name of a file here")
        if not all(isinstance(digest, str) for digest in files.values()):
            raise ValueError("not all of its hashes are text")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointingException(f"{INTEGRITY_FNAME}: {_reason(error)}") from error
    return files


@contextmanager
def undamaged(step_dir: Path) -> Iterator[None]:
    """Turn what readers of a checkpoint raise into one sentence.

    Raises:
        UserError: instead of any of it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged item or metadata.json makes its readers raise nearly anything
        if isinstance(error, CheckpointException):  # says no more than which ranks failed
            error, _ = next(iter(error.failures.values()))
        raise UserError(
            f"the checkpoint {step_dir} is damaged or incomplete ({_reason(error)}): make it again."
        ) from error


def _reason(error: BaseException) -> str:
    """A reader's error in one line."""
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        asked = next((part for part in str(error).split() if part.startswith("GLOBAL")), "")
        return f"it holds a pickle that asks for more than tensors and plain values {asked}".strip()
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return text if isinstance(error, CheckpointingException) else f"{type(error).__name__} {text}"


class Reader:
    """Reads boxes of a distributed checkpoint's tensors, from several threads too; the index is read once, safely.

    Raises:
        UserError: see `read_metadata`.
    """

    def __init__(self, folder: Path):
        self.folder, self.files = Path(folder), Files(folder)
        self.index = self.files.index
        self.files.set_up_storage_reader(self.index, is_coordinator=True)
        entries = self.index.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, metadata.TensorStorageMetadata)}

    def box(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The part of a tensor that starts at `offset`; of each file, only the shards that it lies in are read.

        Raises:
            UserError: no such tensor, one with holes, a shard that is cut short.
        """
        self.files.check_whole(key)
        entry = self.tensors[key]
        part = torch.empty(shape, dtype=entry.properties.dtype)
        wanted = ShardedTensor(key, part, part.dtype, shape, tuple(entry.size), offset, None)
        plans = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with undamaged(self.folder):
            plans.set_up_planner({key: CheckpointableShardedTensor.from_sh_ten(wanted)}, self.index, True)
            plan = plans.create_local_plan()
            for name in {self.files.storage_data[item.storage_index].relative_path for item in plan.items}:
                self.verify(name)
            self.files.read_data(plan, plans).wait()
        return part

    def verify(self, name: str) -> None:
        """Called before a file is read; raises where it is not what was written and that is known."""
