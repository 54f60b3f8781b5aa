"""The sizes that a prune config asks for, held against the source and against what a recipe published. No torch import."""

import dataclasses

from minitron_mcore.config import PruneConfig
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import table
from minitron_mcore.models.architecture import Architecture


def resolve(target: float | None, total: int, name: str) -> int:
    """A target as a count: a whole number is itself, a fraction below 1 a share of `total`, None all of it.

    Raises:
        UserError: a target below 1 unit or above the source.
    """
    if target is None:
        return total
    count = round(target * total) if 0 < target < 1 else target
    if count != int(count) or not 1 <= count <= total:
        raise UserError(
            f"prune.{name} is {target:g}, but the source has {total}: give 1 to {total}, or a share between 0 and 1."
        )
    return int(count)


def target_architecture(source: Architecture, prune: PruneConfig) -> Architecture:
    """The sizes that a prune config asks for.

    Raises:
        UserError: all of: a size above the source's, heads that the groups don't divide, blocks that are not there, experts of a
            model that has none.
    """
    sizes, wrong = {}, []
    for axis in ("hidden", "ffn", "heads", "experts", "blocks"):
        sizes[axis] = total = getattr(source, axis)
        if axis == "experts" and not source.experts:
            if prune.experts is not None:
                wrong.append(f"prune.experts is {prune.experts:g}, but the source has no experts: leave it out.")
        elif axis == "blocks" and prune.drop_blocks:
            sizes[axis] -= len(prune.drop_blocks)
            if not set(prune.drop_blocks) < set(range(total)) or len(set(prune.drop_blocks)) != len(prune.drop_blocks):
                wrong.append(
                    f"prune.drop_blocks {prune.drop_blocks}: give different blocks from 0 to {total - 1}, not all."
                )
        else:
            try:
                sizes[axis] = resolve(getattr(prune, axis), total, axis)
            except UserError as mistake:
                wrong.append(str(mistake))
    if (heads := sizes["heads"]) % source.groups:
        near = max(1, heads // source.groups) * source.groups
        wrong.append(f"prune.heads {heads} is not a multiple of the {source.groups} key/value groups: give {near}.")
    refuse(wrong)
    return dataclasses.replace(source, **sizes)


def check_counts(target: Architecture, parameters: int | None, without_embeddings: int | None) -> None:
    """Hold a target against a recipe's published counts; None asks nothing.

    Raises:
        UserError: names what was found and what was published.
    """
    found = {"parameters": table.count(target), "without_embeddings": table.count(target, embeddings=False)}
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
