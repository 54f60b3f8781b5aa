"""Candidates of an architecture search: all combinations of the axes' sizes that fit or, in large spaces, those that optuna
proposes. No torch import.

A combination fits if no size is above the source's, groups divide heads, the layout divides the model, hidden and ffn are multiples
of `search.multiple`, the Hugging Face class can hold it, and its cost is within the budget.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from minitron_mcore.config import ranges
from minitron_mcore.config.search import BudgetConfig, SearchConfig
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.config.stages import SearchRun
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import architecture, flops, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import as_count, target_architecture

AXES = {"blocks": "L", "hidden": "H", "ffn": "F", "heads": "N", "groups": "G", "experts": "E"}
"""Axis -> its letter in a candidate's name."""
SETTINGS = (*AXES, "expansion")
"""Settings of `search` that list sizes; expansion gives ffn as a multiple of hidden."""
MAX_AXIS_SIZES = 10_000
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
        return prune_config(self.sizes)

    @property
    def overrides(self) -> str:
        """Command-line overrides with which launch/plan.py plans this candidate."""
        return " ".join(["prune=keep", *(f"prune.{axis}={size}" for axis, size in self.sizes)])


def prune_config(sizes: Sequence[tuple[str, int]]) -> PruneConfig:
    """The prune settings of (axis, size) pairs."""
    changes: dict[str, Any] = dict(sizes)
    return PruneConfig(**changes)


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
            UserError: all invalid settings; see `problems` and `sizes_by_axis`.
        """
        self.source, self.search, self.parallel = source, search, parallel
        refuse(problems(search))
        self.axes = sizes_by_axis(source, search)
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
            if candidate and not excess:
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
        losses: dict[Candidate, float] = {}
        idle = 0
        while len(losses) < self.search.trials and idle < MAX_IDLE_TRIALS:
            idle += 1
            trial = study.ask()
            chosen = {axis: sizes[trial.suggest_int(axis, 0, len(sizes) - 1)] for axis, sizes in self.axes.items()}
            candidate, excess = self._try(chosen)
            trial.set_constraint("fits", excess)
            if candidate is None or excess > 0:
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
        candidate = self._candidate(chosen)
        if isinstance(candidate, str):
            self.left_out[candidate] += 1
            return None, 1.0
        excess = self._excess(candidate.target)
        if excess:
            self.left_out["outside the budget"] += 1
            if self._near_miss is None or excess < self._near_miss.excess:
                self._near_miss = NearMiss(excess, candidate)
        return candidate, excess

    def _candidate(self, chosen: dict[str, float]) -> Candidate | str:
        """A combination as a candidate, or the reason against it; the budget is not checked."""
        source, search = self.source, self.search
        sizes = {axis: int(size) for axis, size in chosen.items() if axis != "expansion"}
        if "expansion" in chosen:
            channels = chosen["expansion"] * sizes.get("hidden", source.hidden)
            sizes["ffn"] = round(channels / search.multiple) * search.multiple
        if any(size > getattr(source, axis) for axis, size in sizes.items()):
            return "larger than the source"
        groups = sizes.get("groups", source.groups)
        heads = sizes.get("heads", groups * source.heads_per_group)
        if heads % groups or heads > groups * source.heads_per_group:
            return "heads that the groups do not divide or hold"
        if sizes.get("experts", source.experts) < source.experts_per_token:
            return "fewer experts than a token takes"
        if any(sizes.get(axis, 0) % search.multiple for axis in ("hidden", "ffn")):
            return f"hidden or ffn no multiple of {search.multiple}"
        changed = tuple((axis, sizes[axis]) for axis in AXES if sizes.get(axis) not in (None, getattr(source, axis)))
        target = target_architecture(source, prune_config(changed))
        if any(architecture.export_problems(target)):
            return "heads that do not divide hidden, which the Hugging Face class demands"
        if any(sharding.model_problems(target, self.parallel)):
            return "not divided by parallel.*"
        return Candidate(target, changed)

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
        cost = cost_of(nearest.target, self.search.budget) or 0
        return (
            f"no combination has {limit:,.0f} {name} within {self.search.budget.tolerance:g} of it; the nearest is "
            f"{nearest.name} with {cost:,.0f} ({cost / limit - 1:+.1%}). Give other sizes in search.*, another "
            f"search.budget.{name} or a larger search.budget.tolerance (left out: {reasons})."
        )


def rows(candidates: list[Candidate], budget: BudgetConfig) -> list[dict[str, Any]]:
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


def sizes_by_axis(source: Architecture, search: SearchConfig) -> dict[str, list[float]]:
    """Setting -> its different sizes, ascending, for the settings that are not None.

    Raises:
        UserError: a value that is not a list of sizes or {start, stop, step}; see `target.as_count`.
    """
    values = {axis: getattr(search, axis) for axis in SETTINGS}
    return {axis: _sizes(axis, value, source) for axis, value in values.items() if value is not None}


def problems(search: SearchConfig) -> Iterator[str]:
    """One sentence for each invalid setting of a search."""
    budget = search.budget
    if all(getattr(search, axis) is None for axis in SETTINGS):
        yield (
            "the search has no axis: give sizes to choose from, as in search.ffn=[1024,1152] search.blocks=[28,30], or a "
            "window (search=smollm2_100m)."
        )
    if search.ffn is not None and search.expansion is not None:
        yield "search.ffn and search.expansion both set the ffn: give one of them."
    units = [name for name in ("parameters", "bytes", "flops") if getattr(budget, name) is not None]
    if len(units) > 1:
        yield f"search.budget has {' and '.join(units)}: give one of them."
    wrong = [name for name in units if not 0 < getattr(budget, name) < float("inf")]
    yield from (f"search.budget.{name} is {getattr(budget, name):g}; it must be above 0." for name in wrong)
    if not 0 <= budget.tolerance < 1:
        yield f"search.budget.tolerance is {budget.tolerance:g}; it is a share, from 0 to below 1."
    positive = ("multiple", "trials", "steps", "eval_every", "students_per_pass", "shards")
    counts = {f"search.{name}": getattr(search, name) for name in positive}
    counts |= {f"search.budget.{name}": getattr(budget, name) for name in ("context", "batch")}
    speed = ("batch", "prompt", "generated", "repetitions")
    yield from ranges.at_least(1, counts | {f"search.speed.{name}": getattr(search.speed, name) for name in speed})
    yield from ranges.at_least(0, {"search.best": search.best})
    if search.shards >= 1 and not 0 <= search.shard < search.shards:
        yield f"search.shard is {search.shard}, but search.shards is {search.shards}: give 0 to {search.shards - 1}."


def _sizes(axis: str, value: object, source: Architecture) -> list[float]:
    if isinstance(value, dict):
        value = _range(axis, value)
    if not isinstance(value, list) or not value:
        raise UserError(f"search.{axis} is {value}: give a list of sizes, or {{start:..,stop:..,step:..}}.")
    if axis == "expansion":
        if wrong := [x for x in value if not _is_number(x) or not 0 < x < math.inf]:
            raise UserError(f"search.{axis} has {wrong[0]!r}: give numbers above 0, multiples of hidden.")
        return sorted(set(value))
    counts = {as_count(x, getattr(source, axis), f"search.{axis} has") for x in value}
    if min(counts) < 1:
        raise UserError(
            f"search.{axis} has {min(counts)}: give whole sizes from 1, or shares of the source's up to 1.0."
        )
    return sorted(counts)


def _range(axis: str, value: dict[str, Any]) -> list[float]:
    """The sizes of {start, stop, step}: all whole numbers, or all shares (multiples of hidden, for expansion)."""
    numbers: list[Any] = [value.get(key) for key in ("start", "stop", "step")]
    one_kind = len({type(x) for x in numbers}) == 1 or axis == "expansion"
    if len(value) != 3 or not all(map(_is_number, numbers)) or not one_kind or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"search.{axis} is {value}: give a list of sizes, or {{start:..,stop:..,step:..}}, of whole numbers only or "
            "of shares only."
        )
    start, stop, step = numbers
    count = math.floor((stop - start) / step + 1e-9) + 1 if step > 0 else 0
    if not 1 <= count <= MAX_AXIS_SIZES:
        raise UserError(f"search.{axis} is {value}, which makes {max(0, count):,} sizes: give 1 to {MAX_AXIS_SIZES:,}.")
    return [round(start + n * step, 12) for n in range(count)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
