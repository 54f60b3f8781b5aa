"""Candidates of an architecture search: all combinations of the axes' sizes that fit or, in large spaces, those that optuna
proposes. No torch import.

A combination fits if no size is above the source's, groups divide heads, the layout divides the model, hidden and ffn are multiples
of `search.multiple`, the Hugging Face class can hold it, and its cost is within the budget.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from minitron_mcore.config.search import BudgetConfig, SearchConfig
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.config.stages import SearchRun
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import architecture, flops, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import target_architecture
from minitron_mcore.search import axes
from minitron_mcore.search.axes import AXES

MAX_GRID = 10_000
"""Up to so many combinations, all are tried; above, optuna proposes."""
MAX_IDLE_TRIALS = 500
"""Proposals in a row without a new candidate after which the search ends."""
UNSUPPORTED_PRUNE_SETTINGS = ("merge_heads", "drop_attention", "drop_mlp", "attention", "mlp")
"""Settings of `prune` that a search does not use."""


@dataclass(frozen=True)
class Candidate:
    """A target architecture that fits, and the prune settings that make it."""

    target: Architecture
    sizes: tuple[tuple[str, int], ...]
    """(axis, size) where the size differs from the source's"""

    @property
    def name(self) -> str:
        """Sizes of blocks, hidden, ffn and heads; of groups and experts where they differ from the source's."""
        named = {"blocks", "hidden", "ffn", "heads", *dict(self.sizes)}
        return "_".join(f"{letter}{getattr(self.target, axis)}" for axis, letter in AXES.items() if axis in named)

    @property
    def prune(self) -> PruneConfig:
        """The prune settings of this candidate."""
        return PruneConfig(**dict(self.sizes))

    @property
    def overrides(self) -> str:
        """Command-line overrides with which launch/plan.py plans this candidate."""
        return " ".join(["prune=keep", *(f"prune.{axis}={size}" for axis, size in self.sizes)])


class NearMiss(NamedTuple):
    """The combination that misses only the budget, and by the least."""

    excess: float
    candidate: Candidate


def cost_of(arch: Architecture, budget: BudgetConfig) -> float | None:
    """Cost of an architecture in the budget's unit; None without a budget."""
    if budget.parameters is not None:
        return parameter_table.count(arch)
    if budget.bytes is not None:
        weights = flops.weight_bytes(arch, budget.weights)
        return weights + flops.kv_cache_bytes(arch, budget.context, budget.batch, budget.kv_cache)
    return None if budget.flops is None else flops.prefill_flops(arch, budget.context, budget.batch)


class Space:
    """The combinations of a search's axes, each an architecture that is cut from `source`."""

    def __init__(self, source: Architecture, search: SearchConfig, parallel: ParallelConfig):
        """
        Args:
            parallel: the layout in which candidates are ranked and trained.

        Raises:
            UserError: all invalid settings; see `axes.problems` and `axes.sizes_by_axis`.
        """
        self.source, self.search, self.parallel = source, search, parallel
        refuse(axes.problems(search))
        self.axes = axes.sizes_by_axis(source, search)
        self.left_out: Counter[str] = Counter()
        """Reason -> number of combinations that do not fit; filled by `candidates` and `proposals`."""
        self._near_miss: NearMiss | None = None

    @classmethod
    def of(cls, source: Architecture, config: SearchRun) -> "Space":
        """The space of a search run.

        Raises:
            UserError: a setting of `prune` that a search does not use; see above.
        """
        if ignored := [name for name in UNSUPPORTED_PRUNE_SETTINGS if getattr(config.prune, name)]:
            raise UserError(
                f"prune.{' and prune.'.join(ignored)} has no effect in a search: remove it, and give it to launch/plan.py for the "
                "candidate that you choose."
            )
        return cls(source, config.search, config.parallel)

    @property
    def combinations(self) -> int:
        """Number of combinations, fitting or not."""
        return math.prod(map(len, self.axes.values()))

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """All candidates, by ascending number of parameters.

        Raises:
            UserError: none fits; names the combination nearest to the budget.
        """
        fitting = {}
        for chosen in itertools.product(*self.axes.values()):
            candidate, excess = self._try(dict(zip(self.axes, chosen, strict=True)))
            if not excess:
                fitting[candidate.target] = candidate
        if not fitting:
            raise UserError(self._no_candidate())
        return sorted(fitting.values(), key=lambda c: (parameter_table.count(c.target), c.name))

    def proposals(self, seed: int) -> Generator[Candidate, float, None]:
        """Candidates to measure one after another; `send` takes the loss of the previous candidate.

        Raises:
            UserError: see `candidates`.
        """
        if self.combinations <= MAX_GRID:
            yield from (candidate for candidate in self.candidates)  # a list's iterator has no `send`
        else:
            yield from self._tpe_proposals(seed)

    def _tpe_proposals(self, seed: int) -> Generator[Candidate, float, None]:
        """`search.trials` different candidates from optuna's tree-structured Parzen estimator; deterministic in seed and losses.

        A combination that does not fit is a violated constraint of its trial and is not yielded.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        losses, idle = {}, 0
        while len(losses) < self.search.trials and idle < MAX_IDLE_TRIALS:
            idle += 1
            trial = study.ask()
            chosen = {axis: sizes[trial.suggest_int(axis, 0, len(sizes) - 1)] for axis, sizes in self.axes.items()}
            candidate, excess = self._try(chosen)
            trial.set_constraint("fits", excess)
            if excess > 0:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
            if candidate not in losses:
                losses[candidate], idle = (yield candidate), 0
            study.tell(trial, losses[candidate])
        if not losses:
            raise UserError(self._no_candidate())

    def _try(self, chosen: dict[str, float]) -> tuple[Candidate | None, float]:
        """The candidate of a combination and the relative excess over the budget's tolerance: 0 if it fits, (None, 1) if it fails
        for another reason. Records the reason and the near miss."""
        candidate, reason = self._candidate(chosen)
        if not candidate:
            self.left_out[reason] += 1
            return None, 1.0
        excess = self._excess(candidate.target)
        if excess:
            self.left_out["outside the budget"] += 1
            if self._near_miss is None or excess < self._near_miss.excess:
                self._near_miss = NearMiss(excess, candidate)
        return candidate, excess

    def _candidate(self, chosen: dict[str, float]) -> tuple[Candidate | None, str | None]:
        """A combination as a candidate, or the reason against it; the budget is not checked."""
        source, search = self.source, self.search
        sizes = {axis: int(size) for axis, size in chosen.items() if axis != "expansion"}
        if "expansion" in chosen:
            channels = chosen["expansion"] * sizes.get("hidden", source.hidden)
            sizes["ffn"] = round(channels / search.multiple) * search.multiple
        if any(size > getattr(source, axis) for axis, size in sizes.items()):
            return None, "larger than the source"
        groups = sizes.get("groups", source.groups)
        heads = sizes.get("heads", groups * source.heads_per_group)
        if heads % groups or heads > groups * source.heads_per_group:
            return None, "heads that the groups do not divide or hold"
        if sizes.get("experts", source.experts) < source.experts_per_token:
            return None, "fewer experts than a token takes"
        if any(sizes.get(axis, 0) % search.multiple for axis in ("hidden", "ffn")):
            return None, f"hidden or ffn no multiple of {search.multiple}"
        changed = tuple((axis, sizes[axis]) for axis in AXES if sizes.get(axis) not in (None, getattr(source, axis)))
        target = target_architecture(source, PruneConfig(**dict(changed)))
        if any(architecture.export_problems(target)):
            return None, "heads that do not divide hidden, which the Hugging Face class demands"
        if any(sharding.model_problems(target, self.parallel)):
            return None, "not divided by parallel.*"
        return Candidate(target, changed), None

    def _excess(self, target: Architecture) -> float:
        """Relative distance from the budget beyond the tolerance; 0 within it or without a budget."""
        cost = cost_of(target, self.search.budget)
        if cost is None:
            return 0
        return max(0, abs(cost / self._budget()[1] - 1) - self.search.budget.tolerance)

    def _budget(self) -> tuple[str, float]:
        budget = self.search.budget
        return next((name, n) for name in ("parameters", "bytes", "flops") if (n := getattr(budget, name)) is not None)

    def _no_candidate(self) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
        if not self._near_miss:
            return f"none of the search's combinations fits ({reasons}): give other sizes in search.*."
        name, limit = self._budget()
        nearest = self._near_miss.candidate
        cost = cost_of(nearest.target, self.search.budget)
        return (
            f"no combination has {limit:,.0f} {name} within {self.search.budget.tolerance:g} of it; the nearest is "
            f"{nearest.name} with {cost:,.0f} ({cost / limit - 1:+.1%}). Give other sizes in search.*, another "
            f"search.budget.{name} or a larger search.budget.tolerance (left out: {reasons})."
        )


def rows(candidates: list[Candidate], budget: BudgetConfig) -> list[dict]:
    """Rows for a table: parameters, memory and operations of each candidate."""
    table = []
    for candidate in candidates:
        f = flops.figures(candidate.target, budget)
        table.append(
            {
                "candidate": candidate.name,
                "parameters": f["parameters"],
                "without_embeddings": f["without_embeddings"],
                "weights GB": f["weight_bytes"] / 1e9,
                "KV cache GB": f["kv_cache_bytes"] / 1e9,
                "prefill TFLOP": f["prefill_flops"] / 1e12,
                "decode GFLOP": f["decode_flops"] / 1e9,
            }
        )
    return table
