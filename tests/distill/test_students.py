"""Several students of one teacher: a failure means that a student learns something else in company than alone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.cli import compose, dry_run
from minitron_mcore.config.settings import BadLoss, HiddenStateLossConfig, ParallelConfig, PruneConfig
from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks
from tests.helpers import training
from tests.helpers.cutting import export, write_family
from tests.helpers.launching import composed
from tests.helpers.layouts import layouts

CONFIG = dataclasses.replace(training.CONFIG, hidden_state_loss=HiddenStateLossConfig(0.5, pairs=[[2, 2]]))
CUTS = {
    "narrow": PruneConfig(hidden=24, ffn=18),
    "short": PruneConfig(blocks=3),
    "both": PruneConfig(hidden=24, blocks=4),
}
FIGURES = ("step", "tokens", "kd_loss", "lm_loss", "hidden_state_loss", "teacher_entropy", "grad_norm", "lr")
LAYOUTS = layouts("pp2", "tp2_sp_pp2")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A teacher and three students of it."""
    at = tmp_path_factory.mktemp("students")
    write_family(at, CUTS, tied=True)
    return at


def learn(family, names, config, parallel, out_dir, spoiled=""):
    """Train students together; their histories, on every rank. `spoiled`: this one's second step sees an infinite weight."""
    from minitron_mcore.checkpoint import run_folder, steps
    from minitron_mcore.distill.loop import train
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    teacher, trainers = open_checkpoint(family / "teacher"), {}
    for name in names:
        student, folder = open_checkpoint(family / name), Path(out_dir) / name
        source = next((trainer.teacher for trainer in trainers.values()), None)
        trainers[folder] = trainer = Trainer(student, teacher, config, parallel, "fp32", source)
        if steps.published(folder):
            trainer.resume(folder)
        run_folder.describe(folder, student.arch, "test", {}, student.hf)
        if name == spoiled:
            _spoil(trainer)
    step, dp = min(trainer.step for trainer in trainers.values()), process_groups.dp_group()
    batches = training.micro_batches(config, step * config.global_batch, dp.rank(), dp.size())
    return train(trainers, batches, Path(out_dir))


def learn_one_by_one(family, config, parallel, out_dir):
    return {name: learn(family, [name], config, parallel, out_dir)[0] for name in CUTS}


def _spoil(trainer):
    whole = trainer.train_step

    def step(batches, with_teacher_outputs=None):
        if trainer.step == 1:
            with_teacher_outputs = [
                batch | {"loss_mask": batch["loss_mask"] * float("inf")} for batch in with_teacher_outputs
            ]
        return whole(batches, with_teacher_outputs)

    trainer.train_step = step


@pytest.mark.default_cases("pp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_learns_as_it_would_alone(tmp_path, family, layout):
    """To the bit; also where one joins later, and the others wait for it."""
    world, parallel = LAYOUTS[layout]
    alone = on_ranks(learn_one_by_one, world, parallel, family, CONFIG, parallel, tmp_path / "alone")
    half = dataclasses.replace(CONFIG, stop_after=2)
    early = on_ranks(learn, world, parallel, family, ["narrow", "both"], half, parallel, tmp_path / "together")
    late = on_ranks(learn, world, parallel, family, [*CUTS], CONFIG, parallel, tmp_path / "together")
    for rank in range(world):
        (narrow, both), (narrow_2, short, both_2) = early[rank], late[rank]
        for name, history in {"narrow": narrow + narrow_2, "short": short, "both": both + both_2}.items():
            expected = alone[rank][name]
            assert len(history) == len(expected) == CONFIG.steps
            for a, b in zip(expected, history, strict=True):
                assert all(a[key] == b[key] for key in FIGURES), (name, a, b)
    for name in CUTS:
        found = export(tmp_path / "together" / name, tmp_path / f"{name}_a")
        expected = export(tmp_path / "alone" / name, tmp_path / f"{name}_b")
        assert all(torch.equal(found[key], weight) for key, weight in expected.items())
        assert len((tmp_path / "together" / name / "metrics.jsonl").read_text().splitlines()) == CONFIG.steps


def test_one_student_s_bad_step_is_its_own(tmp_path, family):
    """Where bad steps are skipped, the others' figures are those of a run without it."""
    parallel, config = ParallelConfig(), dataclasses.replace(CONFIG, on_bad_loss=BadLoss.skip)
    names = ["narrow", "short"]
    good = on_ranks(learn, 1, parallel, family, names, config, parallel, tmp_path / "good")[0]
    bad = on_ranks(learn, 1, parallel, family, names, config, parallel, tmp_path / "bad", "short")[0]
    assert [row["step"] for row in bad[1]] == [1, 3, 4]
    for a, b in zip(good[0], bad[0], strict=True):
        assert all(a[key] == b[key] for key in FIGURES)
    kept = list((tmp_path / "bad" / "short" / "bad_batches").iterdir())
    assert len(kept) == 1 and not (tmp_path / "bad" / "narrow" / "bad_batches").exists()


def test_several_are_planned_by_name():
    folders = "{width: runs/llama31_minitron_4b_width/prune, depth: runs/llama31_minitron_4b_depth/prune}"
    given = ["+model=llama31_8b", "parallel=tp8_sp", "dry.gpus=64"]
    teacher = "teacher=runs/llama31_8b/convert"
    one = "student=runs/llama31_minitron_4b_{}/prune"
    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        students = [f"students={folders}", one.format("width"), one.format("depth")]
        figures, *alone = (dry_run.plan(compose.compose("distill", [*given, each, teacher])) for each in students)
    found = {role: model["parameters"] for role, model in figures["models"].items()}
    assert found == {"teacher": 8_030_261_248, "student width": 4_512_746_496, "student depth": 4_540_469_248}
    alone = [each["ranks"][0] for each in alone]
    [row] = figures["ranks"]
    for kind in ("weights", "gradients", "optimizer"):
        assert row[kind] == sum(each[kind] for each in alone)
    assert row["teacher"] == alone[0]["teacher"]
    assert row["activations"] == max(each["activations"] for each in alone)


@pytest.mark.parametrize("given", ["[a]", "{}", "{a/b: c}"])
def test_students_have_names(given):
    with pytest.raises(UserError, match="name the folders, students="):
        composed("distill", "+model=llama31_8b", f"students={given}")
