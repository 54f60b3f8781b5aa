"""Damages valid files of every kind that the package reads (`tests.helpers.readers`), and reads them as the stages do.

    python -m tests.fuzz --minutes 10 --seed 0                 # `make fuzz`
    python -m tests.fuzz --kinds "plan.json" --case 123        # one case again, with its traceback

A finding is an exception other than UserError, more than SECONDS of processor time (or 8 times as long by the clock), more than
MEMORY bytes beyond those before the case, or the end of the process. Kind, seed and number determine a case.
"""

import argparse
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.reporting import tables
from minitron_mcore.testing import on_ranks
from tests.helpers import damage, readers

SECONDS, MEMORY, ADDRESSES = 5, 512 << 20, 4 << 30
TURN = 3.0  # seconds for one kind, then the next
OUTCOMES = ("refused", "read", "exception", "hang", "memory", "died")


class Late(BaseException):
    """Raised after SECONDS. Not an Exception, so that no reader catches it."""

    @classmethod
    def signalled(cls, *_) -> None:
        raise cls


def held(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def attempt(name: str, seed: int, number: int, base: Path, folder: Path) -> tuple[str, int, str]:
    """Run one case in this process: outcome, peak of memory in bytes beyond that before, message or traceback."""
    kind = readers.KINDS[name]
    shutil.copytree(base / kind.folder, folder)
    if number >= 0:  # files of negative numbers stay valid
        damage.spoil(kind, folder, random.Random(f"{seed} {name} {number}"))
    os.chdir(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, outcome, why = held("VmRSS"), "read", ""
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        kind.read(folder)
    except UserError as error:
        why = str(error)
        outcome = "memory" if re.search("MemoryError|allocate", why) else "refused"
    except BaseException as error:
        outcome, why = "hang" if isinstance(error, Late) else "exception", traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    peak = held("VmHWM") - before
    os.chdir(base)
    shutil.rmtree(folder)
    return ("memory" if peak > MEMORY and outcome in ("refused", "read") else outcome), peak, why


def cases(pipe, name: str, seed: int, numbers: range, until: float, base: Path) -> None:
    """Run cases and send their rows; the body of a process, which ends after a finding."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    signal.signal(signal.SIGPROF, Late.signalled)
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch, process_groups.distributed_context(readers.ONE):
        resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + ADDRESSES, resource.RLIM_INFINITY))
        pipe.send(None)
        for number in numbers:
            pipe.send(row := (number, *attempt(name, seed, number, base, Path(scratch) / "case")))
            if row[1] not in ("refused", "read") or time.monotonic() > until:
                break


def run(name: str, seed: int, first: int, count: int, base: Path, seconds: float) -> list[tuple]:
    """Run `count` cases of a kind from `first`, for at most `seconds`: rows of (number, outcome, bytes, message or traceback)."""
    rows, fork, until = [], multiprocessing.get_context("fork"), time.monotonic() + seconds
    while len(rows) < count and time.monotonic() < until:
        ours, theirs = fork.Pipe()
        numbers = range(first + len(rows), first + count)
        process = fork.Process(target=cases, args=(theirs, name, seed, numbers, until, base))
        process.start()
        theirs.close()
        try:
            wait = 60
            while ours.poll(wait):
                rows, wait = [*rows, *filter(None, [ours.recv()])], 8 * SECONDS
            rows.append((first + len(rows), "hang", 0, "no answer"))
        except EOFError:
            process.join(60)
            if process.exitcode:
                rows.append((first + len(rows), "died", 0, f"exit code {process.exitcode}"))
        process.kill(), process.join()
    return rows


def table(rows: dict[str, list[tuple]], seed: int) -> int:
    """Print one example of the findings at each place, and the counts; returns the number of findings."""
    findings, shown = defaultdict(list), []
    for name, tried in rows.items():
        counts = Counter(outcome for _, outcome, _, _ in tried)
        peak = max((size for _, _, size, _ in tried), default=0)
        shown.append({"kind": name, "cases": len(tried)} | {o: counts[o] for o in OUTCOMES} | {"peak MiB": peak >> 20})
        for number, outcome, size, why in tried:
            if outcome not in ("refused", "read"):
                frames = re.findall(r'File ".*?(minitron_mcore/\S+)", line (\d+)', why)
                findings[name, outcome, *frames[-1:]].append(f"{number}: {why.strip()[-200:]!r} {size >> 20} MiB")
    for (name, outcome, *place), same in findings.items():
        print(f'{outcome} x {len(same)}: {place} --kinds "{name}" --seed {seed} --case {same[0]}')
    total = {key: sum(row[key] for row in shown) for key in ("cases", *OUTCOMES)}
    shown.append({"kind": "all"} | total | {"peak MiB": max(row["peak MiB"] for row in shown)})
    tables.table(f"seed {seed}: at most {SECONDS} s and {MEMORY >> 20} MiB a case", shown)
    return sum(map(len, findings.values()))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(readers.KINDS), choices=readers.KINDS)
    parser.add_argument("--case", type=int)
    args = parser.parse_args(given)
    rows, start = {name: [] for name in args.kinds}, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "valid"
        readers.BASE = base
        on_ranks(readers.make, 1, readers.ONE, base)
        if args.case is not None:
            rows = {name: run(name, args.seed, args.case, 1, base, 60) for name in rows}
            print(*(why for ((*_, why),) in rows.values()))
        while args.case is None and time.monotonic() - start < 60 * args.minutes:
            for name, tried in rows.items():
                tried += run(name, args.seed, len(tried), 10**9, base, TURN)
        return int(table(rows, args.seed) > 0)


if __name__ == "__main__":
    sys.exit(main())
