"""Translates `PerformanceConfig` into megatron-core's options of models, DistributedDataParallel and optimizers."""

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch

from minitron_mcore.config.performance import Kernels, PerformanceConfig, Recompute
from minitron_mcore.config.settings import Dtype
from minitron_mcore.models import layer_spec
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel.megatron_patches import cpu_backend
from minitron_mcore.parallel.megatron_patches.models import HeadlessModel, fuse_weight_gradients

from megatron.core.distributed import DistributedDataParallelConfig  # isort: skip
from megatron.core.models.common.embeddings import rope_utils  # isort: skip
from megatron.core.transformer.enums import AttnBackend  # isort: skip
from megatron.core.transformer.moe import moe_utils  # isort: skip


@functools.cache
def available_kernels() -> Kernels:
    """The kernels that this process can use; none on a CPU."""
    if cpu_backend.is_cpu():
        return Kernels()
    engine = layer_spec.transformer_engine()
    return Kernels(
        capability=torch.cuda.get_device_capability(),
        transformer_engine=engine,
        rope=engine and rope_utils.fused_apply_rotary_pos_emb is not None,
        permute=engine and moe_utils.fused_permute_with_probs is not None,
        weight_gradient=engine or _apex_weight_gradient(),
        fused_adam=engine and _adam_has_precisions(),
    )


def _apex_weight_gradient() -> bool:
    return not cpu_backend.is_cpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _adam_has_precisions() -> bool:
    adam = importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
    return {"exp_avg_dtype", "exp_avg_sq_dtype", "use_decoupled_grad"} <= inspect.signature(adam).parameters.keys()


def _enabled(option: bool | None, default: bool) -> bool:
    return default if option is None else option


def _fuses_gradients(config: PerformanceConfig, arch: Architecture) -> bool:
    return _enabled(config.gradient_accumulation_fusion, available_kernels().weight_gradient and not arch.experts)


def model_options(config: PerformanceConfig, arch: Architecture) -> dict[str, Any]:
    """Keyword arguments of TransformerConfig."""
    kernels = available_kernels()
    gpu = any(kernels.capability)
    options = {
        # megatron-core's own linear layers, such as the output head, need Apex's kernel: see `fuse_gradients`.
        "gradient_accumulation_fusion": _fuses_gradients(config, arch) and _apex_weight_gradient(),
        "apply_rope_fusion": _enabled(config.rope_fusion, kernels.rope),
        "bias_activation_fusion": _enabled(config.bias_activation_fusion, gpu and arch.traits.gated),
        "bias_dropout_fusion": _enabled(config.bias_dropout_fusion, gpu),
        "tp_comm_overlap": config.tp_comm_overlap,
        "attention_backend": AttnBackend[config.attention_backend.value],
    }
    if arch.experts:
        options["moe_permute_fusion"] = _enabled(config.moe_permute_fusion, kernels.permute)
    if config.fp8:
        options |= {"fp8": config.fp8.value, "fp8_recipe": config.fp8_recipe.value}
    if config.recompute != Recompute.none:
        options["recompute_granularity"] = config.recompute.value
    if config.recompute == Recompute.selective:
        options["recompute_modules"] = list(config.recompute_modules)
    if config.recompute == Recompute.full:
        options |= {
            "recompute_method": config.recompute_method.value,
            "recompute_num_layers": config.recompute_layers,
        }
    return options


def fuse_gradients(model: HeadlessModel, config: PerformanceConfig, arch: Architecture) -> None:
    """Make a chunk's layers add weight gradients to `main_grad`, if the options say so and it was built without Apex.

    The loss adds the output head's gradient itself (see `distill.losses`).
    """
    if _fuses_gradients(config, arch) and not model.config.gradient_accumulation_fusion:
        fuse_weight_gradients(model)


def ddp_config(config: PerformanceConfig) -> DistributedDataParallelConfig:
    """Options of the student's DistributedDataParallel."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=config.grad_reduce_in_fp32,
        overlap_grad_reduce=_enabled(config.overlap_grad_reduce, any(available_kernels().capability)),
        bucket_size=config.bucket_size,
        overlap_param_gather=config.overlap_param_gather,
        align_param_gather=config.align_param_gather,
    )


def optimizer_options(config: PerformanceConfig) -> dict[str, Any]:
    """Keyword arguments of OptimizerConfig."""
    options: dict[str, Any] = {"overlap_param_gather": config.overlap_param_gather}
    if config.precision_aware_optimizer:
        moments = torch.float32 if config.exp_avg_dtype == Dtype.fp32 else torch.bfloat16
        options |= {
            "use_precision_aware_optimizer": True,
            # The optimizer reads the buffers in which gradients were reduced.
            "main_grads_dtype": torch.float32 if config.grad_reduce_in_fp32 else torch.bfloat16,
            "exp_avg_dtype": moments,
            "exp_avg_sq_dtype": moments,
        }
    return options


def start_user_buffers(config: PerformanceConfig, tokens: int, hidden: int, tp: int) -> None:
    """Create Transformer Engine's buffers for `tp_comm_overlap` (collective).

    Args:
        tokens: S / CP x B, rows of a context-parallel rank's hidden states.
        hidden: their width.
        tp: tensor-parallel ranks.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    base.initialize_ub([tokens, hidden], tp, use_fp8=config.fp8 is not None, bootstrap_backend="nccl")
