"""The options of the distillation loss. No torch import."""

from dataclasses import dataclass

from minitron_mcore.config.settings import Divergence


@dataclass(frozen=True)
class LossConfig:
    """Terms of the distillation loss (see `losses.distillation_loss`) and how it is computed."""

    kd_weight: float = 1.0
    lm_weight: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = Divergence.forward_kl
    jsd_beta: float = 0.5
    """The teacher's weight in jsd's mixture, above 0 and below 1."""
    top_k: int | None = None
    """Use the forward KL over the teacher's k largest logits of the whole vocabulary and the tail's mass."""
    chunk_bytes: int | None = None
    """Budget for the logits of both models that exist at a time; None: `tile_sizes.CHUNK_BYTES`."""
    gradient_accumulation_fusion: bool = False
    """Add the head's gradient to its `main_grad` in backward, in the latter's precision, as megatron-core's linear layers do."""
