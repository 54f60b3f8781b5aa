"""GGUF files: a failure means that llama.cpp's users get other weights or token ids here than there."""

import inspect
import io
import json
import shutil
import unicodedata

import gguf
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen2Tokenizer

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.formats import gguf_file, gguf_tokenizer, gguf_writer
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.models import architecture
from minitron_mcore.testing import on_ranks
from tests.helpers import families, gguf_files, models
from tests.helpers.cutting import export
from tests.helpers.gguf_files import Q
from tests.helpers.models import convert_and_run, read_all

TP2 = ParallelConfig(tensor=2)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = {"q_proj": Q.F16, "k_proj": Q.BF16, "v_proj": Q.Q4_1, "up_proj": Q.F32, "embed_tokens": Q.Q4_0}
GGUF = {
    "llama31": ("llama", "llama-bpe", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}}),
    "llama32": ("llama", "smollm", {"rope_parameters": families.PLAIN}),
    "qwen2": ("qwen2", "qwen2", {"head_dim": 8}),
    "qwen25_tied": ("qwen2", "qwen2", {"head_dim": 8}),
}


def stored_as(name: str):
    return MIXED.get(name.split(".")[-2], Q.Q8_0)


@pytest.mark.parametrize("which", GGUF)
def test_gguf_is_read(tmp_path, which):
    """Weights are the blocks' values, in the rows that transformers reads them to; config and logits the original's."""
    name, pre, sizes = GGUF[which]
    folder = families.tiny(which, tmp_path / "hf", **(gguf_files.SIZES | sizes))
    file, ids = gguf_files.write(tmp_path / "model.gguf", folder, name, stored_as, pre), models.tokens()
    [found, _] = on_ranks(convert_and_run, 2, TP2, file, file, tmp_path / "ckpt", TP2, ids)
    weights = models.weights(folder)
    for key, weight in weights.items():  # rows are quantised each alone, so their order doesn't matter
        if weight.ndim > 1:
            kind = stored_as(key)
            weights[key] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind).copy())
    back = export(tmp_path / "ckpt", tmp_path / "out")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in back.items())
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in back.items())
    given, got = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert got["transformers_version"]  # without it transformers 5 warns of a tokenizer pattern that is right
    same = "architectures hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size rms_norm_eps"
    same += " tie_word_embeddings max_position_embeddings num_hidden_layers rope_parameters"
    assert {key: got[key] for key in same.split()} == {key: given[key] for key in same.split()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert (found - models.hf_logits(folder, ids)).abs().max() <= 2e-4


TEXTS = [
    "a\n\n  12345 a end café",
    "cafe\u0301 1a2 — 日本語 😀",
    "▁ naïve — 日本語 😀\r\n\tend  ",
    "I'LL don't",
    " ",
    "<|im_start|>a<|im_end|>",
]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_byte_level_tokenizer(tmp_path, pre):
    folder = families.tiny("llama32", tmp_path / "hf", **gguf_files.SIZES)
    tokenizer = read_tokenizer(gguf_files.write(tmp_path / "model.gguf", folder, "llama", Q.F16, pre), tmp_path / "out")
    tokens, merges = gguf_files.byte_tokens(gguf_files.SIZES["vocab_size"])
    begin = [tokens[1]] if pre == "llama-bpe" else []
    digits = {"llama-bpe": ["123", "4", "5"], "qwen2": [*"12345"], "smollm": [*"12345"], "gpt-2": ["1234", "5"]}[pre]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12345").input_ids) == [*begin, "a", *digits]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    for text in TEXTS:
        decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens="im_start" not in text)
        assert decoded.removeprefix("".join(begin)) == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)
    if pre == "qwen2":
        vocab = {token: i for i, token in enumerate(tokens)}
        theirs = Qwen2Tokenizer(
            vocab, [tuple(merge.split()) for merge in merges], extra_special_tokens=gguf_files.SPECIAL
        )
        assert [tokenizer(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


def test_sentencepiece_tokenizer(tmp_path):
    """Llama 2's kind: the same ids as the sentencepiece library's own, from its vocabulary."""
    pieces = io.BytesIO()
    text = [" ".join(inspect.getsource(module).split("\n")) for module in (inspect, json, shutil)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=pieces, model_type="bpe", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentence_length=10**6, minloglevel=2,
    )  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(model_proto=pieces.getvalue())
    ids = range(oracle.get_piece_size())
    types = [2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1 for i in ids]
    vocabulary = [oracle.id_to_piece(i) for i in ids], [oracle.get_score(i) for i in ids], types
    folder = families.tiny("llama2", tmp_path / "hf", **(gguf_files.SIZES | {"vocab_size": len(types)}))
    file = gguf_files.write(tmp_path / "model.gguf", folder, "llama", Q.F16, vocabulary=vocabulary)
    tokenizer = read_tokenizer(file, tmp_path / "out")
    for line in [*TEXTS[:2], *TEXTS[3:5], "def load(path):\n    return json.loads(path)  # " + "x" * 30]:
        assert tokenizer(line).input_ids == [1, *oracle.encode(line)], line
        assert tokenizer.decode(tokenizer(line).input_ids, skip_special_tokens=True) == line
    arch, _ = architecture.read_hf(folder)
    gguf_writer.write_file(tmp_path / "back.gguf", arch, HFFolder(folder), tmp_path / "out", "f16", {})
    given, back = (gguf_file.GGUFFile(path, torch.float32) for path in (file, tmp_path / "back.gguf"))
    gguf_tokenizer.check(back, tmp_path / "out")
    for field in ("tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert back.field(f"tokenizer.ggml.{field}") == given.field(f"tokenizer.ggml.{field}")
    assert back.field("tokenizer.ggml.add_bos_token") and back.field("tokenizer.ggml.add_space_prefix")


def read_tokenizer(file, folder):
    gguf_tokenizer.read(gguf_file.GGUFFile(file, torch.float32)).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


PLAIN = gguf_files.SIZES | {"rope_parameters": families.PLAIN}
GGUF_MISTAKES = {  # 64 original positions and a factor of 4 are not Llama 3's
    "rope": (
        "llama",
        "llama31",
        gguf_files.SIZES,
        "qwen2",
        "rope_freqs.weight in .* is not what RopeScaling.*8192.* makes",
    ),
    "architecture": (
        "gemma2",
        "llama32",
        PLAIN,
        "qwen2",
        "holds a gemma2 model; supported in GGUF: llama, qwen2, qwen3, nemotron",
    ),
    "biases": ("llama", "qwen2", PLAIN, "qwen2", "holds blk.0.attn_k.bias, which a llama model does not have"),
    "no biases": ("qwen2", "llama32", PLAIN | {"head_dim": 8}, "qwen2", "blk.0.attn_q.bias is missing"),
    "pre-tokenizer": (
        "llama",
        "llama32",
        PLAIN,
        "deepseek-llm",
        "pre-tokenizer 'deepseek-llm'; supported: gpt-2, smollm",
    ),
}


@pytest.mark.parametrize(("name", "which", "sizes", "pre", "sentence"), GGUF_MISTAKES.values(), ids=GGUF_MISTAKES)
def test_bad_ggufs_are_refused(tmp_path, name, which, sizes, pre, sentence):
    folder = families.tiny(which, tmp_path / "hf", **sizes)
    file = gguf_files.write(tmp_path / "model.gguf", folder, name, Q.Q8_0, pre)
    with pytest.raises(UserError, match=sentence):
        read_all(file, file)


def test_cut_ggufs_are_refused(tmp_path):
    folder = families.tiny("llama32", tmp_path / "hf", **PLAIN)
    file = gguf_files.write(tmp_path / "model.gguf", folder, "llama", Q.Q8_0)
    whole = file.read_bytes()
    for size in (0, 3, 1000, len(whole) - 5000):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a whole GGUF file"):
            read_all(file, file)
    gguf_files.write(file, folder, "llama", Q.Q8_0, parts=3)
    with pytest.raises(UserError, match="is one of 3 parts"):
        read_all(file, file)
    with pytest.raises(UserError, match="no GGUF file at"):
        read_all(tmp_path / "none.gguf", tmp_path / "none.gguf")
