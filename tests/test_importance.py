"""Scores against the paper's formulas written out on transformers' model in fp64: a failure means a layout changes what is cut."""

import contextlib
import itertools

import pytest
import torch
from safetensors.torch import save_file

from minitron_mcore.config import Aggregation, FfnSite, ParallelConfig, Statistic
from minitron_mcore.testing import on_ranks
from tests import families, models
from tests.test_models import LAYOUTS

MORE = {"pp2_dp2": (4, ParallelConfig(pipeline=2)), "cp2": (2, ParallelConfig(context=2))}
LENGTHS = [12, 7, 12, 3]  # padded samples of different lengths


STATISTICS = [
    Statistic(sequence, batch, site, weighted)
    for sequence, batch, site, weighted in itertools.product(Aggregation, Aggregation, FfnSite, (False, True))
]


def activations(folder, ids, lengths) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor], int]:
    """What each module of transformers' model saw of each sample's real tokens, [tokens, channels] in fp64; its weights; heads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        def hook(module, args, output=None):
            value = args[0] if output is None else output
            seen.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value)[0])

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(keep(f"{i}.in"))
        layer.register_forward_hook(keep(f"{i}.out"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(f"{i}.mid"))
        layer.input_layernorm.register_forward_hook(keep(f"{i}.norm1"))
        layer.post_attention_layernorm.register_forward_hook(keep(f"{i}.norm2"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"{i}.heads"))
        layer.mlp.down_proj.register_forward_pre_hook(keep(f"{i}.after_gate"))
        getattr(layer.mlp, "gate_proj", layer.mlp.up_proj).register_forward_hook(keep(f"{i}.before_gate"))
    with torch.no_grad():
        for row, length in zip(ids, lengths, strict=True):
            model(row[None, :length])
    return seen, {name: weight.detach() for name, weight in model.named_parameters()}, model.config.num_attention_heads


def over(how: Aggregation, x: torch.Tensor) -> torch.Tensor:
    """The paper's three formulas over the first dimension."""
    n = len(x)
    if how == "mean":
        return x.abs().sum(0) / n
    return x.square().sum(0).sqrt() if how == "l2" else (x - x.sum(0) / n).square().sum(0) / n


def oracle(folder, ids, lengths, statistic=None) -> dict[str, torch.Tensor]:
    """An aggregation of each sample's real tokens, then one of the samples; 1 - mean cosine over all tokens."""
    return scores_of(*activations(folder, ids, lengths), statistic or Statistic())


def scores_of(seen, weights, heads, statistic) -> dict[str, torch.Tensor]:
    def weight(i, *names):
        """Norms of the columns of these matrices under each other."""
        matrices = [w for n in names if (w := weights.get(f"model.layers.{i}.{n}.weight")) is not None]
        return torch.cat(matrices).square().sum(0).sqrt() if statistic.weighted else torch.ones(())

    def aggregate(name, factor, transform=lambda x: x):
        return over(statistic.batch, torch.stack([over(statistic.sequence, transform(x) * factor) for x in seen[name]]))

    def influence(a, b):
        cosines = [torch.cosine_similarity(x, y, dim=-1) for x, y in zip(seen[a], seen[b], strict=True)]
        return 1 - torch.cat(cosines).mean()

    scores: dict[str, torch.Tensor] = {"hidden": 0}
    for i in range(sum(name.endswith(".in") for name in seen)):
        scores["hidden"] += aggregate(f"{i}.norm1", weight(i, *(f"self_attn.{x}_proj" for x in "qkv")))
        scores["hidden"] += aggregate(f"{i}.norm2", weight(i, "mlp.gate_proj", "mlp.up_proj"))
        scores[f"blocks.{i}.ffn"] = aggregate(f"{i}.{statistic.ffn_site}", weight(i, "mlp.down_proj"))
        columns = weight(i, "self_attn.o_proj")
        columns = columns.view(heads, -1).square().sum(1).sqrt() if statistic.weighted else columns
        scores[f"blocks.{i}.heads"] = aggregate(
            f"{i}.heads", columns, lambda x: x.view(len(x), heads, -1).square().sum(-1).sqrt()
        )
        scores[f"blocks.{i}.attention"] = influence(f"{i}.in", f"{i}.mid")
        scores[f"blocks.{i}.mlp"] = influence(f"{i}.mid", f"{i}.out")
        scores[f"blocks.{i}.block"] = influence(f"{i}.in", f"{i}.out")
    return scores


def collect(checkpoint, parallel, ids, lengths, statistics=(None,)):
    """Scores by each statistic, all from the same forward passes."""
    from minitron_mcore import runtime
    from minitron_mcore.checkpoint import build_model, open_checkpoint
    from minitron_mcore.importance.collect import collecting
    from minitron_mcore.schedule import forward

    opened = open_checkpoint(checkpoint)
    model = build_model(opened, parallel, "fp32")
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    dp = runtime.dp_group()
    ids, mask = ids[dp.rank() :: dp.size()], mask[dp.rank() :: dp.size()]
    with contextlib.ExitStack() as stack:
        collectors = [stack.enter_context(collecting(model, opened.arch, statistic)) for statistic in statistics]
        for rows in ([0], list(range(1, len(ids)))):  # micro-batches of different sizes
            batch = {"tokens": ids[rows], "mask": mask[rows]}
            forward(model, list(models.placed([batch])), lambda hidden, batch: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return [collector.scores() for collector in collectors]


@pytest.fixture(scope="module")
def parent(request, tmp_path_factory):
    """A family's checkpoint, and what it does with samples of different lengths."""
    at = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        models.tiny_llama(at / "hf", tied=True)
    else:
        families.tiny(request.param, at / "hf")
    on_ranks(models.import_hf, 1, ParallelConfig(), at / "hf", at / "ckpt", ParallelConfig())
    ids = models.tokens(len(LENGTHS))
    return at / "ckpt", ids, activations(at / "hf", ids, LENGTHS)


@pytest.mark.parametrize(
    ("parent", "layout"),
    [*(("llama", layout) for layout in (*LAYOUTS, *MORE)), ("nemotron", "tp2_sp"), ("qwen3", "tp2_pp2")],
    indirect=["parent"],
)
def test_scores_equal_the_formulas(parent, layout):
    """Every statistic: nine pairs of aggregations, both sites of ffn, weighted or not."""
    checkpoint, ids, seen = parent
    world, parallel = (LAYOUTS | MORE)[layout]
    expected = [scores_of(*seen, statistic) for statistic in STATISTICS]
    for rank in on_ranks(collect, world, parallel, checkpoint, parallel, ids, LENGTHS, STATISTICS):
        for statistic, scores, wanted in zip(STATISTICS, rank, expected, strict=True):
            assert scores.keys() == wanted.keys()
            # A variance of four samples' variances takes rounding of activations to the fourth power, and cancels.
            rtol = 5e-5 if statistic.sequence == statistic.batch == "variance" else 1e-5
            for name, vector in wanted.items():
                assert scores[name].dtype == torch.float32
                where = f"{name}, {statistic}"
                torch.testing.assert_close(
                    scores[name].double(), vector, rtol=rtol, atol=1e-9, msg=lambda m, at=where: f"{at}: {m}"
                )


def test_a_block_that_adds_nothing_is_scored(tmp_path):
    """Projections of zeros, by which public recipes add blocks to a model: distance 0, all else by the formula."""
    folder = models.tiny_llama(tmp_path / "hf")
    weights = models.weights(folder)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{name}.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    on_ranks(models.import_hf, 1, ParallelConfig(), folder, tmp_path / "ckpt", ParallelConfig())
    ids, statistics = models.tokens(len(LENGTHS)), [Statistic(), Statistic(weighted=True)]
    seen, world, parallel = activations(folder, ids, LENGTHS), 2, ParallelConfig(tensor=2)
    for rank in on_ranks(collect, world, parallel, tmp_path / "ckpt", parallel, ids, LENGTHS, statistics):
        for scores, statistic in zip(rank, statistics, strict=True):
            for name, wanted in scores_of(*seen, statistic).items():
                torch.testing.assert_close(scores[name].double(), wanted, rtol=1e-5, atol=1e-9, msg=name)
            assert scores["blocks.2.block"] == 0 and scores["blocks.2.ffn"].any() == (not statistic.weighted)


def test_other_layout_same_plan(tmp_path):
    from minitron_mcore.checkpoint import open_checkpoint
    from minitron_mcore.config import PruneConfig
    from minitron_mcore.importance.scores import Scores
    from minitron_mcore.plan.plan import make_plan

    folder = models.tiny_llama(tmp_path / "hf")
    on_ranks(models.import_hf, 1, ParallelConfig(), folder, tmp_path / "ckpt", ParallelConfig())
    ids, arch = models.tokens(len(LENGTHS)), open_checkpoint(tmp_path / "ckpt").arch
    prune = PruneConfig(hidden=24, ffn=18, heads=6, blocks=3)
    plans = []
    for world, parallel in LAYOUTS.values():
        scores = on_ranks(collect, world, parallel, tmp_path / "ckpt", parallel, ids, LENGTHS)[0][0]
        plans.append(make_plan(arch, "same", Scores(scores, {}), prune))
    for plan in plans[1:]:
        assert (plan.hidden, plan.blocks, plan.ffn, plan.heads) == (
            plans[0].hidden,
            plans[0].blocks,
            plans[0].ffn,
            plans[0].heads,
        )
