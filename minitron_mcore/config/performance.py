"""The config group `performance`: memory and speed options of the models in training, and what each of them needs. No torch import.

`models.tuning` passes them on to megatron-core; docs/performance.md says when to use which.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum

from minitron_mcore.config.settings import Dtype


class Recompute(StrEnum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"
    """Those of `recompute_modules`."""
    full = "full"
    """Of groups of layers everything but the input."""


class RecomputeMethod(StrEnum):
    uniform = "uniform"
    """All layers, in groups of `recompute_layers`."""
    block = "block"
    """The first `recompute_layers` layers of each chunk of a pipeline rank, one by one; the others keep their activations."""


class Fp8(StrEnum):
    """Format of the inputs of the matrix products."""

    e4m3 = "e4m3"
    hybrid = "hybrid"
    """e4m3 forward, e5m2 for gradients."""


class Fp8Recipe(StrEnum):
    """How scaling factors are found (Transformer Engine's recipes)."""

    delayed = "delayed"
    """One a tensor, from the steps before."""
    tensorwise = "tensorwise"
    """One a tensor, from the tensor itself."""
    blockwise = "blockwise"
    """One a block of 128 elements or 128 x 128; Hopper and CUDA 12.9."""
    mxfp8 = "mxfp8"
    """One for 32 elements; Blackwell."""


class AttentionBackend(StrEnum):
    """Transformer Engine's kernels for attention."""

    auto = "auto"
    flash = "flash"
    fused = "fused"
    """cuDNN's."""
    unfused = "unfused"


class CudaGraphs(StrEnum):
    none = "none"
    local = "local"
    te = "te"


@dataclass
class ProfileConfig:
    """What is recorded of some steps, into out_dir/profile (see `distill.profile`)."""

    start: int | None = None
    """First step that is recorded, counted from 1; null records nothing."""
    stop: int | None = None
    """Last one; null is `start`."""
    memory: bool = False
    """Also a snapshot of CUDA's caching allocator after the last one (torch.cuda.memory, for pytorch.org/memory_viz)."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Which ranks record."""


@dataclass
class PerformanceConfig:
    """Read by the stages that train and, for the teacher, by teacher_cache. Options of null turn themselves on where the kernel is
    installed and CUDA is there."""

    recompute: Recompute = Recompute.none
    """Of the student in training; the teacher keeps no activations anyway."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """recompute=selective: core_attn (between the matrices of attention), layernorm (outputs of the norms before attention and
    MLP), mlp (all of a dense MLP), moe (all of a layer of experts, with its communication)."""
    recompute_method: RecomputeMethod = RecomputeMethod.uniform
    """recompute=full."""
    recompute_layers: int = 2
    """recompute=full: layers of a group (uniform), or that are recomputed (block). Attention and MLP count one each, so a block of
    the model has two."""

    rope_fusion: bool | None = None
    """Rotary embedding in one kernel: Transformer Engine 1.4."""
    bias_activation_fusion: bool | None = None
    """SwiGLU in one compiled kernel (torch.compile); gated MLPs only."""
    bias_dropout_fusion: bool | None = None
    """The residual addition in one compiled kernel."""
    gradient_accumulation_fusion: bool | None = None
    """The products that make weight gradients add to the fp32 buffer themselves: Transformer Engine, or Apex's
    fused_weight_gradient_mlp_cuda. null leaves it off for a mixture of experts, whose experts may see no token."""
    moe_permute_fusion: bool | None = None
    """Sorting tokens by expert in one kernel: Transformer Engine 2.1."""
    moe_grouped_gemm: bool = False
    """All experts' products in one call. Refused: its parameters have names of their own, for which the parameter table has no
    rows."""

    overlap_grad_reduce: bool | None = None
    """Reduce gradients bucket by bucket during the backward pass; null: on CUDA."""
    bucket_size: int | None = None
    """Parameters of a bucket; null is megatron-core's max(40 M, 1 M x data-parallel ranks). Works with overlap_grad_reduce."""
    grad_reduce_in_fp32: bool = True
    """Keep and reduce gradients in fp32; false: in bf16, half the memory and traffic."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket during the next forward pass. Needs the distributed optimizer and
    overlap_grad_reduce."""
    align_param_gather: bool = False
    """All pipeline ranks start these gathers at one time. Needs an interleaved pipeline."""

    precision_aware_optimizer: bool = False
    """Transformer Engine's FusedAdam with states of `exp_avg_dtype` and master weights of 16 bits beside the bf16 ones (together
    fp32). Needs the distributed optimizer and bf16."""
    exp_avg_dtype: Dtype = Dtype.fp32
    """Of both of Adam's moments, with precision_aware_optimizer."""
    optimizer_offload: float = 0.0
    """Share of the optimizer's states in host memory. Refused above 0: see docs/performance.md."""

    fp8: Fp8 | None = None
    """Matrix products of the student's layers in 8 bits; weights and optimizer stay as they are. Needs Transformer Engine, bf16,
    widths that are multiples of 16."""
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise
    """Of both `fp8` and `teacher_fp8`. The delayed recipe's statistics are not in checkpoints: a resumed run collects new ones."""
    teacher_fp8: Fp8 | None = None
    """The same for the teacher's layers."""
    teacher_offload: bool = False
    """Keep a live teacher's weights, but for its head, in pinned host memory between its turns. Each turn copies them to the
    device: let distill.teacher_ahead be a whole step's micro-batches."""

    attention_backend: AttentionBackend = AttentionBackend.auto
    """Of all models of the process (Transformer Engine reads it from the environment)."""
    tp_comm_overlap: bool = False
    """Overlap the student's tensor-parallel communication with its products, by Transformer Engine's user buffers. Needs sequence
    parallelism, and CUDA_DEVICE_MAX_CONNECTIONS=1."""
    cuda_graphs: CudaGraphs = CudaGraphs.none
    """Refused but for none: see docs/performance.md."""

    loss_chunk_mb: int | None = None
    """MiB of the logits, both models', that the loss holds at a time; null is the default of `distill.chunks`."""
    nccl_timeout_minutes: float | None = None
    """After which a collective that still waits fails; null: two more than the longer of distill.hang_minutes
    and distill.save_minutes. Must leave the time to report a hang, hang_minutes."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def frozen(self) -> "PerformanceConfig":
        """The same for a model that makes forward passes only: the teacher."""
        return dataclasses.replace(
            self,
            recompute=Recompute.none,
            gradient_accumulation_fusion=False,
            tp_comm_overlap=False,
            fp8=self.teacher_fp8,
        )


NUMERIC = (
    "grad_reduce_in_fp32",
    "precision_aware_optimizer",
    "exp_avg_dtype",
    "fp8",
    "fp8_recipe",
    "teacher_fp8",
)
"""Options that change the numbers that a run computes by more than the order of a sum."""


def numerics(config: dict) -> dict:
    """The part of an `asdict` of PerformanceConfig that tells two runs apart: `NUMERIC` options that are not the defaults."""
    defaults = PerformanceConfig()
    return {key: config[key] for key in NUMERIC if key in config and config[key] != getattr(defaults, key)}


@dataclass(frozen=True)
class Kernels:
    """What this machine has (see `models.tuning.available_kernels`)."""

    capability: tuple[int, int] = (0, 0)
    """Of the CUDA device."""
    transformer_engine: bool = False
    rope: bool = False
    permute: bool = False
    weight_gradient: bool = False
    fused_adam: bool = False
    """One with states of chosen precision."""


EVERYTHING = Kernels((99, 0), True, True, True, True, True)
"""A GPU with all libraries, as a dry run for GPUs takes for granted."""
