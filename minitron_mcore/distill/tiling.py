"""The loss's work on a chunk's logits between the matrix products: local sums, their exchange over ranks, the gradient.

The gradient overwrites the student's logits. See `losses` for the sums that cross ranks, `divergences` for the formulas.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.distill import divergences, tile_sizes
from minitron_mcore.distill.divergences import Chunk, FactoredLogits, TopKLogProbs, TopKOfLogProbs
from minitron_mcore.distill.loss_config import LossConfig


def kernels_for(like: Tensor) -> ModuleType | None:
    """The module of Triton kernels on CUDA and under Triton's interpreter, except for fp64; otherwise None."""
    enabled = like.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not (enabled and like.dtype != torch.float64 and find_spec("triton")):
        return None
    from minitron_mcore.distill import kernels

    return kernels


class Tiles:
    """Processes chunks: by `kernels` as a whole, or tile by tile in torch, with buffers that all tiles share."""

    def __init__(
        self,
        config: LossConfig,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        student: FactoredLogits,
        teacher: FactoredLogits | TopKLogProbs | None,
        with_gradient: bool,
    ):
        self.config, self.vocab_size, self.tp_group, self.with_gradient = config, vocab_size, tp_group, with_gradient
        self.rank = tp_group.rank() if tp_group else 0
        (num_tokens, num_rows), device = (len(student.hidden), len(student.head)), student.hidden.device
        self.start = self.rank * num_rows
        self.width = min(max(vocab_size - self.start, 0), num_rows)
        """Rows that are not padding."""
        row_bytes = sum(x.head.element_size() * num_rows for x in (student, teacher) if isinstance(x, FactoredLogits))
        budget = config.chunk_bytes or tile_sizes.CHUNK_BYTES[device.type]
        self.chunk_tokens = tile_sizes.chunk_tokens(num_tokens, row_bytes, budget)
        self.dtype = torch.promote_types(student.hidden.dtype, torch.float32)
        self.elements = tile_sizes.TILE_ELEMENTS[device.type]
        top_entries = isinstance(teacher, TopKLogProbs)
        self.divergence = (
            TopKOfLogProbs(self.start, self.width) if top_entries else divergences.make(config, vocab_size)
        )
        self.kernels = kernels_for(student.hidden)
        self.size = num_tokens if self.kernels else tile_sizes.tile_tokens(num_tokens, num_rows, device.type)
        count = 0 if self.kernels else tile_sizes.TILE_BUFFERS
        self.buffers = torch.empty(count, self.size, self.width, dtype=self.dtype, device=device)

    def run(self, logits_s: Tensor, logits_t: Tensor | TopKLogProbs | None, labels: Tensor, mask: Tensor) -> Tensor:
        """Overwrite `logits_s` [T, width] with the gradient of a chunk's loss (collective over the tensor-parallel ranks).

        Returns:
            [3, T] fp64: divergence, cross-entropy and teacher's entropy of each token, the same on all ranks.
        """
        config, divergence, num_tokens = self.config, self.divergence, len(labels)
        tiles = list(tile_sizes.slices(num_tokens, self.size)) if self.width else []
        label_ids = labels - self.start
        is_local = (label_ids >= 0) & (label_ids < self.width)
        label_ids = label_ids.clamp(0, max(self.width - 1, 0))[:, None]
        kd, lm = config.kd_weight * config.temperature * mask, config.lm_weight * mask
        # Log-sum-exps of student, teacher and student at temperature 1; entropy; the label's logit; the divergence's sums.
        local = self.buffers.new_zeros(5 + len(divergence.empty_sums), num_tokens, dtype=torch.float64)
        chunk = Chunk(
            (logits_s, logits_t, logits_s),
            config.temperature,
            torch.stack((kd, kd, lm)),
            self.buffers.new_zeros(3, num_tokens),
            self.buffers.new_ones(3, num_tokens),
        )
        if logits_t is not None:
            divergence.start(logits_t, self._gather, self.rank)
        for tokens in tiles:
            self._compute_sums(chunk, tokens, local[:, tokens])
        if self.width:
            local[4] = torch.where(is_local, logits_s.gather(1, label_ids).squeeze(1), 0)
        else:
            local[:3] = divergences.NEG_INF
            local[5:] = local.new_tensor(divergence.empty_sums)[:, None]
        if isinstance(logits_t, TopKLogProbs):
            local[1], local[3] = divergences.NEG_INF if self.rank else 0.0, logits_t.entropy()
        all_sums = self._gather(local)
        chunk.set_global_lse(all_sums[:, :3], self.rank)
        lm_loss = chunk.lse[2] - all_sums[:, 4].sum(0)
        values = torch.zeros_like(lm_loss), lm_loss, torch.zeros_like(lm_loss)
        if logits_t is not None:
            entropy = (chunk.share[:, 1] * (all_sums[:, 3] - chunk.log_share[:, 1])).sum(0)
            values = divergence.value(chunk, all_sums[:, 5:], self._second_sums(chunk, tiles)), lm_loss, entropy
        for tokens in tiles if self.with_gradient else ():
            self._write_gradient(chunk, tokens, label_ids[tokens], (lm * is_local)[tokens])
        return torch.stack(values)

    def _gather(self, local: Tensor) -> Tensor:
        """[TP, ...] of all ranks."""
        if not self.tp_group:
            return local[None]
        gathered = local.new_empty(self.tp_group.size(), *local.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), local.contiguous(), group=self.tp_group)
        return gathered

    def _second_sums(self, chunk: Chunk, tiles: list[slice]) -> Tensor | None:
        """[n, T]: the sums over all ranks of a second pass, where the divergence needs one."""
        divergence = self.divergence
        if not divergence.num_second_sums:
            return None
        sums = chunk.sums.new_zeros(divergence.num_second_sums, chunk.sums.shape[1])
        if self.kernels and tiles:
            sums = self.kernels.second_sums(chunk, divergence)
        for tokens in () if self.kernels else tiles:
            buffers = self.buffers[:, : tokens.stop - tokens.start]
            sums[:, tokens] = divergence.second_sums(chunk, tokens, *buffers)
        if self.tp_group:
            dist.all_reduce(sums, group=self.tp_group)
        return sums.double()

    def _compute_sums(self, chunk: Chunk, tokens: slice, local: Tensor) -> None:
        """A tile's first pass: fill `local` [n, T] except for the label's logit, and `chunk.maxima` and `chunk.sums`."""
        if self.kernels:
            return self.kernels.compute_sums(chunk, local, self.divergence)
        x_s, e_s, x_t, e_t = self.buffers[:, : tokens.stop - tokens.start]

        def exponentials(n: int, x: Tensor, e: Tensor) -> None:
            divergences.scaled(chunk.logits[n][tokens], 1.0 if n == 2 else chunk.temperature, x)
            chunk.maxima[n, tokens] = x.amax(-1)
            # Not torch.softmax: its sequential sum on a CPU has an error of 1e-5 at 128 k entries.
            chunk.sums[n, tokens] = torch.exp(x.sub_(chunk.maxima[n, tokens, None]), out=e).sum(-1)
            local[n] = chunk.maxima[n, tokens].double() + chunk.sums[n, tokens].double().log()

        exponentials(0, x_s, e_s)
        if isinstance(chunk.logits[1], TopKLogProbs):
            local[5:] = self.divergence.local_sums(chunk, tokens, x_s, e_s, x_t, e_t)
        elif chunk.logits[1] is not None:
            exponentials(1, x_t, e_t)
            local[5:] = self.divergence.local_sums(chunk, tokens, x_s, e_s, x_t, e_t)
            local[3] = chunk.sums[1, tokens].log() - x_t.mul_(e_t).sum(-1) / chunk.sums[1, tokens]
        if chunk.temperature == 1:
            chunk.maxima[2, tokens], chunk.sums[2, tokens] = chunk.maxima[0, tokens], chunk.sums[0, tokens]
            local[2] = local[0]
        else:
            exponentials(2, x_s, e_s)

    def _write_gradient(self, chunk: Chunk, tokens: slice, label_ids: Tensor, label_weights: Tensor) -> None:
        """A tile's last pass: write d loss / d logits_s over the student's logits.

        `label_weights` [T]: subtracted at the label; 0 where another rank holds it.
        """
        if self.kernels:
            return self.kernels.write_gradient(chunk, label_ids.squeeze(1), label_weights, self.divergence)
        total, term, *_ = self.buffers[:, : tokens.stop - tokens.start]
        lm_weight = self.config.lm_weight
        if chunk.logits[1] is None:
            chunk.exponentials(2, tokens, total).mul_(chunk.scale[2, tokens, None])
        else:
            self.divergence.gradient(chunk, tokens, total, term)
            if lm_weight and not self.divergence.adds_lm:
                total.addcmul_(chunk.exponentials(2, tokens, term), chunk.scale[2, tokens, None])
        if lm_weight:
            total.scatter_add_(1, label_ids, -label_weights[:, None])
        chunk.logits[0][tokens].copy_(total)
