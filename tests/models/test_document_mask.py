"""Attention within documents: a failure means that a token sees another document, or not all of its own."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.performance import PerformanceConfig, Recompute
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.models import layer_spec
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import cp_shard
from minitron_mcore.testing import on_ranks
from tests.helpers import models, training
from tests.helpers.cutting import export, write_family

LENGTHS = [[1, 7, 1, 3, 12], [24], [23, 1], [2, 1, 1, 8, 12]]
"""Tokens of the documents of four samples."""
CONFIG = dataclasses.replace(
    training.CONFIG,
    steps=2,
    sequence_length=24,
    lm_weight=0.5,
    clip_grad=1e9,
    teacher_ahead=2,
)
LAYOUTS = {
    # processes, layout, the teacher's own layout, teacher ranks
    "pp2": (2, ParallelConfig(pipeline=2), None, 0),
    "cp2_tp2_sp": (4, ParallelConfig(context=2, tensor=2, sequence=True), None, 0),
    "pp2_virtual2_of_dp2": (2, ParallelConfig(pipeline=2, virtual=2), ParallelConfig(), 0),
    "dp2_of_cp2_apart": (4, ParallelConfig(), ParallelConfig(context=2), 2),
}


def document_starts(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.full((n,), sum(row[:i])) for i, n in enumerate(row)]) for row in lengths])


def sharded_rows(x):
    """This context-parallel rank's rows of [S, ...]."""
    return x[cp_shard({"x": torch.arange(len(x))[None]})["x"][0]]


def attend(tensors, starts, window):
    """Rows of this rank; output and gradients of query, key and value there."""
    config = SimpleNamespace(window_size=window and (window - 1, 0))
    attention = layer_spec.TorchAttention(config, SimpleNamespace(cp=process_groups.cp_group()))
    leaves = [sharded_rows(x).clone().requires_grad_() for x in tensors[:3]]
    own = cp_shard({"starts": starts})["starts"]
    out = attention(*leaves, own)
    out.backward(sharded_rows(tensors[3]))
    return [sharded_rows(torch.arange(starts.shape[1])), out.detach(), *(leaf.grad for leaf in leaves)]


def attend_by_document(tensors, lengths, window):
    """The formula in fp64, each document alone."""
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    out = torch.zeros_like(tensors[3], dtype=torch.float64)
    for row, sizes in enumerate(lengths):
        for first, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
            q, k, v = (x[first : first + size, row] for x in leaves)
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            distance = torch.arange(size)[:, None] - torch.arange(size)
            scores = torch.einsum("snd,tnd->nst", q, k) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill((distance < 0) | (distance >= (window or size)), -torch.inf)
            out[first : first + size, row] = torch.einsum("nst,tnd->snd", scores.softmax(-1), v).flatten(1)
    out.backward(tensors[3].double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.default_cases("2")
@pytest.mark.parametrize("context", [1, 2, 3])
def test_attention_is_that_of_each_document_alone(context):
    """With documents longer and shorter than a block of queries and than a window."""
    lengths = [[1, 250, 1, 1, 47, 300], [600], [599, 1]]
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(600, 3, n, 16, generator=g) for n in (4, 2, 2)]
    tensors.append(torch.randn(600, 3, 64, generator=g))
    for window in (None, 40):
        ranks = on_ranks(attend, context, ParallelConfig(context=context), tensors, document_starts(lengths), window)
        order = torch.cat([rank[0] for rank in ranks])
        for part, expected in enumerate(attend_by_document(tensors, lengths, window), 1):
            found = torch.cat([rank[part] for rank in ranks]).double()
            assert (found - expected[order]).abs().max() <= 1e-5 * max(1, expected.abs().max()), (window, part)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A student and its teacher; the losses and the student's gradients, each document alone in transformers in fp64."""
    from transformers import AutoModelForCausalLM

    at = tmp_path_factory.mktemp("documents")
    write_family(at, {"student": PruneConfig(hidden=24, ffn=18)}, tied=True)
    model = {}
    for name in ("teacher", "student"):
        export(at / name, at / f"{name}_hf")
        model[name] = AutoModelForCausalLM.from_pretrained(at / f"{name}_hf", dtype=torch.float64)
    batch, kd, lm = samples(), 0.0, 0.0
    for row, sizes in enumerate(LENGTHS):
        for first, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
            tokens, labels = (batch[key][row, first : first + size] for key in ("tokens", "labels"))
            t, s = (model[name](tokens[None]).logits[0].log_softmax(-1) for name in ("teacher", "student"))
            mask = batch["loss_mask"][row, first : first + size]
            kd += (mask * (t.exp() * (t - s)).sum(-1)).sum()
            lm -= (mask * s.gather(-1, labels[:, None])[:, 0]).sum()
    count = batch["loss_mask"].sum()
    ((kd + 0.5 * lm) / count).backward()
    gradients = {name: p.grad for name, p in model["student"].named_parameters()}
    return at, {"kd_loss": kd.item() / count, "lm_loss": lm.item() / count}, gradients


def samples() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, models.SIZES["vocab_size"], (4, 25), generator=g)
    mask = (torch.rand(4, 24, generator=g) > 0.2).float()
    starts = document_starts(LENGTHS)
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "document_starts": starts}


def one_step(folders, config, parallel, out_dir):
    """Figures of a step; its gradients are saved as if they were weights."""
    from minitron_mcore.distill import remote_teacher
    from minitron_mcore.distill.trainer import Trainer

    teacher = open_checkpoint(folders / "teacher")
    if (bridge := process_groups.bridge()) and bridge.is_teacher:
        return remote_teacher.serve(teacher, config, parallel, "fp32")
    student, dp = open_checkpoint(folders / "student"), process_groups.dp_group()
    # Masks pass through recomputation, which differs between layouts.
    recompute = Recompute.selective if parallel.context > 1 else Recompute.full
    trainer = Trainer(student, teacher, config, parallel, "fp32", performance=PerformanceConfig(recompute=recompute))
    rows = range(dp.rank(), 4, dp.size())
    batches = [{key: tensor[row : row + 1] for key, tensor in samples().items()} for row in rows]
    figures = trainer.train_step(list(models.placed(batches)))
    training.save_gradients(trainer, student, out_dir)
    return figures


@pytest.mark.default_cases("pp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_each_document_alone(tmp_path, family, layout):
    folders, losses, gradients = family
    world, parallel, own, ranks = LAYOUTS[layout]
    config = dataclasses.replace(CONFIG, teacher_parallel=own, teacher_ranks=ranks)
    options = {"teacher_ranks": ranks, "teacher_parallel": own}
    for figures in on_ranks(one_step, world, parallel, folders, config, parallel, tmp_path / "run", **options):
        assert figures is None or all(math.isclose(figures[key], losses[key], rel_tol=2e-5) for key in losses), figures
    found = export(tmp_path / "run", tmp_path / "hf")
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name
