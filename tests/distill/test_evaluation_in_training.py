"""Held-out loss during training: a failure means that measuring changes what is learned, or that the loss is another one."""

import dataclasses
import json
import math

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.cli import dry_run
from minitron_mcore.config.settings import (
    DataConfig,
    Dtype,
    EvaluateConfig,
    HiddenStateLossConfig,
    PruneConfig,
)
from minitron_mcore.config.stages import EvaluateRun, Run
from minitron_mcore.data import tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation.windows import file_windows
from minitron_mcore.testing import on_ranks
from tests.helpers import training
from tests.helpers.cutting import ONE, export, write_family
from tests.helpers.launching import config_of, word_tokenizer, words
from tests.helpers.layouts import layouts
from tests.helpers.text_files import write_jsonl

# A learning rate with which the loss is lowest after step 4.
CONFIG = dataclasses.replace(
    training.CONFIG,
    steps=5,
    peak_lr=0.05,
    min_lr=0.05,
    keep_last=1,
    hidden_state_loss=HiddenStateLossConfig(0.5, pairs=[[2, 2]]),
)
MEASURED = dataclasses.replace(CONFIG, eval_every=2)
LAYOUTS = layouts("dp2", "pp2_virtual2", "cp2_tp2_sp")
FIGURES = ("kd_loss", "lm_loss", "hidden_state_loss", "teacher_entropy", "grad_norm", "lr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, its teacher and text with their tokenizer."""
    at = tmp_path_factory.mktemp("heldout")
    write_family(at, {"student": PruneConfig(hidden=24, ffn=18)}, tied=True)
    word_tokenizer(at / "tokenizer")
    write_jsonl(at / "a.jsonl", [words(30, seed) for seed in range(9)])
    write_jsonl(at / "b.jsonl", [words(50, 77)])
    return at


def settings(at) -> dict:
    data = DataConfig(heldout=[f"{at}/a.jsonl", f"{at}/b.jsonl"], tokenizer=f"{at}/tokenizer")
    return {"data": data, "evaluate": EvaluateConfig(sequence_length=16, micro_batch=3), "dtype": Dtype.fp32}


def dense_kl(at, student) -> float:
    """KL(teacher || student) on the held-out text in nats a token, from transformers' modules in fp64."""
    from transformers import AutoModelForCausalLM

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (at / "hf", student)
    )
    total, count = 0.0, 0
    for path in settings(at)["data"].heldout:
        windows = file_windows(path, tokenizer.load(at / "tokenizer"), 16)
        t, s = (model(windows.tokens).logits[:, :-1].detach().log_softmax(-1) for model in (teacher, student))
        total += ((t.exp() * (t - s)).sum(-1) * windows.mask[:, 1:]).sum().item()
        count += int(windows.mask.sum())
    return total / count


def measure(at, parallel, out_dir):
    from minitron_mcore.evaluation.heldout import HeldOut

    pair = at / "student", at / "teacher"
    text = HeldOut(Run(**settings(at)), open_checkpoint(pair[0]))
    return training.distill(*pair, MEASURED, parallel, out_dir, heldout=text)


def train(at, parallel, out_dir):
    """Histories: without held-out text, with it, and with it in two parts; the last checkpoint's loss as evaluate finds it."""
    from minitron_mcore.evaluation import perplexity
    from minitron_mcore.evaluation.heldout import HeldOut
    from minitron_mcore.parallel import process_groups

    pair = at / "student", at / "teacher"
    text = HeldOut(Run(**settings(at)), open_checkpoint(pair[0]))
    plain = training.distill(*pair, CONFIG, parallel, out_dir / "plain")
    measured = measure(at, parallel, out_dir / "measured")
    half = dataclasses.replace(MEASURED, stop_after=4)
    parts = training.distill(*pair, half, parallel, out_dir / "parts", heldout=text)
    if process_groups.rank() == 0:  # as if a signal had stopped the measurement after step 4, which is saved
        record = json.loads((out_dir / "parts" / "best.json").read_text())
        record["measured"].pop("4")
        (out_dir / "parts" / "best.json").write_text(json.dumps(record))
        metrics = out_dir / "parts" / "metrics.jsonl"
        metrics.write_text(
            metrics.read_text().replace(f'"heldout_loss": {parts[-1]["heldout_loss"]}', '"heldout_loss": null')
        )
        assert json.loads(metrics.read_text().splitlines()[-1])["heldout_loss"] is None
    process_groups.barrier()
    parts += training.distill(*pair, MEASURED, parallel, out_dir / "parts", True, heldout=text)
    run = EvaluateRun(**settings(at), parallel=parallel, source=str(out_dir / "measured"))
    rows = perplexity.evaluate_run(*perplexity.open_model(run), run)
    return plain, measured, parts, sum(r["loss"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Held-out losses by step on one process."""
    measured = on_ranks(measure, 1, ONE, folder, ONE, tmp_path_factory.mktemp("alone"))[0]
    return {row["step"]: row["heldout_loss"] for row in measured if "heldout_loss" in row}


@pytest.mark.default_cases("pp2_virtual2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_bit_equal_and_the_lowest_loss_is_kept(tmp_path, folder, alone, layout):
    world, parallel = LAYOUTS[layout]
    assert list(alone) == [2, 4, 5] and len(set(alone.values())) == 3
    for plain, measured, parts, last in on_ranks(train, world, parallel, folder, parallel, tmp_path):
        assert len(plain) == len(measured) == len(parts) == CONFIG.steps
        for a, b, c in zip(plain, measured, parts, strict=True):
            assert all(a[key] == b[key] == c[key] for key in FIGURES), (a, b, c)
            assert "heldout_loss" not in a and b.get("heldout_loss") == c.get("heldout_loss")
        losses = {row["step"]: row["heldout_loss"] for row in measured if "heldout_loss" in row}
        assert losses.keys() == alone.keys() and last == losses[5]
        assert all(math.isclose(losses[step], alone[step], rel_tol=2e-5) for step in losses)
    with pytest.raises(UserError, match="has steps 5 and no best one"):
        open_checkpoint(tmp_path / "plain", step="best")
    a, b = (export(tmp_path / name, tmp_path / f"{name}_hf") for name in ("plain", "measured"))
    assert all(torch.equal(a[key], weight) for key, weight in b.items())
    divergence = {row["step"]: row["heldout_kl"] for row in measured if "heldout_loss" in row}
    assert math.isclose(divergence[5], dense_kl(folder, tmp_path / "measured_hf"), rel_tol=2e-5)
    for name in ("measured", "parts"):
        best = json.loads((tmp_path / name / "best.json").read_text())
        lowest = min(losses, key=losses.get)
        assert (best["step"], best["heldout_loss"]) == (lowest, losses[lowest])
        assert {int(step): loss for step, loss in best["measured"].items()} == losses
        assert open_checkpoint(tmp_path / name, step="best").step == "step_0000004"
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert {row["step"]: row["heldout_loss"] for row in lines if row["heldout_loss"] is not None} == losses
        assert {row["step"]: row["heldout_kl"] for row in lines if row["heldout_kl"] is not None} == divergence


def test_what_cannot_be_measured_is_refused_before_work_starts():
    """Of distillation and correction, by their dry run."""
    overrides = [
        "parallel=cp2",
        "dry.memory=999",
        "data.heldout=[]",
        "evaluate.sequence_length=1023",
        "evaluate.max_windows=0",
    ]
    for stage in ("distill", "correct"):
        problems = dry_run.plan(config_of(stage, "+model=llama31_8b", *overrides, f"{stage}.eval_every=0"))["problems"]
        for part in (
            f"{stage}.eval_every is 0",
            "data.heldout is empty: give text files",
            "multiple of 4 tokens: give 1024",
            "max_windows is 0",
        ):
            assert any(part in problem for problem in problems), (part, problems)
        assert not dry_run.plan(config_of(stage, "+model=llama31_8b", *overrides))["problems"]
