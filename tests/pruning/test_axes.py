"""Whole key/value groups, merged query heads, and blocks without attention or MLP, from the plan to the trained student.

Oracles: Hugging Face's tensors cut by hand, and transformers' own model with a sublayer's output projection set to zero. A
failure means that such a plan keeps, merges, scores or trains something else than it says.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.errors import UserError
from minitron_mcore.importance import scores as artefact
from minitron_mcore.models import architecture, build, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning import apply
from minitron_mcore.pruning.plan import Plan, choose_heads, load_plan, make_plan
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.cutting import ONE, export, random_scores
from tests.helpers.launching import config_of
from tests.helpers.layouts import layouts
from tests.helpers.training import CONFIG, distill

TINY = Architecture("llama", 5, 36, 30, 12, 4, 8, 101, 256, 1e-5, 1e4, None, tied=False)
LENGTHS = [12, 7, 12]  # padded samples
FINER = {"drop_attention": [1], "drop_mlp": [3, 4]}
LAYOUTS = layouts("tp1", "tp2", "pp2")


def pairs_by_hand(scores: list[float], groups: list[int], size: int, kept: int) -> dict[int, int]:
    """head_i takes in head_{2K-i+1}, i from 2K-L+1 to K, heads of a group counted from 1 in the order of their scores."""
    found = {}
    for group in groups:
        order = sorted(range(group * size, (group + 1) * size), key=lambda head: -scores[head])
        found |= {order[i - 1]: order[2 * kept - i + 1 - 1] for i in range(2 * kept - size + 1, kept + 1)}
    return found


def cut_by_hand(weights: dict, plan: Plan, scores) -> dict:
    """A plan of groups and merged heads applied to Hugging Face tensors with biases, apart from the product's table."""
    d, size, hidden = plan.source.head_dim, plan.source.heads_per_group, torch.tensor(plan.hidden)
    cut = {k: weights[k][..., hidden] for k in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for new, old in enumerate(plan.blocks):
        w = {k.split(f"layers.{old}.")[1]: v for k, v in weights.items() if f"layers.{old}." in k}
        vector = scores.vectors[f"blocks.{old}.heads"].tolist()
        strengths = [sum(x * x for x in vector[g * size : (g + 1) * size]) for g in range(plan.source.groups)]
        groups = sorted(sorted(range(len(strengths)), key=lambda g: -strengths[g])[: plan.target.groups])
        assert plan.groups[old] == groups
        pairs = pairs_by_hand(vector, groups, size, plan.target.heads_per_group)
        block = {n: w[n][hidden] for n in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        for kind in ("weight", "bias"):
            q = w[f"self_attn.q_proj.{kind}"].unflatten(0, (-1, d))
            q = torch.stack([q[h] + (q[h] - q[pairs[h]]) if h in pairs else q[h] for h in plan.heads[old]]).flatten(
                0, 1
            )
            block[f"self_attn.q_proj.{kind}"] = q
            for x in "kv":
                rows = w[f"self_attn.{x}_proj.{kind}"].unflatten(0, (-1, d))[groups]
                block[f"self_attn.{x}_proj.{kind}"] = rows.flatten(0, 1)
        for x in "qkv":
            block[f"self_attn.{x}_proj.weight"] = block[f"self_attn.{x}_proj.weight"][:, hidden]
        out = w["self_attn.o_proj.weight"].unflatten(1, (-1, d))[:, plan.heads[old]].flatten(1)
        block["self_attn.o_proj.weight"] = out[hidden]
        ffn = torch.tensor(plan.ffn[old])
        block |= {f"mlp.{x}_proj.weight": w[f"mlp.{x}_proj.weight"][ffn][:, hidden] for x in ("gate", "up")}
        block["mlp.down_proj.weight"] = w["mlp.down_proj.weight"][:, ffn][hidden]
        cut |= {f"model.layers.{new}.{k}": v for k, v in block.items()}
    return cut


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Five blocks with biases on queries, keys and values, four groups of three heads."""
    folder = tmp_path_factory.mktemp("axes")
    families.tiny("qwen2", folder / "hf", num_hidden_layers=5, num_key_value_heads=4)
    on_ranks(models.import_hf, 1, ONE, folder / "hf", folder / "parent", ONE)
    return folder / "parent"


def planned(parent, seed=4, **wanted) -> tuple[Plan, artefact.Scores]:
    opened = open_checkpoint(parent)
    scores = random_scores(opened.arch, seed)
    return make_plan(opened.arch, opened.fingerprint, scores, PruneConfig(**wanted)), scores


def whole(checkpoint) -> dict[tuple, torch.Tensor]:
    """Every tensor of a checkpoint, by row, block and expert."""
    from minitron_mcore.checkpoint import streaming

    opened = open_checkpoint(checkpoint)
    reader, found = streaming.Reader(opened), parameter_table.parameters(opened.arch)
    return {(p.row.name, p.block, p.expert): reader.read(p, (0,) * len(p.shape), p.shape) for p in found}


def prune_all(source, plans: dict[str, Plan], out_dir: Path, parallel, in_memory: str) -> bool:
    """Prune by each plan; whether one of them gives the same parameters in memory as from disk."""
    from minitron_mcore.checkpoint.run_folder import build_model

    opened = open_checkpoint(source)
    for name, plan in plans.items():
        apply.prune(opened, plan, out_dir / name, parallel)
    built = apply.build_pruned(opened, plans[in_memory], parallel, "fp32")
    loaded = dict(build.named_parameters(build_model(open_checkpoint(out_dir / in_memory), parallel, "fp32")))
    found = dict(build.named_parameters(built))
    return found.keys() == loaded.keys() and all(torch.equal(found[k], loaded[k]) for k in loaded)


@pytest.mark.default_cases("tp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_equals_cut_by_hand(tmp_path, parent, layout):
    """Groups and merged heads by hand; without some attention and MLP layers the same, less those layers."""
    world, parallel = LAYOUTS[layout]
    sizes = dict(hidden=25, ffn=17, groups=3, heads=6, merge_heads=True, drop_blocks=[2])  # nothing that 2 ranks divide
    plan, scores = planned(parent, **sizes)
    plans = {"whole": plan, "finer": planned(parent, **sizes, **FINER)[0]}
    plans["even"] = planned(
        parent, hidden=24, ffn=14, groups=2, heads=4, merge_heads=True, blocks=4, attention=3, mlp=3
    )[0]
    assert all(on_ranks(prune_all, world, parallel, parent, plans, tmp_path, parallel, "even"))
    found, expected = (
        export(tmp_path / "whole", tmp_path / "out"),
        cut_by_hand(models.weights(parent.parent / "hf"), plan, scores),
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    finer, kept = plans["finer"], whole(tmp_path / "whole")
    assert (finer.blocks, finer.target.no_attention, finer.target.no_mlp) == ([0, 1, 3, 4], (1,), (2, 3))
    assert finer.merged.keys() == finer.heads.keys() == {0, 3, 4} and finer.ffn.keys() == {0, 1}
    gone = {(block, part) for part in ("attention", "mlp") for block in getattr(finer.target, f"no_{part}")}
    kept = {key: v for key, v in kept.items() if (key[1], "attention" if "{a}" in key[0] else "mlp") not in gone}
    left = whole(tmp_path / "finer")
    assert left.keys() == kept.keys() and all(torch.equal(left[k], kept[k]) for k in kept)
    assert load_plan(tmp_path / "finer") == finer
    if layout == "tp1":
        (tmp_path / "cut").mkdir()
        apply.cut_folder(parent.parent / "hf", plan, tmp_path / "cut")
        cut = models.weights(tmp_path / "cut")
        assert cut.keys() == expected.keys() and all(torch.equal(cut[k], expected[k]) for k in expected)
        with pytest.raises(
            UserError, match="no attention in 1 and no MLP in 2, 3, which transformers' Qwen2ForCausalLM"
        ):
            export(tmp_path / "finer", tmp_path / "refused")


def zeroed(folder: Path, out: Path, arch: Architecture) -> Path:
    """The folder with the last projection of every layer that `arch` lacks set to zero."""
    from safetensors.torch import save_file

    shutil.copytree(folder, out)
    weights = models.weights(folder)
    for block in arch.no_attention:
        weights[f"model.layers.{block}.self_attn.o_proj.weight"].zero_()
    for block in arch.no_mlp:
        for name in (n for n in weights if n.startswith(f"model.layers.{block}.mlp.") and "down_proj" in n):
            weights[name].zero_()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def scores_by_hand(folder: Path, ids, arch: Architecture) -> dict[str, torch.Tensor]:
    """Scores of the layers that are there, from the zeroed model in fp64: a zeroed layer changes no stream."""
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), {}

    def keep(name, value):
        seen.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value)[0])

    for n, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda m, args, n=n: keep(f"{n}.in", args[0]))
        layer.register_forward_hook(lambda m, args, out, n=n: keep(f"{n}.out", out))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args, n=n: keep(f"{n}.mid", args[0]))
        layer.input_layernorm.register_forward_hook(lambda m, args, out, n=n: keep(f"{n}.attention", out))
        layer.post_attention_layernorm.register_forward_hook(lambda m, args, out, n=n: keep(f"{n}.mlp", out))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, n=n: keep(f"{n}.heads", args[0]))
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, n=n: keep(f"{n}.ffn", args[0]))
    with torch.no_grad():
        for row, length in zip(ids, LENGTHS, strict=True):
            model(row[None, :length])

    def total(name, size=torch.abs):
        return torch.stack([size(x).mean(0) for x in seen[name]]).square().sum(0).sqrt()

    def distance(a, b):
        return 1 - torch.cat([torch.cosine_similarity(*xy, dim=-1) for xy in zip(seen[a], seen[b], strict=True)]).mean()

    found = {"hidden": sum(total(f"{block}.{part}") for block, part in arch.layers)}
    found |= {f"blocks.{n}.block": distance(f"{n}.in", f"{n}.out") for n in range(arch.blocks)}
    for n in arch.blocks_with("attention"):
        found[f"blocks.{n}.attention"] = distance(f"{n}.in", f"{n}.mid")
        found[f"blocks.{n}.heads"] = total(f"{n}.heads", lambda x: x.unflatten(-1, (arch.heads, -1)).norm(dim=-1))
    for n in arch.blocks_with("mlp"):
        found |= {f"blocks.{n}.mlp": distance(f"{n}.mid", f"{n}.out"), f"blocks.{n}.ffn": total(f"{n}.ffn")}
    return found


def use(student, teacher, ids, parallel, out_dir):
    """Logits, scores and training steps of a student."""
    from minitron_mcore.checkpoint.run_folder import build_model
    from minitron_mcore.importance.collector import score

    opened = open_checkpoint(student)
    model = build_model(opened, parallel, "fp32")
    logits = models.model_logits(model, opened.arch, ids)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    scores = score(model, opened, ids, mask, micro_batch=2).vectors
    return logits, scores, distill(student, teacher, CONFIG, parallel, out_dir)


def test_missing_layers_are_zeroed_layers(tmp_path, parent):
    """Logits and scores are those of a model whose layers add nothing; training is the same in TP 2 x PP 2 as on one process."""
    plan, ids = planned(parent, **FINER)[0], models.tokens(len(LENGTHS))
    on_ranks(apply.prune, 1, ONE, open_checkpoint(parent), plan, tmp_path / "student", ONE)
    folder = zeroed(parent.parent / "hf", tmp_path / "zeroed", plan.target)
    expected = scores_by_hand(folder, ids, plan.target)
    assert {name: tuple(v.shape) for name, v in expected.items()} == artefact.expected_shapes(plan.target)
    both, histories = ParallelConfig(tensor=2, pipeline=2), []
    for world, parallel, name in ((1, ONE, "one"), (4, both, "both")):  # the second stage: attention, attention
        found = on_ranks(use, world, parallel, tmp_path / "student", parent, ids, parallel, tmp_path / name)
        logits = next(x for x, _, _ in found if x is not None)
        assert (logits - models.hf_logits(folder, ids)).abs().max() <= 2e-4
        for _, scores, history in found:
            assert scores.keys() == expected.keys()
            for key, vector in expected.items():
                torch.testing.assert_close(scores[key].double(), vector, rtol=1e-5, atol=1e-7, msg=key)
            histories.append([[step[key] for key in ("kd_loss", "lm_loss", "grad_norm")] for step in history])
    for history in histories[1:]:
        torch.testing.assert_close(torch.tensor(history), torch.tensor(histories[0]), rtol=2e-5, atol=0)
    assert artefact.summary(artefact.Scores(scores, {}))[2].keys() == {
        "scores",
        "10 %",
        "median",
        "90 %",
        "block",
        "mlp",
    }


def import_prune_run(folder, plan_of, out_dir: Path, parallel, ids):
    from minitron_mcore.formats import hf_convert

    hf_convert.import_folder(folder, out_dir / "parent", parallel)
    plan = plan_of(out_dir / "parent")
    apply.prune(open_checkpoint(out_dir / "parent"), plan, out_dir / "student", parallel)
    return models.mcore_logits(out_dir / "student", parallel, ids), plan


def moe_plan(parent) -> Plan:
    return planned(parent, groups=4, drop_attention=[0], drop_mlp=[1])[0]


def test_mixture_of_experts(tmp_path):
    """A block without experts, one without attention, and two groups less, on expert-parallel ranks."""
    from safetensors.torch import save_file

    folder, parallel, ids = families.tiny("qwen3_moe", tmp_path / "hf"), ParallelConfig(expert=2), models.tokens()
    logits, plan = on_ranks(import_prune_run, 2, parallel, folder, moe_plan, tmp_path, parallel, ids)[0]
    zero = zeroed(folder, tmp_path / "zeroed", plan.target)
    weights, d = models.weights(zero), plan.source.head_dim
    for block, heads in plan.heads.items():
        dropped = [n for n in range(plan.source.heads * d) if n // d not in heads]
        assert len(dropped) == 4 * d
        weights[f"model.layers.{block}.self_attn.o_proj.weight"][:, dropped] = 0
    save_file(weights, zero / "model.safetensors", metadata={"format": "pt"})
    assert plan.experts.keys() == {0, 2}
    assert (logits - models.hf_logits(zero, ids)).abs().max() <= 2e-4


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"groups": 0}, "prune.groups is 0, but the source has 4"),
        ({"attention": 0}, "prune.attention is 0, but the source has 5"),
        ({"groups": 3, "heads": 8}, "prune.heads 8 is not a multiple of the 3 key/value groups: give 9"),
        ({"groups": 2, "heads": 12}, "prune.heads 12 is more than the 6 query heads of 2 key/value groups: give 6"),
        (
            {"heads": 4, "merge_heads": True},
            "prune.merge_heads needs half of a group's 3 query heads, but prune.heads 4 keeps 1: give 8 heads or more",
        ),
        ({"drop_attention": [5]}, r"prune.drop_attention \[5\]: .* the kept ones with attention are 0-4"),
        ({"drop_blocks": [1], "drop_attention": [1]}, r"prune.drop_attention \[1\]: .* with attention are 0, 2-4"),
        ({"drop_mlp": [0, 0]}, r"prune.drop_mlp \[0, 0\]: give different blocks, not all"),
        ({"drop_mlp": [0, 1, 2, 3, 4]}, "give different blocks, not all"),
        ({"drop_mlp": [0], "mlp": 3}, "prune.mlp is 3, but prune.drop_mlp leaves 4: give one of the two"),
        ({"drop_blocks": [0], "blocks": 3}, "prune.blocks is 3, but prune.drop_blocks leaves 4: give one of the two"),
        ({"blocks": 3, "attention": 4}, "prune.attention is 4, but the kept blocks have 3: give 1 to 3"),
        ({"attention": 2, "mlp": 2}, r"blocks 1, 4 would keep neither .* prune.drop_blocks=\[1, 4\]"),
        (
            {"drop_blocks": [0], "drop_attention": [2], "drop_mlp": [2]},
            r"block 2 would keep neither .* prune.drop_blocks=\[0, 2\]",
        ),
        ({"groups": 3, "heads": 8, "hidden": 0}, "prune.hidden is 0.*\n.*prune.heads 8"),
    ],
)
def test_impossible_targets_are_refused(wanted, sentence):
    with pytest.raises(UserError, match=sentence):
        make_plan(TINY, "x", random_scores(TINY), PruneConfig(**wanted))


def test_layers_go_by_score():
    """The nearest to their input go, blocks before parts of blocks; a source that lacks layers is counted by what it has."""
    scores = random_scores(TINY)
    for n, values in enumerate(zip((5, 1, 4, 3, 2), (1, 9, 2, 5, 4), (7, 0, 8, 1, 6), strict=True)):
        named = zip(("block", "attention", "mlp"), values, strict=True)
        scores.vectors.update({f"blocks.{n}.{kind}": torch.tensor(float(value)) for kind, value in named})
    plan = make_plan(TINY, "x", scores, PruneConfig(blocks=4, attention=0.6, mlp=3))
    assert (plan.blocks, plan.blocks_with("attention"), plan.blocks_with("mlp")) == ([0, 2, 3, 4], [2, 3, 4], [0, 2, 4])
    assert plan.target == dataclasses.replace(TINY, blocks=4, no_attention=(0,), no_mlp=(2,))
    assert plan.notes() == [
        "dropped blocks: [1]",
        "blocks that lose their attention layer: [0]",
        "blocks that lose their mlp layer: [3]",
    ]
    again = make_plan(plan.target, "y", random_scores(plan.target), PruneConfig(drop_blocks=[1], groups=0.5))
    assert (again.target.no_attention, again.target.no_mlp, again.target.heads) == ((0,), (1,), 6)
    assert again.notes() == ["dropped blocks: [1]"]


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (2, 1), (3, 2), (5, 3), (6, 3), (6, 5), (5, 2)])
def test_best_dropped_heads_meet_worst_kept_ones(size, kept):
    source = dataclasses.replace(TINY, heads=4 * size)
    target = dataclasses.replace(source, heads=3 * kept, groups=3)
    scores = torch.rand(source.heads, generator=torch.Generator().manual_seed(size))
    groups, heads, pairs = choose_heads(scores, source, target)
    assert pairs == (pairs_by_hand(scores.tolist(), groups, size, kept) if 2 * kept >= size else {})
    assert len(heads) == 3 * kept and {head // size for head in heads} == set(groups)


def test_descriptions_of_before_are_read(tmp_path):
    """model.json and plan.json as written when there were no groups, merges and parts of blocks."""
    plan = make_plan(TINY, "x", random_scores(TINY), PruneConfig(heads=8, blocks=3))
    data = json.loads(plan.to_json())
    for model in (data["source"], data["target"]):
        model.pop("no_attention"), model.pop("no_mlp")
    data.pop("groups"), data.pop("merged")
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert load_plan(tmp_path) == plan and plan.groups == {block: [0, 1, 2, 3] for block in plan.blocks}
    assert Architecture(**data["source"]) == TINY


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d["ffn"].update({"0": []}),
            "the plan's ffn of block 0 must be 30 ascending indices below 30; it has 0",
        ),
        (lambda d: d["groups"].pop("0"), "the plan's groups of block 0 must be 4"),
        (lambda d: d["heads"].update({"0": [0, 1, 3, 4, 5, 6, 9, 10]}), "heads of block 0 must be 2 in each"),
        (lambda d: d["merged"].update({"0": {"0": 11}}), "merges head 11 into head 0 of block 0"),
        (
            lambda d: d["source"].update({"no_mlp": [0]}),
            "keeps the mlp layer of block 0, which the source does not have",
        ),
        (lambda d: d["target"].update({"no_mlp": [0], "no_attention": [0]}), "has neither attention nor MLP"),
        (lambda d: d["target"].update({"no_mlp": [5]}), r"no_mlp names blocks \[5\], but the model has blocks 0 to 4"),
    ],
)
def test_plans_that_hands_spoiled_are_refused(tmp_path, change, sentence):
    data = json.loads(make_plan(TINY, "x", random_scores(TINY), PruneConfig(heads=8, merge_heads=True)).to_json())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=sentence):
        load_plan(tmp_path)


def test_what_a_class_cannot_hold_is_said_at_planning(tmp_path, parent):
    """Planned instead of run: blocks without a layer, heads that don't divide hidden, groups that ranks don't divide."""
    from minitron_mcore.cli import dry_run
    from minitron_mcore.formats import megatron_gpt

    def problems(stage, *options):
        line = ["+model=llama31_8b", "model.hf=/nowhere", "parallel=tp8", *options]
        return " ".join(dry_run.plan(config_of(stage, *line))["problems"])

    finer = "prune.attention=20"
    assert "which transformers' LlamaForCausalLM cannot hold: keep it in sharded checkpoints" in problems("plan", finer)
    assert problems("plan", finer, "prune.exportable=false") == ""
    assert "cannot hold" in problems("export", finer, "prune.exportable=false", "source=runs/llama31_8b/prune")
    gpt_export = ("format=gpt", "source=runs/llama31_8b/prune")
    assert "which megatron-core's GPTModel cannot hold" in problems("export", finer, *gpt_export)
    assert "hidden 3000 is not a multiple of 32 heads" in problems("plan", "prune.hidden=3000")
    told = problems("plan", "prune.hidden=1")
    assert "hidden 1 is not a multiple of 32 heads" in told and "use 32, or prune.exportable=false" in told
    assert "hidden" not in problems("plan", "prune.hidden=1.0")
    told = problems("plan", "prune.groups=3")
    assert "parallel.tensor 8 does not divide heads 12 (next: 16), key/value groups 3 (next: 8)" in told
    architecture.check_exportable(TINY)
    student = dataclasses.replace(open_checkpoint(parent), arch=dataclasses.replace(TINY, no_mlp=(2,)))
    with pytest.raises(UserError, match="no MLP in 2, which megatron-core's GPTModel cannot hold"):
        megatron_gpt.export_folder(student, tmp_path / "gpt", ONE, "fp32")
