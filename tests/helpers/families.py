"""A small random folder of each family with awkward sizes, saved by transformers."""

from pathlib import Path

import torch

from tests.helpers import models

SIZES = dict(
    vocab_size=101,
    hidden_size=36,
    intermediate_size=30,
    num_hidden_layers=3,
    num_attention_heads=12,
    num_key_value_heads=6,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.15,
    tie_word_embeddings=False,
)
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
SCALED = PLAIN | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = dict(intermediate_size=14, num_experts_per_tok=3)
OF = {
    "llama2": ("Llama", dict(rope_parameters=PLAIN | {"rope_theta": 1e4}, num_key_value_heads=12)),
    "llama31": ("Llama", dict(rope_parameters=SCALED)),
    "llama32": ("Llama", dict(rope_parameters=SCALED, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(rope_parameters=PLAIN, sliding_window=5)),
    "mistral_nemo": ("Mistral", dict(rope_parameters=PLAIN, sliding_window=None, hidden_size=40)),
    "nemotron": ("Nemotron", dict(rope_parameters=PLAIN | {"partial_rotary_factor": 0.5}, hidden_size=38)),
    "qwen2": ("Qwen2", dict(rope_parameters=PLAIN)),
    "qwen25_tied": ("Qwen2", dict(rope_parameters=PLAIN, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(rope_parameters=PLAIN)),
    "mixtral": ("Mixtral", EXPERTS | dict(rope_parameters=PLAIN, num_local_experts=6, sliding_window=None)),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            rope_parameters=PLAIN, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=14, norm_topk_prob=True
        ),
    ),
    "qwen3_moe_raw": (
        "Qwen3Moe",
        dict(
            rope_parameters=PLAIN, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=14, norm_topk_prob=False
        ),
    ),
}


def tiny(which: str, folder: Path, seed: int = 0, **sizes) -> Path:
    """A random fp32 model of `OF[which]`, every parameter different from its initial constant."""
    import transformers

    kind, own = OF[which]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | own | sizes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centre = 1.0 if "norm" in name and "weight" in name and kind != "Nemotron" else 0.0
            parameter.data.uniform_(centre - 0.5, centre + 0.5)
    model.save_pretrained(folder)
    return folder


def round_trip(folder, root, parallel, ids):
    """On every rank: Hugging Face -> checkpoint -> logits."""
    models.import_hf(folder, root / "ckpt", parallel)
    return models.mcore_logits(root / "ckpt", parallel, ids)
