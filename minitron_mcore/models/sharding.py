"""How a parallel layout divides a model: divisibility, and the blocks and parameters of each pipeline rank. Imports no torch."""

import itertools
from collections.abc import Iterator

import numpy as np

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import refuse
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture


def model_problems(arch: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    """Messages about sizes that the layout does not divide, with the nearest sizes that it does."""
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
    """Raise a UserError with all `model_problems`."""
    refuse(model_problems(arch, parallel))


def stage_blocks(arch: Architecture, parallel: ParallelConfig) -> list[list[int]]:
    """Blocks of each pipeline stage, divided evenly; earlier stages take the remainder.

    Stage v * PP + r is chunk v of pipeline rank r; without interleaving, stage r is rank r.
    """
    return [part.tolist() for part in np.array_split(np.arange(arch.blocks), parallel.pipeline * parallel.virtual)]


def rank_chunks(arch: Architecture, parallel: ParallelConfig, rank: int) -> list[list[int]]:
    """Blocks of each model chunk of a pipeline rank: every PP-th stage."""
    return stage_blocks(arch, parallel)[rank :: parallel.pipeline]


def block_rank(arch: Architecture, parallel: ParallelConfig, block: int) -> int:
    """The pipeline rank of a block."""
    return next(n for n, own in enumerate(stage_blocks(arch, parallel)) if block in own) % parallel.pipeline


def parameters_on_rank(
    arch: Architecture, parallel: ParallelConfig, rank: int, experts: range
) -> Iterator[parameter_table.Parameter]:
    """Parameters of which a pipeline rank holds a shard; a tied output head is not listed beside the embedding.

    Args:
        experts: indices of the experts that the rank holds.
    """
    blocks, last = set(itertools.chain(*rank_chunks(arch, parallel, rank))), parallel.pipeline - 1
    for parameter in parameter_table.parameters(arch):
        first = parameter.name.startswith("embedding")
        here = parameter.block in blocks if parameter.block is not None else rank == (0 if first else last)
        if here and (parameter.expert is None or parameter.expert in experts):
            yield parameter
