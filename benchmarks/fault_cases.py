"""The cases of the fault campaign (see faults.py): each is a run that meets one fault, or one after the other, and its outcome."""

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from minitron_mcore.errors import HUNG_STATUS, STOPPED_STATUS
from tests.helpers import faults, models
from tests.helpers.faults import RUN, Ended, Fault, Start
from tests.helpers.launching import word_tokenizer, words

STEPS, STOPPED_AFTER, SAVE_EVERY = 24, 13, 3
MODEL = ["+model=smollm2_135m", "model.name=tiny", "model.architecture=null", "dtype=fp32"]
TRAINING = dict(steps=STEPS, save_every=SAVE_EVERY, keep_last=2, eval_every=12, warmup_steps=2)
TRAINING |= dict(global_batch=2, micro_batch=1, sequence_length=16, peak_lr=1e-2, min_lr=1e-3, lm_weight=1.0)
COMMAND = [*MODEL, "data.train=[text.txt]", "data.heldout=[heldout.txt]", "evaluate.sequence_length=32"]
COMMAND += ["evaluate.micro_batch=4", "student=student", "teacher=teacher", f"out_dir={RUN}", "log.tensorboard=false"]
COMMAND += [f"distill.{key}={value}" for key, value in TRAINING.items()]
TP2 = ["parallel=tp2"]


@dataclass(frozen=True)
class Outcome:
    kind: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class Campaign:
    """What all cases share, in a folder: inputs, an undisturbed result, a run that was stopped on the way."""

    root: Path
    whole: faults.Result

    @classmethod
    def make(cls, root: Path) -> "tuple[Campaign, float]":
        """Also for how long the undisturbed run took, in seconds."""
        faults.preload()
        inputs = root / "inputs"
        inputs.mkdir()
        converts = []
        for seed, name in enumerate(("teacher", "student")):
            hf = models.tiny_llama(inputs / f"hf_{name}", num_hidden_layers=1, seed=seed)
            word_tokenizer(hf)
            command = [*MODEL, f"model.hf={hf.name}", f"out_dir={name}"]
            converts.append(Start(inputs, "convert", *command, processes=1))
        for convert in converts:
            succeed(convert)
        (inputs / "text.txt").write_text(words(2000, 0))
        (inputs / "heldout.txt").write_text(words(200, 2))
        whole = train(shutil.copytree(inputs, root / "whole"))
        stopped = train(shutil.copytree(inputs, root / "stopped"), *TP2, f"distill.stop_after={STOPPED_AFTER}")
        succeed(whole)
        seconds = time.monotonic() - whole.begun
        succeed(stopped)
        return cls(root, faults.result(root / "whole")), seconds

    def folder(self, name: str, source: str = "inputs") -> Path:
        return shutil.copytree(self.root / source, self.root / "cases" / name)

    def difference(self, folder: Path, since: int = 0) -> str:
        """How a finished run differs from the undisturbed one; empty if it does not. Figures are compared after step `since`."""
        found = faults.result(folder)
        rows = [row for row in found.figures if row["step"] > since]
        if rows != self.whole.figures[since:]:
            pairs = itertools.zip_longest(rows, self.whole.figures[since:])
            return "other figures: {} instead of {}".format(*next(pair for pair in pairs if pair[0] != pair[1]))
        return "other weights" if found.weights != self.whole.weights else self._other_model(found)

    def _other_model(self, found: faults.Result) -> str:
        return "another model.json or hf" if found.model != self.whole.model else ""


def succeed(start: Start) -> None:
    if (ended := start.ended()).status != 0:
        raise SystemExit(f"an undisturbed start failed:\n{ended.output}")


def train(folder: Path, *overrides: str, **options) -> Start:
    return Start(folder, "distill", *COMMAND, *(overrides or TP2), **options)


def misbehaved(ended: Ended) -> tuple[str, str] | None:
    """An outcome that no case may have, and what was seen."""
    if ended.status is None:
        return "hung", f"no end after {faults.HANG_SECONDS:.0f} s"
    return ("orphans", "; ".join(ended.orphans)) if ended.orphans else None


def resumed(campaign: Campaign, folder: Path, since: int = 0, newest: int | None = None) -> tuple[str, str]:
    """Start the command again until it has finished; its outcome."""
    newest = faults.newest_step(folder) if newest is None else newest
    ended = train(folder).ended()
    if bad := misbehaved(ended):
        return bad
    if ended.status != 0:
        return "lost", f"status {ended.status}: {tail(ended)}"
    if ended.resumed_after < newest:
        return "lost", f"step {newest} was on disk, went on after {ended.resumed_after}"
    difference = campaign.difference(folder, since)
    return ("undetected", difference) if difference else ("resumed", "")


def refused(ended: Ended) -> tuple[str, str]:
    """Outcome of a start that has to end with one sentence."""
    if bad := misbehaved(ended):
        return bad
    if ended.status == 0 or len(ended.errors) != 1 or "Traceback" in ended.output:
        return "undetected", f"status {ended.status}: {tail(ended)}"
    return "refused", ended.errors[0]


def tail(ended: Ended) -> str:
    return " | ".join(ended.output.splitlines()[-6:])[-600:]


def unsaved(folder: Path) -> str:
    """Whether steps that must be on disk are not: a line of a step is written after the save of the one before it."""
    newest, lines = faults.newest_step(folder), faults.trained_steps(folder)
    expected = (lines - 1) // SAVE_EVERY * SAVE_EVERY
    return f"{lines} steps were trained, the newest on disk is {newest}" if newest < expected else ""


def kills(campaign: Campaign, name: str, moments: list[Fault]) -> Iterator[Outcome]:
    """A run that is killed at each moment, in one start after the other, and then finishes.

    If it finishes before a moment comes, another run follows.
    """
    folder, seen = campaign.folder(name), []
    for fault in moments:
        while (found := kill(folder, fault)) is None:
            yield from since_last(seen, resumed(campaign, folder))
            if not seen and fault.moment:
                raise LookupError(f"{fault.moment} does not happen {fault.nth} times")
            seen, fault = [], replace(fault, after=0.7 * fault.after)
            shutil.rmtree(folder / RUN)
        seen.append(found)
    yield from since_last(seen, resumed(campaign, folder))


def kill(folder: Path, fault: Fault) -> tuple[str, str, str] | None:
    """Outcome, what was seen, and the moment, of a start that is killed; None if it finished."""
    newest = faults.newest_step(folder)
    ended = train(folder, fault=fault).ended()
    moment = f"{fault.target} (rank {fault.rank}) at {fault.moment or f'{fault.after:.1f} s'} ({fault.nth})"
    if bad := misbehaved(ended):
        return *bad, moment
    if ended.resumed_after not in (0, newest) or faults.newest_step(folder) < newest:
        return "lost", f"step {newest} was on disk, went on after {ended.resumed_after}", moment
    if ended.status == 0:
        return None
    return ("lost", problem, moment) if (problem := unsaved(folder)) else ("", "", moment)


def since_last(seen: list[tuple[str, str, str]], final: tuple[str, str]) -> Iterator[Outcome]:
    """Outcomes of a run's kills, with that of the start that finished it."""
    for outcome, detail, moment in seen:
        yield Outcome("kill", outcome or final[0], f"{moment}: {detail or final[1]}")


def signals(campaign: Campaign, name: str, fault: Fault) -> Iterator[Outcome]:
    """A signal asks a run to stop: status 5, the running step is saved, the same command finishes."""
    folder = campaign.folder(name)
    ended = train(folder, fault=fault).ended()
    what = f"{signal.Signals(fault.number).name} to {fault.target} {fault.rank} at {fault.moment or f'{fault.after:.1f} s'}"
    # A process that has not come to its handlers ends by the signal itself; nothing was trained then.
    by_default = () if faults.trained_steps(folder) else (256 - fault.number,)
    yield Outcome("signal", *after_stop(campaign, folder, ended, what, by_default))


def after_stop(
    campaign: Campaign, folder: Path, ended: Ended, what: str, statuses: tuple[int, ...] = ()
) -> tuple[str, str]:
    """The outcome after a signal: status 0, STOPPED_STATUS or one of `statuses`, every trained step saved."""
    if bad := misbehaved(ended):
        return bad[0], f"{what}: {bad[1]}"
    if ended.status not in (0, STOPPED_STATUS, *statuses) or "Traceback" in ended.output:
        return "undetected", f"{what}: status {ended.status}: {tail(ended)}"
    if (saved := faults.newest_step(folder)) != (trained := faults.trained_steps(folder)):
        return "lost", f"{what}: {trained} steps were trained, the newest on disk is {saved}"
    outcome, detail = resumed(campaign, folder)
    return outcome, f"{what}: {detail or f'stopped after step {saved}'}"


def under_torchrun(campaign: Campaign, name: str, number: int, target: str, rank: int) -> Iterator[Outcome]:
    """A signal to torchrun or to one of its ranks; after SIGKILL to torchrun its ranks save and end."""
    folder = campaign.folder(name)
    ended = faults.torchrun(folder, *COMMAND, *TP2, fault=Fault(target, number, rank=rank, after=0.3))
    what = f"{signal.Signals(number).name} to {target if target == 'agent' else f'rank {rank}'}"
    if number != signal.SIGKILL:
        yield Outcome("torchrun", *after_stop(campaign, folder, ended, what))
        return
    problem = misbehaved(ended) or (("lost", unsaved(folder)) if unsaved(folder) else None)
    outcome, detail = problem or resumed(campaign, folder)
    yield Outcome("torchrun", outcome, f"{what}: {detail}")


def damages(campaign: Campaign, name: str, file: str, how: str, at: float) -> Iterator[Outcome]:
    """A file of a stopped run is damaged. A refusal must leave the run as it was: with the file restored, it resumes."""
    folder = campaign.folder(name, "stopped")
    path = folder / RUN / file
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    damage(path, how, at)
    newest = STOPPED_AFTER - 1 if file.startswith(f"step_{STOPPED_AFTER:07d}") else STOPPED_AFTER
    ended = train(folder).ended()
    what = f"{file} {how}"
    if ended.status != 0:
        outcome, detail = refused(ended)
        if outcome == "refused":
            path.write_bytes(content)
            os.utime(path, ns=times)  # a claim's is its heartbeat
            again, found = resumed(campaign, folder)
            outcome, detail = (outcome, detail) if again == "resumed" else (again, f"after it was restored: {found}")
    elif ended.resumed_after < newest:
        outcome, detail = "lost", f"went on after step {ended.resumed_after}"
    else:
        difference = campaign.difference(folder, ended.resumed_after)
        outcome, detail = ("undetected", difference) if difference else ("resumed", f"after step {ended.resumed_after}")
    yield Outcome("file", outcome, f"{what}: {detail}")


def damage(path: Path, how: str, at: float) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        return path.unlink()
    if how == "flipped" and content:
        content[int(at * len(content))] ^= 1 << int(at * 800) % 8
    path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b""}.get(how, content))


def disk_full(campaign: Campaign, name: str, room: int) -> Iterator[Outcome]:
    """The disk is full after `room` bytes more than the start of a run takes; then it has space again."""
    folder = campaign.folder(name)
    (folder / RUN).mkdir()
    with faults.small_disk(folder / RUN, room) as grow:
        ended = train(folder).ended()
        outcome, detail = refused(ended)
        if outcome == "refused":
            cause, before = detail, faults.newest_step(folder)
            grow()
            outcome, detail = resumed(campaign, folder, newest=before)
            detail = detail or f"had step {before}; {cause}"
    yield Outcome("disk", outcome, detail)


def outcome_after(
    ended: Ended, expected: bool, campaign: Campaign, folder: Path, newest: int | None = None
) -> tuple[str, str]:
    """The outcome of a fault that ended a run, `expected`: as it should; then of the start after it (see `resumed`)."""
    if bad := misbehaved(ended):
        return bad
    return (
        resumed(campaign, folder, newest=newest)
        if expected
        else ("undetected", f"status {ended.status}: {tail(ended)}")
    )


def slow_disk(campaign: Campaign, name: str, limit: float, hangs: bool) -> Iterator[Outcome]:
    """Each file of a save takes two seconds; a save may take `limit` minutes."""
    folder = campaign.folder(name)
    limits = [f"hang.save_minutes={limit}", "hang.step_minutes=0.02", f"distill.stop_after={2 * SAVE_EVERY}"]
    ended = train(folder, *TP2, *limits, prepare=partial(faults.slow_writes, 2.0)).ended()
    expected = (
        ended.status == HUNG_STATUS and f"save of step {SAVE_EVERY}" in ended.output if hangs else ended.status == 0
    )
    outcome, detail = outcome_after(ended, expected, campaign, folder)
    yield Outcome("disk", outcome, f"slow, limit {limit} minutes: {detail}")


def stopped_rank(campaign: Campaign, name: str, rank: int) -> Iterator[Outcome]:
    """SIGSTOP: the watchdog names the rank and ends the run."""
    folder = campaign.folder(name)
    fault = Fault("rank", signal.SIGSTOP, rank=rank, after=0.2)
    limits = [f"hang.{name}_minutes={limit}" for name, limit in (("setup", 0.5), ("step", 0.04), ("save", 0.1))]
    ended = faults.torchrun(folder, *COMMAND, *TP2, *limits, fault=fault)
    expected = ended.status == HUNG_STATUS and f"rank {rank} does not answer" in ended.output
    outcome, detail = outcome_after(ended, expected, campaign, folder)
    yield Outcome("hang", outcome, f"rank {rank} stopped: {detail}")


def not_finite(campaign: Campaign, name: str, rank: int) -> Iterator[Outcome]:
    """NaN in a gradient of one rank: status 3, the step before it is saved."""
    folder = campaign.folder(name)
    ended = train(folder, prepare=partial(faults.nan_gradient, rank, 12)).ended()
    expected = ended.status == 3 and len(ended.errors) == 1 and "gradient of step 12" in ended.errors[0]
    outcome, detail = outcome_after(ended, expected, campaign, folder, newest=11)
    yield Outcome("not finite", outcome, f"rank {rank}: {detail}")


def second_start(campaign: Campaign, name: str, lines: int) -> Iterator[Outcome]:
    """The same command while the first runs (after `lines` steps): refused, and the first is unharmed."""
    folder = campaign.folder(name)
    first = train(folder)
    first.wait_until(lambda: list((folder / RUN).glob(".claim*")) and faults.trained_steps(folder) >= lines)
    second = Start(folder, "distill", *COMMAND, *TP2)
    second.process.join(faults.HANG_SECONDS)
    ended = first.ended()
    outcome, detail = refused(Ended(second.process.exitcode, second.output.read_text(), ended.orphans))
    if outcome == "refused" and (ended.status != 0 or campaign.difference(folder)):
        outcome, detail = "lost", f"the first: status {ended.status}, {tail(ended)}"
    yield Outcome("second start", outcome, detail)


def replaced_input(campaign: Campaign, name: str, path: str, other: str) -> Iterator[Outcome]:
    """An input has another content when a stopped run is started again: refused; with the old one it finishes."""
    folder = campaign.folder(name, "stopped")
    (folder / path).rename(folder / "kept")
    copy = shutil.copytree if (folder / other).is_dir() else shutil.copy
    copy(folder / other, folder / path)
    outcome, detail = refused(train(folder).ended())
    if outcome == "refused":
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
        (folder / "kept").rename(folder / path)
        again, found = resumed(campaign, folder)
        outcome, detail = (outcome, detail) if again == "resumed" else (again, found)
    yield Outcome("input", outcome, f"{path}: {detail}")


def other_layout(campaign: Campaign, name: str, layout: str, processes: int) -> Iterator[Outcome]:
    """A stopped run goes on in another layout, with the same samples: equal to rounding."""
    folder = campaign.folder(name, "stopped")
    ended = train(folder, f"parallel={layout}", processes=processes).ended()
    outcome, detail = misbehaved(ended) or ("", "")
    if not outcome and (ended.status != 0 or ended.resumed_after != STOPPED_AFTER):
        outcome, detail = "lost", f"status {ended.status}: {tail(ended)}"
    if not outcome:
        found = faults.result(folder).figures
        worst = max(
            abs(a[key] - b[key]) / abs(b[key])
            for a, b in zip(found, campaign.whole.figures, strict=True)
            for key in ("kd_loss", "lm_loss")
        )
        outcome, detail = "resumed" if worst < 1e-5 else "undetected", f"losses within {worst:.1g}"
    yield Outcome("layout", outcome, f"{layout}, {processes} ranks: {detail}")
