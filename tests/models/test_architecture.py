"""Hugging Face configs in and out: a failure means that a config key of some version is read wrongly, lost, or let through."""

import json

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.model import ArchitectureConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.formats import hf_convert
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.models.architecture import from_hf, to_hf
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import families, models

ONE = ParallelConfig()
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_old_and_new_rope_keys_are_one_model():
    old = from_hf(LLAMA | {"rope_theta": 500000.0, "rope_scaling": SCALING})
    older = from_hf(LLAMA | {"rope_theta": 500000.0, "rope_scaling": {**SCALING, "type": "llama3"}})
    new = from_hf(LLAMA | {"rope_parameters": SCALING | {"rope_theta": 500000.0}})
    assert old == older == new and new.rope_scaling.original_max_positions == 8192
    assert parameter_table.count(new) == 4_512_746_496


def test_a_llama_without_groups_or_head_dim():
    config = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
    found = from_hf(config | {"rope_scaling": None})
    assert (found.groups, found.head_dim, found.rope_theta) == (32, 96, 1e4)


def test_nemotrons_old_keys(tmp_path):
    """Folders of before August 2024: transformers reads their rope_theta, and ignores kv_channels and rope_percent, which must
    therefore agree with what it reads. An export keeps them up to date."""
    folder = families.tiny("nemotron", tmp_path / "new", head_dim=4, hidden_size=48)
    expected = models.hf_logits(folder, models.tokens())
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "partial_rotary_factor"):
        config.pop(key, None)
    config |= {"rope_theta": 1e6, "rope_percent": 0.5, "kv_channels": 4}
    for wrong in ({"rope_percent": 0.25}, {"kv_channels": 8}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*, but transformers reads"):
            from_hf(config | wrong)
    (folder / "config.json").write_text(json.dumps(config))
    on_ranks(models.import_hf, 1, ONE, folder, tmp_path / "ckpt", ONE)
    opened = open_checkpoint(tmp_path / "ckpt")
    assert (opened.arch.rotary_fraction, opened.arch.head_dim, opened.arch.rope_theta) == (0.5, 4, 1e6)
    (tmp_path / "back").mkdir()
    hf_convert.export_folder(opened, tmp_path / "back")
    assert torch.equal(models.hf_logits(tmp_path / "back", models.tokens()), expected)
    exported = json.loads((tmp_path / "back/config.json").read_text())
    assert (exported["kv_channels"], exported["rope_percent"]) == (4, 0.5)


def test_export_cuts_what_counts_layers(tmp_path):
    folder = families.tiny("qwen3", tmp_path / "hf")
    arch, shipped = architecture.read_hf(folder)
    import dataclasses

    exported = to_hf(dataclasses.replace(arch, blocks=2, hidden=24), shipped | {"quantization_config": {}}, "bfloat16")
    assert exported["layer_types"] == ["full_attention"] * 2 and exported["num_hidden_layers"] == 2
    assert exported["hidden_size"] == 24 and "quantization_config" not in exported and exported["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported; supported: Llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported: expected 'silu'"),
        ({"norm_type": "layernorm"}, "norm_type='layernorm' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures is MistralForCausalLM, but model_type llama"),
        ({"model_type": None}, "model_type None is not supported; supported: llama"),
        ({"num_key_value_heads": 5}, "32 query heads cannot be shared out over 5 key/value groups"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types differ"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True},
            "use_sliding_window=True",
        ),
        (
            {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "norm_eps": 1e-5},
            "hidden_act='silu' .* expected 'relu2'",
        ),
    ],
)
def test_what_we_do_not_have_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        from_hf(LLAMA | change)


def test_a_missing_key_takes_its_classes_default():
    assert from_hf({k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}).norm_eps == 1e-6


def damaged(folder, change):
    from safetensors.torch import save_file

    weights = models.weights(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop(DOWN), f"tensor {DOWN} is missing"),
        (
            lambda w: w.update({"model.layers.1.mlp.gate.bias": torch.ones(3)}),
            "1 tensors .* the first model.layers.1.mlp.gate",
        ),
        (
            lambda w: w.update({DOWN: w[DOWN].to(torch.float8_e4m3fn)}),
            f"tensor {DOWN} is stored as F8_E4M3: expected BF16",
        ),
        (
            lambda w: w.update({DOWN: w[DOWN].t().contiguous()}),
            rf"tensor {DOWN} has shape \(30, 36\), but .* \(36, 30\)",
        ),
    ],
)
def test_tensors_are_named(tmp_path, change, sentence):
    folder = models.tiny_llama(tmp_path / "hf")
    damaged(folder, change)
    with pytest.raises(RankError, match=sentence):
        on_ranks(models.import_hf, 1, ONE, folder, tmp_path / "ckpt", ONE)
    assert not (tmp_path / "ckpt").exists()


def test_an_index_to_nowhere_is_refused(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    names = dict.fromkeys(models.weights(folder), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(RankError, match="names model-00001-of-00002.safetensors, which is not in"):
        on_ranks(models.import_hf, 1, ONE, folder, tmp_path / "ckpt", ONE)


def test_another_model_than_the_config_names_is_refused(tmp_path):
    arch, _ = architecture.read_hf(models.tiny_llama(tmp_path / "hf"))
    architecture.check_matches(arch, None, "x")
    architecture.check_matches(arch, arch, "x")
    wanted = architecture.from_config(ArchitectureConfig(**arch.to_json() | {"blocks": 9, "vocab": 77}))
    with pytest.raises(
        UserError, match="x is not the model that the config names: blocks is 5, not 9, vocab is 101, not 77"
    ):
        architecture.check_matches(arch, wanted, "x")
    with pytest.raises(UserError, match="model.architecture: family is 'lama'"):
        architecture.from_config(ArchitectureConfig(**arch.to_json() | {"family": "lama"}))
