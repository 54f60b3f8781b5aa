"""Builds models on megatron-core; no other module creates one."""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import layer_spec, tuning
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.parameter_table import padded_vocab
from minitron_mcore.models.sharding import check_shardable, stage_blocks
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.megatron_patches.models import HeadlessModel, scale_rope

from megatron.core.activations import squared_relu  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip

ACTIVATIONS = {"silu": F.silu, "relu2": squared_relu}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LanguageModel(HeadlessModel):
    """The part of a model on one pipeline stage; `forward` stops before the output head.

    A rank holds its tensor-parallel shards of the stage's blocks; on the first stage also its rows of the embedding table, on the
    last stage the final norm and its rows of the output head.
    """

    @property
    def chunks(self) -> list["LanguageModel"]:
        """The model chunks of this pipeline rank."""
        return [self]

    def head(self) -> nn.Parameter:
        """This rank's rows [V_r, H] of the output head, on the last stage; if tied, of the embedding table."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class InterleavedModel(nn.ModuleList):
    """The model chunks of a pipeline rank under the interleaved schedule: chunk v of rank r is stage v * PP + r.

    It has no forward pass of its own: the schedule calls the chunks (`parallel.schedule`).
    """

    @property
    def chunks(self) -> list[LanguageModel]:
        """The model chunks of this pipeline rank."""
        return cast(list[LanguageModel], list(self))

    @property
    def config(self) -> TransformerConfig:
        """megatron-core's config, the same for all chunks."""
        return self.chunks[0].config

    def head(self) -> nn.Parameter:
        """As `LanguageModel.head`, of the last chunk."""
        return self.chunks[-1].head()


Model = LanguageModel | InterleavedModel
"""A rank's part of a model."""


def transformer_config(
    arch: Architecture, parallel: ParallelConfig, dtype: str, performance: PerformanceConfig
) -> TransformerConfig:
    """megatron-core's config of an architecture in a layout: no dropout, loss per token, fusions only with CUDA."""
    gpu, family = process_groups.device().type == "cuda", arch.traits
    experts = {
        "num_moe_experts": arch.experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.ffn,
        "moe_router_pre_softmax": not arch.normalize_experts,  # softmax after top-k normalizes
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall" if gpu else "allgather",  # all-to-all needs CUDA
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
    }
    return TransformerConfig(
        num_layers=len(arch.layers),
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm" if family.norm == "RMSNorm" else "LayerNorm",
        layernorm_zero_centered_gamma=family.norm == "LayerNorm1P",
        layernorm_epsilon=arch.norm_eps,
        activation_func=ACTIVATIONS[family.activation],
        gated_linear_unit=family.gated,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        window_size=(arch.window - 1, 0) if arch.window else None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        cp_comm_type="all_gather" if arch.window else "p2p",  # Transformer Engine's ring attention has no window
        sequence_parallel=parallel.sequence,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        use_cpu_initialization=not gpu,
        perform_initialization=False,  # every parameter is loaded
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        # With interleaving over two ranks both neighbours are one rank, and batched messages swap activations and gradients
        # without an error (seen on gloo; Megatron-LM refuses it). Separate messages keep their order.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=gpu and parallel.virtual == 1,
        **(experts if arch.experts else {}),
        **tuning.model_options(performance, arch),
    )


def build(
    arch: Architecture, parallel: ParallelConfig, dtype: str, performance: PerformanceConfig | None = None
) -> Model:
    """Build this rank's part of a model, with uninitialized parameters (`run_folder.load_weights` loads them).

    Args:
        parallel: the current layout (`process_groups.distributed_context`, `use_layout`).
        dtype: "bf16" or "fp32".
        performance: options of a model in training; None: forward passes only.

    Raises:
        UserError: the layout does not divide the model, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; use {' or '.join(DTYPES)}.")
    check_shardable(arch, parallel)
    performance = performance or PerformanceConfig().frozen()
    config = transformer_config(arch, parallel, dtype, performance)
    chunks = [_chunk(arch, parallel, config, v).to(process_groups.device()) for v in range(parallel.virtual)]
    for chunk in chunks:
        tuning.fuse_gradients(chunk, performance, arch)
    return chunks[0] if parallel.virtual == 1 else InterleavedModel(chunks)


def _chunk(arch: Architecture, parallel: ParallelConfig, config: TransformerConfig, number: int) -> LanguageModel:
    letters = {"attention": "*", "mlp": "E" if arch.experts else "-"}
    stages = [[letters[part] for block, part in arch.layers if block in own] for own in stage_blocks(arch, parallel)]
    model = LanguageModel(
        config=config,
        hybrid_stack_spec=layer_spec.stack_spec(arch.traits.qk_norm),
        vocab_size=padded_vocab(arch, parallel.tensor),
        max_sequence_length=arch.max_positions,
        hybrid_layer_pattern="|".join(map("".join, stages)),
        pre_process=process_groups.is_first_stage() and number == 0,
        post_process=process_groups.is_last_stage() and number == parallel.virtual - 1,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_percent=arch.rotary_fraction,
        rotary_base=arch.rope_theta,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        vp_stage=number if parallel.virtual > 1 else None,
    )
    if arch.rope_scaling:
        s = arch.rope_scaling
        scale_rope(model, s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_positions)
    return model


def layers(model: Model) -> list[Any]:
    """This rank's layers (megatron-core's) over all chunks. Their `layer_number` counts from 1 over the whole model."""
    return [layer for chunk in model.chunks for layer in chunk.decoder.layers]


def global_name(chunk: LanguageModel, name: str) -> str:
    """Key in the distributed checkpoint of a chunk's parameter: layers count over all stages, experts over all ranks."""
    if not name.startswith("decoder.layers."):
        return name
    index, rest = name.removeprefix("decoder.layers.").split(".", 1)
    if rest.startswith("mlp.experts.local_experts."):
        expert, rest = rest.removeprefix("mlp.experts.local_experts.").split(".", 1)
        own = process_groups.own_experts(chunk.config.num_moe_experts)
        rest = f"mlp.experts.{own[int(expert)]}.{rest}"
    return f"decoder.layers.{chunk.decoder.layers[int(index)].layer_number - 1}.{rest}"


def named_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """(checkpoint key, parameter) of this rank's part; the last stage's copy of a tied head has the embedding's key."""
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield global_name(chunk, name), parameter
