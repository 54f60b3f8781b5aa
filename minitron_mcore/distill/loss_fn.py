"""The distillation loss of one micro-batch from the student's hidden states, on the last pipeline stage."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mcore.config.settings import DistillConfig
from minitron_mcore.distill.cache import CachedTeacher
from minitron_mcore.distill.losses import (
    FactoredLogits,
    LossConfig,
    TeacherLogits,
    TopKLogProbs,
    WeightedTeachers,
    distillation_loss,
)
from minitron_mcore.distill.teacher import Teacher
from minitron_mcore.distill.teachers import SeveralTeachers
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch

from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

LM_LOSS = LossConfig(kd_weight=0.0, lm_weight=1.0)
"""Cross-entropy alone."""


@dataclass(frozen=True)
class LossFunction:
    """Called by megatron-core's schedule with the student's final hidden states of each micro-batch."""

    student: Model
    teacher: Teacher | SeveralTeachers | CachedTeacher | None
    vocab: int
    config: DistillConfig
    chunk_mb: int | None = None
    """MiB of both models' logits that exist at a time; None: `tile_sizes.CHUNK_BYTES`."""

    def __call__(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a micro-batch's share on this context-parallel rank (collective over the tensor-parallel ranks).

        Args:
            hidden: the student's final hidden states [S_r, B, H], S_r = S / CP or S / CP / TP under sequence parallelism. Their
                gradient needs no further reduction: the backward of the gather or copy sums over the tensor-parallel ranks.

        Returns:
            (summed loss, number of tokens int32, sums [4] of divergence, cross-entropy, teacher's entropy and tokens), the same on
            all tensor-parallel ranks.
        """
        group = process_groups.tp_group()
        if self.student.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        mask = batch["loss_mask"].t().reshape(-1)
        student, labels = FactoredLogits(hidden.flatten(0, 1), self.student.head()), batch["labels"].t().reshape(-1)
        sizes = {"vocab_size": self.vocab, "tp_group": group}
        loss, sums = distillation_loss(
            student, self.teacher_logits(batch), labels, mask, **sizes, config=self._loss_config()
        )
        tokens = mask.sum()
        return loss, tokens.to(torch.int32), torch.cat([sums, tokens[None].to(sums)])

    def _loss_config(self) -> LossConfig:
        return LossConfig(
            kd_weight=self.config.kd_weight,
            lm_weight=self.config.lm_weight,
            temperature=self.config.temperature,
            divergence=self.config.divergence,
            jsd_beta=self.config.jsd_beta,
            top_k=self.config.top_k,
            chunk_bytes=self.chunk_mb and self.chunk_mb << 20,
            gradient_accumulation_fusion=self.student.config.gradient_accumulation_fusion,
        )

    def teacher_logits(self, batch: Batch) -> TeacherLogits | None:
        """The teacher's outputs in a batch of `add_teacher_outputs`, of the tokens [T] that the tensor-parallel ranks share."""
        if "teacher_ids" in batch:
            ids, log_probs = (batch[key].flatten(0, 1) for key in ("teacher_ids", "teacher_log_probs"))
            return TopKLogProbs(ids, log_probs[:, :-1], log_probs[:, -1])
        if self.teacher is None:
            return None
        if isinstance(self.teacher, SeveralTeachers):
            each = [self._logits(batch[key], head) for key, head in self.teacher.heads().items()]
            return WeightedTeachers(each, self.teacher.weights)
        return self._logits(batch["teacher_hidden"], self.teacher.head)

    def _logits(self, hidden: Tensor, head: Tensor) -> FactoredLogits:
        if self.student.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
        return FactoredLogits(hidden.flatten(0, 1), head)

    def teacher_losses(self, batch: Batch) -> Tensor:
        """Each teacher's own cross-entropy, summed over the share of a batch with teacher outputs, then the number of tokens."""
        mask, labels = (batch[key].t().reshape(-1) for key in ("loss_mask", "labels"))
        logits, sizes = self.teacher_logits(batch), {"vocab_size": self.vocab, "tp_group": process_groups.tp_group()}
        teachers = logits.logits if isinstance(logits, WeightedTeachers) else [logits]
        sums = [distillation_loss(each, None, labels, mask, **sizes, config=LM_LOSS)[1][1] for each in teachers]
        return torch.stack([*sums, mask.sum().to(sums[0])])
