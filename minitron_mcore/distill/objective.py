"""What the last pipeline stage does with the student's hidden states: the distillation loss of one micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mcore import runtime
from minitron_mcore.config import DistillConfig
from minitron_mcore.distill.cache import CachedTeacher
from minitron_mcore.distill.losses import distillation_loss
from minitron_mcore.distill.teacher import Teacher
from minitron_mcore.models.build import Model
from minitron_mcore.schedule import Batch

from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


@dataclass(frozen=True)
class Objective:
    """Called with the student's final hidden states of a micro-batch [S_r, B, H], S_r = S / CP or S / CP / TP under sequence
    parallelism, and this context-parallel rank's share of the batch."""

    student: Model
    teacher: Teacher | CachedTeacher | None
    vocab: int
    config: DistillConfig

    def __call__(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(summed loss, number of tokens int32, [kd, lm, teacher entropy, tokens] sums) over the share; the same on all
        tensor-parallel ranks.

        The hidden gradient that leaves here is complete: its sum over tensor-parallel ranks is part of the gather or copy.
        """
        group, sequence = runtime.tp_group(), self.student.config.sequence_parallel
        mask = batch["loss_mask"].t().reshape(-1)
        teacher_hidden, teacher_top = batch.get("teacher_hidden"), None
        if "teacher_ids" in batch:
            ids, log_probs = (batch[key].flatten(0, 1) for key in ("teacher_ids", "teacher_log_probs"))
            teacher_top = ids, log_probs[:, :-1], log_probs[:, -1]
        if sequence:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
            if teacher_hidden is not None:
                teacher_hidden = gather_from_sequence_parallel_region(teacher_hidden, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        loss, sums = distillation_loss(
            hidden.flatten(0, 1),
            self.student.head(),
            None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            None if self.teacher is None else self.teacher.head,
            batch["labels"].t().reshape(-1),
            mask,
            vocab_size=self.vocab,
            tp_group=group,
            kd_weight=self.config.kd_weight,
            lm_weight=self.config.lm_weight,
            temperature=self.config.temperature,
            divergence=self.config.divergence,
            jsd_beta=self.config.jsd_beta,
            top_k=self.config.top_k,
            teacher_top=teacher_top,
        )
        tokens = mask.sum()
        return loss, tokens.to(torch.int32), torch.cat([sums, tokens[None].to(sums)])
