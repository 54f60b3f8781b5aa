"""The divergences between teacher and student: what each sums over a rank's logits, and the gradient that it writes over them.

p_t and p_s are softmax(z / temperature) of teacher and student over the whole vocabulary of V entries. Of every token the
ranks exchange five fp64 numbers for any of them (three log-sum-exps, the teacher's entropy, the label's logit) and, beside these:

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
    the same,    where these of the teacher are given                                                 3

Both KLs follow the same chain rule over ranks (see `losses`). m is a mixture of whole softmaxes, so a rank can't take its part
of a JSD before it knows the global log-sum-exps: hence the second collective. That of top-k finds which of the teacher's k
largest are on this rank; the tail is summed apart, not as what is left of 1. jsd is the generalised Jensen-Shannon divergence of
Agarwal et al. (arXiv 2306.13649). mse and cosine are of the logits as they are.

Against dense fp64, value and gradients are within 1e-5 of their largest element in fp32, for logits with a standard deviation of 3
and of 30, but for jsd's gradients: where teacher and student have nothing in common they vanish, and lose as much to rounding as a
dense computation in fp32 does, 8e-5 at 10 and everything at 30. In bf16 most of the error is in the logits' rounding (2^-9 of
their size): measured at a standard deviation of 3, as value / gradients, 1e-4 / 7e-3 forward KL, 4e-4 / 1.1e-2 reverse KL,
5e-5 / 8e-3 jsd, 3e-5 / 4e-3 mse, 2e-5 / 3e-3 cosine, 6e-4 / 1.5e-2 top-k, where entries at the border change sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mcore.config.settings import Divergence

# Log-sum-exp of a rank that holds none of the entries: finite, and so far below any other that its weight is exactly 0.
NEG_INF = -1e30
# exp of more would overflow in fp32; an entry that one side gives e^-80 of the other's probability adds nothing on that side.
_FAR = 80.0


@dataclass
class Chunk:
    """Some tokens' logits on this rank and their softmaxes: 0 the student's, 1 the teacher's, 2 the student's at temperature 1.

    `largest` and `sums` [3, T] are of this rank's entries: the maximum of logits / temperature, and the sum of exponentials
    above it. `exchanged` adds what all ranks know, in fp64: a log-sum-exp is as large as the logits, and what is read off their
    differences is not.
    """

    logits: tuple[Tensor, "Tensor | Given | None", Tensor]
    temperature: float
    weights: Tensor
    """[3, T]: of the divergence, again of the divergence, of the LM loss."""
    largest: Tensor
    sums: Tensor

    def exchanged(self, lse: Tensor, rank: int) -> None:
        """`lse` [TP, 3, T]: the log-sum-exps of all ranks' entries."""
        self.lse = lse.logsumexp(0)
        self.log_share = lse - self.lse  # how much of each of the three softmaxes each rank holds
        self.share = self.log_share.exp()
        self.scale = self.like(self.weights * self.share[rank] / self.sums)
        self.log_norm = self.like(self.sums.double().log() - self.log_share[rank])

    def like(self, x: Tensor) -> Tensor:
        """x in the precision of what is done to every logit."""
        return x.to(self.sums.dtype)

    def shift(self, n: int, at: slice, out: Tensor) -> Tensor:
        """out := logits / temperature - their maximum."""
        return scaled(self.logits[n][at], 1.0 if n == 2 else self.temperature, out).sub_(self.largest[n, at, None])

    def exponentials(self, n: int, at: slice, out: Tensor) -> Tensor:
        return self.shift(n, at, out).exp_()

    def log_softmax(self, n: int, at: slice, out: Tensor) -> Tensor:
        """out := log p over the whole vocabulary; only when `exchanged`."""
        return self.shift(n, at, out).sub_(self.log_norm[n, at, None])


def scaled(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """out := logits / temperature."""
    out.copy_(logits)
    return out if temperature == 1 else out.div_(temperature)


class ForwardKL:
    """What the loss asks of a divergence; this one is the default.

    A tile is the tokens `at` of a chunk, in four buffers [T, V_r]: x and e are a softmax's shifted logits and their
    exponentials. The object keeps from `value` what `write` needs of a chunk.
    """

    of_nothing: tuple[float, ...] = (0.0,)
    """The sums of a rank that holds only padding; as many as `read` gives."""
    num_again = 0
    """Sums [num_again, T] of `read_again(chunk, at, x_s, e_s, x_t, e_t)`, a second pass when the softmaxes are known."""
    on_softmax = True
    """`write` forms the student's softmax; at temperature 1 it then adds the LM loss's, which is the same, on the way."""

    def __init__(self, vocab_size: int, jsd_beta: float, top_k: int | None, joint: bool):
        self.vocab_size, self.beta, self.k, self.joint = vocab_size, jsd_beta, top_k, joint

    def start(self, logits_t: Tensor, gather: Callable[[Tensor], Tensor], rank: int) -> None:
        """Before a chunk is read, collective where something crosses ranks here."""

    def read(self, chunk: Chunk, at: slice, x_s: Tensor, e_s: Tensor, x_t: Tensor, e_t: Tensor) -> Tensor:
        """This rank's own sums [n, T]; x_s and e_s may be overwritten."""
        sums = chunk.sums[:, at]
        return (torch.sub(x_t, x_s, out=x_s).mul_(e_t).sum(-1) / sums[1] + (sums[0] / sums[1]).log())[None]

    def value(self, chunk: Chunk, own: Tensor, again: Tensor | None) -> Tensor:
        """[T], from all ranks' sums: `own` [TP, n, T], `again` already added up."""
        return (chunk.share[:, 1] * (own[:, 0] + chunk.log_share[:, 1] - chunk.log_share[:, 0])).sum(0)

    def write(self, chunk: Chunk, at: slice, total: Tensor, term: Tensor) -> None:
        """total := d loss / d logits_s of the divergence times temperature / temperature^2 and its weight."""
        self._student(chunk, at, total)
        total.addcmul_(chunk.exponentials(1, at, term), chunk.scale[1, at, None], value=-1)

    def _student(self, chunk: Chunk, at: slice, total: Tensor) -> None:
        scale = chunk.scale[0] + chunk.scale[2] if self.joint else chunk.scale[0]
        chunk.exponentials(0, at, total).mul_(scale[at, None])

    def _times_student(self, chunk: Chunk, at: slice, total: Tensor, factor: Tensor | float, log_p: Tensor) -> None:
        """total := p_s (weight factor total + the LM loss's weight)."""
        total.mul_((chunk.weights[0, at] * factor)[:, None])
        if self.joint:
            total.add_(chunk.weights[2, at, None])
        total.mul_(log_p.exp_())


class ReverseKL(ForwardKL):
    def read(self, chunk, at, x_s, e_s, x_t, e_t):
        sums = chunk.sums[:, at]
        return (torch.sub(x_s, x_t, out=x_s).mul_(e_s).sum(-1) / sums[0] + (sums[1] / sums[0]).log())[None]

    def value(self, chunk, own, again):
        kl = (chunk.share[:, 0] * (own[:, 0] + chunk.log_share[:, 0] - chunk.log_share[:, 1])).sum(0)
        self.kl = chunk.like(kl)
        return kl

    def write(self, chunk, at, total, term):
        log_p = chunk.log_softmax(0, at, term)
        chunk.log_softmax(1, at, total).add_(self.kl[at, None]).sub_(log_p)
        self._times_student(chunk, at, total, -1.0, log_p)


class Jsd(ForwardKL):
    of_nothing, num_again = (), 2

    def read(self, chunk, at, x_s, e_s, x_t, e_t):
        return chunk.sums[:0, at]

    def read_again(self, chunk, at, x_s, e_s, x_t, e_t):
        log_s, log_t = chunk.log_softmax(0, at, x_s), chunk.log_softmax(1, at, x_t)
        ratio = torch.sub(log_t, log_s, out=e_t)
        kl_s = -_log_mixture(ratio, self.beta, e_s).mul_(log_s.exp_()).sum(-1)
        kl_t = -_log_mixture(ratio.neg_(), 1 - self.beta, e_s).mul_(log_t.exp_()).sum(-1)
        return torch.stack((kl_s, kl_t))

    def value(self, chunk, own, again):
        kl_s, kl_t = again
        self.kl = chunk.like(kl_s)
        return self.beta * kl_t + (1 - self.beta) * kl_s

    def write(self, chunk, at, total, term):
        log_p = chunk.log_softmax(0, at, term)
        ratio = chunk.log_softmax(1, at, total).sub_(log_p)
        _log_mixture(ratio, self.beta, total).add_(self.kl[at, None])
        self._times_student(chunk, at, total, self.beta - 1, log_p)


def _log_mixture(log_ratio: Tensor, weight: float, out: Tensor) -> Tensor:
    """out := log(weight q / p + 1 - weight) from log(q / p); exact where p and q are close."""
    return torch.clamp(log_ratio, max=_FAR, out=out).expm1_().mul_(weight).log1p_()


class Mse(ForwardKL):
    on_softmax = False

    def read(self, chunk, at, x_s, e_s, x_t, e_t):
        difference = self._difference(chunk, at, x_s)
        return torch.mul(difference, difference, out=e_s).sum(-1)[None]

    def value(self, chunk, own, again):
        return own[:, 0].sum(0) / self.vocab_size

    def write(self, chunk, at, total, term):
        self._difference(chunk, at, total).mul_(chunk.weights[0, at, None] * (2 / self.vocab_size))

    @staticmethod
    def _difference(chunk: Chunk, at: slice, out: Tensor) -> Tensor:
        return out.copy_(chunk.logits[0][at]).sub_(chunk.logits[1][at])


class Cosine(ForwardKL):
    """Its value is off by the rounding of 1 - cos, some 1e-7 in fp32; its gradient is not."""

    of_nothing = 0.0, 0.0, 0.0
    on_softmax = False

    def read(self, chunk, at, x_s, e_s, x_t, e_t):
        student = x_s.copy_(chunk.logits[0][at])
        square = torch.mul(student, student, out=e_s).sum(-1)
        teacher = e_s.copy_(chunk.logits[1][at])
        product = student.mul_(teacher).sum(-1)
        return torch.stack((product, square, teacher.square_().sum(-1)))

    def value(self, chunk, own, again):
        product, student, teacher = own.sum(0)
        # Logits that are all 0 point nowhere: cosine 0, gradient finite.
        student, norms = student.clamp(min=1e-12), (student * teacher).clamp(min=1e-12).sqrt()
        cosine = product / norms
        self.along, self.across = chunk.like(cosine / student), chunk.like(1 / norms)
        return 1 - cosine

    def write(self, chunk, at, total, term):
        weight = chunk.weights[0, at]
        total.copy_(chunk.logits[0][at]).mul_((weight * self.along[at])[:, None])
        total.addcmul_(term.copy_(chunk.logits[1][at]), (weight * self.across[at])[:, None], value=-1)


class TopK(ForwardKL):
    """`start` leaves the places [T, k] of this rank's largest teacher logits and which of them are `chosen`: among the k largest
    of all ranks. Of equal logits at the border some are chosen, k in all. The logits in `writable` places may be overwritten:
    where places are equal, so is what is written there."""

    of_nothing = 0.0, 0.0, NEG_INF, NEG_INF

    def start(self, logits_t, gather, rank):
        values, self.places = logits_t.topk(min(self.k, logits_t.shape[1]))
        values = torch.nn.functional.pad(values, (0, self.k - values.shape[1]), value=-math.inf)
        everyone = gather(values.to(torch.promote_types(values.dtype, torch.float32))).transpose(0, 1).flatten(1)
        # Stable, so that a rank's entries keep their order: the first of them are chosen.
        first = everyone.sort(dim=-1, descending=True, stable=True).indices[:, : self.k]
        counts = (first // self.k == rank).sum(-1, keepdim=True)
        self.chosen = self.writable = torch.arange(self.places.shape[1], device=counts.device) < counts

    def read(self, chunk, at, x_s, e_s, x_t, e_t):
        shifted, largest = [x.gather(1, self.places[at]) for x in (x_s, x_t)], chunk.largest[:, at].double()
        tail_s = largest[0] + self._tail(at, x_s)
        return self.sums(chunk, at, shifted, (tail_s, largest[1] + self._tail(at, x_s.copy_(x_t))))

    def sums(self, chunk: Chunk, at: slice, shifted: Sequence[Tensor], tails: Sequence[Tensor]) -> Tensor:
        """What `read` gives, from the shifted logits [T, k] in `places` and the log-sum-exps [T], fp64, of the entries that are not
        chosen: the student's, then the teacher's unless it is `Given`."""
        log_s, log_t = shifted[0] - chunk.sums[0, at, None].log(), self._log_teacher(chunk, at, shifted)
        p = torch.where(self.chosen[at], log_t.exp(), 0)
        return torch.stack((p.mul(log_t - log_s).sum(-1).double(), p.sum(-1).double(), *tails))

    def _log_teacher(self, chunk: Chunk, at: slice, shifted: Sequence[Tensor]) -> Tensor:
        return shifted[1] - chunk.sums[1, at, None].log()

    def _tail(self, at: slice, x: Tensor) -> Tensor:
        """Log-sum-exp of what is not chosen; x is overwritten."""
        self.put(at, x, torch.full_like(self.places[at], -math.inf, dtype=x.dtype))
        largest = x.amax(-1).clamp(min=NEG_INF)
        return (x.sub_(largest[:, None]).exp_().sum(-1).log() + largest).clamp(min=NEG_INF)

    def put(self, at: slice, x: Tensor, chosen: Tensor) -> None:
        """x := `chosen` [T, k] in the places that are chosen."""
        places = self.places[at]
        x.scatter_(1, places, torch.where(self.writable[at], chosen, x.gather(1, places)))

    def value(self, chunk, own, again):
        kl, mass, tail_s, tail_t = own.unbind(1)
        inside = chunk.share[:, 1] * (kl + mass * (chunk.log_share[:, 1] - chunk.log_share[:, 0]))
        return inside.sum(0) + self._of_tail(chunk, tail_s, tail_t.logsumexp(0) - chunk.lse[1])

    def _of_tail(self, chunk: Chunk, tail_s: Tensor, log_t: Tensor) -> Tensor:
        """The tail's part of the divergence, from the log-sum-exps of all ranks' parts of the student's and the log of its mass in
        the teacher."""
        tail_s, mass_t = tail_s.logsumexp(0), log_t.exp()
        self.tail_s, self.mass_t = tail_s, mass_t
        return mass_t * (log_t - (tail_s - chunk.lse[0]))

    def write(self, chunk, at, total, term):
        self._student(chunk, at, total)
        # What the student's softmax is drawn to: the teacher's in the k, its own shape with the teacher's mass in the tail.
        above = chunk.like(chunk.largest[0, at] - self.tail_s[at])
        chunk.shift(0, at, term).add_(above[:, None]).clamp_(max=0).exp_()
        term.mul_(chunk.like(chunk.weights[0, at] * self.mass_t[at])[:, None])
        self.put(at, term, self.picked(chunk, at, total.dtype))
        total.sub_(term)

    def picked(self, chunk: Chunk, at: slice, dtype: torch.dtype) -> Tensor:
        """The teacher's probabilities in `places`, times the weight."""
        picked = chunk.logits[1][at].gather(1, self.places[at]).to(dtype) / chunk.temperature
        return (picked - chunk.largest[1, at, None]).exp() * chunk.scale[1, at, None]


@dataclass
class Given:
    """A teacher's largest entries, the same on all ranks, where its logits would be."""

    ids: Tensor
    """[T, k] int64, all different in a token."""
    log_probs: Tensor
    """[T, k]"""
    log_tail: Tensor
    """[T], of the mass that is left."""

    def part(self, at: slice, ignored: Tensor) -> "Given":
        """Tokens `at`, what they say harmless where `ignored` [T, 1]."""
        log_probs = self.log_probs[at].masked_fill(ignored[at], NEG_INF).clamp(min=NEG_INF)
        log_tail = self.log_tail[at].masked_fill(ignored[at, 0], 0).clamp(min=NEG_INF)
        return Given(self.ids[at], log_probs, log_tail)

    def entropy(self) -> Tensor:
        """[T], of the k + 1 entries."""
        entries = torch.cat((self.log_probs, self.log_tail[:, None]), 1).double()
        return -(entries.exp() * entries).sum(1)


class GivenTopK(TopK):
    """TopK at temperature 1 where the teacher is `Given`: its side is known before anything is exchanged.

    Its log-sum-exp counts as 0 on rank 0 and as nothing elsewhere, and so does its entropy, which is that of the k + 1 entries.
    """

    of_nothing = 0.0, 0.0, NEG_INF

    def __init__(self, first: int, width: int):
        """`first`, `width`: the entries of this rank."""
        self.first, self.width, self.joint = first, width, True

    def start(self, logits_t, gather, rank):
        self.given, places = logits_t, logits_t.ids - self.first
        self.chosen = (places >= 0) & (places < self.width)
        # Entries of other ranks repeat one of this rank's, or in a row without one stand for an entry that stays as it is. (Indices
        # of the chosen alone have a size that depends on the data, for which the host would wait.)
        self.writable = self.chosen.any(1, keepdim=True)
        every = torch.arange(places.shape[1], device=places.device)
        entry = torch.where(self.chosen, every, self.chosen.int().argmax(1, keepdim=True))
        self.places = places.gather(1, entry).clamp(0, max(self.width - 1, 0))
        self.log_probs = logits_t.log_probs.gather(1, entry)

    def read(self, chunk, at, x_s, e_s, x_t, e_t):
        shifted = x_s.gather(1, self.places[at])
        return self.sums(chunk, at, [shifted], [chunk.largest[0, at].double() + self._tail(at, x_s)])

    def _log_teacher(self, chunk, at, shifted):
        return self.log_probs[at]

    def value(self, chunk, own, again):
        kl, mass, tail_s = own.unbind(1)
        return (kl - mass * chunk.log_share[:, 0]).sum(0) + self._of_tail(chunk, tail_s, self.given.log_tail.double())

    def picked(self, chunk, at, dtype):
        return self.log_probs[at].exp().to(dtype) * chunk.weights[0, at, None]


KINDS = {
    Divergence.forward_kl: ForwardKL,
    Divergence.reverse_kl: ReverseKL,
    Divergence.jsd: Jsd,
    Divergence.mse: Mse,
    Divergence.cosine: Cosine,
}


def make(divergence: Divergence, vocab_size: int, jsd_beta: float, top_k: int | None, temperature: float) -> ForwardKL:
    kind = TopK if top_k else KINDS[divergence]
    return kind(vocab_size, jsd_beta, top_k, joint=kind.on_softmax and temperature == 1)
