"""Model families: each is rows of the parameter table and a translation of its Hugging Face config. No torch import.

A row names a parameter in Megatron-Core and in Hugging Face, and gives each dimension a logical axis (see `table`). To add a
family, write its rows from the parts below, say which config keys hold which size, which values this package can run
(`demands`), and which of the layers' variants it has; then put it into `FAMILIES`. tests/helpers/families.py wants an entry too.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One parameter. In `name`, `{a}` and `{m}` are a block's attention and MLP layer; in `hf`, `{i}` is the block; `{e}` is an
    expert in both."""

    name: str
    axes: tuple[str, ...]
    hf: tuple[str, ...]
    tp_dim: int | None = None
    """The dimension that tensor-parallel ranks share; experts are whole on the ranks that hold them."""

    @property
    def in_block(self) -> bool:
        return "{i}" in self.hf[0]

    @property
    def in_expert(self) -> bool:
        return "{e}" in self.name

    @property
    def part(self) -> str | None:
        """The layer of a block that has it: "attention" or "mlp"; None outside the blocks."""
        return "attention" if "{a}" in self.name else "mlp" if "{m}" in self.name else None


@dataclass(frozen=True)
class Family:
    """What sets a family apart from the others; sizes are an `Architecture`'s."""

    hf_class: str
    rows: tuple[Row, ...]
    keys: dict[str, tuple[str, ...]]
    """Architecture field -> the attribute of transformers' config object that holds it, then other keys that folders of older
    versions may carry beside it. `rotary_fraction` is an entry of the object's `rope_parameters`."""
    demands: dict[str, object] = field(default_factory=dict)
    """Attribute of the config object -> the only value that is supported; a class without the attribute has it."""
    activation: str = "silu"
    gated: bool = True
    """The MLP multiplies act(gate) by up; otherwise it is act(up)."""
    norm: str = "RMSNorm"
    """Or LayerNorm1P: LayerNorm with a bias and a weight stored as gamma - 1."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """A norm over head_dim on queries and keys, before the rotary embedding."""
    heads_divide_hidden: bool = False
    """Its transformers config class refuses a hidden size that is no multiple of the heads, whatever head_dim says."""


_BLOCK = "model.layers.{i}."
_EMBEDDING = Row("embedding.word_embeddings.weight", ("vocab", "hidden"), ("model.embed_tokens.weight",), 0)
_HEAD = Row("output_layer.weight", ("vocab", "hidden"), ("lm_head.weight",), 0)


def _norms(kind: str) -> tuple[Row, ...]:
    """The two norms of a block and the last one; `kind` is weight or bias."""
    return (
        Row(f"decoder.layers.{{a}}.input_layernorm.{kind}", ("hidden",), (f"{_BLOCK}input_layernorm.{kind}",)),
        Row(
            f"decoder.layers.{{m}}.pre_mlp_layernorm.{kind}", ("hidden",), (f"{_BLOCK}post_attention_layernorm.{kind}",)
        ),
        Row(f"decoder.final_norm.{kind}", ("hidden",), (f"model.norm.{kind}",)),
    )


_AT = "decoder.layers.{a}.self_attention."
_ATTENTION = (
    Row(_AT + "linear_qkv.weight", ("qkv", "hidden"), tuple(f"{_BLOCK}self_attn.{x}_proj.weight" for x in "qkv"), 0),
    Row(_AT + "linear_proj.weight", ("hidden", "heads"), (_BLOCK + "self_attn.o_proj.weight",), 1),
)
_QKV_BIAS = (Row(_AT + "linear_qkv.bias", ("qkv",), tuple(f"{_BLOCK}self_attn.{x}_proj.bias" for x in "qkv"), 0),)
_QK_NORM = tuple(
    Row(f"{_AT}{x}_layernorm.weight", ("head_dim",), (f"{_BLOCK}self_attn.{x}_norm.weight",)) for x in "qk"
)

_MLP = "decoder.layers.{m}.mlp."
_DOWN = Row(_MLP + "linear_fc2.weight", ("hidden", "ffn"), (_BLOCK + "mlp.down_proj.weight",), 1)
_GATED = (
    Row(
        _MLP + "linear_fc1.weight", ("glu", "hidden"), tuple(f"{_BLOCK}mlp.{x}_proj.weight" for x in ("gate", "up")), 0
    ),
    _DOWN,
)
_UNGATED = (Row(_MLP + "linear_fc1.weight", ("ffn", "hidden"), (_BLOCK + "mlp.up_proj.weight",), 0), _DOWN)


def _experts(module: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and gated experts, under Hugging Face's names."""
    at = f"{_BLOCK}{module}."
    each = at + "experts.{e}."
    return (
        Row(_MLP + "router.weight", ("experts", "hidden"), (at + "gate.weight",)),
        Row(_MLP + "experts.{e}.linear_fc1.weight", ("glu", "hidden"), (f"{each}{gate}.weight", f"{each}{up}.weight")),
        Row(_MLP + "experts.{e}.linear_fc2.weight", ("hidden", "ffn"), (f"{each}{down}.weight",)),
    )


_OUTSIDE = (_EMBEDDING, *_norms("weight"), _HEAD)
_LLAMA = (*_OUTSIDE, *_ATTENTION, *_GATED)

_KEYS = {
    "blocks": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "groups": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
    "max_positions": ("max_position_embeddings",),
    "norm_eps": ("rms_norm_eps",),
    "tied": ("tie_word_embeddings",),
}
_NEMOTRON_KEYS = {
    "norm_eps": ("norm_eps",),
    "head_dim": ("head_dim", "kv_channels"),
    "rotary_fraction": ("partial_rotary_factor", "rope_percent"),
}
_MOE_KEYS = {"experts_per_token": ("num_experts_per_tok",)}
_PLAIN = {"norm_type": None, "normalization": None, "attention_bias": False, "mlp_bias": False}
_SILU = _PLAIN | {"hidden_act": "silu"}
_QWEN = _SILU | {"use_sliding_window": False}

FAMILIES = {
    # Llama 2, 3, 3.1, 3.2 and what shares their class.
    "llama": Family("LlamaForCausalLM", _LLAMA, _KEYS, _SILU, heads_divide_hidden=True),
    # Mistral and Mistral-NeMo.
    "mistral": Family("MistralForCausalLM", _LLAMA, _KEYS | {"window": ("sliding_window",)}, _SILU),
    # Nemotron-4 and Minitron.
    "nemotron": Family(
        "NemotronForCausalLM",
        (*_OUTSIDE, *_norms("bias"), *_ATTENTION, *_UNGATED),
        _KEYS | _NEMOTRON_KEYS,
        _PLAIN | {"hidden_act": "relu2"},
        activation="relu2",
        gated=False,
        norm="LayerNorm1P",
    ),
    # Qwen2 and Qwen2.5.
    "qwen2": Family("Qwen2ForCausalLM", (*_LLAMA, *_QKV_BIAS), _KEYS, _QWEN, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", (*_LLAMA, *_QK_NORM), _KEYS, _QWEN, qk_norm=True),
    "mixtral": Family(
        "MixtralForCausalLM",
        (*_OUTSIDE, *_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2")),
        _KEYS | _MOE_KEYS | {"window": ("sliding_window",), "experts": ("num_local_experts", "num_experts")},
        _SILU,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (*_OUTSIDE, *_ATTENTION, *_QK_NORM, *_experts("mlp", "gate_proj", "up_proj", "down_proj")),
        _KEYS
        | _MOE_KEYS
        | {
            "ffn": ("moe_intermediate_size",),
            "experts": ("num_experts", "num_local_experts"),
            "normalize_experts": ("norm_topk_prob",),
        },
        _QWEN | {"mlp_only_layers": [], "decoder_sparse_step": 1},
        qk_norm=True,
    ),
}
