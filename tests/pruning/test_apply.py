"""Pruned checkpoints against weights cut by hand in Hugging Face's own layout: a failure means wrong rows or columns survive."""

import dataclasses
import shutil

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.errors import UserError
from minitron_mcore.pruning.plan import Plan, load_plan, make_plan
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import models
from tests.helpers.cutting import ONE, cut_by_hand, export, random_scores, run_prune
from tests.helpers.models import LAYOUTS


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A checkpoint; its Hugging Face folder lies beside it."""
    at = tmp_path_factory.mktemp("parent")
    on_ranks(models.import_hf, 1, ONE, models.tiny_llama(at / "hf"), at / "parent", ONE)
    return at / "parent"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_equals_cut_by_hand(tmp_path, parent, layout):
    world, parallel = LAYOUTS[layout]
    opened = open_checkpoint(parent)
    # Counts per rank come out uneven: nothing here is divisible by 2 or 3 in each shard.
    plan = make_plan(
        opened.arch, opened.fingerprint, random_scores(opened.arch), PruneConfig(hidden=24, ffn=17, heads=6, blocks=3)
    )
    on_ranks(run_prune, world, parallel, parent, plan, tmp_path / "pruned", parallel)
    found, expected = (
        export(tmp_path / "pruned", tmp_path / "pruned_hf"),
        cut_by_hand(models.weights(parent.with_name("hf")), plan),
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert load_plan(tmp_path / "pruned") == plan


def build_and_run(source, plan: Plan, parallel, ids):
    from minitron_mcore.pruning.apply import build_pruned

    return models.model_logits(build_pruned(open_checkpoint(source), plan, parallel, "fp32"), plan.target, ids)


@pytest.mark.default_cases("pp2")
@pytest.mark.parametrize("layout", ["tp1", "tp2_sp", "pp2"])
def test_pruned_in_memory_equals_pruned_on_disk(tmp_path, parent, layout):
    world, parallel = LAYOUTS[layout]
    opened, ids = open_checkpoint(parent), models.tokens()
    prune = PruneConfig(hidden=24, ffn=14, heads=6, blocks=3)
    plan = make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), prune)
    on_ranks(run_prune, 1, ONE, parent, plan, tmp_path / "pruned", ONE)
    expected = on_ranks(models.mcore_logits, 1, ONE, tmp_path / "pruned", ONE, ids)[0]
    found = next(x for x in on_ranks(build_and_run, world, parallel, parent, plan, parallel, ids) if x is not None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_keep_everything_changes_nothing(tmp_path, parent):
    opened, parallel = open_checkpoint(parent), ParallelConfig(tensor=3)
    plan = make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), PruneConfig())
    on_ranks(run_prune, 3, parallel, parent, plan, tmp_path / "same", parallel)
    found, expected = export(tmp_path / "same", tmp_path / "same_hf"), models.weights(parent.with_name("hf"))
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    ids = models.tokens()
    before, after = (
        on_ranks(models.mcore_logits, 3, parallel, p, parallel, ids)[0] for p in (parent, tmp_path / "same")
    )
    assert torch.equal(before, after)


def test_zeroed_parent_gives_the_pruned_logits(tmp_path, parent):
    """Dropping ffn channels, heads and blocks is zeroing them (not so hidden channels: the norm's mean changes)."""
    from safetensors.torch import save_file

    opened = open_checkpoint(parent)
    plan = make_plan(
        opened.arch, opened.fingerprint, random_scores(opened.arch), PruneConfig(ffn=18, heads=6, blocks=4)
    )
    on_ranks(run_prune, 3, ParallelConfig(tensor=3), parent, plan, tmp_path / "pruned", ParallelConfig(tensor=3))
    weights, d = models.weights(parent.with_name("hf")), opened.arch.head_dim
    for block in range(opened.arch.blocks):
        at, gone = f"model.layers.{block}.", block not in plan.blocks
        dropped_ffn = [i for i in range(opened.arch.ffn) if gone or i not in plan.ffn[block]]
        dropped_rows = [i for i in range(opened.arch.heads * d) if gone or i // d not in plan.heads[block]]
        weights[at + "mlp.down_proj.weight"][:, dropped_ffn] = 0
        weights[at + "self_attn.o_proj.weight"][:, dropped_rows] = 0
    shutil.copytree(parent.with_name("hf"), tmp_path / "zeroed")
    save_file(weights, tmp_path / "zeroed" / "model.safetensors", metadata={"format": "pt"})
    ids, parallel = models.tokens(), ParallelConfig(tensor=2, pipeline=2)
    found = on_ranks(models.mcore_logits, 4, parallel, tmp_path / "pruned", parallel, ids)[2]
    assert (found - models.hf_logits(tmp_path / "zeroed", ids)).abs().max() <= 2e-4


def test_plan_of_another_model_is_refused(tmp_path, parent):
    opened = open_checkpoint(parent)
    plan = make_plan(opened.arch, "someone else", random_scores(opened.arch), PruneConfig(ffn=18))
    with pytest.raises(RankError, match="plan is for model someone else"):
        on_ranks(run_prune, 1, ONE, parent, plan, tmp_path / "pruned", ONE)
    assert not list((tmp_path / "pruned").glob("step_*"))


@pytest.mark.parametrize(
    ("prune", "sentence"),
    [
        (PruneConfig(hidden=37), "prune.hidden is 37, but the source has 36"),
        (PruneConfig(ffn=0), "prune.ffn is 0"),
        (PruneConfig(heads=7), "not a multiple of the 6 key/value groups: give 6"),
        (PruneConfig(blocks=6), "prune.blocks is 6"),
        (PruneConfig(drop_blocks=[1, 5]), "different blocks, not all; the source has 0-4"),
    ],
)
def test_impossible_targets_are_refused(parent, prune, sentence):
    arch = open_checkpoint(parent).arch
    with pytest.raises(UserError, match=sentence):
        make_plan(arch, "x", random_scores(arch), prune)


def test_shares_and_named_blocks(parent):
    arch = open_checkpoint(parent).arch
    plan = make_plan(arch, "x", random_scores(arch), PruneConfig(hidden=2 / 3, drop_blocks=[1, 3]))
    assert plan.target == dataclasses.replace(arch, hidden=24, blocks=3)
    assert plan.blocks == [0, 2, 4]


def test_truncated_shard_is_refused_on_every_rank(tmp_path, parent):
    parent = shutil.copytree(parent, tmp_path / "parent")
    shard = max(parent.glob("step_*/*.distcp"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1000])
    parallel = ParallelConfig(tensor=2)
    with pytest.raises(RankError, match="damaged or incomplete"):
        on_ranks(models.mcore_logits, 2, parallel, parent, parallel, models.tokens())
