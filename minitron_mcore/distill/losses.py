"""The distillation loss over a tensor-parallel vocabulary, computed from hidden states without materializing all logits.

Tokens are processed in chunks. Two matrix products give a chunk's student and teacher logits. The gradient of the loss then
overwrites the student's logits, and two more products turn it into the gradients of the hidden states and of the head. The
backward pass only scales these gradients. Between the products a chunk is processed in tiles that fit into the cache, in two
passes with one small collective between them: the first pass computes sums over this rank's logits, the second the gradient.
On CUDA the Triton kernels of `kernels` do this work.

The chain rule of the KL divergence decides what crosses ranks. With w_r the probability of rank r's part of the vocabulary, and
t_r and s_r the distributions within that part,

    KL(t || s) = sum_r w^t_r (KL(t_r || s_r) + log w^t_r - log w^s_r),    H(t) = sum_r w^t_r (H(t_r) - log w^t_r).

Each rank sends six fp64 numbers a token: the three log-sum-exps that give w (teacher, student, student at temperature 1), its own
KL and entropy, and the label's logit. Other divergences send other sums (see `divergences`).

A chunk waits for its collective. Two alternatives were slower, measured at TP 2 on a CPU with `benchmarks/kd_loss.py`'s sizes:
overlapping it with the next chunk's products, at equal memory, took 1.26 times as long (0.99 times with twice the memory);
a single collective for all chunks, with the logits computed twice, took 1.14 times as long.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.distill import checks, tile_sizes
from minitron_mcore.distill.divergences import FactoredLogits, TopKLogProbs
from minitron_mcore.distill.loss_config import LossConfig
from minitron_mcore.distill.tiling import Tiles
from minitron_mcore.errors import UserError, refuse


@dataclass(frozen=True)
class WeightedTeachers:
    """Several teachers, whose divergence and entropy are the weighted sums of theirs.

    Under forward_kl the gradient is that of the KL divergence from the mixture of their distributions; the values differ by a
    constant, sum_i w_i KL(t_i || mixture).
    """

    logits: Sequence[FactoredLogits]
    weights: Sequence[float]
    """Of sum 1."""


TeacherLogits = FactoredLogits | TopKLogProbs | WeightedTeachers


def distillation_loss(
    student: FactoredLogits,
    teacher: TeacherLogits | None,
    labels: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008, frozen
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of mask * (kd_weight * temperature^2 * divergence + lm_weight * cross-entropy), in nats.

    The divergence is between softmax(logits / temperature) of both models (Hinton et al. 2015; the factor temperature^2 keeps the
    gradient's size); mse and cosine are between the logits. The cross-entropy is at temperature 1. Logits are computed in the
    inputs' dtype, everything after them in fp32 (fp64 for fp64 inputs).

    Each tensor-parallel rank r holds (T tokens, V_r = padded vocabulary / TP):

        student.hidden [T, H_s]  the same on all ranks. Its gradient is this rank's partial sum over the vocabulary. Take the
                                 hidden states from megatron's copy_to_tensor_model_parallel_region or
                                 gather_from_sequence_parallel_region, whose backward sums over the ranks
        student.head [V_r, H_s]  rows r * V_r .. (r + 1) * V_r; rows from `vocab_size` on are padding: probability 0, gradient 0
        teacher                  `FactoredLogits` with H_t, sharded likewise, no gradient; or the top entries, the same on all
                                 ranks; or several `FactoredLogits`; None requires kd_weight 0
        labels [T] int64, mask [T] float  the same on all ranks. Tokens with mask 0 may hold any values (NaN, label -100)

    Args:
        vocab_size: unpadded size of the whole vocabulary.
        tp_group: the ranks that share the vocabulary; None: the heads are whole.

    Returns:
        (loss [], stats [3]), fp32, the same on all ranks. stats, detached: the masked sums of the divergence (without its
        factors), of the cross-entropy and of the teacher's entropy; the first and last are 0 without a teacher. Top entries give
        the entropy at temperature 1. Call backward at most once.

    Raises:
        UserError: an unmasked label outside the vocabulary (CPU only; elsewhere the loss is NaN); a teacher head of another padded
            vocabulary; a `vocab_size` larger than the head; a head without `main_grad` under gradient accumulation fusion; see
            `checks.divergence` and `checks.top_k_teacher`.
    """
    rows, tp = len(student.head), tp_group.size() if tp_group else 1
    if teacher is None and config.kd_weight != 0:
        raise UserError(f"kd_weight is {config.kd_weight} without a teacher: give one, or kd_weight 0.")
    for each in teacher.logits if isinstance(teacher, WeightedTeachers) else [teacher]:
        if isinstance(each, FactoredLogits) and len(each.head) != rows:
            raise UserError(
                f"The teacher's padded vocabulary has {tp * len(each.head)} rows, the student's {tp * rows}: "
                "pad both to the same size."
            )
    if not 0 < vocab_size <= tp * rows:
        raise UserError(f"vocab_size is {vocab_size}; it must be at least 1 and at most the head's {tp * rows} rows.")
    refuse(checks.divergence(config, vocab_size))
    if isinstance(teacher, TopKLogProbs):
        refuse(checks.top_k_teacher(teacher.ids.shape[1], config))
    fused = config.gradient_accumulation_fusion and student.head.requires_grad
    if fused and not hasattr(student.head, "main_grad"):
        raise UserError(
            "gradient_accumulation_fusion is on, but the student's head has no main_grad: "
            "wrap the student in megatron-core's DistributedDataParallel, or turn it off."
        )
    with_gradient = torch.is_grad_enabled() and (student.hidden.requires_grad or student.head.requires_grad)
    temperature = 1.0 if teacher is None else config.temperature
    config = dataclasses.replace(config, temperature=temperature, gradient_accumulation_fusion=fused)
    terms = _terms(config, vocab_size, tp_group if tp > 1 else None, student, teacher, with_gradient)
    return _DistillationLoss.apply(student.hidden, student.head, labels, mask, config, terms)


Term = tuple[float, FactoredLogits | TopKLogProbs | None, Tiles]
"""Weight, logits and tiles of a teacher; the only one's logits may be None."""


def _terms(
    config: LossConfig,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    student: FactoredLogits,
    teacher: TeacherLogits | None,
    with_gradient: bool,
) -> list[Term]:
    if not isinstance(teacher, WeightedTeachers):
        return [(1.0, teacher, Tiles(config, vocab_size, tp_group, student, teacher, with_gradient))]
    terms: list[Term] = []
    for each, weight in zip(teacher.logits, teacher.weights, strict=True):
        # The cross-entropy is added once.
        lm_weight = 0.0 if terms else config.lm_weight
        own = dataclasses.replace(config, kd_weight=weight * config.kd_weight, lm_weight=lm_weight)
        terms.append((weight, each, Tiles(own, vocab_size, tp_group, student, each, with_gradient)))
    return terms


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, mask, config: LossConfig, terms: Sequence[Term]):
        tiles, num_tokens, others = terms[0][2], len(hidden), len(terms) > 1
        hidden_grad, head_grad = (tiles.with_gradient and needed for needed in ctx.needs_input_grad[:2])
        # Several teachers take a third buffer, where gradients of the student's logits are added.
        chunk = max(1, 2 * tiles.chunk_tokens // 3) if others else tiles.chunk_tokens
        mask, ignored = mask.to(tiles.dtype), (mask == 0)[:, None]
        per_token = mask.new_zeros(3, num_tokens)
        d_hidden = torch.zeros_like(hidden) if hidden_grad else None
        # A product sums in fp32 over its own chunk. The sum over several chunks, or one that is added to main_grad, is fp32 too.
        sum_dtype = tiles.dtype if chunk < num_tokens or config.gradient_accumulation_fusion else None
        d_head = torch.empty_like(head, dtype=sum_dtype) if head_grad else None
        own_rows = head[: tiles.width]
        # All chunks share one buffer for logits: on a CPU, allocating fresh memory costs as much as a pass over it.
        has_logits = isinstance(terms[0][1], FactoredLogits)
        buffer_s, buffer_t, total = (
            head.new_empty(chunk, tiles.width) if needed else None for needed in (True, has_logits, others)
        )
        for tokens in tile_sizes.slices(num_tokens, chunk):
            # Zero the ignored rows: then every value is finite, and the weight 0 removes them from the sums.
            inputs = hidden[tokens].masked_fill(ignored[tokens], 0)
            for n, (weight, teacher, tiles) in enumerate(terms):
                logits_s = torch.mm(inputs, own_rows.t(), out=buffer_s[: len(inputs)])
                logits_t = _teacher_chunk(teacher, tokens, ignored, tiles.width, buffer_t)
                per_token[:, tokens] += weight * tiles.run(logits_s, logits_t, labels[tokens], mask[tokens])
                if others:
                    logits_s = total[: len(inputs)].add_(logits_s) if n else total[: len(inputs)].copy_(logits_s)
            if hidden_grad:
                torch.mm(logits_s, own_rows, out=d_hidden[tokens])
            if head_grad:
                first = tokens.start == 0
                _accumulate_head_gradient(d_head[: tiles.width], logits_s, inputs, tiles.elements, first)
        del logits_s, logits_t, buffer_s, buffer_t, total  # before the head's gradient is cast
        if head_grad:
            d_head[tiles.width if num_tokens else 0 :] = 0
            d_head = d_head if config.gradient_accumulation_fusion else d_head.to(head.dtype)
        ctx.gradients, ctx.head = (d_hidden, d_head), head if config.gradient_accumulation_fusion else None
        stats = (_check_labels(per_token, labels, mask, tiles.vocab_size) * mask).sum(1)
        ctx.mark_non_differentiable(stats)
        return config.temperature**2 * config.kd_weight * stats[0] + config.lm_weight * stats[1], stats

    @staticmethod
    def backward(ctx, d_loss, _):
        if ctx.gradients is None:
            raise RuntimeError("The gradients of a distillation loss are freed by backward: call it only once.")
        # Scaled in place and released, so that no second copy of the gradients exists.
        (d_hidden, d_head), ctx.gradients = ctx.gradients, None
        if ctx.head is not None:
            d_head = _add_to_main_grad(ctx.head, d_head, d_loss)
        elif d_head is not None:
            d_head.mul_(d_loss)
        return None if d_hidden is None else d_hidden.mul_(d_loss), d_head, None, None, None, None


def _teacher_chunk(
    teacher: FactoredLogits | TopKLogProbs | None, tokens: slice, ignored: Tensor, width: int, buffer: Tensor | None
) -> Tensor | TopKLogProbs | None:
    """The teacher's logits [T, width] of `tokens`, in `buffer`, or its top entries."""
    if not isinstance(teacher, FactoredLogits):
        return teacher and teacher.chunk(tokens, ignored)
    inputs = teacher.hidden[tokens].masked_fill(ignored[tokens], 0)
    return torch.mm(inputs, teacher.head[:width].t(), out=buffer[: len(inputs)])


def _check_labels(per_token: Tensor, labels: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """Raise UserError for an unmasked label outside the vocabulary; on devices set its cross-entropy to NaN, without a sync."""
    outside = ((labels < 0) | (labels >= vocab_size)) & (mask != 0)
    if labels.device.type == "cpu" and outside.any():
        label = int(labels[outside][0])
        raise UserError(f"label {label} is outside the vocabulary of {vocab_size}: give a label in it, or mask 0.")
    per_token[1].masked_fill_(outside, float("nan"))
    return per_token


def _add_to_main_grad(head: Tensor, gradient: Tensor, scale: Tensor) -> Tensor | None:
    """Add to `head.main_grad` as megatron-core's linear layers do under gradient accumulation fusion.

    Returns:
        A dummy gradient for autograd, which megatron-core's DistributedDataParallel discards; None without that wrapper.
    """
    head.main_grad.addcmul_(gradient, scale)
    if not hasattr(head, "grad_added_to_main_grad"):
        return None
    head.grad_added_to_main_grad = True
    # Autograd adds a tied head's dummy to the embedding's gradient, which goes into main_grad: the dummy must be zero.
    return torch.zeros_like(head) if getattr(head, "zero_out_wgrad", False) else torch.empty_like(head)


def _accumulate_head_gradient(total: Tensor, d_logits: Tensor, hidden: Tensor, elements: int, first: bool) -> None:
    """total [V_r, H] := d_logits^T [V_r, T] @ hidden [T, H], plus `total` unless it is the `first`.

    On CUDA the product accumulates into `total`, in its dtype. On a CPU blocks of about 2 * `elements` are added while in the
    cache.
    """
    if _product_accumulates(total, d_logits):
        mixed = {} if total.dtype == d_logits.dtype else {"out_dtype": total.dtype}
        torch.addmm(total, d_logits.t(), hidden, beta=int(not first), out=total, **mixed)
        return
    for rows in tile_sizes.slices(len(total), max(1, 2 * elements // hidden.shape[1])):
        product = d_logits[:, rows].t() @ hidden
        total[rows].copy_(product) if first else total[rows].add_(product)


def _product_accumulates(total: Tensor, factor: Tensor) -> bool:
    """Whether torch.addmm can add a product of `factor`'s dtype to `total` in place.

    fp32 sums of bf16 or fp16 products exist on CUDA only; before torch 2.11 their addend may have to be of the factors' dtype.
    """
    if total.device.type not in ("cuda", "meta"):
        return False
    half = factor.dtype in (torch.bfloat16, torch.float16)
    return total.dtype == factor.dtype or (half and total.dtype == torch.float32 and torch.__version__ >= (2, 11))
