"""Checks of the config group `performance` against a model, a layout and the available kernels. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minitron_mcore.config import ranges
from minitron_mcore.config.performance import (
    AttentionBackend,
    Fp8Recipe,
    Kernels,
    PerformanceConfig,
    Recompute,
)
from minitron_mcore.config.settings import DistillConfig, Dtype, ParallelConfig
from minitron_mcore.models.architecture import Architecture

_NEEDS: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
    # option, values that need nothing, field of Kernels, its name
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


@dataclass(frozen=True)
class Run:
    """What the options are checked against."""

    config: PerformanceConfig
    student: Architecture
    teacher: Architecture | None
    """Live or remote; None: a cached one or none."""
    training: DistillConfig
    parallel: ParallelConfig
    dtype: Dtype
    kernels: Kernels
    """What the machine of the run has (`tuning.available_kernels`)."""


def problems(run: Run) -> Iterator[str]:
    """Messages about options that this run cannot use: missing kernels, unsuitable layouts and models."""
    for check in (_kernels, _recompute, _communication, _optimizer, _fp8, _model, _sizes):
        yield from check(run)


def _kernels(run: Run) -> Iterator[str]:
    for name, idle, kernel, needed in _NEEDS:
        value, available = getattr(run.config, name), getattr(run.kernels, kernel)
        if value not in idle and not (any(available) if kernel == "capability" else available):
            off = "null" if idle[0] is None else idle[0]
            yield f"performance.{name} is {value}, which needs {needed}; this machine has none: give {off}."


def _model(run: Run) -> Iterator[str]:
    config = run.config
    if config.bias_activation_fusion and not run.student.traits.gated:
        yield f"performance.bias_activation_fusion is for gated MLPs, and a {run.student.family} has none: give null."
    if config.teacher_offload and (run.teacher is None or run.training.teacher_ranks or config.teacher_fp8):
        yield (
            "performance.teacher_offload needs a live teacher in bf16 or fp32 on the student's ranks, and this run has none: "
            "give false."
        )


def _sizes(run: Run) -> Iterator[str]:
    config, profile = run.config, run.config.profile
    names = ("bucket_size", "loss_chunk_mb", "recompute_layers")
    yield from ranges.at_least(1, {f"performance.{name}": getattr(config, name) for name in names})
    if profile.start is None and (profile.stop is not None or profile.memory):
        yield "performance.profile has no start: give the first step to record, counted from 1."
    elif profile.start is not None and not 1 <= profile.start <= (profile.stop or profile.start):
        yield (
            f"performance.profile is for steps {profile.start} to {profile.stop or profile.start}: give a start of at least 1 and "
            "a stop that is not before it."
        )


def _recompute(run: Run) -> Iterator[str]:
    config, student = run.config, run.student
    if config.recompute == Recompute.selective:
        known = ["core_attn", "layernorm", "moe" if student.experts else "mlp"]
        if not config.recompute_modules or set(config.recompute_modules) - set(known):
            yield (
                f"performance.recompute_modules is {config.recompute_modules}; of a {student.family} "
                f"{', '.join(known)} can be recomputed: give one or more of these."
            )
        if "layernorm" in config.recompute_modules and not run.kernels.transformer_engine:
            yield (
                "performance.recompute_modules has layernorm, which needs Transformer Engine; this machine has none: "
                "remove it."
            )
    if config.recompute == Recompute.full and run.training.hidden_state_loss.weight:
        yield (
            "performance.recompute is full, which computes the blocks' outputs without a gradient first, but "
            "distill.hidden_state_loss needs their gradient: give selective, or distill.hidden_state_loss.weight 0."
        )


def _communication(run: Run) -> Iterator[str]:
    config, training, parallel = run.config, run.training, run.parallel
    overlap = any(run.kernels.capability) if config.overlap_grad_reduce is None else config.overlap_grad_reduce
    if config.bucket_size is not None and not overlap:
        yield "performance.bucket_size is for overlap_grad_reduce, which is off: give overlap_grad_reduce true, or null."
    if config.overlap_param_gather and not overlap:
        yield "performance.overlap_param_gather needs performance.overlap_grad_reduce: turn it on, or give false."
    if config.overlap_param_gather and training.hidden_state_loss.weight:
        yield (
            "performance.overlap_param_gather waits for weights where modules are called, but distill.hidden_state_loss uses its "
            "projection outside of one: give false, or distill.hidden_state_loss.weight 0."
        )
    if config.align_param_gather and not (config.overlap_param_gather and parallel.virtual > 1):
        yield "performance.align_param_gather needs overlap_param_gather and parallel.virtual above 1: give false."
    if config.tp_comm_overlap and not (parallel.sequence and parallel.tensor > 1 and not run.student.experts):
        yield (
            "performance.tp_comm_overlap overlaps the communication of sequence parallelism in a dense model: give "
            "parallel.sequence true and parallel.tensor above 1, or tp_comm_overlap false."
        )


def _optimizer(run: Run) -> Iterator[str]:
    config = run.config
    if config.precision_aware_optimizer and run.dtype != Dtype.bf16:
        yield f"performance.precision_aware_optimizer needs dtype bf16, and it is {run.dtype}: give bf16, or false."
    if config.exp_avg_dtype != Dtype.fp32 and not config.precision_aware_optimizer:
        yield (
            f"performance.exp_avg_dtype is {config.exp_avg_dtype}, which needs performance.precision_aware_optimizer: turn it "
            "on, or give fp32."
        )
    if not config.grad_reduce_in_fp32 and run.dtype != Dtype.bf16:
        yield f"performance.grad_reduce_in_fp32 is false, but gradients of dtype {run.dtype} are fp32 anyway: give true."


def _fp8(run: Run) -> Iterator[str]:
    config, training, capability = run.config, run.training, run.kernels.capability
    models = [("fp8", run.student, run.parallel)] if config.fp8 is not None else []
    if config.teacher_fp8 is not None and run.teacher is None:
        yield "performance.teacher_fp8 is for a teacher, and there is none: give null."
    elif config.teacher_fp8 is not None and run.teacher is not None:
        models.append(("teacher_fp8", run.teacher, training.teacher_parallel or run.parallel))
    if not models:
        return
    if run.dtype != Dtype.bf16:
        yield f"performance.{models[0][0]} needs dtype bf16, and it is {run.dtype}: give dtype bf16, or null."
    for name, arch, layout in models:
        yield from _fp8_sizes(name, arch, layout, run)
    if config.fp8_recipe == Fp8Recipe.mxfp8 and capability < (10, 0):
        yield "performance.fp8_recipe mxfp8 needs a Blackwell GPU: give tensorwise, blockwise or delayed."
    elif capability < (8, 9) and any(capability):
        yield f"performance.{models[0][0]} needs a GPU of compute capability 8.9: give null."
    selective = config.recompute == Recompute.selective and "layernorm" in config.recompute_modules
    if config.fp8 and selective and config.fp8_recipe == Fp8Recipe.delayed:
        yield "performance.recompute_modules has layernorm, which fp8_recipe delayed does not allow: give another of them."


def _fp8_sizes(name: str, arch: Architecture, layout: ParallelConfig, run: Run) -> Iterator[str]:
    tp, unit = layout.tensor, 32 if run.config.fp8_recipe == Fp8Recipe.mxfp8 else 16
    widths = {
        "hidden": arch.hidden,
        "ffn / TP": arch.ffn // (1 if arch.experts else tp),
        "heads x head_dim / TP": arch.heads * arch.head_dim // tp,
        "tokens of a rank": run.training.micro_batch
        * run.training.sequence_length
        // (layout.context * (tp if layout.sequence else 1)),
    }
    if wrong := [f"{key} {width}" for key, width in widths.items() if width % unit]:
        yield f"performance.{name} needs multiples of {unit}, but there is {', '.join(wrong)}: give other sizes, or null."
    if arch.experts:
        yield f"performance.{name} is for dense models: experts see any number of tokens. Give null."
