"""What a scoring run must keep. No torch import."""

from collections.abc import Iterator

from minitron_mcore.config import ranges
from minitron_mcore.config.settings import ImportanceConfig, Statistic
from minitron_mcore.models.architecture import Architecture


def problems(arch: Architecture, config: ImportanceConfig, dp_size: int) -> Iterator[str]:
    """A size below 1, sequences longer than the model's positions, fewer samples than data-parallel ranks, a statistic that the
    model doesn't have."""
    sizes = {name: getattr(config, name) for name in ("samples", "sequence_length", "micro_batch")}
    yield from (f"importance.{name} is {size}; it must be at least 1." for name, size in sizes.items() if size < 1)
    yield from ranges.positions("importance.sequence_length", config.sequence_length, model=arch.max_positions)
    if 1 <= config.samples < dp_size:
        yield f"importance.samples is {config.samples}, fewer than the {dp_size} data-parallel ranks: give at least that many."
    yield from statistic_problems(arch, config)


def statistic_problems(arch: Architecture, statistic: Statistic) -> Iterator[str]:
    """Another than the default for experts: tokens of many samples reach one mixed."""
    names = ("sequence", "batch", "ffn_site", "weighted")
    wanted, only = ({name: getattr(s, name) for name in names} for s in (statistic, Statistic()))
    if arch.experts and wanted != only:
        given = ", ".join(f"importance.{name}={wanted[name]}" for name in names if wanted[name] != only[name])
        yield f"{given} cannot be had of experts, which are scored by the mean over all tokens: leave it out."
