"""The sizes and layers that a prune config asks for, held against the source and what a recipe published. No torch import."""

import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import NamedTuple, SupportsFloat

from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture


def as_count(value: object, total: int, said: str) -> int:
    """A size or share of `total` as a count: an int is itself, a float above 0 and up to 1.0 that share, rounded.

    Args:
        said: how a sentence about it begins ("prune.hidden is").

    Raises:
        UserError: anything else; a share that comes to none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, float):
        raise UserError(f"{said} {value!r}: give a whole number, or a share above 0 and up to 1.0.")
    if not 0 < value <= 1:
        size = f" ({value:.0f})" if value.is_integer() and value > 1 else ""
        raise UserError(
            f"{said} {value}, but a number with a point is a share, above 0 and up to 1.0 (all {total}): write a size without a "
            f"point{size}."
        )
    count = round(value * total)
    if count < 1:
        raise UserError(f"{said} {value}, a share of {total} that comes to 0: give a larger share, or the size 1.")
    return count


def kept_count(target: int | float | None, total: int, name: str) -> int:
    """A target of prune.`name` as a count (see `as_count`); None is all.

    Raises:
        UserError: a target below 1 unit or above the source; see `as_count`.
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
    """What a target keeps of its source's depth: blocks, and those of them that keep attention and MLP; all source blocks."""

    blocks: list[int]
    attention: list[int]
    mlp: list[int]


def kept_layers(
    source: Architecture, prune: PruneConfig, distances: Mapping[str, SupportsFloat] | None = None
) -> KeptLayers:
    """The layers that a prune config keeps: blocks are chosen first, then attention and MLP layers among those of kept blocks.

    Args:
        distances: `blocks.i.{block,attention,mlp}`; the lowest go first. Without them the counts are right, and the blocks stand
            in for those that scores would choose.

    Raises:
        UserError: all of: layers that are not there, more than there are, none, a block that would keep neither of the two.
    """
    wrong: list[str] = []

    def choose(option: str, there: list[int], total: int, needed: Container[int]) -> list[int]:
        def score(block: int) -> float:
            kind = option.removesuffix("s")
            return float(distances[f"blocks.{block}.{kind}"]) if distances else block in needed

        try:
            return _choose(prune, option, there, total, score)
        except UserError as mistake:
            wrong.append(str(mistake))
            return there

    blocks = choose("blocks", list(range(source.blocks)), source.blocks, {*prune.drop_attention, *prune.drop_mlp})
    blocks_with = {part: [b for b in source.blocks_with(part) if b in blocks] for part in ("attention", "mlp")}
    needed = {*prune.drop_mlp, *source.no_mlp}
    attention = choose("attention", blocks_with["attention"], source.blocks - len(source.no_attention), needed)
    mlp = choose("mlp", blocks_with["mlp"], source.blocks - len(source.no_mlp), set(blocks) - set(attention))
    if not wrong and (empty := sorted(set(blocks) - {*attention, *mlp})):
        gone = sorted({*range(source.blocks)} - {*blocks} | {*empty})
        wrong.append(
            f"nothing would be left of block{'s' * (len(empty) > 1)} {format_ranges(empty)}, neither attention nor MLP: say "
            f"prune.drop_blocks={gone} instead of prune.blocks, or keep more attention or MLP layers."
        )
    refuse(wrong)
    return KeptLayers(blocks, attention, mlp)


def _choose(prune: PruneConfig, option: str, there: list[int], total: int, score: Callable[[int], float]) -> list[int]:
    """Those of the blocks `there` that prune.drop_<option> leaves or, of prune.<option>, the highest; of equals the first."""
    dropped, wanted = getattr(prune, f"drop_{option}"), getattr(prune, option)
    count = len(there) if wanted is None else kept_count(wanted, total, option)
    if dropped:
        if not set(dropped) < set(there) or len(set(dropped)) != len(dropped):
            what = "the source has" if option == "blocks" else f"the kept ones with {option} are"
            raise UserError(
                f"prune.drop_{option} {list(dropped)}: give different blocks, not all; {what} {format_ranges(there)}."
            )
        left = [block for block in there if block not in dropped]
        if wanted is not None and count != len(left):
            raise UserError(
                f"prune.{option} is {count}, but prune.drop_{option} leaves {len(left)}: give one of the two."
            )
        return left
    if count > len(there):
        raise UserError(f"prune.{option} is {count}, but the kept blocks have {len(there)}: give 1 to {len(there)}.")
    return sorted(sorted(there, key=lambda block: -score(block))[:count])


def format_ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def target_architecture(
    source: Architecture, prune: PruneConfig, distances: Mapping[str, SupportsFloat] | None = None
) -> Architecture:
    """The sizes that a prune config asks for, and the layers (see `depth`).

    Raises:
        UserError: all of: a size above the source's, heads that the kept groups don't divide or don't hold, too few of them for a
            merge, layers that are not there, experts of a model that has none.
    """
    sizes, wrong = {}, []
    for axis in ("hidden", "ffn", "heads", "groups", "experts"):
        sizes[axis] = total = getattr(source, axis)
        if axis == "experts" and not source.experts:
            if prune.experts is not None:
                wrong.append(f"prune.experts is {prune.experts}, but the source has no experts: leave it out.")
            continue
        try:
            sizes[axis] = kept_count(getattr(prune, axis), total, axis)
        except UserError as mistake:
            wrong.append(str(mistake))
    if prune.heads is None:
        sizes["heads"] = sizes["groups"] * source.heads_per_group
    wrong += _head_problems(source, prune, sizes["heads"], sizes["groups"])
    try:
        kept = kept_layers(source, prune, distances)
    except UserError as mistake:
        wrong.append(str(mistake))
    refuse(wrong)
    gone = {
        f"no_{part}": tuple(n for n, block in enumerate(kept.blocks) if block not in getattr(kept, part))
        for part in ("attention", "mlp")
    }
    return dataclasses.replace(source, **sizes, blocks=len(kept.blocks), **gone)


def _head_problems(source: Architecture, prune: PruneConfig, heads: int, groups: int) -> Iterator[str]:
    """What keeps so many query heads from being shared out over the kept groups, or dropped ones from being merged."""
    held = source.heads_per_group
    near = min(max(1, round(heads / groups)), held) * groups
    if prune.merge_heads and source.traits.qk_norm:
        yield (
            f"prune.merge_heads adds up the queries of heads, which does not hold for {source.traits.hf_class}: it puts a norm on "
            "them afterwards; give prune.merge_heads=false."
        )
    if heads % groups:
        yield f"prune.heads {heads} is not a multiple of the {groups} key/value groups: give {near}."
    elif heads > groups * held:
        yield f"prune.heads {heads} is more than the {groups * held} query heads of {groups} key/value groups: give {near}."
    elif prune.merge_heads and 2 * heads < groups * held:
        yield (
            f"prune.merge_heads needs half of a group's {held} query heads, but prune.heads {heads} keeps {heads // groups}: "
            f"give {math.ceil(held / 2) * groups} heads or more, or prune.merge_heads=false."
        )


def check_counts(target: Architecture, parameters: int | None, without_embeddings: int | None) -> None:
    """Hold a target against a recipe's published counts; None asks nothing.

    Raises:
        UserError: names what was found and what was published.
    """
    found = {
        "parameters": parameter_table.count(target),
        "without_embeddings": parameter_table.count(target, embeddings=False),
    }
    published = {"parameters": parameters, "without_embeddings": without_embeddings}
    wrong = [
        f"{name} {count:,} where the recipe's model has {published[name]:,}"
        for name, count in found.items()
        if published[name] not in (None, count)
    ]
    if wrong:
        raise UserError(
            f"the plan's target has {' and '.join(wrong)}: leave prune.* as the recipe has it, or say "
            "recipe.parameters=null recipe.without_embeddings=null for a model of your own."
        )
