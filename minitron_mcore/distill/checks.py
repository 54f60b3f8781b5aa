"""What a training run must keep. No torch import."""

from collections.abc import Iterator

from minitron_mcore.config import DistillConfig, ParallelConfig
from minitron_mcore.models.architecture import Architecture


def problems(
    student: Architecture, teacher: Architecture | None, config: DistillConfig, parallel: ParallelConfig, dp_size: int
) -> Iterator[str]:
    """A size below 1, a batch that the data-parallel ranks or the interleaved pipeline don't divide, a
    warm-up as long as the run, no loss."""
    sizes = {name: getattr(config, name) for name in ("steps", "global_batch", "micro_batch", "sequence_length")}
    small = {name: size for name, size in sizes.items() if size < 1}
    yield from (f"{name} is {size}; it must be at least 1." for name, size in small.items())
    # The interleaved schedule takes micro-batches in groups of as many as there are pipeline ranks.
    group = parallel.pipeline if parallel.virtual > 1 else 1
    unit = config.micro_batch * dp_size * group
    if not small and config.global_batch % unit:
        interleaved = f" x parallel.pipeline {group}, interleaved," if group > 1 else ""
        yield (
            f"global_batch {config.global_batch} is not a multiple of micro_batch {config.micro_batch} x {dp_size} "
            f"data-parallel ranks{interleaved} = {unit}: give {max(1, config.global_batch // unit) * unit}."
        )
    if not 0 <= config.warmup_steps < config.steps:
        yield f"warmup_steps is {config.warmup_steps}; it must be below steps {config.steps}."
    if config.bad_loss_limit < 1 or config.hang_minutes <= 0:
        limits = f"bad_loss_limit is {config.bad_loss_limit} and hang_minutes {config.hang_minutes:g}"
        yield f"{limits}: the former must be at least 1, the latter above 0."
    if config.kd_weight == 0 and config.lm_weight == 0:
        yield "kd_weight and lm_weight are both 0: there is nothing to train on."
