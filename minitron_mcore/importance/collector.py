"""Activation statistics of a sharded model, exact under tensor, sequence, pipeline, context, data and expert parallelism.

A channel's score is an aggregation over samples of an aggregation over each sample's tokens (`metrics`) of its activation a:

    hidden    a = output of each norm before attention and MLP; one vector a norm, summed over norms
    ffn       a = input of the down projection, or before_gate the up projection's output (of SwiGLU the gate's rows), per block
    heads     a = L2 norm over head_dim of each head's attention output, per block
    depth     1 - mean over tokens of cos(layer input, layer output), for attention, MLP and the whole block

`weighted` multiplies a by the L2 norm of the weights that read it: for a norm's channel the column of q, k, v or of gate and up,
for an ffn channel (at either site) the down projection's column, for a head the output projection's columns together.

In a mixture of experts tokens of many samples reach an expert mixed, so there it is the mean over all tokens (the paper's
other good pair, mean and mean), 0 for tokens that go elsewhere, with the router's probability p as a factor:

    ffn       a = p x input of the expert's down projection, per expert
    experts   a = p x L2 norm of the expert's output

What a rank sees, and what completes it:

    input of linear_fc2 / linear_proj   [S, B, own channels]   nothing: tensor-parallel ranks own disjoint channels
    input, output of an expert          [own tokens, F or H]   the sum over ranks that hold it, once at the end
    norm output, layer output           [S_r, B, H] under sequence parallelism, else [S, B, H] replicated, of which a rank
                                        counts its share of S: the sums over S, over tensor-parallel ranks, before they become
                                        a sample's score
    all of these, where S is its share  the sums over S, over context-parallel ranks, before that too; a sample's length as well
    different samples                                          the sums over b, over data-parallel ranks, once at the end
    different blocks                                           own entries; hidden sums over pipeline stages at the end

Sums are fp32 (bf16 overflows), padding is masked out of all, nothing leaves the device before the end, and a micro-batch costs
a pipeline stage one small collective (two for variance) for each of tensor and context parallelism.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.settings import FfnSite, Statistic
from minitron_mcore.errors import refuse
from minitron_mcore.importance import checks, metrics
from minitron_mcore.importance.metrics import Sums
from minitron_mcore.importance.scores import Scores, check_finite
from minitron_mcore.models import build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import forward

COMPILE_MIN_TOKENS = 2**18
"""Tokens of a run for which compiling takes less time than it saves."""


class Collector:
    """Accumulators of one rank: sums over samples of each hooked channel, a sum of 1 - cosine for each layer and block, and for its
    own experts sums over tokens.

    Args:
        model: this rank's part.
        arch: the whole model's.
        statistic: how activations become scores.
        fused: compile the reductions (see `metrics.compiled`); the result differs by rounding.

    Raises:
        UserError: a statistic that the model doesn't have.
    """

    def __init__(self, model: build.Model, arch: Architecture, statistic: Statistic | None = None, fused: bool = False):
        self.model, self.arch, self.statistic = model, arch, statistic or Statistic()
        refuse(checks.statistic_problems(arch, self.statistic))
        self.sums: dict[tuple[str, ...], Sums] = {}  # over samples; their channels are those of the names in the key
        self.distances: dict[tuple[str, ...], Tensor] = {}  # likewise
        self.routed: dict[str, Tensor] = {}  # by block: [own experts, F + 1], the channels and then the output's norm
        self.tokens = torch.zeros((), dtype=torch.int64, device=process_groups.device())
        self._fused = metrics.compiled if fused else lambda function: function
        self._widths: dict[str, int] = {}  # channels of each name on this rank
        self._readers: dict[str, nn.Parameter] = {}  # by name, the weights whose columns read its channels
        self._open: dict[str, Sums] = {}  # per sample over S, of this micro-batch
        self._split: dict[str, Sums] = {}  # the same over `_own`, where tensor-parallel ranks have the rest
        self._all = self._own = _Span(slice(0), None)  # S, and the rows of it that this rank counts
        self._streams: list[Tensor] = []  # the open block's input and its layers' outputs

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register every hook; yields their handles."""
        for chunk in self.model.chunks:  # which take turns: none begins before another has ended
            yield chunk.register_forward_pre_hook(self._begin, with_kwargs=True)
            yield chunk.register_forward_hook(self._end)
        blocks = itertools.groupby(build.layers(self.model), lambda layer: self._place(layer)[0])
        for at, layers in ((f"blocks.{block}", list(layers)) for block, layers in blocks):
            parts = [self._place(layer)[1] for layer in layers]
            yield layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
            for layer, part in zip(layers, parts, strict=True):
                yield from (self._mlp if part == "mlp" else self._attention)(at, layer)
                yield layer.register_forward_hook(self._leave)
            yield layers[-1].register_forward_hook(self._close(tuple(f"{at}.{x}" for x in (*parts, "block"))))

    def _place(self, layer: nn.Module) -> tuple[int, str]:
        """A layer's block, and which of its parts it is."""
        return self.arch.layers[layer.layer_number - 1]

    def _attention(self, at: str, layer: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield layer.input_layernorm.register_forward_hook(self._norm(f"{at}.attention.norm"))
        yield layer.self_attention.linear_proj.register_forward_pre_hook(self._heads(f"{at}.heads"))
        self._readers[f"{at}.attention.norm"] = layer.self_attention.linear_qkv.weight
        self._readers[f"{at}.heads"] = layer.self_attention.linear_proj.weight

    def _mlp(self, at: str, layer: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield layer.pre_mlp_layernorm.register_forward_hook(self._norm(f"{at}.mlp.norm"))
        if self.arch.experts:
            yield layer.mlp.router.register_forward_hook(self._route)
            own = layer.mlp.experts.local_experts
            self.routed[at] = torch.zeros(len(own), self.arch.ffn + 1, device=process_groups.device())
            for sums, expert in zip(self.routed[at], own, strict=True):
                yield expert.linear_fc2.register_forward_hook(self._expert(sums))
            return
        if self.statistic.ffn_site == FfnSite.after_gate:
            yield layer.mlp.linear_fc2.register_forward_pre_hook(self._down(f"{at}.ffn"))
        else:
            yield layer.mlp.linear_fc1.register_forward_hook(self._up(f"{at}.ffn"))
        self._readers[f"{at}.mlp.norm"] = layer.mlp.linear_fc1.weight
        self._readers[f"{at}.ffn"] = layer.mlp.linear_fc2.weight

    def _begin(self, module, args, kwargs) -> None:
        batch, length = args[0].shape
        mask = kwargs.get("loss_mask")  # [B, S]; True where a token is real
        real = None if mask is None else mask.t()[..., None]
        tp = process_groups.tp_group()
        own = slice(length * tp.rank() // tp.size(), length * (tp.rank() + 1) // tp.size())
        spans = slice(0, length), own
        self._all, self._own = (_Span(rows, None if real is None else real[rows]) for rows in spans)
        if module is self.model.chunks[0]:
            self.tokens += batch * length if mask is None else mask.sum()

    def _rows(self, x: Tensor) -> Tensor:
        """The rows of the residual stream or a norm's output [S or S_r, B, H] that this rank counts."""
        return x[self._own.rows] if len(x) == self._all.rows.stop else x

    def _norm(self, name):
        def hook(module, args, output) -> None:
            self._split[name] = self._sums(self._rows(output), self._own)

        return hook

    def _down(self, name):
        def hook(module, args) -> None:
            self._open[name] = self._sums(args[0], self._all)

        return hook

    def _up(self, name):
        def hook(module, args, output) -> None:
            channels = output[0].shape[-1] // (2 if self.arch.traits.gated else 1)  # the gate's rows come first
            self._open[name] = self._sums(output[0][..., :channels], self._all)

        return hook

    def _heads(self, name):
        def hook(module, args) -> None:
            reduce = self._fused(metrics.head_norm_sums)
            self._open[name] = reduce(args[0], self._all.real, self.statistic.sequence, self.arch.head_dim)

        return hook

    def _sums(self, x: Tensor, span: "_Span") -> Sums:
        return self._fused(metrics.sums)(x, span.real, self.statistic.sequence)

    def _route(self, module, args, output):
        """Give padding the probability 0: nothing of it reaches a sum, and no real token attends to it. It keeps its k experts:
        the all-to-all dispatcher expects as many for every token."""
        if self._own.real is None:
            return output
        probs, routing_map = output
        return probs.masked_fill(~self._own.real.reshape(-1, 1), 0), routing_map

    def _expert(self, sums: Tensor):
        def hook(module, args, output) -> None:
            sums[:-1] += args[0].abs().sum(0, dtype=torch.float32)
            sums[-1] += torch.linalg.vector_norm(output[0], dim=-1, dtype=torch.float32).sum()

        return hook

    def _enter(self, module, args, kwargs) -> None:
        self._streams = [self._rows(kwargs["hidden_states"])]

    def _leave(self, module, args, output) -> None:
        self._streams.append(self._rows(output[0] if isinstance(output, tuple) else output))

    def _close(self, names):
        def hook(module, args, output) -> None:
            found = self._fused(metrics.cosine_distances)(self._streams, self._own.real)
            self.distances[names] = self.distances.get(names, 0) + found
            self._streams = []

        return hook

    def _end(self, module, args, output) -> None:
        names = (*self._split, *self._open)
        self._widths |= {name: part.total.shape[-1] for name, part in (self._split | self._open).items()}
        split = completed(_side_by_side(self._split.values()), process_groups.tp_group())
        part = completed(_side_by_side([split, *self._open.values()]), process_groups.cp_group())
        samples = metrics.aggregate(self.statistic.sequence, part)  # [B, channels of all names]
        real = part.count > 0  # [B, 1]
        found = metrics.sums(samples, real, self.statistic.batch)
        self.sums[names] = metrics.merge([self.sums[names], found]) if names in self.sums else found
        self._open, self._split = {}, {}

    def scores(self) -> dict[str, Tensor]:
        """Reduce over all ranks and gather the global vectors; the same result on every rank (collective).

        Returns:
            `hidden` [H], `blocks.i.ffn` [F], `blocks.i.heads` [N], `blocks.i.{attention,mlp,block}` []; fp32 on the CPU. In a
            mixture of experts `blocks.i.ffn` [E, F] and `blocks.i.experts` [E].
        """
        dist.all_reduce(self.tokens, group=process_groups.dp_cp_group())
        found, hidden = {}, torch.zeros(self.arch.hidden, device=process_groups.device())
        for names, part in self.sums.items():
            vectors = metrics.aggregate(self.statistic.batch, completed(part, process_groups.dp_group()))
            for name, vector in zip(names, vectors.split([self._widths[name] for name in names]), strict=True):
                vector = vector * self._weight(name) if self.statistic.weighted else vector
                if name.endswith(".norm"):
                    hidden += vector
                else:
                    found[name] = process_groups.all_gather(vector, process_groups.tp_group())
        for at, sums in self.routed.items():
            dist.all_reduce(sums, group=process_groups.expert_dp_group())
            means = process_groups.all_gather(sums / self.tokens, process_groups.ep_group())
            found |= {f"{at}.ffn": means[:, :-1].contiguous(), f"{at}.experts": means[:, -1].contiguous()}
        distances = torch.cat(list(self.distances.values()))
        for group in (process_groups.dp_cp_group(), process_groups.tp_group()):
            dist.all_reduce(distances, group=group)
        found |= zip(itertools.chain(*self.distances), distances / self.tokens, strict=True)
        dist.all_reduce(hidden, group=process_groups.pp_group())
        stages: list = [None] * process_groups.pp_group().size()
        dist.all_gather_object(stages, {k: v.cpu() for k, v in found.items()}, group=process_groups.pp_group())
        return {"hidden": hidden.cpu()} | {name: vector for stage in stages for name, vector in stage.items()}

    def _weight(self, name: str) -> Tensor:
        """What `weighted` makes of a score: the norms of the weights that read the channels, to the power that the aggregations
        give their argument."""
        norms = torch.linalg.vector_norm(self._readers[name].detach(), dim=0, dtype=torch.float32)
        if name.endswith(".norm"):  # tensor-parallel ranks hold other rows of its columns
            squares = norms.square()
            dist.all_reduce(squares, group=process_groups.tp_group())
            norms = squares.sqrt()
        elif name.endswith(".heads"):
            norms = torch.linalg.vector_norm(norms.unflatten(0, (-1, self.arch.head_dim)), dim=-1)
        return norms ** (metrics.DEGREE[self.statistic.sequence] * metrics.DEGREE[self.statistic.batch])


class _Span(NamedTuple):
    """A stretch of the sequence."""

    rows: slice
    real: Tensor | None
    """[rows, B, 1] bool; None where all tokens are"""


def completed(part: Sums, group: dist.ProcessGroup) -> Sums:
    """The sums of all ranks of a group, each of which saw other tokens of the same samples, or other samples (collective)."""

    def summed(tensors: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    return part if group.size() == 1 else metrics.pool(part, summed)


def _side_by_side(parts: Iterable[Sums]) -> Sums:
    """Sums over the same values of several names, their channels one after the other."""
    counts, totals, spreads = zip(*parts, strict=True)
    return Sums(counts[0], torch.cat(totals, dim=-1), None if spreads[0] is None else torch.cat(spreads, dim=-1))


@contextmanager
def collect_importance(
    model: build.Model, arch: Architecture, statistic: Statistic | None = None, fused: bool = False
) -> Iterator[Collector]:
    """Collect importance from every forward pass of `model` inside the block; its hooks are gone after it. See `Collector`."""
    collector = Collector(model, arch, statistic, fused)
    handles = list(collector.hooks())
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


def score(
    model: build.Model,
    source: Checkpoint,
    tokens: Tensor,
    mask: Tensor,
    micro_batch: int,
    statistic: Statistic | None = None,
) -> Scores:
    """Score a model on calibration samples (collective); the same result on every rank.

    Args:
        model: this rank's part of `source`.
        tokens, mask: [N, S] int64 and bool, the same on all ranks; data-parallel rank r takes samples r, r + dp, ...
        micro_batch: samples a forward pass; the last pass takes what is left.
        statistic: how activations become scores; None is the paper's choice.

    Raises:
        UserError: a statistic that the model doesn't have, a score that is not finite.
    """
    statistic, dp = statistic or Statistic(), process_groups.dp_group()
    # Expert-parallel ranks pass tokens to each other, so all make equally many passes: samples of padding fill up the last.
    missing = -len(tokens) % dp.size()
    tokens, mask = F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, 0, 0, missing))
    mine, whole = slice(dp.rank(), None, dp.size()), bool(mask.all())
    batches = [
        {"tokens": t.to(process_groups.device())}
        if whole
        else {"tokens": t.to(process_groups.device()), "mask": m.to(process_groups.device())}
        for t, m in zip(tokens[mine].split(micro_batch), mask[mine].split(micro_batch), strict=True)
    ]
    progress = process_groups.Progress("importance", len(batches), "micro-batches")
    fused = tokens[mine].numel() >= COMPILE_MIN_TOKENS and metrics.can_compile()
    with collect_importance(model, source.arch, statistic, fused) as collector:
        for start in range(0, len(batches), process_groups.pp_group().size()):
            group = batches[start : start + process_groups.pp_group().size()]  # together they keep every stage busy
            forward(model, group, lambda hidden, batch: None)
            progress.update(start + len(group))
    found = collector.scores()
    check_finite(found, "the model")
    metadata = {
        "fingerprint": source.fingerprint,
        "architecture": source.arch.digest(),
        "metric": f"activation{' x norm of the weights that read it' if statistic.weighted else ''}; depth by cosine",
        "aggregation": f"batch {statistic.batch}, sequence {statistic.sequence}",
        "ffn_site": str(statistic.ffn_site),
        "samples": str(int(mask.any(1).sum())),
        "tokens": str(int(mask.sum())),
    }
    return Scores(found, metadata)
