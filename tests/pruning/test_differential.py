"""Against other people's code, where it is installed: a failure means that we count, cut or speak otherwise than it does."""

import ast
import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import architecture, build, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning import index_maps
from minitron_mcore.pruning.plan import make_plan, target_architecture
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import families, models
from tests.helpers.cutting import ONE, export, random_scores, run_prune
from tests.helpers.launching import identity_of
from tests.helpers.models import LAYOUTS

CONF = Path(__file__).parents[2] / "conf"
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PUBLISHED = {
    "nemotron4_15b": 15_628_775_424,
    "mistral_nemo_12b": 12_247_782_400,
    "llama31_8b": 8_030_261_248,
    "smollm2_135m": 134_515_008,
    "minitron_8b": 8_271_699_968,
    "minitron_4b": 4_190_509_056,
    "llama31_minitron_4b_width": 4_512_746_496,
    "llama31_minitron_4b_depth": 4_540_469_248,
    "mistral_nemo_minitron_8b": 8_414_105_600,
}
"""What the models' weights come to on Hugging Face."""


def modelopts_count(arch) -> int:
    """What ModelOpt makes of the very config that we build megatron-core's model from."""
    stats = pytest.importorskip(
        "modelopt.torch.nas.plugins.megatron_model_stats", reason="nvidia-modelopt", exc_type=ImportError
    )
    config = build.transformer_config(arch, ParallelConfig(), "bf16", PerformanceConfig())
    pattern = ("*E" if arch.experts else "*-") * arch.blocks
    return stats.mcore_param_count(config, arch.vocab, arch.tied, pattern)[0]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_every_model(name):
    arch = Architecture(**identity_of("plan", f"+model={name}")["model"]["architecture"])
    assert parameter_table.count(arch) == modelopts_count(arch) == PUBLISHED.get(name, parameter_table.count(arch))


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_of_every_recipe(name):
    config = identity_of("plan", f"+recipe={name}")
    source = Architecture(**config["model"]["architecture"])
    target = target_architecture(source, PruneConfig(**config["prune"]))
    count = parameter_table.count(target)
    assert count == modelopts_count(target) == config["parameters"] == PUBLISHED.get(name, count)
    assert parameter_table.count(target, embeddings=False) == config["without_embeddings"]


@pytest.mark.parametrize("which", ["mixtral", "qwen3_moe"])
def test_parameters_of_experts(tmp_path, which):
    arch, _ = architecture.read_hf(families.tiny(which, tmp_path))
    assert parameter_table.count(arch) == modelopts_count(arch)


def modelopts_heads(importance: torch.Tensor, groups: int, heads: int, head_dim: int) -> np.ndarray:
    """The rows of linear_qkv that ModelOpt keeps, by its own code.

    Its module can't be imported without Transformer Engine; the three definitions that choose heads don't use it.
    """
    found = importlib.util.find_spec("modelopt")
    if found is None:
        pytest.skip("nvidia-modelopt is not installed")
    path = Path(found.submodule_search_locations[0]) / "torch/nas/plugins/megatron.py"
    wanted = ("expand_head_indices", "NumAttentionHeadsHp", "_get_output_size_indices")
    defined = [node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "name", None) in wanted]
    from modelopt.torch.nas.traced_hp import TracedHp

    scope = {"torch": torch, "TracedHp": TracedHp}
    exec(compile(ast.Module([node for node in defined], []), str(path), "exec"), scope)
    hparam = scope["NumAttentionHeadsHp"](len(importance), groups)
    per_group = len(importance) // groups
    ranked = importance.view(groups, per_group).argsort(dim=1, descending=True)
    hparam.enforce_order((ranked + torch.arange(0, len(importance), per_group)[:, None]).flatten())
    hparam.active = heads
    module = SimpleNamespace(
        get_hparam=lambda name: hparam, config=SimpleNamespace(num_query_groups=groups, kv_channels=head_dim)
    )
    return scope["_get_output_size_indices"](module).numpy()


def our_heads(importance: torch.Tensor, arch, heads: int) -> np.ndarray:
    vectors = random_scores(arch).vectors | {f"blocks.{i}.heads": importance for i in range(arch.blocks)}
    return index_maps.kept_positions(
        "qkv", make_plan(arch, "x", Scores(vectors, {}), PruneConfig(heads=heads)), arch.blocks - 1
    )


@pytest.fixture
def arch(tmp_path):
    return architecture.read_hf(models.tiny_llama(tmp_path / "hf"))[0]


def test_heads_of_modelopts_published_example(arch):
    """Two groups of four heads; a row is one head, key or value (from its tests of megatron's GPT)."""
    arch = dataclasses.replace(arch, heads=8, groups=2, head_dim=1)
    importance = torch.tensor([2.2, 0.1, 1.1, 2.1, 3.0, 2.0, 0.0, 1.0])
    found = our_heads(importance, arch, heads=4)
    assert found.tolist() == modelopts_heads(importance, 2, 4, 1).tolist() == [0, 3, 4, 5, 6, 7, 10, 11]


@pytest.mark.parametrize(("heads", "groups", "kept"), [(12, 6, 6), (24, 8, 16), (15, 3, 6), (7, 1, 4), (9, 3, 9)])
def test_heads_are_modelopts(arch, heads, groups, kept):
    """ModelOpt leaves a group's heads in the order of their scores, we in the source's: the same rows either way."""
    arch = dataclasses.replace(arch, heads=heads, groups=groups, head_dim=5)
    importance = torch.rand(heads, generator=torch.Generator().manual_seed(heads))
    assert our_heads(importance, arch, kept).tolist() == sorted(modelopts_heads(importance, groups, kept, 5).tolist())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """(checkpoint, its exported folder)"""
    root = tmp_path_factory.mktemp("pruned")
    on_ranks(models.import_hf, 1, ONE, models.tiny_llama(root / "hf"), root / "parent", ONE)
    opened = open_checkpoint(root / "parent")
    target = PruneConfig(hidden=24, ffn=18, blocks=3)
    plan = make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), target)
    on_ranks(run_prune, 1, ONE, root / "parent", plan, root / "pruned", ONE)
    export(root / "pruned", root / "small")
    return root / "pruned", root / "small"


@pytest.mark.default_cases("tp2_sp")
@pytest.mark.parametrize("layout", ["tp1", "tp2_sp", "pp2"])
def test_we_say_what_transformers_says(pruned, layout):
    """A pruned model, sharded here and exported there, token for token."""
    (source, folder), (world, parallel) = pruned, LAYOUTS[layout]
    prompt = models.tokens(2, 5)
    expected = models.hf_says(folder, prompt, 64)
    assert expected.shape == (2, 69) and len(expected[:, 5:].unique()) > 5
    assert all(
        torch.equal(said, expected) for said in on_ranks(models.says, world, parallel, source, parallel, prompt, 64)
    )


def test_generation_ends_where_every_row_does(pruned):
    prompt = models.tokens(1, 5)
    long = models.hf_says(pruned[1], prompt, 9)[0].tolist()
    eos = long[7]
    (short,) = on_ranks(models.says, 1, ONE, pruned[0], ONE, prompt, 9, eos)
    assert short[0].tolist() == long[: long.index(eos, 5) + 1]
    with pytest.raises(RankError, match="5 tokens and 252 more: the model has 256 positions"):
        on_ranks(models.says, 1, ONE, pruned[0], ONE, prompt, 252)
