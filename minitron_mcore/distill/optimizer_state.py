"""The distributed optimizer's state in a checkpoint: tensors "optimizer.exp_avg.NAME" and the like, shaped as the parameter NAME.

megatron-core shards the state over the data-parallel ranks as ranges of flattened parameters. A range is at most three rectangular
slices of its parameter (the end of a row, whole rows, the start of a row). So every rank writes and reads its own elements in any
layout, without communication or a copy. megatron-core's own resharding format gathers a stage's whole state on each rank.

The fp32 copy of bf16 weights is "optimizer.param.NAME"; fp32 weights have none.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitron_mcore.checkpoint.sharded import Shard
from minitron_mcore.parallel.megatron_patches import optimizer_state as patches

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # isort: skip


def flat_slices(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the slices that make up elements start..end of a flattened tensor [N] or [rows, columns], in order."""
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
class _Range:
    """The elements start..end of a flattened parameter, whose optimizer state this data-parallel rank holds."""

    optimizer: DistributedOptimizer
    parameter: nn.Parameter
    start: int
    end: int

    def state(self) -> dict[str, Tensor]:
        """By name, tensors [end - start]: the moments, and "param" for bf16 weights."""
        tensors = patches.parameter_state(self.optimizer, self.parameter)
        if tensors["param"].untyped_storage().data_ptr() == self.parameter.untyped_storage().data_ptr():
            tensors.pop("param")
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def pieces(self, shard: Shard, state: dict[str, Tensor]) -> Iterator[ShardedTensor]:
        """Views of `state` with their offsets in the checkpoint; padding rows are left out."""
        replica = (*shard.replica[:-1], 0)  # no data-parallel copies
        at = 0
        for low, size in flat_slices(tuple(self.parameter.shape), self.start, self.end):
            for local, target, length in shard.ranges:
                first = [max(a, b) for a, b in zip(low, local, strict=True)]
                last = [min(a + m, b + n) for a, m, b, n in zip(low, size, local, length, strict=True)]
                if any(a >= b for a, b in zip(first, last, strict=True)):
                    continue
                offset = tuple(t + f - h for t, f, h in zip(target, first, local, strict=True))
                cut = tuple(slice(f - a, b - a) for f, b, a in zip(first, last, low, strict=True))
                for name, tensor in state.items():
                    part = tensor[at : at + math.prod(size)].view(size)[cut]
                    key, shape = f"optimizer.{name}.{shard.key}", tuple(part.shape)
                    yield ShardedTensor(key, part, part.dtype, shape, shard.shape, offset, None, replica_id=replica)
            at += math.prod(size)


def local_ranges(optimizer: DistributedOptimizer) -> Iterator[_Range]:
    """The ranges of parameters whose state this data-parallel rank holds."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, maps in bucket["param_map"].items():
                    yield _Range(optimizer, parameter, maps["param"].start, maps["param"].end)


def sharded_state(optimizers: Iterable[DistributedOptimizer], shards: dict[nn.Parameter, Shard]) -> dict[str, Any]:
    """This rank's optimizer state for `streaming.save_state`: the step, and views of its moments and fp32 weights.

    `shards`: the slices in the checkpoint of every parameter that the optimizers train.
    """
    optimizers = list(optimizers)
    states = [(part, part.state()) for optimizer in optimizers for part in local_ranges(optimizer)]
    # The step is the same for all parameters. Learning rate and weight decay are in the scheduler's state; the parameter groups
    # follow from the layout.
    groups = [group for part in optimizers for group in part.state_dict()["optimizer"]["param_groups"]]
    step = max((int(group["step"]) for group in groups if "step" in group), default=0)
    return {"step": step, "pieces": _pieces(states, shards)}


def _pieces(
    states: list[tuple[_Range, dict[str, Tensor]]], shards: dict[nn.Parameter, Shard]
) -> dict[str, ShardedTensor]:
    pieces = (piece for part, state in states for piece in part.pieces(shards[part.parameter], state))
    return {f"{n}": piece for n, piece in enumerate(pieces)}


class StateLoader:
    """Loads optimizers in place: pass `request` to `run_folder.load`, and its result to `finish`."""

    def __init__(self, optimizers: Iterable[DistributedOptimizer], shards: dict[nn.Parameter, Shard]):
        """Allocate the state of optimizers before their first step; weights do not change."""
        self.optimizers = list(optimizers)
        for part in self.optimizers:
            patches.allocate_state(part)
        self.states = [(part, part.state()) for optimizer in self.optimizers for part in local_ranges(optimizer)]
        for _, state in self.states:
            for tensor in state.values():
                tensor.zero_()  # padding rows are not in the checkpoint
        self.request = {"pieces": _pieces(self.states, shards)}

    @torch.no_grad()
    def finish(self, loaded: dict[str, Any]) -> None:
        """Set the step and the state; the pieces are already in the tensors of `request`."""
        for part in self.optimizers:
            state_dict = part.state_dict()
            for group in state_dict["optimizer"]["param_groups"]:
                group["step"] = loaded["step"]
            part.load_state_dict(state_dict)
        for part, state in self.states:
            patches.set_parameter_state(part.optimizer, part.parameter, state)
        for optimizer in self.optimizers:
            patches.separate_step_counters(optimizer)
