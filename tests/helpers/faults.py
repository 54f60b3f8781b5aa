"""Training runs on real processes that meet a fault, and what is left of them."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from minitron_mcore import testing
from minitron_mcore.checkpoint import disk, steps
from tests.helpers import launching

HANG_SECONDS, ORPHAN_SECONDS = 120.0, 30.0
"""Longest time of a start, and of its processes after the first of them, the agent, has ended."""
RUN = "run"
"""The run folder, in the folder in which a case's processes are started."""
_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "shutil.rmtree")
_FIGURES = ("step", "tokens", "kd_loss", "lm_loss", "teacher_entropy", "heldout_loss", "grad_norm", "lr")
_PRELOADED = (
    "minitron_mcore.testing",
    "minitron_mcore.cli.main",
    "minitron_mcore.distill.run",
    "minitron_mcore.estimate.announce",
    "minitron_mcore.evaluation.heldout",
    "tests.helpers.launching",
)


@dataclass(frozen=True)
class Fault:
    """A signal to a process of a start, at a file operation of a rank or after some seconds."""

    target: str
    """"rank" (`rank`), "agent" (the process that started the ranks, as torchrun does), "ranks", "all" (agent and ranks)."""
    number: int = signal.SIGKILL
    moment: str = ""
    """Pattern of a file operation, as in "os.rename run/step_0000005.part"; the signal comes before it."""
    nth: int = 1
    rank: int = 0
    after: float = 0.0
    """Seconds, without `moment`."""


class Ended(NamedTuple):
    """A start whose processes have ended."""

    status: int | None
    """None: it was hung."""
    output: str
    orphans: list[str]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    @property
    def resumed_after(self) -> int:
        """The step that it went on from; 0 for none."""
        found = re.search(r"^resuming after step (\d+) of", self.output, re.MULTILINE)
        return int(found[1]) if found else 0


class Start:
    """A launch file on forked ranks in a folder, until `ended`."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        *overrides: str,
        processes: int = 2,
        fault: Fault | None = None,
        prepare: Callable[[], object] | None = None,
    ):
        """
        Args:
            prepare: called in the agent, before it forks the ranks.
        """
        self.folder, self.fault = folder, fault
        self.output = folder / f"output_{len(list(folder.glob('output_*')))}"
        self.output.touch()
        args = (folder, self.output, stage, overrides, processes, fault, prepare)
        self.process = testing._processes().Process(target=_agent, args=args)
        self.begun = time.monotonic()
        self.process.start()

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Return when `is_ready`, or when the agent has ended."""
        while not is_ready() and self.process.exitcode is None and time.monotonic() < self.begun + HANG_SECONDS:
            time.sleep(0.01)

    def ended(self) -> Ended:
        """Send the fault's signal if it is due by time, and wait for all processes."""
        if self.fault and not self.fault.moment:
            self.process.join(max(0.0, self.begun + self.fault.after - time.monotonic()))
            if self.process.exitcode is None:  # else the number may be another process's
                send(self.process.pid, self.fault)
        self.process.join(max(0.1, self.begun + HANG_SECONDS - time.monotonic()))
        return _all_ended(self.folder, self.process.exitcode, self.output)


def torchrun(folder: Path, *overrides: str, fault: Fault) -> Ended:
    """launch/distill.py under torchrun on two ranks, with a fault by time."""
    output = folder / f"output_{len(list(folder.glob('output_*')))}"
    command = [sys.executable, "-m", "minitron_mcore.cli.torchrun", "--standalone", "--nproc-per-node=2"]
    command += [str(launching.ROOT / "launch/distill.py"), *overrides]
    env = os.environ | {"PYTHONPATH": str(launching.ROOT), "OMP_NUM_THREADS": "1"}
    with output.open("w") as log:
        agent = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        end = time.monotonic() + HANG_SECONDS
        while not _lines(folder / RUN) and agent.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(fault.after)
        if agent.poll() is None:
            send(agent.pid, fault)
        with suppress(subprocess.TimeoutExpired):
            agent.wait(max(0.1, end - time.monotonic()))
    return _all_ended(folder, agent.poll(), output)


def send(agent: int, fault: Fault) -> None:
    """Send a fault's signal to processes of a start from outside."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        process, pids = psutil.Process(agent), []
        while process.status() != psutil.STATUS_ZOMBIE:
            pids = [rank.pid for rank in sorted(process.children(), key=lambda rank: rank.create_time())]
            if fault.target in ("agent", "all") or len(pids) > fault.rank:
                break
            time.sleep(0.01)  # the ranks are not there yet
        targets = {"agent": [agent], "rank": pids[fault.rank : fault.rank + 1], "ranks": pids, "all": [agent, *pids]}
        for pid in targets[fault.target]:
            os.kill(pid, fault.number)


def _agent(folder: Path, output: Path, stage: str, overrides: tuple, processes: int, fault, prepare) -> None:
    os.setpgrp()
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.environ["TORCHELASTIC_RUN_ID"] = "faults"  # the ranks end with this process
    if prepare:
        prepare()
    if fault and fault.moment:
        os.register_at_fork(after_in_child=lambda: _arm(fault))
    sys.exit(launching._status(stage, overrides, processes))


def _arm(fault: Fault) -> None:
    """Send the signal from this process, before the file operation, if it is the fault's rank."""
    pattern, seen = re.compile(fault.moment), itertools.count(1)

    def before(event: str, args: tuple) -> None:
        if event not in _OPERATIONS or int(os.environ.get("RANK", 0)) != fault.rank:
            return
        if pattern.search(f"{event} {args[0]} {args[1]}") and next(seen) == fault.nth:
            if fault.target == "all":
                os.killpg(os.getpgrp(), fault.number)
            else:
                os.kill(os.getppid() if fault.target == "agent" else os.getpid(), fault.number)

    sys.addaudithook(before)


def _all_ended(folder: Path, status: int | None, output: Path) -> Ended:
    """Wait for the processes of a folder; those that go on for too long are killed."""
    end = time.monotonic() + (ORPHAN_SECONDS if status is not None else 0.0)
    while (left := list(_processes_in(folder))) and time.monotonic() < end:
        time.sleep(0.05)
    names = []
    for process in left:
        with suppress(psutil.NoSuchProcess):
            names.append(f"{process.pid} {process.status()}")
            process.kill()
    return Ended(status, output.read_text(errors="replace"), names)


def _processes_in(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


class Result(NamedTuple):
    """What a finished run leaves for its readers."""

    figures: list[dict]
    """Of each step, those that do not depend on time."""
    weights: dict[str, str]
    """SHA-256 of each file of tensors of the newest step."""
    model: str
    """Fingerprint of the model, and SHA-256 of its config and tokenizer."""


def result(folder: Path) -> Result:
    run = folder / RUN
    figures = [{key: row[key] for key in _FIGURES} for row in map(json.loads, _lines(run))]
    newest = steps.newest_complete(run)
    files = {f"{newest.number}/{file.name}": _hash(file) for file in sorted(newest.path.glob("*.distcp"))}
    name = json.loads((run / "model.json").read_text())["fingerprint"]
    return Result(figures, files, " ".join([name, *(_hash(file) for file in sorted((run / "hf").iterdir()))]))


def newest_step(folder: Path) -> int:
    """Number of the newest complete step of a case's run; 0 without one."""
    newest = steps.newest_complete(folder / RUN)
    return newest.number if newest else 0


def trained_steps(folder: Path) -> int:
    """Number of the last step with a complete line of figures."""
    last = 0
    for line in _lines(folder / RUN):
        with suppress(ValueError):
            last = json.loads(line)["step"]
    return last


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[Callable[[], None]]:
    """Mount a disk of `room` bytes (root only); yields a function that enlarges it."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def slow_writes(seconds: float) -> None:
    """Each file of tensors that this process and its forks write takes `seconds` more."""
    usual = disk.NewFile.close

    def close(file: disk.NewFile) -> None:
        if not file.closed and str(file.name).endswith(".distcp"):
            time.sleep(seconds)
        usual(file)

    disk.NewFile.close = close


def nan_gradient(rank: int, step: int) -> None:
    """Fill a rank's gradients with NaN in a step, before ranks combine theirs."""
    from minitron_mcore.distill.trainer import Trainer

    usual = Trainer._finalize_gradients

    def finalize(trainer, *args, **kwargs) -> None:
        if int(os.environ["RANK"]) == rank and trainer.step + 1 == step:
            next(iter(trainer.model.parameters())).main_grad.fill_(float("nan"))
        usual(trainer, *args, **kwargs)

    Trainer._finalize_gradients = finalize


def preload() -> None:
    """Make the server of forks import what a start needs; before its first fork."""
    testing._processes().set_forkserver_preload(list(_PRELOADED))


def _lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
