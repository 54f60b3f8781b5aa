"""A distillation run of a few steps, for tests of training on one or several ranks."""

from pathlib import Path

import torch
import torch.distributed as dist

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import DistillConfig
from tests.helpers import models

CONFIG = DistillConfig(
    steps=4,
    global_batch=4,
    micro_batch=1,
    sequence_length=12,
    peak_lr=1e-2,
    min_lr=1e-3,
    warmup_steps=1,
    save_every=100,
)


def micro_batches(config: DistillConfig, start: int, dp_rank: int, dp_size: int):
    """Samples in one global order, shared out as Megatron's sampler does; some labels masked."""
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(
        0, models.SIZES["vocab_size"], (config.steps * config.global_batch, config.sequence_length + 1), generator=g
    )
    mask = (torch.rand(ids.shape, generator=g) > 0.2).float()[:, 1:]
    for first in range(start + dp_rank * config.micro_batch, len(ids), config.micro_batch * dp_size):
        rows = slice(first, first + config.micro_batch)
        yield {"tokens": ids[rows, :-1], "labels": ids[rows, 1:], "loss_mask": mask[rows]}


def gather_gradients(trainer) -> None:
    """Complete `main_grad` on every rank: the distributed optimizer reduces a share of it on each (collective)."""
    modules = [*trainer.chunks, *(trainer.hidden_loss.ddp_modules if trainer.hidden_loss else [])]
    for group in (group for ddp in modules for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups):
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def distill(student, teacher, config, parallel, out_dir, resume=False, dtype="fp32", heldout=None):
    """Train and save; the history, on every rank."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill import failures
    from minitron_mcore.distill.loop import train
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    opened, teacher = open_checkpoint(student), open_checkpoint(teacher) if teacher else None
    trainer = Trainer(opened, teacher, config, parallel, dtype)
    if resume:
        trainer.resume(out_dir)
    run_folder.describe(out_dir, opened.arch, "test", {}, opened.hf)
    dp = process_groups.dp_group()
    batches = micro_batches(config, trainer.step * config.global_batch, dp.rank(), dp.size())
    with failures.hangs_reported(lambda: trainer.step + 1, Path(out_dir)):
        return train({Path(out_dir): trainer}, models.placed(batches), Path(out_dir), heldout)[0]


def save_gradients(trainer, student, out_dir):
    """Write the gradients of a step as if they were weights, to be compared in full on one process (collective)."""
    from minitron_mcore.checkpoint import run_folder

    gather_gradients(trainer)
    for parameter in trainer.model.parameters():
        parameter.data.copy_(parameter.main_grad)
    trainer.save(out_dir)
    trainer.finish_save()
    run_folder.describe(out_dir, student.arch, "test", {}, student.hf)
