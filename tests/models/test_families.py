"""Every family against transformers' own class: a failure means that users of that family get another model than they gave."""

import dataclasses
import math

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.pruning.plan import make_plan
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.cutting import export, random_scores, run_prune
from tests.helpers.round_trip import assert_same_model
from tests.helpers.training import CONFIG, distill

ONE = ParallelConfig()
TP2 = ParallelConfig(tensor=2, sequence=True)
TRAINED = {
    "nemotron-tp2_sp": (2, TP2),
    "qwen2-tp2": (2, ParallelConfig(tensor=2)),
    "qwen3-tp2": (2, ParallelConfig(tensor=2)),
    "qwen3-tp2_sp": (2, TP2),
    "mistral-tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "mixtral-ep2": (2, ParallelConfig(expert=2)),
    "qwen3_moe-dp2": (2, ONE),
    "qwen3_moe-tp2_ep2": (2, dataclasses.replace(TP2, expert=2)),
    "qwen3_moe-tp2_dp2_ep2": (4, dataclasses.replace(TP2, expert=2)),
}

DENSE = [which for which in families.OF if "moe" not in which and which != "mixtral"]
EXPERTS = [which for which in families.OF if which not in DENSE]


def check(which, tmp_path, world, parallel):
    assert_same_model(families.tiny(which, tmp_path / "hf"), tmp_path, world, parallel)


@pytest.mark.default_cases("*-tp2", "llama31-pp2")
@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
@pytest.mark.parametrize("which", DENSE)
def test_dense(tmp_path, which, layout):
    world, parallel = {"tp1": (1, {}), "tp2": (2, {"tensor": 2}), "pp2": (2, {"pipeline": 2})}[layout]
    check(which, tmp_path, world, ParallelConfig(**parallel))


@pytest.mark.default_cases("mixtral-ep2", "mixtral-pp2", "qwen3_moe-tp2_ep2", "qwen3_moe_raw-ep3")
@pytest.mark.parametrize("layout", ["one", "tp2", "ep2", "tp2_ep2", "pp2", "ep3"])
@pytest.mark.parametrize("which", EXPERTS)
def test_experts(tmp_path, which, layout):
    world, parallel = {
        "one": (1, {}),
        "tp2": (2, {"tensor": 2, "sequence": True}),
        "ep2": (2, {"expert": 2}),
        "tp2_ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
        "pp2": (2, {"pipeline": 2}),
        "ep3": (3, {"expert": 3}),
    }[layout]
    check(which, tmp_path, world, ParallelConfig(**parallel))


@pytest.mark.parametrize("which", ["nemotron", "qwen2", "qwen3"])
def test_pruned_equals_cut_by_hand(tmp_path, which):
    """The rows that Llama lacks: biases of norms and of q, k and v, norms over head_dim, an MLP without a gate."""
    folder, parallel = families.tiny(which, tmp_path / "hf"), ParallelConfig(tensor=2)
    on_ranks(models.import_hf, 2, parallel, folder, tmp_path / "parent", parallel)
    opened = open_checkpoint(tmp_path / "parent")
    prune = PruneConfig(hidden=25, ffn=17, heads=6, blocks=2)
    plan = make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), prune)
    on_ranks(run_prune, 2, parallel, tmp_path / "parent", plan, tmp_path / "pruned", parallel)
    found, given, hidden = (
        export(tmp_path / "pruned", tmp_path / "small"),
        models.weights(folder),
        torch.tensor(plan.hidden),
    )
    for new, old in enumerate(plan.blocks):
        at, to, ffn = f"model.layers.{old}.", f"model.layers.{new}.", plan.ffn[old]
        rows = torch.cat([torch.arange(h * 8, h * 8 + 8) for h in plan.heads[old]])
        cut = {"mlp.up_proj.weight": given[at + "mlp.up_proj.weight"][ffn][:, hidden]}
        if which == "nemotron":
            norms = [f"{norm}.bias" for norm in ("input_layernorm", "post_attention_layernorm")]
            cut |= {name: given[at + name][hidden] for name in norms}
        if which == "qwen2":
            cut |= {"self_attn.q_proj.bias": given[at + "self_attn.q_proj.bias"][rows]}
            cut |= {f"self_attn.{x}_proj.bias": given[f"{at}self_attn.{x}_proj.bias"] for x in "kv"}
        if which == "qwen3":
            cut |= {f"self_attn.{x}_norm.weight": given[f"{at}self_attn.{x}_norm.weight"] for x in "qk"}
        assert all(torch.equal(found[to + name], weight) for name, weight in cut.items())
    ids = models.tokens()
    one = on_ranks(models.mcore_logits, 1, ONE, tmp_path / "pruned", ONE, ids)[0]
    assert (one - models.hf_logits(tmp_path / "small", ids)).abs().max() <= 2e-4


@pytest.mark.default_cases("mistral-tp2_pp2", "mixtral-ep2", "qwen3_moe-tp2_dp2_ep2")
@pytest.mark.parametrize("case", TRAINED)
def test_training_equals_one_process(tmp_path, case):
    """Losses and the gradient's norm of every step, and the weights after the last: another seed's model as teacher."""
    which, (world, parallel) = case.split("-")[0], TRAINED[case]
    config = dataclasses.replace(CONFIG, steps=3)
    pair = tmp_path / "student", tmp_path / "teacher"
    for seed, path in enumerate(pair):
        on_ranks(models.import_hf, 1, ONE, families.tiny(which, tmp_path / f"hf{seed}", seed), path, ONE)
    alone = on_ranks(distill, 1, ONE, *pair, config, ONE, tmp_path / "one")[0]
    for history in on_ranks(distill, world, parallel, *pair, config, parallel, tmp_path / "many"):
        for a, b in zip(alone, history, strict=True):
            for key in ("kd_loss", "lm_loss", "teacher_entropy", "grad_norm"):
                assert math.isclose(a[key], b[key], rel_tol=5e-5), (key, a, b)
    found, expected = export(tmp_path / "many", tmp_path / "a"), export(tmp_path / "one", tmp_path / "b")
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 0.02 * config.peak_lr * config.steps, name


def test_resumed_experts_are_bit_equal(tmp_path):
    parallel, config = ParallelConfig(expert=2), dataclasses.replace(CONFIG, steps=3)
    folder = families.tiny("qwen3_moe", tmp_path / "hf")
    on_ranks(models.import_hf, 1, ONE, folder, tmp_path / "model", ONE)
    pair = tmp_path / "model", None
    config = dataclasses.replace(config, kd_weight=0.0, lm_weight=1.0)
    on_ranks(distill, 2, parallel, *pair, config, parallel, tmp_path / "whole")
    on_ranks(distill, 2, parallel, *pair, dataclasses.replace(config, stop_after=1), parallel, tmp_path / "parts")
    on_ranks(distill, 2, parallel, *pair, config, parallel, tmp_path / "parts", True)
    found, expected = export(tmp_path / "parts", tmp_path / "a"), export(tmp_path / "whole", tmp_path / "b")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
