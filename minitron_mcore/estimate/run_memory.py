"""What a rank of a distillation holds, from the run's own settings: `cost`'s formulas for one student or several, for a live
teacher, one on ranks of its own, or one's cache. No torch import."""

import dataclasses
import math
from collections.abc import Sequence

from minitron_mcore.config.settings import Device, DistillConfig
from minitron_mcore.config.stages import CacheKind
from minitron_mcore.distill import checks
from minitron_mcore.estimate.forward_memory import scoring
from minitron_mcore.estimate.memory import Setting, training
from minitron_mcore.estimate.save_memory import saving
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture


def run(
    students: Sequence[Architecture],
    teacher: Architecture | None,
    config: DistillConfig,
    setting: Setting,
    cached: tuple[CacheKind, int | None] | None = None,
) -> list[dict[str, float]]:
    """`training` with a run's settings; of several students all states are there, and one at a time takes its step. Beside the
    total, the host memory that a save takes (`save_cost.saving`).

    Args:
        cached: kind and top_k of the teacher's cache, where it is not live.
    """
    micro_batches = max(1, config.global_batch // (setting.micro_batch * setting.replicas))
    held = config.teacher_ahead if len(students) == 1 else micro_batches
    each = [
        training(
            student,
            None if cached and cached[0] == CacheKind.topk else teacher,
            setting,
            micro_batches,
            held,
            config.distributed_optimizer,
            checks.state_pairs(student, teacher, config.hidden_state_loss) if teacher else (),
            config.teacher_parallel,
            config.teacher_ranks > 0,
            config.top_k or (cached[1] or 0 if cached else 0),
        )
        for student in students
    ]
    rows = []
    for stage, stages in enumerate(zip(*each, strict=True)):
        row = {kind: max(row[kind] for row in stages) for kind in stages[0] if kind != "total"}
        row |= {kind: sum(row[kind] for row in stages) for kind in ("weights", "gradients", "optimizer")}
        if cached:
            row |= _from_cache(
                students[0], teacher, *cached, setting, 3 if len(students) == 1 else micro_batches, stage
            )
        background = setting.device == Device.cuda if config.async_save is None else config.async_save
        saves = [saving(each, setting, stage, config.distributed_optimizer, background) for each in students]
        host = sum(saves) if background else max(saves)
        rows.append(row | {"total": sum(row.values()), "host memory of a save": host})
    return rows


def _from_cache(
    student: Architecture,
    teacher: Architecture,
    kind: CacheKind,
    k: int | None,
    setting: Setting,
    held: int,
    stage: int,
) -> dict[str, float]:
    """What a rank has of a cached teacher: on the last stage the head, where the cache has hidden states, and `held`
    micro-batches; of one student one in use and two read ahead."""
    top, tp, last = kind == CacheKind.topk, setting.parallel.tensor, stage == setting.last
    head = 0 if top else setting.dtype_bytes * parameter_table.padded_vocab(student, tp) // tp * teacher.hidden
    each = 12 * k + 4 if top else setting.dtype_bytes * teacher.hidden / setting.sequence_shards
    return {"teacher": head * last, "hand-off": held * setting.tokens * each * last}


def beside(teacher: Architecture, config: DistillConfig, setting: Setting) -> list[dict[str, float]]:
    """`scoring` of a teacher on ranks of its own, and of a step's final states what its last stage has not handed over yet."""
    teacher_parallel, ranks = config.teacher_parallel or setting.parallel, config.teacher_ranks
    own, asked = (
        dataclasses.replace(setting, parallel=teacher_parallel, world=ranks),
        config.global_batch // setting.micro_batch,
    )
    if setting.parallel.pipeline == 1:
        asked = min(asked, config.teacher_ahead * setting.replicas)
    rows = []
    for stage, row in enumerate(scoring(teacher, own)):
        each = own.dtype_bytes * teacher.hidden * own.tokens / own.sequence_shards
        kept = math.ceil(asked / own.replicas) * each * (stage == own.last)
        rows.append(row | {"hand-off": kept, "total": row["total"] + kept})
    return rows
