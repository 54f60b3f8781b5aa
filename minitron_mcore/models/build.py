"""Builds an architecture on Megatron-Core: the one place where a model is made."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import layer_spec, tuning
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.parameter_table import padded_vocab
from minitron_mcore.models.sharding import check_shardable, stage_blocks
from minitron_mcore.parallel import process_groups

from megatron.core.activations import squared_relu  # isort: skip
from megatron.core.models.hybrid.hybrid_model import HybridModel  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip

ACTIVATIONS = {"silu": F.silu, "relu2": squared_relu}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LanguageModel(HybridModel):
    """HybridModel whose forward stops before the output head: losses take the hidden states and the head apart.

    A pipeline stage holds its blocks' tensor-parallel shards; the first also the embedding table's rows, the last the final
    norm and the head's rows.
    """

    def forward(self, *args, **kwargs) -> Tensor:
        """The last stage returns the final norm's output [S, B, H] ([S_r, B, H] under sequence parallelism)."""
        had_head = self.post_process
        self.post_process = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.post_process = had_head

    @property
    def chunks(self) -> list["LanguageModel"]:
        return [self]

    def head(self) -> nn.Parameter:
        """This rank's rows [V_r, H] of the output head, on the last stage; the embedding table's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class InterleavedModel(nn.ModuleList):
    """The chunks of a pipeline rank, each a `LanguageModel`: chunk v of rank r is stage v * PP + r.

    The first stage, of rank 0, also holds the embedding table's rows, the last one, of the last rank, the final norm and the
    head's rows. Only megatron-core's interleaved schedule can call the chunks in their order (see `schedule`).
    """

    @property
    def chunks(self) -> list[LanguageModel]:
        return list(self)

    @property
    def config(self) -> TransformerConfig:
        return self[0].config

    def head(self) -> nn.Parameter:
        return self[-1].head()


Model = LanguageModel | InterleavedModel
"""A rank's part of a model; `chunks` are what its pipeline schedule calls."""


def transformer_config(
    arch: Architecture, parallel: ParallelConfig, dtype: str, performance: PerformanceConfig
) -> TransformerConfig:
    """megatron-core's config of an architecture in a layout: no dropout, loss per token, fusions only where CUDA is."""
    gpu, family = process_groups.device().type == "cuda", arch.traits
    experts = {
        "num_moe_experts": arch.experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.ffn,
        "moe_router_pre_softmax": not arch.normalize_experts,  # after the choice, the softmax normalizes it
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall" if gpu else "allgather",  # the former wants its counts from a GPU
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
        cp_comm_type="all_gather" if arch.window else "p2p",  # Transformer Engine's ring knows no window
        sequence_parallel=parallel.sequence,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        use_cpu_initialization=not gpu,
        perform_initialization=False,  # every parameter is loaded
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        # Interleaved on two ranks both neighbours are one rank, and a batch of messages mixes up activations and gradients in
        # silence (seen on gloo; Megatron-LM refuses it). One by one and apart, as it then wants them, they keep their order.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=gpu and parallel.virtual == 1,
        **(experts if arch.experts else {}),
        **tuning.model_options(performance, arch),
    )


def build(
    arch: Architecture, parallel: ParallelConfig, dtype: str, performance: PerformanceConfig | None = None
) -> Model:
    """This rank's part of a model; its parameters are not set yet (`checkpoint.load_weights` sets them).

    Args:
        arch: sizes.
        parallel: the layout that `runtime.distributed` was entered with.
        dtype: "bf16" or "fp32".
        performance: of a model in training; None: the model makes forward passes only.

    Raises:
        UserError: a layout that doesn't divide the model, an unknown dtype.
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
        # HybridModel has no argument for it; its rotary embedding has the method.
        s = arch.rope_scaling
        rope = model.rotary_pos_emb
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq, s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_positions
        )
    return model


def layers(model: Model) -> list[nn.Module]:
    """This rank's layers over all chunks, each with its `layer_number`, which counts from 1 over the whole model."""
    return [layer for chunk in model.chunks for layer in chunk.decoder.layers]


def global_name(chunk: LanguageModel, name: str) -> str:
    """A local parameter's key in the distributed checkpoint: layers numbered over all stages, experts over all ranks."""
    if not name.startswith("decoder.layers."):
        return name
    index, rest = name.removeprefix("decoder.layers.").split(".", 1)
    if rest.startswith("mlp.experts.local_experts."):
        expert, rest = rest.removeprefix("mlp.experts.local_experts.").split(".", 1)
        own = process_groups.own_experts(chunk.config.num_moe_experts)
        rest = f"mlp.experts.{own[int(expert)]}.{rest}"
    return f"decoder.layers.{chunk.decoder.layers[int(index)].layer_number - 1}.{rest}"


def named_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """(checkpoint key, parameter) of this rank's part; a last stage's copy of a tied head goes by the embedding's key."""
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield global_name(chunk, name), parameter
