"""What a rank holds where models make forward passes only: scoring, evaluation, a teacher on ranks of its own. No torch import."""

import math

from minitron_mcore.estimate.memory import Setting, mlp_activations, parameters
from minitron_mcore.models.architecture import Architecture


def scoring(arch: Architecture, setting: Setting) -> list[dict[str, float]]:
    """Bytes of forward passes on a rank of each pipeline stage: weights, and what one block needs for a micro-batch."""
    passing = setting.tokens * (
        mlp_activations(arch, setting) + 4 * setting.dtype_bytes * arch.hidden / setting.sequence_shards
    )
    rows = []
    for stage in range(setting.parallel.pipeline):
        weights = setting.dtype_bytes * sum(parameters(arch, setting, stage))
        rows.append({"weights": weights, "workspace": passing, "total": weights + passing})
    return rows


def studying(arch: Architecture, setting: Setting, windows: int) -> list[dict[str, float]]:
    """`scoring`, and the hidden states of so many windows that a depth study keeps on the last stage."""
    passes = math.ceil(windows / (setting.micro_batch * setting.replicas))
    kept = passes * setting.tokens * arch.hidden * setting.dtype_bytes / setting.sequence_shards
    rows = []
    for stage, row in enumerate(scoring(arch, setting)):
        here = kept if stage == setting.last else 0
        rows.append(row | {"hidden states": here, "total": row["total"] + here})
    return rows
