"""What llama.cpp calls a model and its tensors, and how it stores their rows and norms. Reader and writer share it. No torch."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import gguf
import numpy as np

from minitron_mcore.models import architecture
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.families import FAMILIES

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "nemotron": "nemotron"}
"""Family -> general.architecture, which is the name of the family that a file is read as."""
ROPE_FACTORS = "rope_freqs.weight"


def tensor_name(name: str, hf_name: str, blocks: int) -> str:
    """Name in a file of architecture `name` of a Hugging Face tensor."""
    return _names(name, blocks).get_name(hf_name, try_suffixes=(".weight", ".bias"))


@functools.cache
def _names(name: str, blocks: int) -> gguf.TensorNameMap:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[name], blocks)


def stored_rows(name: str, hf_name: str, rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Positions of rows in the file. For Llama, llama.cpp interleaves the two halves of each query and key head."""
    if name != "llama" or hf_name.split(".")[-2] not in ("q_proj", "k_proj"):
        return rows
    head, within = np.divmod(rows, head_dim)
    half, index = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * index + half


def norm_offset(name: str, hf_name: str) -> float:
    """What llama.cpp adds to a tensor: 1 to the weights of LayerNorm1P, which are gamma - 1 elsewhere."""
    return float(FAMILIES[name].norm == "LayerNorm1P" and hf_name.endswith("norm.weight"))


def rope_factors(arch: Architecture) -> np.ndarray:
    """Factor by which each rotary wavelength is scaled, [head_dim / 2]; 1 without rope scaling."""
    rope = arch.rope_scaling
    wavelength = 2 * np.pi * arch.rope_theta ** (np.arange(0, arch.head_dim, 2) / arch.head_dim)
    if rope is None:
        return np.ones_like(wavelength)
    turns = rope.original_max_positions / wavelength
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def as_stored(arch: Architecture) -> Architecture:
    """The architecture that a file describes: Mistral is a Llama whose positions end with its window, which llama.cpp ignores."""
    window = arch.window or arch.max_positions
    return replace(arch, family=ARCHITECTURES[arch.family], window=None, max_positions=min(window, arch.max_positions))


def problems(arch: Architecture) -> Iterator[str]:
    """Messages about what llama.cpp cannot hold."""
    remedy = "export a Hugging Face folder (format=hf)"
    if arch.family not in ARCHITECTURES:
        yield f"format=gguf writes {', '.join(ARCHITECTURES)}, not {arch.family}: {remedy}."
        return
    yield from architecture.export_problems(as_stored(arch))
    width = arch.heads * arch.head_dim
    if arch.family in ("qwen2", "nemotron") and width != arch.hidden:
        yield (
            f"hidden is {arch.hidden}, but llama.cpp's {arch.family} demands heads x head_dim, {arch.heads} x "
            f"{arch.head_dim} = {width}: {remedy}."
        )
    if arch.family == "nemotron" and arch.tied:
        yield f"the output head is tied to the embedding, which llama.cpp's nemotron does not support: {remedy}."
    if arch.rope_scaling and ARCHITECTURES[arch.family] != "llama":
        yield f"llama.cpp's {arch.family} ignores Llama 3's rope scaling, which this model has: {remedy}."
