"""A divergence between teacher and student over a tensor-parallel vocabulary, from hidden states, never holding the logits; or
from logits that are there.

Tokens are worked off in chunks: two matrix products give a chunk's logits, the loss's gradient then takes the place of
the student's, and two more products carry it to the hidden states and to the head. Nothing is left for the backward
pass but to scale. Between the products a chunk is cut into tiles that stay in the cache. It is gone through twice, with one
small collective in between: for what the ranks' sums are made of, then for the gradient, whose exponentials cost less to
form again than to keep. On CUDA Triton kernels (`kernels`) do this work.

What crosses ranks follows from the chain rule of KL: with w_r the probability of rank r's part of the vocabulary and
t_r, s_r the distributions within it,

    KL(t || s) = sum_r w^t_r (KL(t_r || s_r) + log w^t_r - log w^s_r),    H(t) = sum_r w^t_r (H(t_r) - log w^t_r),

so a rank gives the log-sum-exps that w is made of (teacher's, student's, student's at temperature 1), its own KL and
entropy, and the label's logit: six fp64 numbers a token. The other divergences (see `divergences`) differ in what a rank sums
and in what it writes.

A chunk waits for its exchange. Two other ways were measured at TP 2 on a CPU (`benchmarks/kd_loss.py`'s sizes, CPU time of both
ranks): to hide it behind the next chunk's products, with two chunks' logits in the memory of one, took 1.26 times as long, as the
head's gradient is added to twice as often (with twice the memory 0.99 times); one exchange in all, with the logits formed
again, 1.14 times.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.config.settings import Divergence
from minitron_mcore.distill import checks, divergences, tile_sizes
from minitron_mcore.distill.tiling import Settings, Tiles
from minitron_mcore.errors import UserError, refuse


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
    gradient_accumulation_fusion: bool = False,
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
        chunk_tokens: tokens whose logits exist at a time; None: as many as fit both into 64 MiB (1 GiB on CUDA).
        gradient_accumulation_fusion: megatron-core's: backward adds the head's gradient to its `main_grad`, in that one's
            precision, and leaves autograd a dummy, which megatron-core's DistributedDataParallel throws away.

    Returns:
        (loss [], stats [3]): the loss; the masked sums of the divergence (without its factors), cross-entropy and the teacher's
        entropy, detached, the first and last 0 without a teacher. fp32, the same on all ranks.

    Raises:
        UserError: on the CPU, a counted label outside the vocabulary (elsewhere the loss is NaN); half a teacher, two, one of
            another padded vocabulary, a `vocab_size` beyond the heads, a head without
            `main_grad` to add to; see `checks.divergence` and `checks.given`.
    """
    if (teacher_hidden is None) != (teacher_head is None):
        raise UserError("Half a teacher is given: give its hidden states and its head, or neither.")
    fused = gradient_accumulation_fusion and student_head.requires_grad
    if fused and not hasattr(student_head, "main_grad"):
        raise UserError(
            "gradient_accumulation_fusion is on, but the student's head has no main_grad: "
            "wrap the student in megatron-core's DistributedDataParallel, or turn it off."
        )
    given = None if teacher_top is None else divergences.Given(*teacher_top)
    if given:
        refuse(checks.given(given.ids.shape[1], divergence, top_k, temperature, teacher_head is not None))
    with_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    rows = len(student_head), None if teacher_head is None else len(teacher_head)
    kind = divergence, jsd_beta, top_k
    settings = _settings(
        *rows, vocab_size, tp_group, kd_weight, lm_weight, temperature, *kind, chunk_tokens, with_gradient, fused, given
    )
    return _DistillationLoss.apply(student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, settings)


def distillation_loss_of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """`distillation_loss` of logits that are there already: the same loss, options, results and errors, in one collective a call
    (jsd and top-k in two).

    It consumes the student's logits: their gradient is written over them, so that beside both logits there are only the
    buffers of a tile. An operation that keeps its output for its backward pass may not be the one that made them; a
    product doesn't. Without a gradient they stay as they are; the teacher's always do.

    What each tensor-parallel rank r holds (T tokens, V_r = padded vocabulary / TP):

        student_logits [T, V_r]  columns r * V_r .. (r + 1) * V_r; from `vocab_size` on padding: no softmax, gradient 0.
                                 The gradient is complete, nothing is to be summed over ranks
        teacher_logits [T, V_r]  likewise, no gradient; None with kd_weight 0: LM loss
        labels, mask [T]         the same on all ranks; where mask is 0 the logits may hold anything
    """
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    rows = student_logits.shape[1], None if teacher_logits is None else teacher_logits.shape[1]
    kind = divergence, jsd_beta, top_k
    settings = _settings(*rows, vocab_size, tp_group, kd_weight, lm_weight, temperature, *kind, None, with_gradient)
    return _LossOfLogits.apply(student_logits, teacher_logits, labels, mask, settings)


def _settings(num_rows, teacher_rows, vocab_size, tp_group, kd_weight, lm_weight, temperature, *rest) -> Settings:
    """Checks what both forms are given; `num_rows` V_r are the student's, `teacher_rows` the teacher's, None without one."""
    tp = tp_group.size() if tp_group else 1
    divergence, jsd_beta, top_k, *others = rest
    has_teacher = teacher_rows is not None or isinstance(others[-1], divergences.Given)
    if not has_teacher and kd_weight != 0:
        raise UserError(f"kd_weight is {kd_weight} without a teacher: give one, or kd_weight 0.")
    if teacher_rows not in (None, num_rows):
        raise UserError(
            f"The teacher's padded vocabulary has {tp * teacher_rows} rows, the student's {tp * num_rows}: "
            "pad both to the same size."
        )
    if not 0 < vocab_size <= tp * num_rows:
        raise UserError(
            f"vocab_size is {vocab_size}; it must be at least 1 and at most the head's {tp * num_rows} rows."
        )
    refuse(checks.divergence(divergence, jsd_beta, top_k, temperature, vocab_size))
    temperature = temperature if has_teacher else 1.0
    return Settings(vocab_size, tp_group if tp > 1 else None, kd_weight, lm_weight, temperature, *rest)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, settings: Settings):
        num_tokens, need = len(student_hidden), [settings.with_gradient and x for x in ctx.needs_input_grad[:2]]
        tiles = Tiles(settings, student_hidden, len(student_head))
        chunk = settings.chunk_tokens or _chunk_tokens(num_tokens, student_head, teacher_head)
        mask, ignored = mask.to(tiles.dtype), (mask == 0)[:, None]
        per_token = mask.new_zeros(3, num_tokens)
        d_hidden = torch.zeros_like(student_hidden) if need[0] else None
        # A product sums in fp32 over its chunk; this tensor does over several chunks, or until it is added to one that does.
        precise = tiles.dtype if chunk < num_tokens or settings.into_main_grad else None
        d_head = torch.empty_like(student_head, dtype=precise) if need[1] else None
        head, head_t = (None if x is None else x[: tiles.width] for x in (student_head, teacher_head))
        # One chunk's logits after the other in the same memory: fresh memory costs a CPU as much as a pass over it.
        out, out_t = (None if x is None else x.new_empty(chunk, tiles.width) for x in (head, head_t))
        for at in tile_sizes.slices(num_tokens, chunk):
            # Ignored rows become zeros: all that follows is finite there, and their weight of 0 then silences them.
            hidden = student_hidden[at].masked_fill(ignored[at], 0)
            logits_s, logits_t = torch.mm(hidden, head.t(), out=out[: len(hidden)]), None
            if settings.given:
                logits_t = settings.given.part(at, ignored)
            elif head_t is not None:
                hidden_t = teacher_hidden[at].masked_fill(ignored[at], 0)
                logits_t = torch.mm(hidden_t, head_t.t(), out=out_t[: len(hidden)])
            per_token[:, at] = tiles.run(logits_s, logits_t, labels[at], mask[at])
            if need[0]:
                torch.mm(logits_s, head, out=d_hidden[at])
            if need[1]:
                _add_head_gradient(d_head[: tiles.width], logits_s, hidden, tiles.elements, first=at.start == 0)
        del logits_s, logits_t, out, out_t  # before the head's gradient is cast
        if need[1]:
            d_head[tiles.width if num_tokens else 0 :] = 0
            d_head = d_head if settings.into_main_grad else d_head.to(student_head.dtype)
        ctx.gradients, ctx.head = (d_hidden, d_head), student_head if settings.into_main_grad else None
        return _totals(ctx, settings, _checked(per_token, labels, mask, settings) * mask)

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_head = _pop_gradients(ctx)
        if ctx.head is not None:
            d_head = _added_to_main_grad(ctx.head, d_head, d_loss)
        elif d_head is not None:
            d_head.mul_(d_loss)
        return None if d_hidden is None else d_hidden.mul_(d_loss), d_head, None, None, None, None, None


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, labels, mask, settings: Settings):
        tiles = Tiles(settings, student_logits, student_logits.shape[1])
        mask, ignored = mask.to(tiles.dtype), mask == 0
        logits_t = None if teacher_logits is None else teacher_logits[:, : tiles.width]
        per_token = tiles.run(student_logits[:, : tiles.width], logits_t, labels, mask).to(mask)
        per_token = _checked(per_token, labels, mask, settings) * mask
        if settings.with_gradient:
            student_logits[:, tiles.width :] = 0
            student_logits.masked_fill_(ignored[:, None], 0)
        ctx.gradients = (student_logits.detach(),)
        return _totals(ctx, settings, per_token.masked_fill(ignored, 0))

    @staticmethod
    def backward(ctx, d_loss, _):
        return _pop_gradients(ctx)[0].mul_(d_loss), None, None, None, None


def _checked(per_token: Tensor, labels: Tensor, mask: Tensor, settings: Settings) -> Tensor:
    """`Tiles.run`'s numbers. A label of a counted token that no logit belongs to would count as if its logit were 0: on the CPU it
    is a UserError, elsewhere its cross-entropy becomes NaN, so that nothing waits for the device."""
    outside = ((labels < 0) | (labels >= settings.vocab_size)) & (mask != 0)
    if labels.device.type == "cpu" and outside.any():
        label = int(labels[outside][0])
        raise UserError(
            f"label {label} is outside the vocabulary of {settings.vocab_size}: give a label in it, or mask 0."
        )
    per_token[1].masked_fill_(outside, float("nan"))
    return per_token


def _totals(ctx, settings: Settings, per_token: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [], stats [3]) from `Tiles.run`'s numbers times the mask."""
    stats = per_token.sum(1)
    ctx.mark_non_differentiable(stats)
    return settings.temperature**2 * settings.kd_weight * stats[0] + settings.lm_weight * stats[1], stats


def _pop_gradients(ctx) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass formed. Backward scales them in place, so no second copy of them ever exists."""
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError("A distillation loss gives its gradients away: call backward through it only once.")
    return gradients


def _added_to_main_grad(weight: Tensor, gradient: Tensor, scale: Tensor) -> Tensor | None:
    """What megatron-core's linear layers do under gradient accumulation fusion, and return: a gradient that says nothing."""
    weight.main_grad.addcmul_(gradient, scale)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # A tied head's dummy is added to what comes from the embedding, and then to main_grad: megatron-core wants zeros for it.
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _chunk_tokens(num_tokens: int, student_head: Tensor, teacher_head: Tensor | None) -> int:
    heads = [head for head in (student_head, teacher_head) if head is not None]
    bytes_a_token = sum(len(head) * head.element_size() for head in heads)
    return tile_sizes.chunk_tokens(num_tokens, bytes_a_token, student_head.device.type)


def _add_head_gradient(total: Tensor, d_logits: Tensor, hidden: Tensor, elements: int, first: bool = False) -> None:
    """total [V_r, H] := d_logits^T [V_r, T] @ hidden [T, H], plus `total` unless it is the `first`. On CUDA the product itself
    adds to `total`, in its precision; elsewhere blocks of rows are added while in the cache."""
    if _product_accumulates(total, d_logits):
        mixed = {} if total.dtype == d_logits.dtype else {"out_dtype": total.dtype}
        torch.addmm(total, d_logits.t(), hidden, beta=int(not first), out=total, **mixed)
        return
    for rows in tile_sizes.slices(len(total), max(1, 2 * elements // hidden.shape[1])):
        product = d_logits[:, rows].t() @ hidden
        total[rows].copy_(product) if first else total[rows].add_(product)


def _product_accumulates(total: Tensor, factor: Tensor) -> bool:
    """Whether torch.addmm adds a product of `factor`'s dtype to `total` in place. fp32 sums of bf16 or fp16 products exist on CUDA
    only; before torch 2.11 their addend may have to be of the factors' dtype."""
    if total.device.type not in ("cuda", "meta"):
        return False
    half = factor.dtype in (torch.bfloat16, torch.float16)
    return total.dtype == factor.dtype or (half and total.dtype == torch.float32 and torch.__version__ >= (2, 11))
