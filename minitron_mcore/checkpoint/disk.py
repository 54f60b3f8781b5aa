"""Large files: how a checkpoint's tensors are split into files, new files that reach the disk, and hashes."""

import hashlib
import io
import json
import os
import platform
from pathlib import Path

# Of a checkpoint's tensors. Small enough for the C library to reuse the memory: fresh pages cost four times as much as copying
# into them.
PIECE_ELEMENTS = 8 << 20
FILE_ELEMENTS = 4 * PIECE_ELEMENTS
MIN_COPY_BYTES = 64 << 20
"""Tensors that a background save copies on a CPU, however small the model is."""
THREADS = 3  # on two cores: they wait for the disk as often as they work


def sha256(path: Path, from_disk: bool = False) -> str:
    """Hex digest of a file's content. The kernel is asked to read ahead, because hashing is slower than most disks.

    Args:
        from_disk: ask the kernel to drop its copy of the file before and afterwards. It does so for files that are on disk.
    """
    with path.open("rb") as file:
        if from_disk:
            _advise(file, "DONTNEED")
        _advise(file, "WILLNEED")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if from_disk:
            _advise(file, "DONTNEED")
    return digest


def _advise(file: io.BufferedReader, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, getattr(os, f"POSIX_FADV_{advice}"))


class NewFile(io.BufferedWriter):
    """A new file that is on disk when `close` returns."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))

    def close(self) -> None:
        if not self.closed:
            try:
                self.flush()
                os.fsync(self.fileno())
            finally:
                super().close()


def sync(path: Path) -> None:
    """Return when a file's content is on disk, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content atomically; it is on disk when this returns. With several writers, the last one wins."""
    part = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.part")
    with NewFile(part) as file:
        file.write(text.encode())
    os.replace(part, path)
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """`replace_text` with a value as JSON."""
    replace_text(path, json.dumps(value, indent=1) + "\n")
