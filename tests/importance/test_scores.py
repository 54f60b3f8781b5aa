"""Scores against the paper's formulas written out on transformers' model in fp64: a failure means a layout changes what is cut."""

import pytest
import torch
from safetensors.torch import save_file

from minitron_mcore.config.settings import ParallelConfig, Statistic
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.layouts import layouts
from tests.helpers.models import LAYOUTS
from tests.helpers.scoring import LENGTHS, STATISTICS, activations, collect, scores_of

MORE = layouts("pp2_dp2", "cp2")


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


@pytest.mark.default_cases("llama-tp2_sp", "llama-cp2", "llama-pp2_dp2")
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


@pytest.mark.slow
def test_other_layout_same_plan(tmp_path):
    from minitron_mcore.checkpoint.run_folder import open_checkpoint
    from minitron_mcore.config.settings import PruneConfig
    from minitron_mcore.importance.scores import Scores
    from minitron_mcore.pruning.plan import make_plan

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
