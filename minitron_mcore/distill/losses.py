"""Forward KL from teacher to student over a tensor-parallel vocabulary, from hidden states, never holding the logits.

Tokens are worked off in chunks: two matrix products give a chunk's logits, the loss's gradient then takes the place of
the student's, and two more products carry it to the hidden states and to the head. Nothing is left for the backward
pass but to scale. Between the products a chunk is cut into tiles that stay in the cache. It is gone through twice, with one
small collective in between: for what the ranks' sums are made of, then for the gradient, whose exponentials cost less to
form again than to keep.

What crosses ranks follows from the chain rule of KL: with w_r the probability of rank r's part of the vocabulary and
t_r, s_r the distributions within it,

    KL(t || s) = sum_r w^t_r (KL(t_r || s_r) + log w^t_r - log w^s_r),    H(t) = sum_r w^t_r (H(t_r) - log w^t_r),

so a rank gives the log-sum-exps that w is made of (teacher's, student's, student's at temperature 1), its own KL and
entropy, and the label's logit: six floats a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.distill import chunks
from minitron_mcore.runtime import UserError

# Log-sum-exp of a rank that holds only padding: finite, and so far below any other that its weight is exactly 0.
_NOTHING = -1e30


@dataclass(frozen=True)
class _Settings:
    vocab_size: int
    tp_group: dist.ProcessGroup | None
    kd_weight: float
    lm_weight: float
    temperature: float
    chunk_tokens: int | None
    with_gradient: bool


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
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of mask * (kd_weight * temperature^2 * KL(teacher || student) + lm_weight * cross-entropy).

    KL is taken between softmax(logits / temperature) of both (Hinton et al. 2015; the factor keeps the gradient's size
    as the temperature grows), cross-entropy at temperature 1; nats. Logits are products in the inputs' dtype, all that
    follows is fp32 (fp64 for fp64). The gradients are formed here; backward only scales them, and only once (no
    `retain_graph`).

    What each tensor-parallel rank r holds (T tokens, V_r = padded vocabulary / TP):

        student_hidden [T, H_s]  the same on all ranks. Its gradient is THIS RANK'S PARTIAL SUM over the vocabulary:
                                 take the hidden states from megatron's copy_to_tensor_model_parallel_region or
                                 gather_from_sequence_parallel_region, whose backward adds the ranks' parts
        student_head [V_r, H_s]  rows r * V_r .. (r + 1) * V_r; from `vocab_size` on padding: no softmax, gradient 0
        teacher_hidden [T, H_t], teacher_head [V_r, H_t]  likewise, no gradient; both None with kd_weight 0: LM loss
        labels [T] int64, mask [T] float  the same on all ranks. Tokens of mask 0 may hold anything anywhere (NaN, -100)

    Args:
        vocab_size: global, without padding.
        tp_group: the ranks that share the vocabulary; None: the heads are whole.
        chunk_tokens: tokens whose logits exist at a time; None: as many as fit both into 64 MiB (512 MiB on CUDA).

    Returns:
        (loss [], stats [3]): the loss; the masked sums of KL (without its factors), cross-entropy and the teacher's
        entropy, detached, the first and last 0 without a teacher. fp32, the same on all ranks.

    Raises:
        UserError: half a teacher, one of another padded vocabulary, a `vocab_size` beyond the heads, temperature <= 0.
    """
    tp = tp_group.size() if tp_group else 1
    _check(student_head, teacher_hidden, teacher_head, vocab_size, tp, kd_weight, temperature)
    with_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    temperature = temperature if teacher_head is not None else 1.0
    group = tp_group if tp > 1 else None
    settings = _Settings(vocab_size, group, kd_weight, lm_weight, temperature, chunk_tokens, with_gradient)
    return _DistillationLoss.apply(student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, settings)


def _check(student_head, teacher_hidden, teacher_head, vocab_size, tp, kd_weight, temperature) -> None:
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
    if temperature <= 0:
        raise UserError(f"temperature is {temperature}; it must be above 0 (1 leaves the logits as they are).")


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
            logits_s, logits_t = hidden @ head.t(), None
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


def _shift(logits: Tensor, temperature: float, out: Tensor, largest: Tensor | None = None) -> Tensor:
    """out [T, V] := logits / temperature - its maximum, which is returned (or `largest` [T], where it is known)."""
    out.copy_(logits)
    if temperature != 1:
        out.div_(temperature)
    largest = out.amax(-1) if largest is None else largest
    out.sub_(largest[:, None])
    return largest


class _Tiles:
    """The work between the products, on a few tokens at a time, in buffers that are used again and again."""

    def __init__(self, settings: _Settings, like: Tensor, num_rows: int):
        self.settings, self.rank = settings, settings.tp_group.rank() if settings.tp_group else 0
        self.start = self.rank * num_rows
        self.width = min(max(settings.vocab_size - self.start, 0), num_rows)
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.elements = chunks.TILE_ELEMENTS[like.device.type]
        self.size = chunks.tile_tokens(len(like), num_rows, like.device.type)
        self.buffers = torch.empty(chunks.TILE_BUFFERS, self.size, self.width, dtype=self.dtype, device=like.device)

    def run(self, logits_s: Tensor, logits_t: Tensor | None, labels: Tensor, mask: Tensor) -> Tensor:
        """[KL, cross-entropy, teacher's entropy] of each token; its gradient overwrites `logits_s` [T, width]."""
        s, num_tokens = self.settings, len(labels)
        tiles = [
            (at, logits_s[at], None if logits_t is None else logits_t[at]) for at in _slices(num_tokens, self.size)
        ]
        place = labels - self.start
        inside = (place >= 0) & (place < self.width)
        place = place.clamp(0, max(self.width - 1, 0))[:, None]
        # log-sum-exp of student, teacher, student at temperature 1; KL; entropy; label's logit
        own = self.buffers.new_zeros(6, num_tokens)
        largest, sums = torch.zeros_like(own[:3]), torch.ones_like(own[:3])
        for at, *logits in tiles if self.width else ():
            self._read(*logits, own[:, at], largest[:, at], sums[:, at])
        if self.width:
            own[5] = torch.where(inside, logits_s.gather(1, place).squeeze(1), 0)
        else:
            own[:3] = _NOTHING
        parts = own[None]
        if s.tp_group:
            parts = own.new_empty(s.tp_group.size(), *own.shape)
            dist.all_gather(list(parts), own, group=s.tp_group)
        lse, kl, entropy, label = parts[:, :3], parts[:, 3], parts[:, 4], parts[:, 5]
        lse_all = lse.logsumexp(0)
        log_share = lse - lse_all  # [TP, 3, T]: how much of each of the three softmaxes each rank holds
        share = log_share.exp()
        if s.with_gradient and self.width:
            kd, lm = s.kd_weight * s.temperature * mask, s.lm_weight * mask
            scale = torch.stack((kd, kd, lm)) * share[self.rank] / sums
            for at, *logits in tiles:
                self._write(*logits, largest[:, at], scale[:, at], place[at], (lm * inside)[at])
        lm_loss = lse_all[2] - label.sum(0)
        if logits_t is None:
            return torch.stack((torch.zeros_like(lm_loss), lm_loss, torch.zeros_like(lm_loss)))
        kl = (share[:, 1] * (kl + log_share[:, 1] - log_share[:, 0])).sum(0)
        return torch.stack((kl, lm_loss, (share[:, 1] * (entropy - log_share[:, 1])).sum(0)))

    def _read(self, logits_s, logits_t, own: Tensor, largest: Tensor, sums: Tensor) -> None:
        """A tile's first pass: fills `own` [6, T] but for its last row, the softmaxes' maxima and sums of exponentials [3, T]."""
        x_s, e_s, x_t, e_t = self.buffers[:, : len(logits_s)]

        def exponentials(n: int, logits: Tensor, temperature: float, x: Tensor, e: Tensor) -> None:
            largest[n] = _shift(logits, temperature, x)
            # Not torch.softmax: on a CPU it sums one by one, which is 1e-5 off at 128 k entries.
            sums[n] = torch.exp(x, out=e).sum(-1)
            own[n] = largest[n] + sums[n].log()

        exponentials(0, logits_s, self.settings.temperature, x_s, e_s)
        if logits_t is not None:
            exponentials(1, logits_t, self.settings.temperature, x_t, e_t)
            own[3] = torch.sub(x_t, x_s, out=x_s).mul_(e_t).sum(-1) / sums[1] + (sums[0] / sums[1]).log()
            own[4] = sums[1].log() - x_t.mul_(e_t).sum(-1) / sums[1]
        if self.settings.temperature == 1:
            largest[2], sums[2], own[2] = largest[0], sums[0], own[0]
        else:
            exponentials(2, logits_s, 1.0, x_s, e_s)

    def _write(self, logits_s, logits_t, largest: Tensor, scale: Tensor, place: Tensor, hit: Tensor) -> None:
        """A tile's second pass: d loss / d logits_s over `logits_s`; `scale` [3, T] makes the exponentials its terms."""
        s, (total, term, *_) = self.settings, self.buffers[:, : len(logits_s)]

        def exponentials(n: int, logits: Tensor, temperature: float, out: Tensor) -> Tensor:
            _shift(logits, temperature, out, largest[n])
            return out.exp_()

        if s.temperature == 1:
            exponentials(0, logits_s, 1.0, total).mul_((scale[0] + scale[2])[:, None])
        else:
            exponentials(0, logits_s, s.temperature, total).mul_(scale[0][:, None])
            if s.lm_weight:
                total.addcmul_(exponentials(2, logits_s, 1.0, term), scale[2][:, None])
        if logits_t is not None:
            total.addcmul_(exponentials(1, logits_t, s.temperature, term), scale[1][:, None], value=-1)
        if s.lm_weight:
            total.scatter_add_(1, place, -hit[:, None])
        logits_s.copy_(total)
