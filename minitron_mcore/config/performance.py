"""The config group `performance`: memory and speed options of the models in training, and what each of them needs. No torch import.

`models.tuning` passes them on to megatron-core; docs/performance.md says when to use which.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from minitron_mcore.config.settings import DistillConfig, Dtype, ParallelConfig
from minitron_mcore.models.architecture import Architecture


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
    """What this machine has (see `models.tuning.installed`)."""

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

# (option, value that needs nothing, kernel, its name)
_NEEDS = (
    ("rope_fusion", (None, False), "rope", "Transformer Engine's rotary kernel"),
    ("moe_permute_fusion", (None, False), "permute", "Transformer Engine 2.1"),
    (
        "gradient_accumulation_fusion",
        (None, False),
        "weight_gradient",
        "Transformer Engine or Apex's fused_weight_gradient_mlp_cuda",
    ),
    ("bias_activation_fusion", (None, False), "capability", "CUDA"),
    ("bias_dropout_fusion", (None, False), "capability", "CUDA"),
    ("precision_aware_optimizer", (False,), "fused_adam", "Transformer Engine's FusedAdam"),
    ("fp8", (None,), "transformer_engine", "Transformer Engine"),
    ("teacher_fp8", (None,), "transformer_engine", "Transformer Engine"),
    ("attention_backend", (AttentionBackend.auto,), "transformer_engine", "Transformer Engine"),
    ("tp_comm_overlap", (False,), "transformer_engine", "Transformer Engine"),
    ("teacher_offload", (False,), "capability", "CUDA"),
)


def problems(
    config: PerformanceConfig,
    student: Architecture,
    teacher: Architecture | None,
    training: DistillConfig,
    parallel: ParallelConfig,
    dtype: Dtype,
    kernels: Kernels,
) -> Iterator[str]:
    """Options that could not work, a sentence each: kernels that are not there, layouts and models that they do not fit."""
    for name, idle, kernel, needed in _NEEDS:
        value, has = getattr(config, name), getattr(kernels, kernel)
        if value not in idle and not (any(has) if kernel == "capability" else has):
            off = "null" if idle[0] is None else idle[0]
            yield f"performance.{name} is {value}, which needs {needed}, and that is not here: give {off}."
    yield from _recompute(config, student, training, kernels)
    yield from _communication(config, student, training, parallel, kernels)
    yield from _optimizer(config, training, dtype)
    yield from _fp8(config, student, teacher, training, parallel, dtype, kernels)
    if config.bias_activation_fusion and not student.traits.gated:
        yield f"performance.bias_activation_fusion is for gated MLPs, and a {student.family} has none: give null."
    if config.moe_grouped_gemm:
        yield (
            "performance.moe_grouped_gemm is true, but grouped products name an expert's parameters differently, for which the "
            "parameter table has no rows: give false."
        )
    if config.cuda_graphs != CudaGraphs.none:
        yield (
            f"performance.cuda_graphs is {config.cuda_graphs}, but graphs of layers have not been run with this package's teacher, "
            "hooks and random state: give none."
        )
    if config.teacher_offload and (teacher is None or training.teacher_ranks or config.teacher_fp8):
        yield (
            "performance.teacher_offload moves a live teacher in bf16 or fp32 that shares the student's ranks, and there is none: "
            "give false."
        )
    yield from _sizes(config, training)


def _sizes(config: PerformanceConfig, training: DistillConfig) -> Iterator[str]:
    least = {"bucket_size": 1, "loss_chunk_mb": 1, "recompute_layers": 1}
    for name, limit in least.items():
        if (value := getattr(config, name)) is not None and value < limit:
            yield f"performance.{name} is {value}; it must be at least {limit}."
    minutes = config.nccl_timeout_minutes
    if minutes is not None and minutes <= training.hang_minutes:
        yield (
            f"performance.nccl_timeout_minutes is {minutes:g}; it must be above hang_minutes {training.hang_minutes:g}, or "
            "collectives fail before a hang is reported."
        )
    profile = config.profile
    if profile.start is None and (profile.stop is not None or profile.memory):
        yield "performance.profile has no start: give the first step to record, counted from 1."
    elif profile.start is not None and not 1 <= profile.start <= (profile.stop or profile.start):
        yield (
            f"performance.profile is for steps {profile.start} to {profile.stop or profile.start}: give a start of at least 1 and "
            "a stop that is not before it."
        )


def _recompute(
    config: PerformanceConfig, student: Architecture, training: DistillConfig, kernels: Kernels
) -> Iterator[str]:
    if config.recompute == Recompute.selective:
        known = ["core_attn", "layernorm", "moe" if student.experts else "mlp"]
        wrong = [module for module in config.recompute_modules if module not in known]
        if wrong or not config.recompute_modules:
            yield (
                f"performance.recompute_modules is {config.recompute_modules}; of a {student.family} "
                f"{', '.join(known)} can be recomputed: give one or more of these."
            )
        if "layernorm" in config.recompute_modules and not kernels.transformer_engine:
            yield "performance.recompute_modules has layernorm, which needs Transformer Engine, and that is not here: leave it out."
    if config.recompute == Recompute.full and training.states.weight:
        yield (
            "performance.recompute is full, whose first pass makes blocks' outputs without a gradient, but distill.states compares "
            "them: give selective, or distill.states.weight 0."
        )


def _communication(
    config: PerformanceConfig,
    student: Architecture,
    training: DistillConfig,
    parallel: ParallelConfig,
    kernels: Kernels,
) -> Iterator[str]:
    overlap = any(kernels.capability) if config.overlap_grad_reduce is None else config.overlap_grad_reduce
    if config.bucket_size is not None and not overlap:
        yield "performance.bucket_size is for overlap_grad_reduce, which is off: give overlap_grad_reduce true, or null."
    if config.overlap_param_gather and not (training.distributed_optimizer and overlap):
        yield (
            "performance.overlap_param_gather needs distill.distributed_optimizer and performance.overlap_grad_reduce: turn both "
            "on, or give false."
        )
    if config.overlap_param_gather and training.states.weight:
        yield (
            "performance.overlap_param_gather waits for weights where modules are called, but distill.states uses its projection "
            "outside of one: give false, or distill.states.weight 0."
        )
    if config.align_param_gather and not (config.overlap_param_gather and parallel.virtual > 1):
        yield "performance.align_param_gather needs overlap_param_gather and parallel.virtual above 1: give false."
    if config.tp_comm_overlap and not (parallel.sequence and parallel.tensor > 1 and not student.experts):
        yield (
            "performance.tp_comm_overlap overlaps what sequence parallelism sends between a dense model's matrices: give "
            "parallel.sequence true and parallel.tensor above 1, or tp_comm_overlap false."
        )


def _optimizer(config: PerformanceConfig, training: DistillConfig, dtype: Dtype) -> Iterator[str]:
    if config.precision_aware_optimizer and not (training.distributed_optimizer and dtype == Dtype.bf16):
        yield "performance.precision_aware_optimizer needs distill.distributed_optimizer and dtype bf16: give both, or false."
    if config.optimizer_offload:
        yield (
            f"performance.optimizer_offload is {config.optimizer_offload:g}, but megatron-core keeps such states where this "
            "package's checkpoints do not look: give 0; recomputation, or more data-parallel ranks, save memory too."
        )
    if config.exp_avg_dtype != Dtype.fp32 and not config.precision_aware_optimizer:
        yield (
            f"performance.exp_avg_dtype is {config.exp_avg_dtype}, which needs performance.precision_aware_optimizer: turn it "
            "on, or give fp32."
        )
    if not config.grad_reduce_in_fp32 and dtype != Dtype.bf16:
        yield f"performance.grad_reduce_in_fp32 is false, but gradients of dtype {dtype} are fp32 anyway: give true."


def _fp8(
    config: PerformanceConfig,
    student: Architecture,
    teacher: Architecture | None,
    training: DistillConfig,
    parallel: ParallelConfig,
    dtype: Dtype,
    kernels: Kernels,
) -> Iterator[str]:
    theirs = training.teacher_parallel or parallel
    models = [("fp8", student, parallel)] * (config.fp8 is not None)
    if config.teacher_fp8 is not None and teacher is None:
        yield "performance.teacher_fp8 is for a teacher, and there is none: give null."
    elif config.teacher_fp8 is not None:
        models.append(("teacher_fp8", teacher, theirs))
    if not models:
        return
    if dtype != Dtype.bf16:
        yield f"performance.{models[0][0]} needs dtype bf16, and it is {dtype}: give dtype bf16, or null."
    unit = 32 if config.fp8_recipe == Fp8Recipe.mxfp8 else 16
    for name, arch, layout in models:
        tp = layout.tensor
        widths = {"hidden": arch.hidden, "ffn / TP": arch.ffn // (1 if arch.experts else tp)}
        widths |= {"heads x head_dim / TP": arch.heads * arch.head_dim // tp}
        wrong = {key: width for key, width in widths.items() if width % unit}
        tokens = training.micro_batch * training.sequence_length // (layout.context * (tp if layout.sequence else 1))
        wrong |= {"tokens of a rank": tokens} if tokens % unit else {}
        if wrong:
            found = ", ".join(f"{key} {width}" for key, width in wrong.items())
            yield f"performance.{name} needs multiples of {unit}, but there is {found}: give other sizes, or null."
        if arch.experts:
            yield f"performance.{name} is for dense models: experts see any number of tokens. Give null."
    if config.fp8_recipe == Fp8Recipe.mxfp8 and kernels.capability < (10, 0):
        yield "performance.fp8_recipe mxfp8 needs a Blackwell GPU: give tensorwise, blockwise or delayed."
    elif kernels.capability < (8, 9) and any(kernels.capability):
        yield f"performance.{models[0][0]} needs a GPU of compute capability 8.9: give null."
    selective = config.recompute == Recompute.selective and "layernorm" in config.recompute_modules
    if config.fp8 and selective and config.fp8_recipe == Fp8Recipe.delayed:
        yield "performance.recompute_modules has layernorm, which fp8_recipe delayed does not allow: give another of them."
