"""The layers of a model: Transformer Engine's if it can run, otherwise torch's.

Both layer specs use the same module names and keep norms separate from linear layers, so the parameter table, hooks and
checkpoints are the same for both.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from minitron_mcore.errors import UserError
from minitron_mcore.models import attention_band
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.megatron_patches import cpu_backend
from minitron_mcore.parallel.megatron_patches.key_value_cache import CachedAttention
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
from megatron.core.transformer.attention import SelfAttentionSubmodules  # isort: skip
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
    """RMSNorm or LayerNorm1P over the last dimension.

    megatron-core's WrappedTorchNorm refuses sequence parallelism. Here weight [H] and bias [H], which are replicated over
    tensor-parallel ranks, are marked so that megatron-core sums their gradients over these ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.centred = eps, config.normalization == "LayerNorm"
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=process_groups.device()))
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if self.centred else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return nn.functional.layer_norm(x, self.weight.shape, self.weight + 1, self.bias, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TorchAttention(nn.Module):
    """Causal attention with grouped queries by scaled_dot_product_attention, over `config.window_size` if set.

    `forward` takes query [S_r, B, N_r, D], key and value [S_r, B, G_r, D] of this rank's heads and returns [S_r, B, N_r D]. With a
    `KeyValueCache`, key and value begin at the first position, and the queries are the last S_r positions. Its
    `attention_mask` is None, or the document starts [B, S_r] of the queries (see `document_attention`). Padding needs no mask: it
    is at the end of sequences, where the causal mask excludes it.

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
        parts, ends = [slice(0, len(query))], [len(key)]
        if size > 1:
            key, value = self._whole(torch.cat([key, value], dim=-1)).chunk(2, dim=-1)
            part = len(query) // 2
            parts, ends = [slice(0, part), slice(part, 2 * part)], [(rank + 1) * part, (2 * size - rank) * part]
        outputs = [
            self._attend(query[rows], key[:end], value[:end])
            if attention_mask is None
            else document_attention(query, key[:end], value[:end], attention_mask, rows, self.window, self.scale)
            for rows, end in zip(parts, ends, strict=True)
        ]
        return torch.cat(outputs) if size > 1 else outputs[0]

    def _whole(self, x: Tensor) -> Tensor:
        """Gather [S_r, ...] to [S, ...] in the order of the sequence."""
        size = self.group.size()
        gathered = gather_from_sequence_parallel_region(x, group=self.group).unflatten(0, (2 * size, -1))
        order = [*range(0, 2 * size, 2), *range(2 * size - 1, 0, -2)]
        return gathered[order].flatten(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of queries at the last of the keys' positions."""
        if len(query) == 1:
            key, value = (x[-self.window :] if self.window else x for x in (key, value))
        elif self.window and self.window < len(key):
            return banded_attention(query, key, value, self.window, self.scale)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        options: dict[str, Any] = {"scale": self.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        if len(query) == 1:
            pass  # the last position attends to all
        elif len(query) == len(key):
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
    heads, before = query.shape[2] // key.shape[2], len(key) - len(query)
    size, most = attention_band.attention_band(len(query), len(key), window)
    band, blocks = _band(size, most, window, heads, query.dtype, query.device), []
    for first in range(0, len(query), size):
        rows = min(size, len(query) - first)
        start, end = _aligned(max(0, before + first + 1 - window)), before + first + rows
        mask = band[:, size - rows :, most - (end - start) :].flatten(0, 1)
        blocks.append(_Block(slice(first, first + rows), slice(start, end), mask))
    return _block_attention(query, key, value, blocks, scale)


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    rows: slice,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention within documents: a query attends to the positions from its document's start to its own, and to the last
    `window` of them if set.

    The rotary embedding depends on the distance of two positions only, so the result is that of positions that begin at 0 in
    each document. Blocks of queries use only the keys from their earliest document on. All layers share the masks.

    Args:
        query: [S_r, B, N, D], of which `rows` (S_q of them) are at the last S_q of the keys' positions.
        key, value: [S_k, B, G, D].
        starts: [B, S_r] int64, position of the first token of each query's document.

    Returns:
        [S_q, B, N D] of `rows`.
    """
    heads = query.shape[2] // key.shape[2]
    blocks = _document_blocks(starts, rows.start, rows.stop, len(key), window or len(key), heads, query.dtype)
    return _block_attention(query[rows], key, value, blocks, scale)


class _Block(NamedTuple):
    """Some queries, the range of keys that they use, and the additive mask, which broadcasts to [B, 1, heads * rows, keys]."""

    queries: slice
    keys: slice
    mask: Tensor


def _block_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[_Block], scale: float | None
) -> Tensor:
    """Attention of successive blocks of queries [S_q, B, N, D] to keys and values [S_k, B, G, D]: [S_q, B, N D]."""
    groups, parts = key.shape[2], []
    heads = query.shape[2] // groups
    k, v = (x.permute(1, 2, 0, 3) for x in (key, value))
    for block in blocks:
        q = query[block.queries].unflatten(2, (groups, heads)).permute(1, 2, 3, 0, 4)
        with sdpa_kernel(MASKED) if q.is_cuda else contextlib.nullcontext():
            out = nn.functional.scaled_dot_product_attention(
                q.flatten(2, 3), k[:, :, block.keys], v[:, :, block.keys], block.mask, scale=scale
            )
        parts.append(out.unflatten(2, (heads, -1)).permute(3, 0, 1, 2, 4).flatten(2))
    return torch.cat(parts)


def _aligned(position: int) -> int:
    """The multiple of attention_band.BAND_ALIGNMENT at or before a key position."""
    return position // attention_band.BAND_ALIGNMENT * attention_band.BAND_ALIGNMENT


@functools.lru_cache(maxsize=attention_band.MASKS_KEPT)
@torch.inference_mode(False)
def _document_blocks(
    starts: Tensor, first_row: int, end_row: int, keys: int, window: int, heads: int, dtype: torch.dtype
) -> list[_Block]:
    """Blocks of the queries in rows first_row .. end_row of `starts`, at the last of `keys` positions."""
    positions = torch.arange(keys, device=starts.device)
    own = positions[keys - (end_row - first_row) :]
    lowest = torch.maximum(starts[:, first_row:end_row], own + 1 - window)
    size, _ = attention_band.attention_band(len(own), keys, window)
    first_keys = [int(part.min()) for part in lowest.split(size, dim=1)]
    blocks = []
    for number, first_key in enumerate(first_keys):
        queries = slice(number * size, min((number + 1) * size, len(own)))
        rows = queries.stop - queries.start
        start, end = _aligned(first_key), keys - len(own) + queries.stop
        allowed = (positions[start:end] >= lowest[:, queries, None]) & (positions[start:end] <= own[queries, None])
        padded = -(-(end - start) // attention_band.BAND_ALIGNMENT) * attention_band.BAND_ALIGNMENT
        mask = torch.zeros(len(starts), heads, rows, padded, dtype=dtype, device=starts.device)
        mask[..., : end - start].masked_fill_(~allowed[:, None], -torch.inf)
        blocks.append(_Block(queries, slice(start, end), mask[..., : end - start].flatten(1, 2)[:, None]))
    return blocks


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
    return not wanted and not cpu_backend.is_cpu() and _can_import("transformer_engine.pytorch")


def _can_import(module: str) -> bool:
    """Whether a library is installed and its own libraries are found."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def stack_spec(qk_norm: bool) -> ModuleSpec:
    """The layer spec for this machine; `qk_norm`: with norms on queries and keys."""
    if transformer_engine():
        from megatron.core.extensions import transformer_engine as te

        return _stack(te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear, te.TEDotProductAttention, qk_norm)
    return _stack(TorchNorm, ColumnParallelLinear, RowParallelLinear, TorchAttention, qk_norm)


def describe() -> str:
    """One log line: the layers, optimizer and device in use."""
    from megatron.core.optimizer import Adam

    layers = "Transformer Engine" if transformer_engine() else "torch (RMSNorm, scaled_dot_product_attention)"
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
                        module=CachedAttention,
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
