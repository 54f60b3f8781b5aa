"""Intermediate states: a failure means that a layout, a pause or a checkpoint changes what the student learns from them.

The oracle is transformers' own modules in fp64 on one process, and the formula.
"""

import dataclasses
import math

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import HiddenStateLossConfig, ParallelConfig, PruneConfig
from minitron_mcore.distill import checks
from minitron_mcore.formats import hf_convert
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.testing import on_ranks
from tests.helpers import models, training
from tests.helpers.cutting import ONE, export, write_family
from tests.helpers.hidden_states import CASES, CONFIG, PAIRS, first_step, micro_batches, oracle, run_model
from tests.helpers.layouts import layouts

LAYOUTS = layouts("tp2_sp", "tp2", "pp2", "pp2_virtual2", "cp2", "dp2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher of seven blocks, its student of five narrower ones, and one of five as wide; what each is to learn."""
    at = tmp_path_factory.mktemp("states")
    cuts = {"width": PruneConfig(hidden=24, ffn=18, blocks=5), "depth": PruneConfig(blocks=5)}
    write_family(at, cuts, tied=True, num_hidden_layers=7)
    for name in ("teacher", "width", "depth"):
        (at / f"{name}_hf").mkdir()
        hf_convert.export_folder(open_checkpoint(at / name), at / f"{name}_hf")
    return at


def teacher_loss(folders):
    """The teacher's cross-entropy on what the data-parallel ranks see first: the first sample, for the second is masked."""
    batch = next(micro_batches(CONFIG, 0, 0, 1))
    logs = run_model(folders / "teacher_hf", batch["tokens"])[1].log_softmax(-1)
    losses = -logs.gather(-1, batch["labels"][..., None])[..., 0] * batch["loss_mask"]
    return (losses.sum() / batch["loss_mask"].sum()).item()


@pytest.mark.default_cases("pp2_virtual2", "cp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_the_dense_ones(tmp_path, folders, layout):
    world, parallel = LAYOUTS[layout]
    ranks = on_ranks(first_step, world, parallel, folders, parallel, tmp_path)
    teacher = teacher_loss(folders)
    for case in CASES:
        projection = ranks[0][case][1]
        losses, gradients, lifted = oracle(folders, case, projection)
        for figures, before, gradient in (rank[case] for rank in ranks):
            for key, loss in losses.items():
                assert math.isclose(figures[key], loss, rel_tol=1e-5), (case, key)
            assert math.isclose(figures["probed"], teacher, rel_tol=1e-5), case
            squares = [g.square().sum() for g in (*gradients.values(), *([] if lifted is None else [lifted]))]
            assert math.isclose(figures["grad_norm"], sum(squares).sqrt().item(), rel_tol=1e-5), case
            if lifted is not None:
                assert torch.equal(before, projection)
                assert (gradient - lifted).abs().max() <= 1e-5 * lifted.abs().max(), case
        found = export(tmp_path / case, tmp_path / f"{case}_hf")
        for key, gradient in gradients.items():
            assert (found[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), (case, key)
        assert all(not found[key].any() for key in found.keys() - gradients.keys())


def learn(folders, config, parallel, out_dir, resume=False):
    """Train the narrower student and save; the history and the projection, on every rank."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.loop import train
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    student, dp = open_checkpoint(folders / "width"), process_groups.dp_group()
    trainer = Trainer(student, open_checkpoint(folders / "teacher"), config, parallel, "fp32")
    if resume:
        trainer.resume(out_dir)
    run_folder.describe(out_dir, student.arch, "test", {}, student.hf)
    batches = micro_batches(config, trainer.step * config.global_batch, dp.rank(), dp.size())
    return train({out_dir: trainer}, models.placed(batches), out_dir)[
        0
    ], trainer.hidden_loss.projection.detach().clone()


@pytest.mark.slow
def test_projection_learns_as_on_one_process_resumes_and_stays_behind(tmp_path, folders):
    """Two stages of two data-parallel ranks, which share out the optimizer's state of the projection too."""
    parallel, states = ParallelConfig(pipeline=2), HiddenStateLossConfig(1.0)
    config = dataclasses.replace(training.CONFIG, kd_weight=0.0, hidden_state_loss=states)
    half = dataclasses.replace(config, stop_after=2)
    alone, alone_p = on_ranks(learn, 1, ONE, folders, config, ONE, tmp_path / "one")[0]
    whole = on_ranks(learn, 4, parallel, folders, config, parallel, tmp_path / "whole")
    first = on_ranks(learn, 4, parallel, folders, half, parallel, tmp_path / "parts")
    second = on_ranks(learn, 4, parallel, folders, config, parallel, tmp_path / "parts", True)
    for history, projection in whole:
        assert torch.equal(projection, whole[0][1])  # stages and replicas agree to the bit
        assert (projection - alone_p).abs().max() <= 0.02 * config.peak_lr * config.steps
        for a, b in zip(alone, history, strict=True):
            for key in ("kd_loss", "lm_loss", "hidden_state_loss", "grad_norm", "lr"):
                assert math.isclose(a[key], b[key], rel_tol=2e-5), (key, a, b)
    for a, b in zip(whole[0][0], first[0][0] + second[0][0], strict=True):
        assert all(a[key] == b[key] for key in ("kd_loss", "lm_loss", "hidden_state_loss", "grad_norm", "lr"))
    assert not torch.equal(second[0][1], first[0][1])
    assert all(torch.equal(projection, whole[0][1]) for _, projection in second)
    found, expected = export(tmp_path / "parts", tmp_path / "a"), export(tmp_path / "whole", tmp_path / "b")
    assert found.keys() == models.weights(folders / "width_hf").keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def dynamic_steps(folders, parallel, out_dir):
    """Two steps with a dynamic weight; the second again from the first's checkpoint, and with the weight that it had as a fixed
    one."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    states = HiddenStateLossConfig(0.5, pairs=PAIRS, dynamic=True)
    config = dataclasses.replace(CONFIG, kd_weight=2.0, temperature=1.5, hidden_state_loss=states)
    student, teacher = (open_checkpoint(folders / x) for x in ("width", "teacher"))
    dp = process_groups.dp_group()
    batches = list(models.placed(micro_batches(config, 0, dp.rank(), dp.size())))
    count = config.global_batch // dp.size()
    trainer = Trainer(student, teacher, config, parallel, "fp32")
    first = trainer.train_step(batches[:count])
    trainer.save(out_dir)
    trainer.finish_save()
    run_folder.describe(out_dir, student.arch, "test", {}, student.hf)
    found = [first, trainer.train_step(batches[count : 2 * count])]
    for weight in (states, dataclasses.replace(states, weight=found[1]["hidden_state_weight"], dynamic=False)):
        again = Trainer(student, teacher, dataclasses.replace(config, hidden_state_loss=weight), parallel, "fp32")
        again.resume(out_dir)
        if not weight.dynamic:
            again.hidden_loss.ratio = 1.0
        found.append(again.train_step(batches[count : 2 * count]))
    return found


def test_dynamic_weight_is_the_last_step_s_ratio_on_all_ranks(tmp_path, folders):
    parallel = ParallelConfig(pipeline=2)
    for first, second, resumed, fixed in on_ranks(dynamic_steps, 4, parallel, folders, parallel, tmp_path / "run"):
        assert first["hidden_state_weight"] == 0.5
        ratio = 2.0 * 1.5**2 * first["kd_loss"] / first["hidden_state_loss"]
        assert math.isclose(second["hidden_state_weight"], 0.5 * ratio, rel_tol=1e-12) and ratio < 0.5
        for key in ("kd_loss", "lm_loss", "hidden_state_loss", "hidden_state_weight", "grad_norm"):
            assert second[key] == resumed[key] == fixed[key], key


ARCH = {
    name: Architecture("llama", n, h, 24, 6, 3, 8, 101, 256, 1e-5, 1e4, None, False)
    for name, n, h in (("student", 16, 24), ("teacher", 32, 36), ("short", 2, 24))
}


def test_pairs_without_a_word_are_the_paper_s():
    given = HiddenStateLossConfig(1.0)
    pairs = checks.state_pairs(ARCH["student"], ARCH["teacher"], given)
    assert pairs == [(checks.EMBEDDINGS, checks.EMBEDDINGS), (13, 29)]  # arXiv 2407.14679, table 17
    assert checks.state_pairs(ARCH["student"], ARCH["teacher"], HiddenStateLossConfig()) == []


@pytest.mark.parametrize(
    ("student", "given", "sentence"),
    [
        ("student", {"pairs": [[16, 3]]}, "names block 16 of the student, which has blocks 0 to 15."),
        ("student", {"pairs": [[3, -1]]}, "names block -1 of the teacher, which has blocks 0 to 31."),
        ("student", {"pairs": [[1, 2, 3]]}, "has [1, 2, 3]: give [student's block, teacher's block]."),
        ("student", {"pairs": [[1, 2], [1, 2]]}, "has [1, 2] twice"),
        ("student", {"pairs": [], "embeddings": False}, "are empty: give a pair of blocks, or weight 0."),
        ("student", {"weight": -1.0}, "distill.hidden_state_loss.weight is -1.0"),
        ("short", {}, "a student of 2 and a teacher of 32 blocks do not both have a third block from the end"),
    ],
)
def test_impossible_pairs_are_refused(student, given, sentence):
    config = dataclasses.replace(CONFIG, hidden_state_loss=HiddenStateLossConfig(**({"weight": 1.0} | given)))
    found = list(checks.problems(ARCH[student], ARCH["teacher"], config, ONE, 1))
    assert any(sentence in problem for problem in found), found
    assert list(
        checks.problems(
            ARCH["student"], None, dataclasses.replace(CONFIG, hidden_state_loss=HiddenStateLossConfig(1.0)), ONE, 1
        )
    )


def test_a_ratio_to_nothing_is_refused():
    config = dataclasses.replace(CONFIG, kd_weight=0.0, hidden_state_loss=HiddenStateLossConfig(1.0, dynamic=True))
    (problem,) = checks.problems(ARCH["student"], ARCH["teacher"], config, ONE, 1)
    assert problem.startswith(
        "distill.hidden_state_loss.dynamic scales by the ratio to the divergence, but kd_weight is 0"
    )


def test_states_alone_are_something_to_train_on():
    config = dataclasses.replace(CONFIG, kd_weight=0.0, lm_weight=0.0)
    (problem,) = checks.problems(ARCH["student"], ARCH["teacher"], config, ONE, 1)
    assert "kd_weight, lm_weight and hidden_state_loss.weight are all 0: there is nothing to train on." in problem
    config = dataclasses.replace(config, hidden_state_loss=HiddenStateLossConfig(1.0))
    assert not list(checks.problems(ARCH["student"], ARCH["teacher"], config, ONE, 1))
    assert (
        config.needs_teacher
        and not dataclasses.replace(config, hidden_state_loss=HiddenStateLossConfig()).needs_teacher
    )
