"""Plots of an architecture search: ranks against steps, loss against parameters and against speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from minitron_mcore.reporting.plots import COLOURS, DPI

Row = Mapping
"""A candidate in search.json."""


def plot_search(results: Mapping, folder: Path) -> list[str]:
    """Write the plots for which there are results; returns their paths.

    Args:
        results: the content of search.json.
    """
    rows = results["candidates"]
    plots = {"parameters.png": lambda png: plot_sizes(rows, png)}
    if any(row["steps"] for row in rows):
        plots["ranks.png"] = lambda png: plot_ranks(rows, png)
    if any(row["decode_tokens_per_second"] for row in rows):
        plots["speed.png"] = lambda png: plot_speed(rows, png)
    for name, plot in plots.items():
        plot(folder / name)
    return [str(folder / name) for name in plots]


def _label(row: Row) -> str:
    return row["name"].replace("_", " ")


def plot_ranks(rows: Sequence[Row], png: Path) -> None:
    """Plot held-out loss and rank of the trained candidates against steps; step 0 is zero-shot (arXiv 2407.14679, figure 9)."""
    trained = [row for row in rows if row["steps"]]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, ranks = figure.subplots(1, 2, sharex=True)
    curves = {
        _label(row): {0: row["zero_shot_loss"]} | dict(zip(row["steps"], row["losses"], strict=True)) for row in trained
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


def plot_sizes(rows: Sequence[Row], png: Path) -> None:
    """Plot loss against parameters: hollow is just pruned, filled is after training."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, rows, "parameters")
    axes.set(xlabel="parameters", ylabel="held-out loss (nats / token)")
    figure.legend(fontsize="small", ncols=2, loc="outside upper center")
    axes.xaxis.set_major_formatter(EngFormatter(places=1))
    figure.savefig(png, dpi=DPI)


def plot_speed(rows: Sequence[Row], png: Path) -> None:
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


def _loss(row: Row) -> float:
    return row["zero_shot_loss"] if row["loss"] is None else row["loss"]


def _scatter(axes: Axes, rows: Sequence[Row], key: str) -> None:
    trained = [row for row in rows if row["loss"] is not None]
    points = {"just pruned": ([(r[key], r["zero_shot_loss"]) for r in rows], {"facecolors": "none"})}
    points["trained"] = ([(row[key], row["loss"]) for row in trained], {})
    for n, (name, (at, style)) in enumerate(points.items()):
        if at:
            axes.scatter(*zip(*at, strict=True), edgecolors=COLOURS[n], **({"color": COLOURS[n]} | style), label=name)
    for row in rows:
        axes.annotate(_label(row), (row[key], _loss(row)), fontsize=6, xytext=(4, 4), textcoords="offset points")
    axes.margins(x=0.25)  # room for the names
    axes.grid(alpha=0.3)
