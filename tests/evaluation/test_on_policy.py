"""On-policy distillation: a failure means that the student learns from other answers than its own, or something else of them."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from minitron_mcore.checkpoint import stage_record
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.cli import compose, dry_run
from minitron_mcore.config import identity
from minitron_mcore.config.settings import DataConfig, Divergence, OnPolicyConfig
from minitron_mcore.config.stages import DistillRun
from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks
from tests.helpers import models, tiny_run, training
from tests.helpers.cutting import ONE, export
from tests.helpers.launching import conf, fork, word_tokenizer, words
from tests.helpers.layouts import layouts

POLICY = OnPolicyConfig(share=0.6, tokens=6, micro_batch=3)
CONFIG = dataclasses.replace(training.CONFIG, clip_grad=1e9, divergence=Divergence.reverse_kl, on_policy=POLICY)
KEYS = ("tokens", "labels", "loss_mask")


@pytest.fixture(scope="module")
def at(pair_of, tmp_path_factory):
    """Student, teacher, and prompts of up to six words, and of more than fit."""
    at = tmp_path_factory.mktemp("on_policy")
    for name, folder in zip(("student", "teacher"), pair_of(True), strict=True):
        (at / name).symlink_to(folder)
        export(folder, at / f"{name}_hf")
    word_tokenizer(at / "tokenizer")
    lines = [json.dumps({"prompt": words(1 + n % 7, n)}) + "\n" for n in range(20)]
    (at / "prompts.jsonl").write_text("".join(lines))
    (at / "other.jsonl").write_text(lines[0])
    (at / "text.txt").write_text(words(400, 0))
    return at


def run_of(at, config, **changes) -> DistillRun:
    policy = dataclasses.replace(config.on_policy, prompts=[f"{at}/prompts.jsonl"], **changes)
    return DistillRun(
        data=DataConfig(tokenizer=f"{at}/tokenizer"), distill=dataclasses.replace(config, on_policy=policy)
    )


def drawn_and_learned(at, parallel, out_dir):
    """Samples of the first step by temperature, in their order, and its figures at temperature 1; its gradients are saved."""
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.evaluation.on_policy import StudentAnswers
    from minitron_mcore.parallel import process_groups

    student, dp, drawn = open_checkpoint(at / "student"), process_groups.dp_group(), {}
    trainer = Trainer(student, open_checkpoint(at / "teacher"), CONFIG, parallel, "fp32")
    for temperature in (0.0, 1.0):
        answers = StudentAnswers(run_of(at, CONFIG, temperature=temperature), student)
        text = models.placed(training.micro_batches(CONFIG, 0, dp.rank(), dp.size()))
        batches = list(itertools.islice(answers.batches(trainer, text), CONFIG.global_batch // dp.size()))
        every = process_groups.from_all_ranks([{key: batch[key] for key in KEYS} for batch in batches], dp)
        rows = [batch for micro_batch in zip(*every, strict=True) for batch in micro_batch]
        drawn[temperature] = {key: torch.cat([row[key] for row in rows]) for key in KEYS}
    figures = trainer.train_step(batches)
    training.save_gradients(trainer, student, out_dir)
    return drawn, figures


def dense(at, batch):
    """Reverse KL divergence on the samples and its gradients, by transformers in fp64."""
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(at / f"{name}_hf", dtype=torch.float64) for name in ("student", "teacher")
    )
    s, t = (model(batch["tokens"]).logits.log_softmax(-1) for model in (student, teacher))
    loss = ((s.exp() * (s - t.detach())).sum(-1) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.fixture(scope="module")
def alone(at):
    """What one process draws, and what it is to learn from that."""
    ((drawn, figures),) = on_ranks(drawn_and_learned, 1, ONE, at, ONE, at / "alone")
    return drawn, figures, dense(at, drawn[1.0])


def test_answers_are_the_student_s_own(at, alone):
    """At temperature 0 they are those of transformers; other samples are the text's."""
    greedy, text = alone[0][0.0], next(training.micro_batches(dataclasses.replace(CONFIG, micro_batch=4), 0, 0, 1))
    answered = [n for n in range(4) if not torch.equal(greedy["tokens"][n], text["tokens"][n])]
    assert 0 < len(answered) < 4
    prompts = [json.loads(line)["prompt"] for line in (at / "prompts.jsonl").read_text().splitlines()]
    for n in range(4):
        tokens, labels, mask = (greedy[key][n] for key in KEYS)
        if n not in answered:
            assert all(torch.equal(greedy[key][n], text[key][n]) for key in KEYS)
            continue
        counted = mask.nonzero()[:, 0].tolist()
        length = counted[0] + 1
        assert " ".join(f"w{i}" for i in tokens[:length].tolist()) in prompts and length <= 6
        assert counted == list(range(counted[0], counted[0] + len(counted)))
        expected = models.hf_says(at / "student_hf", tokens[None, :length], 6)[0, length:].tolist()
        expected = expected[: expected.index(0) + 1] if 0 in expected else expected
        assert labels[counted].tolist() == expected
        assert torch.equal(tokens[1:][: counted[-1]], labels[: counted[-1]]) and not tokens[counted[-1] + 1 :].any()


LAYOUTS = layouts("tp2_sp", "dp2", "pp2", "cp2_dp2")


@pytest.mark.default_cases("tp2_sp", "dp2")
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_draws_and_learns_the_same(tmp_path, at, alone, name):
    """Of the samples that one process draws, loss and gradients are transformers'."""
    (world, parallel), (drawn, _, (loss, gradients)) = LAYOUTS[name], alone
    for found, figures in on_ranks(drawn_and_learned, world, parallel, at, parallel, tmp_path / "run"):
        for temperature, batch in drawn.items():
            assert all(torch.equal(found[temperature][key], value) for key, value in batch.items())
        assert math.isclose(figures["kd_loss"], loss, rel_tol=2e-5)
    found = export(tmp_path / "run", tmp_path / "hf")
    for key, gradient in gradients.items():
        assert (found[key] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), key


@pytest.mark.slow
def test_a_resumed_run_draws_the_same(at):
    given = ["+model=smollm2_135m", "distill=on_policy", "dtype=fp32", "student=student", "teacher=teacher"]
    given += ["data.train=[text.txt]", "data.tokenizer=tokenizer", *tiny_run.training(), "distill.steps=3"]
    given += ["distill.on_policy.tokens=8", "distill.on_policy.share=0.8"]
    prompts = "distill.on_policy.prompts=[prompts.jsonl]"
    fork(at, "distill", *given, prompts, "out_dir=whole")
    fork(at, "distill", *given, prompts, "out_dir=halves", "distill.stop_after=1")
    output = fork(at, "distill", *given, "out_dir=halves", "distill.on_policy.prompts=[other.jsonl]", fails=2)
    assert "halves was made from distill.on_policy.prompts[0] prompts.jsonl" in output
    fork(at, "distill", *given, prompts, "out_dir=halves")
    losses = [
        [json.loads(line)["kd_loss"] for line in (at / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert open_checkpoint(at / "whole").fingerprint == open_checkpoint(at / "halves").fingerprint


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("share=1.5", "share is 1.5; it must be from 0 to 1."),
        ("tokens=1024", "leaves no room for a prompt in distill.sequence_length 1024"),
        ("prompts=[]", "distill.on_policy.prompts is empty"),
        ("top_p=0", "distill.on_policy.top_p is 0; it must be above 0"),
        ("share=0.2", "x.jsonl is neither a file nor"),
    ],
)
def test_impossible_settings_are_refused(change, sentence):
    given = ["+model=llama31_8b", "distill=on_policy", "distill.on_policy.prompts=[x.jsonl]"]
    with conf():
        problems = dry_run.plan(compose.compose("distill", [*given, f"distill.on_policy.{change}"]))["problems"]
        assert any(sentence in problem for problem in problems)
        learned = dry_run.plan(compose.compose("distill", [*given, "distill.lm_weight=1", "students={a: x, b: y}"]))
        eight_bits = dry_run.plan(compose.compose("distill", [*given, "performance=fp8"]))["problems"]
    assert any("fp8 needs multiples of 16 tokens" in problem for problem in eight_bits)
    assert any("2 students would learn from different answers" in problem for problem in learned["problems"])
    assert any("answers are no labels to learn" in problem for problem in learned["problems"])


def test_changed_prompts_are_noticed_and_counted(at, monkeypatch):
    monkeypatch.chdir(at)
    given = [
        "+model=smollm2_135m",
        "distill=on_policy",
        "distill.on_policy.prompts=[prompts.jsonl]",
        "data.train=[text.txt]",
    ]
    with conf():
        runs = [compose.compose("distill", [*given, f"distill.on_policy.share={share}"]) for share in (0.5, 0)]
        with_answers, without = (dry_run.plan(run)["operations"]["flop_a_step"] for run in runs)
    # Half of the samples take one more forward pass of the student, the head aside.
    assert (
        with_answers["student"] / 8 < with_answers["answers"] <= with_answers["student"] / 6
        and "answers" not in without
    )
    with_prompts, without = (stage_record.inputs(identity.resolved(run)) for run in runs)
    (name,) = with_prompts.keys() - without.keys()
    (at / "prompts.jsonl").rename(kept := at / "kept.jsonl")
    (at / "prompts.jsonl").write_text(kept.read_text()[:-2])
    changed = stage_record.inputs(identity.resolved(runs[0]))
    kept.replace(at / "prompts.jsonl")
    assert [key for key in changed if changed[key] != with_prompts[key]] == [name] == ["distill.on_policy.prompts[0]"]


def test_prompts_that_leave_no_room_are_refused(at):
    from minitron_mcore.evaluation.on_policy import StudentAnswers

    config = dataclasses.replace(CONFIG, sequence_length=6)
    with pytest.raises(UserError, match="0 of 20 prompts have at most 0 tokens"):
        StudentAnswers(run_of(at, config), open_checkpoint(at / "student"))
