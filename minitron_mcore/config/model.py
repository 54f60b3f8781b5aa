"""The config section `model`: the Hugging Face model from which a run starts. No torch import."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class RopeScalingConfig:
    """As `models.architecture.RopeScaling`."""

    factor: float = MISSING
    low_freq_factor: float = MISSING
    high_freq_factor: float = MISSING
    original_max_positions: int = MISSING


@dataclass
class ArchitectureConfig:
    """The fields of `models.architecture.Architecture`, which describes and checks them."""

    family: str = MISSING
    blocks: int = MISSING
    hidden: int = MISSING
    ffn: int = MISSING
    heads: int = MISSING
    groups: int = MISSING
    head_dim: int = MISSING
    vocab: int = MISSING
    max_positions: int = MISSING
    norm_eps: float = MISSING
    rope_theta: float = MISSING
    rope_scaling: RopeScalingConfig | None = None
    tied: bool = MISSING
    rotary_fraction: float = 1.0
    window: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    normalize_experts: bool = True
    no_attention: tuple[int, ...] = ()
    no_mlp: tuple[int, ...] = ()


@dataclass
class ModelConfig:
    """The Hugging Face model from which a run starts."""

    name: str = MISSING
    """Name of the work folder below `runs`; defaults to the last part of `hf`, or of `work_dir` without `hf`."""
    hf: str = MISSING
    """Hugging Face folder (config.json, *.safetensors, tokenizer files) or GGUF file."""
    weights: str | None = None
    """Other source of the weights: a checkpoint of Megatron-Core's GPTModel, a GGUF file or another folder; null reads `hf`."""
    architecture: ArchitectureConfig | None = None
    """Expected fields of `models.architecture.Architecture`; a dry run also uses them where the folder does not exist. null
    accepts any model."""
