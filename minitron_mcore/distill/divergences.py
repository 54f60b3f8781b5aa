"""The divergences between teacher and student: the sums over a rank's logits, the value, and the gradient.

p_t and p_s are softmax(z / temperature) of teacher and student over the whole vocabulary of V entries. For every token the ranks
exchange five fp64 numbers whatever the divergence (three log-sum-exps, the teacher's entropy, the label's logit), and:

    name         value                                           gradient in z_s / temperature        numbers
    forward_kl   sum p_t log(p_t / p_s)                          p_s - p_t                            1
    reverse_kl   sum p_s log(p_s / p_t)                          p_s (log(p_s / p_t) - value)         1
    jsd          beta KL(p_t || m) + (1 - beta) KL(p_s || m)     (1 - beta) p_s                       2, in a second
                 with m = beta p_t + (1 - beta) p_s                (log(p_s / m) - KL(p_s || m))        collective
    mse          sum (z_s - z_t)^2 / V                           2 (z_s - z_t) / V                    1
    cosine       1 - z_s z_t / (|z_s| |z_t|)                     (cos z_s / |z_s| - z_t / |z_t|)      3
                                                                   / |z_s|
    forward_kl   over k + 1 entries: the teacher's k largest     p_s - p_t in an entry of the k,      4, and k in a
    with top_k   and all others as one, the tail                 p_s (1 - tail_t / tail_s) elsewhere    collective before
    the same     from the teacher's k log-probabilities                                               3

Both KLs follow the same chain rule over ranks (see `losses`). JSD needs a second collective: its mixture m is of whole softmaxes,
so a rank's part depends on the global log-sum-exps. The collective of top-k determines which of the teacher's k largest entries
are on this rank. The tail is summed directly. jsd is that of Agarwal et al. (arXiv 2306.13649). mse and cosine use no temperature.

Against dense fp64, value and gradients are within 1e-5 of their largest element in fp32, for logits with a standard deviation of 3
and of 30. The exception is jsd's gradients: where teacher and student do not overlap they vanish, and lose as much to rounding
as a dense computation in fp32 does, 8e-5 at 10 and everything at 30. In bf16 most of the error is in the logits' rounding (2^-9
of their size): measured at a standard deviation of 3, as value / gradients, 1e-4 / 7e-3 forward KL, 4e-4 / 1.1e-2 reverse KL,
5e-5 / 8e-3 jsd, 3e-5 / 4e-3 mse, 2e-5 / 3e-3 cosine, 6e-4 / 1.5e-2 top-k (rounding changes the top k).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mcore.config.settings import Divergence
from minitron_mcore.distill.loss_config import LossConfig

# Log-sum-exp of a rank that holds none of the entries: finite, and so small that its weight is exactly 0.
NEG_INF = -1e30
# exp of more would overflow in fp32; an entry that one model gives e^-80 of the other's probability adds nothing to its sum.
_MAX_LOG_RATIO = 80.0


@dataclass(frozen=True)
class FactoredLogits:
    """Logits [T, V_r] as the product of `hidden` [T, H] and the transposed output head [V_r, H]."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class TopKLogProbs:
    """A teacher's k largest entries of each token at temperature 1, the same on all tensor-parallel ranks."""

    ids: Tensor
    """[T, k] int64, below the vocabulary's size, distinct within a token."""
    log_probs: Tensor
    """[T, k]"""
    log_tail: Tensor
    """[T]: log of the probability of all other entries."""

    def chunk(self, tokens: slice, ignored: Tensor) -> "TopKLogProbs":
        """The entries of `tokens`, with finite values where `ignored` [T, 1]."""
        log_probs = self.log_probs[tokens].masked_fill(ignored[tokens], NEG_INF).clamp(min=NEG_INF)
        log_tail = self.log_tail[tokens].masked_fill(ignored[tokens, 0], 0).clamp(min=NEG_INF)
        return TopKLogProbs(self.ids[tokens], log_probs, log_tail)

    def entropy(self) -> Tensor:
        """[T] fp64, of the k + 1 entries."""
        entries = torch.cat((self.log_probs, self.log_tail[:, None]), 1).double()
        return -(entries.exp() * entries).sum(1)


@dataclass
class Chunk:
    """Some tokens' logits on this rank and their softmaxes: 0 the student's, 1 the teacher's, 2 the student's at temperature 1.

    `set_global_lse` adds the values over all ranks. These are fp64: a log-sum-exp is as large as the logits, but only small
    differences of log-sum-exps are used.
    """

    logits: tuple[Tensor, Tensor | TopKLogProbs | None, Tensor]
    temperature: float
    weights: Tensor
    """[3, T]: of the divergence, of the divergence, of the LM loss."""
    maxima: Tensor
    """[3, T]: maximum of logits / temperature over this rank's entries."""
    sums: Tensor
    """[3, T]: sum over this rank's entries of exp(logits / temperature - maximum)."""

    def set_global_lse(self, local_lse: Tensor, rank: int) -> None:
        """`local_lse` [TP, 3, T]: the log-sum-exps of all ranks' entries."""
        self.lse = local_lse.logsumexp(0)
        self.log_share = local_lse - self.lse  # log of each rank's part of the three softmaxes
        self.share = self.log_share.exp()
        self.scale = self.like(self.weights * self.share[rank] / self.sums)
        self.log_norm = self.like(self.sums.double().log() - self.log_share[rank])

    def like(self, x: Tensor) -> Tensor:
        """x in the dtype of the computations on logits."""
        return x.to(self.sums.dtype)

    def shift(self, n: int, tokens: slice, out: Tensor) -> Tensor:
        """out := logits / temperature - their maximum."""
        temperature = 1.0 if n == 2 else self.temperature
        return scaled(self.logits[n][tokens], temperature, out).sub_(self.maxima[n, tokens, None])

    def exponentials(self, n: int, tokens: slice, out: Tensor) -> Tensor:
        return self.shift(n, tokens, out).exp_()

    def log_softmax(self, n: int, tokens: slice, out: Tensor) -> Tensor:
        """out := log p over the whole vocabulary; requires `set_global_lse`."""
        return self.shift(n, tokens, out).sub_(self.log_norm[n, tokens, None])


def scaled(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """out := logits / temperature."""
    out.copy_(logits)
    return out if temperature == 1 else out.div_(temperature)


class ForwardKL:
    """The interface of a divergence, and its default implementation.

    Methods process the tokens `tokens` of a chunk, a tile, in four buffers [T, V_r]: the shifted logits x and their exponentials e
    of student and teacher. `value` keeps in the object what `gradient` needs. One object serves all chunks of a call in turn.
    """

    empty_sums: tuple[float, ...] = (0.0,)
    """`local_sums` of a rank that holds only padding."""
    num_second_sums = 0
    """Rows n of `second_sums(chunk, tokens, x_s, e_s, x_t, e_t)` [n, T], a pass with known global log-sum-exps."""
    uses_softmax = True
    """`gradient` computes the student's softmax, and at temperature 1 adds the LM loss's gradient, which needs the same
    softmax."""

    def __init__(self, vocab_size: int, jsd_beta: float, top_k: int | None, adds_lm: bool):
        self.vocab_size, self.beta, self.k, self.adds_lm = vocab_size, jsd_beta, top_k, adds_lm

    def start(self, logits_t: Tensor, gather: Callable[[Tensor], Tensor], rank: int) -> None:
        """Prepare for a chunk (collective where a subclass calls `gather`, local -> [TP, ...])."""

    def local_sums(self, chunk: Chunk, tokens: slice, x_s: Tensor, e_s: Tensor, x_t: Tensor, e_t: Tensor) -> Tensor:
        """This rank's sums [n, T]; may overwrite x_s and e_s."""
        sums = chunk.sums[:, tokens]
        return (torch.sub(x_t, x_s, out=x_s).mul_(e_t).sum(-1) / sums[1] + (sums[0] / sums[1]).log())[None]

    def value(self, chunk: Chunk, all_sums: Tensor, second: Tensor | None) -> Tensor:
        """The divergence [T], from all ranks' `local_sums` [TP, n, T] and the sum over ranks of `second_sums`."""
        return (chunk.share[:, 1] * (all_sums[:, 0] + chunk.log_share[:, 1] - chunk.log_share[:, 0])).sum(0)

    def gradient(self, chunk: Chunk, tokens: slice, total: Tensor, term: Tensor) -> None:
        """total := the weighted divergence's term of d loss / d logits_s, plus the LM loss's softmax where `adds_lm`."""
        self._student_probs(chunk, tokens, total)
        total.addcmul_(chunk.exponentials(1, tokens, term), chunk.scale[1, tokens, None], value=-1)

    def _student_probs(self, chunk: Chunk, tokens: slice, total: Tensor) -> None:
        scale = chunk.scale[0] + chunk.scale[2] if self.adds_lm else chunk.scale[0]
        chunk.exponentials(0, tokens, total).mul_(scale[tokens, None])

    def _times_student_probs(
        self, chunk: Chunk, tokens: slice, total: Tensor, factor: Tensor | float, log_p: Tensor
    ) -> None:
        """total := p_s (weight factor total + the LM loss's weight where `adds_lm`)."""
        total.mul_((chunk.weights[0, tokens] * factor)[:, None])
        if self.adds_lm:
            total.add_(chunk.weights[2, tokens, None])
        total.mul_(log_p.exp_())


class ReverseKL(ForwardKL):
    """KL(p_s || p_t)."""

    def local_sums(self, chunk, tokens, x_s, e_s, x_t, e_t):
        sums = chunk.sums[:, tokens]
        return (torch.sub(x_s, x_t, out=x_s).mul_(e_s).sum(-1) / sums[0] + (sums[1] / sums[0]).log())[None]

    def value(self, chunk, all_sums, second):
        kl = (chunk.share[:, 0] * (all_sums[:, 0] + chunk.log_share[:, 0] - chunk.log_share[:, 1])).sum(0)
        self.kl = chunk.like(kl)
        return kl

    def gradient(self, chunk, tokens, total, term):
        log_p = chunk.log_softmax(0, tokens, term)
        chunk.log_softmax(1, tokens, total).add_(self.kl[tokens, None]).sub_(log_p)
        self._times_student_probs(chunk, tokens, total, -1.0, log_p)


class Jsd(ForwardKL):
    """The generalised Jensen-Shannon divergence."""

    empty_sums, num_second_sums = (), 2

    def local_sums(self, chunk, tokens, x_s, e_s, x_t, e_t):
        return chunk.sums[:0, tokens]

    def second_sums(self, chunk, tokens, x_s, e_s, x_t, e_t):
        log_s, log_t = chunk.log_softmax(0, tokens, x_s), chunk.log_softmax(1, tokens, x_t)
        ratio = torch.sub(log_t, log_s, out=e_t)
        kl_s = -_log_mixture(ratio, self.beta, e_s).mul_(log_s.exp_()).sum(-1)
        kl_t = -_log_mixture(ratio.neg_(), 1 - self.beta, e_s).mul_(log_t.exp_()).sum(-1)
        return torch.stack((kl_s, kl_t))

    def value(self, chunk, all_sums, second):
        kl_s, kl_t = second
        self.kl = chunk.like(kl_s)
        return self.beta * kl_t + (1 - self.beta) * kl_s

    def gradient(self, chunk, tokens, total, term):
        log_p = chunk.log_softmax(0, tokens, term)
        ratio = chunk.log_softmax(1, tokens, total).sub_(log_p)
        _log_mixture(ratio, self.beta, total).add_(self.kl[tokens, None])
        self._times_student_probs(chunk, tokens, total, self.beta - 1, log_p)


def _log_mixture(log_ratio: Tensor, weight: float, out: Tensor) -> Tensor:
    """out := log(weight q / p + 1 - weight) from log(q / p); exact where p and q are close."""
    return torch.clamp(log_ratio, max=_MAX_LOG_RATIO, out=out).expm1_().mul_(weight).log1p_()


class Mse(ForwardKL):
    """Mean squared difference of the logits."""

    uses_softmax = False

    def local_sums(self, chunk, tokens, x_s, e_s, x_t, e_t):
        difference = self._difference(chunk, tokens, x_s)
        return torch.mul(difference, difference, out=e_s).sum(-1)[None]

    def value(self, chunk, all_sums, second):
        return all_sums[:, 0].sum(0) / self.vocab_size

    def gradient(self, chunk, tokens, total, term):
        self._difference(chunk, tokens, total).mul_(chunk.weights[0, tokens, None] * (2 / self.vocab_size))

    @staticmethod
    def _difference(chunk: Chunk, tokens: slice, out: Tensor) -> Tensor:
        return out.copy_(chunk.logits[0][tokens]).sub_(chunk.logits[1][tokens])


class Cosine(ForwardKL):
    """1 - cosine of the logits. The value has the rounding error of 1 - cos, about 1e-7 in fp32; the gradient does not."""

    empty_sums = 0.0, 0.0, 0.0
    uses_softmax = False

    def local_sums(self, chunk, tokens, x_s, e_s, x_t, e_t):
        student = x_s.copy_(chunk.logits[0][tokens])
        square = torch.mul(student, student, out=e_s).sum(-1)
        teacher = e_s.copy_(chunk.logits[1][tokens])
        product = student.mul_(teacher).sum(-1)
        return torch.stack((product, square, teacher.square_().sum(-1)))

    def value(self, chunk, all_sums, second):
        product, student, teacher = all_sums.sum(0)
        # For logits that are all 0: cosine 0 and a finite gradient.
        student, norms = student.clamp(min=1e-12), (student * teacher).clamp(min=1e-12).sqrt()
        cosine = product / norms
        self.student_factor, self.teacher_factor = chunk.like(cosine / student), chunk.like(1 / norms)
        return 1 - cosine

    def gradient(self, chunk, tokens, total, term):
        weight = chunk.weights[0, tokens]
        total.copy_(chunk.logits[0][tokens]).mul_((weight * self.student_factor[tokens])[:, None])
        total.addcmul_(term.copy_(chunk.logits[1][tokens]), (weight * self.teacher_factor[tokens])[:, None], value=-1)


class TopK(ForwardKL):
    """Forward KL over the teacher's k largest logits of all ranks and the tail. Ties at the k-th logit are broken arbitrarily.

    `start` sets `indices` [T, k], this rank's k largest teacher logits; `is_top` [T, k], those among the k largest of all
    ranks; and `writable`, the entries that `put` may overwrite. Where indices repeat, equal values are written.
    """

    empty_sums = 0.0, 0.0, NEG_INF, NEG_INF

    def start(self, logits_t, gather, rank):
        values, self.indices = logits_t.topk(min(self.k, logits_t.shape[1]))
        values = torch.nn.functional.pad(values, (0, self.k - values.shape[1]), value=-math.inf)
        candidates = gather(values.to(torch.promote_types(values.dtype, torch.float32))).transpose(0, 1).flatten(1)
        # A stable sort keeps the order of a rank's entries: its first `counts` entries are in the top k.
        first = candidates.sort(dim=-1, descending=True, stable=True).indices[:, : self.k]
        counts = (first // self.k == rank).sum(-1, keepdim=True)
        self.is_top = self.writable = torch.arange(self.indices.shape[1], device=counts.device) < counts

    def local_sums(self, chunk, tokens, x_s, e_s, x_t, e_t):
        shifted, maxima = [x.gather(1, self.indices[tokens]) for x in (x_s, x_t)], chunk.maxima[:, tokens].double()
        tail_s = maxima[0] + self._tail_lse(tokens, x_s)
        return self.top_sums(chunk, tokens, shifted, (tail_s, maxima[1] + self._tail_lse(tokens, x_s.copy_(x_t))))

    def top_sums(self, chunk: Chunk, tokens: slice, shifted: Sequence[Tensor], tails: Sequence[Tensor]) -> Tensor:
        """`local_sums` from the shifted logits [T, k] at `indices` and the tails' log-sum-exps [T], fp64.

        Both are of the student, then of the teacher unless it is `TopKLogProbs`.
        """
        log_s, log_t = shifted[0] - chunk.sums[0, tokens, None].log(), self._log_teacher(chunk, tokens, shifted)
        p = torch.where(self.is_top[tokens], log_t.exp(), 0)
        return torch.stack((p.mul(log_t - log_s).sum(-1).double(), p.sum(-1).double(), *tails))

    def _log_teacher(self, chunk: Chunk, tokens: slice, shifted: Sequence[Tensor]) -> Tensor:
        return shifted[1] - chunk.sums[1, tokens, None].log()

    def _tail_lse(self, tokens: slice, x: Tensor) -> Tensor:
        """[T]: log-sum-exp of the entries outside the top k; overwrites x."""
        self.put(tokens, x, torch.full_like(self.indices[tokens], -math.inf, dtype=x.dtype))
        maxima = x.amax(-1).clamp(min=NEG_INF)
        return (x.sub_(maxima[:, None]).exp_().sum(-1).log() + maxima).clamp(min=NEG_INF)

    def put(self, tokens: slice, x: Tensor, values: Tensor) -> None:
        """Write `values` [T, k] into x [T, V_r] at the top entries of this rank."""
        indices = self.indices[tokens]
        x.scatter_(1, indices, torch.where(self.writable[tokens], values, x.gather(1, indices)))

    def value(self, chunk, all_sums, second):
        kl, mass, tail_s, tail_t = all_sums.unbind(1)
        top = chunk.share[:, 1] * (kl + mass * (chunk.log_share[:, 1] - chunk.log_share[:, 0]))
        return top.sum(0) + self._tail_value(chunk, tail_s, tail_t.logsumexp(0) - chunk.lse[1])

    def _tail_value(self, chunk: Chunk, tail_s: Tensor, log_t: Tensor) -> Tensor:
        """The tail's term of the divergence.

        `tail_s` [TP, T]: log-sum-exps of the student's tail on each rank; `log_t` [T]: log of the teacher's probability of the
        tail.
        """
        tail_s, mass_t = tail_s.logsumexp(0), log_t.exp()
        self.tail_s, self.mass_t = tail_s, mass_t
        return mass_t * (log_t - (tail_s - chunk.lse[0]))

    def gradient(self, chunk, tokens, total, term):
        self._student_probs(chunk, tokens, total)
        # Subtract the target: the teacher's probabilities in the top k; in the tail the student's shape with the teacher's mass.
        above = chunk.like(chunk.maxima[0, tokens] - self.tail_s[tokens])
        chunk.shift(0, tokens, term).add_(above[:, None]).clamp_(max=0).exp_()
        term.mul_(chunk.like(chunk.weights[0, tokens] * self.mass_t[tokens])[:, None])
        self.put(tokens, term, self.teacher_probs(chunk, tokens, total.dtype))
        total.sub_(term)

    def teacher_probs(self, chunk: Chunk, tokens: slice, dtype: torch.dtype) -> Tensor:
        """[T, k]: the teacher's probabilities at `indices`, times the weight of the divergence."""
        logits = chunk.logits[1][tokens].gather(1, self.indices[tokens]).to(dtype) / chunk.temperature
        return (logits - chunk.maxima[1, tokens, None]).exp() * chunk.scale[1, tokens, None]


class TopKOfLogProbs(TopK):
    """TopK at temperature 1 with the teacher's entries as `TopKLogProbs`.

    The teacher's log-sum-exp is 0 on rank 0 and `NEG_INF` elsewhere, so that the sums over ranks count it once; likewise its
    entropy.
    """

    empty_sums = 0.0, 0.0, NEG_INF

    def __init__(self, first: int, width: int):
        """`first`, `width`: this rank's entries of the vocabulary."""
        self.first, self.width, self.adds_lm = first, width, True

    def start(self, logits_t, gather, rank):
        self.teacher, indices = logits_t, logits_t.ids - self.first
        self.is_top = (indices >= 0) & (indices < self.width)
        # An entry of another rank is replaced by one of this rank, or, in a row without any, by one that is not writable.
        # (Selecting this rank's entries would give a tensor whose size depends on the data, and the host would wait for the
        # device.)
        self.writable = self.is_top.any(1, keepdim=True)
        positions = torch.arange(indices.shape[1], device=indices.device)
        entry = torch.where(self.is_top, positions, self.is_top.int().argmax(1, keepdim=True))
        self.indices = indices.gather(1, entry).clamp(0, max(self.width - 1, 0))
        self.log_probs = logits_t.log_probs.gather(1, entry)

    def local_sums(self, chunk, tokens, x_s, e_s, x_t, e_t):
        shifted = x_s.gather(1, self.indices[tokens])
        tail_s = chunk.maxima[0, tokens].double() + self._tail_lse(tokens, x_s)
        return self.top_sums(chunk, tokens, [shifted], [tail_s])

    def _log_teacher(self, chunk, tokens, shifted):
        return self.log_probs[tokens]

    def value(self, chunk, all_sums, second):
        kl, mass, tail_s = all_sums.unbind(1)
        top = kl - mass * chunk.log_share[:, 0]
        return top.sum(0) + self._tail_value(chunk, tail_s, self.teacher.log_tail.double())

    def teacher_probs(self, chunk, tokens, dtype):
        return self.log_probs[tokens].exp().to(dtype) * chunk.weights[0, tokens, None]


KINDS = {
    Divergence.forward_kl: ForwardKL,
    Divergence.reverse_kl: ReverseKL,
    Divergence.jsd: Jsd,
    Divergence.mse: Mse,
    Divergence.cosine: Cosine,
}


def make(config: LossConfig, vocab_size: int) -> ForwardKL:
    """The divergence of `config` between a student and a teacher with logits."""
    kind = TopK if config.top_k else KINDS[config.divergence]
    return kind(vocab_size, config.jsd_beta, config.top_k, adds_lm=kind.uses_softmax and config.temperature == 1)
