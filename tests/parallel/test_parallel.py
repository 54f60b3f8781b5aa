"""Products of parallelisms on eight ranks, context parallelism, interleaved pipelines: a failure means that a layout changes what
is scored, cut, said or learnt.

Every layout makes one process launch: scores, a cut, and logits of what was cut.
"""

import dataclasses
import math

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import layout
from minitron_mcore.pruning.plan import make_plan
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models, training
from tests.helpers.cutting import CUT, LENGTHS, ONE, export, run_prune, score_cut_say
from tests.helpers.layouts import layouts
from tests.helpers.scoring import oracle

LAYOUTS = layouts("tp2_pp2_cp2", "tp2_pp2_dp2", "tp2_sp_cp2", "pp2_virtual2_dp2", "pp3_virtual2_cp2")


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


@pytest.mark.default_cases("tp2_sp_cp2", "pp2_virtual2_dp2")
@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_cuts_and_logits_are_those_of_one_process(tmp_path, parent, name):
    world, parallel = LAYOUTS[name]
    at, ids, expected, wanted = parent
    logits = models.hf_logits(export_folder(at / "pruned", tmp_path / "hf"), ids)
    spoken, pieces = set(), []
    for vectors, metadata, plan, said, written in on_ranks(
        score_cut_say, world, parallel, at / "ckpt", parallel, ids, tmp_path / "pruned"
    ):
        assert (metadata["samples"], metadata["tokens"]) == (str(len(LENGTHS)), str(sum(LENGTHS)))
        assert vectors.keys() == expected.keys()
        for key, vector in expected.items():
            torch.testing.assert_close(vectors[key].double(), vector, rtol=1e-5, atol=1e-7, msg=key)
        kept = ("hidden", "ffn", "heads", "blocks")
        assert all(getattr(plan, axis) == getattr(wanted, axis) for axis in kept)
        pieces += written
        for positions, found in said:
            spoken |= set(positions.tolist())
            torch.testing.assert_close(found, logits[:, positions], rtol=0, atol=2e-4)
    assert spoken == set(range(ids.shape[1]))
    assert len(pieces) == len(set(pieces))
    assert {name for name, _ in pieces} == {
        p.name for p in parameter_table.parameters(open_checkpoint(at / "ckpt").arch)
    }
    found, alone = export(tmp_path / "pruned", tmp_path / "a"), models.weights(tmp_path / "hf")
    assert found.keys() == alone.keys() and all(torch.equal(found[key], alone[key]) for key in alone)


def export_folder(checkpoint, out_dir):
    export(checkpoint, out_dir)
    return out_dir


def micro_batches(config: DistillConfig, start: int):
    """Samples of `training`; of every four the first is masked throughout, the second where rank 0 of two holds it."""
    for n, batch in enumerate(training.micro_batches(config, start, 0, 1)):
        mask, quarter = batch["loss_mask"], config.sequence_length // 4
        if n % 4 == 0:
            mask[:] = 0
        elif n % 4 == 1:
            mask[:, :quarter] = mask[:, -quarter:] = 0
        yield batch


def distill(student, teacher, config, parallel, out_dir, resume=False):
    """Train and save; the history, on every rank."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.loop import train
    from minitron_mcore.distill.trainer import Trainer

    opened = open_checkpoint(student)
    trainer = Trainer(opened, open_checkpoint(teacher), config, parallel, "fp32")
    if resume:
        trainer.resume(out_dir)
    run_folder.describe(out_dir, opened.arch, "test", {}, opened.hf)
    return train({out_dir: trainer}, models.placed(micro_batches(config, trainer.step * config.global_batch)), out_dir)[
        0
    ]


TRAINED = layouts("pp2_virtual2_cp2", "tp2_sp_cp2")


def whole_and_half(student, teacher, config, parallel, at):
    """The history of a run, and a run that stops after its first step."""
    distill(student, teacher, dataclasses.replace(config, stop_after=1), parallel, at / "parts")
    return distill(student, teacher, config, parallel, at / "whole")


@pytest.mark.default_cases("tp2_sp_cp2")
@pytest.mark.parametrize("name", TRAINED)
def test_students_learn_as_on_one_process_and_resume(tmp_path, parent, name):
    pair = (parent[0] / "pruned", parent[0] / "ckpt")
    config = dataclasses.replace(training.CONFIG, steps=2)
    alone = on_ranks(distill, 1, ONE, *pair, config, ONE, tmp_path / "one")[0]
    expected = export(tmp_path / "one", tmp_path / "one_hf")
    world, parallel = TRAINED[name]
    for history in on_ranks(whole_and_half, world, parallel, *pair, config, parallel, tmp_path):
        for a, b in zip(alone, history, strict=True):
            for key in ("kd_loss", "lm_loss", "teacher_entropy", "grad_norm", "lr"):
                assert math.isclose(a[key], b[key], rel_tol=2e-5), (key, a, b)
    whole = export(tmp_path / "whole", tmp_path / "whole_hf")
    for key, weight in expected.items():  # see test_trainer: what a step can move
        assert (whole[key] - weight).abs().max() <= 0.02 * config.peak_lr * config.steps, key
    on_ranks(distill, world, parallel, *pair, config, parallel, tmp_path / "parts", True)
    parts = export(tmp_path / "parts", tmp_path / "parts_hf")
    assert all(torch.equal(parts[key], weight) for key, weight in whole.items())


def weigh_and_say(source, parallel, ids, mask, prompt):
    """-log p of what the mask names, and a continuation."""
    from minitron_mcore.checkpoint.run_folder import build_model
    from minitron_mcore.evaluation.generate import generate
    from minitron_mcore.evaluation.perplexity import ShardedModel

    opened = open_checkpoint(source)
    model = build_model(opened, parallel, "fp32")
    return ShardedModel(model, opened.arch).nll(ids, mask), generate(model, opened.arch, prompt, 3)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(3, ParallelConfig(context=3)), (4, ParallelConfig(pipeline=2, virtual=2, context=2))],
    ids=["cp3", "pp2_virtual2_cp2"],
)
def test_likelihoods_and_continuations_are_those_of_transformers(tmp_path, world, parallel):
    """With a sliding window that is shorter than a rank's part of the sequence, or longer."""
    families.tiny("mistral", tmp_path / "hf", num_hidden_layers=4)
    on_ranks(models.import_hf, 1, ONE, tmp_path / "hf", tmp_path / "ckpt", ONE)
    ids, prompt = models.tokens(3, 48), models.tokens(2, 7)
    mask = torch.arange(48)[None] < torch.tensor([48, 31, 5])[:, None]
    mask[:, 0] = False
    log_p = models.hf_logits(tmp_path / "hf", ids).double().log_softmax(-1)
    expected = -(log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum()
    says = models.hf_says(tmp_path / "hf", prompt, 3)
    for nll, said in on_ranks(weigh_and_say, world, parallel, tmp_path / "ckpt", parallel, ids, mask, prompt):
        assert math.isclose(nll, expected, rel_tol=1e-5) and torch.equal(said, says)


ARCH = Architecture("llama", 7, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, tied=False)


@pytest.mark.parametrize(
    ("world", "parallel", "length", "sentence"),
    [
        (2, ParallelConfig(virtual=2), 8, "parallel.virtual is 2, but parallel.pipeline is 1"),
        (2, ParallelConfig(pipeline=2, virtual=0), 8, "parallel.virtual is 0; it must be at least 1"),
        (2, ParallelConfig(pipeline=2, virtual=4), 8, "pipeline 2 x virtual 4 = 8 is more than the model's 7 blocks"),
        (2, ParallelConfig(context=2), 10, "10 cannot be shared by parallel.context 2, in two parts a rank: give 12"),
        (4, ParallelConfig(tensor=2, sequence=True), 7, "7 cannot be shared by parallel.tensor 2 under parallel.sequence: give 8"),
        (  # both divide 12, but not one after the other
            6, ParallelConfig(tensor=3, sequence=True, context=2), 8,
            "8 cannot be shared by parallel.context 2, in two parts a rank and parallel.tensor 3 under parallel.sequence: give 12",
        ),
    ],
)  # fmt: skip
def test_impossible_layouts_are_refused(world, parallel, length, sentence):
    found = [*layout.problems(parallel, world, length), *sharding.model_problems(ARCH, parallel)]
    assert any(sentence in problem for problem in found), found


def test_interleaving_wants_whole_groups_of_micro_batches():
    config = dataclasses.replace(training.CONFIG, global_batch=10)
    parallel = ParallelConfig(pipeline=2, virtual=2)
    (problem,) = checks.problems(ARCH, None, config, parallel, 2)
    assert "micro_batch 1 x 2 data-parallel ranks x parallel.pipeline 2, interleaved, = 4: give 8" in problem
    assert not list(checks.problems(ARCH, None, config, dataclasses.replace(parallel, virtual=1), 2))
