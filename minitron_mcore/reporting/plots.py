"""Plots of scores, plans, losses, depth studies and searches, drawn without a display."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
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


def statistic(scores_file: str | Path) -> str:
    """How scores were computed, in one line, from their metadata."""
    with open_tensors(scores_file, "np", "score again") as file:
        metadata = file.metadata() or {}
    shown = ("metric", "aggregation", "ffn_site", "samples", "tokens")
    return "; ".join(f"{key.replace('_', ' ')}: {metadata[key]}" for key in shown if key in metadata)


def plot_importance(scores_file: str | Path, png: str | Path) -> None:
    """Plot a scores.safetensors: sorted hidden scores, ffn quantiles per block, heads and depth; absent scores are left empty."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    figure.suptitle(statistic(scores_file), fontsize="small")
    with damage_as_user_error(scores_file, "score again"):
        scores = load_file(scores_file)
        for axes, draw in zip(figure.subplots(2, 2).flat, (_hidden, _ffn, _heads, _depth), strict=True):
            if not draw(axes, scores):
                axes.set_axis_off()
        figure.savefig(png, dpi=DPI)


def plot_plan(plan: Plan, scores: Mapping[str, Tensor], png: str | Path) -> None:
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
    rows: dict[str, np.ndarray] = {}
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


def plot_losses(runs: Mapping[str, str | Path], png: str | Path) -> None:
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


def plot_depth(study: Mapping[str, Any], png: str | Path) -> None:
    """Plot loss and, if measured, accuracy without each contiguous run of blocks against the last dropped block (arXiv 2408.11796,
    figures 8 and 9); one curve per length. A ring marks the study's choice.

    Args:
        study: the content of depth.json.
    """
    figures = {"loss": "loss (nats / token)", "accuracy": "accuracy"}
    if study["baseline"]["accuracy"] is None:
        del figures["accuracy"]
    figure = Figure(figsize=(6.5 * len(figures), 5), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures.items(), strict=True):
        _depth_curves(axes, study, name)
        axes.axhline(study["baseline"][name], color="black", linestyle="--", linewidth=1, label="full model")
        if name == "accuracy":
            axes.axhline(study["chance"], color="grey", linestyle=":", linewidth=1, label="chance")
        axes.set(title=f"{label.split(' (')[0].capitalize()} without a run of blocks", ylabel=label)
        axes.set_xlabel("last dropped block (from 0)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(png, dpi=DPI)


def _depth_curves(axes: Axes, study: Mapping[str, Any], name: str) -> None:
    sizes = sorted({point["size"] for point in study["sweep"]})
    for at, size in enumerate(sizes):
        colour = colormaps["viridis"](0.9 * at / max(1, len(sizes) - 1))
        points = [point for point in study["sweep"] if point["size"] == size]
        last = [point["dropped"][-1] for point in points]
        axes.plot(last, [point[name] for point in points], ".-", color=colour, label=f"{size} block{'s' * (size > 1)}")
        dropped = study["drop"].get(str(size))
        for point in points:
            if point["dropped"] == dropped:
                axes.plot(dropped[-1], point[name], "o", markersize=11, fillstyle="none", color=colour)


def plot_search(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the plots for which there are results; returns their paths.

    Args:
        results: the content of search.json.
    """
    rows = results["candidates"]
    plots: dict[str, Callable[[Sequence[Mapping[str, Any]], Path], None]] = {"parameters.png": plot_sizes}
    if any(row["steps"] for row in rows):
        plots["ranks.png"] = plot_ranks
    if any(row["decode_tokens_per_second"] for row in rows):
        plots["speed.png"] = plot_speed
    for name, plot in plots.items():
        plot(rows, folder / name)
    return [str(folder / name) for name in plots]


def _candidate(row: Mapping[str, Any]) -> str:
    return row["name"].replace("_", " ")


def plot_ranks(rows: Sequence[Mapping[str, Any]], png: Path) -> None:
    """Plot held-out loss and rank of the trained candidates against steps; step 0 is zero-shot (arXiv 2407.14679, figure 9)."""
    trained = [row for row in rows if row["steps"]]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, ranks = figure.subplots(1, 2, sharex=True)
    curves = {
        _candidate(row): {0: row["zero_shot_loss"]} | dict(zip(row["steps"], row["losses"], strict=True))
        for row in trained
    }
    for n, (name, curve) in enumerate(curves.items()):
        style = {"color": COLOURS[n % len(COLOURS)], "marker": "o", "markersize": 4, "label": name}
        losses.plot(list(curve), list(curve.values()), **style)
        at = {step: sorted(c[step] for c in curves.values() if step in c).index(curve[step]) + 1 for step in curve}
        ranks.plot(list(at), list(at.values()), **style)
    losses.set(title="Held-out loss", ylabel="nats / token")
    ranks.set(title="Rank among the trained", ylabel="rank by held-out loss")
    ranks.invert_yaxis()
    ranks.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, ranks):
        axes.set_xlabel("steps of distillation (0: just pruned)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    losses.legend(fontsize="small")
    figure.savefig(png, dpi=DPI)


def plot_sizes(rows: Sequence[Mapping[str, Any]], png: Path) -> None:
    """Plot loss against parameters: hollow is just pruned, filled is after training."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, rows, "parameters")
    axes.set(xlabel="parameters", ylabel="held-out loss (nats / token)")
    figure.legend(fontsize="small", ncols=2, loc="outside upper center")
    axes.xaxis.set_major_formatter(EngFormatter(places=1))
    figure.savefig(png, dpi=DPI)


def plot_speed(rows: Sequence[Mapping[str, Any]], png: Path) -> None:
    """Plot loss against measured speed; a line joins the Pareto front, of the trained candidates if there are any."""
    measured = [row for row in rows if row["decode_tokens_per_second"]]
    compared = [row for row in measured if row["loss"] is not None] or measured
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        key = f"{kind}_tokens_per_second"
        _scatter(axes, measured, key)
        best = pareto_front([(row[key], _loss(row)) for row in compared])
        axes.plot(
            *zip(*best, strict=True), color="black", linewidth=0.8, zorder=0, label="no other is both faster and better"
        )
        axes.set(xlabel=f"{kind}, tokens / s", title=kind.capitalize())
    figure.axes[0].set_ylabel("held-out loss (nats / token)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize="small", ncols=3, loc="outside upper center")
    figure.savefig(png, dpi=DPI)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (speed, loss) points that no other point beats in both, fastest first."""
    best: list[tuple[float, float]] = []
    for speed, loss in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or loss < best[-1][1]:
            best.append((speed, loss))
    return best


def _loss(row: Mapping[str, Any]) -> float:
    return row["zero_shot_loss"] if row["loss"] is None else row["loss"]


def _scatter(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    trained = [row for row in rows if row["loss"] is not None]
    points = {
        "just pruned": [(r[key], r["zero_shot_loss"]) for r in rows],
        "trained": [(r[key], r["loss"]) for r in trained],
    }
    for (name, at), colour, face in zip(points.items(), COLOURS, ("none", COLOURS[1]), strict=False):
        if at:
            axes.scatter(*zip(*at, strict=True), edgecolors=colour, facecolors=face, label=name)
    for row in rows:
        axes.annotate(_candidate(row), (row[key], _loss(row)), fontsize=6, xytext=(4, 4), textcoords="offset points")
    axes.margins(x=0.25)  # room for the names
    axes.grid(alpha=0.3)
