"""Builds an architecture on Megatron-Core: the one place where a model is made."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_mcore import runtime
from minitron_mcore.config import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import spec
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.table import padded_vocab

from megatron.core.models.hybrid.hybrid_model import HybridModel  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LanguageModel(HybridModel):
    """HybridModel whose forward can stop before the output head.

    A pipeline stage holds its blocks' tensor-parallel shards; the first also the embedding table's rows, the last the final
    norm and the head's rows.
    """

    def forward(self, *args, headless: bool = False, **kwargs) -> Tensor:
        """With `headless`, the last stage returns the final norm's output [S, B, H] ([S_r, B, H] under sequence parallelism)."""
        had_head = self.post_process
        self.post_process = had_head and not headless
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.post_process = had_head

    def head(self) -> nn.Parameter:
        """This rank's rows [V_r, H] of the output head, on the last stage; the embedding table's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def check_shardable(arch: Architecture, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        UserError: names every size that the layout doesn't divide, and the nearest that it does.
    """
    tp = parallel.tensor
    wrong = [f"{name} {n} (next: {-(-n // tp) * tp})" for name, n in _sharded(arch).items() if n % tp]
    if wrong:
        allowed = [n for n in range(1, arch.groups + 1) if all(size % n == 0 for size in _sharded(arch).values())]
        raise UserError(
            f"parallel.tensor {tp} does not divide {', '.join(wrong)}: use tensor {' or '.join(map(str, allowed))}, "
            "or another size of the model."
        )
    if parallel.pipeline > arch.blocks:
        raise UserError(f"parallel.pipeline {parallel.pipeline} is more than the model's {arch.blocks} blocks.")


def _sharded(arch: Architecture) -> dict[str, int]:
    return {"heads": arch.heads, "key/value groups": arch.groups, "ffn": arch.ffn}


def stage_blocks(arch: Architecture, parallel: ParallelConfig) -> list[list[int]]:
    """Blocks of each pipeline stage: as even as can be, earlier stages take the rest."""
    return [part.tolist() for part in np.array_split(np.arange(arch.blocks), parallel.pipeline)]


def transformer_config(arch: Architecture, parallel: ParallelConfig, dtype: str) -> TransformerConfig:
    """megatron-core's config of an architecture in a layout: no dropout, loss per token, fusions only where CUDA is."""
    gpu = runtime.device().type == "cuda"
    return TransformerConfig(
        num_layers=2 * arch.blocks,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        use_cpu_initialization=not gpu,
        perform_initialization=False,  # every parameter is loaded
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        batch_p2p_comm=gpu,  # gloo has no batched point-to-point
        overlap_p2p_comm=False,
    )


def build(arch: Architecture, parallel: ParallelConfig, dtype: str) -> LanguageModel:
    """This rank's part of a model; its parameters are not set yet (`checkpoint.load_weights` sets them).

    Args:
        arch: sizes.
        parallel: the layout that `runtime.distributed` was entered with.
        dtype: "bf16" or "fp32".

    Raises:
        UserError: a layout that doesn't divide the model, an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; use {' or '.join(DTYPES)}.")
    check_shardable(arch, parallel)
    model = LanguageModel(
        config=transformer_config(arch, parallel, dtype),
        hybrid_stack_spec=spec.stack_spec(),
        vocab_size=padded_vocab(arch, parallel.tensor),
        max_sequence_length=arch.max_positions,
        hybrid_layer_pattern="|".join("*-" * len(blocks) for blocks in stage_blocks(arch, parallel)),
        pre_process=runtime.is_first_stage(),
        post_process=runtime.is_last_stage(),
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if arch.rope_scaling:
        # HybridModel has no argument for it; its rotary embedding has the method.
        s = arch.rope_scaling
        rope = model.rotary_pos_emb
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq, s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_positions
        )
    return model.to(runtime.device())


def global_name(model: LanguageModel, name: str) -> str:
    """A local parameter's key in the distributed checkpoint: layers numbered over all stages."""
    if not name.startswith("decoder.layers."):
        return name
    index, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{model.decoder.layers[int(index)].layer_number - 1}.{rest}"


def named_parameters(model: LanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(checkpoint key, parameter) of this rank's part; a last stage's copy of a tied head goes by the embedding's key."""
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield global_name(model, name), parameter
