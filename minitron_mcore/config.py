"""What a run is told: one dataclass a config group. No torch import, so that `--help` and `--cfg job` answer at once."""

from dataclasses import dataclass, field


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


@dataclass
class PruneConfig:
    """Targets: a whole number is a size, a fraction below 1 a share of the source, null keeps all."""

    hidden: float | None = None
    """Channels of the residual stream."""
    ffn: float | None = None
    """Channels between the two MLP projections, in each block."""
    heads: float | None = None
    """Query heads, an equal number in each key/value group."""
    blocks: float | None = None
    """Blocks; those whose output is nearest their input (by cosine) go first."""
    drop_blocks: list[int] = field(default_factory=list)
    """Blocks to drop by number, counted from 0, instead of by score (the papers count from 1)."""
