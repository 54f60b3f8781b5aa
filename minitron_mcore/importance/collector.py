"""Activation statistics of a sharded model, exact under tensor, sequence, pipeline, context, data and expert parallelism.

The score of a channel aggregates its activation a over each sample's tokens and then over samples (`metrics`):

    hidden    a = output of each norm before attention and MLP; one vector per norm, summed over norms
    ffn       a = input of the down projection or, before_gate, output of the up projection (of SwiGLU the gate's rows); per block
    heads     a = L2 norm over head_dim of each head's attention output; per block
    depth     1 - mean over tokens of cos(input, output), of attention, MLP and the whole block

`weighted` multiplies a by the L2 norm of the weights that read it: for a norm's channel, the column of q, k, v or of gate and up;
for an ffn channel at either site, the column of the down projection; for a head, the columns of the output projection together.

An expert receives tokens of many samples, mixed. Its scores are means over all tokens (mean and mean is the paper's other good
pair), 0 for tokens routed elsewhere, weighted by the router's probability p:

    ffn       a = p x input of the expert's down projection; per expert
    experts   a = p x L2 norm of the expert's output

What each rank holds, and the reduction that completes it:

    input of linear_fc2 / linear_proj   [S, B, own channels]: none, tensor-parallel ranks own disjoint channels
    input, output of an expert          [own tokens, F or H]: summed over the ranks that hold the expert, once at the end
    norm output, layer output           [S_r, B, H] under sequence parallelism, else [S, B, H] replicated, of which a rank counts
                                        its share of S: summed over tensor-parallel ranks per sample
    each of these under context         [share of S, ...]: summed over context-parallel ranks per sample, lengths too
    different samples                   summed over data-parallel ranks, once at the end
    different blocks                    own entries; hidden is summed over pipeline stages at the end

Sums are fp32 (bf16 overflows) and exclude padding. They stay on the device until the end. A micro-batch costs each pipeline stage
one small collective (two for variance) for tensor and one for context parallelism.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.parallel.schedule import forward

COMPILE_MIN_TOKENS = 2**18
"""Tokens per rank from which compilation saves more time than it takes."""


class Collector:
    """Accumulators of one rank: per channel, sums over samples; per layer and block, the sum of 1 - cosine; per own expert, sums
    over tokens.

    Args:
        model: this rank's part of the model.
        arch: of the whole model.
        statistic: aggregation of activations to scores; None is the paper's choice.
        fused: compile the reductions (see `metrics.compiled`); results differ by rounding.

    Raises:
        UserError: the model does not support the statistic.
    """

    def __init__(self, model: build.Model, arch: Architecture, statistic: Statistic | None = None, fused: bool = False):
        self.model, self.arch, self.statistic = model, arch, statistic or Statistic()
        refuse(checks.statistic_problems(arch, self.statistic))
        self.sums: dict[tuple[str, ...], Sums] = {}  # over samples; a key names the vectors that are concatenated
        self.distances: dict[tuple[str, ...], Tensor] = {}  # one key per block: its layers and the block
        self.routed: dict[str, Tensor] = {}  # per block: [own experts, F + 1], ffn channels and the output's norm
        self.tokens = torch.zeros((), dtype=torch.int64, device=process_groups.device())
        self._fused = metrics.compiled if fused else lambda function: function
        self._widths: dict[str, int] = {}  # channels of each name on this rank
        self._reader_weights: dict[str, nn.Parameter] = {}  # name -> weights whose columns read its channels
        self._batch_sums: dict[str, Sums] = {}  # per sample of this micro-batch, over S
        self._sharded_sums: dict[str, Sums] = {}  # the same over `_own_span`; tensor-parallel ranks have the rest of S
        self._whole_span = self._own_span = _TokenSpan(slice(0), None)  # S, and the part of S that this rank counts
        self._residuals: list[Tensor] = []  # of the current block: its input and its layers' outputs

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register all hooks; yields their handles."""
        for chunk in self.model.chunks:  # virtual pipeline stages; their forward passes do not overlap
            yield chunk.register_forward_pre_hook(self._start_batch, with_kwargs=True)
            yield chunk.register_forward_hook(self._finish_batch)
        blocks = itertools.groupby(build.layers(self.model), lambda layer: self._block_and_part(layer)[0])
        for at, layers in ((f"blocks.{block}", list(layers)) for block, layers in blocks):
            parts = [self._block_and_part(layer)[1] for layer in layers]
            yield layers[0].register_forward_pre_hook(self._start_block, with_kwargs=True)
            for layer, part in zip(layers, parts, strict=True):
                yield from (self._hook_mlp if part == "mlp" else self._hook_attention)(at, layer)
                yield layer.register_forward_hook(self._record_layer)
            yield layers[-1].register_forward_hook(self._finish_block(tuple(f"{at}.{x}" for x in (*parts, "block"))))

    def _block_and_part(self, layer: nn.Module) -> tuple[int, str]:
        """Block number of a layer, and "attention" or "mlp"."""
        return self.arch.layers[layer.layer_number - 1]

    def _hook_attention(self, at: str, layer: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield layer.input_layernorm.register_forward_hook(self._norm_hook(f"{at}.attention.norm"))
        yield layer.self_attention.linear_proj.register_forward_pre_hook(self._heads_hook(f"{at}.heads"))
        self._reader_weights[f"{at}.attention.norm"] = layer.self_attention.linear_qkv.weight
        self._reader_weights[f"{at}.heads"] = layer.self_attention.linear_proj.weight

    def _hook_mlp(self, at: str, layer: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield layer.pre_mlp_layernorm.register_forward_hook(self._norm_hook(f"{at}.mlp.norm"))
        if self.arch.experts:
            yield layer.mlp.router.register_forward_hook(self._router_hook)
            own = layer.mlp.experts.local_experts
            self.routed[at] = torch.zeros(len(own), self.arch.ffn + 1, device=process_groups.device())
            for sums, expert in zip(self.routed[at], own, strict=True):
                yield expert.linear_fc2.register_forward_hook(self._expert_hook(sums))
            return
        if self.statistic.ffn_site == FfnSite.after_gate:
            yield layer.mlp.linear_fc2.register_forward_pre_hook(self._down_hook(f"{at}.ffn"))
        else:
            yield layer.mlp.linear_fc1.register_forward_hook(self._up_hook(f"{at}.ffn"))
        self._reader_weights[f"{at}.mlp.norm"] = layer.mlp.linear_fc1.weight
        self._reader_weights[f"{at}.ffn"] = layer.mlp.linear_fc2.weight

    def _start_batch(self, module, args, kwargs) -> None:
        batch, length = args[0].shape
        mask = kwargs.get("loss_mask")  # [B, S]; True where a token is real
        real = None if mask is None else mask.t()[..., None]
        tp = process_groups.tp_group()
        own = slice(length * tp.rank() // tp.size(), length * (tp.rank() + 1) // tp.size())
        spans = slice(0, length), own
        self._whole_span, self._own_span = (_TokenSpan(rows, None if real is None else real[rows]) for rows in spans)
        if module is self.model.chunks[0]:
            self.tokens += batch * length if mask is None else mask.sum()

    def _counted_rows(self, x: Tensor) -> Tensor:
        """The tokens of a [S or S_r, B, H] tensor that this rank counts."""
        return x[self._own_span.rows] if len(x) == self._whole_span.rows.stop else x

    def _norm_hook(self, name):
        def hook(module, args, output) -> None:
            self._sharded_sums[name] = self._sums(self._counted_rows(output), self._own_span)

        return hook

    def _down_hook(self, name):
        def hook(module, args) -> None:
            self._batch_sums[name] = self._sums(args[0], self._whole_span)

        return hook

    def _up_hook(self, name):
        def hook(module, args, output) -> None:
            channels = output[0].shape[-1] // (2 if self.arch.traits.gated else 1)  # the gate's rows come first
            self._batch_sums[name] = self._sums(output[0][..., :channels], self._whole_span)

        return hook

    def _heads_hook(self, name):
        def hook(module, args) -> None:
            reduce = self._fused(metrics.head_norm_sums)
            self._batch_sums[name] = reduce(args[0], self._whole_span.real, self.statistic.sequence, self.arch.head_dim)

        return hook

    def _sums(self, x: Tensor, span: "_TokenSpan") -> Sums:
        return self._fused(metrics.sums)(x, span.real, self.statistic.sequence)

    def _router_hook(self, module, args, output):
        """Set the probability of padding to 0, which excludes it from the sums. Padding keeps its k experts: the all-to-all
        dispatcher expects k for every token."""
        if self._own_span.real is None:
            return output
        probs, routing_map = output
        return probs.masked_fill(~self._own_span.real.reshape(-1, 1), 0), routing_map

    def _expert_hook(self, sums: Tensor):
        def hook(module, args, output) -> None:
            sums[:-1] += args[0].abs().sum(0, dtype=torch.float32)
            sums[-1] += torch.linalg.vector_norm(output[0], dim=-1, dtype=torch.float32).sum()

        return hook

    def _start_block(self, module, args, kwargs) -> None:
        self._residuals = [self._counted_rows(kwargs["hidden_states"])]

    def _record_layer(self, module, args, output) -> None:
        self._residuals.append(self._counted_rows(output[0] if isinstance(output, tuple) else output))

    def _finish_block(self, names):
        def hook(module, args, output) -> None:
            distances = self._fused(metrics.cosine_distances)(self._residuals, self._own_span.real)
            self.distances[names] = self.distances.get(names, 0) + distances
            self._residuals = []

        return hook

    def _finish_batch(self, module, args, output) -> None:
        names = (*self._sharded_sums, *self._batch_sums)
        self._widths |= {name: part.total.shape[-1] for name, part in (self._sharded_sums | self._batch_sums).items()}
        split = reduce_sums(_concat_channels(self._sharded_sums.values()), process_groups.tp_group())
        part = reduce_sums(_concat_channels([split, *self._batch_sums.values()]), process_groups.cp_group())
        samples = metrics.aggregate(self.statistic.sequence, part)  # [B, channels of all names]
        real = part.count > 0  # [B, 1]
        batch = metrics.sums(samples, real, self.statistic.batch)
        self.sums[names] = metrics.merge([self.sums[names], batch]) if names in self.sums else batch
        self._batch_sums, self._sharded_sums = {}, {}

    def scores(self) -> dict[str, Tensor]:
        """Reduce over all ranks and gather full vectors on the CPU (collective); the same on every rank. See `Scores.vectors`."""
        dist.all_reduce(self.tokens, group=process_groups.dp_cp_group())
        vectors, hidden = {}, torch.zeros(self.arch.hidden, device=process_groups.device())
        for names, part in self.sums.items():
            scores = metrics.aggregate(self.statistic.batch, reduce_sums(part, process_groups.dp_group()))
            for name, vector in zip(names, scores.split([self._widths[name] for name in names]), strict=True):
                vector = vector * self._weight_factor(name) if self.statistic.weighted else vector
                if name.endswith(".norm"):
                    hidden += vector
                else:
                    vectors[name] = process_groups.all_gather(vector, process_groups.tp_group())
        for at, sums in self.routed.items():
            dist.all_reduce(sums, group=process_groups.expert_dp_group())
            means = process_groups.all_gather(sums / self.tokens, process_groups.ep_group())
            vectors |= {f"{at}.ffn": means[:, :-1].contiguous(), f"{at}.experts": means[:, -1].contiguous()}
        distances = torch.cat(list(self.distances.values()))
        for group in (process_groups.dp_cp_group(), process_groups.tp_group()):
            dist.all_reduce(distances, group=group)
        vectors |= zip(itertools.chain(*self.distances), distances / self.tokens, strict=True)
        dist.all_reduce(hidden, group=process_groups.pp_group())
        stages: list[Any] = [None] * process_groups.pp_group().size()
        dist.all_gather_object(stages, {k: v.cpu() for k, v in vectors.items()}, group=process_groups.pp_group())
        return {"hidden": hidden.cpu()} | {name: vector for stage in stages for name, vector in stage.items()}

    def _weight_factor(self, name: str) -> Tensor:
        """Factor of `weighted` on a score [C]: norms of the reading weights, to the power by which the aggregations scale."""
        norms = torch.linalg.vector_norm(self._reader_weights[name].detach(), dim=0, dtype=torch.float32)
        if name.endswith(".norm"):  # tensor-parallel ranks hold different rows of these columns
            squares = norms.square()
            dist.all_reduce(squares, group=process_groups.tp_group())
            norms = squares.sqrt()
        elif name.endswith(".heads"):
            norms = torch.linalg.vector_norm(norms.unflatten(0, (-1, self.arch.head_dim)), dim=-1)
        return norms ** (metrics.DEGREE[self.statistic.sequence] * metrics.DEGREE[self.statistic.batch])


class _TokenSpan(NamedTuple):
    """A range of token positions."""

    rows: slice
    real: Tensor | None
    """[rows, B, 1] bool, False on padding; None without padding"""


def reduce_sums(part: Sums, group: dist.ProcessGroup) -> Sums:
    """`metrics.pool` over the ranks of a group, which hold different tokens or samples (collective)."""

    def add(tensors: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    return part if group.size() == 1 else metrics.pool(part, add)


def _concat_channels(parts: Iterable[Sums]) -> Sums:
    """Concatenate the channels of several vectors' sums."""
    counts, totals, spreads = zip(*parts, strict=True)
    return Sums(counts[0], torch.cat(totals, dim=-1), None if spreads[0] is None else torch.cat(spreads, dim=-1))


@contextmanager
def collect_importance(
    model: build.Model, arch: Architecture, statistic: Statistic | None = None, fused: bool = False
) -> Iterator[Collector]:
    """Collect importance from every forward pass of `model` inside the `with` statement. See `Collector`."""
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
        micro_batch: samples per forward pass.
        statistic: aggregation of activations to scores; None is the paper's choice.

    Raises:
        UserError: the model does not support the statistic; a score is not finite.
    """
    statistic, dp = statistic or Statistic(), process_groups.dp_group()
    # Expert-parallel ranks exchange tokens, so all make the same number of passes; padding samples fill the last ones.
    padding = -len(tokens) % dp.size()
    tokens, mask = F.pad(tokens, (0, 0, 0, padding)), F.pad(mask, (0, 0, 0, padding))
    own, columns = slice(dp.rank(), None, dp.size()), {"tokens": tokens}
    if not mask.all():
        columns["mask"] = mask
    columns = {key: column[own].to(process_groups.device()).split(micro_batch) for key, column in columns.items()}
    batches = [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]
    progress = process_groups.Progress("importance", len(batches), "micro-batches")
    fused = tokens[own].numel() >= COMPILE_MIN_TOKENS and metrics.can_compile()
    with (
        collect_importance(model, source.arch, statistic, fused) as collector,
        stop_signal.at_stop_points(resumes=False),
        hang_watchdog.phase(Phase.step, lambda: "a forward pass"),
    ):
        for start in range(0, len(batches), process_groups.pp_group().size()):
            stop_signal.stop_point(f"after {start} of {len(batches)} micro-batches")
            group = batches[start : start + process_groups.pp_group().size()]  # fills the pipeline
            forward(model, group, lambda hidden, batch: None)
            progress.update(start + len(group))
    vectors = collector.scores()
    check_finite(vectors, "the model")
    metadata = {
        "fingerprint": source.fingerprint,
        "architecture": source.arch.digest(),
        "metric": f"activation{' x norm of the weights that read it' if statistic.weighted else ''}; depth by cosine",
        "aggregation": f"batch {statistic.batch}, sequence {statistic.sequence}",
        "ffn_site": str(statistic.ffn_site),
        "samples": str(int(mask.any(1).sum())),
        "tokens": str(int(mask.sum())),
    }
    return Scores(vectors, metadata)
