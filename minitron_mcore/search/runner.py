"""The search stage: candidates are pruned and measured one after another; the best are distilled briefly, one or several at a time,
and ranked again.

    out_dir/
      search.json                     all results, in order of rank
      candidates/NAME/measured.json   zero-shot loss and, if requested, speed
      candidates/NAME/prune/          the pruned checkpoint, of trained candidates
      candidates/NAME/distill/        its short training
      candidates/NAME/trained.json    held-out loss at the evaluated steps

Files are written when their result is complete, so an interrupted run resumes after the last one. Shards (`search.shard`) of one
search write different files in the same folder: the first pass measures all candidates, the next pass trains the best.
"""

import gc
import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import claim, run_folder, stage_record, streaming
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config import ranges
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.settings import DistillConfig, OnPolicyConfig, PruneConfig
from minitron_mcore.config.stages import DistillRun, Run, SearchRun
from minitron_mcore.distill import cache, heldout
from minitron_mcore.distill.run import check_run, train
from minitron_mcore.distill.trainer import check
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.estimate import announce
from minitron_mcore.evaluation.heldout import HeldOut
from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.parallel import process_groups, stop_signal
from minitron_mcore.pruning import apply
from minitron_mcore.search import latency
from minitron_mcore.search.results import CandidateStore, collect, write
from minitron_mcore.search.space import MAX_GRID, Candidate, Space

MEASURED, TRAINED = "measured.json", "trained.json"


def distill_settings(config: SearchRun) -> DistillConfig:
    """The settings with which candidates are trained: the run's on text alone, with the search's steps and evaluations."""
    search = config.search
    return replace(
        config.distill, steps=search.steps, eval_every=search.eval_every, stop_after=None, on_policy=OnPolicyConfig()
    )


def run(config: SearchRun) -> None:
    """Run a search or resume an interrupted one (collective).

    Raises:
        UserError: see `SearchRunner`, `run_folder.open_checkpoint`, `scores.load_scores` and `claim.claim_run_folder`.
    """
    source = run_folder.open_checkpoint(config.source, wanted=config.model.architecture)
    has_teacher = config.search.best and config.distill.needs_teacher
    teacher = cache.open_teacher(config.teacher) if has_teacher else None
    runner = SearchRunner(config, source, teacher, load_scores(config.scores, source.arch, source.fingerprint))
    search = config.search
    share = f"shard{search.shard}of{search.shards}" if search.shards > 1 else ""
    with claim.claim_run_folder(config.out_dir, resolved(config), share):
        runner.run()


class SearchRunner:
    """One search in the running layout."""

    def __init__(self, config: SearchRun, source: Checkpoint, teacher: Checkpoint | None, scores: Scores):
        """Check all settings and tokenize the held-out text (collective).

        Args:
            teacher: None if no candidate is trained or the training needs none.

        Raises:
            UserError: see `Space`, `Space.candidates`, `trainer.check`, `latency.check`, `study.apply_study` and
                `windows.heldout_windows`; shards of a search by optuna.
        """
        self.config, self.search, self.out_dir = config, config.search, Path(config.out_dir)
        self.source, self.teacher = source, teacher
        self.space = Space.of(source.arch, config)
        is_grid = self.space.combinations <= MAX_GRID
        if not is_grid and self.search.shards > 1:
            raise UserError(
                f"{self.space.combinations:,} combinations are searched one after another by optuna, which search.shards "
                f"{self.search.shards} cannot share: use search.shards=1, or fewer sizes for up to {MAX_GRID:,} combinations."
            )
        self.total = len(self.space.candidates) if is_grid else self.search.trials
        if self.search.best:
            check(source, teacher, distill_settings(config), config.parallel, config.dtype.value, config.performance)
        length = config.evaluate.sequence_length
        refuse(ranges.positions("evaluate.sequence_length", length, source=source.arch.max_positions))
        if self.search.latency:
            latency.check(source.arch, self.search.speed)
        if self.search.best:
            refuse(ranges.text_files("data.train", config.data.splits_file or config.data.train))
        self.heldout = HeldOut(config, source)
        with process_groups.raise_on_all_ranks():
            self.reader = streaming.Reader(source)
        self.store = CandidateStore(config, source, scores, self.heldout.digest)
        for blocks in self.space.axes.get("blocks", []):
            self.store.apply_study(PruneConfig(blocks=None if blocks >= source.arch.blocks else blocks))
        self.remaining = self.search.stop_after or float(
            "inf"
        )  # candidates to measure or train before a requested stop

    def run(self) -> None:
        """Measure, train, and write the results (collective); returns early at search.stop_after."""
        self._prepare_folder()
        with stop_signal.at_stop_points():
            self._run()

    def _run(self) -> None:
        measured = self._measure()
        if len(measured) == self.total and self.remaining > 0:
            self._train(measured)
        collected = collect(self.store, self.space, list(measured))
        trained = sum(row["loss"] is not None for row in collected["candidates"])
        complete = len(measured) == self.total and trained == min(self.search.best, self.total)
        with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
            if process_groups.rank() == 0:
                write(self.out_dir, collected, self.search, self.total, complete)
            if complete:
                claim.finish(self.out_dir)

    def _prepare_folder(self) -> None:
        with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
            if process_groups.rank() == 0:
                (self.out_dir / "candidates").mkdir(exist_ok=True)

    def _in_shard(self, number: int) -> bool:
        return number % self.search.shards == self.search.shard

    def _measure(self) -> dict[Candidate, dict[str, Any]]:
        """Measure this shard's candidates; returns the results of all that are measured (collective)."""
        results: dict[Candidate, dict[str, Any]] = {}
        proposals, number = self.space.proposals(self.config.seed), 0
        progress = process_groups.Progress("candidates", self.total, "candidates")
        candidate = next(proposals, None)
        while candidate and self.remaining > 0:
            stop_signal.stop_point(f"after {len(results)} of {self.total} candidates are measured")
            measured = self.store.read(candidate, MEASURED)
            if not measured and self._in_shard(number):
                measured = self._measure_candidate(candidate)
            if measured:
                results[candidate] = measured
                progress.update(len(results), f", {candidate.name}: {measured['zero_shot_loss']:.3f}")
            number += 1
            try:
                candidate = proposals.send(measured.get("zero_shot_loss", math.inf))
            except StopIteration:
                self.total = number  # optuna may find fewer than search.trials
                break
        return results

    def _measure_candidate(self, candidate: Candidate) -> dict[str, Any]:
        """Prune a candidate in memory and measure it; one model at a time."""
        plan, dtype = self.store.plan(candidate), self.config.dtype.value
        model = apply.build_pruned(self.source, plan, self.config.parallel, dtype, self.reader)
        result = {"zero_shot_loss": self.heldout.measure(model, plan.target)["heldout_loss"]}
        del model
        if self.search.latency and process_groups.rank() == 0:
            result |= latency.measure(plan.target, self.source.hf, self.search.speed, dtype)
        self.remaining -= 1
        return self.store.write(candidate, MEASURED, result)

    def _train(self, measured: dict[Candidate, dict[str, Any]]) -> None:
        """Train this shard's part of the best candidates, search.students_per_pass at a time (collective)."""
        best = sorted(measured, key=lambda c: (measured[c]["zero_shot_loss"], c.name))[: self.search.best]
        own = [candidate for number, candidate in enumerate(best) if self._in_shard(number)]
        own = [c for c in own if self.search.steps not in self.store.read(c, TRAINED).get("steps", [])]
        for students in itertools.batched(own, self.search.students_per_pass):
            students = students[: int(min(self.remaining, len(students)))]
            if not students:
                break
            stop_signal.stop_point(f"before the training of {students[0].name}")
            names = ", ".join(candidate.name for candidate in students)
            process_groups.log(f"training {names}; {len(own)} of this shard's candidates are not trained yet")
            self._train_candidates(students)
            self.remaining -= len(students)

    def _train_candidates(self, candidates: Sequence[Candidate]) -> None:
        """Prune candidates on disk and train them together, or resume that; evaluates every search.eval_every steps."""
        runs = [self._prune(candidate) for candidate in candidates]
        gc.collect()  # frees the previous candidates, their teacher and optimizers, which refer to each other
        students = [run_folder.open_checkpoint(run.student, "student") for run in runs]
        settings = distill_settings(self.config)
        check_run(runs[0], settings, students, self.teacher)
        announce.print_memory(runs[0], settings, students, self.teacher)
        train(runs, settings, students, self.teacher, self.heldout)
        for candidate, run in zip(candidates, runs, strict=True):
            losses = heldout.losses(Path(run.out_dir)) if process_groups.rank() == 0 else {}
            self.store.write(candidate, TRAINED, {"steps": list(losses), "losses": list(losses.values())})

    def _prune(self, candidate: Candidate) -> DistillRun:
        """Write a candidate's pruned checkpoint unless it exists; returns its training run (collective)."""
        config, folder = self.config, self.store.folder(candidate)
        pruned = folder / "prune"
        if not stage_record.is_complete(pruned):
            plan = self.store.plan(candidate)
            identity = {"stage": "candidate", "plan": plan.digest()}
            with claim.new_run_folder(pruned, identity) as new:
                apply.prune(self.source, plan, new, config.parallel)
        common = {field.name: getattr(config, field.name) for field in fields(Run)}
        run = DistillRun(**common, student=str(pruned), teacher=config.teacher, out_dir=str(folder / "distill"))
        run.distill = distill_settings(config)
        return run
