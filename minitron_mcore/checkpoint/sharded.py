"""Which part of a checkpoint's global tensors each rank of a model holds."""

from dataclasses import dataclass

from torch import Tensor, nn

from minitron_mcore.models import build, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip


def sharded_tensors(
    parameter: parameter_table.Parameter, pieces: list[tuple[tuple[int, ...], Tensor]], replica: tuple[int, ...]
) -> dict:
    """ShardedTensors of a rank's pieces of one parameter, by unique names.

    Args:
        parameter: defines key and global shape.
        pieces: (offset in the global tensor, local tensor). Sizes may differ between ranks.
        replica: replica id; of ranks that hold the same piece, the one with all zeros writes it.
    """
    return {
        f"{parameter.name}@{n}": ShardedTensor(
            parameter.name, data, data.dtype, tuple(data.shape), parameter.shape, offset, None, replica_id=replica
        )
        for n, (offset, data) in enumerate(pieces)
        if data.numel()
    }


@dataclass(frozen=True)
class Shard:
    """Position of a rank's local tensor in the global tensor of a checkpoint. Padding rows are in no range."""

    key: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    replica: tuple[int, ...]
    """Replica id: all zeros on one of the ranks that hold the same shard. The last entry is the data-parallel rank."""
    ranges: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    """(offset in the local tensor, offset in the global tensor, shape) of each part."""


def model_shards(model: build.Model, arch: Architecture) -> dict[nn.Parameter, Shard]:
    """The Shard of each parameter on this rank: blocks of its pipeline stage, its tensor-parallel slices, its experts.

    Keys and global shapes are those of the parameter table.
    """
    by_name, tp, shards = {p.name: p for p in parameter_table.parameters(arch)}, process_groups.tp_group(), {}
    for name, tensor in build.named_parameters(model):
        parameter, tp_dim = by_name[name], by_name[name].row.tp_dim
        tied_copy = name == "embedding.word_embeddings.weight" and not process_groups.is_first_stage()
        replica = (int(tied_copy), 0 if tp_dim is not None else tp.rank(), process_groups.dp_cp_group().rank())
        if parameter.expert is not None:
            replica = (0, 0, process_groups.expert_dp_group().rank())
        shards[tensor] = Shard(
            name, parameter.shape, replica, shard_ranges(parameter, tuple(tensor.shape), tp.rank(), tp.size())
        )
    return shards


def tensors(shards: dict[nn.Parameter, Shard]) -> dict:
    """ShardedTensors of this rank's parameters, of which they are views."""
    return {
        f"{n}.{k}": ShardedTensor(
            shard.key, part, part.dtype, tuple(part.shape), shard.shape, offset, None, replica_id=shard.replica
        )
        for n, (tensor, shard) in enumerate(shards.items())
        for k, (offset, part) in enumerate(_parts(tensor.data, shard.ranges))
        if part.numel()
    }


def shard_ranges(
    parameter: parameter_table.Parameter, shape: tuple[int, ...], tp_rank: int, tp_size: int
) -> list[tuple]:
    """`Shard.ranges` of a tensor-parallel rank's local tensor of this shape."""
    dim, ranges, start = parameter.row.tp_dim, [], 0
    if dim is None:
        return [((0,) * len(shape), (0,) * len(shape), shape)]
    for low, high in parameter_table.tp_slices(parameter.row.axes[dim], parameter.arch, tp_rank, tp_size):
        local, offset = (tuple(x if n == dim else 0 for n in range(len(shape))) for x in (start, low))
        ranges.append((local, offset, (*shape[:dim], high - low, *shape[dim + 1 :])))
        start += high - low
    return ranges


def shard_views(parameter: parameter_table.Parameter, tensor: Tensor, tp_rank: int, tp_size: int) -> list[tuple]:
    """(offset in the global tensor, view of the local tensor) of each range of a tensor-parallel rank's local tensor."""
    return _parts(tensor, shard_ranges(parameter, tuple(tensor.shape), tp_rank, tp_size))


def _parts(tensor: Tensor, ranges: list[tuple]) -> list[tuple[tuple[int, ...], Tensor]]:
    spans = [(offset, [slice(a, a + n) for a, n in zip(local, shape, strict=True)]) for local, offset, shape in ranges]
    return [(offset, tensor[tuple(span)]) for offset, span in spans]
