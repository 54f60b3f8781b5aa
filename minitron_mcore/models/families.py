"""Model families: rows of the parameter table and the keys of a Hugging Face config. Imports no torch.

A row names a parameter in Megatron-Core and in Hugging Face and gives each dimension a logical axis (see `parameter_table`). To add
a family, add an entry to `FAMILIES`: its rows, made of the parts below; the config key of each size; the config values that this
package supports (`demands`); its layer variants. Then add it to tests/helpers/families.py.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One parameter of a family."""

    name: str
    """Name in Megatron-Core: {a} and {m} stand for the number of a block's attention and MLP layer, {e} for an expert."""
    axes: tuple[str, ...]
    """Logical axis of each dimension."""
    hf: tuple[str, ...]
    """Names of the Hugging Face tensors that are packed along dimension 0: {i} stands for the block, {e} for an expert."""
    tp_dim: int | None = None
    """The dimension that is sharded over tensor-parallel ranks; None: replicated."""

    @property
    def in_block(self) -> bool:
        """Whether each block has such a parameter."""
        return "{i}" in self.hf[0]

    @property
    def in_expert(self) -> bool:
        """Whether each expert has such a parameter."""
        return "{e}" in self.name

    @property
    def part(self) -> str | None:
        """The layer of the block that has it: "attention" or "mlp"; None outside the blocks."""
        return "attention" if "{a}" in self.name else "mlp" if "{m}" in self.name else None


@dataclass(frozen=True)
class Family:
    """A family's parameters, config keys and layer variants; sizes are in `Architecture`."""

    hf_class: str
    rows: tuple[Row, ...]
    keys: dict[str, tuple[str, ...]]
    """Architecture field -> its attribute in transformers' config object, then keys that older folders may have too.

    `rotary_fraction` is an entry of the object's `rope_parameters`.
    """
    demands: dict[str, object] = field(default_factory=dict)
    """Attribute of the config object -> the only supported value; not checked if the class lacks the attribute."""
    activation: str = "silu"
    gated: bool = True
    """The MLP computes down(act(gate) * up); otherwise down(act(up))."""
    norm: str = "RMSNorm"
    """"RMSNorm", or "LayerNorm1P": LayerNorm with a bias and a weight stored as gamma - 1."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """A norm over head_dim on queries and keys, before the rotary embedding."""
    heads_divide_hidden: bool = False
    """transformers' config class refuses a hidden size that is no multiple of the heads, even if head_dim is set."""

    @property
    def mixture(self) -> bool:
        """Whether the MLPs are mixtures of experts."""
        return any(row.in_expert for row in self.rows)


_BLOCK = "model.layers.{i}."
_EMBEDDING = Row("embedding.word_embeddings.weight", ("vocab", "hidden"), ("model.embed_tokens.weight",), 0)
_HEAD = Row("output_layer.weight", ("vocab", "hidden"), ("lm_head.weight",), 0)


def _norms(kind: str) -> tuple[Row, ...]:
    """The two norms of a block and the final norm; `kind`: "weight" or "bias"."""
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
    """A router and gated experts; arguments are Hugging Face's module names."""
    at = f"{_BLOCK}{module}."
    each = at + "experts.{e}."
    return (
        Row(_MLP + "router.weight", ("experts", "hidden"), (at + "gate.weight",)),
        Row(_MLP + "experts.{e}.linear_fc1.weight", ("glu", "hidden"), (f"{each}{gate}.weight", f"{each}{up}.weight")),
        Row(_MLP + "experts.{e}.linear_fc2.weight", ("hidden", "ffn"), (f"{each}{down}.weight",)),
    )


_OUTSIDE = (_EMBEDDING, *_norms("weight"), _HEAD)
_LLAMA = (*_OUTSIDE, *_ATTENTION, *_GATED)

_KEYS: dict[str, tuple[str, ...]] = {
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
_NEMOTRON_KEYS: dict[str, tuple[str, ...]] = {
    "norm_eps": ("norm_eps",),
    "head_dim": ("head_dim", "kv_channels"),
    "rotary_fraction": ("partial_rotary_factor", "rope_percent"),
}
_MOE_KEYS = {"experts_per_token": ("num_experts_per_tok",)}
_PLAIN: dict[str, object] = {"norm_type": None, "normalization": None, "attention_bias": False, "mlp_bias": False}
_SILU = _PLAIN | {"hidden_act": "silu"}
_QWEN = _SILU | {"use_sliding_window": False}

FAMILIES = {
    # Llama 2, 3, 3.1, 3.2, and other models of this class.
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
