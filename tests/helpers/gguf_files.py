"""GGUF files as llama.cpp's converter writes them, from small Hugging Face folders."""

import json
from pathlib import Path

import gguf
import numpy as np

from tests.helpers import models

Q = gguf.GGMLQuantizationType
SIZES = dict(
    vocab_size=288, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, head_dim=16
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokens(size: int) -> tuple[list[str], list[str]]:
    """Special tokens, the 256 bytes, and merges of Ċ (new line), Ġ (space), digits and letters; padded to `size` tokens."""
    from tokenizers import pre_tokenizers

    merges = ["Ċ Ċ", "Ġ Ġ", "1 2", "12 3", "123 4", "Ġ a", "e n", "en d", "c a", "Ã ©"]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    return tokens + [f"[PAD{i}]" for i in range(size - len(tokens))], merges


def write(path: Path, folder: Path, name: str, kind, pre: str = "smollm", vocabulary=None, parts: int = 1) -> Path:
    """The model in `folder` (fp32) as a `name` file.

    Args:
        name: llama.cpp's name of the architecture.
        kind: what a matrix is stored as: a type, or a function of its Hugging Face name. Vectors stay F32.
        pre: tokenizer.ggml.pre of a byte-level vocabulary.
        parts: files that the model is said to be in.
        vocabulary: (tokens, scores, types) of a SentencePiece vocabulary instead.
    """
    config, weights = json.loads((folder / "config.json").read_text()), models.weights(folder)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_uint16("split.count", parts)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if name == "llama":
        dim = config["head_dim"]
        writer.add_rope_dimension_count(dim)
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    _tokenizer(writer, config["vocab_size"], pre, vocabulary)
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    names = gguf.get_tensor_name_map(
        dict(map(reversed, gguf.MODEL_ARCH_NAMES.items()))[name], config["num_hidden_layers"]
    )
    for hf_name, weight in weights.items():
        weight, rows = weight.numpy(), {"q_proj": heads, "k_proj": groups}.get(hf_name.split(".")[-2])
        if name == "llama" and rows:  # llama.cpp rotates neighbours, Hugging Face halves
            weight = weight.reshape(rows, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        stored = kind(hf_name) if callable(kind) else kind
        key = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if weight.ndim == 1:
            writer.add_tensor(key, np.ascontiguousarray(weight))
        else:
            writer.add_tensor(key, gguf.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokenizer(writer, size, pre, vocabulary) -> None:
    if vocabulary:
        tokens, scores, types = vocabulary
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        ids = {"unk": 0, "bos": 1, "eos": 2}
    else:
        tokens, merges = byte_tokens(size)
        types = [3 if token in SPECIAL else 1 for token in tokens]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
        ids = {"unk": 0, "bos": 1, "eos": 2, "pad": 2}
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for role, i in ids.items():
        getattr(writer, f"add_{role}_token_id")(i)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def _rope_factors(config: dict) -> np.ndarray:
    """What transformers divides each rotary frequency by."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    found = [
        LlamaRotaryEmbedding(LlamaConfig(**(config | {"rope_parameters": rope}))).inv_freq
        for rope in (plain, config["rope_parameters"])
    ]
    return (found[0] / found[1]).numpy().astype(np.float32)
