"""Choices of the stage export. No torch import."""

from enum import StrEnum


class ExportFormat(StrEnum):
    """Format of an exported model."""

    hf = "hf"
    """Hugging Face folder."""
    gpt = "gpt"
    """Checkpoint of Megatron-Core's GPTModel, for Megatron-LM."""
    gguf = "gguf"
    """One file for llama.cpp."""


class GGUFType(StrEnum):
    """Number format of the matrices in a GGUF file; vectors are fp32."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"
    q8_0 = "q8_0"
    """8 bits with a scale for each 32 columns. Matrices that 32 does not divide are f16."""


class GptNames(StrEnum):
    """Layer spec of Megatron-Core, which decides the names of the norms' parameters."""

    te = "te"
    """Transformer Engine's spec: norms fused into the projections."""
    local = "local"
    """Megatron-Core's local spec: separate norms under the fused names."""
    plain = "plain"
    """Separate norms under their own names."""
