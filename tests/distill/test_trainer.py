"""Whole training steps: a failure means that a layout, or a pause, changes what the student learns."""

import dataclasses
import math
import os
import signal

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.parallel import stop_signal
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers.cutting import ONE, export
from tests.helpers.models import LAYOUTS
from tests.helpers.training import CONFIG, distill, micro_batches


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """What the student learns on one process: the steps' figures and its weights."""
    at = tmp_path_factory.mktemp("alone")
    history = on_ranks(distill, 1, ONE, *pair, CONFIG, ONE, at / "one")[0]
    return history, export(at / "one", at / "hf")


@pytest.mark.default_cases("untied-tp2_sp", "tied-tp2_pp2", "untied-dp2")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_every_layout_trains_as_one_process(tmp_path, pair, alone, layout):
    (world, parallel), (expected_history, expected) = LAYOUTS[layout], alone
    for history in on_ranks(distill, world, parallel, *pair, CONFIG, parallel, tmp_path / layout):
        for a, b in zip(expected_history, history, strict=True):
            for key in ("kd_loss", "lm_loss", "teacher_entropy", "grad_norm", "lr"):
                assert math.isclose(a[key], b[key], rel_tol=2e-5), (key, a, b)
    found = export(tmp_path / layout, tmp_path / "hf")
    for name, weight in expected.items():
        # Adam divides by the gradient's size, so where that is near 0 rounding shows: compare what a step can move.
        assert (found[name] - weight).abs().max() <= 0.02 * CONFIG.peak_lr * CONFIG.steps, name


@pytest.mark.default_cases("tied-kl", "untied-cross_entropy")
@pytest.mark.parametrize("kd_weight", [1.0, 0.0], ids=["kl", "cross_entropy"])
def test_first_step_is_the_dense_one(tmp_path, pair, kd_weight):
    """Both losses and the gradient's norm over the whole model, from transformers' own modules in fp64."""
    from transformers import AutoModelForCausalLM

    config, parallel = (
        dataclasses.replace(CONFIG, kd_weight=kd_weight, lm_weight=1 - kd_weight),
        ParallelConfig(tensor=3),
    )
    teacher = pair[1] if kd_weight else None
    step = on_ranks(distill, 3, parallel, pair[0], teacher, config, parallel, tmp_path / "run")[0][0]
    batch = next(micro_batches(dataclasses.replace(CONFIG, micro_batch=4), 0, 0, 1))
    logs = []
    for folder in reversed(pair):
        export(folder, tmp_path / folder.name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder.name, dtype=torch.float64)
        logs.append(model(batch["tokens"]).logits.log_softmax(-1))
    t, s = logs[0].detach(), logs[1]
    mask, tokens = batch["loss_mask"], batch["loss_mask"].sum()
    kd = ((t.exp() * (t - s)).sum(-1) * mask).sum() / tokens
    lm = -(s.gather(-1, batch["labels"][..., None])[..., 0] * mask).sum() / tokens
    (kd if kd_weight else lm).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert math.isclose(step["lm_loss"], lm.item(), rel_tol=1e-5)
    assert math.isclose(step["kd_loss"], kd.item() * (kd_weight > 0), rel_tol=1e-5)
    assert math.isclose(step["grad_norm"], norm.item(), rel_tol=2e-5)


def test_student_that_is_the_teacher_has_nothing_to_learn(tmp_path, pair):
    parallel = ParallelConfig(tensor=2)
    history = on_ranks(
        distill,
        2,
        parallel,
        pair[1],
        pair[1],
        dataclasses.replace(CONFIG, weight_decay=0.0, steps=2),
        parallel,
        tmp_path / "x",
    )[0]
    assert history[0]["kd_loss"] < 1e-6 and history[0]["grad_norm"] < 1e-5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"global_batch": 3}, "global_batch 3 is not a multiple of micro_batch 1 x 2 data-parallel ranks = 2: give 2"),
        ({"warmup_steps": 4}, "warmup_steps is 4; it must be below steps 4"),
        ({"kd_weight": 0.0}, "nothing to train on"),
        (
            {"divergence": "cosine", "temperature": 2.0},
            "divergence cosine does not use it",
        ),
        ({"top_k": 100_000}, "top_k is 100000; it must be at least 1 and below the vocabulary"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, pair, change, sentence):
    with pytest.raises(RankError, match=sentence):
        on_ranks(
            distill, 2, ParallelConfig(), *pair, dataclasses.replace(CONFIG, **change), ParallelConfig(), tmp_path / "x"
        )


def distill_signalled(student, teacher, config, parallel, out_dir, numbers):
    """Rank 0 gets these signals during its second step. Handlers after the training that were there before."""
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    steps, whole_step = [], Trainer.train_step

    def step(self, batches, with_teacher_outputs=None):
        steps.append(self.step)
        if len(steps) == 2 and process_groups.rank() == 0:
            for number in numbers:
                os.kill(os.getpid(), number)
        return whole_step(self, batches, with_teacher_outputs)

    Trainer.train_step = step
    before = [signal.getsignal(number) for number in stop_signal.SIGNALS]
    history = distill(student, teacher, config, parallel, out_dir)
    return len(history), [signal.getsignal(number) for number in stop_signal.SIGNALS] == before


@pytest.mark.parametrize("pair", [True], indirect=True, ids=["tied"])
def test_a_signal_saves_the_step_and_ends(tmp_path, pair):
    parallel = ParallelConfig()
    for n, number in enumerate((signal.SIGUSR1, signal.SIGINT)):
        found = on_ranks(distill_signalled, 2, parallel, *pair, CONFIG, parallel, tmp_path / f"run{n}", [number])
        assert found == [(2, True)] * 2
        assert open_checkpoint(tmp_path / f"run{n}").step_dir.name == "step_0000002"
    twice = [signal.SIGINT, signal.SIGINT]
    with pytest.raises(RankError) as ended:
        on_ranks(distill_signalled, 2, parallel, *pair, CONFIG, parallel, tmp_path / "twice", twice)
    assert ended.value.kind == "KeyboardInterrupt" and not list((tmp_path / "twice").glob("step_*"))
