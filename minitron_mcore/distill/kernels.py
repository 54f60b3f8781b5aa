"""The divergences' work between the matrix products as Triton kernels, for what `tiles.Tiles` otherwise does in torch.

This file alone imports triton; `tiles` imports it only where the kernels run: on CUDA, and on a CPU under Triton's interpreter
(TRITON_INTERPRET=1, set before anything imports triton).

Per element of a rank's logits, of b bytes in either model, `read` reads 2 b, and `write` reads 2 b and writes b: 10 bytes
in bf16, and no buffers but a few numbers a token. An H100 (3.35 TB/s) moves those of 8,192 tokens x 128,256 in 3.1 ms at best.
jsd and top-k read both once more. Top-k's `write` does not read the teacher's: torch works on the k entries of a token. Within a
row all is fp32, over blocks one after the other; what crosses ranks is fp64, as in `tiles`.

The kernels are compiled for one divergence each, `KIND`; what it sums and writes is in the table of `divergences`.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitron_mcore.distill.divergences import NEG_INF, Chunk, Cosine, ForwardKL, GivenTopK, Jsd, Mse, ReverseKL, TopK

FORWARD_KL, REVERSE_KL, JSD, MSE, COSINE, TOP_K = (tl.constexpr(kind) for kind in range(6))
KINDS = {
    ForwardKL: FORWARD_KL,
    ReverseKL: REVERSE_KL,
    Jsd: JSD,
    Mse: MSE,
    Cosine: COSINE,
    TopK: TOP_K,
    GivenTopK: TOP_K,
}
READ_BLOCK, WRITE_BLOCK = 4096, 2048
"""Entries of a row that a program holds at a time, powers of two: some 16 a thread."""


@triton.jit
def _read(
    student, teacher, out, num_tokens, width, stride_s, stride_t, inverse_t,
    KIND: tl.constexpr, HAS_TEACHER: tl.constexpr, WARM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is a token. out [10, T]: the three maxima and the three sums of `Chunk`, sum e_t x_t, and three of `KIND`, where
    x = (z - maximum) / temperature and e = exp(x): sum e_t (x_t - x_s) of the forward KL, sum e_s (x_s - x_t) of the reverse,
    sum (z_s - z_t)^2 of mse, the sums of z_s z_t, z_s^2 and z_t^2 of cosine."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    # The maximum of no entries is finite, so that it is a number beside a sum of 0.
    top_s, sum_s, sum_1 = -1e30, 0.0, 0.0
    top_t, sum_t, entropy, first, second, third = -1e30, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        z_s = tl.load(student + at, mask=inside, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top_s, tl.max(z_s, 0))
        x_s = z_s * inverse_t - top * inverse_t
        rise_s = top_s * inverse_t - top * inverse_t
        e_s, earlier_s = tl.exp(x_s), sum_s
        sum_s = sum_s * tl.exp(rise_s) + tl.sum(e_s, 0)
        if WARM:
            sum_1 = sum_1 * tl.exp(top_s - top) + tl.sum(tl.exp(z_s - top), 0)
        top_s = top
        if HAS_TEACHER:
            z_t = tl.load(teacher + at, mask=inside, other=-float("inf")).to(tl.float32)
            top = tl.maximum(top_t, tl.max(z_t, 0))
            x_t = z_t * inverse_t - top * inverse_t
            rise_t = top_t * inverse_t - top * inverse_t
            e_t = tl.exp(x_t)
            # What earlier blocks summed is moved to the new maxima, all their x_t by rise_t and x_s by rise_s. Outside the
            # row x is infinite, and no number times a weight of 0.
            entropy = tl.exp(rise_t) * (entropy + rise_t * sum_t) + tl.sum(tl.where(inside, e_t * x_t, 0.0), 0)
            if KIND == FORWARD_KL:
                ratio = tl.sum(tl.where(inside, e_t * (x_t - x_s), 0.0), 0)
                first = tl.exp(rise_t) * (first + (rise_t - rise_s) * sum_t) + ratio
            elif KIND == REVERSE_KL:
                ratio = tl.sum(tl.where(inside, e_s * (x_s - x_t), 0.0), 0)
                first = tl.exp(rise_s) * (first + (rise_s - rise_t) * earlier_s) + ratio
            elif KIND == MSE:
                difference = tl.where(inside, z_s - z_t, 0.0)
                first += tl.sum(difference * difference, 0)
            elif KIND == COSINE:
                z_s, z_t = tl.where(inside, z_s, 0.0), tl.where(inside, z_t, 0.0)
                first += tl.sum(z_s * z_t, 0)
                second += tl.sum(z_s * z_s, 0)
                third += tl.sum(z_t * z_t, 0)
            sum_t = sum_t * tl.exp(rise_t) + tl.sum(e_t, 0)
            top_t = top
    out += row
    tl.store(out, top_s * inverse_t)
    tl.store(out + num_tokens, top_t * inverse_t)
    tl.store(out + 2 * num_tokens, top_s)
    tl.store(out + 3 * num_tokens, sum_s)
    tl.store(out + 4 * num_tokens, sum_t)
    tl.store(out + 5 * num_tokens, sum_1 if WARM else sum_s)
    tl.store(out + 6 * num_tokens, entropy)
    tl.store(out + 7 * num_tokens, first)
    tl.store(out + 8 * num_tokens, second)
    tl.store(out + 9 * num_tokens, third)


@triton.jit
def _log_mixture(log_ratio, weight):
    """log(weight q / p + 1 - weight) from log(q / p), exact where p and q are close: expm1 and log1p by their series near 0. The
    interpreter does not have CUDA's."""
    r = tl.minimum(log_ratio, 80.0)  # exp of more would overflow
    series = r * (1 + r / 2 * (1 + r / 3 * (1 + r / 4 * (1 + r / 5 * (1 + r / 6 * (1 + r / 7))))))
    y = weight * tl.where(tl.abs(r) < 0.25, series, tl.exp(r) - 1)
    near = tl.abs(y) < 0.25
    s = tl.where(near, y / (2 + y), 0.0)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 / 9))))
    return tl.where(near, series, tl.log(1 + tl.where(near, 0.0, y)))


@triton.jit
def _read_again(
    student, teacher, out, largest, shift, beta, num_tokens, width, stride_s, stride_t, inverse_t, BLOCK: tl.constexpr
):
    """A program is a token. out [2, T]: this rank's parts of KL(p_s || m) and KL(p_t || m). `shift` [3, T] are the logs of the
    softmaxes' sums of exponentials above `largest`, over all ranks."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    base_s = tl.load(largest + row) + tl.load(shift + row)
    base_t = tl.load(largest + num_tokens + row) + tl.load(shift + num_tokens + row)
    kl_s, kl_t = 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        log_s = tl.load(student + at, mask=inside, other=0.0).to(tl.float32) * inverse_t - base_s
        log_t = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32) * inverse_t - base_t
        ratio = log_t - log_s
        kl_s -= tl.sum(tl.where(inside, tl.exp(log_s) * _log_mixture(ratio, beta), 0.0), 0)
        kl_t -= tl.sum(tl.where(inside, tl.exp(log_t) * _log_mixture(-ratio, 1 - beta), 0.0), 0)
    tl.store(out + row, kl_s)
    tl.store(out + num_tokens + row, kl_t)


@triton.jit
def _write(
    student, teacher, largest, scale, place, hit, factors, beta, num_tokens, width, stride_s, stride_t, inverse_t,
    KIND: tl.constexpr, HAS_TEACHER: tl.constexpr, WARM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is a block of a token's entries, and writes their gradient over the student's logits. `factors` [2, T] are those of
    `_factors`."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    largest += row
    scale += row
    factors += row
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    z_s = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
    x_s = z_s * inverse_t - tl.load(largest)
    e_s = tl.exp(x_s)
    e_1 = tl.exp(z_s - tl.load(largest + 2 * num_tokens)) if WARM else e_s
    of_lm = tl.load(scale + 2 * num_tokens) * e_1
    if not HAS_TEACHER:
        gradient = tl.load(scale) * e_s + of_lm
    else:
        z_t = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)
        x_t = z_t * inverse_t - tl.load(largest + num_tokens)
        if KIND == FORWARD_KL:
            gradient = tl.load(scale) * e_s + of_lm
            gradient -= tl.load(scale + num_tokens) * tl.exp(x_t)
        elif KIND == REVERSE_KL:
            gradient = tl.load(scale) * e_s * (x_s - x_t - tl.load(factors)) + of_lm
        elif KIND == JSD:
            mixture = _log_mixture(x_t - x_s - tl.load(factors), beta)
            gradient = tl.load(scale) * e_s * (beta - 1) * (mixture + tl.load(factors + num_tokens)) + of_lm
        else:
            gradient = tl.load(factors) * z_s - tl.load(factors + num_tokens) * z_t + of_lm
    gradient -= tl.where(at == tl.load(place + row), tl.load(hit + row), 0.0)
    tl.store(student + at, gradient.to(student.dtype.element_ty), mask=inside)


def read(chunk: Chunk, own: Tensor, divergence: ForwardKL) -> None:
    """A chunk's first pass: the chunk's maxima and sums of exponentials, and `own` [5 + n, T] (see `tiles.Tiles.run`) but for the
    label's logit and what a `Given` teacher has there."""
    out = _statistics(chunk, divergence)
    chunk.largest, chunk.sums, (entropy, *sums) = out[:3], out[3:6], out[6:]
    own[:3] = chunk.largest.double() + chunk.sums.double().log()
    if chunk.logits[1] is None:
        return
    sum_s, sum_t, _ = chunk.sums
    own[3] = sum_t.log() - entropy / sum_t
    match divergence:
        case ReverseKL():
            own[5] = sums[0] / sum_s + (sum_t / sum_s).log()
        case Cosine():
            own[5:] = out[7:]
        case Mse():
            own[5] = sums[0]
        case Jsd():
            pass
        case TopK():
            own[5:] = _read_top_k(chunk, divergence)
        case _:
            own[5] = sums[0] / sum_t + (sum_s / sum_t).log()


def _statistics(chunk: Chunk, divergence: ForwardKL) -> Tensor:
    """[10, T], by `_read`."""
    student, teacher, *rest = _arguments(chunk)
    out = chunk.sums.new_empty(10, len(student))
    options = *_options(chunk), READ_BLOCK
    _read[(len(student),)](student, teacher, out, *rest, _kind(divergence), *options, num_warps=8)
    return out


def _read_top_k(chunk: Chunk, divergence: TopK) -> Tensor:
    """What `TopK.read` gives. For the tails the kernel reads the logits once more, with -inf in the chosen places."""
    logits = [x.data for x in chunk.logits[:2] if isinstance(x, Tensor)]
    values = [x.gather(1, divergence.places) for x in logits]
    for x, chosen in zip(logits, values, strict=True):
        divergence.put(slice(None), x, torch.full_like(chosen, -math.inf))
    out = _statistics(chunk, divergence)
    for x, chosen in zip(logits, values, strict=True):
        x.scatter_(1, divergence.places, chosen)
    divergence.largest_of_tail = out[0]
    tails = (out[:2].double() + out[3:5].double().log()).clamp(min=NEG_INF)
    shifted = [chunk.like(x) / chunk.temperature - chunk.largest[n, :, None] for n, x in enumerate(values)]
    return divergence.sums(chunk, slice(None), shifted, tails[: len(logits)])


def read_again(chunk: Chunk, divergence: Jsd) -> Tensor:
    """[2, T]: this rank's parts of the two KLs of the jsd, once the chunk's softmaxes are known."""
    student, teacher, *rest = _arguments(chunk)
    out = chunk.sums.new_empty(2, student.shape[0])
    grid = (student.shape[0],)
    inputs = student, teacher, out, chunk.largest, chunk.log_norm, divergence.beta, *rest
    _read_again[grid](*inputs, BLOCK=WRITE_BLOCK, num_warps=8)
    return out


def write(chunk: Chunk, place: Tensor, hit: Tensor, divergence: ForwardKL) -> None:
    """A chunk's last pass: d loss / d logits over the student's logits; `hit` [T] is what the entry in `place` [T] loses."""
    if isinstance(divergence, TopK) and chunk.logits[1] is not None:
        return _write_top_k(chunk, place, hit, divergence)
    student, teacher, *rest = _arguments(chunk)
    grid = len(place), triton.cdiv(student.shape[1], WRITE_BLOCK)
    factors = _factors(chunk, divergence) if chunk.logits[1] is not None else chunk.scale
    beta = divergence.beta if isinstance(divergence, Jsd) else 0.0
    inputs = student, teacher, chunk.largest, chunk.scale, place, hit, factors, beta, *rest
    _write[grid](*inputs, _kind(divergence), *_options(chunk), BLOCK=WRITE_BLOCK, num_warps=4)


def _write_top_k(chunk: Chunk, place: Tensor, hit: Tensor, divergence: TopK) -> None:
    """`write`, where entries that are not chosen have a multiple of the student's exponentials as their gradient: the kernel writes
    that without a teacher to all, and what the chosen have goes over it."""
    student, every = chunk.logits[0], slice(None)
    z = chunk.like(student.gather(1, divergence.places))
    chosen = (z / chunk.temperature).sub_(chunk.largest[0, :, None]).exp_().mul_(chunk.scale[0, :, None])
    chosen.sub_(divergence.picked(chunk, every, z.dtype))
    chosen.addcmul_(z.sub_(chunk.largest[2, :, None]).exp_(), chunk.scale[2, :, None])
    chosen.sub_(torch.where(divergence.places == place[:, None], hit[:, None], 0))
    # Exponentials above the tail's largest logit: above a chosen one they may all be 0. What overflows is overwritten below.
    top = divergence.largest_of_tail
    rest = replace(chunk, logits=(student, None, student), largest=torch.stack((top, top, chunk.temperature * top)))
    top, _, top_1 = rest.largest.double()
    of_tail = (top - chunk.lse[0]).exp() - divergence.mass_t * (top - divergence.tail_s).exp()
    rest.scale = chunk.like(chunk.weights * torch.stack((of_tail, of_tail, (top_1 - chunk.lse[2]).exp())))
    write(rest, place, hit, divergence)
    divergence.put(every, student, chosen.to(student.dtype))


def _factors(chunk: Chunk, divergence: ForwardKL) -> Tensor:
    """[2, T], what `_write` takes of a token: of the KLs and jsd what x_s - x_t differs from the log-probabilities' difference by,
    and the value; of mse and cosine what the two logits are multiplied with."""
    weight, (norm_s, norm_t, _) = chunk.weights[0], chunk.log_norm
    match divergence:
        case ReverseKL():
            return torch.stack((norm_s - norm_t + divergence.kl, divergence.kl))
        case Jsd():
            return torch.stack((norm_t - norm_s, divergence.kl))
        case Mse():
            return (weight * (2 / divergence.vocab_size)).expand(2, -1).contiguous()
        case Cosine():
            return torch.stack((weight * divergence.along, weight * divergence.across))
    return chunk.scale


def _kind(divergence: ForwardKL) -> int:
    return KINDS[type(divergence)].value


def _arguments(chunk: Chunk) -> tuple:
    student, teacher = chunk.logits[0], chunk.logits[1] if isinstance(chunk.logits[1], Tensor) else chunk.logits[0]
    assert student.stride(1) == teacher.stride(1) == 1, "the kernels want rows without gaps"
    return student, teacher, *student.shape, student.stride(0), teacher.stride(0), 1 / chunk.temperature


def _options(chunk: Chunk) -> tuple[bool, bool]:
    return isinstance(chunk.logits[1], Tensor), chunk.temperature != 1
