"""Checks of a training run's config against its models and layout. No torch import."""

import math
import os
from collections.abc import Iterator, Sequence

from minitron_mcore.config import ranges
from minitron_mcore.config.performance import Kernels, PerformanceConfig
from minitron_mcore.config.settings import (
    DataConfig,
    DistillConfig,
    Divergence,
    HiddenStateLossConfig,
    ParallelConfig,
)
from minitron_mcore.config.stages import CacheKind, CorrectRun, Run, TeacherCacheRun
from minitron_mcore.distill import vocabulary
from minitron_mcore.distill.loss_config import LossConfig
from minitron_mcore.models import sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import layout

EMBEDDINGS = -1
"""In a pair of blocks: the embedding table's output, which is block 0's input."""

Route = tuple[int, int, int]
"""(teacher's block, the teacher's pipeline rank that computes it, the student's pipeline rank that needs it)."""

CACHE_INDEX = "index.json"
"""The file that makes a folder a teacher cache."""
DISTILL = "distill."
"""Before the names of a distillation's settings."""
NO_TEACHER_RANKS = "distill.teacher_ranks is for launch/distill.py: give 0 here."


def prefix_of(config: Run) -> str:
    """What precedes the names of a stage's training settings on the command line."""
    return "correct." if isinstance(config, CorrectRun) else DISTILL


def state_pairs(student: Architecture, teacher: Architecture, config: HiddenStateLossConfig) -> list[tuple[int, int]]:
    """(student's block, teacher's block) whose outputs are compared; empty with weight 0."""
    default = [[student.blocks - 3, teacher.blocks - 3]]
    blocks = default if config.pairs is None else config.pairs
    return [(EMBEDDINGS, EMBEDDINGS)] * config.embeddings + [(s, t) for s, t in blocks] if config.weight else []


def state_routes(
    student: Architecture,
    teacher: Architecture,
    pairs: Sequence[tuple[int, int]],
    parallel: ParallelConfig,
    teacher_parallel: ParallelConfig | None = None,
) -> Iterator[Route]:
    """The route of each pair; `teacher_parallel`: the teacher's layout, if it is not the student's."""
    for block, teacher_block in pairs:
        source = sharding.block_rank(teacher, teacher_parallel or parallel, max(teacher_block, 0))
        yield teacher_block, source, sharding.block_rank(student, parallel, max(block, 0))


def state_problems(
    student: Architecture, teacher: Architecture | None, config: HiddenStateLossConfig, kd_weight: float
) -> Iterator[str]:
    """Problems of the hidden-state loss: weight, dynamic weight, missing teacher, blocks that do not exist, no pair."""
    if config.weight == 0:
        return
    if not 0 < config.weight < float("inf"):
        yield f"distill.hidden_state_loss.weight is {config.weight}; it must be finite and at least 0."
    if config.dynamic and kd_weight == 0:
        yield (
            "distill.hidden_state_loss.dynamic scales by the ratio to the divergence, but distill.kd_weight is 0: give a fixed "
            "weight, distill.hidden_state_loss.dynamic=false."
        )
    if teacher is None:
        yield (
            f"distill.hidden_state_loss.weight is {config.weight}, but there is no teacher whose hidden states the student could "
            "match: give 0."
        )
        return
    if config.pairs is None and min(student.blocks, teacher.blocks) < 3:
        yield (
            f"a student of {student.blocks} and a teacher of {teacher.blocks} blocks do not both have a third block from the "
            "end: give distill.hidden_state_loss.pairs=[[student's block, teacher's block]]."
        )
    if not (config.pairs is None or config.pairs or config.embeddings):
        yield "distill.hidden_state_loss.pairs and .embeddings are empty: give a pair of blocks, or weight 0."
    for pair in config.pairs or ():
        if len(pair) != 2:
            yield f"distill.hidden_state_loss.pairs has {pair}: give [student's block, teacher's block]."
            continue
        for name, arch, block in (("student", student, pair[0]), ("teacher", teacher, pair[1])):
            if not 0 <= block < arch.blocks:
                yield (
                    f"distill.hidden_state_loss.pairs names block {block} of the {name}, which has blocks 0 to {arch.blocks - 1}."
                )
        if config.pairs.count(pair) > 1:
            yield f"distill.hidden_state_loss.pairs has {pair} twice: give it once."


def teacher_problems(
    teacher: Architecture | None, config: DistillConfig, parallel: ParallelConfig, dp_size: int
) -> Iterator[str]:
    """Problems of the teacher's own layout with the teacher and the number of ranks."""
    if config.teacher_parallel is None and not config.teacher_ranks:
        return
    if teacher is None:
        yield "distill.teacher_parallel and .teacher_ranks lay out a teacher, but there is none: give null and 0."
        return
    teacher_parallel = config.teacher_parallel or parallel
    world = config.teacher_ranks or dp_size * parallel.tensor * parallel.pipeline * parallel.context
    problems = list(layout.problems(teacher_parallel, world, config.sequence_length)) or sharding.model_problems(
        teacher, teacher_parallel
    )
    yield from (f"distill.teacher_parallel: {problem}" for problem in problems)


def problems(
    student: Architecture,
    teacher: Architecture | None,
    config: DistillConfig,
    parallel: ParallelConfig,
    dp_size: int,
    prefix: str = DISTILL,
) -> Iterator[str]:
    """Problems of sizes, batch, warm-up, sequence length and loss weights, and those of `ranges.training`, `divergence`,
    `teacher_problems` and `state_problems`. `prefix`: see `prefix_of`."""
    names = ("steps", "global_batch", "micro_batch", "sequence_length", "teacher_ahead")
    yield from (small := list(ranges.at_least(1, {f"{prefix}{name}": getattr(config, name) for name in names})))
    # The interleaved schedule needs a multiple of the pipeline ranks.
    group = parallel.pipeline if parallel.virtual > 1 else 1
    unit = config.micro_batch * dp_size * group
    if not small and config.global_batch % unit:
        interleaved = f" x parallel.pipeline {group}, interleaved," if group > 1 else ""
        yield (
            f"{prefix}global_batch {config.global_batch} is not a multiple of {prefix}micro_batch {config.micro_batch} x "
            f"{dp_size} data-parallel ranks{interleaved} = {unit}: give {max(1, config.global_batch // unit) * unit}."
        )
    if not 0 <= config.warmup_steps < config.steps:
        yield f"{prefix}warmup_steps is {config.warmup_steps}; it must be below {prefix}steps {config.steps}."
    yield from ranges.training(config, prefix)
    yield from ranges.not_negative({f"{prefix}{name}": getattr(config, name) for name in ("kd_weight", "lm_weight")})
    yield from ranges.positions(
        f"{prefix}sequence_length",
        config.sequence_length,
        student=student.max_positions,
        teacher=teacher and teacher.max_positions,
    )
    if config.kd_weight == config.lm_weight == config.hidden_state_loss.weight == 0:
        yield "distill.kd_weight, .lm_weight and .hidden_state_loss.weight are all 0: there is nothing to train on."
    yield from teacher_problems(teacher, config, parallel, dp_size)
    yield from state_problems(student, teacher, config.hidden_state_loss, config.kd_weight)
    yield from divergence(config, vocabulary.shared(student, teacher), prefix)


def teacher_folders(folders: Sequence[str]) -> Iterator[str]:
    """Problems of the folders that `teachers` names."""
    for folder in folders:
        if os.path.isfile(os.path.join(folder, CACHE_INDEX)):
            yield f"teachers has {folder}, a teacher cache: give checkpoints, or this cache alone as teacher."


def several_teachers(teachers: Sequence[Architecture | None], config: DistillConfig) -> Iterator[str]:
    """Problems of several teachers with each other and with settings that are for one."""
    if len(teachers) < 2:
        return
    if len(sizes := {teacher.vocab for teacher in teachers if teacher}) > 1:
        yield f"the teachers have vocabularies of {sorted(sizes)} tokens: give teachers that share one tokenizer."
    if config.hidden_state_loss.weight:
        yield (
            f"distill.hidden_state_loss.weight is {config.hidden_state_loss.weight}, but it is for blocks of one teacher, not of "
            f"{len(teachers)}: give 0."
        )
    if config.teacher_ranks:
        yield f"distill.teacher_ranks is {config.teacher_ranks}, but its ranks hold one teacher, not {len(teachers)}: give 0."


def on_policy(config: DistillConfig, performance: PerformanceConfig, students: int) -> Iterator[str]:
    """Problems of learning on the answers of the `students`."""
    settings, prefix = config.on_policy, "distill.on_policy."
    if not 0 <= settings.share <= 1:
        yield f"{prefix}share is {settings.share:g}; it must be from 0 to 1."
    if not settings.share:
        return
    yield from ranges.at_least(1, {f"{prefix}{name}": getattr(settings, name) for name in ("tokens", "micro_batch")})
    yield from ranges.sampling(settings, prefix)
    yield from ranges.text_files(f"{prefix}prompts", settings.prompts)
    if settings.tokens >= config.sequence_length:
        yield (
            f"{prefix}tokens is {settings.tokens}, which leaves no room for a prompt in distill.sequence_length "
            f"{config.sequence_length}: give fewer."
        )
    reason = f"{prefix}share is {settings.share:g}, but"
    if students > 1:
        yield f"{reason} {students} students would learn from different answers: train them in separate runs, or give 0."
    if config.lm_weight or not config.kd_weight:
        yield (
            f"{reason} the student's answers are no labels to learn, and distill.lm_weight is {config.lm_weight:g} and .kd_weight "
            f"{config.kd_weight:g}: give lm_weight 0 and a kd_weight above 0."
        )
    if performance.fp8 is not None:
        yield (
            f"{reason} performance.fp8 needs multiples of 16 tokens, and generation has any number of them: give null."
        )
    if performance.tp_comm_overlap:
        yield (
            f"{reason} performance.tp_comm_overlap has buffers for the shape of the training's micro-batches, which answers do not "
            "have: turn it off."
        )


def document_problems(data: DataConfig, kernels: Kernels) -> Iterator[str]:
    """Problems of `data.document_mask` with the layers."""
    if data.document_mask and kernels.transformer_engine and os.environ.get("MINITRON_LAYERS") != "torch":
        yield (
            "data.document_mask is true, which torch's attention computes, but not Transformer Engine's here: set "
            "MINITRON_LAYERS=torch, or give false."
        )


def heldout_problems(
    config: Run, training: DistillConfig, student: Architecture, teacher: Architecture | None
) -> Iterator[str]:
    """Problems of measuring the student on the held-out text every `training.eval_every` steps.

    `teacher`: live, whose divergence is measured too.
    """
    if training.eval_every is None:
        return
    length, prefix, layouts = config.evaluate.sequence_length, prefix_of(config), [config.parallel]
    layouts += [training.teacher_parallel] if teacher and training.teacher_parallel else []
    unit = math.lcm(*map(layout.sequence_unit, layouts))
    yield from ranges.at_least(1, {f"{prefix}eval_every": training.eval_every})
    yield from ranges.heldout_text(config.data)
    yield from ranges.evaluation(config.evaluate)
    limits = {"student": student.max_positions, "teacher": teacher and teacher.max_positions}
    yield from ranges.positions("evaluate.sequence_length", length, **limits)
    if length % unit:
        yield (
            f"evaluate.sequence_length is {length}, but the layout shards sequences of a multiple of {unit} tokens: give "
            f"{-(-length // unit) * unit}."
        )
    if config.performance.tp_comm_overlap:
        yield (
            "performance.tp_comm_overlap has buffers for the shape of the training's micro-batches, which held-out windows do not "
            f"have: give {prefix}eval_every null, or turn it off."
        )


def divergence(config: DistillConfig | LossConfig, vocab: int, prefix: str = "") -> Iterator[str]:
    """Problems of temperature, jsd_beta and top_k with the divergence and the vocabulary; `prefix`: of their names."""
    kind, jsd_beta, top_k, temperature = config.divergence, config.jsd_beta, config.top_k, config.temperature
    if not 0 < temperature < float("inf"):
        yield f"{prefix}temperature is {temperature}; it must be above 0 and finite."
    elif temperature != 1 and kind in (Divergence.mse, Divergence.cosine):
        yield f"{prefix}temperature is {temperature}, but divergence {kind} does not use it: give temperature 1."
    if kind == Divergence.jsd and not 0 < jsd_beta < 1:
        yield (
            f"{prefix}jsd_beta is {jsd_beta}; it must be above 0 and below 1 (the limits are divergence forward_kl and reverse_kl)."
        )
    if top_k is not None and kind != Divergence.forward_kl:
        yield f"{prefix}top_k is {top_k}, but divergence {kind} takes the whole vocabulary: give forward_kl, or top_k null."
    elif top_k is not None and not 1 <= top_k < vocab:
        yield f"{prefix}top_k is {top_k}; it must be at least 1 and below the vocabulary of {vocab}, which is top_k null."


def top_k_teacher(k: int, config: DistillConfig | LossConfig, prefix: str = "") -> Iterator[str]:
    """Problems of a divergence from a teacher's k largest log-probabilities instead of its logits; `prefix`: as `divergence`."""
    if config.divergence != Divergence.forward_kl or config.temperature != 1:
        yield (
            f"{prefix}divergence {config.divergence} at temperature {config.temperature:g} cannot be computed from the "
            f"teacher's {k} largest log-probabilities: give forward_kl and temperature 1."
        )
    if config.top_k not in (None, k):
        yield (
            f"{prefix}top_k is {config.top_k}, but the teacher's {k} largest log-probabilities are cached: give top_k {k} or null."
        )


def cache_problems(config: TeacherCacheRun, teacher: Architecture) -> Iterator[str]:
    """Problems of the config of a teacher's cache."""
    names = ("steps", "global_batch", "micro_batch", "sequence_length", "file_samples")
    yield from ranges.at_least(1, {name: getattr(config, name) for name in names})
    yield from ranges.positions("sequence_length", config.sequence_length, teacher=teacher.max_positions)
    if config.kind != CacheKind.topk:
        if config.tail_draws:
            yield f"tail_draws is {config.tail_draws}, but kind {config.kind} has no drawn entries: give 0, or kind=topk."
        return
    yield from ranges.at_least(0, {"top_k": config.top_k, "tail_draws": config.tail_draws})
    if not 1 <= config.entries < teacher.vocab:
        yield (
            f"top_k is {config.top_k} and tail_draws {config.tail_draws}; their sum must be at least 1 and below the teacher's "
            f"vocabulary of {teacher.vocab}."
        )


def cache_bytes(kind: CacheKind, k: int, vocab: int, hidden: int, dtype_bytes: int) -> int:
    """Bytes of a token in a teacher's cache (see `cache`); `hidden`: the width H."""
    if kind == CacheKind.topk:
        return (4 if vocab <= 1 << 16 else 5) * k + 2
    return dtype_bytes * hidden if kind == CacheKind.hidden else hidden + 4
