"""Which blocks a model can spare: the sets of blocks to measure, the rules that choose among them, and the file that a plan reads.
No torch import.

A point is what the model does without some of its blocks, on held-out text:

    dropped   the blocks, ascending, counted from 0
    loss      cross-entropy, nats a token
    kl        forward KL from the full model, nats a token
    mse       sum (M_full - M)^2 / sum M_full^2 over the logits M (arXiv 2511.16664)
    accuracy  share of multiple-choice questions answered right; None without questions
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from minitron_mcore.config.settings import DepthConfig, DepthKind, DepthMetric, PruneConfig
from minitron_mcore.config.stages import DepthRun
from minitron_mcore.errors import UserError, result_of
from minitron_mcore.pruning.target import as_count, resolve, spans
from minitron_mcore.reading import check_format_version, read_json

FILE = "depth.json"
FIGURES = ("loss", "kl", "mse", "accuracy")

Measure = Callable[[Sequence[int]], dict]
"""Dropped blocks -> their point; asking again costs nothing."""
Ranking = Callable[[Iterable[dict]], list[dict]]
"""Points -> the same, the one that is missed least first."""


def problems(config: DepthRun, blocks: int) -> Iterator[str]:
    """What keeps a model of so many blocks from being studied like this."""
    settings = config.depth
    for size in settings.sizes:
        try:
            count = as_count(size, blocks, "depth.sizes has")
        except UserError:
            count = 0
        if count not in range(1, blocks):
            yield (
                f"depth.sizes has {size}, but the model has {blocks} blocks: give 1 to {blocks - 1}, or a share with a point that "
                "comes to as many (0.5)."
            )
    if not settings.sizes:
        yield "depth.sizes is empty: give numbers of blocks to drop, depth.sizes=[1,2,4]."
    for name in ("windows", "sequence_length", "micro_batch", "limit"):
        if (value := getattr(settings, name)) is not None and value < 1:
            yield f"depth.{name} is {value}; it must be at least 1."
    if settings.metric == DepthMetric.accuracy and settings.choices is None:
        yield "depth.metric is accuracy, but there are no questions: give depth.choices=/path/to/winogrande.jsonl."
    if settings.metric == DepthMetric.cosine and config.scores is None:
        yield "depth.metric is cosine, which importance runs measure: give scores=/path/to/importance."


def sizes(config: DepthConfig, blocks: int) -> list[int]:
    """Numbers of blocks to drop, ascending."""
    return sorted({as_count(size, blocks, "depth.sizes has") for size in config.sizes})


def swept(config: DepthConfig, blocks: int) -> list[int]:
    """Sizes whose runs are measured at every position: those asked for, and single blocks where the choice builds on them."""
    alone = set() if config.kind == DepthKind.contiguous else {1}
    return sorted({*sizes(config, blocks), *alone})


def runs(blocks: int, size: int) -> list[list[int]]:
    """Every run of `size` neighbours."""
    return [list(range(first, first + size)) for first in range(blocks - size + 1)]


def count(config: DepthConfig, blocks: int) -> int:
    """Points of a study at most: the whole model, all runs, and the sets that are chosen from them."""
    asked, alone = sizes(config, blocks), swept(config, blocks)
    total = 1 + sum(blocks - size + 1 for size in alone)
    if 1 in alone:
        total += sum(size > 1 for size in asked)
    if config.kind == DepthKind.iterative:
        total += sum(blocks - gone for gone in range(1, asked[-1]))
    return total


def standard_error(accuracy: float, questions: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / questions)


def ranking(metric: DepthMetric, cosines: Sequence[float] = (), questions: int = 1) -> Ranking:
    """Order points by how little they are missed by a metric; of equals the one with less loss comes first.

    Accuracies within one standard error of the best are equals: such differences are mostly chance, and chance leads to blocks
    whose loss is nats higher.

    Args:
        cosines: for the metric of that name: 1 - cos(input, output) of each block; a set's is their sum.
        questions: for accuracy: how many were asked; others may have none.
    """

    def ranked(points: Iterable[dict]) -> list[dict]:
        points, enough = list(points), 1.0
        if metric == DepthMetric.accuracy:
            best = max(point["accuracy"] for point in points)
            enough = best - standard_error(best, questions)

        def missed(point: dict) -> tuple[float, float]:
            if metric == DepthMetric.cosine:
                return sum(cosines[block] for block in point["dropped"]), point["loss"]
            if metric == DepthMetric.accuracy:
                return -min(point["accuracy"], enough), point["loss"]
            return point[metric.value], point["loss"]

        return sorted(points, key=missed)

    return ranked


def contiguous(blocks: int, size: int, measure: Measure, ranked: Ranking) -> list[int]:
    return ranked(map(measure, runs(blocks, size)))[0]["dropped"]


def scattered(blocks: int, size: int, measure: Measure, ranked: Ranking) -> list[int]:
    alone = ranked(measure([block]) for block in range(blocks))
    return sorted(point["dropped"][0] for point in alone[:size])


def iterative(blocks: int, size: int, measure: Measure, ranked: Ranking) -> list[int]:
    dropped: list[int] = []
    while len(dropped) < size:
        left = [block for block in range(blocks) if block not in dropped]
        dropped = ranked(measure(sorted([*dropped, block])) for block in left)[0]["dropped"]
    return dropped


RULES = {DepthKind.contiguous: contiguous, DepthKind.scattered: scattered, DepthKind.iterative: iterative}


def decide(config: DepthConfig, blocks: int, measure: Measure, ranked: Ranking) -> list[dict]:
    """What each kind of choice would drop, measured as a whole: single blocks that are hardly missed may be missed together.

    Returns:
        A point for each size and each kind that the study has the points for, with size, kind, and taken: it is the one that
        the study chooses.
    """
    kinds = [kind for kind in RULES if kind == config.kind or kind != DepthKind.iterative]
    if 1 not in swept(config, blocks):
        kinds = [DepthKind.contiguous]
    found = []
    for size in sizes(config, blocks):
        rows = [
            {"size": size, "kind": kind.value} | measure(RULES[kind](blocks, size, measure, ranked)) for kind in kinds
        ]
        taken = next(row for row in ranked(rows) if config.kind in (DepthKind.best, row["kind"]))
        found += [row | {"taken": row is taken} for row in rows]
    return found


def warnings(
    rows: Sequence[Mapping], metric: DepthMetric, ranked: Ranking, chance: float | None, questions: int
) -> Iterator[str]:
    """Where a choice is not what it seems: another kind is missed less as a whole, or the questions are answered by chance."""
    by = DepthMetric.loss if metric == DepthMetric.cosine else metric
    order = ranking(by) if metric == DepthMetric.cosine else ranked
    for taken in (row for row in rows if row["taken"]):
        best = order(row for row in rows if row["size"] == taken["size"])[0]
        if best["dropped"] != taken["dropped"]:
            names = dict.fromkeys((by.value, "loss"))  # of equal accuracies the loss decides
            figures = ", ".join(f"{name} {best[name]:.4g} against {taken[name]:.4g}" for name in names)
            yield (
                f"warning: of {taken['size']} blocks the {best['kind']} choice, {spans(best['dropped'])}, is missed less as a "
                f"whole: {figures} (depth.kind={best['kind']})."
            )
        if taken["accuracy"] is not None and taken["accuracy"] <= chance + standard_error(chance, questions):
            yield (
                f"warning: without {spans(taken['dropped'])} the questions are answered no better than by chance "
                f"({taken['accuracy']:.3f}, chance {chance:.3f} +- {standard_error(chance, questions):.3f})."
            )


def load(path: str | Path, fingerprint: str) -> dict:
    """Read depth.json (or the folder of a depth run).

    Raises:
        UserError: no such file, not a study, a study of another model.
    """
    path = result_of(path, FILE, "depth study", "run launch/depth.py to its end, or give study=")
    study = read_json(path, "run launch/depth.py again")
    check_format_version(study, path, "run launch/depth.py again")
    try:
        study["drop"] = {int(size): [int(block) for block in blocks] for size, blocks in study["drop"].items()}
        model = study["model"], study["metric"], study["kind"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not a depth study ({type(error).__name__}: {error}): run launch/depth.py again."
        ) from error
    if model[0] != fingerprint:
        raise UserError(
            f"the depth study in {path} is of model {model[0]}, but the source is {fingerprint}: run launch/depth.py on it."
        )
    return study


def apply(
    path: str | Path | None, blocks: int, fingerprint: str, prune: PruneConfig
) -> tuple[PruneConfig, dict[str, str]]:
    """Name the blocks that go: a study's choice for a model of so many blocks.

    Returns:
        The config with drop_blocks, and what the plan says of the choice; without a study as it was, and nothing.

    Raises:
        UserError: see `load`; no number of blocks, blocks that are named already, a number that the study did not decide.
    """
    if path is None:
        return prune, {}
    study = load(path, fingerprint)
    if prune.drop_blocks:
        raise UserError(
            f"prune.drop_blocks {list(prune.drop_blocks)} and study {path} both choose blocks: leave one of them out."
        )
    left = resolve(prune.blocks, blocks, "blocks")
    if blocks - left not in study["drop"]:
        known = ", ".join(str(blocks - size) for size in sorted(study["drop"]))
        raise UserError(
            f"prune.blocks is {left}, but the study in {path} decided which go for {known} of {blocks} blocks: give one of these, "
            f"or study again with depth.sizes=[{blocks - left}]."
        )
    dropped = study["drop"][blocks - left]
    return dataclasses.replace(prune, drop_blocks=dropped), {"depth": f"{study['metric']}, {study['kind']}"}
