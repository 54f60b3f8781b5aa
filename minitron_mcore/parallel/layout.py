"""How a model lies over processes: what a layout must keep, and what each rank of it holds. No torch import."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import refuse
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture


@dataclass(frozen=True)
class Place:
    """A rank's number along each axis of a layout."""

    pipeline: int
    data: int
    context: int
    tensor: int


def apart_problems(apart: int, processes: int) -> list[str]:
    """A number of the teacher's own ranks that leaves the student none."""
    if 0 <= apart < processes:
        return []
    return [
        f"distill.teacher_ranks is {apart}, but there are {processes} processes: give 0 to {processes - 1}, or start more."
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


def model_problems(arch: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    """What of a model a layout does not divide, and the nearest that it does."""
    tp = parallel.tensor
    ffn = {} if arch.experts else {"ffn": arch.ffn}
    shared = {"heads": arch.heads, "key/value groups": arch.groups, **ffn}
    if wrong := [f"{name} {n} (next: {-(-n // tp) * tp})" for name, n in shared.items() if n % tp]:
        allowed = [n for n in range(1, arch.groups + 1) if all(size % n == 0 for size in shared.values())]
        yield (
            f"parallel.tensor {tp} does not divide {', '.join(wrong)}: use tensor {' or '.join(map(str, allowed))}, "
            "or another size of the model."
        )
    if arch.experts % parallel.expert:
        counts = [str(n) for n in range(1, arch.experts + 1) if arch.experts % n == 0]
        yield (
            f"parallel.expert {parallel.expert} does not divide the model's {arch.experts} experts: use {' or '.join(counts)}."
        )
    if parallel.expert > 1 and not arch.experts:
        yield f"parallel.expert is {parallel.expert}, but the model has no experts: use expert 1."
    if arch.experts and tp > 1 and not parallel.sequence:
        yield (
            f"a mixture of experts on parallel.tensor {tp} needs parallel.sequence=true: experts are whole, so ranks share tokens."
        )
    if (stages := parallel.pipeline * parallel.virtual) > arch.blocks:
        chunks = f" x virtual {parallel.virtual} = {stages}" if parallel.virtual > 1 else ""
        yield f"parallel.pipeline {parallel.pipeline}{chunks} is more than the model's {arch.blocks} blocks."


def check_shardable(arch: Architecture, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        UserError: names every size that the layout doesn't divide, and the nearest that it does.
    """
    refuse(model_problems(arch, parallel))


def stage_blocks(arch: Architecture, parallel: ParallelConfig) -> list[list[int]]:
    """Blocks of each pipeline stage: as even as can be, earlier stages take the rest. Stage v * PP + r is chunk v of pipeline rank
    r, and without interleaving stage r is rank r."""
    return [part.tolist() for part in np.array_split(np.arange(arch.blocks), parallel.pipeline * parallel.virtual)]


def rank_chunks(arch: Architecture, parallel: ParallelConfig, rank: int) -> list[list[int]]:
    """Blocks of each chunk of a pipeline rank, which holds every PP-th stage."""
    return stage_blocks(arch, parallel)[rank :: parallel.pipeline]


def block_rank(arch: Architecture, parallel: ParallelConfig, block: int) -> int:
    """The pipeline rank that holds a block."""
    return next(n for n, own in enumerate(stage_blocks(arch, parallel)) if block in own) % parallel.pipeline


def held(
    arch: Architecture, parallel: ParallelConfig, rank: int, experts: range
) -> Iterator[parameter_table.Parameter]:
    """Parameters of which a pipeline rank has a part, of the experts only the given ones; a tied head goes by the embedding."""
    blocks, last = set(itertools.chain(*rank_chunks(arch, parallel, rank))), parallel.pipeline - 1
    for parameter in parameter_table.parameters(arch):
        first = parameter.name.startswith("embedding")
        here = parameter.block in blocks if parameter.block is not None else rank == (0 if first else last)
        if here and (parameter.expert is None or parameter.expert in experts):
            yield parameter


BAND_ALIGNMENT = 16
"""Keys: a multiple of it is as many bytes as attention's kernels want their rows to begin at, in any dtype."""


def attention_band(queries: int, keys: int, window: int) -> tuple[int, int]:
    """Rows and columns of the mask of a block of queries in `models.spec.banded_attention`: a block's queries, and the keys that it
    meets at most."""
    rows = min(queries, max(128, min(1024, window // 2)) if window < keys else 128)
    columns = min(keys, rows + window + BAND_ALIGNMENT)
    return rows, -(-columns // BAND_ALIGNMENT) * BAND_ALIGNMENT
