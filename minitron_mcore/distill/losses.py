"""A divergence between teacher and student over a tensor-parallel vocabulary, from hidden states, never holding the logits.

Tokens are worked off in chunks: two matrix products give a chunk's logits, the loss's gradient then takes the place of
the student's, and two more products carry it to the hidden states and to the head. Nothing is left for the backward
pass but to scale. Between the products a chunk is cut into tiles that stay in the cache. It is gone through twice, with one
small collective in between: for what the ranks' sums are made of, then for the gradient, whose exponentials cost less to
form again than to keep.

What crosses ranks follows from the chain rule of KL: with w_r the probability of rank r's part of the vocabulary and
t_r, s_r the distributions within it,

    KL(t || s) = sum_r w^t_r (KL(t_r || s_r) + log w^t_r - log w^s_r),    H(t) = sum_r w^t_r (H(t_r) - log w^t_r),

so a rank gives the log-sum-exps that w is made of (teacher's, student's, student's at temperature 1), its own KL and
entropy, and the label's logit: six fp64 numbers a token. The other divergences (see `divergences`) differ in what a rank sums
and in what it writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.config import Divergence
from minitron_mcore.distill import checks, chunks, divergences
from minitron_mcore.errors import UserError, refuse


@dataclass(frozen=True)
class _Settings:
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
    given: divergences.Given | None


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = Divergence.forward_kl,
    jsd_beta: float = 0.5,
    top_k: int | None = None,
    chunk_tokens: int | None = None,
    teacher_top: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of mask * (kd_weight * temperature^2 * divergence + lm_weight * cross-entropy).

    The divergence is taken between softmax(logits / temperature) of both (Hinton et al. 2015; the factor keeps the
    gradient's size as the temperature grows), mse and cosine between the logits; cross-entropy at temperature 1; nats.
    Logits are products in the inputs' dtype, all that follows is fp32 (fp64 for fp64). The gradients are formed here;
    backward only scales them, and only once (no `retain_graph`).

    What each tensor-parallel rank r holds (T tokens, V_r = padded vocabulary / TP):

        student_hidden [T, H_s]  the same on all ranks. Its gradient is THIS RANK'S PARTIAL SUM over the vocabulary:
                                 take the hidden states from megatron's copy_to_tensor_model_parallel_region or
                                 gather_from_sequence_parallel_region, whose backward adds the ranks' parts
        student_head [V_r, H_s]  rows r * V_r .. (r + 1) * V_r; from `vocab_size` on padding: no softmax, gradient 0
        teacher_hidden [T, H_t], teacher_head [V_r, H_t]  likewise, no gradient; both None with kd_weight 0: LM loss
        teacher_top              instead of the two, the same on all ranks: ids [T, k] int64 below `vocab_size`, all different in
                                 a token, their log-probabilities [T, k], the log of the mass that is left [T]
        labels [T] int64, mask [T] float  the same on all ranks. Tokens of mask 0 may hold anything anywhere (NaN, -100)

    Args:
        vocab_size: global, without padding.
        tp_group: the ranks that share the vocabulary; None: the heads are whole.
        divergence: by name; the table in `divergences` has their formulas.
        jsd_beta: the teacher's part of jsd's mixture, above 0 and below 1.
        top_k: the forward KL of the teacher's k largest logits (of the whole vocabulary, over all ranks) and of the tail's mass.
        teacher_top: makes it the forward KL of the k entries and the tail at temperature 1; so is the teacher's entropy.
        chunk_tokens: tokens whose logits exist at a time; None: as many as fit both into 64 MiB (512 MiB on CUDA).

    Returns:
        (loss [], stats [3]): the loss; the masked sums of the divergence (without its factors), cross-entropy and the teacher's
        entropy, detached, the first and last 0 without a teacher. fp32, the same on all ranks.

    Raises:
        UserError: half a teacher, two, one of another padded vocabulary, a `vocab_size` beyond the heads; see `checks.divergence`.
    """
    tp = tp_group.size() if tp_group else 1
    _check(student_head, teacher_hidden, teacher_head, vocab_size, tp, kd_weight * (teacher_top is None))
    refuse(checks.divergence(divergence, jsd_beta, top_k, temperature, vocab_size))
    if teacher_top is not None:
        refuse(checks.given(teacher_top[0].shape[1], divergence, top_k, temperature, teacher_head is not None))
    given = None if teacher_top is None else divergences.Given(*teacher_top)
    with_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    temperature = temperature if teacher_head is not None else 1.0
    group = tp_group if tp > 1 else None
    kind = divergence, jsd_beta, top_k
    settings = _Settings(
        vocab_size, group, kd_weight, lm_weight, temperature, *kind, chunk_tokens, with_gradient, given
    )
    return _DistillationLoss.apply(student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, settings)


def _check(student_head, teacher_hidden, teacher_head, vocab_size, tp, kd_weight) -> None:
    if (teacher_hidden is None) != (teacher_head is None) or (teacher_hidden is None and kd_weight != 0):
        raise UserError(
            f"kd_weight is {kd_weight} without a whole teacher: give its hidden states and its head, or kd_weight 0."
        )
    rows = tp * len(student_head)
    if teacher_head is not None and len(teacher_head) != len(student_head):
        raise UserError(
            f"The teacher's padded vocabulary has {tp * len(teacher_head)} rows, the student's {rows}: "
            "pad both to the same size."
        )
    if not 0 < vocab_size <= rows:
        raise UserError(f"vocab_size is {vocab_size}; it must be at least 1 and at most the head's {rows} rows.")


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, settings: _Settings):
        num_tokens, need = len(student_hidden), [settings.with_gradient and x for x in ctx.needs_input_grad[:2]]
        tiles = _Tiles(settings, student_hidden, len(student_head))
        chunk = settings.chunk_tokens or _chunk_tokens(num_tokens, student_head, teacher_head)
        mask, ignored = mask.to(tiles.dtype), (mask == 0)[:, None]
        per_token = mask.new_zeros(3, num_tokens)
        d_hidden = torch.zeros_like(student_hidden) if need[0] else None
        # A product sums in fp32 over its chunk; this tensor does over several chunks.
        d_head = torch.zeros_like(student_head, dtype=tiles.dtype if chunk < num_tokens else None) if need[1] else None
        head = student_head[: tiles.width]
        for at in _slices(num_tokens, chunk):
            # Ignored rows become zeros: all that follows is finite there, and their weight of 0 then silences them.
            hidden = student_hidden[at].masked_fill(ignored[at], 0)
            logits_s, logits_t = hidden @ head.t(), settings.given and settings.given.part(at, ignored)
            if teacher_head is not None:
                logits_t = teacher_hidden[at].masked_fill(ignored[at], 0) @ teacher_head[: tiles.width].t()
            per_token[:, at] = tiles.run(logits_s, logits_t, labels[at], mask[at])
            if need[0]:
                torch.mm(logits_s, head, out=d_hidden[at])
            if need[1]:
                _add_head_gradient(d_head[: tiles.width], logits_s, hidden, tiles.elements)
            del logits_s, logits_t  # before the next chunk's, and before the head's gradient is cast
        ctx.gradients = d_hidden, None if d_head is None else d_head.to(student_head.dtype)
        stats = (per_token * mask).sum(1)
        ctx.mark_non_differentiable(stats)
        return settings.temperature**2 * settings.kd_weight * stats[0] + settings.lm_weight * stats[1], stats

    @staticmethod
    def backward(ctx, d_loss, _):
        # Scaled in place and given away, so that no second copy of the head's gradient ever exists.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("distillation_loss gives its gradients away: call backward through it only once.")
        return *(None if x is None else x.mul_(d_loss) for x in gradients), None, None, None, None, None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def _chunk_tokens(num_tokens: int, student_head: Tensor, teacher_head: Tensor | None) -> int:
    heads = [head for head in (student_head, teacher_head) if head is not None]
    bytes_a_token = sum(len(head) * head.element_size() for head in heads)
    return chunks.chunk_tokens(num_tokens, bytes_a_token, student_head.device.type)


def _add_head_gradient(total: Tensor, d_logits: Tensor, hidden: Tensor, elements: int) -> None:
    """total [V_r, H] += d_logits^T [V_r, T] @ hidden [T, H], in blocks of rows that are added while in the cache."""
    for rows in _slices(len(total), max(1, 2 * elements // hidden.shape[1])):
        total[rows] += d_logits[:, rows].t() @ hidden


class _Tiles:
    """The work between the products, on a few tokens at a time, in buffers that are used again and again."""

    def __init__(self, settings: _Settings, like: Tensor, num_rows: int):
        s = self.settings = settings
        self.rank = s.tp_group.rank() if s.tp_group else 0
        self.start = self.rank * num_rows
        self.width = min(max(s.vocab_size - self.start, 0), num_rows)
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.elements = chunks.TILE_ELEMENTS[like.device.type]
        self.size = chunks.tile_tokens(len(like), num_rows, like.device.type)
        self.buffers = torch.empty(chunks.TILE_BUFFERS, self.size, self.width, dtype=self.dtype, device=like.device)
        self.divergence = divergences.make(s.divergence, s.vocab_size, s.jsd_beta, s.top_k, s.temperature)
        if s.given:
            self.divergence = divergences.GivenTopK(self.start, self.width)

    def run(
        self, logits_s: Tensor, logits_t: "Tensor | divergences.Given | None", labels: Tensor, mask: Tensor
    ) -> Tensor:
        """[divergence, cross-entropy, teacher's entropy] of each token; its gradient overwrites `logits_s` [T, width]."""
        s, divergence, num_tokens = self.settings, self.divergence, len(labels)
        tiles = list(_slices(num_tokens, self.size)) if self.width else []
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
            own[:3] = divergences.NOTHING
            own[5:] = own.new_tensor(divergence.of_nothing)[:, None]
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
        dist.all_gather(list(parts), own, group=self.settings.tp_group)
        return parts

    def _again(self, chunk: divergences.Chunk, tiles: list[slice]) -> Tensor | None:
        """[n, T]: the sums over all ranks of a second pass, where the divergence needs one."""
        if not self.divergence.num_again:
            return None
        sums = chunk.sums.new_zeros(self.divergence.num_again, chunk.sums.shape[1])
        for at in tiles:
            sums[:, at] = self.divergence.read_again(chunk, at, *self.buffers[:, : at.stop - at.start])
        if self.settings.tp_group:
            dist.all_reduce(sums, group=self.settings.tp_group)
        return sums.double()

    def _read(self, chunk: divergences.Chunk, at: slice, own: Tensor) -> None:
        """A tile's first pass: fills `own` [n, T] but for the label's logit, and the softmaxes' maxima and sums of exponentials."""
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
            own[1], own[3] = divergences.NOTHING if self.rank else 0.0, chunk.logits[1].entropy(at)
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
