"""Folders that nvidia-modelopt pruned: a failure means that they are no students here."""

import pickle

import pytest
import torch

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.gpt_models import gpt_logits, gpt_model
from tests.helpers.hostile import Attack
from tests.helpers.models import convert_and_run, read_all

ONE, TP2 = ParallelConfig(), ParallelConfig(tensor=2)


def export_by_modelopt(shipped, out_dir, ids, sizes):
    """What ModelOpt's exporter writes of a pruned GPTModel, given the folder of the whole model; the GPTModel's logits."""
    from modelopt.torch.export import export_mcore_gpt_to_hf

    model = gpt_model(ONE, vocab=models.SIZES["vocab_size"], **sizes)
    export_mcore_gpt_to_hf(model, str(shipped), dtype=torch.float32, export_dir=str(out_dir))
    return gpt_logits(model, ids)


def test_modelopts_pruned_folder_is_a_student(tmp_path):
    """Fewer layers, channels and heads than the model it was pruned from; ModelOpt's state beside it is left alone."""
    whole, ids = (
        families.tiny("llama2", tmp_path / "whole", num_hidden_layers=5, num_key_value_heads=6),
        models.tokens(),
    )
    sizes = {"hidden_size": 30, "ffn_hidden_size": 22, "num_layers": 3, "num_attention_heads": 6}
    [expected] = on_ranks(export_by_modelopt, 1, ONE, whole, tmp_path / "pruned", ids, sizes)
    (tmp_path / "pruned/modelopt_state.pth").write_bytes(pickle.dumps(Attack(tmp_path / "trace")))
    [found, _] = on_ranks(
        convert_and_run, 2, TP2, tmp_path / "pruned", tmp_path / "pruned", tmp_path / "ckpt", TP2, ids
    )
    assert (found - expected).abs().max() <= 2e-4
    assert (found - models.hf_logits(tmp_path / "pruned", ids)).abs().max() <= 2e-4
    assert sorted(path.name for path in (tmp_path / "ckpt/hf").iterdir()) == ["config.json", "generation_config.json"]
    assert not (tmp_path / "trace").exists()


# ModelOpt's Puzzletron wants a package that isn't installed here: written after its block_config.py.
BLOCK = {"attention": {"no_op": False, "num_key_value_heads": 6}, "ffn": {"no_op": False, "intermediate_size": 30}}


def test_puzzletrons_mixed_blocks_are_refused(tmp_path):
    folder = families.tiny("llama31", tmp_path / "hf")
    other = BLOCK | {"ffn": {"no_op": True}}
    for differing in ({"block_configs": [BLOCK, BLOCK, other]}, {"per_layer_config": {"2": {"skip": ["mlp"]}}}):
        models.edit_config(folder, **(dict.fromkeys(["block_configs", "per_layer_config"]) | differing))
        with pytest.raises(UserError, match="LlamaForCausalLM whose blocks differ"):
            read_all(folder, folder)
    models.edit_config(folder, block_configs=[BLOCK] * 3, per_layer_config=None)
    assert read_all(folder, folder)
