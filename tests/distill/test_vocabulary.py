"""Teacher and student of two vocabularies: a failure means that an id of one is held against another id of the other."""

import dataclasses
import math

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.distill import checks, vocabulary
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import models
from tests.helpers.cutting import ONE
from tests.helpers.launching import word_tokenizer
from tests.helpers.layouts import layouts
from tests.helpers.models import ARCH
from tests.helpers.training import CONFIG, distill, micro_batches

LAYOUTS = layouts("tp2", "tp3", "tp2_pp2")


def made(folder, vocab, tied, seed, swapped=False):
    """A checkpoint in `folder` of a model with so many ids, and a tokenizer whose words w5 and w6 may change places."""
    models.tiny_llama(folder / "source", tied, seed, vocab_size=vocab)
    word_tokenizer(folder / "source")
    if swapped:
        file = folder / "source/tokenizer.json"
        file.write_text(file.read_text().replace('"w5": 5', '"w5": 6').replace('"w6": 6', '"w6": 5'))
    on_ranks(models.import_hf, 1, ONE, folder / "source", folder / "checkpoint", ONE)
    return folder / "checkpoint"


@pytest.mark.default_cases("tp2-101-129-True", "tp2_pp2-101-140-True")
@pytest.mark.parametrize(
    ("layout", "student_vocab", "teacher_vocab", "tied"),
    [("tp2", 101, 129, True), ("tp3", 101, 113, False), ("tp3", 130, 101, True), ("tp2_pp2", 101, 140, True)],
)
def test_loss_is_over_the_shared_ids(tmp_path, layout, student_vocab, teacher_vocab, tied):
    """Losses and gradient's norm of the first step against transformers' modules in fp64, their logits cut to 101."""
    from transformers import AutoModelForCausalLM

    world, parallel = LAYOUTS[layout]
    config = dataclasses.replace(CONFIG, lm_weight=0.5, steps=2)
    sizes = {"student": student_vocab, "teacher": teacher_vocab}
    paths = [made(tmp_path / role, size, tied, seed) for seed, (role, size) in enumerate(sizes.items())]
    step = on_ranks(distill, world, parallel, *paths, config, parallel, tmp_path / "run")[0][0]
    batch = next(micro_batches(dataclasses.replace(config, micro_batch=4), 0, 0, 1))
    logs = []
    for role in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / role / "source", dtype=torch.float64)
        logs.append(model(batch["tokens"]).logits[..., :101].log_softmax(-1))
    t, s = logs[0].detach(), logs[1]
    mask = batch["loss_mask"] / batch["loss_mask"].sum()
    kd = ((t.exp() * (t - s)).sum(-1) * mask).sum()
    lm = -(s.gather(-1, batch["labels"][..., None])[..., 0] * mask).sum()
    (kd + 0.5 * lm).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for key, expected in (("kd_loss", kd), ("lm_loss", lm), ("grad_norm", norm)):
        assert math.isclose(step[key], expected.item(), rel_tol=2e-5), key


def test_other_tokenizers_are_refused(tmp_path):
    student, teacher = made(tmp_path / "s", 101, True, 0), made(tmp_path / "t", 129, True, 1, swapped=True)
    sentence = "vocabulary has 129 tokens, the student's 101, and their tokenizers differ in 2 of the ids"
    with pytest.raises(RankError, match=sentence):
        on_ranks(distill, 1, ONE, student, teacher, CONFIG, ONE, tmp_path / "run")
    archs = open_checkpoint(student).arch, open_checkpoint(teacher).arch
    [problem] = vocabulary.problems(*archs, student / "hf", None)
    assert "129 tokens, the student's 101, and one has no tokenizer" in problem
    assert not list(vocabulary.problems(archs[0], archs[0], student / "hf", None))


def test_top_k_is_of_the_shared_ids():
    student, teacher = (dataclasses.replace(ARCH, vocab=vocab) for vocab in (130, 101))
    config = dataclasses.replace(CONFIG, top_k=110)
    assert list(checks.problems(student, teacher, config, ONE, 1)) == [
        "top_k is 110; it must be at least 1 and below the vocabulary of 101, which is top_k null."
    ]
