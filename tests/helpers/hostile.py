"""Files that try to run code when they are read: each generator puts an attack, which would create a flag file, in one place."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from minitron_mcore.checkpoint import disk

COMMON = "common_state/shard_0_1"


class Attack:
    """A pickle that creates the file `flag` when it is loaded."""

    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def saved(value, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


PAYLOADS = {
    "torch.save": lambda attack: saved([{"step": 1, "x": attack}]),
    "old torch.save": lambda attack: saved([attack], _use_new_zipfile_serialization=False),
    "pickle": lambda attack: pickle.dumps(attack),
}
"""What an item of a checkpoint can be stored as."""


def set_class(flag: Path) -> bytes:
    """A pickle that replaces a method of a class that indices are made of, and is no index otherwise."""
    cls = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    return b"\x80\x02" + cls + b"N}U\x08__init__" + cls + b"s\x86b."


_SHARED = b")" + b"2\x86" * 60  # a tuple of itself twice, 60 times: 2^60 steps to hash or to print
_METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
LONG_TO_HASH = {
    "key": b"\x80\x04}" + _SHARED + b"K\x01s.",
    "keys": b"\x80\x04}(K\x00K\x00" + _SHARED + b"K\x01u.",
    "old dict": b"\x80\x04(" + _SHARED + b"K\x01d.",
    "set": b"\x80\x04\x8f(" + _SHARED + b"\x90.",
    "frozen set": b"\x80\x04(" + _SHARED + b"\x91.",
    "enum": b"\x80\x04ctorch.distributed.checkpoint.planner\nWriteItemType\n" + _SHARED + b"\x85R.",
    "new enum": b"\x80\x04ctorch.distributed.checkpoint.planner\nWriteItemType\n" + _SHARED + b"\x85\x81.",
    "dict": b"\x80\x04ccollections\nOrderedDict\n(" + _SHARED + b"K\x01\x86t\x85R.",
    "object as key": b"\x80\x04}" + _METADATA + b")\x81}(U\x03fqn" + _SHARED + b"U\x06offsetNubK\x01s.",
    "changed": b"\x80\x04" + _SHARED + b"}b.",
}
"""Pickles of some hundred bytes that take longer than anyone waits."""


def edit_index(step: Path, change) -> None:
    index = pickle.loads((step / ".metadata").read_bytes())
    change(index)
    (step / ".metadata").write_bytes(pickle.dumps(index))


def put_item(step: Path, key: str, payload: bytes, kind=None) -> None:
    """Store `payload` as each of the items of `key`, which becomes a byte item or stays what it is."""
    (step / "__9_0.distcp").write_bytes(payload)

    def change(index):
        infos = [info for at, info in index.storage_data.items() if at.fqn == key]
        if not infos:
            _, template = next(iter(index.storage_data.items()))
            index.storage_data[MetadataIndex(key)] = info = pickle.loads(pickle.dumps(template))
            infos = [info]
        for info in infos:
            info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(payload)
        if kind:
            index.state_dict_metadata[key] = kind

    edit_index(step, change)


def reseal(step: Path) -> None:
    """Rewrite the manifest, as whoever changed a file can."""
    files = {path.name: disk.sha256(path) for path in step.iterdir() if path.name != "integrity.json"}
    (step / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))


def byte_items(step: Path) -> list[str]:
    index = pickle.loads((step / ".metadata").read_bytes())
    return [key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]


def in_items(step: Path, attack: Attack, payload) -> None:
    for key in byte_items(step):
        put_item(step, key, payload(attack))


def in_tensor(key: str, as_bytes: bool):
    def put(step: Path, attack: Attack) -> None:
        put_item(step, key, PAYLOADS["torch.save"](attack), BytesStorageMetadata() if as_bytes else None)

    return put


def own_index(step: Path, attack: Attack) -> None:
    """torch reads the index of a rank where there is none of all."""
    (step / ".metadata").unlink()
    (step / "__0.metadata").write_bytes(pickle.dumps(attack))


def places(key: str) -> dict:
    """Place in a distributed checkpoint -> what puts an attack there; `key` names one of its tensors."""
    return {
        "index": lambda step, attack: (step / ".metadata").write_bytes(pickle.dumps(attack)),
        "within the index": lambda step, attack: edit_index(step, lambda i: setattr(i, "planner_data", attack)),
        "index, a class changed": lambda step, attack: (step / ".metadata").write_bytes(set_class(attack.flag)),
        "index of a rank": own_index,
        "common.pt": lambda step, attack: (step / "common.pt").write_bytes(saved({"x": attack})),
        "common.pt, old": lambda step, attack: (step / "common.pt").write_bytes(pickle.dumps(attack)),
        **{f"byte items, {n}": lambda s, a, p=payload: in_items(s, a, p) for n, payload in PAYLOADS.items()},
        "tensor item": in_tensor(key, as_bytes=False),
        "tensor as byte item": in_tensor(key, as_bytes=True),
    }


def bomb(count: int) -> bytes:
    """An item of a few kilobytes that claims a tensor of `count` zeros, by compression."""
    plain, packed = io.BytesIO(saved(torch.zeros(count))), io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    return packed.getvalue()


def gguf(fields: int = 1, tensors: int = 0, value: bytes = b"") -> bytes:
    """The header of a GGUF file with one field, and any counts."""
    key = b"general.architecture"
    return struct.pack("<4sIQQQ", b"GGUF", 3, tensors, fields, len(key)) + key + value


GGUF_CLAIMS = {
    "array": gguf(value=struct.pack("<IIQ", 9, 4, 1 << 34)),
    "strings": gguf(value=struct.pack("<IIQ", 9, 8, 1 << 20)),
    "nested": gguf(value=struct.pack("<IIQ", 9, 9, 1 << 20)),
    "text": gguf(value=struct.pack("<IQ", 8, 1 << 40)),
    "fields": gguf(fields=1 << 60),
    "tensors": gguf(tensors=1 << 60, value=struct.pack("<IQ", 8, 5) + b"llama"),
    "nothing": b"GGUF",
}

TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch FLAG') }}"
YAML = {
    "apply": "!!python/object/apply:os.system ['touch FLAG']",
    "new": "a: !!python/object/new:os.system ['touch FLAG']",
    "target": "_target_: os.system\n_args_: ['touch FLAG']",
    "interpolation": "a: ${oc.env:HOME}",
    "cut": "a: [1, 2",
}
REMOTE = "import os\nos.system('touch FLAG')\n"
