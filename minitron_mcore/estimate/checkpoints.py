"""Bytes and time of a training run's checkpoints. Pure formulas, no torch import."""

from collections.abc import Sequence

from minitron_mcore.config.settings import Dtype, TrainConfig
from minitron_mcore.estimate import memory
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture


def estimate(students: Sequence[Architecture], config: TrainConfig, dtype: Dtype, disk_gbs: float) -> dict[str, float]:
    """Figures of the checkpoints of all students, which are saved after the same steps.

    Returns:
        bytes: of a checkpoint of each student: weights and optimizer, unpadded; seconds: to write them at `disk_gbs`; kept: number
        of steps on disk at the end; disk: bytes of these and of the step that is being written.
    """
    each = (2 if dtype == Dtype.bf16 else 4) + memory.optimizer_bytes(dtype)
    size = each * sum(map(parameter_table.count, students))
    kept = config.keep_last + (config.steps // config.keep_every if config.keep_every else 0)
    kept = min(kept, -(-config.steps // config.save_every))
    return {"bytes": size, "seconds": size / (1e9 * disk_gbs), "kept": kept, "disk": (kept + 1) * size}


def table_row(figures: dict[str, float]) -> dict[str, float]:
    """The figures of `estimate` for a table."""
    return {
        "GB a checkpoint": figures["bytes"] / 1e9,
        "seconds to write": figures["seconds"],
        "checkpoints kept": figures["kept"],
        "GB on disk at most": figures["disk"] / 1e9,
    }
