"""Hidden-state losses on the ranks of a layout, and their formula in fp64 on transformers' modules."""

import dataclasses

import torch
import torch.nn.functional as F

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import HiddenStateLossConfig, HiddenStateMetric
from tests.helpers import models, training

# From a stage to an earlier one, to a later one, to itself; two of one block of the student; two of one block of the teacher.
PAIRS = [[0, 6], [4, 1], [2, 4], [4, 4]]


CONFIG = dataclasses.replace(training.CONFIG, clip_grad=1e9)


CASES = {
    # student, weights of KD and LM loss, states
    "cosine": ("width", 1.0, 0.5, HiddenStateLossConfig(0.7, HiddenStateMetric.cosine, PAIRS)),
    "mse": ("width", 0.0, 0.0, HiddenStateLossConfig(0.3, HiddenStateMetric.mse, PAIRS[:2], embeddings=False)),
    "depth": ("depth", 0.0, 0.0, HiddenStateLossConfig(2.0)),
}


def settings(case):
    student, kd, lm, states = CASES[case]
    return student, dataclasses.replace(CONFIG, kd_weight=kd, lm_weight=lm, hidden_state_loss=states)


def micro_batches(config, start, dp_rank, dp_size):
    """Of every four samples the second is masked throughout."""
    for n, batch in enumerate(training.micro_batches(config, start, dp_rank, dp_size)):
        if (start + n * dp_size + dp_rank) % 4 == 1:
            batch["loss_mask"][:] = 0
        yield batch


def run_model(folder, tokens):
    """A model in fp64, its logits, and what its embedding and every block put out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = {}
    parts = {-1: model.model.embed_tokens} | dict(enumerate(model.model.layers))
    for block, module in parts.items():
        module.register_forward_hook(lambda module, args, out, block=block: found.update({block: out}))
    return model, model(tokens).logits, found


def oracle(folders, case, projection):
    """{kd, lm, states}, gradients by transformers' names, the projection's gradient: of the first step's four samples."""
    name, config = settings(case)
    batch = [next(micro_batches(config, n, 0, 1)) for n in range(4)]
    tokens, labels, mask = (torch.cat([x[key] for x in batch]) for key in ("tokens", "labels", "loss_mask"))
    model, logits, own = run_model(folders / f"{name}_hf", tokens)
    _, needs_teacher, theirs = run_model(folders / "teacher_hf", tokens)
    s, t = logits.log_softmax(-1), needs_teacher.detach().log_softmax(-1)
    lifted = torch.eye(36).double() if projection is None else projection.double().requires_grad_()
    differences = []
    pairs = [[2, 4]] if config.hidden_state_loss.pairs is None else config.hidden_state_loss.pairs
    for a, b in [*pairs, *([[-1, -1]] if config.hidden_state_loss.embeddings else [])]:
        x, y = own[a] @ lifted.t(), theirs[b].detach()
        if config.hidden_state_loss.loss == HiddenStateMetric.cosine:
            differences.append(1 - (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1))
        else:
            differences.append(((x - y) ** 2).mean(-1))
    losses = {
        "kd_loss": (t.exp() * (t - s)).sum(-1),
        "lm_loss": -s.gather(-1, labels[..., None])[..., 0],
        "hidden_state_loss": sum(differences),
    }
    losses = {key: (each * mask).sum() / mask.sum() for key, each in losses.items()}
    weights = (config.kd_weight, config.lm_weight, config.hidden_state_loss.weight)
    sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True)).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: loss.item() for key, loss in losses.items()}, gradients, lifted.grad


def first_step(folders, parallel, out_dir):
    """Of each case, on every rank: the first step's figures, the projection before it and its gradient; the student's gradients
    are saved as if they were weights."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    found, dp = {}, process_groups.dp_group()
    for case in CASES:
        name, config = settings(case)
        student, teacher = (open_checkpoint(folders / x) for x in (name, "teacher"))
        trainer = Trainer(student, teacher, config, parallel, "fp32")
        projection = trainer.hidden_loss.projection
        before = None if projection is None else projection.detach().clone()
        batches = list(models.placed(micro_batches(config, 0, dp.rank(), dp.size())))[: 4 // dp.size()]
        (probed,) = trainer.teacher_losses(batches[0])
        figures = trainer.train_step(batches) | {"probed": probed}
        training.gather_gradients(trainer)
        found[case] = figures, before, None if projection is None else projection.main_grad.clone()
        for parameter in trainer.model.parameters():
            parameter.data.copy_(parameter.main_grad)
        trainer.save(out_dir / case)
        trainer.finish_save()
        run_folder.describe(out_dir / case, student.arch, "test", {}, student.hf)
    return found
