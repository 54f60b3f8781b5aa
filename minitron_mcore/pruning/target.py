"""The target architecture of a prune config, checked against the source and a recipe's published counts. No torch import."""

import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture


def as_count(value: object, total: int, prefix: str) -> int:
    """A size as a count: an int is a count, a float above 0 and up to 1.0 is a share of `total`, rounded.

    Args:
        prefix: of error messages ("prune.hidden is").

    Raises:
        UserError: any other value, or a share that rounds to 0.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, float):
        raise UserError(f"{prefix} {value!r}: give a whole number, or a share above 0 and up to 1.0.")
    if not 0 < value <= 1:
        size = f" ({value:.0f})" if value.is_integer() and value > 1 else ""
        raise UserError(
            f"{prefix} {value}, but a number with a decimal point is a share, above 0 and up to 1.0 (all {total}): write a size "
            f"as a whole number{size}."
        )
    count = round(value * total)
    if count < 1:
        raise UserError(f"{prefix} {value}, a share of {total} that rounds to 0: give a larger share, or the size 1.")
    return count


def kept_count(target: int | float | None, total: int, name: str) -> int:
    """The value of prune.`name` as a count (see `as_count`); None keeps all.

    Raises:
        UserError: a count below 1 or above `total`; see `as_count`.
    """
    if target is None:
        return total
    count = as_count(target, total, f"prune.{name} is")
    if not 1 <= count <= total:
        raise UserError(
            f"prune.{name} is {count}, but the source has {total}: give 1 to {total}, or a share between 0 and 1.0."
        )
    return count


class KeptLayers(NamedTuple):
    """Numbers of the source's blocks that are kept, and of those that keep their attention and MLP layers."""

    blocks: list[int]
    attention: list[int]
    mlp: list[int]


def kept_layers(
    source: Architecture, prune: PruneConfig, distances: Mapping[str, SupportsFloat] | None = None
) -> KeptLayers:
    """The layers that a prune config keeps: first blocks are chosen, then attention and MLP layers of the kept blocks.

    Args:
        distances: `blocks.i.{block,attention,mlp}`, 1 - cosine of input and output; the lowest are dropped. None gives the right
            numbers of layers, but not the choice that scores would make.

    Raises:
        UserError: all problems: layers that do not exist or too many of them, nothing kept, a block that keeps neither layer.
    """
    problems: list[str] = []

    def choose(option: str, candidates: list[int], total: int, preferred: Container[int]) -> list[int]:
        def score(block: int) -> float:
            kind = option.removesuffix("s")
            return float(distances[f"blocks.{block}.{kind}"]) if distances else block in preferred

        try:
            return _choose(prune, option, candidates, total, score)
        except UserError as error:
            problems.append(str(error))
            return candidates

    blocks = choose("blocks", list(range(source.blocks)), source.blocks, {*prune.drop_attention, *prune.drop_mlp})
    blocks_with = {part: [b for b in source.blocks_with(part) if b in blocks] for part in ("attention", "mlp")}
    preferred = {*prune.drop_mlp, *source.no_mlp}
    attention = choose("attention", blocks_with["attention"], source.blocks - len(source.no_attention), preferred)
    mlp = choose("mlp", blocks_with["mlp"], source.blocks - len(source.no_mlp), set(blocks) - set(attention))
    if not problems and (empty := sorted(set(blocks) - {*attention, *mlp})):
        dropped = sorted({*range(source.blocks)} - {*blocks} | {*empty})
        problems.append(
            f"block{'s' * (len(empty) > 1)} {format_ranges(empty)} would keep neither attention nor MLP: give "
            f"prune.drop_blocks={dropped} instead of prune.blocks, or keep more attention or MLP layers."
        )
    refuse(problems)
    return KeptLayers(blocks, attention, mlp)


def _choose(
    prune: PruneConfig, option: str, candidates: list[int], total: int, score: Callable[[int], float]
) -> list[int]:
    """The candidates that prune.drop_<option> does not name or, for a count in prune.<option>, those with the highest scores."""
    dropped, size = getattr(prune, f"drop_{option}"), getattr(prune, option)
    count = len(candidates) if size is None else kept_count(size, total, option)
    if dropped:
        if not set(dropped) < set(candidates) or len(set(dropped)) != len(dropped):
            what = "the source has" if option == "blocks" else f"the kept ones with {option} are"
            raise UserError(
                f"prune.drop_{option} {list(dropped)}: give different blocks, not all; {what} {format_ranges(candidates)}."
            )
        kept = [block for block in candidates if block not in dropped]
        if size is not None and count != len(kept):
            raise UserError(
                f"prune.{option} is {count}, but prune.drop_{option} leaves {len(kept)}: give one of the two."
            )
        return kept
    if count > len(candidates):
        limit = len(candidates)
        raise UserError(f"prune.{option} is {count}, but the kept blocks have {limit}: give 1 to {limit}.")
    return sorted(sorted(candidates, key=lambda block: -score(block))[:count])


def format_ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def target_architecture(
    source: Architecture, prune: PruneConfig, distances: Mapping[str, SupportsFloat] | None = None
) -> Architecture:
    """The architecture with the sizes of a prune config and the layers of `kept_layers`.

    Raises:
        UserError: all problems: a size above the source's, heads that the kept groups do not divide or hold, too few heads for a
            merge, layers that do not exist, experts of a model without experts.
    """
    sizes, problems = {}, []
    for axis in ("hidden", "ffn", "heads", "groups", "experts"):
        sizes[axis] = total = getattr(source, axis)
        if axis == "experts" and not source.experts:
            if prune.experts is not None:
                problems.append(f"prune.experts is {prune.experts}, but the source has no experts: remove it.")
            continue
        try:
            sizes[axis] = kept_count(getattr(prune, axis), total, axis)
        except UserError as error:
            problems.append(str(error))
    if prune.heads is None:
        sizes["heads"] = sizes["groups"] * source.heads_per_group
    problems += _head_problems(source, prune, sizes["heads"], sizes["groups"])
    try:
        kept = kept_layers(source, prune, distances)
    except UserError as error:
        problems.append(str(error))
    refuse(problems)
    without = (
        tuple(n for n, block in enumerate(kept.blocks) if block not in part) for part in (kept.attention, kept.mlp)
    )
    changes: dict[str, Any] = dict(zip(("no_attention", "no_mlp"), without, strict=True)) | sizes
    return dataclasses.replace(source, blocks=len(kept.blocks), **changes)


def _head_problems(source: Architecture, prune: PruneConfig, heads: int, groups: int) -> Iterator[str]:
    """Query heads that the kept groups do not divide or hold, or that cannot be merged."""
    size = source.heads_per_group
    near = min(max(1, round(heads / groups)), size) * groups
    if prune.merge_heads and source.traits.qk_norm:
        yield (
            f"prune.merge_heads adds up the queries of heads, but {source.traits.hf_class} normalises queries: give "
            "prune.merge_heads=false."
        )
    if heads % groups:
        yield f"prune.heads {heads} is not a multiple of the {groups} key/value groups: give {near}."
    elif heads > groups * size:
        yield f"prune.heads {heads} is more than the {groups * size} query heads of {groups} key/value groups: give {near}."
    elif prune.merge_heads and 2 * heads < groups * size:
        yield (
            f"prune.merge_heads needs half of a group's {size} query heads, but prune.heads {heads} keeps {heads // groups}: "
            f"give {math.ceil(size / 2) * groups} heads or more, or prune.merge_heads=false."
        )


def check_counts(target: Architecture, parameters: int | None, without_embeddings: int | None) -> None:
    """Check a target against a recipe's published parameter counts; None is not checked.

    Raises:
        UserError: a count differs.
    """
    counts = {
        "parameters": parameter_table.count(target),
        "without_embeddings": parameter_table.count(target, embeddings=False),
    }
    published = {"parameters": parameters, "without_embeddings": without_embeddings}
    different = [
        f"{name} {count:,} where the recipe's model has {published[name]:,}"
        for name, count in counts.items()
        if published[name] not in (None, count)
    ]
    if different:
        raise UserError(
            f"the plan's target has {' and '.join(different)}: keep the recipe's prune.*, or give "
            "recipe.parameters=null recipe.without_embeddings=null for a model of your own."
        )
