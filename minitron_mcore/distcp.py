"""Distributed checkpoints that anyone may have written, read tensor by tensor.

Their index, `.metadata`, is a pickle, and a pickle can run anything. It is opened here by an unpickler that makes nothing but
that format's own types; the shards beside it are opened by torch's weights-only loader.
"""

import collections
import math
import pathlib
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, metadata, planner

from minitron_mcore import host
from minitron_mcore.errors import UserError

host.prepare()

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as mcore  # noqa: E402
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor  # noqa: E402

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise UserError(
            f"asks for {module}.{name}, which has no place in a checkpoint's index: don't trust this checkpoint"
        )


def read_metadata(folder: Path) -> metadata.Metadata:
    """The index of a distributed checkpoint; nothing in it is run.

    Raises:
        UserError: no index, a damaged one, one that holds anything but an index or points outside its folder.
    """
    path = Path(folder) / ".metadata"
    if not path.is_file():
        raise UserError(f"{folder} is no distributed checkpoint: it has no file .metadata.")
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        keys, names = found.state_dict_metadata.keys(), {info.relative_path for info in found.storage_data.values()}
        missing = sorted(name for name in names if Path(name).name != name or not (path.parent / name).is_file())
    except UserError as error:
        raise UserError(f"{path} {error}.") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f".metadata: {type(error).__name__} {error}"
        raise UserError(f"the checkpoint {folder} is damaged or incomplete ({reason}): copy it again.") from error
    if missing or not keys:
        reason = f"no {missing[0]} in it" if missing else "no tensors in it"
        raise UserError(f"the checkpoint {folder} is damaged or incomplete ({reason}): copy it again.")
    return found


class Reader:
    """Reads boxes of a distributed checkpoint's tensors, from several threads too; the index is read once, safely.

    Raises:
        UserError: see `read_metadata`.
    """

    def __init__(self, folder: Path):
        self.folder, self.index = Path(folder), read_metadata(folder)
        self.files = FileSystemReader(folder)
        self.files.set_up_storage_reader(self.index, is_coordinator=True)
        entries = self.index.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, metadata.TensorStorageMetadata)}

    def box(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The part of a tensor that starts at `offset`; of each file, only the shards that it lies in are read.

        Raises:
            UserError: no such tensor, one with holes, a shard that is cut short.
        """
        if key not in self.tensors:
            raise UserError(f"{self.folder} has no tensor {key}: make the checkpoint again.")
        entry = self.tensors[key]
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size):
            raise UserError(
                f"{key} in {self.folder} has holes: the run that wrote it did not finish, or a file is missing."
            )
        part = torch.empty(shape, dtype=entry.properties.dtype)
        wanted = ShardedTensor(key, part, part.dtype, shape, tuple(entry.size), offset, None)
        plans = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            plans.set_up_planner({key: CheckpointableShardedTensor.from_sh_ten(wanted)}, self.index, True)
            plan = plans.create_local_plan()
            for name in {self.files.storage_data[item.storage_index].relative_path for item in plan.items}:
                self.verify(name)
            self.files.read_data(plan, plans).wait()
        except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:300]
            raise UserError(f"{key} in {self.folder} cannot be read ({reason}).") from error
        return part

    def verify(self, name: str) -> None:
        """Called before a file is read; raises where it is not what was written and that is known."""
