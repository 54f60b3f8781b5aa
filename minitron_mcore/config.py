"""What a run is told: one dataclass a config group. No torch import, so that `--help` and `--cfg job` answer at once."""

from dataclasses import dataclass


@dataclass
class ParallelConfig:
    """How the model is laid over processes; data parallelism takes what is left of the world."""

    tensor: int = 1
    """Ranks that share each matrix (TP)."""
    pipeline: int = 1
    """Stages that share the layers (PP)."""
    context: int = 1
    """Ranks that share each sequence in attention (CP)."""
    sequence: bool = False
    """Shard activations between the matrices over the TP ranks (SP)."""
