"""Mixtures of experts: scores against the formulas in fp64, cuts by hand, training on expert-parallel ranks against one.

A failure means that expert parallelism changes what is cut or learnt.
"""

import dataclasses
from unittest.mock import patch

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation.perplexity import HFModel
from minitron_mcore.models import build
from minitron_mcore.pruning.plan import load_plan, make_plan
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.cutting import export, random_scores, run_prune
from tests.helpers.expert_scoring import LENGTHS, collect, oracle

ONE = ParallelConfig()
LAYOUTS = {
    "one": (1, ONE),
    "tp2": (2, ParallelConfig(tensor=2, sequence=True)),
    "ep2": (2, ParallelConfig(expert=2)),
    "tp2_ep2": (2, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "dp2": (2, ONE),
    "cp2_ep2": (2, ParallelConfig(context=2, expert=2)),
    "ep3_pp2": (6, ParallelConfig(expert=3, pipeline=2)),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A checkpoint; its Hugging Face folder lies beside it."""
    at = tmp_path_factory.mktemp("parent")
    on_ranks(models.import_hf, 1, ONE, families.tiny("qwen3_moe", at / "hf"), at / "parent", ONE)
    return at / "parent"


@pytest.fixture(scope="module")
def whole(parent):
    """Scores on one process."""
    return on_ranks(collect, 1, ONE, parent, ONE, models.tokens(len(LENGTHS)))[0][0]


@pytest.mark.default_cases("tp2_ep2", "dp2", "cp2_ep2", "ep3_pp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_the_formula(parent, whole, layout):
    world, parallel = LAYOUTS[layout]
    ids = models.tokens(len(LENGTHS))
    expected = oracle(parent.with_name("hf"), ids)
    for vectors, metadata in on_ranks(collect, world, parallel, parent, parallel, ids):
        assert vectors.keys() == whole.keys()
        assert (metadata["samples"], metadata["tokens"]) == (str(len(LENGTHS)), str(sum(LENGTHS)))
        for name, vector in (whole | expected).items():
            torch.testing.assert_close(vectors[name].double(), vector.double(), rtol=2e-5, atol=1e-7, msg=name)


def collect_by_all_to_all(*args):
    """`collect` through the dispatcher that runs on CUDA, where it converts its counts to numpy arrays."""
    from megatron.core.transformer.moe import token_dispatcher

    made, moved = build.transformer_config, token_dispatcher.maybe_move_tensor_to_cpu

    def with_all_to_all(*args):
        return dataclasses.replace(made(*args), moe_token_dispatcher_type="alltoall")

    def to_cpu(x, as_numpy=False, **kwargs):
        return x.numpy() if as_numpy and torch.is_tensor(x) else moved(x, as_numpy, **kwargs)

    with (
        patch.object(build, "transformer_config", with_all_to_all),
        patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu),
    ):
        return collect(*args)


@pytest.mark.parametrize("layout", ["one", "ep2"])
def test_scores_through_the_all_to_all_dispatcher_are_the_same(parent, whole, layout):
    world, parallel = LAYOUTS[layout]
    ids = models.tokens(len(LENGTHS))
    for vectors, _ in on_ranks(collect_by_all_to_all, world, parallel, parent, parallel, ids):
        for name, vector in whole.items():
            torch.testing.assert_close(vectors[name], vector, rtol=2e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("layout", ["one", "tp2_ep2", "ep3_pp2"])
def test_pruned_equals_cut_by_hand(tmp_path, parent, layout):
    world, parallel = LAYOUTS[layout]
    opened = open_checkpoint(parent)
    prune = PruneConfig(hidden=27, ffn=9, heads=6, blocks=2, experts=4)
    plan = make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), prune)
    on_ranks(run_prune, world, parallel, parent, plan, tmp_path / "pruned", parallel)
    found, given = export(tmp_path / "pruned", tmp_path / "pruned_hf"), models.weights(parent.with_name("hf"))
    hidden = torch.tensor(plan.hidden)
    for new, old in enumerate(plan.blocks):
        at, to = f"model.layers.{old}.mlp.", f"model.layers.{new}.mlp."
        chosen = plan.experts[old]
        assert torch.equal(found.pop(to + "gate.weight"), given[at + "gate.weight"][list(chosen)][:, hidden])
        for e, (expert, ffn) in enumerate(chosen.items()):
            for x in ("gate", "up"):
                cut = given[f"{at}experts.{expert}.{x}_proj.weight"][ffn][:, hidden]
                assert torch.equal(found.pop(f"{to}experts.{e}.{x}_proj.weight"), cut)
            cut = given[f"{at}experts.{expert}.down_proj.weight"][:, ffn][hidden]
            assert torch.equal(found.pop(f"{to}experts.{e}.down_proj.weight"), cut)
    assert not [name for name in found if ".mlp." in name]
    assert load_plan(tmp_path / "pruned") == plan
    ids = models.tokens()
    ours = on_ranks(
        models.mcore_logits, 2, ParallelConfig(expert=2), tmp_path / "pruned", ParallelConfig(expert=2), ids
    )
    assert (ours[0] - models.hf_logits(tmp_path / "pruned_hf", ids)).abs().max() <= 2e-4
    HFModel(str(tmp_path / "pruned_hf"))


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [
        (ParallelConfig(expert=4), "parallel.expert 4 does not divide the model's 6 experts: use 1 or 2 or 3 or 6"),
        (ParallelConfig(tensor=2), "needs parallel.sequence=true"),
    ],
)
def test_impossible_layouts_are_refused(parent, parallel, sentence):
    with pytest.raises(UserError, match=sentence):
        build.check_shardable(open_checkpoint(parent).arch, parallel)


@pytest.mark.parametrize(
    ("prune", "sentence"),
    [
        (PruneConfig(experts=7), "prune.experts is 7, but the source has 6"),
        (PruneConfig(experts=2), "3 experts a token cannot be chosen from 2"),
    ],
)
def test_impossible_targets_are_refused(parent, prune, sentence):
    arch = open_checkpoint(parent).arch
    with pytest.raises(UserError, match=sentence):
        make_plan(arch, "x", random_scores(arch), prune)


def test_a_dense_model_has_no_experts():
    arch = models.ARCH
    with pytest.raises(UserError, match="the source has no experts"):
        make_plan(arch, "x", random_scores(arch), PruneConfig(experts=2))
    with pytest.raises(UserError, match="the model has no experts"):
        build.check_shardable(arch, ParallelConfig(expert=2))
