"""Hugging Face -> Megatron-Core -> Hugging Face: a failure means users' weights or logits are not the ones they gave."""

import pytest

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import models
from tests.helpers.models import LAYOUTS
from tests.helpers.round_trip import assert_same_model


@pytest.mark.default_cases("tp1-tied", "tp2_sp-untied", "tp3-tied", "pp2-untied", "tp2_pp2-tied", "dp2-untied")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers_and_weights_come_back(tmp_path, layout, tied):
    assert_same_model(models.tiny_llama(tmp_path / "hf", tied=tied), tmp_path, *LAYOUTS[layout])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: [w.unlink() for w in f.glob("*.safetensors")], "holds no model.safetensors weights"),
        (
            lambda f: models.edit_config(f, architectures=["GPT2LMHeadModel"]),
            "architecture GPT2LMHeadModel is not supported",
        ),
        (lambda f: models.edit_config(f, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (
            lambda f: models.edit_config(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            "rope type 'yarn' is not supported",
        ),
        (lambda f: models.edit_config(f, intermediate_size=32), "mlp.gate_proj.weight has shape .*requires"),
        (lambda f: models.edit_config(f, num_hidden_layers=6), "layers.5.input_layernorm.weight is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "model.safetensors is damaged or incomplete",
        ),
        (lambda f: (f / "config.json").unlink(), "no Hugging Face model at"),
    ],
)
def test_bad_folders_are_refused(tmp_path, damage, sentence):
    folder = models.tiny_llama(tmp_path / "hf")
    damage(folder)
    with pytest.raises(RankError, match=sentence):
        on_ranks(models.import_hf, 2, ParallelConfig(tensor=2), folder, tmp_path / "ckpt", ParallelConfig(tensor=2))
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("world", "parallel", "sentence"),
    [
        (
            4,
            ParallelConfig(tensor=4),
            "parallel.tensor 4 does not divide key/value groups 6 .*use tensor 1 or 2 or 3 or 6",
        ),
        (3, ParallelConfig(tensor=2), "3 processes cannot hold tensor 2"),
        (1, ParallelConfig(sequence=True), "parallel.sequence needs parallel.tensor > 1"),
        (
            2,
            ParallelConfig(pipeline=2, virtual=3),
            "parallel.pipeline 2 x virtual 3 = 6 is more than the model's 5 blocks",
        ),
    ],
)
def test_impossible_layouts_are_refused(tmp_path, world, parallel, sentence):
    folder = models.tiny_llama(tmp_path / "hf")
    with pytest.raises(RankError, match=sentence):
        on_ranks(models.import_hf, world, parallel, folder, tmp_path / "ckpt", parallel)


def table_state(checkpoint, parallel):
    """(key, global shape, local shapes) of the table's view of a model, and megatron-core's own."""
    from minitron_mcore.checkpoint.run_folder import open_checkpoint
    from minitron_mcore.checkpoint.sharded import model_state
    from minitron_mcore.models import build

    opened = open_checkpoint(checkpoint)
    model = build.build(opened.arch, parallel, "fp32")
    ours = {(s.key, s.global_offset, tuple(s.data.shape)) for s in model_state(model, opened.arch).values()}
    theirs = set()
    for entry in model.sharded_state_dict().values():
        shards = entry.build() if hasattr(entry, "build") else [entry]
        flat = shards.values() if isinstance(shards, dict) else shards
        theirs |= {(s.key, s.global_offset, tuple(s.data.shape)) for s in flat if getattr(s, "data", None) is not None}
    return ours, theirs


@pytest.mark.parametrize("layout", ["tp1", "tp3", "tp2_pp2"])
def test_the_table_is_complete(tmp_path, layout):
    """All that megatron-core would checkpoint is in the table, at the same place (a vocabulary that needs no padding)."""
    world, parallel = LAYOUTS[layout]
    folder = models.tiny_llama(tmp_path / "hf", tied=True, vocab_size=102)
    on_ranks(models.import_hf, world, parallel, folder, tmp_path / "ckpt", parallel)
    for ours, theirs in on_ranks(table_state, world, parallel, tmp_path / "ckpt", parallel):
        assert ours == theirs
