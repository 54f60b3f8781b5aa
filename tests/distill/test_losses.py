"""The distillation loss against its formula, dense and in fp64, on 1, 2 and 3 tensor-parallel ranks.

A failure here means that students are trained on a wrong gradient. The losses of peers were right where their gradients
were off by the number of ranks, so every case compares the loss, its parts and both gradients.
"""

from dataclasses import replace

import pytest
import torch

from minitron_mcore.config.settings import Divergence, ParallelConfig
from minitron_mcore.distill.losses import FactoredLogits, LossConfig, distillation_loss
from minitron_mcore.parallel.process_groups import UserError
from minitron_mcore.testing import on_ranks
from tests.helpers.loss_cases import (
    ALL,
    BF16,
    KINDS,
    VANISHING,
    Case,
    dense_error,
    fusion_on_rank,
    on_rank,
    reference,
    relative_errors,
    same_model_on_rank,
    tied_on_rank,
    tied_reference,
)


def run_all(fn, tp: int, cases: dict[str, Case]) -> dict[str, list]:
    """Each case's results in rank order, all from one launch."""
    ranks = on_ranks(fn, tp, ParallelConfig(tensor=tp), list(cases.values()))
    return dict(zip(cases, zip(*ranks, strict=True), strict=True))


@pytest.mark.default_cases("3")
@pytest.mark.parametrize("tp", [1, 3])
def test_value_and_gradients_equal_dense_fp64(tp):
    for name, results in run_all(on_rank, tp, ALL).items():
        errors = relative_errors(ALL[name], results)
        limit = 2 * dense_error(ALL[name]) if name in VANISHING else 1e-5
        assert max(errors[:4]) <= 1e-5 and max(errors[4:]) <= limit, (name, errors)


@pytest.mark.parametrize("tp", [1, 3])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(tp):
    for name, ranks in run_all(same_model_on_rank, tp, KINDS).items():
        for stats, *gradients in ranks:
            assert abs(stats[0]) < 1e-6 and stats[2] > 1, name
            for gradient in gradients:
                assert gradient.abs().max() < 1e-6, name


@pytest.mark.parametrize("tp", [1, 2])
def test_all_tokens_masked_give_exact_zeros(tp):
    cases = {name: replace(case, masked=1.0, lm_weight=1.0) for name, case in KINDS.items()}
    for name, ranks in run_all(on_rank, tp, cases).items():
        for tensor in (tensor for result in ranks for tensor in result):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name


@pytest.mark.default_cases("3")
@pytest.mark.parametrize("tp", [1, 3])
def test_bf16(tp):
    """The measured errors are in the docstring of `divergences`."""
    for name, results in run_all(on_rank, tp, BF16).items():
        errors, rough = relative_errors(BF16[name], results), 2 if name.startswith(("reverse_kl", "top")) else 1
        assert max(errors[:4]) <= 5e-4 * rough and max(errors[4:]) <= 1e-2 * rough, (name, errors)


@pytest.mark.parametrize("tp", [1, 2])
def test_tied_embedding_gets_both_gradients(tp):
    case = Case()
    ours, expected = torch.cat(on_ranks(tied_on_rank, tp, ParallelConfig(tensor=tp), case)), tied_reference(case)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradient_accumulation_fusion_adds_to_main_grad():
    for off, on in on_ranks(fusion_on_rank, 1, ParallelConfig())[0]:
        for expected, found in zip(off, on, strict=True):
            assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_backward_scales_once():
    case = Case(chunk_tokens=10)
    tensors = case.tensors()
    hidden, head = tensors[0].requires_grad_(), tensors[1].requires_grad_()
    loss, stats = case.run(tensors)
    assert not stats.requires_grad
    (0.25 * loss).backward(retain_graph=True)
    *_, d_hidden, d_head = reference(case)
    assert torch.allclose(hidden.grad.double(), 0.25 * d_hidden, atol=1e-6)
    assert torch.allclose(head.grad.double(), 0.25 * d_head, atol=1e-6)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_forms_only_the_gradients_asked_for():
    case = Case(lm_weight=0.5)
    tensors = case.tensors()
    tensors[0].requires_grad_()
    loss, stats = case.run(tensors)
    loss.backward()
    assert tensors[0].grad is not None and tensors[1].grad is None
    with torch.no_grad():
        assert torch.equal(case.run(tensors)[1], stats)
    tensors[0].requires_grad_(False)
    assert not case.run(tensors)[0].requires_grad


def test_bad_input_is_refused_by_one_sentence():
    case = Case()
    student, head, teacher, teacher_head, *rest = case.tensors()
    with pytest.raises(UserError, match="1001 rows, the student's 1008"):
        case.run([student, head, teacher, teacher_head[:1001], *rest])
    with pytest.raises(UserError, match="kd_weight is 1.0 without a teacher"):
        case.run([student, head, None, None, *rest])
    with pytest.raises(UserError, match="vocab_size is 1009.*1008 rows"):
        Case(vocab=1009).run([student, head, teacher, teacher_head, *rest])
    with pytest.raises(UserError, match="the student's head has no main_grad"):
        models = FactoredLogits(student, head.clone().requires_grad_()), FactoredLogits(teacher, teacher_head)
        distillation_loss(*models, *rest, vocab_size=1000, config=LossConfig(gradient_accumulation_fusion=True))
    for change, sentence in (
        (dict(temperature=0), "temperature is 0; it must be above 0"),
        (
            dict(temperature=2.0, divergence=Divergence.mse),
            "temperature is 2.0, but divergence mse.*give temperature 1",
        ),
        (dict(temperature=2.0, divergence=Divergence.cosine), "divergence cosine does not use it"),
        (dict(jsd_beta=1.0, divergence=Divergence.jsd), "jsd_beta is 1.0; it must be above 0 and below 1"),
        (dict(top_k=0), "top_k is 0; it must be at least 1"),
        (dict(top_k=1000), "top_k is 1000; .* below the vocabulary of 1000"),
        (dict(top_k=5, divergence=Divergence.jsd), "top_k is 5, but divergence jsd takes the whole"),
    ):
        with pytest.raises(UserError, match=sentence):
            Case(**change).run([student, head, teacher, teacher_head, *rest])
