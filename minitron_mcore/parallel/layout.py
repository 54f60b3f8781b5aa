"""Checks of a parallel layout, and a rank's place in it. Imports no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from minitron_mcore.config import ranges
from minitron_mcore.config.settings import ParallelConfig


@dataclass(frozen=True)
class Place:
    """A rank's index along each axis of a layout."""

    pipeline: int
    data: int
    context: int
    tensor: int


def teacher_ranks_problems(teacher_ranks: int, processes: int) -> list[str]:
    """Messages about a number of teacher ranks that leaves no process for the student."""
    if 0 <= teacher_ranks < processes:
        return []
    return [
        f"distill.teacher_ranks is {teacher_ranks}, but there are {processes} processes: give 0 to {processes - 1}, or start more."
    ]


def sizes(parallel: ParallelConfig) -> dict[str, int]:
    """Ranks along each model-parallel axis; "virtual": model chunks per pipeline rank."""
    return {axis: getattr(parallel, axis) for axis in ("tensor", "pipeline", "virtual", "context", "expert")}


def sequence_unit(parallel: ParallelConfig) -> int:
    """Sequence lengths must be multiples of this.

    A context-parallel rank holds one part of a sequence from its start and one from its end; sequence parallelism shards these
    over tensor-parallel ranks.
    """
    halves = 2 * parallel.context if parallel.context > 1 else 1
    return math.lcm(halves, parallel.context * parallel.tensor if parallel.sequence else 1)


def problems(parallel: ParallelConfig, world_size: int, sequence_length: int | None = None) -> Iterator[str]:
    """Messages about a layout that does not fit `world_size` processes or sequences of `sequence_length` tokens."""
    if small := [*ranges.at_least(1, {f"parallel.{axis}": size for axis, size in sizes(parallel).items()})]:
        yield from small
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
