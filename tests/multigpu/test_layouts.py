"""Layouts over CUDA devices against one: a failure means that a layout changes what is scored, cut, said or learnt.

Every layout makes one launch: scores, a cut, logits of what was cut, training of it, and the same with a stop and a resume.
"""

import dataclasses
import math

import pytest
import torch

from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from tests.helpers import cutting, families, models, training
from tests.helpers.cutting import ONE, export
from tests.helpers.layouts import layout
from tests.multigpu.ranks import launch, need

pytestmark = pytest.mark.multigpu

SP = ParallelConfig(tensor=2, sequence=True)
SIZES = dict(num_hidden_layers=8, hidden_size=48, num_attention_heads=16, num_key_value_heads=8, intermediate_size=32)
CUTS = {
    "llama": PruneConfig(hidden=24, ffn=16, heads=8, blocks=7),
    "qwen3_moe": PruneConfig(hidden=27, ffn=9, blocks=4, experts=4),
}
NAMES = (
    "llama-tp2",
    "llama-tp2_sp",
    "llama-pp2",
    "llama-cp2",
    "llama-dp2",
    "llama-pp2_virtual2",
    "qwen3_moe-ep2",
    "llama-tp4_sp",
    "llama-tp2_sp_pp2",
    "llama-tp2_sp_cp2",
    "llama-pp2_virtual2_dp2",
    "llama-pp4",
    "qwen3_moe-tp2_sp_ep2_dp2",
    "qwen3_moe-ep4",
    "llama-tp4_sp_dp2",
    "llama-tp2_pp2_cp2",
    "llama-tp2_sp_pp2_virtual2_dp2",
    "qwen3_moe-pp2_ep4",
)
LAYOUTS = {name: layout(name.split("-")[1]) for name in NAMES}
QUICK = ("llama-tp2_sp", "llama-pp2_virtual2", "llama-cp2", "llama-dp2", "qwen3_moe-ep2", "llama-tp2_sp_pp2")
"""Of each kind one, for a machine that has all ranks on few cores."""
CONFIG = dataclasses.replace(training.CONFIG, steps=3, lm_weight=0.5)


def whole_way(at, which, parallel, ids, out_dir):
    """What test_parallel compares, the figures of a run and of one in parts."""
    found = cutting.score_cut_say(at / which, parallel, ids, out_dir / "pruned", CUTS[which])
    pair = out_dir / "pruned", at / which
    half = dataclasses.replace(CONFIG, stop_after=2)
    whole = training.distill(*pair, CONFIG, parallel, out_dir / "whole")
    parts = training.distill(*pair, half, parallel, out_dir / "parts")
    return found, whole, parts + training.distill(*pair, CONFIG, parallel, out_dir / "parts", True)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Checkpoints, and all that one device makes of them."""
    at, alone = tmp_path_factory.mktemp("layouts"), {}
    models.tiny_llama(at / "llama_hf", tied=True, **SIZES)
    families.tiny("qwen3_moe", at / "qwen3_moe_hf", num_hidden_layers=4, num_experts=8)
    ids = models.tokens(len(cutting.LENGTHS), 16)
    for which in CUTS:
        launch(models.import_hf, 1, ONE, at / f"{which}_hf", at / which, ONE)
        (alone[which],) = launch(whole_way, 1, ONE, at, which, ONE, ids, at / f"{which}_alone")
    return at, ids, alone


@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_is_that_of_one_device(tmp_path, request, name):
    (world, parallel), which = LAYOUTS[name], name.split("-")[0]
    need(world)
    if not torch.cuda.is_available() and name not in QUICK:
        pytest.skip("on the CPU tests/parallel has layouts of this kind")
    at, ids, alone = request.getfixturevalue("parent")
    ((vectors, metadata, plan, said, _), history, _) = alone[which]
    logits, spoken = said[0][1], set()
    for found, whole, parts in launch(whole_way, world, parallel, at, which, parallel, ids, tmp_path):
        assert found[1] == metadata and found[0].keys() == vectors.keys()
        for key, vector in vectors.items():
            torch.testing.assert_close(found[0][key], vector, rtol=5e-5, atol=1e-7, msg=key)
        assert all(
            getattr(found[2], axis) == getattr(plan, axis) for axis in ("hidden", "ffn", "heads", "blocks", "experts")
        )
        for positions, part in found[3]:
            spoken |= set(positions.tolist())
            torch.testing.assert_close(part, logits[:, positions], rtol=0, atol=2e-4)
        for a, b, c in zip(history, whole, parts, strict=True):
            for key in ("kd_loss", "lm_loss", "teacher_entropy", "grad_norm", "lr"):
                # Adam divides by the gradient's size, which makes rounding grow from step to step.
                assert math.isclose(a[key], b[key], rel_tol=1e-4 * 3 ** (a["step"] - 1)) and same(
                    b[key], c[key], parallel
                ), (key, a, b, c)
    assert spoken == set(range(ids.shape[1]))
    expected = {
        folder: export(at / f"{which}_alone" / folder, tmp_path / f"{folder}_one") for folder in ("pruned", "whole")
    }
    found = {folder: export(tmp_path / folder, tmp_path / f"{folder}_hf") for folder in ("pruned", "whole", "parts")}
    assert all(torch.equal(found["pruned"][key], weight) for key, weight in expected["pruned"].items())
    for key, weight in expected["whole"].items():  # see test_trainer: what a step can move
        assert (found["whole"][key] - weight).abs().max() <= 0.05 * CONFIG.peak_lr * CONFIG.steps, key
        assert same(found["parts"][key], found["whole"][key], parallel), key


def same(x, y, parallel: ParallelConfig) -> bool:
    """To the bit after a resume, but for experts on CUDA, whose outputs are added up in no fixed order."""
    if parallel.expert > 1 and torch.cuda.is_available():
        return torch.allclose(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-4, atol=1e-4)
    return bool((torch.as_tensor(x) == torch.as_tensor(y)).all())
