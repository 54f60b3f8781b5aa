"""Checks of the importance settings. No torch import."""

from collections.abc import Iterator

from minitron_mcore.config import ranges
from minitron_mcore.config.settings import ImportanceConfig, Statistic
from minitron_mcore.models.architecture import Architecture


def problems(arch: Architecture, config: ImportanceConfig, dp_size: int) -> Iterator[str]:
    """One sentence for each invalid setting: sizes below 1, sequences longer than the model's positions, fewer samples than
    data-parallel ranks, a statistic that the model does not support."""
    counts = ("samples", "sequence_length", "micro_batch")
    yield from ranges.at_least(1, {f"importance.{name}": getattr(config, name) for name in counts})
    yield from ranges.positions("importance.sequence_length", config.sequence_length, model=arch.max_positions)
    if 1 <= config.samples < dp_size:
        yield f"importance.samples is {config.samples}, fewer than the {dp_size} data-parallel ranks: give at least that many."
    yield from statistic_problems(arch, config)


def statistic_problems(arch: Architecture, statistic: Statistic) -> Iterator[str]:
    """Experts support the default statistic only: an expert receives tokens of many samples, mixed."""
    names = ("sequence", "batch", "ffn_site", "weighted")
    changed = [name for name in names if getattr(statistic, name) != getattr(Statistic(), name)]
    if arch.experts and changed:
        options = ", ".join(f"importance.{name}={getattr(statistic, name)}" for name in changed)
        yield f"{options} is not supported for experts, which are scored by the mean over all tokens: remove it."
