"""Importance scores and cuts on a CUDA device against the formulas in fp64 and against a process on the CPU.

A failure means that a GPU cuts other channels than the CPU does.
"""

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint
from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.importance.collector import score
from minitron_mcore.parallel import process_groups
from minitron_mcore.pruning.plan import load_plan, make_plan
from tests.gpu.world import here, on_cpu
from tests.helpers import expert_scoring, families, models, scoring
from tests.helpers.cutting import ONE, export, run_prune
from tests.helpers.scoring import LENGTHS, STATISTICS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("eager"),
    pytest.mark.xdist_group("gpu_importance"),  # one worker, so that its references are made once
]

CUTS = {
    "llama31": PruneConfig(hidden=24, ffn=18, heads=6, blocks=2),
    "nemotron": PruneConfig(hidden=25, ffn=17, heads=6, blocks=2),
    "mixtral": PruneConfig(hidden=27, ffn=9, heads=6, blocks=2, experts=4),
    "qwen3_moe": PruneConfig(hidden=27, ffn=9, heads=6, blocks=2, experts=4),
}
EXPERTS = ("mixtral", "qwen3_moe")
MORE = len(expert_scoring.LENGTHS)


def score_and_cut(source, cut, out_dir, dtype="fp32"):
    """Scores of padded samples by the stage's own function; what is kept by them goes to `out_dir`."""
    opened, ids = open_checkpoint(source), models.tokens(MORE)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(expert_scoring.LENGTHS)[:, None]
    found = score(build_model(opened, ONE, dtype), opened, ids, mask, micro_batch=2)
    run_prune(source, make_plan(opened.arch, opened.fingerprint, found, cut), out_dir, ONE)
    return found.vectors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of each family, and the CPU's scores and cuts of them."""
    at = tmp_path_factory.mktemp("importance")
    for which in CUTS:
        families.tiny(which, at / f"{which}_hf")
        here(models.import_hf, at / f"{which}_hf", at / which, ONE)
    jobs = [(here, score_and_cut, at / which, cut, at / f"{which}_cpu") for which, cut in CUTS.items()]
    return at, dict(zip(CUTS, on_cpu(at / "reference", *jobs), strict=True))


@pytest.mark.parametrize("which", CUTS)
def test_scores_and_cuts_are_the_cpu_s(tmp_path, folders, which):
    """Indices identical, weights bit-equal."""
    at, expected = folders
    found = here(score_and_cut, at / which, CUTS[which], tmp_path / "cut")
    assert found.keys() == expected[which].keys()
    for name, vector in expected[which].items():
        torch.testing.assert_close(found[name], vector, rtol=1e-4, atol=1e-7, msg=lambda m, at=name: f"{at}: {m}")
    ours, theirs = load_plan(tmp_path / "cut"), load_plan(at / f"{which}_cpu")
    for axis in ("hidden", "blocks", "ffn", "heads", "experts"):
        assert getattr(ours, axis) == getattr(theirs, axis), axis
    weights, others = export(tmp_path / "cut", tmp_path / "a"), export(at / f"{which}_cpu", tmp_path / "b")
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in others)


@pytest.mark.parametrize("which", CUTS)
def test_bf16_scores_are_close(tmp_path, folders, which):
    at, expected = folders
    found = here(score_and_cut, at / which, CUTS[which], tmp_path / "cut", "bf16")
    for name, vector in expected[which].items():
        assert found[name].dtype == torch.float32
        # Tokens that bf16 sends to other experts move the scores of all that follows.
        limit = 0.3 if which in EXPERTS else 0.05
        assert (found[name] - vector).abs().mean() <= limit * vector.abs().mean(), name


@pytest.mark.parametrize("which", ["llama31", "nemotron"])
def test_every_statistic_equals_the_formula(folders, which):
    """Nine pairs of aggregations, both sites of ffn, weighted or not; padded samples in micro-batches of different sizes."""
    at, ids = folders[0], models.tokens(len(LENGTHS))
    seen = scoring.activations(at / f"{which}_hf", ids, LENGTHS)
    found = here(scoring.collect, at / which, ONE, ids, LENGTHS, STATISTICS)
    for statistic, scores in zip(STATISTICS, found, strict=True):
        expected = scoring.scores_of(*seen, statistic)
        assert scores.keys() == expected.keys()
        rtol = 2e-4 if statistic.sequence == statistic.batch == "variance" else 5e-5
        for name, vector in expected.items():
            where = f"{name}, {statistic}"
            torch.testing.assert_close(
                scores[name].double(), vector, rtol=rtol, atol=1e-8, msg=lambda m, at=where: f"{at}: {m}"
            )


def test_experts_equal_the_formula(folders):
    """With padding, which a mixture of experts on CUDA passes through its all-to-all dispatcher."""
    at, ids = folders[0], models.tokens(MORE)
    vectors, metadata = here(expert_scoring.collect, at / "qwen3_moe", ONE, ids)
    assert (metadata["samples"], metadata["tokens"]) == (str(MORE), str(sum(expert_scoring.LENGTHS)))
    for name, vector in expert_scoring.oracle(at / "qwen3_moe_hf", ids).items():
        torch.testing.assert_close(vectors[name].double(), vector, rtol=5e-5, atol=1e-7, msg=name)


def test_device():
    """That this run was on the device it is about."""
    assert process_groups.device().type == ("cuda" if torch.cuda.is_available() else "cpu")
