"""How a model lies over processes: what a layout must keep, and what each rank of it holds. No torch import."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from minitron_mcore.config.settings import ParallelConfig


@dataclass(frozen=True)
class Place:
    """A rank's number along each axis of a layout."""

    pipeline: int
    data: int
    context: int
    tensor: int


def teacher_ranks_problems(teacher_ranks: int, processes: int) -> list[str]:
    """A number of the teacher's own ranks that leaves the student none."""
    if 0 <= teacher_ranks < processes:
        return []
    return [
        f"distill.teacher_ranks is {teacher_ranks}, but there are {processes} processes: give 0 to {processes - 1}, or start more."
    ]


def sizes(parallel: ParallelConfig) -> dict[str, int]:
    """Ranks along each model-parallel axis, and the chunks of a pipeline rank."""
    return {axis: getattr(parallel, axis) for axis in ("tensor", "pipeline", "virtual", "context", "expert")}


def sequence_unit(parallel: ParallelConfig) -> int:
    """What divides the length of every sequence: a context-parallel rank takes one part from its start and one from its end, and
    sequence parallelism shares these over tensor-parallel ranks."""
    halves = 2 * parallel.context if parallel.context > 1 else 1
    return math.lcm(halves, parallel.context * parallel.tensor if parallel.sequence else 1)


def problems(parallel: ParallelConfig, world_size: int, sequence_length: int | None = None) -> Iterator[str]:
    """What keeps a layout from a world of that many processes, or from sharing sequences of that many tokens."""
    if small := {axis: size for axis, size in sizes(parallel).items() if size < 1}:
        yield from (f"parallel.{axis} is {size}; it must be at least 1." for axis, size in small.items())
        return
    product = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % product:
        yield (
            f"{world_size} processes cannot hold tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {product}: start a multiple of {product} (torchrun --nproc-per-node) or change parallel=..."
        )
    elif world_size // parallel.pipeline % parallel.expert:
        yield (
            f"parallel.expert {parallel.expert} does not divide the {world_size // parallel.pipeline} ranks of a pipeline "
            "stage, which share the experts: give a divisor of that."
        )
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence needs parallel.tensor > 1: sequence parallelism shards over the tensor-parallel ranks."
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield f"parallel.virtual is {parallel.virtual}, but parallel.pipeline is 1: only a pipeline's stages are interleaved."
    unit = sequence_unit(parallel)
    if sequence_length and sequence_length % unit:
        context = f"parallel.context {parallel.context}, in two parts a rank" if parallel.context > 1 else ""
        tensor = f"parallel.tensor {parallel.tensor} under parallel.sequence" if parallel.sequence else ""
        yield (
            f"sequence_length {sequence_length} cannot be shared by {' and '.join(filter(None, (context, tensor)))}: "
            f"give {-(-sequence_length // unit) * unit}, or another layout."
        )
