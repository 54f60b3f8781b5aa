"""Several teachers: a failure means that a student learns something else than the weighted sum of their divergences."""

import dataclasses
import json
import math

import pytest
import torch
import torch.distributed as dist

from minitron_mcore.checkpoint import lineage
from minitron_mcore.checkpoint.run_folder import identity, open_checkpoint
from minitron_mcore.cli import compose, dry_run
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.config.stages import DistillRun
from minitron_mcore.distill import checks
from minitron_mcore.distill.teachers import open_teachers
from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks
from tests.helpers import models, tiny_run, training
from tests.helpers.cutting import export, write_family
from tests.helpers.launching import conf, fork, word_tokenizer, words
from tests.helpers.layouts import layouts

CONFIG = dataclasses.replace(training.CONFIG, clip_grad=1e9, lm_weight=0.5, temperature=2.0, teacher_ahead=2)
WEIGHTS = {"teacher": 0.7, "narrow": 0.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, one that is narrower and less deep, and a student of a third width."""
    at = tmp_path_factory.mktemp("teachers")
    cuts = {"student": PruneConfig(hidden=24, ffn=18), "narrow": PruneConfig(hidden=12, blocks=4)}
    write_family(at, cuts, tied=True)
    return at


@pytest.fixture(scope="module")
def dense(folders):
    """The first step in fp64 by transformers: figures, and the gradients of the divergence from the mixture."""
    from transformers import AutoModelForCausalLM

    def model(name):
        export(folders / name, folders / f"{name}_hf")
        return AutoModelForCausalLM.from_pretrained(folders / f"{name}_hf", dtype=torch.float64)

    batch = next(training.micro_batches(dataclasses.replace(CONFIG, micro_batch=4), 0, 0, 1))
    mask, student = batch["loss_mask"], model("student")
    logits = student(batch["tokens"]).logits
    with torch.no_grad():
        taught = {name: model(name)(batch["tokens"]).logits for name in WEIGHTS}

    def kl(teacher, temperature):
        """[B, S]"""
        return (torch.xlogy(teacher, teacher) - teacher * (logits / temperature).log_softmax(-1)).sum(-1)

    def mean(value):
        return (value * mask).sum() / mask.sum()

    soft = {name: (z / 2).softmax(-1) for name, z in taught.items()}
    lm = mean(-logits.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0])
    figures = {
        "kd_loss": sum(w * mean(kl(soft[name], 2.0)) for name, w in WEIGHTS.items()).item(),
        "lm_loss": lm.item(),
        "teacher_entropy": -sum(w * mean(torch.xlogy(soft[n], soft[n]).sum(-1)) for n, w in WEIGHTS.items()).item(),
        # The last token of a window predicts nothing.
        "heldout": sum(w * (kl(taught[n].softmax(-1), 1.0) * mask)[:, :-1].sum() for n, w in WEIGHTS.items()).item(),
    }
    mixture = sum(w * soft[name] for name, w in WEIGHTS.items())
    (4 * mean(kl(mixture, 2.0)) + 0.5 * lm).backward()
    return figures, {name: parameter.grad for name, parameter in student.named_parameters()}


def run_of(at, config) -> DistillRun:
    return DistillRun(
        teachers=[word for name, w in WEIGHTS.items() for word in (f"{w}", f"{at}/{name}")], distill=config
    )


def first_step(at, config, parallel, out_dir):
    """Figures of a step, and the divergence as it is measured on held-out text; its gradients are saved as if they were weights."""
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.evaluation.perplexity import ShardedModel
    from minitron_mcore.parallel import process_groups

    student, dp = open_checkpoint(at / "student"), process_groups.dp_group()
    trainer = Trainer(student, open_teachers(run_of(at, config)), config, parallel, "fp32")
    batches = list(models.placed(training.micro_batches(config, 0, dp.rank(), dp.size())))
    batches, heldout = batches[: config.global_batch // dp.size()], torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        model, mask = ShardedModel(trainer.model, trainer.arch, trainer.loss_fn), batch["loss_mask"].bool()
        heldout += model.nll(batch["tokens"], torch.cat([mask[:, :1], mask[:, :-1]], 1))
    dist.all_reduce(heldout, group=dp)
    figures = trainer.train_step(batches) | {"heldout": heldout[1].item()}
    training.save_gradients(trainer, student, out_dir)
    return figures


LAYOUTS = {name: (*layout, None) for name, layout in layouts("tp2_sp", "pp2", "cp2_dp2").items()}
LAYOUTS["dp2_of_tp2"] = 2, ParallelConfig(), ParallelConfig(tensor=2)


@pytest.mark.default_cases("tp2_sp", "pp2")
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_the_mixture(tmp_path, folders, dense, name):
    (world, parallel, teacher_parallel), (expected, gradients) = LAYOUTS[name], dense
    config = dataclasses.replace(CONFIG, teacher_parallel=teacher_parallel)
    for figures in on_ranks(first_step, world, parallel, folders, config, parallel, tmp_path / "run"):
        for key, value in expected.items():
            assert math.isclose(figures[key], value, rel_tol=2e-5), key
    found = export(tmp_path / "run", tmp_path / "hf")
    for key, gradient in gradients.items():
        assert (found[key] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), key


def test_a_dry_run_counts_all_and_says_what_cannot_be(tmp_path):
    wide, narrow = wide_folder, _ = "runs/llama31_8b/convert", "runs/llama31_minitron_4b_width/prune"
    given = ["+model=llama31_8b", "student=runs/llama31_minitron_4b_depth/prune", "parallel=tp8_sp", "data.train=[x]"]
    blend = f"teachers=[0.7,{wide},0.3,{narrow}]"
    with conf():
        two, wide, narrow = (
            dry_run.plan(compose.compose("distill", [*given, each]))
            for each in (blend, f"teacher={wide}", f"teacher={narrow}")
        )
        wrong = ["distill.hidden_state_loss.weight=1", "distill.teacher_ranks=8"]
        refused = dry_run.plan(compose.compose("distill", [*given, blend, *wrong]))["problems"]
    assert [*two["models"]] == ["teacher", "teacher 2", "student"] and not two["problems"]
    for kind in ("teacher", "hand-off"):
        assert two["ranks"][0][kind] == sum(one["ranks"][0][kind] for one in (wide, narrow))
    assert two["operations"]["flop_a_step"]["teacher 2"] == narrow["operations"]["flop_a_step"]["teacher"]
    assert any("hidden_state_loss.weight is 1.0, but it is for blocks of one teacher" in each for each in refused)
    assert any("teacher_ranks is 8, but its ranks hold one teacher, not 2: give 0" in each for each in refused)
    with pytest.raises(UserError, match="The list of teachers"):
        open_teachers(DistillRun(teachers=["0.7", "a", "b"]))
    (tmp_path / "index.json").touch()
    cache = f"teachers=[{wide_folder},{tmp_path}]"
    with conf():
        planned = dry_run.plan(compose.compose("distill", [*given, cache]))["problems"]
    sentence = f"teachers has {tmp_path}, a teacher cache: give checkpoints, or this cache alone as teacher."
    assert sentence in planned
    with pytest.raises(UserError, match="a teacher cache: give checkpoints"):
        open_teachers(DistillRun(teachers=[wide_folder, str(tmp_path)]))
    other = dataclasses.replace(models.ARCH, vocab=102)
    assert "of [101, 102] tokens" in next(checks.several_teachers([models.ARCH, other], training.CONFIG))


@pytest.mark.slow
def test_a_run_has_its_teachers_by_weight(folders):
    """Their weights identify the run, and its lineage names all."""
    at = folders
    word_tokenizer(at / "tokenizer")
    (at / "text.txt").write_text(words(400, 0))
    given = ["+model=smollm2_135m", "dtype=fp32", "student=student", "out_dir=run", "data.tokenizer=tokenizer"]
    given += ["data.train=[text.txt]", "data.heldout=[text.txt]", "evaluate.sequence_length=32", "distill.eval_every=2"]
    given += ["distill.steps=2", "distill.save_every=1", *tiny_run.training()]
    fork(at, "distill", *given, "teachers=[0.7,teacher,0.3,narrow]", "distill.stop_after=1")
    output = fork(at, "distill", *given, "teachers=[0.6,teacher,0.4,narrow]", fails=2)
    assert "teachers[0]" in output
    output = fork(at, "distill", *given, "teachers=[0.7,teacher,0.3,narrow]", processes=2)
    assert "resuming after step 1" in output
    rows = [json.loads(line) for line in (at / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["heldout_kl"] > 0 and rows[1]["teacher_tflops"] > 0
    run = open_checkpoint(at / "run")
    assert [run.lineage["parents"][role]["weight"] for role in ("teacher", "teacher 2")] == [0.7, 0.3]
    known = {step.identity["fingerprint"] for step in lineage.history(run.lineage, identity(run))}
    assert {open_checkpoint(at / each).fingerprint for each in ("student", "teacher", "narrow", "run")} <= known
