"""Random damage to files: to their bytes, or to values of their format. Deterministic for a random generator."""

import contextlib
import copy
import dataclasses
import gzip
import json
import pickle
import random
import re
import struct
from pathlib import Path

from tests.helpers import readers

NUMBERS = [0, 1, -1, 2**31, 2**63, 10**9, 0.5, -1e-3, 1e308, float("nan"), float("inf")]
VALUES = [*NUMBERS, None, True, "", "x" * 10**5, "../../x", "\ud800", "1.0", [], {}, [[1, [2]]], {"a": {}}, "@deep"]
SHARED = ()
for _ in range(40):
    SHARED = (SHARED, SHARED)  # small to store, long to hash
DEEP = "[" * 10**5


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """Damage to bytes, whatever the format; half of it to the first 256, which hold headers."""
    size = len(data)
    at = rng.randrange(min(size, 256) if rng.random() < 0.5 else size) if size else 0
    span = rng.choice([1, 2, 4, 8, 64, size // 4])
    value = rng.choice([n for n in NUMBERS if isinstance(n, int)])
    width, packed = rng.choice([("<B", 1), ("<H", 2), ("<I", 4), ("<Q", 8), (">Q", 8)]), b""
    packed = struct.pack(width[0], value % (1 << 8 * width[1]))
    return rng.choice([
        lambda: data[:at] + bytes(b ^ 1 << rng.randrange(8) for b in data[at : at + rng.choice([1, 1, 1, 8])]) + data[at + 1 :],
        lambda: data[:at] + packed + data[at + len(packed) :],
        lambda: data[:at] + packed + data[at + len(packed) :],
        lambda: data[:at],
        lambda: data + rng.choice([b"\0", b"{}", data, rng.randbytes(span)]),
        lambda: b"",
        lambda: data[:at] + data[at + span :],
        lambda: data[:at] + data[at : at + span] * rng.choice([2, 9]) + data[at + span :],
        lambda: data[at : at + span] + data[:at] + data[at + span :],
        lambda: data[:at] + bytes(span) + data[at + span :],
    ])()  # fmt: skip


def text_of(rng: random.Random, data: bytes) -> bytes:
    """Replace a number or a word of a text file, also by what is special in YAML or JSON."""
    matches = list(re.finditer(rb"-?\d[\d.e+-]*" if rng.random() < 0.5 else rb"[\w.]+", data)) or [re.match(b"", data)]
    spot, new = (
        rng.choice(matches),
        rng.choice([*map(str, NUMBERS), "9" * 5000, "null", "[", "{", "\x00", "&a [*a, *a]", DEEP, "é"]),
    )
    return data[: spot.start()] + new.encode() + data[spot.end() :]


def tree_of(rng: random.Random, node, values: list = VALUES):
    """Copy nested dicts, lists, tuples and dataclasses, with one node replaced, dropped or doubled."""
    inner = list(node.items() if isinstance(node, dict) else vars(node).items() if dataclasses.is_dataclass(node) else
                 enumerate(node) if type(node) in (list, tuple) else [])  # fmt: skip
    if not inner or rng.random() < 0.1:
        return rng.choice(values)
    key, value = rng.choice(inner)
    how = rng.random()
    changed = value if how < 0.2 else tree_of(rng, value, values)
    if isinstance(node, list | tuple):
        items = [*node[:key], *([] if how < 0.1 else [value, value] if how < 0.2 else [changed]), *node[key + 1 :]]
        return items if isinstance(node, list) else tuple(items)
    if isinstance(node, dict):
        kept = {k: changed if k == key else v for k, v in node.items() if how > 0.1 or k != key}
        return kept | {rng.choice(["x", "0", "-1", "a/b"]): value} if 0.1 < how < 0.2 else kept
    copied = copy.copy(node)
    object.__setattr__(copied, key, changed)
    return copied


def json_of(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) if "\n{" in text.strip() else [text]
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(tree_of(rng, json.loads(lines[at]))).replace('"@deep"', DEEP + "]" * len(DEEP)) + "\n"
    if rng.random() < 0.1 and (keys := re.findall(r'"(\w+)":', text)):
        lines[at] = lines[at].replace("{", f'{{"{rng.choice(keys)}": 1, ', 1)
    return "".join(lines)


def of(rng: random.Random, name: str, data: bytes) -> bytes:
    """Damage values of the file's format in two cases of three, else bytes."""
    with contextlib.suppress(Exception):  # damaged before, in any way, so that it cannot be parsed
        if name.endswith(".gz") and rng.random() < 0.7:
            return gzip.compress(of(rng, name[:-3], gzip.decompress(data)))
        if name.endswith(".metadata") and rng.random() < 0.7:
            return pickle.dumps(tree_of(rng, pickle.loads(data), [*VALUES, SHARED]))
        if name.endswith(".safetensors") and rng.random() < 0.6:
            size = struct.unpack_from("<Q", data)[0]
            head = json_of(rng, data[8 : 8 + size].decode()).encode()
            return struct.pack("<Q", len(head)) + head + data[8 + size :]
        if ".json" in name and rng.random() < 0.7:
            return json_of(rng, data.decode()).encode()
        if name.endswith((".json", ".jsonl", ".yaml", ".txt", "latest")) and rng.random() < 0.6:
            return text_of(rng, data)
    return bytes_of(rng, data)


def spoil(kind: readers.Kind, folder: Path, rng: random.Random) -> None:
    """Damage one of the files of a kind, one to three times."""
    files = {path for pattern in kind.files.split() for path in folder.glob(pattern) if path.is_file()}
    path = rng.choice(sorted(files))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path.write_bytes(of(rng, path.name, path.read_bytes()))
    if kind.sealed and rng.random() < 0.9:
        readers.reseal(folder)
