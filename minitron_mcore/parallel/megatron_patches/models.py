"""What megatron-core's HybridModel lacks."""

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor, nn


class Stack(HybridStack):
    """HybridStack whose final norm comes from the layer spec; megatron-core's is always Transformer Engine's."""

    def __init__(self, *args: Any, norm: type[nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, post_layer_norm=False)
        if self.post_process:
            self.final_norm = norm(
                config=self.config, hidden_size=self.config.hidden_size, eps=self.config.layernorm_epsilon
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = super().forward(*args, **kwargs)
        return self.final_norm(hidden) if self.post_process else hidden


class HeadlessModel(HybridModel):
    """HybridModel that returns the final hidden states; megatron-core's last stage always applies the output head."""

    post_process: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The last stage returns the final norm's output [S, B, H] ([S_r, B, H] under sequence parallelism)."""
        has_head = self.post_process
        self.post_process = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.post_process = has_head


def scale_rope(model: HybridModel, factor: float, low: float, high: float, original_max_positions: int) -> None:
    """Apply Llama 3.1's rotary scaling: HybridModel has no argument for it, but its rotary embedding has the method."""
    rope = model.rotary_pos_emb
    rope.inv_freq = rope._apply_scaling(rope.inv_freq, factor, low, high, original_max_positions)


def fuse_weight_gradients(model: HybridModel) -> None:
    """Make Transformer Engine's layers of a built model add weight gradients to `main_grad`.

    Setting `gradient_accumulation_fusion` before the model is built requires Apex: the output head is always megatron-core's own
    linear layer, which has no Transformer Engine kernel for it.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
    model.config.gradient_accumulation_fusion = True
