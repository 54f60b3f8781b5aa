"""Triton kernels of the divergences' work between the matrix products, which `tiling.Tiles` otherwise does in torch.

Only this file imports triton; `tiling` imports it only where the kernels run: on CUDA, and on a CPU under Triton's interpreter
(TRITON_INTERPRET=1, set before anything imports triton).

For each element of a rank's logits, of b bytes in either model, `_sums` reads 2 b bytes, and `_gradient` reads 2 b and writes
b: 10 bytes in bf16. The only buffers are a few numbers a token. An H100 (3.35 TB/s) moves those of 8,192 tokens x 128,256 in
3.1 ms at best. jsd and top-k read both logits once more. Top-k's gradient does not read the teacher's logits: torch processes
the k entries of a token. Within a row the computation is fp32, block by block; what crosses ranks is fp64, as in `tiling`.

A kernel is compiled for each divergence, `KIND`; the table of `divergences` has the formulas. Axis 0 of every grid is the
tokens, so `tl.num_programs(0)` is their number T.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitron_mcore.distill.divergences import (
    NEG_INF,
    Chunk,
    Cosine,
    ForwardKL,
    Jsd,
    Mse,
    ReverseKL,
    TopK,
    TopKOfLogProbs,
)

FORWARD_KL, REVERSE_KL, JSD, MSE, COSINE, TOP_K, NO_TEACHER = (tl.constexpr(kind) for kind in range(7))
KINDS = {
    ForwardKL: FORWARD_KL,
    ReverseKL: REVERSE_KL,
    Jsd: JSD,
    Mse: MSE,
    Cosine: COSINE,
    TopK: TOP_K,
    TopKOfLogProbs: TOP_K,
}
SUMS_BLOCK, GRADIENT_BLOCK = tl.constexpr(4096), tl.constexpr(2048)
"""Entries of a row that a program processes at a time, powers of two: about 16 a thread."""


@triton.jit
def _sums(student, teacher, out, width, inverse_t, KIND: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    """One program per token. out [10, T]: the three maxima and the three sums of `Chunk`; sum e_t x_t; and three sums of
    `KIND`, where x = (z - maximum) / temperature and e = exp(x): sum e_t (x_t - x_s) for forward KL, sum e_s (x_s - x_t) for
    reverse KL, sum (z_s - z_t)^2 for mse, the sums of z_s z_t, z_s^2 and z_t^2 for cosine."""
    row, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    student += row * width
    teacher += row * width
    # Finite initial maxima: they must be numbers where a row has no entries.
    max_s, sum_s, sum_1 = -1e30, 0.0, 0.0
    max_t, sum_t, entropy, first, second, third = -1e30, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, width, SUMS_BLOCK):
        columns = start + tl.arange(0, SUMS_BLOCK)
        inside = columns < width
        z_s = tl.load(student + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(max_s, tl.max(z_s, 0))
        x_s = z_s * inverse_t - new_max * inverse_t
        shift_s = max_s * inverse_t - new_max * inverse_t
        e_s, previous_sum_s = tl.exp(x_s), sum_s
        sum_s = sum_s * tl.exp(shift_s) + tl.sum(e_s, 0)
        if HAS_TEMPERATURE:
            sum_1 = sum_1 * tl.exp(max_s - new_max) + tl.sum(tl.exp(z_s - new_max), 0)
        max_s = new_max
        if KIND != NO_TEACHER:
            z_t = tl.load(teacher + columns, mask=inside, other=-float("inf")).to(tl.float32)
            new_max = tl.maximum(max_t, tl.max(z_t, 0))
            x_t = z_t * inverse_t - new_max * inverse_t
            shift_t = max_t * inverse_t - new_max * inverse_t
            e_t = tl.exp(x_t)
            # The sums of previous blocks are rescaled to the new maxima, their x_t by shift_t and x_s by shift_s. Outside the
            # row x is -inf, and 0 times -inf is NaN: hence `where`.
            entropy = tl.exp(shift_t) * (entropy + shift_t * sum_t) + tl.sum(tl.where(inside, e_t * x_t, 0.0), 0)
            if KIND == FORWARD_KL:
                ratio = tl.sum(tl.where(inside, e_t * (x_t - x_s), 0.0), 0)
                first = tl.exp(shift_t) * (first + (shift_t - shift_s) * sum_t) + ratio
            elif KIND == REVERSE_KL:
                ratio = tl.sum(tl.where(inside, e_s * (x_s - x_t), 0.0), 0)
                first = tl.exp(shift_s) * (first + (shift_s - shift_t) * previous_sum_s) + ratio
            elif KIND == MSE:
                difference = tl.where(inside, z_s - z_t, 0.0)
                first += tl.sum(difference * difference, 0)
            elif KIND == COSINE:
                z_s, z_t = tl.where(inside, z_s, 0.0), tl.where(inside, z_t, 0.0)
                first += tl.sum(z_s * z_t, 0)
                second += tl.sum(z_s * z_s, 0)
                third += tl.sum(z_t * z_t, 0)
            sum_t = sum_t * tl.exp(shift_t) + tl.sum(e_t, 0)
            max_t = new_max
    out += row
    tl.store(out, max_s * inverse_t)
    tl.store(out + num_tokens, max_t * inverse_t)
    tl.store(out + 2 * num_tokens, max_s)
    tl.store(out + 3 * num_tokens, sum_s)
    tl.store(out + 4 * num_tokens, sum_t)
    tl.store(out + 5 * num_tokens, sum_1 if HAS_TEMPERATURE else sum_s)
    tl.store(out + 6 * num_tokens, entropy)
    tl.store(out + 7 * num_tokens, first)
    tl.store(out + 8 * num_tokens, second)
    tl.store(out + 9 * num_tokens, third)


@triton.jit
def _log_mixture(log_ratio, weight):
    """log(weight q / p + 1 - weight) from log(q / p), exact where p and q are close: expm1 and log1p by their series near 0,
    since the interpreter lacks CUDA's."""
    r = tl.minimum(log_ratio, 80.0)  # exp of more would overflow
    series = r * (1 + r / 2 * (1 + r / 3 * (1 + r / 4 * (1 + r / 5 * (1 + r / 6 * (1 + r / 7))))))
    y = weight * tl.where(tl.abs(r) < 0.25, series, tl.exp(r) - 1)
    near = tl.abs(y) < 0.25
    s = tl.where(near, y / (2 + y), 0.0)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 / 9))))
    return tl.where(near, series, tl.log(1 + tl.where(near, 0.0, y)))


@triton.jit
def _second_sums(student, teacher, out, log_sum_exp, beta, width, inverse_t):
    """One program per token. out [2, T]: this rank's parts of KL(p_s || m) and KL(p_t || m). `log_sum_exp` [3, T]: over all
    ranks."""
    row, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    student += row * width
    teacher += row * width
    base_s = tl.load(log_sum_exp + row)
    base_t = tl.load(log_sum_exp + num_tokens + row)
    kl_s, kl_t = 0.0, 0.0
    for start in range(0, width, GRADIENT_BLOCK):
        columns = start + tl.arange(0, GRADIENT_BLOCK)
        inside = columns < width
        log_s = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32) * inverse_t - base_s
        log_t = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32) * inverse_t - base_t
        ratio = log_t - log_s
        kl_s -= tl.sum(tl.where(inside, tl.exp(log_s) * _log_mixture(ratio, beta), 0.0), 0)
        kl_t -= tl.sum(tl.where(inside, tl.exp(log_t) * _log_mixture(-ratio, 1 - beta), 0.0), 0)
    tl.store(out + row, kl_s)
    tl.store(out + num_tokens + row, kl_t)


@triton.jit
def _gradient(student, teacher, label_ids, values, width, inverse_t, KIND: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    """One program per block of a token's entries: write their gradient over the student's logits. `values` [10, T]:
    `Chunk.maxima`, `Chunk.scale`, `_factors`, the label's weight, jsd's beta."""
    row, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    student += row * width
    teacher += row * width
    maxima = values + row
    scale = maxima + 3 * num_tokens
    factors = scale + 3 * num_tokens
    columns = tl.program_id(1) * GRADIENT_BLOCK + tl.arange(0, GRADIENT_BLOCK)
    inside = columns < width
    z_s = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32)
    x_s = z_s * inverse_t - tl.load(maxima)
    e_s = tl.exp(x_s)
    e_1 = tl.exp(z_s - tl.load(maxima + 2 * num_tokens)) if HAS_TEMPERATURE else e_s
    lm_term = tl.load(scale + 2 * num_tokens) * e_1
    if KIND == NO_TEACHER:
        gradient = tl.load(scale) * e_s + lm_term
    else:
        z_t = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32)
        x_t = z_t * inverse_t - tl.load(maxima + num_tokens)
        if KIND == FORWARD_KL:
            gradient = tl.load(scale) * e_s + lm_term
            gradient -= tl.load(scale + num_tokens) * tl.exp(x_t)
        elif KIND == REVERSE_KL:
            gradient = tl.load(scale) * e_s * (x_s - x_t - tl.load(factors)) + lm_term
        elif KIND == JSD:
            beta = tl.load(factors + 3 * num_tokens)
            mixture = _log_mixture(x_t - x_s - tl.load(factors), beta)
            gradient = tl.load(scale) * e_s * (beta - 1) * (mixture + tl.load(factors + num_tokens)) + lm_term
        else:
            gradient = tl.load(factors) * z_s - tl.load(factors + num_tokens) * z_t + lm_term
    gradient -= tl.where(columns == tl.load(label_ids + row), tl.load(factors + 2 * num_tokens), 0.0)
    tl.store(student + columns, gradient.to(student.dtype.element_ty), mask=inside)


def compute_sums(chunk: Chunk, local: Tensor, divergence: ForwardKL) -> None:
    """A chunk's first pass: set `chunk.maxima` and `chunk.sums`, and fill `local` [5 + n, T] (see `tiling.Tiles.run`) except
    for the label's logit and the entries of a `TopKLogProbs` teacher."""
    out = _statistics(chunk, divergence)
    chunk.maxima, chunk.sums, (entropy, *sums) = out[:3], out[3:6], out[6:]
    local[:3] = chunk.maxima.double() + chunk.sums.double().log()
    if chunk.logits[1] is None:
        return
    sum_s, sum_t, _ = chunk.sums
    local[3] = sum_t.log() - entropy / sum_t
    match divergence:
        case ReverseKL():
            local[5] = sums[0] / sum_s + (sum_t / sum_s).log()
        case Cosine():
            local[5:] = out[7:]
        case Mse():
            local[5] = sums[0]
        case Jsd():
            pass
        case TopK():
            local[5:] = _compute_top_k_sums(chunk, divergence)
        case _:
            local[5] = sums[0] / sum_t + (sum_s / sum_t).log()


def _statistics(chunk: Chunk, divergence: ForwardKL) -> Tensor:
    """[10, T], by the kernel `_sums`."""
    student, teacher, *sizes = _arguments(chunk)
    out = chunk.sums.new_empty(10, len(student))
    _sums[(len(student),)](student, teacher, out, *sizes, *_options(chunk, divergence), num_warps=8)
    return out


def _compute_top_k_sums(chunk: Chunk, divergence: TopK) -> Tensor:
    """`TopK.local_sums`. For the tails the kernel reads the logits once more, with -inf at the top entries."""
    logits = [x for x in chunk.logits[:2] if isinstance(x, Tensor)]
    values = [x.gather(1, divergence.indices) for x in logits]
    for x, chosen in zip(logits, values, strict=True):
        divergence.put(slice(None), x, torch.full_like(chosen, -math.inf))
    out = _statistics(chunk, divergence)
    for x, chosen in zip(logits, values, strict=True):
        x.scatter_(1, divergence.indices, chosen)
    divergence.tail_maxima = out[0]
    tails = (out[:2].double() + out[3:5].double().log()).clamp(min=NEG_INF)
    shifted = [chunk.like(x) / chunk.temperature - chunk.maxima[n, :, None] for n, x in enumerate(values)]
    return divergence.top_sums(chunk, slice(None), shifted, tails[: len(logits)])


def second_sums(chunk: Chunk, divergence: Jsd) -> Tensor:
    """[2, T]: this rank's parts of the jsd's KL(p_s || m) and KL(p_t || m); requires `chunk.set_global_lse`."""
    student, teacher, *sizes = _arguments(chunk)
    out, log_sum_exp = chunk.sums.new_empty(2, len(student)), chunk.maxima + chunk.log_norm
    _second_sums[(len(student),)](student, teacher, out, log_sum_exp, divergence.beta, *sizes, num_warps=8)
    return out


def write_gradient(chunk: Chunk, label_ids: Tensor, label_weights: Tensor, divergence: ForwardKL) -> None:
    """A chunk's last pass: write d loss / d logits_s over the student's logits. `label_weights` [T] are subtracted at
    `label_ids` [T]."""
    if isinstance(divergence, TopK) and chunk.logits[1] is not None:
        return _write_top_k_gradient(chunk, label_ids, label_weights, divergence)
    student, teacher, *sizes = _arguments(chunk)
    grid = len(label_ids), triton.cdiv(student.shape[1], GRADIENT_BLOCK.value)
    factors = _factors(chunk, divergence) if chunk.logits[1] is not None else chunk.scale[:2]
    beta = torch.full_like(label_weights, divergence.beta if isinstance(divergence, Jsd) else 0.0)
    values = torch.cat((chunk.maxima, chunk.scale, factors, label_weights[None], beta[None]))
    _gradient[grid](student, teacher, label_ids, values, *sizes, *_options(chunk, divergence), num_warps=4)


def _write_top_k_gradient(chunk: Chunk, label_ids: Tensor, label_weights: Tensor, divergence: TopK) -> None:
    """`write_gradient` for top-k. A tail entry's gradient is a multiple of the student's exponential: the kernel, in its form
    without a teacher, writes it to all entries, and the gradients of the top entries then overwrite it."""
    student, tokens = chunk.logits[0], slice(None)
    z = chunk.like(student.gather(1, divergence.indices))
    chosen = (z / chunk.temperature).sub_(chunk.maxima[0, :, None]).exp_().mul_(chunk.scale[0, :, None])
    chosen.sub_(divergence.teacher_probs(chunk, tokens, z.dtype))
    chosen.addcmul_(z.sub_(chunk.maxima[2, :, None]).exp_(), chunk.scale[2, :, None])
    chosen.sub_(torch.where(divergence.indices == label_ids[:, None], label_weights[:, None], 0))
    # Exponentials relative to the tail's maximum: relative to a top entry they might all be 0. Those that overflow are
    # overwritten.
    top = divergence.tail_maxima
    rest = replace(chunk, logits=(student, None, student), maxima=torch.stack((top, top, chunk.temperature * top)))
    top, _, top_1 = rest.maxima.double()
    of_tail = (top - chunk.lse[0]).exp() - divergence.mass_t * (top - divergence.tail_s).exp()
    rest.scale = chunk.like(chunk.weights * torch.stack((of_tail, of_tail, (top_1 - chunk.lse[2]).exp())))
    write_gradient(rest, label_ids, label_weights, divergence)
    divergence.put(tokens, student, chosen.to(student.dtype))


def _factors(chunk: Chunk, divergence: ForwardKL) -> Tensor:
    """[2, T], per-token input of the kernel `_gradient`: for reverse KL and jsd the difference between x_s - x_t and
    log p_s - log p_t, and the value; for mse and cosine the factors of the two logits."""
    weight, (norm_s, norm_t, _) = chunk.weights[0], chunk.log_norm
    match divergence:
        case ReverseKL():
            return torch.stack((norm_s - norm_t + divergence.kl, divergence.kl))
        case Jsd():
            return torch.stack((norm_t - norm_s, divergence.kl))
        case Mse():
            return (weight * (2 / divergence.vocab_size)).expand(2, -1).contiguous()
        case Cosine():
            return torch.stack((weight * divergence.student_factor, weight * divergence.teacher_factor))
    return chunk.scale[:2]


def _arguments(chunk: Chunk) -> tuple:
    student, teacher = chunk.logits[0], chunk.logits[1] if isinstance(chunk.logits[1], Tensor) else chunk.logits[0]
    assert student.is_contiguous() and teacher.is_contiguous(), "the kernels need contiguous logits"
    return student, teacher, student.shape[1], 1 / chunk.temperature


def _options(chunk: Chunk, divergence: ForwardKL) -> tuple[int, bool]:
    """KIND and HAS_TEMPERATURE."""
    kind = KINDS[type(divergence)] if isinstance(chunk.logits[1], Tensor) else NO_TEACHER
    return kind.value, chunk.temperature != 1
