"""megatron-core's own GPTModel, and what tests do with it on every rank."""

import torch
import torch.nn.functional as F

from tests.helpers import models

VOCAB, PADDED = models.SIZES["vocab_size"], 128
# What Megatron-LM's options make of the same model: GPTModel.sharded_state_dict's metadata.
VARIANTS = {
    "default": {},
    "layer by layer": {"non_homogeneous_layers": True},
    "single shards": {"singleton_local_shards": True},
}


def gpt_model(parallel, vocab=PADDED, **changes):
    """megatron-core's own GPTModel of the sizes in tests.models, with random weights; `changes` of its config."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from minitron_mcore.parallel import process_groups

    sizes = models.SIZES
    options = dict(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        kv_channels=sizes["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.15,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=3 if parallel.pipeline == 2 else None,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    config = TransformerConfig(**(options | changes))
    spec = get_gpt_layer_local_spec(
        normalization=config.normalization, num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    torch.manual_seed(7)
    model = GPTModel(
        config,
        spec,
        vocab_size=vocab,
        max_sequence_length=sizes["max_position_embeddings"],
        pre_process=process_groups.is_first_stage(),
        post_process=process_groups.is_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000,
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval()


def gpt_logits(model, ids):
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(ids, positions, None)[..., :VOCAB]


def load_gpt(model, folder, strict="raise_all"):
    """As strictly as megatron-core can, unless told otherwise: nothing missing, nothing too many."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict=strict)
    for key in ("checkpoint_version", "iteration"):
        state.pop(key)
    model.load_state_dict(state)


def keep_norm_names(model):
    """As a layer spec does that doesn't name its norms after the linear layers behind them."""
    for layer in model.decoder.layers:
        layer.submodules_config.sharded_state_dict_keys_map = {}


def write_gpt(out_dir, parallel, ids=None, resave=None, variant="default", plain=False, changes=None):
    """Save a GPTModel as Megatron-LM does; its logits where a rank has all of it. `resave`: whose weights it takes."""
    from megatron.core import dist_checkpointing

    model = gpt_model(parallel, **(changes or {}))
    if resave:
        load_gpt(model, resave / "iter_0000003")
    if plain:
        keep_norm_names(model)
    folder = out_dir / "iter_0000003"
    folder.mkdir(parents=True, exist_ok=True)
    state = model.sharded_state_dict(metadata=dict(VARIANTS[variant]) or None)
    state |= {"iteration": 3, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(folder), async_strategy="mcore")
    (out_dir / "latest_checkpointed_iteration.txt").write_text("3\n")
    return None if ids is None else gpt_logits(model, ids)


def read_gpt(folder, parallel, ids, names, changes=None):
    """Logits of a GPTModel that loads `folder` as Megatron-LM does."""
    model = gpt_model(parallel, **(changes or {}))
    if names == "plain":
        keep_norm_names(model)
    # Transformer Engine's norms have an empty state of their own, which the local spec's GPTModel doesn't ask for.
    load_gpt(model, folder / "release", "assume_ok_unexpected" if names == "te" else "raise_all")
    return gpt_logits(model, ids)
