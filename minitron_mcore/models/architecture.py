"""A model's shape and constants, and their translation from and to Hugging Face's `config.json`. No torch import."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths (config key `rope_scaling`, type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Architecture:
    """Everything that decides a model's tensors and its mathematics; sizes are global, blocks as papers count them."""

    family: str
    blocks: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    """The output head is the embedding table."""

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.heads % self.groups:
            raise UserError(f"{self.heads} query heads cannot be shared out over {self.groups} key/value groups.")

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


FAMILIES = {"LlamaForCausalLM": "llama"}


def from_hf(config: dict) -> Architecture:
    """Read a Hugging Face config, with transformers 4's keys or 5's (`rope_parameters`).

    Raises:
        UserError: an architecture, activation, rope type or bias that this package does not have yet.
    """
    name = (config.get("architectures") or ["(none)"])[0]
    if name not in FAMILIES:
        raise UserError(f"architecture {name} is not supported; supported: {', '.join(FAMILIES)}.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{name} with activation {activation!r} is not supported: expected 'silu'.")
    for bias in ("attention_bias", "mlp_bias"):
        if config.get(bias):
            raise UserError(f"{name} with {bias}=true is not supported: expected no biases.")
    rope = config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta", 1e4),
    }
    heads = config["num_attention_heads"]
    return Architecture(
        family=FAMILIES[name],
        blocks=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", 1e4)),
        rope_scaling=_rope_scaling(rope),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _rope_scaling(rope: dict) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rope type {kind!r} is not supported; supported: default, llama3.")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def to_hf(arch: Architecture, shipped: dict, dtype: str) -> dict:
    """The config of an exported model: the shipped one with this architecture's sizes; `head_dim` is always written.

    Both spellings of the rotary constants stay as shipped: pruning never changes them.
    """
    config = {
        key: value
        for key, value in shipped.items()
        if key not in ("_name_or_path", "torch_dtype", "quantization_config")
    }
    return config | {
        "num_hidden_layers": arch.blocks,
        "hidden_size": arch.hidden,
        "intermediate_size": arch.ffn,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab,
        "tie_word_embeddings": arch.tied,
        "dtype": dtype,
    }


def check_exportable(arch: Architecture) -> None:
    """Refuse what the family's Hugging Face class cannot hold.

    Raises:
        UserError: transformers' LlamaConfig refuses a hidden size that its heads don't divide, whatever head_dim says.
    """
    if arch.family == "llama" and arch.hidden % arch.heads:
        below = arch.hidden - arch.hidden % arch.heads
        raise UserError(
            f"hidden {arch.hidden} is not a multiple of {arch.heads} heads, which transformers' LlamaConfig demands: "
            f"use {below} or {below + arch.heads}."
        )


def read_hf(folder: Path) -> tuple[Architecture, dict]:
    """Architecture and raw config of a Hugging Face folder.

    Raises:
        UserError: no such folder, no readable config.json, an unsupported model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"no Hugging Face model at {folder}: expected config.json, *.safetensors and tokenizer files there "
            "(give the folder with model.hf=/path/to/folder)."
        )
    try:
        config = json.loads(path.read_text())
        return from_hf(config), config
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path} is not a usable model config: {type(error).__name__} {error}.") from error
