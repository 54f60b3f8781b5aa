"""Plots of a depth study."""

import os
from collections.abc import Mapping

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minitron_mcore.reporting.plots import DPI


def plot_depth(study: Mapping, png: str | os.PathLike) -> None:
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
        _curves(axes, study, name)
        axes.axhline(study["baseline"][name], color="black", linestyle="--", linewidth=1, label="full model")
        if name == "accuracy":
            axes.axhline(study["chance"], color="grey", linestyle=":", linewidth=1, label="chance")
        axes.set(title=f"{label.split(' (')[0].capitalize()} without a run of blocks", ylabel=label)
        axes.set_xlabel("last dropped block (from 0)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(png, dpi=DPI)


def _curves(axes: Axes, study: Mapping, name: str) -> None:
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
