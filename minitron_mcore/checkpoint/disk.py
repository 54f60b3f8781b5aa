"""Large files past the page cache, which every byte of a model would go through once: making room for it there takes a processor
longer than hashing it. A file system that refuses (O_DIRECT), at once or at the first request, is used through its cache."""

import collections
import errno
import fcntl
import hashlib
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

BLOCK = 16 << 20
# Of a checkpoint's tensors. Small enough for the C library to reuse the memory: fresh pages cost four times as much as copying
# into them.
PIECE_ELEMENTS = 8 << 20
FILE_ELEMENTS = 4 * PIECE_ELEMENTS
THREADS = 3  # on two cores: they wait for the disk as often as they work
_ALIGNED = 4096  # offsets, lengths and addresses, for every file system in use
_DIRECT = getattr(os, "O_DIRECT", 0)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError:  # not here, or not there at all, which the second call says
        return os.open(path, flags, 0o666)


def _asked(request: Callable[[], int], file: int) -> int:
    """What a read or write returns; where the file system opens files for direct use and then refuses it, through its cache."""
    try:
        return request()
    except OSError as error:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & _DIRECT:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
        return request()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _room(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size + -size % _ALIGNED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def read(path: Path, into: mmap.mmap) -> memoryview:
    """The bytes of a whole file, at the start of `into`, which has room for them."""
    file, target, size = _open(path, os.O_RDONLY), memoryview(into), 0
    try:
        # The file's end may lie anywhere, but a request's may not.
        while got := _asked(partial(os.preadv, file, [target[size : size + BLOCK]], size), file):
            size += got
            if size % _ALIGNED:
                break
    finally:
        os.close(file)
    return target[:size]


@dataclass
class _Slot:
    room: mmap.mmap
    data: memoryview
    users: int = 0


class Recent:
    """The last few files, whole, in memory that is used again; for several threads.

    Args:
        count: files that are held, if none of them is in use when another comes.
        size: bytes of the largest.
    """

    def __init__(self, count: int, size: int):
        self.count, self.size, self.lock = count, size, threading.Lock()
        self.slots: collections.OrderedDict[str, _Slot] = collections.OrderedDict()

    def load(self, path: Path) -> memoryview:
        """Read a file that is not held, and hold it."""
        room = self._room()
        data = read(path, room)
        with self.lock:
            self.slots[path.name] = _Slot(room, data)
        return data

    def _room(self) -> mmap.mmap:
        with self.lock:
            idle = next((name for name, slot in self.slots.items() if not slot.users), None)
            if idle and len(self.slots) >= self.count:
                return self.slots.pop(idle).room
        return _room(self.size + BLOCK)

    @contextmanager
    def using(self, name: str) -> Iterator[memoryview | None]:
        """A held file's bytes, None where it isn't held; they stay what they are inside the block."""
        with self.lock:
            if slot := self.slots.get(name):
                self.slots.move_to_end(name)
                slot.users += 1
        try:
            yield slot and slot.data
        finally:
            if slot:
                with self.lock:
                    slot.users -= 1


class Seekable(io.RawIOBase):
    """What a read-only file of `length` bytes needs besides `readinto`, which moves `at`."""

    def __init__(self, length: int):
        self.length, self.at = length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at


class View(Seekable):
    """A file that reads from memory. (io.BytesIO copies what it is asked for more than once.)"""

    def __init__(self, data: memoryview):
        super().__init__(len(data))
        self.data = data

    def readinto(self, buffer) -> int:
        part = self.data[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


class Output:
    """A new file to append to; on disk when it is closed."""

    def __init__(self, path: Path):
        self.file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.buffer, self.filled, self.size = _room(BLOCK), 0, 0

    def tell(self) -> int:
        return self.size

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        at = 0
        while at < len(data):
            part = data[at : at + BLOCK - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            at += len(part)
            if self.filled == BLOCK:
                self._flush(BLOCK)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing before `close`: a part of a block cannot be written."""

    def _flush(self, length: int) -> None:
        done, view = 0, memoryview(self.buffer)
        while done < length:
            done += _asked(partial(os.write, self.file, view[done:length]), self.file)
        self.filled = 0

    def close(self) -> None:
        try:
            if self.filled:
                self._flush(-(-self.filled // _ALIGNED) * _ALIGNED)
            os.ftruncate(self.file, self.size)
            os.fsync(self.file)
        finally:
            os.close(self.file)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_) -> None:
        self.close()
