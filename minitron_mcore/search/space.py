"""Candidates of an architecture search: all combinations of the axes' sizes that fit, or of very many those that optuna asks for.
No torch import.

A combination fits when the source has that much of every axis, when groups divide its heads and the layout the model, when it
keeps to `search.multiple`, when its Hugging Face class holds it, and when it costs what the budget says.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from minitron_mcore.config.settings import BudgetConfig, ParallelConfig, PruneConfig, SearchConfig
from minitron_mcore.config.stages import SearchRun
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import architecture, flops, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import as_count, target_architecture

AXES = {"blocks": "L", "hidden": "H", "ffn": "F", "heads": "N", "groups": "G", "experts": "E"}
"""Axis -> its letter in a candidate's name; groups and experts are named where they are not the source's."""
MAX_GRID = 10_000
"""Combinations up to which all are looked at."""
MAX_AXIS_SIZES = 10_000
"""Sizes of an axis."""
MAX_REPEATED_TRIALS = 500
"""Combinations in a row that bring no new candidate, after which optuna's search ends."""


UNSUPPORTED_PRUNE_SETTINGS = ("merge_heads", "drop_attention", "drop_mlp", "attention", "mlp")
"""Of a prune config."""


@dataclass(frozen=True)
class Candidate:
    """A target that fits, and the sizes that a prune config is given for it."""

    target: Architecture
    sizes: tuple[tuple[str, int], ...]
    """(axis, size) where the size is not the source's."""

    @property
    def name(self) -> str:
        named = {"blocks", "hidden", "ffn", "heads", *dict(self.sizes)}
        return "_".join(f"{letter}{getattr(self.target, axis)}" for axis, letter in AXES.items() if axis in named)

    @property
    def prune(self) -> PruneConfig:
        return PruneConfig(**dict(self.sizes))

    @property
    def overrides(self) -> str:
        """What launch/plan.py is told to make this candidate's plan."""
        return " ".join(["prune=keep", *(f"prune.{axis}={size}" for axis, size in self.sizes)])


def cost_of(arch: Architecture, budget: BudgetConfig) -> float | None:
    """An architecture's figure in the unit of a budget; None where the budget asks nothing."""
    if budget.parameters is not None:
        return parameter_table.count(arch)
    if budget.bytes is not None:
        weights = flops.weight_bytes(arch, budget.weights)
        return weights + flops.kv_cache_bytes(arch, budget.context, budget.batch, budget.kv_cache)
    return None if budget.flops is None else flops.prefill_flops(arch, budget.context, budget.batch)


class Space:
    """The combinations of a search's axes, each an architecture cut from `source`."""

    def __init__(self, source: Architecture, search: SearchConfig, parallel: ParallelConfig):
        """`parallel`: the layout that candidates are ranked and trained in.

        Raises:
            UserError: all of: no axis, an axis that is no list of sizes, two ways of giving ffn or the budget, a count below 1.
        """
        self.source, self.search, self.parallel = source, search, parallel
        refuse(self._problems())
        wanted = {axis: getattr(search, axis) for axis in (*AXES, "expansion")}
        self.axes = {axis: _sizes(axis, given, source) for axis, given in wanted.items() if given is not None}
        self.left_out: Counter[str] = Counter()
        """Reason -> combinations that do not fit; filled by `candidates`."""

    @classmethod
    def of(cls, source: Architecture, config: SearchRun) -> "Space":
        """The space of a run, whose candidates are cut by their sizes alone.

        Raises:
            UserError: settings of `prune` beside sizes; see above.
        """
        if ignored := [name for name in UNSUPPORTED_PRUNE_SETTINGS if getattr(config.prune, name)]:
            raise UserError(
                f"prune.{' and prune.'.join(ignored)} has no part in a search: leave it out, and give it to launch/plan.py for the "
                "candidate that you choose."
            )
        return cls(source, config.search, config.parallel)

    def _problems(self) -> Iterator[str]:
        search, budget = self.search, self.search.budget
        if all(getattr(search, axis) is None for axis in (*AXES, "expansion")):
            yield (
                "the search has no axis: give sizes to choose from, as in search.ffn=[1024,1152] search.blocks=[28,30], or a "
                "window (search=smollm2_100m)."
            )
        if search.ffn is not None and search.expansion is not None:
            yield "search.ffn and search.expansion both say the ffn: give one of them."
        given = [name for name in ("parameters", "bytes", "flops") if getattr(budget, name) is not None]
        if len(given) > 1:
            yield f"search.budget has {' and '.join(given)}: give one of them."
        wrong = [name for name in given if not 0 < getattr(budget, name) < float("inf")]
        yield from (f"search.budget.{name} is {getattr(budget, name):g}; it must be above 0." for name in wrong)
        if not 0 <= budget.tolerance < 1:
            yield f"search.budget.tolerance is {budget.tolerance:g}; it is a share, from 0 to below 1."
        least = {
            "multiple": 1,
            "trials": 1,
            "best": 0,
            "steps": 1,
            "eval_every": 1,
            "students_per_pass": 1,
            "shards": 1,
        }
        sizes = {f"search.{name}": (getattr(search, name), low) for name, low in least.items()}
        sizes |= {f"search.budget.{name}": (getattr(budget, name), 1) for name in ("context", "batch")}
        speed = ("batch", "prompt", "generated", "repetitions")
        sizes |= {f"search.speed.{name}": (getattr(search.speed, name), 1) for name in speed}
        yield from (f"{name} is {n}; it must be at least {low}." for name, (n, low) in sizes.items() if n < low)
        if search.shards >= 1 and not 0 <= search.shard < search.shards:
            yield f"search.shard is {search.shard}, but search.shards is {search.shards}: give 0 to {search.shards - 1}."

    @property
    def combinations(self) -> int:
        return math.prod(map(len, self.axes.values()))

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """All that fit, in order of their parameters.

        Raises:
            UserError: none fits; of those that only the budget keeps out, the nearest is named.
        """
        found, near = {}, None
        for chosen in itertools.product(*self.axes.values()):
            candidate, misfit = self._try(dict(zip(self.axes, chosen, strict=True)))
            missed = 0 if misfit else self._misses(candidate.target)
            if misfit or missed:
                self.left_out[misfit or "outside the budget"] += 1
                near = near if misfit else _nearer(near, (missed, candidate))
            else:
                found[candidate.target] = candidate
        if not found:
            raise UserError(self._nothing(near))
        return sorted(found.values(), key=lambda c: (parameter_table.count(c.target), c.name))

    def _try(self, chosen: dict[str, float]) -> tuple[Candidate | None, str | None]:
        """A combination as a candidate, or why it is none; its budget is not looked at."""
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

    def _misses(self, target: Architecture) -> float:
        """By what share of it a target misses the budget, beyond the tolerance."""
        budget, cost = self.search.budget, cost_of(target, self.search.budget)
        if cost is None:
            return 0
        return max(0, abs(cost / self._budget()[1] - 1) - budget.tolerance)

    def _budget(self) -> tuple[str, float]:
        budget = self.search.budget
        return next((name, n) for name in ("parameters", "bytes", "flops") if (n := getattr(budget, name)) is not None)

    def _nothing(self, near: tuple[float, Candidate] | None) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
        if not near:
            return f"none of the search's combinations fits ({reasons}): give other sizes in search.*."
        name, wanted = self._budget()
        nearest = near[1]
        found = cost_of(nearest.target, self.search.budget)
        return (
            f"no combination has {wanted:,.0f} {name} within {self.search.budget.tolerance:g} of it; the nearest is "
            f"{nearest.name} with {found:,.0f} ({found / wanted - 1:+.1%}). Give other sizes in search.*, another "
            f"search.budget.{name} or a larger search.budget.tolerance (left out: {reasons})."
        )

    def proposals(self, seed: int) -> Generator[Candidate, float, None]:
        """Candidates to measure one after another; each `send` takes the loss of the one before.

        Raises:
            UserError: see `candidates`; optuna found none that fits.
        """
        if self.combinations <= MAX_GRID:
            yield from (candidate for candidate in self.candidates)  # a list's iterator would take no losses
        else:
            yield from self._asked(seed)

    def _asked(self, seed: int) -> Generator[Candidate, float, None]:
        """What optuna's tree-structured Parzen estimator asks for: `search.trials` candidates that fit and differ. What misses the
        budget is told as a broken constraint, and costs nothing. The same losses lead to the same candidates. It ends early where
        PATIENCE proposals in a row bring nothing new."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        losses, near, idle = {}, None, 0
        while len(losses) < self.search.trials and idle < MAX_REPEATED_TRIALS:
            idle += 1
            trial = study.ask()
            chosen = {axis: sizes[trial.suggest_int(axis, 0, len(sizes) - 1)] for axis, sizes in self.axes.items()}
            candidate, misfit = self._try(chosen)
            missed = 1.0 if misfit else self._misses(candidate.target)
            trial.set_constraint("fits", missed)
            if missed > 0:
                self.left_out[misfit or "outside the budget"] += 1
                near = near if misfit else _nearer(near, (missed, candidate))
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
            if candidate not in losses:
                losses[candidate], idle = (yield candidate), 0
            study.tell(trial, losses[candidate])
        if not losses:
            raise UserError(self._nothing(near))


def _nearer(one: tuple[float, Candidate] | None, other: tuple[float, Candidate]) -> tuple[float, Candidate]:
    """Of two (miss, candidate) the one that misses by less; of equals the first."""
    return other if one is None or other[0] < one[0] else one


def _sizes(axis: str, given: object, source: Architecture) -> list[float]:
    """The different sizes of an axis, ascending.

    Raises:
        UserError: not a list of sizes, nor {start, stop, step}; see `target.as_count`.
    """
    if isinstance(given, dict):
        given = _range(axis, given)
    if not isinstance(given, list) or not given:
        raise UserError(f"search.{axis} is {given}: give a list of sizes, or {{start:..,stop:..,step:..}}.")
    if axis == "expansion":
        if wrong := [x for x in given if not _is_number(x) or not 0 < x < math.inf]:
            raise UserError(f"search.{axis} has {wrong[0]!r}: give numbers above 0, multiples of hidden.")
        return sorted(set(given))
    counts = {as_count(x, getattr(source, axis), f"search.{axis} has") for x in given}
    if min(counts) < 1:
        raise UserError(
            f"search.{axis} has {min(counts)}: give whole sizes from 1, or shares of the source's up to 1.0."
        )
    return sorted(counts)


def _range(axis: str, given: dict) -> list[float]:
    """The sizes of {start, stop, step}: all whole numbers, or all shares (multiples of hidden, for expansion).

    Raises:
        UserError: other keys, values or kinds of numbers; more than `LONGEST` sizes.
    """
    numbers = [given.get(key) for key in ("start", "stop", "step")]
    whole = len({type(x) for x in numbers}) == 1 or axis == "expansion"
    if len(given) != 3 or not all(map(_is_number, numbers)) or not whole or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"search.{axis} is {given}: give a list of sizes, or {{start:..,stop:..,step:..}}, of whole numbers only or "
            "of shares only."
        )
    start, stop, step = numbers
    count = math.floor((stop - start) / step + 1e-9) + 1 if step > 0 else 0
    if not 1 <= count <= MAX_AXIS_SIZES:
        raise UserError(f"search.{axis} is {given}, which makes {max(0, count):,} sizes: give 1 to {MAX_AXIS_SIZES:,}.")
    return [round(start + n * step, 12) for n in range(count)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows(candidates: list[Candidate], budget: BudgetConfig) -> list[dict]:
    """Rows for a table: a candidate's counts, in units that a person reads."""
    found = []
    for candidate in candidates:
        f = flops.figures(candidate.target, budget)
        found.append(
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
    return found
