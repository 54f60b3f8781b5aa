"""Products of parallelisms on eight ranks, context parallelism, interleaved pipelines: a failure means that a layout changes what
is scored, cut, said or learnt.

Every layout makes one process launch: scores, a cut, and logits of what was cut.
"""

import dataclasses
import math

import pytest
import torch

from minitron_mcore.checkpoint import open_checkpoint
from minitron_mcore.config import DistillConfig, ParallelConfig, PruneConfig
from minitron_mcore.distill import checks
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import layout
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.plan.plan import make_plan
from minitron_mcore.testing import on_ranks
from tests import families, models
from tests.test_distill import CONFIG, distill
from tests.test_importance import oracle
from tests.test_prune import ONE, export, run_prune

LAYOUTS = {
    "tp2_pp2_cp2": (8, ParallelConfig(tensor=2, pipeline=2, context=2)),
    "tp2_pp2_dp2": (8, ParallelConfig(tensor=2, pipeline=2)),
    "tp2_sp_cp2": (4, ParallelConfig(tensor=2, sequence=True, context=2)),
    "pp2_virtual2_dp2": (4, ParallelConfig(pipeline=2, virtual=2)),
    "pp3_virtual2_cp2": (6, ParallelConfig(pipeline=3, virtual=2, context=2)),
}
LENGTHS = [12, 7, 12, 3, 9]  # padded samples of different lengths, which two ranks don't divide
CUT = PruneConfig(hidden=24, ffn=18, heads=6, blocks=6)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A checkpoint of seven blocks, scores by the formulas, and the cut that follows from them made on one process."""
    at = tmp_path_factory.mktemp("parent")
    models.tiny_llama(at / "hf", tied=True, num_hidden_layers=7)
    on_ranks(models.import_hf, 1, ONE, at / "hf", at / "ckpt", ONE)
    ids, opened = models.tokens(len(LENGTHS)), open_checkpoint(at / "ckpt")
    expected = oracle(at / "hf", ids, LENGTHS)
    plan = make_plan(opened.arch, opened.fingerprint, Scores(expected, {}), CUT)
    on_ranks(run_prune, 1, ONE, at / "ckpt", plan, at / "pruned", ONE)
    return at, ids, expected, plan


def score_cut_say(source, parallel, ids, out_dir):
    """Scores, the plan that they give, its cut in `out_dir`; (positions, logits there) of what was cut, on last-stage ranks."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from minitron_mcore import runtime
    from minitron_mcore.checkpoint import build_model
    from minitron_mcore.importance.collect import score
    from minitron_mcore.prune import build_pruned
    from minitron_mcore.schedule import forward

    opened = open_checkpoint(source)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    found = score(build_model(opened, parallel, "fp32"), opened, ids, mask, micro_batch=2)
    plan = make_plan(opened.arch, opened.fingerprint, found, CUT)
    run_prune(source, plan, out_dir, parallel)
    said = []

    def keep(logits, batch):
        whole = gather_from_tensor_model_parallel_region(logits, group=runtime.tp_group())
        said.append((batch["at"][0], whole[..., : opened.arch.vocab]))

    batch = {"tokens": ids, "at": torch.arange(ids.shape[1]).expand_as(ids)}
    forward(build_pruned(opened, plan, parallel, "fp32"), [batch], keep, headless=False)
    return found.vectors, found.metadata, plan, said


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_cuts_and_logits_are_those_of_one_process(tmp_path, parent, name):
    world, parallel = LAYOUTS[name]
    at, ids, expected, wanted = parent
    logits = models.hf_logits(export_folder(at / "pruned", tmp_path / "hf"), ids)
    spoken = set()
    for vectors, metadata, plan, said in on_ranks(
        score_cut_say, world, parallel, at / "ckpt", parallel, ids, tmp_path / "pruned"
    ):
        assert (metadata["samples"], metadata["tokens"]) == (str(len(LENGTHS)), str(sum(LENGTHS)))
        assert vectors.keys() == expected.keys()
        for key, vector in expected.items():
            torch.testing.assert_close(vectors[key].double(), vector, rtol=1e-5, atol=1e-7, msg=key)
        kept = ("hidden", "ffn", "heads", "blocks")
        assert all(getattr(plan, axis) == getattr(wanted, axis) for axis in kept)
        for positions, found in said:
            spoken |= set(positions.tolist())
            torch.testing.assert_close(found, logits[:, positions], rtol=0, atol=2e-4)
    assert spoken == set(range(ids.shape[1]))
    found, alone = export(tmp_path / "pruned", tmp_path / "a"), models.weights(tmp_path / "hf")
    assert found.keys() == alone.keys() and all(torch.equal(found[key], alone[key]) for key in alone)


def export_folder(checkpoint, out_dir):
    export(checkpoint, out_dir)
    return out_dir
