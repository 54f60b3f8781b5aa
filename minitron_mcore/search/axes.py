"""The sizes of each axis of an architecture search, from search.* settings. No torch import."""

import math
from collections.abc import Iterator

from minitron_mcore.config.search import SearchConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import as_count

AXES = {"blocks": "L", "hidden": "H", "ffn": "F", "heads": "N", "groups": "G", "experts": "E"}
"""Axis -> its letter in a candidate's name."""
SETTINGS = (*AXES, "expansion")
"""Settings of `search` that list sizes; expansion gives ffn as a multiple of hidden."""
MAX_AXIS_SIZES = 10_000


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
    sizes = {f"search.{name}": (getattr(search, name), 1) for name in positive}
    sizes["search.best"] = search.best, 0
    sizes |= {f"search.budget.{name}": (getattr(budget, name), 1) for name in ("context", "batch")}
    speed = ("batch", "prompt", "generated", "repetitions")
    sizes |= {f"search.speed.{name}": (getattr(search.speed, name), 1) for name in speed}
    yield from (f"{name} is {n}; it must be at least {low}." for name, (n, low) in sizes.items() if n < low)
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


def _range(axis: str, value: dict) -> list[float]:
    """The sizes of {start, stop, step}: all whole numbers, or all shares (multiples of hidden, for expansion)."""
    numbers = [value.get(key) for key in ("start", "stop", "step")]
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
