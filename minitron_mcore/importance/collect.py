"""Activation statistics of a sharded model, exact under tensor, sequence, pipeline, context, data and expert parallelism.

For every channel c the paper's choice (arXiv 2407.14679, section 2.2 and table 11) is mean over the sequence, L2 over samples:

    score_c = sqrt( sum_b ( 1/S_b sum_s |a[b, s, c]| )^2 )

    hidden    a = output of each norm before attention and MLP; one vector a norm, summed over norms
    ffn       a = input of the down projection (after the gate), per block
    heads     a = L2 norm over head_dim of each head's attention output, per block
    depth     1 - mean over tokens of cos(layer input, layer output), for attention, MLP and the whole block

In a mixture of experts tokens of many samples reach an expert mixed, so there it is the mean over all tokens (the paper's
other good pair, mean and mean), 0 for tokens that go elsewhere, with the router's probability p as a factor:

    ffn       a = p x input of the expert's down projection, per expert
    experts   a = p x L2 norm of the expert's output

What a rank sees, and what completes it:

    input of linear_fc2 / linear_proj   [S, B, own channels]   nothing: tensor-parallel ranks own disjoint channels
    input, output of an expert          [own tokens, F or H]   the sum over ranks that hold it, once at the end
    norm output, layer output           [S_r, B, H] under sequence parallelism, else [S, B, H] replicated, of which a rank
                                        counts its share of S: the sum over S, over tensor-parallel ranks, before it is squared
    all of these, where S is its share  the sum over S, over context-parallel ranks, before it is squared; a sample's length too
    different samples                                          the sum over b, over data-parallel ranks, once at the end
    different blocks                                           own entries; hidden sums over pipeline stages at the end

Sums are fp32 (bf16 overflows), padding is masked out of every mean, nothing leaves the device before the end, and a
micro-batch costs a pipeline stage one small collective for each of tensor and context parallelism.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mcore import runtime
from minitron_mcore.checkpoint import Checkpoint
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.schedule import forward


def _sum_abs(x: Tensor) -> Tensor:
    """[S, B, C] -> [B, C]: the sum over S of |x|, in fp32."""
    flat = x.abs().flatten(1)
    # As products with ones: on a CPU .sum(0) takes longer by half, and vector_norm(ord=1, dim=0) six times as long.
    # In parts: fp32 copies of 8 MB stay in the cache.
    ones = torch.ones(len(flat), device=x.device)
    parts = flat.split(max(1, 2**21 // len(flat)), dim=1)
    return torch.cat([torch.mv(part.float().t(), ones) for part in parts]).view(x.shape[1:])


class Collector:
    """Accumulators of one rank: a [C] vector of squares for each hook, a scalar sum of 1 - cosine for each layer, and for its
    own experts sums over tokens."""

    def __init__(self, model: build.Model, arch: Architecture):
        self.model, self.arch = model, arch
        self.squares: dict[str, Tensor] = {}
        self.distances: dict[str, Tensor] = {}
        self.routed: dict[str, Tensor] = {}  # by block: [own experts, F + 1], the channels and then the output's norm
        self.tokens = torch.zeros((), dtype=torch.int64, device=runtime.device())
        self._open: dict[str, Tensor] = {}  # per-sample sums over S of this micro-batch, not yet squared
        self._split: set[str] = set()  # those of `_open` whose S is spread over tensor-parallel ranks too
        self._mask: Tensor | None = None  # [S, B, 1], or None where nothing is padding
        self._length = 0  # S, of a context-parallel rank
        self._stream: Tensor | None = None  # the last layer's output, as `_directions` gives it: the next one's input
        self._change: tuple[Tensor, Tensor] | None = None  # of the open block's attention, and its squared length

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register every hook; yields their handles."""
        for chunk in self.model.chunks:  # which take turns: none begins before another has ended
            yield chunk.register_forward_pre_hook(self._begin, with_kwargs=True)
            yield chunk.register_forward_hook(self._end)
        for layer in build.layers(self.model):
            block, part = self.arch.layers[layer.layer_number - 1]
            at, is_mlp = f"blocks.{block}", part == "mlp"
            norm = layer.pre_mlp_layernorm if is_mlp else layer.input_layernorm
            yield norm.register_forward_hook(self._norm(f"{at}.{part}.norm"))
            if is_mlp and self.arch.experts:
                yield layer.mlp.router.register_forward_hook(self._route)
                own = layer.mlp.experts.local_experts
                self.routed[at] = torch.zeros(len(own), self.arch.ffn + 1, device=runtime.device())
                for sums, expert in zip(self.routed[at], own, strict=True):
                    yield expert.linear_fc2.register_forward_hook(self._expert(sums))
            elif is_mlp:
                yield layer.mlp.linear_fc2.register_forward_pre_hook(self._channels(f"{at}.ffn"))
            else:
                yield layer.self_attention.linear_proj.register_forward_pre_hook(self._heads(f"{at}.heads"))
            yield layer.register_forward_hook(self._layer(block, part), with_kwargs=True)

    def _begin(self, module, args, kwargs) -> None:
        mask = kwargs.get("loss_mask")  # [B, S]; True where a token is real
        ids = args[0]
        self._mask, self._length = None, ids.shape[1]
        self._open["lengths"] = torch.full((len(ids), 1), ids.shape[1], device=ids.device, dtype=torch.float32)
        if mask is not None:
            self._open["lengths"] = mask.sum(1, keepdim=True, dtype=torch.float32)
            self._mask = mask.t()[..., None]
        if module is self.model.chunks[0]:
            self.tokens += mask.sum() if mask is not None else ids.numel()

    def _share(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of the residual stream or a norm's output [S or S_r, B, H] that this rank counts, and the mask's for them."""
        rank, size = runtime.tp_group().rank(), runtime.tp_group().size()
        low, high = (self._length * r // size for r in (rank, rank + 1))
        mask = None if self._mask is None else self._mask[low:high]
        return x if len(x) < self._length else x[low:high], mask

    def _add(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        self._open[name] = _sum_abs(x if mask is None else x * mask.to(x.dtype))

    def _norm(self, name):
        def hook(module, args, output) -> None:
            self._add(name, *self._share(output))
            self._split.add(name)

        return hook

    def _channels(self, name):
        return lambda module, args: self._add(name, args[0], self._mask)

    def _heads(self, name):
        def hook(module, args) -> None:
            per_head = args[0].unflatten(-1, (-1, self.arch.head_dim))
            self._add(name, torch.linalg.vector_norm(per_head, dim=-1, dtype=torch.float32), self._mask)

        return hook

    def _route(self, module, args, output):
        """Send padding to no expert: nothing of it reaches a sum, and no real token attends to it."""
        _, mask = self._share(args[0])
        if mask is None:
            return output
        probs, routing_map = output
        real = mask.reshape(-1, 1)
        return probs * real, routing_map & real

    def _expert(self, sums: Tensor):
        def hook(module, args, output) -> None:
            sums[:-1] += args[0].abs().sum(0, dtype=torch.float32)
            sums[-1] += torch.linalg.vector_norm(output[0], dim=-1, dtype=torch.float32).sum()

        return hook

    def _layer(self, block, part):
        at, after_attention = f"blocks.{block}", self.arch.layer(block, "attention") is not None
        goes_on = part == "attention" and self.arch.layer(block, "mlp") is not None

        def hook(module, args, kwargs, output) -> None:
            source = self._directions(kwargs["hidden_states"]) if self._stream is None else self._stream
            self._stream = self._directions(output[0] if isinstance(output, tuple) else output)
            # 1 - u.v = |u - v|^2 / 2 for directions u, v: nothing cancels where a layer changes little.
            change = (self._stream - source).flatten()
            size = torch.dot(change, change)
            self._add_distance(f"{at}.{part}", size / 2)
            if goes_on:
                self._change = change, size
            elif part == "mlp" and after_attention:
                first, first_size = self._change
                self._add_distance(f"{at}.block", (first_size + size) / 2 + torch.dot(first, change))
            else:  # the block's only layer
                self._add_distance(f"{at}.block", size / 2)

        return hook

    def _directions(self, x: Tensor) -> Tensor:
        """This rank's rows of the residual stream, each divided by its length; padding becomes 0. fp32."""
        x, mask = self._share(x)
        x = x.to(torch.float32, copy=True)
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
        return x.div_(lengths if mask is None else lengths / mask)

    def _add_distance(self, name: str, distance: Tensor) -> None:
        """Add the sum of 1 - cosine over this rank's real tokens."""
        self.distances[name] = self.distances.get(name, 0) + distance

    def _end(self, module, args, output) -> None:
        self._complete(self._split, runtime.tp_group())
        self._complete(self._open.keys(), runtime.cp_group())
        lengths = self._open.pop("lengths").clamp(min=1)
        for name, sums in self._open.items():
            squares = (sums / lengths).square().sum(0)
            self.squares[name] = self.squares.get(name, 0) + squares
        self._open.clear()
        self._split.clear()
        self._stream = self._change = None

    def _complete(self, names: Iterable[str], group: dist.ProcessGroup) -> None:
        """Sum these of the open sums over the ranks of a group, which see other tokens of the same samples (collective)."""
        if group.size() == 1:
            return
        names = sorted(names)
        flat = torch.cat([self._open[name].flatten() for name in names])
        dist.all_reduce(flat, group=group)
        for name, part in zip(names, flat.split([self._open[name].numel() for name in names]), strict=True):
            self._open[name] = part.view_as(self._open[name])

    def scores(self) -> dict[str, Tensor]:
        """Reduce over all ranks and gather the global vectors; the same result on every rank (collective).

        Returns:
            `hidden` [H], `blocks.i.ffn` [F], `blocks.i.heads` [N], `blocks.i.{attention,mlp,block}` []; fp32 on the CPU. In a
            mixture of experts `blocks.i.ffn` [E, F] and `blocks.i.experts` [E].
        """
        for squares in self.squares.values():
            dist.all_reduce(squares, group=runtime.dp_group())
        dist.all_reduce(self.tokens, group=runtime.dp_cp_group())
        distances = torch.stack([self.distances[name] for name in sorted(self.distances)])
        dist.all_reduce(distances, group=runtime.dp_cp_group())
        dist.all_reduce(distances, group=runtime.tp_group())

        found, hidden = {}, torch.zeros(self.arch.hidden, device=runtime.device())
        for name, squares in self.squares.items():
            if name.endswith(".norm"):
                hidden += squares.sqrt()
            else:
                found[name] = _gather(squares.sqrt(), runtime.tp_group())
        for at, sums in self.routed.items():
            dist.all_reduce(sums, group=runtime.expert_dp_group())
            means = _gather(sums / self.tokens, runtime.ep_group())
            found |= {f"{at}.ffn": means[:, :-1].contiguous(), f"{at}.experts": means[:, -1].contiguous()}
        for name, distance in zip(sorted(self.distances), distances, strict=True):
            found[name] = distance / self.tokens
        dist.all_reduce(hidden, group=runtime.pp_group())
        stages: list = [None] * runtime.pp_group().size()
        dist.all_gather_object(stages, {k: v.cpu() for k, v in found.items()}, group=runtime.pp_group())
        return {"hidden": hidden.cpu()} | {name: vector for stage in stages for name, vector in stage.items()}


def _gather(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' disjoint channels or experts, in order."""
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts)


@contextmanager
def collecting(model: build.Model, arch: Architecture) -> Iterator[Collector]:
    """Collect importance from every forward pass of `model` inside the block; its hooks are gone after it."""
    collector = Collector(model, arch)
    handles = list(collector.hooks())
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


def score(model: build.Model, source: Checkpoint, tokens: Tensor, mask: Tensor, micro_batch: int) -> Scores:
    """Score a model on calibration samples (collective); the same result on every rank.

    Args:
        model: this rank's part of `source`.
        tokens, mask: [N, S] int64 and bool, the same on all ranks; data-parallel rank r takes samples r, r + dp, ...
        micro_batch: samples a forward pass; the last pass takes what is left.

    Raises:
        UserError: fewer samples than data-parallel ranks.
    """
    dp = runtime.dp_group()
    if len(tokens) < dp.size():
        raise UserError(
            f"importance.samples is {len(tokens)}, fewer than the {dp.size()} data-parallel ranks: give at least that many."
        )
    # Expert-parallel ranks pass tokens to each other, so all make equally many passes: samples of padding fill up the last.
    missing = -len(tokens) % dp.size()
    tokens, mask = F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, 0, 0, missing))
    mine, whole = slice(dp.rank(), None, dp.size()), bool(mask.all())
    batches = [
        {"tokens": t.to(runtime.device())}
        if whole
        else {"tokens": t.to(runtime.device()), "mask": m.to(runtime.device())}
        for t, m in zip(tokens[mine].split(micro_batch), mask[mine].split(micro_batch), strict=True)
    ]
    progress = runtime.Progress("importance", len(batches), "micro-batches")
    with collecting(model, source.arch) as collector:
        for start in range(0, len(batches), runtime.pp_group().size()):
            group = batches[start : start + runtime.pp_group().size()]  # together they keep every stage busy
            forward(model, group, lambda hidden, batch: None)
            progress.update(start + len(group))
    metadata = {
        "fingerprint": source.fingerprint,
        "architecture": source.arch.digest(),
        "metric": "activation; depth by cosine",
        "aggregation": "batch l2, sequence mean",
        "samples": str(int(mask.any(1).sum())),
        "tokens": str(int(mask.sum())),
    }
    return Scores(collector.scores(), metadata)
