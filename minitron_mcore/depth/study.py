"""Selection of the blocks to drop: the sets to measure, the selection rules, and the file that a plan reads. No torch import.

A point holds the metrics of the model without a set of blocks, on held-out text:

    dropped   the blocks, ascending, counted from 0
    loss      cross-entropy, nats per token
    kl        forward KL divergence from the full model, nats per token
    mse       sum (M_full - M)^2 / sum M_full^2 over the logits M (arXiv 2511.16664)
    accuracy  fraction of multiple-choice questions answered correctly; None without questions
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minitron_mcore.config.settings import DepthConfig, DepthKind, DepthMetric, PruneConfig
from minitron_mcore.config.stages import DepthRun
from minitron_mcore.errors import UserError, result_file
from minitron_mcore.pruning.target import as_count, format_ranges, kept_count
from minitron_mcore.reading import check_format_version, damage_as_user_error, read_json

FILE = "depth.json"
FIGURES = ("loss", "kl", "mse", "accuracy")

Measure = Callable[[Sequence[int]], dict[str, Any]]
"""Dropped blocks -> their point; a repeated call costs nothing."""
Ranking = Callable[[Iterable[dict[str, Any]]], list[dict[str, Any]]]
"""Points -> the same points, the one with the least damage first."""


def problems(config: DepthRun, blocks: int) -> Iterator[str]:
    """One sentence for each setting that is invalid for a model of `blocks` blocks."""
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


def sweep_sizes(config: DepthConfig, blocks: int) -> list[int]:
    """Lengths of contiguous runs to measure at every position: `sizes`, and 1 for the rules that use single blocks."""
    single = set() if config.kind == DepthKind.contiguous else {1}
    return sorted({*sizes(config, blocks), *single})


def contiguous_runs(blocks: int, size: int) -> list[list[int]]:
    """Every run of `size` neighbouring blocks."""
    return [list(range(first, first + size)) for first in range(blocks - size + 1)]


def max_points(config: DepthConfig, blocks: int) -> int:
    """Upper bound of the points of a study: the full model, the sweep, and the sets that the rules measure."""
    drop_sizes, swept = sizes(config, blocks), sweep_sizes(config, blocks)
    total = 1 + sum(blocks - size + 1 for size in swept)
    if 1 in swept:
        total += sum(size > 1 for size in drop_sizes)
    if config.kind == DepthKind.iterative:
        total += sum(blocks - dropped for dropped in range(1, drop_sizes[-1]))
    return total


def standard_error(accuracy: float, questions: int) -> float:
    """Of an accuracy measured on this many questions (binomial)."""
    return math.sqrt(accuracy * (1 - accuracy) / questions)


def make_ranking(metric: DepthMetric, cosines: Sequence[float] = (), questions: int = 1) -> Ranking:
    """A function that orders points by the damage that a metric shows; the loss decides between equal points.

    Accuracies within one standard error of the best count as equal: such differences are mostly chance, and would select
    blocks whose loss is nats higher.

    Args:
        cosines: for the cosine metric: 1 - cos(input, output) of each block; the damage of a set is their sum.
        questions: for the accuracy metric: number of questions.
    """

    def rank(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        points, equal_from = list(points), 1.0
        if metric == DepthMetric.accuracy:
            best = max(point["accuracy"] for point in points)
            equal_from = best - standard_error(best, questions)

        def damage(point: dict[str, Any]) -> tuple[float, float]:
            if metric == DepthMetric.cosine:
                return sum(cosines[block] for block in point["dropped"]), point["loss"]
            if metric == DepthMetric.accuracy:
                return -min(point["accuracy"], equal_from), point["loss"]
            return point[metric.value], point["loss"]

        return sorted(points, key=damage)

    return rank


def select_contiguous(blocks: int, size: int, measure: Measure, rank: Ranking) -> list[int]:
    """The best run of `size` neighbours."""
    return rank(map(measure, contiguous_runs(blocks, size)))[0]["dropped"]


def select_scattered(blocks: int, size: int, measure: Measure, rank: Ranking) -> list[int]:
    """The `size` best single blocks, each measured alone."""
    single = rank(measure([block]) for block in range(blocks))
    return sorted(point["dropped"][0] for point in single[:size])


def select_iterative(blocks: int, size: int, measure: Measure, rank: Ranking) -> list[int]:
    """Greedy: one block after another, each measured without those before it."""
    dropped: list[int] = []
    while len(dropped) < size:
        remaining = [block for block in range(blocks) if block not in dropped]
        dropped = rank(measure(sorted([*dropped, block])) for block in remaining)[0]["dropped"]
    return dropped


SELECTION_RULES = {
    DepthKind.contiguous: select_contiguous,
    DepthKind.scattered: select_scattered,
    DepthKind.iterative: select_iterative,
}


def choose(config: DepthConfig, blocks: int, measure: Measure, rank: Ranking) -> list[dict[str, Any]]:
    """The sets that the rules select, each measured as a whole: blocks that do little damage alone may do much together.

    Returns:
        A point for each size and each rule whose points the study measures, with "size", "kind" and "taken". "taken" marks the
        set that the study chooses.
    """
    kinds = [kind for kind in SELECTION_RULES if kind == config.kind or kind != DepthKind.iterative]
    if 1 not in sweep_sizes(config, blocks):
        kinds = [DepthKind.contiguous]
    chosen = []
    for size in sizes(config, blocks):
        rows = [
            {"size": size, "kind": kind.value} | measure(SELECTION_RULES[kind](blocks, size, measure, rank))
            for kind in kinds
        ]
        best = next(row for row in rank(rows) if config.kind in (DepthKind.best, row["kind"]))
        chosen += [row | {"taken": row is best} for row in rows]
    return chosen


def warnings(
    rows: Sequence[dict[str, Any]], metric: DepthMetric, rank: Ranking, chance: float | None, questions: int
) -> Iterator[str]:
    """Warn where another kind of selection does less damage, or where the accuracy is within one standard error of chance.

    Args:
        rows: of `choose`.
        rank: of `make_ranking` for `metric`; the cosine metric is compared by loss.
        chance: expected accuracy of random answers; None without questions.
    """
    compared = DepthMetric.loss if metric == DepthMetric.cosine else metric
    order = make_ranking(compared) if metric == DepthMetric.cosine else rank
    for chosen in (row for row in rows if row["taken"]):
        best = order(row for row in rows if row["size"] == chosen["size"])[0]
        if best["dropped"] != chosen["dropped"]:
            names = dict.fromkeys((compared.value, "loss"))  # the loss decides between equal accuracies
            figures = ", ".join(f"{name} {best[name]:.4g} against {chosen[name]:.4g}" for name in names)
            yield (
                f"warning: for {chosen['size']} dropped blocks the {best['kind']} choice, {format_ranges(best['dropped'])}, does "
                f"less damage: {figures} (depth.kind={best['kind']})."
            )
        if chosen["accuracy"] is not None and chance is not None:
            error = standard_error(chance, questions)
            if chosen["accuracy"] <= chance + error:
                yield (
                    f"warning: without {format_ranges(chosen['dropped'])} the accuracy {chosen['accuracy']:.3f} is no better than "
                    f"chance ({chance:.3f} +- {error:.3f})."
                )


def load_study(path: str | Path, fingerprint: str) -> dict[str, Any]:
    """Read depth.json, or the folder of a depth run.

    Args:
        fingerprint: of the model that the study must belong to.

    Raises:
        UserError: the file is missing, is not a study, or is a study of another model.
    """
    path = result_file(path, FILE, "depth study", "run launch/depth.py to its end, or give study=")
    remedy = "run launch/depth.py again"
    study = read_json(path, remedy)
    check_format_version(study, path, remedy)
    with damage_as_user_error(path, remedy):
        study["drop"] = {int(size): [int(block) for block in blocks] for size, blocks in study["drop"].items()}
        model, _, _ = study["model"], study["metric"], study["kind"]
    if model != fingerprint:
        raise UserError(
            f"the depth study in {path} is of model {model}, but the source is {fingerprint}: run launch/depth.py on it."
        )
    return study


def apply_study(
    path: str | Path | None, blocks: int, fingerprint: str, prune: PruneConfig
) -> tuple[PruneConfig, dict[str, str]]:
    """Set prune.drop_blocks to a study's choice for a model of `blocks` blocks.

    Returns:
        The config with drop_blocks, and the plan's record of the choice; the config as it was and {} without a study.

    Raises:
        UserError: see `load_study`; prune.drop_blocks is set too; the study has no choice for prune.blocks.
    """
    if path is None:
        return prune, {}
    study = load_study(path, fingerprint)
    if prune.drop_blocks:
        raise UserError(
            f"prune.drop_blocks {list(prune.drop_blocks)} and study {path} both choose blocks: remove one of them."
        )
    kept = kept_count(prune.blocks, blocks, "blocks")
    if blocks - kept not in study["drop"]:
        known = ", ".join(str(blocks - size) for size in sorted(study["drop"]))
        raise UserError(
            f"prune.blocks is {kept}, but the study in {path} has a choice for {known} of {blocks} blocks: give one of these, "
            f"or study again with depth.sizes=[{blocks - kept}]."
        )
    dropped = study["drop"][blocks - kept]
    return dataclasses.replace(prune, drop_blocks=dropped), {"depth": f"{study['metric']}, {study['kind']}"}
