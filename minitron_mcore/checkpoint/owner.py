"""The process that owns a run folder, with a heartbeat. No torch import.

A claim is a file .claim.N; the newest N counts. A process takes a folder by creating N + 1, which the file system lets one process
do, and removes older files. It touches its file every BEAT_SECONDS, and sets the file's time to 0 when it ends.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil

from minitron_mcore.errors import UserError

BEAT_SECONDS = 10.0
DEAD_SECONDS = 120.0
"""Age of a heartbeat from which an owner on another host is dead."""
PREFIX = ".claim"


class Owner(NamedTuple):
    """The process of a claim that is not released."""

    host: str
    pid: int
    age: float
    """Seconds since its last heartbeat, by the clock of the file system."""
    is_here: bool
    """Whether this process can see it: the same host, and the same container."""
    is_running: bool
    """Whether it is running or, if it cannot be seen, has beaten in the last DEAD_SECONDS."""


class Claim:
    """This process's claim of a folder until `release`, or during a with block.

    If another process takes the folder meanwhile, which needs a pause of DEAD_SECONDS, or if someone removes the folder, this
    process ends.
    """

    def __init__(self, folder: Path, share: str = ""):
        """Take `folder`, which is made if there is none.

        Args:
            share: name of a part of the folder's work, which has an owner of its own.

        Raises:
            UserError: another process that still runs owns the folder.
        """
        self.folder, self.path = folder, _take(folder, share)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat of {folder}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                print(f"error: {self.folder} was taken by another process, or removed: this run ends.", flush=True)
                os._exit(UserError.exit_status)
            except OSError:  # the file system is away; if it stays away, writing fails
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def clear(self) -> None:
        """Remove everything else in the folder."""
        for path in self.folder.iterdir():
            if path != self.path:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def release(self) -> None:
        """End the claim."""
        self.stop()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path, (0, 0))

    def stop(self) -> None:
        """End the heartbeat, before the folder is renamed."""
        self._stop.set()
        self._thread.join()


def owner(folder: str | Path, share: str = "") -> Owner | None:
    """The process that owns a folder, running or not; None if there is none or it has ended normally."""
    _, path = _newest(Path(folder), share)
    return _read(path) if path else None


def _take(folder: Path, share: str) -> Path:
    """Create the next claim."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        number, path = _newest(folder, share)
        if path and (holder := _read(path)) and holder.is_running:
            raise UserError(_refusal(folder, holder))
        new = folder / f"{_stem(share)}.{number + 1}"
        try:
            with new.open("x") as file:
                json.dump(_this_process(), file)
        except (FileExistsError, FileNotFoundError):  # another process was faster, or has just removed the folder
            continue
        except OSError:
            new.unlink(missing_ok=True)
            raise
        for older, path in _numbers(folder, share).items():
            if older <= number:
                path.unlink(missing_ok=True)
        return new


def _refusal(folder: Path, holder: Owner) -> str:
    wait = "" if holder.is_here else f", or, if it is dead, start again in {DEAD_SECONDS - holder.age:.0f} s"
    return (
        f"{folder} belongs to a run that is still going: process {holder.pid} on {holder.host}, last heartbeat {holder.age:.0f} s "
        f"ago: end that run, or give another out_dir{wait}."
    )


def _stem(share: str) -> str:
    return f"{PREFIX}.{share}" if share else PREFIX


def _numbers(folder: Path, share: str) -> dict[int, Path]:
    """The claims of a folder by number."""
    found = (
        (re.fullmatch(rf"{re.escape(_stem(share))}\.(\d+)", path.name), path) for path in folder.glob(f"{PREFIX}.*")
    )
    return {int(match[1]): path for match, path in found if match}


def _newest(folder: Path, share: str) -> tuple[int, Path | None]:
    return max(_numbers(folder, share).items(), default=(0, None))


def _read(path: Path) -> Owner | None:
    """The owner that a claim names; None for a released claim, or one that is gone."""
    try:
        beat, text = path.stat().st_mtime, path.read_text()
    except FileNotFoundError:
        return None
    if beat == 0:
        return None
    try:
        record = json.loads(text)
        kinds = (("host", str), ("pid", int), ("started", float), ("space", int))
        process: dict[str, Any] = {key: kind(record[key]) for key, kind in kinds}
    except (ValueError, KeyError, TypeError):  # just being written, or damaged: its heartbeat decides
        process = {"host": "an unknown host", "pid": 0, "started": 0.0, "space": 0}
    here, age = _this_process(), max(0.0, _now(path.parent) - beat)
    is_here, recent = (process["host"], process["space"]) == (here["host"], here["space"]), age < DEAD_SECONDS
    is_running = _is_running(process["pid"], process["started"], recent) if is_here else recent
    return Owner(process["host"], process["pid"], age, is_here, is_running)


def _this_process() -> dict[str, Any]:
    """What a claim holds. Processes of two containers may have one host name and the same numbers, hence the pid namespace."""
    space = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    process = psutil.Process()
    return {"host": platform.node(), "pid": process.pid, "started": process.create_time(), "space": space}


def _is_running(pid: int, started: float, recent: bool) -> bool:
    """Whether a process is running, and is the one that started then; a change of the clock changes that time, hence `recent`."""
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE  # its parent has not collected it yet
        return not ended and (recent or abs(process.create_time() - started) < 1)
    except psutil.NoSuchProcess:
        return False


def _now(folder: Path) -> float:
    """The time by the clock that stamps the folder's files."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # a reader of another user's folder
        return time.time()
