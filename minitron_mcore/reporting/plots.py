"""Plots of scores, plans and losses, drawn without a display."""

import os
import re
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from safetensors.numpy import load_file
from torch import Tensor

from minitron_mcore.pruning.plan import Plan
from minitron_mcore.reading import damage_as_user_error, open_tensors, read_json_lines

# Okabe and Ito's palette, for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 130
_READABLE_COLUMNS = 48


def _by_block(scores: Mapping[str, np.ndarray], kind: str) -> dict[int, np.ndarray]:
    """Block -> its vector blocks.{i}.{kind}."""
    names = {int(m[1]): name for name in scores if (m := re.fullmatch(rf"blocks\.(\d+)\.{kind}", name))}
    return {block: scores[names[block]] for block in sorted(names)}


def _heat(axes: Axes, rows: dict[int, np.ndarray], extent_x: tuple[float, float], **labels: str) -> None:
    """A heat map on a log scale, one row per block; the lowest and highest hundredth are clipped."""
    scored = np.stack(list(rows.values()))
    grid = np.full((max(rows) + 1 - min(rows), scored.shape[1]), np.nan)
    grid[[block - min(rows) for block in rows]] = scored
    low, high = np.quantile(scored[scored > 0], (0.01, 0.99)) if scored.any() else (1.0, 1.0)
    norm = LogNorm(low, max(high, low * 1.01), clip=True)
    extent = (*extent_x, max(rows) + 0.5, min(rows) - 0.5)
    image = axes.imshow(grid, norm=norm, cmap="cividis", aspect="auto", interpolation="nearest", extent=extent)
    axes.figure.colorbar(image, ax=axes, label="score", extend="both")
    axes.set(ylabel="block (from 0)", **labels)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _hidden(axes: Axes, scores: Mapping[str, np.ndarray]) -> bool:
    if "hidden" not in scores:
        return False
    ordered = np.sort(scores["hidden"])[::-1]
    axes.semilogy(np.arange(1, len(ordered) + 1), ordered, color=COLOURS[0])
    axes.set(title=f"Hidden channels (H = {len(ordered)})", xlabel="channels, most important first")
    axes.set(ylabel="score (summed over norms)")
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    return True


def _ffn(axes: Axes, scores: Mapping[str, np.ndarray]) -> bool:
    if not (rows := _by_block(scores, "ffn")):
        return False
    quantiles = {i: np.quantile(row, np.linspace(0, 1, 101)) for i, row in rows.items()}
    channels = max(row.shape[-1] for row in rows.values())
    _heat(axes, quantiles, (0, 100), title=f"FFN channels (F = {channels})", xlabel="quantile within the block (%)")
    return True


def _heads(axes: Axes, scores: Mapping[str, np.ndarray]) -> bool:
    if not (rows := _by_block(scores, "heads")):
        return False
    heads = max(map(len, rows.values()))
    padded = {i: np.pad(row, (0, heads - len(row))) for i, row in rows.items()}
    _heat(axes, padded, (-0.5, heads - 0.5), title=f"Attention heads (N = {heads})", xlabel="head (from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return True


def _depth(axes: Axes, scores: Mapping[str, np.ndarray]) -> bool:
    if not (blocks := _by_block(scores, "block")):
        return False
    axes.bar(list(blocks), [float(value) for value in blocks.values()], color=COLOURS[5], label="block")
    for kind, name, marker, colour in (("attention", "attention", "o", COLOURS[1]), ("mlp", "MLP", "^", COLOURS[2])):
        if values := _by_block(scores, kind):
            heights = [float(value) for value in values.values()]
            axes.plot(list(values), heights, marker, markersize=4, color=colour, label=f"its {name}")
    axes.set_yscale("log")
    axes.set(title="Depth", xlabel="block (from 0)", ylabel="1 - cosine of input and output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=3, fontsize="small")
    return True


def statistic(scores_file: str | os.PathLike) -> str:
    """How scores were computed, in one line, from their metadata."""
    with open_tensors(scores_file, "np", "score again") as file:
        metadata = file.metadata() or {}
    shown = ("metric", "aggregation", "ffn_site", "samples", "tokens")
    return "; ".join(f"{key.replace('_', ' ')}: {metadata[key]}" for key in shown if key in metadata)


def plot_importance(scores_file: str | os.PathLike, png: str | os.PathLike) -> None:
    """Plot a scores.safetensors: sorted hidden scores, ffn quantiles per block, heads and depth; absent scores are left empty."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    figure.suptitle(statistic(scores_file), fontsize="small")
    with damage_as_user_error(scores_file, "score again"):
        scores = load_file(scores_file)
        for axes, draw in zip(figure.subplots(2, 2).flat, (_hidden, _ffn, _heads, _depth), strict=True):
            if not draw(axes, scores):
                axes.set_axis_off()
        figure.savefig(png, dpi=DPI)


def plot_plan(plan: Plan, scores: Mapping[str, Tensor], png: str | os.PathLike) -> None:
    """Plot the kept share of each axis in each block of the source, and its share of the summed score; dropped blocks are hatched.

    Args:
        scores: the vectors from which the plan was made (see `importance.scores`).
    """
    rows = _kept_shares(plan, {name: vector.numpy() for name, vector in scores.items()})
    grid = np.array(list(rows.values()))
    figure = Figure(figsize=(12, 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.9")
    for block in plan.dropped_blocks():
        axes.axvspan(block - 0.5, block + 0.5, facecolor="0.9", edgecolor="0.6", hatch="//", linewidth=0)
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
    if grid.shape[1] <= _READABLE_COLUMNS:
        for (row, block), share in np.ndenumerate(grid):
            if not np.isnan(share):
                colour = "white" if share < 0.5 else "black"
                axes.text(block, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel="block of the source (from 0)", title="Kept of each block (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, format=PercentFormatter(1))
    figure.savefig(png, dpi=DPI)


def _kept_shares(plan: Plan, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of `plot_plan`: one value per block of the source, NaN where the axis is dropped."""
    chosen = {"hidden": dict.fromkeys(plan.blocks, plan.hidden), "heads": plan.heads}
    if plan.source.experts:
        chosen |= {"experts": {block: list(experts) for block, experts in plan.experts.items()}}
        total = plan.source.ffn  # the channels of all experts form one row
        ffn = {b: [e * total + i for e, kept in chosen.items() for i in kept] for b, chosen in plan.experts.items()}
        chosen |= {"ffn": ffn}
    else:
        chosen |= {"ffn": plan.ffn}
    rows = {}
    for axis, kept in chosen.items():
        units, held = np.full((2, plan.source.blocks), np.nan)
        for block in set(plan.blocks) & set(kept):
            vector = scores["hidden" if axis == "hidden" else f"blocks.{block}.{axis}"].flatten()
            units[block] = len(kept[block]) / len(vector)
            held[block] = vector[kept[block]].sum() / vector.sum()
        rows |= {axis: units, f"{axis}, by score": held}
    if plan.target.groups < plan.source.groups:  # groups have the score of their heads
        units = np.full(plan.source.blocks, np.nan)
        units[list(plan.groups)] = plan.target.groups / plan.source.groups
        rows["key/value groups"] = units
    return rows


def plot_losses(runs: Mapping[str, str | os.PathLike], png: str | os.PathLike) -> None:
    """Plot KD loss, LM loss and learning rate of runs (label -> metrics.jsonl) against tokens.

    Pale lines are single steps, solid lines a running mean over a twentieth of the run, points the held-out loss.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    names = (("kd_loss", "KD loss (nats / token)"), ("lm_loss", "LM loss (nats / token)"), ("lr", "learning rate"))
    for axes, (key, label) in zip(panels, names, strict=True):
        for i, (run, path) in enumerate(runs.items()):
            rows = [row for row in read_json_lines(path, "move it away") if row.get(key) is not None]
            with damage_as_user_error(path, "move it away"):
                points = [(float(row["tokens"]), float(row[key])) for row in rows]
            tokens, values = np.array(points).reshape(-1, 2).T
            colour, width = COLOURS[i % len(COLOURS)], max(1, len(rows) // 20)
            if key != "lr" and width > 1:
                axes.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.8)
                values = np.convolve(values, np.full(width, 1 / width), mode="valid")
                tokens = tokens[width // 2 :][: len(values)]
            axes.plot(tokens, values, color=colour, label=run)
            if key == "lm_loss" and (measured := [row for row in rows if row.get("heldout_loss") is not None]):
                with damage_as_user_error(path, "move it away"):
                    points = [(float(row["tokens"]), float(row["heldout_loss"])) for row in measured]
                axes.plot(*zip(*points, strict=True), "o--", color=colour, label=f"{run}, held out", markersize=4)
                axes.legend()
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if any(line.get_ydata().max(initial=0) > 0 for line in panels[0].lines):  # without a teacher all are 0
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_formatter("{x:g}")
    panels[0].legend()
    panels[-1].set_xlabel("tokens trained on")
    panels[-1].xaxis.set_major_formatter(EngFormatter())
    panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    with damage_as_user_error(", ".join(map(str, runs.values())), "move them away"):  # figures too large to draw
        figure.savefig(png, dpi=DPI)
