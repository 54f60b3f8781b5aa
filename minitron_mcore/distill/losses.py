"""Forward KL from teacher to student over a tensor-parallel vocabulary, from hidden states, without ever holding the logits.

Tokens are worked off in chunks: two matrix products give a chunk's logits, the loss's gradient then takes the place of the
student's, and two more products carry it to the hidden states and to the head. Nothing is left for the backward pass but to
scale. Between the products a chunk is cut into tiles that stay in the cache, each with one small collective.

What crosses ranks follows from the chain rule of KL: with w_r the probability of rank r's part of the vocabulary and t_r, s_r
the distributions within it,

    KL(t || s) = sum_r w^t_r (KL(t_r || s_r) + log w^t_r - log w^s_r),    H(t) = sum_r w^t_r (H(t_r) - log w^t_r),

so a rank gives the two log-sum-exps that w is made of, its own KL and entropy, and the label's logit: five floats a token (six
where the temperature isn't 1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.runtime import UserError

# Both logits of a chunk together. More makes longer products and adds to the head's gradient less often.
_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
# Elements of a tile: four fp32 buffers of this size stay in a CPU's last-level cache, and are enough to fill a GPU.
_TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
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
    """Sum over tokens of mask * (kd_weight * temperature^2 * KL(teacher || student) + lm_weight * cross-entropy), in nats.

    KL is taken between softmax(logits / temperature) of both (Hinton et al. 2015; the factor keeps the gradient's size as the
    temperature grows), cross-entropy at temperature 1. Logits are products in the inputs' dtype; all that follows is fp32
    (fp64 for fp64). The gradients are formed here; backward only scales them, and only once (no `retain_graph`).

    What each tensor-parallel rank r holds (T tokens, V_r = padded vocabulary / TP):

        student_hidden [T, H_s]  the same on all ranks. Its gradient is THIS RANK'S PARTIAL SUM over the vocabulary: take the
                                 hidden states from megatron's copy_to_tensor_model_parallel_region or
                                 gather_from_sequence_parallel_region, whose backward adds the ranks' parts
        student_head [V_r, H_s]  rows r * V_r .. (r + 1) * V_r; those from `vocab_size` on are padding: in no softmax, gradient 0
        teacher_hidden [T, H_t], teacher_head [V_r, H_t]  likewise, no gradient; both None leaves the LM loss (kd_weight 0)
        labels [T] int64, mask [T] float  the same on all ranks; where the mask is 0, all inputs may hold anything (NaN, -100)

    Args:
        vocab_size: global, without padding.
        tp_group: the ranks that share the vocabulary; None: the heads are whole.
        chunk_tokens: tokens whose logits exist at a time; None: as many as fit both into 128 MiB (512 MiB on CUDA).

    Returns:
        (loss [], stats [3]): the loss; the masked sums of KL (without its factors), cross-entropy and the teacher's entropy,
        detached, 0 for what needs a teacher that isn't there. fp32, the same on all ranks.

    Raises:
        UserError: half a teacher, one of another padded vocabulary, a `vocab_size` beyond the heads, a temperature not above 0.
    """
    tp = tp_group.size() if tp_group else 1
    if (teacher_hidden is None) != (teacher_head is None) or (teacher_hidden is None and kd_weight != 0):
        raise UserError(f"kd_weight is {kd_weight} without a whole teacher: give its hidden states and its head, or set kd_weight to 0.")
    if teacher_head is not None and len(teacher_head) != len(student_head):
        raise UserError(
            f"The padded vocabularies differ: teacher {tp * len(teacher_head)}, student {tp * len(student_head)}; "
            "pad both to the same size."
        )
    if not 0 < vocab_size <= tp * len(student_head):
        raise UserError(f"vocab_size is {vocab_size}; it must be between 1 and the heads' {tp * len(student_head)} rows.")
    if temperature <= 0:
        raise UserError(f"temperature is {temperature}; it must be above 0 (1 leaves the logits as they are).")
    with_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    settings = _Settings(
        vocab_size=vocab_size,
        tp_group=tp_group if tp > 1 else None,
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        temperature=temperature if teacher_head is not None else 1.0,
        chunk_tokens=chunk_tokens,
        with_gradient=with_gradient,
    )
    return _DistillationLoss.apply(student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, settings)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, settings: _Settings):
        num_tokens, need = len(student_hidden), [settings.with_gradient and x for x in ctx.needs_input_grad[:2]]
        tile = _Tile(settings, student_hidden, len(student_head))
        chunk = settings.chunk_tokens or _chunk_tokens(num_tokens, student_head, teacher_head)
        mask, ignored = mask.to(tile.dtype), (mask == 0)[:, None]
        per_token = mask.new_zeros(3, num_tokens)
        d_hidden = torch.zeros_like(student_hidden) if need[0] else None
        # A product adds up in fp32 within a chunk; over several chunks this tensor does.
        d_head = torch.zeros_like(student_head, dtype=tile.dtype if chunk < num_tokens else None) if need[1] else None
        for at in _slices(num_tokens, chunk):
            # Ignored rows become zeros: all that follows is finite there, and their weight of 0 then silences them.
            hidden = student_hidden[at].masked_fill(ignored[at], 0)
            logits_s, logits_t = hidden @ student_head[: tile.width].t(), None
            if teacher_head is not None:
                logits_t = teacher_hidden[at].masked_fill(ignored[at], 0) @ teacher_head[: tile.width].t()
            for part in _slices(len(hidden), tile.num_tokens):
                inputs = (None if x is None else x[part] for x in (logits_s, logits_t, labels[at], mask[at]))
                per_token[:, at][:, part] = tile.run(*inputs)
            if need[0]:
                torch.mm(logits_s, student_head[: tile.width], out=d_hidden[at])
            if need[1]:
                _add_head_gradient(d_head[: tile.width], logits_s, hidden, tile.elements)
        ctx.gradients = d_hidden, None if d_head is None else d_head.to(student_head.dtype)
        stats = (per_token * mask).sum(1)
        ctx.mark_non_differentiable(stats)
        return settings.temperature**2 * settings.kd_weight * stats[0] + settings.lm_weight * stats[1], stats

    @staticmethod
    def backward(ctx, d_loss, _):
        # Scaled in place and given away, so that no second copy of the head's gradient ever exists.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("distillation_loss gives its gradients away: its graph can be walked back once only.")
        return *(None if x is None else x.mul_(d_loss) for x in gradients), None, None, None, None, None


class _Tile:
    """The work between the products, on a few tokens at a time, in buffers that are used again and again."""

    def __init__(self, settings: _Settings, like: Tensor, num_rows: int):
        self.settings, self.rank = settings, settings.tp_group.rank() if settings.tp_group else 0
        self.start = self.rank * num_rows
        self.width = min(max(settings.vocab_size - self.start, 0), num_rows)
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.elements = _TILE_ELEMENTS[like.device.type]
        self.num_tokens = max(1, min(self.elements // num_rows, len(like)))  # of num_rows: the same on all ranks
        self.buffers = torch.empty(4, self.num_tokens, self.width, dtype=self.dtype, device=like.device)

    def run(self, logits_s: Tensor, logits_t: Tensor | None, labels: Tensor, mask: Tensor) -> Tensor:
        """[KL, cross-entropy, teacher's entropy] of each token; writes the loss's gradient over `logits_s` [T, width]."""
        own = self._own_part(logits_s, logits_t, labels) if self.width else self._no_part(logits_t, mask)
        parts = own[None]
        if self.settings.tp_group:
            parts = own.new_empty(self.settings.tp_group.size(), *own.shape)
            dist.all_gather_into_tensor(parts, own, group=self.settings.tp_group)
        ...
