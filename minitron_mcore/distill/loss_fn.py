"""What the last pipeline stage does with the student's hidden states: the distillation loss of one micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mcore.config.settings import DistillConfig
from minitron_mcore.distill import tile_sizes
from minitron_mcore.distill.cache import CachedTeacher
from minitron_mcore.distill.losses import distillation_loss
from minitron_mcore.distill.teacher import Teacher
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch

from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


@dataclass(frozen=True)
class LossFunction:
    """Called with the student's final hidden states of a micro-batch [S_r, B, H], S_r = S / CP or S / CP / TP under sequence
    parallelism, and this context-parallel rank's share of the batch."""

    student: Model
    teacher: Teacher | CachedTeacher | None
    vocab: int
    config: DistillConfig
    chunk_mb: int | None = None
    """MiB of both models' logits that exist at a time; None: see `distillation_loss`."""

    def __call__(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(summed loss, number of tokens int32, [kd, lm, teacher entropy, tokens] sums) over the share; the same on all
        tensor-parallel ranks.

        The hidden gradient that leaves here is complete: its sum over tensor-parallel ranks is part of the gather or copy.
        """
        group, teacher_hidden, teacher_top = process_groups.tp_group(), batch.get("teacher_hidden"), None
        if "teacher_ids" in batch:
            ids, log_probs = (batch[key].flatten(0, 1) for key in ("teacher_ids", "teacher_log_probs"))
            teacher_top = ids, log_probs[:, :-1], log_probs[:, -1]
        if self.student.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        mask = batch["loss_mask"].t().reshape(-1)
        loss, sums = distillation_loss(
            hidden.flatten(0, 1),
            self.student.head(),
            None if teacher_hidden is None else self._whole(teacher_hidden),
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
            chunk_tokens=self._chunk_tokens(len(mask)),
            gradient_accumulation_fusion=self.student.config.gradient_accumulation_fusion,
            teacher_top=teacher_top,
        )
        tokens = mask.sum()
        return loss, tokens.to(torch.int32), torch.cat([sums, tokens[None].to(sums)])

    def _chunk_tokens(self, num_tokens: int) -> int | None:
        if self.chunk_mb is None:
            return None
        heads = (self.student.head(), getattr(self.teacher, "head", None))
        bytes_a_token = sum(head.element_size() * len(head) for head in heads if head is not None)
        return tile_sizes.even(num_tokens, self.chunk_mb << 20, bytes_a_token)

    def _whole(self, hidden: Tensor) -> Tensor:
        """[S_r, B, H] without a gradient -> [T, H]: of all tensor-parallel ranks where these share the sequence."""
        if self.student.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
        return hidden.flatten(0, 1)

    def teacher_loss(self, batch: Batch) -> Tensor:
        """[sum over the share of the teacher's own cross-entropy, number of tokens], of a batch that it has been fed."""
        mask = batch["loss_mask"].t().reshape(-1)
        hidden, labels = self._whole(batch["teacher_hidden"]), batch["labels"].t().reshape(-1)
        inputs = hidden, self.teacher.head, None, None, labels, mask
        group = process_groups.tp_group()
        _, sums = distillation_loss(*inputs, vocab_size=self.vocab, tp_group=group, kd_weight=0.0, lm_weight=1.0)
        return torch.stack([sums[1], mask.sum().to(sums)])
