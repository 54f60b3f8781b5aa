"""The distributed optimizer's state in a checkpoint: tensors "optimizer.exp_avg.NAME" and the like, shaped as the parameter NAME.

megatron-core shards the state over the data-parallel ranks as ranges of flattened parameters. A range is at most three boxes of
its parameter (the end of a row, whole rows, the start of a row), so every rank writes and reads its own elements, in any layout,
without communication or a copy. megatron-core's own resharding format gathers a stage's whole state on each rank instead.

The fp32 copy of bf16 weights is "optimizer.param.NAME"; fp32 weights are their own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitron_mcore.checkpoint.sharded import Shard
from minitron_mcore.parallel.megatron_patches import optimizer_state as patches

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # isort: skip


def flat_slices(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that make up elements start..end of a flattened tensor [N] or [rows, columns], in order."""
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    columns = shape[1]
    while start < end:
        row, column = divmod(start, columns)
        rows = (end - start) // columns
        part = (rows, columns) if column == 0 and rows else (1, min(columns - column, end - start))
        yield (row, column), part
        start += math.prod(part)


@dataclass(frozen=True)
class _Owned:
    """A range of a flattened parameter, and the state that this data-parallel rank holds of it: by name, [end - start] each."""

    optimizer: DistributedOptimizer
    parameter: nn.Parameter
    start: int
    end: int

    def state(self) -> dict[str, Tensor]:
        found = patches.parameter_state(self.optimizer, self.parameter)
        if found["param"].untyped_storage().data_ptr() == self.parameter.untyped_storage().data_ptr():
            found.pop("param")
        return {name: tensor.detach() for name, tensor in found.items()}

    def pieces(self, shard: Shard, state: dict[str, Tensor]) -> Iterator[ShardedTensor]:
        """Views of `state`, each with its place in the checkpoint; padding rows have none."""
        replica = (*shard.replica[:-1], 0)  # no data-parallel copies
        at = 0
        for low, size in flat_slices(tuple(self.parameter.shape), self.start, self.end):
            for here, there, length in shard.ranges:
                first = [max(a, b) for a, b in zip(low, here, strict=True)]
                last = [min(a + m, b + n) for a, m, b, n in zip(low, size, here, length, strict=True)]
                if any(a >= b for a, b in zip(first, last, strict=True)):
                    continue
                offset = tuple(t + f - h for t, f, h in zip(there, first, here, strict=True))
                cut = tuple(slice(f - a, b - a) for f, b, a in zip(first, last, low, strict=True))
                for name, tensor in state.items():
                    part = tensor[at : at + math.prod(size)].view(size)[cut]
                    key, shape = f"optimizer.{name}.{shard.key}", tuple(part.shape)
                    yield ShardedTensor(key, part, part.dtype, shape, shard.shape, offset, None, replica_id=replica)
            at += math.prod(size)


def _owned(optimizer: DistributedOptimizer) -> Iterator[_Owned]:
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, found in bucket["param_map"].items():
                    yield _Owned(optimizer, parameter, found["param"].start, found["param"].end)


def saved(optimizers: Iterable[DistributedOptimizer], shards: dict[nn.Parameter, Shard]) -> dict:
    """This rank's state for `stream.save_state`: views of the optimizers' own memory."""
    optimizers = list(optimizers)
    held = [(owned, owned.state()) for part in optimizers for owned in _owned(part)]
    # All parameters count the same steps. Learning rate and weight decay are the scheduler's; how parameters are grouped is the
    # layout's.
    groups = [group for part in optimizers for group in part.state_dict()["optimizer"]["param_groups"]]
    step = max((int(group["step"]) for group in groups if "step" in group), default=0)
    return {"step": step, "pieces": _pieces(held, shards)}


def _pieces(
    held: list[tuple[_Owned, dict[str, Tensor]]], shards: dict[nn.Parameter, Shard]
) -> dict[str, ShardedTensor]:
    every = (piece for owned, state in held for piece in owned.pieces(shards[owned.parameter], state))
    return {f"{n}": piece for n, piece in enumerate(every)}


class Loading:
    """Optimizers that are about to be loaded: `request` goes to `checkpoint.load`, its result to `finish`."""

    def __init__(self, optimizers: Iterable[DistributedOptimizer], shards: dict[nn.Parameter, Shard]):
        """Allocate the state of optimizers that have not taken a step; nothing of theirs moves."""
        self.optimizers = list(optimizers)
        for part in self.optimizers:
            patches.allocate_state(part)
        self.held = [(owned, owned.state()) for part in self.optimizers for owned in _owned(part)]
        for _, state in self.held:
            for tensor in state.values():
                tensor.zero_()  # padding rows are in no checkpoint
        self.request = {"pieces": _pieces(self.held, shards)}

    @torch.no_grad()
    def finish(self, loaded: dict) -> None:
        """Put the state in place; its pieces were loaded into the memory of `request`."""
        for part in self.optimizers:
            own = part.state_dict()
            for group in own["optimizer"]["param_groups"]:
                group["step"] = loaded["step"]
            part.load_state_dict(own)
        for owned, state in self.held:
            patches.set_parameter_state(owned.optimizer, owned.parameter, state)
        for part in self.optimizers:
            patches.separate_step_counters(part)
