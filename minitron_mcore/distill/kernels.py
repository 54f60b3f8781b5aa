"""The forward KL's work between the matrix products as two Triton kernels, for what `tiles.Tiles` otherwise does in torch.

This file alone imports triton; `tiles` imports it only where the kernels run: on CUDA, and on a CPU under Triton's interpreter
(TRITON_INTERPRET=1, set before anything imports triton).

Per element of a rank's logits, of b bytes in either model, `read` reads 2 b, and `write` reads 2 b and writes b: 10 bytes
in bf16, and no buffers but a few numbers a token. An H100 (3.35 TB/s) moves those of 8,192 tokens x 128,256 in 3.1 ms at best.
Within a row all is fp32, over blocks one after the other; what crosses ranks is fp64, as in `tiles`.
"""

import triton
import triton.language as tl
from torch import Tensor

from minitron_mcore.distill.divergences import Chunk

READ_BLOCK, WRITE_BLOCK = 4096, 2048
"""Entries of a row that a program holds at a time, powers of two: some 16 a thread."""


@triton.jit
def _read(
    student, teacher, out, num_tokens, width, stride_s, stride_t, inverse_t,
    HAS_TEACHER: tl.constexpr, WARM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is a token. out [8, T]: the three maxima and the three sums of `Chunk`, sum e_t x_t, sum e_t (x_t - x_s), where
    x = (logits - maximum) / temperature and e = exp(x)."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    # The maximum of no entries is finite, so that it is a number beside a sum of 0.
    top_s, sum_s, sum_1 = -1e30, 0.0, 0.0
    top_t, sum_t, entropy, kl = -1e30, 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        z = tl.load(student + at, mask=inside, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top_s, tl.max(z, 0))
        x_s = z * inverse_t - top * inverse_t
        rise_s = top_s * inverse_t - top * inverse_t
        sum_s = sum_s * tl.exp(rise_s) + tl.sum(tl.exp(x_s), 0)
        if WARM:
            sum_1 = sum_1 * tl.exp(top_s - top) + tl.sum(tl.exp(z - top), 0)
        top_s = top
        if HAS_TEACHER:
            z = tl.load(teacher + at, mask=inside, other=-float("inf")).to(tl.float32)
            top = tl.maximum(top_t, tl.max(z, 0))
            x_t = z * inverse_t - top * inverse_t
            rise_t = top_t * inverse_t - top * inverse_t
            e_t = tl.exp(x_t)
            # What earlier blocks summed is moved to the new maxima, all their x_t by rise_t and x_s by rise_s. Outside the
            # row x is infinite, and no number times a weight of 0.
            entropy = tl.exp(rise_t) * (entropy + rise_t * sum_t) + tl.sum(tl.where(inside, e_t * x_t, 0.0), 0)
            ratio = tl.sum(tl.where(inside, e_t * (x_t - x_s), 0.0), 0)
            kl = tl.exp(rise_t) * (kl + (rise_t - rise_s) * sum_t) + ratio
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
    tl.store(out + 7 * num_tokens, kl)


@triton.jit
def _write(
    student, teacher, largest, scale, place, hit, num_tokens, width, stride_s, stride_t, inverse_t,
    HAS_TEACHER: tl.constexpr, WARM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is a block of a token's entries, and writes their gradient over the student's logits."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    largest += row
    scale += row
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    z = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
    e_s = tl.exp(z * inverse_t - tl.load(largest))
    e_1 = tl.exp(z - tl.load(largest + 2 * num_tokens)) if WARM else e_s
    gradient = tl.load(scale) * e_s + tl.load(scale + 2 * num_tokens) * e_1
    if HAS_TEACHER:
        z = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)
        gradient -= tl.load(scale + num_tokens) * tl.exp(z * inverse_t - tl.load(largest + num_tokens))
    gradient -= tl.where(at == tl.load(place + row), tl.load(hit + row), 0.0)
    tl.store(student + at, gradient.to(student.dtype.element_ty), mask=inside)


def read(chunk: Chunk, own: Tensor) -> None:
    """A chunk's first pass: the chunk's maxima and sums of exponentials, and `own` [6, T] (see `tiles.Tiles.run`) but for the
    label's logit."""
    out = chunk.sums.new_empty(8, own.shape[1])
    student, teacher, *rest = _arguments(chunk)
    _read[(own.shape[1],)](student, teacher, out, *rest, BLOCK=READ_BLOCK, num_warps=8)
    chunk.largest, chunk.sums, (entropy, kl) = out[:3], out[3:6], out[6:]
    own[:3] = chunk.largest.double() + chunk.sums.double().log()
    if chunk.logits[1] is not None:
        sum_s, sum_t, _ = chunk.sums
        own[3] = sum_t.log() - entropy / sum_t
        own[5] = kl / sum_t + (sum_s / sum_t).log()


def write(chunk: Chunk, place: Tensor, hit: Tensor) -> None:
    """A chunk's second pass: d loss / d logits over the student's logits; `hit` [T] is what the entry in `place` [T] loses."""
    student, teacher, *rest = _arguments(chunk)
    grid = len(place), triton.cdiv(student.shape[1], WRITE_BLOCK)
    _write[grid](student, teacher, chunk.largest, chunk.scale, place, hit, *rest, BLOCK=WRITE_BLOCK, num_warps=4)


def _arguments(chunk: Chunk) -> tuple:
    student, teacher = chunk.logits[0], chunk.logits[0] if chunk.logits[1] is None else chunk.logits[1]
    assert student.stride(1) == teacher.stride(1) == 1, "the kernels want rows without gaps"
    sizes = *student.shape, student.stride(0), teacher.stride(0), 1 / chunk.temperature
    return student, teacher, *sizes, chunk.logits[1] is not None, chunk.temperature != 1
