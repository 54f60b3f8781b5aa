"""What a training run must keep. No torch import."""

from collections.abc import Iterator, Sequence

from minitron_mcore.config import DistillConfig, ParallelConfig, StatesConfig
from minitron_mcore.models import layout
from minitron_mcore.models.architecture import Architecture

EMBEDDINGS = -1
"""In a pair of blocks: what the embedding table puts out, which is what block 0 takes in."""


def state_pairs(student: Architecture, teacher: Architecture, config: StatesConfig) -> list[tuple[int, int]]:
    """(student's block, teacher's block) whose outputs are compared; none with weight 0."""
    last = [[student.blocks - 3, teacher.blocks - 3]]
    blocks = last if config.pairs is None else config.pairs
    return [(EMBEDDINGS, EMBEDDINGS)] * config.embeddings + [(s, t) for s, t in blocks] if config.weight else []


def state_routes(
    student: Architecture, teacher: Architecture, pairs: Sequence[tuple[int, int]], parallel: ParallelConfig
) -> Iterator[tuple[int, int, int]]:
    """(teacher's block, pipeline rank that has it, pipeline rank that wants it) of each pair."""
    for own, theirs in pairs:
        source, target = (
            layout.block_rank(arch, parallel, max(block, 0)) for arch, block in ((teacher, theirs), (student, own))
        )
        yield theirs, source, target


def state_problems(student: Architecture, teacher: Architecture | None, config: StatesConfig) -> Iterator[str]:
    """Pairs of blocks that are not there, or no pair at all."""
    if config.weight == 0:
        return
    if not 0 < config.weight < float("inf"):
        yield f"distill.states.weight is {config.weight}; it must be finite and at least 0."
    if teacher is None:
        yield f"distill.states.weight is {config.weight}, but there is no teacher whose states the student's could follow."
        return
    if config.pairs is None and min(student.blocks, teacher.blocks) < 3:
        yield (
            f"a student of {student.blocks} and a teacher of {teacher.blocks} blocks have no last block but two each: "
            "give distill.states.pairs=[[student's block, teacher's block]]."
        )
    if not (config.pairs is None or config.pairs or config.embeddings):
        yield "distill.states.pairs and .embeddings are empty: give a pair of blocks, or weight 0."
    for pair in config.pairs or ():
        if len(pair) != 2:
            yield f"distill.states.pairs has {pair}: give [student's block, teacher's block]."
            continue
        for name, arch, block in (("student", student, pair[0]), ("teacher", teacher, pair[1])):
            if not 0 <= block < arch.blocks:
                yield (
                    f"distill.states.pairs names block {block} of the {name}, which has blocks 0 to {arch.blocks - 1}."
                )
        if config.pairs.count(pair) > 1:
            yield f"distill.states.pairs has {pair} twice: give it once."


def problems(
    student: Architecture, teacher: Architecture | None, config: DistillConfig, parallel: ParallelConfig, dp_size: int
) -> Iterator[str]:
    """A size below 1, vocabularies that differ, a batch that the data-parallel ranks or the interleaved pipeline don't divide, a
    warm-up as long as the run, no loss, intermediate states that are not there."""
    sizes = {name: getattr(config, name) for name in ("steps", "global_batch", "micro_batch", "sequence_length")}
    small = {name: size for name, size in sizes.items() if size < 1}
    yield from (f"{name} is {size}; it must be at least 1." for name, size in small.items())
    if teacher and teacher.vocab != student.vocab:
        yield (
            f"the teacher's vocabulary has {teacher.vocab} tokens, the student's {student.vocab}: "
            "distillation on logits needs the same tokenizer."
        )
    # The interleaved schedule takes micro-batches in groups of as many as there are pipeline ranks.
    group = parallel.pipeline if parallel.virtual > 1 else 1
    unit = config.micro_batch * dp_size * group
    if not small and config.global_batch % unit:
        interleaved = f" x parallel.pipeline {group}, interleaved," if group > 1 else ""
        yield (
            f"global_batch {config.global_batch} is not a multiple of micro_batch {config.micro_batch} x {dp_size} "
            f"data-parallel ranks{interleaved} = {unit}: give {max(1, config.global_batch // unit) * unit}."
        )
    if not 0 <= config.warmup_steps < config.steps:
        yield f"warmup_steps is {config.warmup_steps}; it must be below steps {config.steps}."
    if config.kd_weight == config.lm_weight == config.states.weight == 0:
        yield "kd_weight, lm_weight and states.weight are all 0: there is nothing to train on."
    yield from state_problems(student, teacher, config.states)
