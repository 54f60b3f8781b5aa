"""Which options of the config group `performance` fit a model, a layout and this machine. No torch import."""

from collections.abc import Iterator

from minitron_mcore.config.performance import (
    AttentionBackend,
    CudaGraphs,
    Fp8Recipe,
    Kernels,
    PerformanceConfig,
    Recompute,
)
from minitron_mcore.config.settings import DistillConfig, Dtype, ParallelConfig
from minitron_mcore.models.architecture import Architecture

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
    if config.recompute == Recompute.full and training.hidden_state_loss.weight:
        yield (
            "performance.recompute is full, whose first pass makes blocks' outputs without a gradient, but "
            "distill.hidden_state_loss compares "
            "them: give selective, or distill.hidden_state_loss.weight 0."
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
    if config.overlap_param_gather and training.hidden_state_loss.weight:
        yield (
            "performance.overlap_param_gather waits for weights where modules are called, but distill.hidden_state_loss uses its "
            "projection outside of one: give false, or distill.hidden_state_loss.weight 0."
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
