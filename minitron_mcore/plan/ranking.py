"""An architecture search under way: candidates are pruned and measured one after another; the best are trained, one or some
at a time, and ranked again.

    out_dir/
      search.json                     all that was found, in order of rank
      candidates/NAME/measured.json   zero-shot loss and, where asked for, speed
      candidates/NAME/prune/          the pruned checkpoint, of those that are trained
      candidates/NAME/distill/        its short training
      candidates/NAME/trained.json    held-out loss at the steps where it was looked at

A file is written when its result is whole, so a run that was killed goes on after it. Runs that share the candidates out
(`search.shard`) write different files in the same folder: first all of them measure, and the next time the same sweep trains.
"""

import gc
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch.distributed as dist

from minitron_mcore import checkpoint, evaluate, pictures_search, prune, ranges, report, runtime, stream
from minitron_mcore.checkpoint import Checkpoint
from minitron_mcore.config import DistillConfig, PruneConfig
from minitron_mcore.distill import cache, stage, train
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.importance import study
from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.launching import plain
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.plan import counts, latency
from minitron_mcore.plan.plan import Plan, make_plan
from minitron_mcore.plan.search import GRID, Candidate, Space
from minitron_mcore.reading import read_json, readable
from minitron_mcore.runs import DistillRun, Run, SearchRun
from minitron_mcore.textfiles import Limits
from minitron_mcore.tokenizer import open_tokenizer

FILE = "search.json"
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")


def distillation(config: SearchRun) -> DistillConfig:
    """How a candidate is trained: the run's own settings for as many steps as the search says."""
    return replace(config.distill, steps=config.search.steps, stop_after=None)


def run(config: SearchRun) -> None:
    """The search of a config, from its beginning or from where a stopped run left it (collective).

    Raises:
        UserError: see `open_checkpoint`, `load_scores`, `Ranking` and `claimed`.
    """
    source = checkpoint.open_checkpoint(config.source, wanted=config.model.architecture)
    teaches = config.search.best and config.distill.taught
    teacher = cache.open_teacher(config.teacher) if teaches else None
    ranking = Ranking(config, source, teacher, load_scores(config.scores, source.arch, source.fingerprint))
    with checkpoint.claimed(config.out_dir, plain(config), resume=True):
        ranking.run()


def _results(path: Path) -> dict:
    """What a file of a candidate says; its figures are numbers."""
    remedy = "remove the file, and run the search again"
    found = read_json(path, remedy)
    with readable(path, remedy):
        losses = dict(zip(found.get("steps", []), found.get("losses", []), strict=True))
        single = [found["zero_shot_loss"]] if path.name == "measured.json" else []
        single += [found[key] for key in SPEEDS if found.get(key) is not None]
        if not all(type(figure) in (int, float) for figure in (*losses, *losses.values(), *single)):
            raise TypeError("a figure that is no number")
    return found


class Ranking:
    """One search in the running layout. Rank 0 writes the results, and what it wrote is what all ranks know."""

    def __init__(self, config: SearchRun, source: Checkpoint, teacher: Checkpoint | None, scores: Scores):
        """Check everything that can be checked and cut the held-out text (collective).

        Raises:
            UserError: see `Space` and `Space.candidates`, `train.check`, `latency.check`, `study.apply`, `evaluate.windows`; no
                held-out text; optuna's search in shards.
        """
        self.config, self.search, self.out_dir = config, config.search, Path(config.out_dir)
        self.source, self.teacher, self.scores = source, teacher, scores
        self.space = Space.of(source.arch, config)
        if self.space.combinations > GRID and self.search.shards > 1:
            raise UserError(
                f"{self.space.combinations:,} combinations are searched one after another by optuna, which search.shards "
                f"{self.search.shards} cannot share out: use search.shards=1, or fewer sizes for up to {GRID:,} combinations."
            )
        for blocks in self.space.axes.get("blocks", []):
            self._studied(PruneConfig(blocks=None if blocks >= source.arch.blocks else blocks))
        self.total = len(self.space.candidates) if self.space.combinations <= GRID else self.search.trials
        if self.search.best:
            train.check(source, teacher, distillation(config), config.parallel, config.dtype.value, config.performance)
        refuse(ranges.positions("evaluate.sequence_length", config.evaluate.sequence_length, source=source.arch))
        if self.search.latency:
            latency.check(source.arch, self.search.speed)
        if not config.data.heldout:
            raise UserError("data.heldout is empty: give text to rank candidates on, data.heldout=[a.jsonl,b.txt].")
        with runtime.agreed():
            tokenizer = open_tokenizer(config.data, source.hf, source.arch.vocab)
            how = config.evaluate.sequence_length, Limits.of(config.data)
            self.text = {path: evaluate.windows(path, tokenizer, *how) for path in config.data.heldout}
            self.reader = stream.Reader(source)
        self.text_hash = hashlib.sha256(b"".join(w.tokens.numpy().tobytes() for w in self.text.values())).hexdigest()[
            :16
        ]
        self.left = self.search.stop_after or float("inf")
        self.digests: dict[Candidate, str] = {}

    def run(self) -> None:
        """Measure, train, and write search.json and its pictures (collective); returns early where told to stop."""
        self._mark()
        found = self._measure()
        if len(found) == self.total and self.left > 0:
            self._train(found)
        results = self._collect(list(found))
        complete = len(found) == self.total and sum(r["loss"] is not None for r in results["candidates"]) == min(
            self.search.best, self.total
        )
        if complete:
            checkpoint.finish(self.out_dir)
        if runtime.rank() == 0:
            report.write_json(self.out_dir / FILE, results)
            self._show(results, complete)

    def _mark(self) -> None:
        """From here on a failure leaves the folder as it is: other shards may be at work in it."""
        if runtime.rank() == 0:
            checkpoint.replace_text(self.out_dir / "latest", "candidates")
            (self.out_dir / "candidates").mkdir(exist_ok=True)
        runtime.barrier()

    def _mine(self, number: int) -> bool:
        return number % self.search.shards == self.search.shard

    def _folder(self, candidate: Candidate) -> Path:
        return self.out_dir / "candidates" / candidate.name

    def _measure(self) -> dict[Candidate, dict]:
        """Zero-shot loss and speed of this shard's candidates, and of the others' where they are known (collective)."""
        found, proposals, number = {}, self.space.proposals(self.config.seed), 0
        progress = runtime.Progress("candidates", self.total, "candidates")
        candidate = next(proposals, None)
        while candidate and self.left > 0:
            measured = self._known(candidate, "measured.json")
            if not measured and self._mine(number):
                measured = self._measured(candidate)
            if measured:
                found[candidate] = measured
                progress.update(len(found), f", {candidate.name}: {measured['zero_shot_loss']:.3f}")
            number += 1
            try:
                candidate = proposals.send(measured.get("zero_shot_loss"))
            except StopIteration:
                self.total = number  # optuna may find fewer than it was asked for
                break
        return found

    def _known(self, candidate: Candidate, name: str) -> dict:
        """What a file of a candidate says, the same on all ranks; empty where it isn't there.

        Raises:
            UserError: it is of other scores or another text.
        """
        box, path = [None], self._folder(candidate) / name
        with runtime.agreed():
            if runtime.rank() == 0 and path.is_file():
                box = [_results(path)]
        dist.broadcast_object_list(box, src=0)
        marks = self._marks(candidate)
        if box[0] and {key: box[0].get(key) for key in marks} != marks:
            raise UserError(
                f"{path} was measured with other scores or another held-out text than these: give another out_dir, or remove it."
            )
        return box[0] or {}

    def _write(self, candidate: Candidate, name: str, found: dict) -> dict:
        if runtime.rank() == 0:
            self._folder(candidate).mkdir(exist_ok=True)
            report.write_json(self._folder(candidate) / name, self._marks(candidate) | found)
        runtime.barrier()
        return self._known(candidate, name)  # rank 0's numbers: others may differ in the last bit

    def _plan(self, candidate: Candidate) -> Plan:
        prune, said = self._studied(candidate.prune)
        plan = make_plan(self.source.arch, self.source.fingerprint, self.scores, prune)
        plan.statistic.update(said)
        return plan

    def _studied(self, prune: PruneConfig) -> tuple[PruneConfig, dict[str, str]]:
        """See `study.apply`; a candidate that keeps all blocks asks it nothing."""
        path = None if prune.blocks is None else self.config.study
        return study.apply(path, self.source.arch.blocks, self.source.fingerprint, prune)

    def _marks(self, candidate: Candidate) -> dict:
        """What a result depends on beside the run's config."""
        if candidate not in self.digests:
            self.digests[candidate] = self._plan(candidate).digest()
        return {"plan": self.digests[candidate], "text": self.text_hash}

    def _measured(self, candidate: Candidate) -> dict:
        """Cut a candidate in memory and measure it; one model at a time."""
        plan, dtype = self._plan(candidate), self.config.dtype.value
        model = prune.build_pruned(self.source, plan, self.config.parallel, dtype, self.reader)
        found = {"zero_shot_loss": self._loss(model, plan.target)}
        del model
        if self.search.latency and runtime.rank() == 0:
            found |= latency.measure(plan.target, self.source.hf, self.search.speed, dtype)
        self.left -= 1
        return self._write(candidate, "measured.json", found)

    def _loss(self, model: Model, arch: Architecture) -> float:
        """Nats a token over all held-out files (collective)."""
        dp, settings = runtime.dp_group(), self.config.evaluate
        rows = evaluate.evaluate_windows(
            self.text,
            evaluate.ShardedModel(model, arch).nll,
            micro_batch=settings.micro_batch,
            max_windows=settings.max_windows,
            dp_rank=dp.rank(),
            dp_size=dp.size(),
            group=dp,
        )
        return sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)

    def _train(self, found: dict[Candidate, dict]) -> None:
        """Train this shard's share of the best, some at a time (collective)."""
        best = sorted(found, key=lambda c: (found[c]["zero_shot_loss"], c.name))[: self.search.best]
        mine = [candidate for number, candidate in enumerate(best) if self._mine(number)]
        left = [c for c in mine if not (self._folder(c) / "distill" / checkpoint.COMPLETE).is_file()]
        for some in itertools.batched(left, self.search.together):
            some = some[: int(min(self.left, len(some)))]
            if not some:
                break
            runtime.log(
                f"training {', '.join(candidate.name for candidate in some)}; {len(left)} of the best are not yet"
            )
            self._trained(some)
            self.left -= len(some)

    def _trained(self, candidates: Sequence[Candidate]) -> None:
        """Prune candidates on disk and train them, or go on with that; their held-out losses are written at every look."""
        config, runs = self.config, []
        given = {field.name: getattr(config, field.name) for field in fields(Run)}
        for candidate in candidates:
            plan, folder = self._plan(candidate), self._folder(candidate)
            pruned = folder / "prune"
            if not (pruned / checkpoint.COMPLETE).is_file():
                with checkpoint.claimed(pruned, {"stage": "prune", "source": config.source, "plan": plan.digest()}):
                    prune.prune(self.source, plan, pruned, config.parallel)
            run = DistillRun(**given, student=str(pruned), teacher=config.teacher, out_dir=str(folder / "distill"))
            run.distill = distillation(config)
            runs.append(run)
        looks = [*range(self.search.look_every, self.search.steps, self.search.look_every), self.search.steps]

        def look(number: int, trainer: train.Trainer) -> None:
            candidate = candidates[number]
            before = self._known(candidate, "trained.json")
            losses = dict(zip(before.get("steps", []), before.get("losses", []), strict=True))
            losses[trainer.step] = self._loss(trainer.model, trainer.arch)
            runtime.log(f"{candidate.name}: held-out loss {losses[trainer.step]:.4f} after {trainer.step} steps")
            self._write(candidate, "trained.json", {"steps": list(losses), "losses": list(losses.values())})

        gc.collect()  # see `prune.build_pruned`: the candidates before, their teacher and their optimizers
        students = [checkpoint.open_checkpoint(run.student, "student") for run in runs]
        stage.run(runs, distillation(config), students, self.teacher, looks, look)

    def _collect(self, candidates: list[Candidate]) -> dict:
        """The search's results as they go into search.json, best first: by loss, then by zero-shot loss."""
        rows = []
        for candidate in candidates:
            measured, trained = (self._known(candidate, f"{name}.json") for name in ("measured", "trained"))
            losses = dict(zip(trained.get("steps", []), trained.get("losses", []), strict=True))
            row = {
                "name": candidate.name,
                "sizes": {a: getattr(candidate.target, a) for a in ("blocks", "hidden", "ffn", "heads", "groups")},
                **counts.figures(candidate.target, self.search.budget),
                "zero_shot_loss": measured["zero_shot_loss"],
                "steps": list(losses),
                "losses": list(losses.values()),
                "loss": losses.get(self.search.steps),
                "overrides": " ".join([candidate.overrides, *self._study_override(candidate)]),
            }
            rows.append(row | {key: measured.get(key) for key in (*SPEEDS, "measured_on")})
        rows.sort(key=lambda r: (r["loss"] is None, r["loss"] or r["zero_shot_loss"], r["name"]))
        return {
            "model": self.source.fingerprint,
            "scores": self.scores.digest(),
            "combinations": self.space.combinations,
            "left_out": dict(self.space.left_out),
            "candidates": rows,
        }

    def _study_override(self, candidate: Candidate) -> list[str]:
        return [f"study={self.config.study}"] if self.config.study and candidate.prune.blocks is not None else []

    def _show(self, results: dict, complete: bool) -> None:
        """The table, the pictures, and what to do next (rank 0)."""
        rows, notes = results["candidates"], []
        if not rows:
            return
        by_zero_shot = sorted(row["zero_shot_loss"] for row in rows)
        shown = [
            {
                "candidate": row["name"],
                "parameters": row["parameters"],
                "without_embeddings": row["without_embeddings"],
                "zero-shot rank": by_zero_shot.index(row["zero_shot_loss"]) + 1,
                "zero-shot loss": row["zero_shot_loss"],
                f"loss after {self.search.steps} steps": row["loss"],
            }
            | ({"prefill tokens/s": row["prefill_tokens_per_second"]} if self.search.latency else {})
            | ({"decode tokens/s": row["decode_tokens_per_second"]} if self.search.latency else {})
            for row in rows
        ]
        reasons = "".join(f"; {reason}: {n}" for reason, n in results["left_out"].items())
        notes.append(f"{len(rows)} of {self.total} candidates, from {results['combinations']:,} combinations{reasons}")
        machines = sorted({row["measured_on"] for row in rows if row["measured_on"]})
        notes += [f"speed on {'; '.join(machines)}: random weights, {_words(self.search.speed)}"] if machines else []
        if not complete:
            notes.append("not finished: the same command (of every shard) goes on from here")
        notes.append(f"plan of the first: {rows[0]['overrides']}")
        pictures = pictures_search.draw(results, self.out_dir)
        report.table("search", shown, [*notes, f"figures: {self.out_dir}/{FILE}", f"pictures: {', '.join(pictures)}"])


def _words(speed) -> str:
    return f"batch {speed.batch}, prompt {speed.prompt}, {speed.generated} tokens, median of {speed.repetitions}"
