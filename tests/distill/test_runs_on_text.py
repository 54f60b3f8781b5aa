"""Whole distillations on text files, as the stage runs them: a failure means that a part of the data is learned, or measured, that
is not the one that was asked for."""

import dataclasses
import json
import math

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import DataConfig, Dtype, EvaluateConfig, ParallelConfig, PruneConfig
from minitron_mcore.config.stages import DistillRun, EvaluateRun
from minitron_mcore.data import datasets, token_cache
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.cached_teacher import SETTINGS, World, record
from tests.helpers.cutting import ONE, export, write_family
from tests.helpers.launching import word_tokenizer

pytestmark = pytest.mark.slow

ANSWER = 60
"""Token ids from here on are words of answers; 0 is EOS."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, its teacher, and lines of a question and an answer, whose words differ."""
    at = tmp_path_factory.mktemp("text")
    write_family(at, {"student": PruneConfig(hidden=24, ffn=18)}, tied=True)
    word_tokenizer(at / "tokenizer")
    draw = torch.Generator().manual_seed(3)
    lines = []
    for _ in range(40):
        ids = [torch.randint(*ends, (int(torch.randint(2, 9, (), generator=draw)),), generator=draw) for ends in ENDS]
        question, answer = (" ".join(f"w{n}" for n in part.tolist()) for part in ids)
        lines.append(json.dumps({"prompt": f"{question} ", "completion": answer}) + "\n")
    (at / "text.jsonl").write_text("".join(lines))
    return at


ENDS = (2, ANSWER), (ANSWER, models.SIZES["vocab_size"])


def data(at, **changes) -> DataConfig:
    common = {"tokenizer": f"{at}/tokenizer", "cache": f"{at}/cache", "train": [f"{at}/text.jsonl"]}
    return DataConfig(**common | changes)


def launched(config: DistillRun) -> None:
    """What launch/distill.py does in the running layout."""
    from minitron_mcore.distill import cache, remote_teacher, run
    from minitron_mcore.evaluation.heldout import HeldOut
    from minitron_mcore.parallel import process_groups

    if (bridge := process_groups.bridge()) and bridge.is_teacher:
        teacher = open_checkpoint(config.teacher)
        return remote_teacher.serve(teacher, config.distill, config.parallel, config.dtype.value)
    student = open_checkpoint(config.student)
    text = HeldOut(config, student) if config.distill.eval_every else None
    run.train([config], config.distill, [student], cache.open_teacher(config.teacher), text)


def evaluated(config: EvaluateRun) -> list[dict]:
    from minitron_mcore.evaluation import perplexity

    return perplexity.evaluate_run(*perplexity.open_model(config), config)


def dense_steps(at, batches, rates) -> list[tuple[float, float, float]]:
    """Divergence, cross-entropy and norm of the gradient of each step in fp64: torch's Adam on transformers' modules, loss on
    answers alone, which are told by their ids."""
    from transformers import AutoModelForCausalLM

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(at / name, dtype=torch.float64) for name in ("hf", "student_hf")
    )
    adam = torch.optim.Adam(student.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    found = []
    for batch, rate in zip(batches, rates, strict=True):
        # The EOS of a document is in its answer.
        mask = ((batch["labels"] >= ANSWER) | (batch["labels"] == 0)).double()
        t, s = (model(batch["tokens"]).logits.log_softmax(-1) for model in (teacher, student))
        kd = ((t.detach().exp() * (t.detach() - s)).sum(-1) * mask).sum() / mask.sum()
        lm = -(s.gather(-1, batch["labels"][..., None])[..., 0] * mask).sum() / mask.sum()
        adam.zero_grad()
        (kd + 0.5 * lm).backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        found.append((kd.item(), lm.item(), norm.item()))
        assert 0.2 < mask.mean() < 0.8
    return found


def test_a_run_on_answers_is_the_dense_one(tmp_path, folder):
    """Losses and gradients of four steps at TP 2 and PP 2, from the text file to metrics.jsonl."""
    parallel = ParallelConfig(tensor=2, pipeline=2)
    settings = dataclasses.replace(SETTINGS, lm_weight=0.5, weight_decay=0.0)
    where = {"student": f"{folder}/student", "teacher": f"{folder}/teacher", "out_dir": f"{tmp_path}/run"}
    config = DistillRun(parallel=parallel, data=data(folder), distill=settings, dtype=Dtype.fp32, **where)
    on_ranks(launched, 4, parallel, config)
    history = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    export(folder / "student", folder / "student_hf")
    prefixes, weights = token_cache.prepare(config.data, "nowhere", models.SIZES["vocab_size"])
    order = datasets.SampleOrder.of(config.data, prefixes, weights, settings.sequence_length, 16)
    samples = datasets.Samples(order, config.data.cache, models.SIZES["vocab_size"])
    batches = [samples.batch(range(4 * n, 4 * n + 4)) for n in range(settings.steps)]
    dense = dense_steps(folder, batches, [row["lr"] for row in history])
    assert len(history) == len(dense) == settings.steps
    for row, expected in zip(history, dense, strict=True):
        for key, value in zip(("kd_loss", "lm_loss", "grad_norm"), expected, strict=True):
            assert math.isclose(row[key], value, rel_tol=2e-4), (key, row, expected)


def test_held_out_figures_where_experts_or_the_teacher_are_elsewhere(tmp_path, folder):
    """On the valid part of the text, with masked documents: a student of experts at EP 2, a teacher on its own ranks, a teacher
    cache, each beside one process; and that one beside transformers."""
    families.tiny("mixtral", tmp_path / "moe_hf")
    on_ranks(models.import_hf, 1, ONE, tmp_path / "moe_hf", tmp_path / "moe", ONE)
    (tmp_path / "teacher").symlink_to(folder / "teacher")
    split = data(folder, split="75,25", document_mask=True)
    world = World(tmp_path, split.train)
    settings = dataclasses.replace(SETTINGS, eval_every=2)

    def run(name: str, parallel=ONE, student=tmp_path / "moe", teacher="teacher", **changes) -> DistillRun:
        where = {"student": str(student), "teacher": str(tmp_path / teacher), "out_dir": str(tmp_path / name)}
        options = {"evaluate": EvaluateConfig(sequence_length=16, micro_batch=3), "dtype": Dtype.fp32}
        distill = dataclasses.replace(settings, **changes)
        return DistillRun(parallel=parallel, data=split, distill=distill, **options, **where)

    dense = {"student": folder / "student"}
    experts, apart = ParallelConfig(expert=2), ParallelConfig(tensor=2)
    own = {"teacher_ranks": 1, "teacher_parallel": ONE}
    on_ranks(launched, 1, ONE, run("moe_one"))
    on_ranks(launched, 2, experts, run("moe_ep2", experts, teacher_parallel=ONE))
    on_ranks(launched, 1, ONE, run("one", **dense))
    on_ranks(launched, 3, apart, run("apart", apart, **dense, **own), **own)
    on_ranks(record, 2, ONE, dataclasses.replace(world.writer("cache", kind="hidden"), data=split))
    on_ranks(launched, 2, ONE, run("cached", **dense, teacher="cache"))
    for name, alone in (("moe_ep2", "moe_one"), ("apart", "one"), ("cached", "one")):
        for row, expected in zip(world.history(name), world.history(alone), strict=True):
            is_measured = row["step"] % 2 == 0
            assert (row["heldout_loss"] is not None) == (expected["heldout_kl"] is not None) == is_measured
            assert (row["heldout_kl"] is not None) == (is_measured and name != "cached")
            for key in ("kd_loss", "heldout_loss", "heldout_kl"):
                assert row[key] is None or math.isclose(row[key], expected[key], rel_tol=5e-5), (name, key, row)
    export(tmp_path / "one", tmp_path / "one_hf")
    source = EvaluateRun(source=f"{tmp_path}/one_hf", data=split, evaluate=run("one").evaluate, dtype=Dtype.fp32)
    (row,) = on_ranks(evaluated, 1, ONE, source)[0]
    assert row["bytes"] is None and math.isclose(row["loss"], world.history("one")[-1]["heldout_loss"], rel_tol=2e-5)
