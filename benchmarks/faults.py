"""A fault campaign: what becomes of a training run when its processes, files, disk or inputs fail.

Every case is a training of a tiny model on two real ranks (gloo, fp32). It meets its fault, and the same command is started again
until it finishes. The result is compared with that of an undisturbed run: the figures of every step, the files of weights, the
model's fingerprint, config and tokenizer, bit for bit. Every case has one outcome:

    resumed      finished with the undisturbed result, from the newest step that was on disk
    refused      ended with a status other than 0 and one sentence
    lost         began earlier than the newest step on disk, or did not finish
    undetected   another result, a traceback, a silent begin at step 0, or a cause that is not named
    hung         did not end in time
    orphans      a process was alive 30 s after the one that started it

Full disks are mounts, which only root can make. Ranks are forked by an agent, which ends them as torchrun does; some cases run
under torchrun itself (kinds "torchrun" and "hang").

`--json FILE` gets a line for each outcome as soon as it is known, and the table counts all lines of the file. A case that has a
line is not run again, so the same command goes on where it was interrupted.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fault_cases as cases
from common import parser
from fault_cases import Campaign, Outcome
from rich.console import Console
from rich.table import Table

from tests.helpers.faults import RUN, Fault

KINDS = ("kill", "torchrun", "signal", "file", "disk", "hang", "not finite", "second start", "input", "layout")
OUTCOMES = ("resumed", "refused", "lost", "undetected", "hung", "orphans")
MOMENTS = {
    # when -> file operation of a rank, how often it happens in an undisturbed run, ranks that do it
    "before the claim": (r"open run/\.claim", 1, (0,)),
    "claimed": (r"open run/config\.yaml\.", 1, (0,)),
    "setup": (r"open run/(inputs|model)\.json\.", 2, (0,)),
    "save begins": (r"shutil\.rmtree .*run/step_\d+\.part", 8, (0,)),
    "during a save": (r"open .*run/step_\d+\.part/__\d_0\.distcp w", 8, (0, 1)),
    "files are written": (r"open .*run/step_\d+\.part/integrity\.json\.", 8, (0,)),
    "before publication": (r"os\.rename .*run/step_\d+\.part .*run/step_\d+$", 8, (0,)),
    "before retention": (r"os\.rename .*run/step_\d+ .*\.removed", 5, (0,)),
    "during retention": (r"os\.remove __\d_0\.distcp", 10, (0,)),
    "lowest loss": (r"open run/best\.json\.", 2, (0,)),
    "end": (r"open run/\.complete\.", 1, (0,)),
}
TARGETS = ("rank", "all", "agent")
DAMAGE = ("truncated", "flipped", "emptied", "removed")


def kill_moments(rng: random.Random, count: int, seconds: float) -> Iterator[Fault]:
    """Every second one at a random time of an undisturbed run, the others aimed at each of MOMENTS in turn."""
    aimed = itertools.cycle(MOMENTS.values())
    for number in range(count):
        target = TARGETS[number // 2 % len(TARGETS)]
        if number % 2:
            pattern, times, ranks = next(aimed)
            yield Fault(target, moment=pattern, nth=rng.randint(1, times), rank=rng.choice(ranks))
        else:
            yield Fault(target, rank=rng.choice((0, 1)), after=rng.uniform(0.05, seconds))


type Case = Callable[[], Iterator[Outcome]]


def plan(campaign: Campaign, options, seconds: float) -> Iterator[Case]:
    """All cases of the campaign, or with `quick` one of the kinds that matter most; `seconds`: of an undisturbed run."""
    rng, numbers = random.Random(options.seed), itertools.count()

    def case(fn: Callable, *arguments) -> Case:
        return partial(fn, campaign, f"{next(numbers):03d}_{fn.__name__}", *arguments)

    files = sorted(str(file.relative_to(campaign.root / "stopped" / RUN)) for file in stopped_files(campaign.root))
    if options.quick:
        yield case(cases.kills, [Fault("all", moment=MOMENTS["during a save"][0], nth=3)])
        yield case(cases.damages, next(file for file in reversed(files) if file.endswith(".distcp")), "flipped", 0.5)
        yield case(cases.second_start, 3)
        yield case(cases.signals, Fault("rank", signal.SIGTERM, rank=1, after=seconds / 2))
        return
    for some in itertools.batched(kill_moments(rng, options.kills, seconds), 4):
        yield case(cases.kills, list(some))
    for file, how in itertools.product(files, DAMAGE):
        yield case(cases.damages, file, how, rng.random())
    yield from (case(cases.second_start, lines) for lines in (0, 3))
    for stop in stop_faults(rng, seconds):
        yield case(cases.signals, stop)
    if os.geteuid() == 0:  # may mount
        yield from (case(cases.disk_full, room) for room in (16_384, 49_152, *rng.sample(range(100_000, 800_000), 4)))
    for number, target, rank in (
        *((number, "agent", 0) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)),
        *((number, "rank", rank) for number in (signal.SIGTERM, signal.SIGUSR1) for rank in (0, 1)),
    ):
        yield case(cases.under_torchrun, number, target, rank)
    yield from (case(cases.slow_disk, limit, hangs) for limit, hangs in ((0.03, True), (0.5, False)))
    yield from (case(cases.stopped_rank, rank) for rank in (0, 1))
    yield from (case(cases.not_finite, rank) for rank in (0, 1))
    for path, other in (("student", "teacher"), ("teacher", "student"), ("text.txt", "heldout.txt")):
        yield case(cases.replaced_input, path, other)
    for layout, processes in (("single", 2), ("single", 1), ("cp2", 2)):
        yield case(cases.other_layout, layout, processes)


def stop_faults(rng: random.Random, seconds: float) -> Iterator[Fault]:
    """SIGTERM and SIGUSR1 to one rank and to all, at random times and during saves."""
    pattern, times, _ = MOMENTS["during a save"]
    for n in range(16):
        target, number = ("rank", "ranks")[n // 2 % 2], (signal.SIGTERM, signal.SIGUSR1)[n % 2]
        if n % 4 == 0:
            yield Fault("rank", number, moment=pattern, nth=rng.randint(1, times), rank=rng.choice((0, 1)))
        else:
            yield Fault(target, number, rank=rng.choice((0, 1)), after=rng.uniform(0.05, seconds))


def stopped_files(root: Path) -> Iterator[Path]:
    """Files of a run that a resume may read: without the curve."""
    run = root / "stopped" / RUN
    return (path for path in run.rglob("*") if path.is_file() and path.suffix != ".png")


def execute(file: Path | None, case: Case) -> list[dict]:
    """Lines of the outcomes of a case, which are also written to the file."""
    begin, (made, name, *_) = time.monotonic(), case.args
    try:
        outcomes = list(case())
    except Exception as error:
        outcomes = [Outcome(case.func.__name__, "undetected", f"{type(error).__name__}: {error}")]
    shutil.rmtree(made.root / "cases" / name, ignore_errors=True)
    seconds = (time.monotonic() - begin) / len(outcomes)
    for each in outcomes:
        print(f"{name}: {each.outcome}: {each.detail}", flush=True)
    lines = [{"case": name, "seconds": round(seconds, 1)} | asdict(each) for each in outcomes]
    if file:
        with file.open("a") as opened:
            opened.write("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def table(lines: list[dict]) -> Table:
    shown = Table("kind", "cases", *OUTCOMES, "seconds")
    for kind in (*KINDS, ""):
        rows = [line for line in lines if kind in ("", line["kind"])]
        counts = [sum(line["outcome"] == name for line in rows) for name in OUTCOMES]
        shown.add_row(kind or "all", f"{len(rows)}", *map(str, counts), f"{sum(line['seconds'] for line in rows):.0f}")
    return shown


def campaign(options) -> list[dict]:
    """Lines of all outcomes, those that the file had included."""
    file: Path | None = options.json
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file and file.is_file() else []
    known = {line["case"] for line in lines}
    with tempfile.TemporaryDirectory() as folder:
        made, seconds = Campaign.make(Path(folder))
        chosen = [case for case in plan(made, options, seconds) if case.args[1] not in known]
        if options.only:
            chosen = [case for case in chosen if case.func.__name__ in options.only.split(",")]
        with ThreadPoolExecutor(2) as pool:
            return lines + list(itertools.chain.from_iterable(pool.map(partial(execute, file), chosen)))


def main() -> None:
    arguments = parser(__doc__.partition("\n")[0])
    arguments.add_argument("--kills", type=int, default=100, help="number of SIGKILLs")
    arguments.add_argument("--only", metavar="NAMES", help="functions of fault_cases.py, separated by commas")
    arguments.add_argument("--seed", type=int, default=0)
    lines = campaign(arguments.parse_args())
    Console(width=120).print(table(lines))
    sys.exit(any(line["outcome"] not in ("resumed", "refused") for line in lines))


if __name__ == "__main__":
    main()
