"""The config sections `hang` (limits of the hang watchdog) and `performance` (options for memory and speed, which `models.tuning`
passes to megatron-core). No torch import.

docs/performance.md says when to use which.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum

from minitron_mcore.config.fields import changeable
from minitron_mcore.config.settings import Dtype


class Recompute(StrEnum):
    """Activations that the backward pass recomputes instead of keeping."""

    none = "none"
    selective = "selective"
    """Those of `recompute_modules`."""
    full = "full"
    """All but the inputs of groups of layers."""


class RecomputeMethod(StrEnum):
    """Layers that recompute=full recomputes."""

    uniform = "uniform"
    """All layers, in groups of `recompute_layers`."""
    block = "block"
    """The first `recompute_layers` layers of each pipeline rank's chunk, one by one; the others keep their activations."""


class Fp8(StrEnum):
    """8-bit format of the matrix products' inputs."""

    e4m3 = "e4m3"
    hybrid = "hybrid"
    """e4m3 forward, e5m2 for gradients."""


class Fp8Recipe(StrEnum):
    """Scaling factors of 8-bit tensors (Transformer Engine's recipes)."""

    delayed = "delayed"
    """One a tensor, from previous steps."""
    tensorwise = "tensorwise"
    """One a tensor, from the tensor itself."""
    blockwise = "blockwise"
    """One for 128 or 128 x 128 elements; needs Hopper and CUDA 12.9."""
    mxfp8 = "mxfp8"
    """One for 32 elements; needs Blackwell."""


class AttentionBackend(StrEnum):
    """Transformer Engine's kernels for attention."""

    auto = "auto"
    flash = "flash"
    fused = "fused"
    """cuDNN's kernels."""
    unfused = "unfused"


@dataclass
class ProfileConfig:
    """Profile of some steps, written to out_dir/profile (see `distill.profile`)."""

    start: int | None = None
    """First step to record, from 1; null records nothing."""
    stop: int | None = None
    """Last step to record; null is `start`."""
    memory: bool = False
    """Also record a snapshot of CUDA's caching allocator after the last step (for pytorch.org/memory_viz)."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that record."""


@dataclass
class HangConfig:
    """Longest times without progress of any rank. After one, all ranks end with status 4 and name the rank that others wait for
    (see `parallel.hang_watchdog`)."""

    setup_minutes: float = 60.0
    """Before, between and after steps: reading and tokenising text, building and loading models."""
    step_minutes: float = 10.0
    """A micro-batch of training or of a forward pass."""
    save_minutes: float = 60.0
    """Writing a checkpoint."""


@dataclass
class PerformanceConfig:
    """Options for memory and speed of the stages that train, and of teacher_cache. A fusion of null is on where its kernel and
    CUDA are available."""

    recompute: Recompute = changeable(Recompute.none)
    """Activations of the trained model that the backward pass recomputes; a teacher keeps none."""
    recompute_modules: list[str] = changeable(default_factory=lambda: ["core_attn"])
    """recompute=selective: core_attn (attention between its projections), layernorm (outputs of the norms before attention and
    MLP), mlp (a dense MLP), moe (a layer of experts with its communication)."""
    recompute_method: RecomputeMethod = changeable(RecomputeMethod.uniform)
    """recompute=full: layers to recompute."""
    recompute_layers: int = changeable(2)
    """recompute=full: layers of a group (uniform), or number of recomputed layers (block). A block has two: attention and MLP."""

    rope_fusion: bool | None = changeable(None)
    """Rotary embedding in one kernel (Transformer Engine 1.4)."""
    bias_activation_fusion: bool | None = changeable(None)
    """SwiGLU in one kernel by torch.compile; gated MLPs only."""
    bias_dropout_fusion: bool | None = changeable(None)
    """The residual addition in one kernel by torch.compile."""
    gradient_accumulation_fusion: bool | None = changeable(None)
    """Weight-gradient products accumulate into the fp32 buffer: Transformer Engine, or Apex's fused_weight_gradient_mlp_cuda. null
    is off for a mixture of experts, in which an expert may receive no token."""
    moe_permute_fusion: bool | None = changeable(None)
    """Permutation of tokens by expert in one kernel (Transformer Engine 2.1)."""

    overlap_grad_reduce: bool | None = changeable(None)
    """Reduce gradients bucket by bucket during the backward pass; null does so on CUDA."""
    bucket_size: int | None = changeable(None)
    """Parameters of a bucket, with overlap_grad_reduce; null is megatron-core's max(40 M, 1 M x data-parallel ranks)."""
    grad_reduce_in_fp32: bool = True
    """Keep and reduce gradients in fp32; false uses bf16, with half the memory and traffic."""
    overlap_param_gather: bool = changeable(False)
    """Gather updated weights bucket by bucket during the next forward pass. Needs overlap_grad_reduce."""
    align_param_gather: bool = changeable(False)
    """Start these gathers on all pipeline ranks at the same time. Needs an interleaved pipeline."""

    precision_aware_optimizer: bool = False
    """Transformer Engine's FusedAdam, with moments in `exp_avg_dtype` and master weights as 16 bits beside the bf16 weights
    (together fp32). Needs bf16."""
    exp_avg_dtype: Dtype = Dtype.fp32
    """Precision of Adam's moments, with precision_aware_optimizer."""

    fp8: Fp8 | None = None
    """8-bit matrix products in the student's layers; weights and optimizer keep their precision. Needs Transformer Engine, bf16
    and widths that are multiples of 16."""
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise
    """Scaling for `fp8` and `teacher_fp8`. A resumed run collects the delayed recipe's statistics anew."""
    teacher_fp8: Fp8 | None = None
    """8-bit matrix products in the teacher's layers."""
    teacher_offload: bool = changeable(False)
    """Keep the teacher's weights, except its head, in pinned host memory between its forward passes. Set distill.teacher_ahead to
    a whole step's micro-batches, so that they are copied once a step."""

    attention_backend: AttentionBackend = changeable(AttentionBackend.auto)
    """Transformer Engine's kernels for attention, of all models of the process."""
    tp_comm_overlap: bool = changeable(False)
    """Overlap the student's tensor-parallel communication with matrix products by Transformer Engine's user buffers. Needs
    sequence parallelism and CUDA_DEVICE_MAX_CONNECTIONS=1."""

    loss_chunk_mb: int | None = changeable(None)
    """MiB of both models' logits that the loss holds at a time; null is 1 GiB on CUDA and 64 MiB on a CPU."""
    nccl_timeout_minutes: float | None = changeable(None)
    """Time after which a waiting collective fails; null is the longest limit in `hang`, plus two. Must exceed them, so that a hang
    is reported first."""
    profile: ProfileConfig = changeable(default_factory=ProfileConfig)

    def frozen(self) -> "PerformanceConfig":
        """The options of a model that is not trained: the teacher."""
        return dataclasses.replace(
            self,
            recompute=Recompute.none,
            gradient_accumulation_fusion=False,
            tp_comm_overlap=False,
            fp8=self.teacher_fp8,
        )


@dataclass(frozen=True)
class Kernels:
    """Kernels available on this machine (see `models.tuning.available_kernels`)."""

    capability: tuple[int, int] = (0, 0)
    """Compute capability of the CUDA device."""
    transformer_engine: bool = False
    rope: bool = False
    permute: bool = False
    weight_gradient: bool = False
    fused_adam: bool = False
    """An Adam with moments of a chosen precision."""


EVERYTHING = Kernels((99, 0), True, True, True, True, True)
"""A GPU with all libraries, which a dry run for GPUs assumes."""
