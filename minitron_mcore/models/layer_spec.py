"""The layers of a model: Transformer Engine's if it can run, otherwise torch's.

Both layer specs use the same module names and keep norms separate from linear layers, so the parameter table, hooks and
checkpoints are the same for both.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from minitron_mcore.errors import UserError
from minitron_mcore.models import attention_band
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.megatron_patches import cpu_backend
from minitron_mcore.parallel.megatron_patches.models import Stack

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # isort: skip
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules  # isort: skip
from megatron.core.ssm.mlp_layer import MLPLayer  # isort: skip
from megatron.core.tensor_parallel import (  # isort: skip
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig  # isort: skip
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # isort: skip
from megatron.core.transformer.moe.experts import SequentialMLP  # isort: skip
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_layer import (  # isort: skip
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)


class TorchNorm(nn.Module):
    """RMSNorm (Apex's or torch's kernel) or LayerNorm1P over the last dimension.

    megatron-core's WrappedTorchNorm refuses sequence parallelism. Here weight [H] and bias [H], which are replicated over
    tensor-parallel ranks, are marked so that megatron-core sums their gradients over these ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.centred = eps, config.normalization == "LayerNorm"
        self.fused = None if self.centred else _apex_rms_norm()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=process_groups.device()))
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if self.centred else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return nn.functional.layer_norm(x, self.weight.shape, self.weight + 1, self.bias, self.eps)
        if self.fused:
            return self.fused(x, self.weight, self.weight.shape, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TorchAttention(nn.Module):
    """Causal attention with grouped queries by scaled_dot_product_attention, over `config.window_size` if set.

    `forward` takes query [S_r, B, N_r, D], key and value [S_r, B, G_r, D] of this rank's heads and returns [S_r, B, N_r D]. It
    ignores the attention mask: padding is at the end of sequences, where the causal mask excludes it.

    Context-parallel rank r of CP holds parts r and 2 CP - 1 - r of the sequence's 2 CP (S_r = S / CP). Keys and values are gathered
    over the group (backward: reduce-scatter). Each query part uses the keys up to its own end, so ranks do equal work.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: Any, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__()
        self.scale, self.group = softmax_scale, pg_collection.cp
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **unused: Any) -> Tensor:
        rank, size = self.group.rank(), self.group.size()
        if size == 1:
            return self._attend(query, key, value)
        key, value = self._whole(torch.cat([key, value], dim=-1)).chunk(2, dim=-1)
        part = len(query) // 2
        ends = ((rank + 1) * part, (2 * size - rank) * part)
        return torch.cat(
            [self._attend(q, key[:end], value[:end]) for q, end in zip(query.split(part), ends, strict=True)]
        )

    def _whole(self, x: Tensor) -> Tensor:
        """Gather [S_r, ...] to [S, ...] in the order of the sequence."""
        size = self.group.size()
        gathered = gather_from_sequence_parallel_region(x, group=self.group).unflatten(0, (2 * size, -1))
        order = [*range(0, 2 * size, 2), *range(2 * size - 1, 0, -2)]
        return gathered[order].flatten(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of queries at the last of the keys' positions."""
        if self.window and self.window < len(key):
            return banded_attention(query, key, value, self.window, self.scale)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        options: dict[str, Any] = {"scale": self.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        if len(query) == len(key):
            options["is_causal"] = True
        elif q.is_cuda and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, options["enable_gqa"])):
            options["attn_mask"] = causal_lower_right(len(query), len(key))
        else:
            return banded_attention(query, key, value, len(key), self.scale)
        return nn.functional.scaled_dot_product_attention(q, k, v, **options).permute(2, 0, 1, 3).flatten(2)


def banded_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float | None = None) -> Tensor:
    """Causal sliding-window attention: a query attends to its own position and the window - 1 positions before it.

    Time and memory grow with S_q x window: a block of queries uses only the keys of its windows. The N / G query heads of a group
    become rows of one product with the group's keys, since torch's memory-efficient kernels take masks but no grouped queries.
    All blocks and layers use views of one mask, so autograd saves it once. cuDNN's kernels are excluded on CUDA: their backward
    pass fails on some of these masks (seen on an H100 with torch 2.11).

    Args:
        query: [S_q, B, N, D], at the last S_q of the keys' positions.
        key, value: [S_k, B, G, D].

    Returns:
        [S_q, B, N D].
    """
    groups, before = key.shape[2], len(key) - len(query)
    heads = query.shape[2] // groups
    size, most = attention_band.attention_band(len(query), len(key), window)
    band, parts = _band(size, most, window, heads, query.dtype, query.device), []
    k, v = (x.permute(1, 2, 0, 3) for x in (key, value))
    for first in range(0, len(query), size):
        q = query[first : first + size].unflatten(2, (groups, heads)).permute(1, 2, 3, 0, 4)
        rows, end = q.shape[3], before + first + q.shape[3]
        start = max(0, before + first + 1 - window) // attention_band.BAND_ALIGNMENT * attention_band.BAND_ALIGNMENT
        mask = band[:, size - rows :, most - (end - start) :].flatten(0, 1)
        with sdpa_kernel(MASKED) if q.is_cuda else contextlib.nullcontext():
            out = nn.functional.scaled_dot_product_attention(
                q.flatten(2, 3), k[:, :, start:end], v[:, :, start:end], mask, scale=scale
            )
        parts.append(out.unflatten(2, (heads, rows)).permute(3, 0, 1, 2, 4).flatten(2))
    return torch.cat(parts)


MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used for training later
def _band(rows: int, columns: int, window: int, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [heads, rows, columns]: 0 in the `window` columns that end at the row's own position, -inf elsewhere.

    The last row's own position is the last column.
    """
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    allowed = allowed.triu(columns - rows + 1 - window)
    band = torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill(~allowed, -torch.inf)
    return band.expand(heads, -1, -1).contiguous()


def _on_gpu(module: str) -> ModuleType | None:
    """A library of CUDA kernels; None if it is not installed or there is no GPU."""
    if cpu_backend.is_cpu():
        return None
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def transformer_engine() -> bool:
    """Whether models use Transformer Engine's layers.

    The environment variable MINITRON_LAYERS=torch turns them off, for fp32 comparisons: Transformer Engine computes fp32 products
    in TF32. It does not cover the router of a mixture of experts, where megatron-core uses Transformer Engine if installed.

    Raises:
        UserError: MINITRON_LAYERS has another value.
    """
    wanted = os.environ.get("MINITRON_LAYERS", "")
    if wanted not in ("", "torch"):
        raise UserError(f"MINITRON_LAYERS is {wanted!r}: set it to torch, or unset it.")
    return not wanted and _on_gpu("transformer_engine.pytorch") is not None


def _apex_rms_norm() -> Callable[..., Tensor] | None:
    # Apex can be installed without its kernels.
    if _on_gpu("fused_layer_norm_cuda") and (apex := _on_gpu("apex.normalization.fused_layer_norm")):
        return apex.fused_rms_norm_affine
    return None


def stack_spec(qk_norm: bool) -> ModuleSpec:
    """The layer spec for this machine; `qk_norm`: with norms on queries and keys."""
    if transformer_engine():
        from megatron.core.extensions import transformer_engine as te

        return _stack(te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear, te.TEDotProductAttention, qk_norm)
    return _stack(TorchNorm, ColumnParallelLinear, RowParallelLinear, TorchAttention, qk_norm)


def describe() -> str:
    """One log line: the layers, optimizer and device in use."""
    from megatron.core.optimizer import Adam

    norm = "Apex's RMSNorm" if _apex_rms_norm() else "RMSNorm"
    layers = "Transformer Engine" if transformer_engine() else f"torch ({norm}, scaled_dot_product_attention)"
    return f"layers: {layers}; optimizer: {Adam.__module__}.{Adam.__name__}; device: {process_groups.device().type}"


def _stack(norm: Any, column: Any, row: Any, attention: Any, qk_norm: bool) -> ModuleSpec:
    linear = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    # One MLP per expert: grouped GEMM exists for CUDA only and names the weights differently.
    experts = MoESubmodules(experts=partial(SequentialMLP, submodules=linear))
    return ModuleSpec(
        module=Stack,
        params={"norm": norm},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=norm,
                    self_attention=ModuleSpec(
                        module=SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=SelfAttentionSubmodules(
                            linear_qkv=column,
                            core_attention=attention,
                            linear_proj=row,
                            q_layernorm=norm if qk_norm else None,
                            k_layernorm=norm if qk_norm else None,
                        ),
                    ),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=norm,
                    mlp=partial(MLP.as_mlp_submodule, submodules=linear),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=norm, mlp=partial(MoELayer, submodules=experts), mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )
