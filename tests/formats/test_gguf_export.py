"""Written GGUF files: a failure means that llama.cpp serves another model, or reads other token ids, than was exported."""

import dataclasses
import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.export import gguf_export
from minitron_mcore.formats import gguf_layout, gguf_tokenizer, gguf_writer
from minitron_mcore.formats.gguf_file import GGUFFile
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.testing import on_ranks
from tests.helpers import families, gguf_files, models
from tests.helpers.gguf_files import Q
from tests.helpers.launching import fork, word_tokenizer

SQUARE = gguf_files.SIZES | {"head_dim": 8}
"""heads x head_dim = hidden, which llama.cpp's Qwen2 and Nemotron demand."""
WIDE = gguf_files.SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
"""transformers reads no head_dim from a Qwen3 file: 128 is its default."""
EXPORTED = {
    "llama31": (gguf_files.SIZES, "f32"),
    "llama32": (gguf_files.SIZES | {"intermediate_size": 90}, "q8_0"),
    "mistral": (gguf_files.SIZES, "f32"),
    "qwen2": (SQUARE, "f32"),
    "qwen25_tied": (SQUARE, "f16"),
    "qwen3": (WIDE, "f32"),
    "nemotron": (SQUARE, "f32"),
    "mistral_nemo": (gguf_files.SIZES, "bf16"),
}


def whole(weights, parameter) -> torch.Tensor:
    return weights.read(parameter, (0,) * len(parameter.shape), parameter.shape)


def stored(tensor: torch.Tensor, matrices: str) -> torch.Tensor:
    """What a type keeps of a tensor's values, by the gguf package alone."""
    kind = Q.F32 if tensor.ndim == 1 else Q.F16 if matrices == "q8_0" and tensor.shape[-1] % 32 else Q[matrices.upper()]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind).copy())


@pytest.mark.parametrize("which", EXPORTED)
def test_both_readers_read_the_exported_model(tmp_path, which):
    """This package's reader finds the same architecture and values, transformers the same logits where it can.

    transformers knows neither Llama 3's rope scaling in a file nor a Mistral's window, here of 5 tokens.
    """
    sizes, matrices = EXPORTED[which]
    folder = families.tiny(which, tmp_path / "hf", **sizes)
    arch, _ = architecture.read_hf(folder)
    path, ids = tmp_path / "model.gguf", models.tokens()[:, :5]
    gguf_writer.write_file(path, arch, HFFolder(folder), folder, matrices, {"general.name": "tiny"})
    gguf_export.check_file(path, arch, folder)
    ours, given = GGUFFile(path, torch.float32), HFFolder(folder)
    there = parameter_table.parameters(gguf_layout.as_stored(arch))
    for parameter, same in zip(parameter_table.parameters(arch), there, strict=True):
        found, expected = whole(ours, same), stored(whole(given, parameter), matrices)
        assert torch.allclose(found, expected, rtol=0, atol=2e-7 if which == "nemotron" else 0), parameter.name
    if matrices == "f32" and arch.rope_scaling is None:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
        with torch.no_grad():
            assert (theirs(ids).logits - models.hf_logits(folder, ids)).abs().max() <= 2e-5


def fields(file: GGUFFile) -> dict:
    names = ["model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "padding_token_id"]
    found = {name: file.field(f"tokenizer.ggml.{name}") for name in names}
    if scores := file.field("tokenizer.ggml.scores"):
        found["scores"] = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: len(scores) // 2]
    return found | {"template": file.field("tokenizer.chat_template")}


@pytest.mark.parametrize("pre", gguf_tokenizer.SPLITS)
def test_tokenizer_comes_back(tmp_path, pre):
    """From a file to a Hugging Face folder and back to a file: the same vocabulary, rules, special tokens and template."""
    folder = families.tiny("llama32", tmp_path / "hf", **(gguf_files.SIZES | {"rope_parameters": families.PLAIN}))
    given = GGUFFile(gguf_files.write(tmp_path / "given.gguf", folder, "llama", Q.F16, pre), torch.float32)
    gguf_tokenizer.read(given).save_pretrained(folder)
    arch, _ = architecture.read_hf(folder)
    gguf_writer.write_file(tmp_path / "back.gguf", arch, HFFolder(folder), folder, "f16", {})
    back = GGUFFile(tmp_path / "back.gguf", torch.float32)
    assert fields(back) == fields(given)
    assert back.field("tokenizer.ggml.add_bos_token") == (pre in ("llama-bpe", "tekken"))
    gguf_tokenizer.check(back, folder)


REFUSED = {
    "experts": ("mixtral", {}, "format=gguf writes llama, mistral, qwen2, qwen3, nemotron, not mixtral"),
    "width": ("qwen2", {}, "hidden is 64, but llama.cpp's qwen2 demands heads x head_dim, 8 x 16 = 128"),
    "tied": ("nemotron", SQUARE | {"tie_word_embeddings": True}, "tied to the embedding"),
    "rope": ("qwen3", WIDE | {"rope_parameters": families.SCALED}, "llama.cpp's qwen3 ignores Llama 3's rope scaling"),
}


@pytest.mark.parametrize(("which", "sizes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused(tmp_path, which, sizes, sentence):
    folder = families.tiny(which, tmp_path / "hf", **(gguf_files.SIZES | families.OF[which][1] | sizes))
    assert sentence in " ".join(gguf_layout.problems(architecture.read_hf(folder)[0]))


def test_launch_file(tmp_path):
    """As users type it: a checkpoint with a tokenizer becomes one file with its lineage; a tokenizer without merges is refused."""
    folder = families.tiny("llama32", tmp_path / "hf", **(gguf_files.SIZES | {"rope_parameters": families.PLAIN}))
    given = GGUFFile(gguf_files.write(tmp_path / "given.gguf", folder, "llama", Q.F16, "smollm"), torch.float32)
    gguf_tokenizer.read(given).save_pretrained(folder)
    one = ParallelConfig()
    on_ranks(models.import_hf, 1, one, folder, tmp_path / "runs/tiny/convert", one)
    command = [
        "export",
        "model.name=tiny",
        f"model.hf={folder}",
        "source=runs/tiny/convert",
        "format=gguf",
        "gguf_type=q8_0",
    ]
    output = fork(tmp_path, *command)
    assert "is read back: 22 tensors Q8_0, 7 tensors F32" in output, output
    file = GGUFFile(tmp_path / "runs/tiny/gguf/model-q8_0.gguf", torch.float32)
    assert file.field("general.name") == "hf" and file.field("general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0
    record = json.loads((tmp_path / "runs/tiny/gguf/minitron/lineage.json").read_text())
    assert record["fingerprint"] == open_checkpoint(tmp_path / "runs/tiny/convert").fingerprint
    word_tokenizer(tmp_path / "runs/tiny/convert/hf")
    refusal = fork(tmp_path, *command, "out_dir=again", fails=2)
    assert "is a WordLevel model; format=gguf writes BPE" in refusal and not (tmp_path / "again").exists()


def test_a_changed_file_is_not_taken_for_the_model(tmp_path):
    folder = families.tiny("qwen2", tmp_path / "hf", **SQUARE)
    arch, _ = architecture.read_hf(folder)
    gguf_writer.write_file(tmp_path / "model.gguf", arch, HFFolder(folder), folder, "f16", {})
    with pytest.raises(UserError, match="describes another model than was exported: rope_theta differ"):
        gguf_export.check_file(tmp_path / "model.gguf", dataclasses.replace(arch, rope_theta=1e4), folder)
