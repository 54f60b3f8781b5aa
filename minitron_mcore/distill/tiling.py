"""What the loss does with a chunk's logits between the matrix products: reads them, exchanges sums with the other ranks, writes
the gradient over the student's (see `losses` for what crosses and why, `divergences` for the formulas)."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.config.settings import Divergence
from minitron_mcore.distill import divergences, tile_sizes


@dataclass(frozen=True)
class Settings:
    vocab_size: int
    tp_group: dist.ProcessGroup | None
    kd_weight: float
    lm_weight: float
    temperature: float
    divergence: Divergence
    jsd_beta: float
    top_k: int | None
    chunk_tokens: int | None
    with_gradient: bool
    into_main_grad: bool = False
    given: divergences.Given | None = None


def kernels_for(like: Tensor, divergence: divergences.ForwardKL) -> ModuleType | None:
    """The Triton kernels where they do the work between the products: on CUDA or under Triton's interpreter, but for fp64."""
    here = like.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not (here and like.dtype != torch.float64 and find_spec("triton")):
        return None
    from minitron_mcore.distill import kernels

    return kernels if type(divergence) in kernels.KINDS else None


class Tiles:
    """The work between the products: at once by `kernels`, or on a few tokens at a time in buffers that are used again."""

    def __init__(self, settings: Settings, like: Tensor, num_rows: int):
        s = self.settings = settings
        self.rank = s.tp_group.rank() if s.tp_group else 0
        self.start = self.rank * num_rows
        self.width = min(max(s.vocab_size - self.start, 0), num_rows)
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.elements = tile_sizes.TILE_ELEMENTS[like.device.type]
        self.divergence = divergences.make(s.divergence, s.vocab_size, s.jsd_beta, s.top_k, s.temperature)
        if s.given:
            self.divergence = divergences.GivenTopK(self.start, self.width)
        self.kernels = kernels_for(like, self.divergence)
        self.size = len(like) if self.kernels else tile_sizes.tile_tokens(len(like), num_rows, like.device.type)
        tiles = 0 if self.kernels else tile_sizes.TILE_BUFFERS
        self.buffers = torch.empty(tiles, self.size, self.width, dtype=self.dtype, device=like.device)

    def run(
        self, logits_s: Tensor, logits_t: "Tensor | divergences.Given | None", labels: Tensor, mask: Tensor
    ) -> Tensor:
        """[divergence, cross-entropy, teacher's entropy] of each token; its gradient overwrites `logits_s` [T, width]."""
        s, divergence, num_tokens = self.settings, self.divergence, len(labels)
        tiles = list(tile_sizes.slices(num_tokens, self.size)) if self.width else []
        place = labels - self.start
        inside = (place >= 0) & (place < self.width)
        place = place.clamp(0, max(self.width - 1, 0))[:, None]
        kd, lm = s.kd_weight * s.temperature * mask, s.lm_weight * mask
        # log-sum-exp of student, teacher, student at temperature 1; entropy; label's logit; the divergence's sums
        own = self.buffers.new_zeros(5 + len(divergence.of_nothing), num_tokens, dtype=torch.float64)
        chunk = divergences.Chunk(
            (logits_s, logits_t, logits_s),
            s.temperature,
            torch.stack((kd, kd, lm)),
            self.buffers.new_zeros(3, num_tokens),
            self.buffers.new_ones(3, num_tokens),
        )
        if logits_t is not None:
            divergence.start(logits_t, self._gather, self.rank)
        for at in tiles:
            self._read(chunk, at, own[:, at])
        if self.width:
            own[4] = torch.where(inside, logits_s.gather(1, place).squeeze(1), 0)
        else:
            own[:3] = divergences.NEG_INF
            own[5:] = own.new_tensor(divergence.of_nothing)[:, None]
        if isinstance(logits_t, divergences.Given):
            own[1], own[3] = divergences.NEG_INF if self.rank else 0.0, logits_t.entropy()
        parts = self._gather(own)
        chunk.exchanged(parts[:, :3], self.rank)
        lm_loss = chunk.lse[2] - parts[:, 4].sum(0)
        values = torch.zeros_like(lm_loss), lm_loss, torch.zeros_like(lm_loss)
        if logits_t is not None:
            entropy = (chunk.share[:, 1] * (parts[:, 3] - chunk.log_share[:, 1])).sum(0)
            values = divergence.value(chunk, parts[:, 5:], self._again(chunk, tiles)), lm_loss, entropy
        for at in tiles if s.with_gradient else ():
            self._write(chunk, at, place[at], (lm * inside)[at])
        return torch.stack(values)

    def _gather(self, own: Tensor) -> Tensor:
        """[TP, ...] of all ranks."""
        if not self.settings.tp_group:
            return own[None]
        parts = own.new_empty(self.settings.tp_group.size(), *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own.contiguous(), group=self.settings.tp_group)
        return parts

    def _again(self, chunk: divergences.Chunk, tiles: list[slice]) -> Tensor | None:
        """[n, T]: the sums over all ranks of a second pass, where the divergence needs one."""
        if not self.divergence.num_again:
            return None
        sums = chunk.sums.new_zeros(self.divergence.num_again, chunk.sums.shape[1])
        if self.kernels and tiles:
            sums = self.kernels.read_again(chunk, self.divergence)
        for at in () if self.kernels else tiles:
            sums[:, at] = self.divergence.read_again(chunk, at, *self.buffers[:, : at.stop - at.start])
        if self.settings.tp_group:
            dist.all_reduce(sums, group=self.settings.tp_group)
        return sums.double()

    def _read(self, chunk: divergences.Chunk, at: slice, own: Tensor) -> None:
        """A tile's first pass: fills `own` [n, T] but for the label's logit, and the softmaxes' maxima and sums of exponentials."""
        if self.kernels:
            return self.kernels.read(chunk, own, self.divergence)
        x_s, e_s, x_t, e_t = self.buffers[:, : at.stop - at.start]

        def exponentials(n: int, x: Tensor, e: Tensor) -> None:
            divergences.scaled(chunk.logits[n][at], 1.0 if n == 2 else chunk.temperature, x)
            chunk.largest[n, at] = x.amax(-1)
            # Not torch.softmax: on a CPU it sums one by one, which is 1e-5 off at 128 k entries.
            chunk.sums[n, at] = torch.exp(x.sub_(chunk.largest[n, at, None]), out=e).sum(-1)
            own[n] = chunk.largest[n, at].double() + chunk.sums[n, at].double().log()

        exponentials(0, x_s, e_s)
        if isinstance(chunk.logits[1], divergences.Given):
            own[5:] = self.divergence.read(chunk, at, x_s, e_s, x_t, e_t)
        elif chunk.logits[1] is not None:
            exponentials(1, x_t, e_t)
            own[5:] = self.divergence.read(chunk, at, x_s, e_s, x_t, e_t)
            own[3] = chunk.sums[1, at].log() - x_t.mul_(e_t).sum(-1) / chunk.sums[1, at]
        if chunk.temperature == 1:
            chunk.largest[2, at], chunk.sums[2, at], own[2] = chunk.largest[0, at], chunk.sums[0, at], own[0]
        else:
            exponentials(2, x_s, e_s)

    def _write(self, chunk: divergences.Chunk, at: slice, place: Tensor, hit: Tensor) -> None:
        """A tile's second pass: d loss / d logits_s over the student's logits."""
        if self.kernels:
            return self.kernels.write(chunk, place.squeeze(1), hit, self.divergence)
        total, term, *_ = self.buffers[:, : at.stop - at.start]
        lm_weight = self.settings.lm_weight
        if chunk.logits[1] is None:
            chunk.exponentials(2, at, total).mul_(chunk.scale[2, at, None])
        else:
            self.divergence.write(chunk, at, total, term)
            if lm_weight and not self.divergence.joint:
                total.addcmul_(chunk.exponentials(2, at, term), chunk.scale[2, at, None])
        if lm_weight:
            total.scatter_add_(1, place, -hit[:, None])
        chunk.logits[0][at].copy_(total)
