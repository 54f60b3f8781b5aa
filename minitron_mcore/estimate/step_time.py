"""Estimated time of a training step, and the layouts of some GPUs sorted by it. Pure formulas, no torch import.

Compared are all layouts of `dry.gpus` GPUs with TP x CP within a node, sequence parallelism where TP is above 1, and no
interleaving, that divide the models and fit into `dry.memory` (see `memory`), if necessary with performance.recompute=full.
A step takes m = global_batch / (micro_batch x DP) micro-batches on each replica; a rank holds R = T / (TP x CP) of a
micro-batch's T tokens; an element has b bytes. The seconds of a step are

    compute    m x (operations of the slowest stage for a micro-batch) / (TP x CP x dry.peak_tflops x dry.mfu): a student's blocks
               three times their forward operations, four times with full recomputation; its head three times, a live teacher once
    TP, CP     m x the bytes that a rank of the stage sends (see `communication`) / dry.nvlink_gbs
    EP         m x its bytes / dry.nvlink_gbs if the EP ranks share a node, otherwise dry.network_gbs
    PP         m x its bytes / dry.network_gbs (dry.nvlink_gbs if all GPUs share a node)
    bubble     (PP - 1) / m of all of these
    DP         its bytes / dry.nvlink_gbs if a stage's ranks share a node, otherwise dry.network_gbs

Nothing overlaps and all stages take as long as the slowest, which makes the estimate too long. Products are as fast on small shards
as on large ones, which makes large TP look too good. The order of the layouts is more reliable than the times.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from minitron_mcore.config.hardware import DryConfig
from minitron_mcore.config.performance import Recompute
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks
from minitron_mcore.estimate import communication, memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models import flops, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import layout


def layouts(
    students: Sequence[Architecture],
    teacher: Architecture | None,
    training: DistillConfig,
    setting: Setting,
    dry: DryConfig,
    cached: memory.CachedTeacher | None = None,
) -> list[dict[str, Any]]:
    """Rows for every layout that fits, fastest first: axes, recomputation, GiB of the fullest rank, `step`'s figures, days.

    Args:
        students: trained at the same time.
        setting: the run's; its layout is ignored.
        cached: of the teacher, if it is not live.
    """
    rows = []
    for parallel in _candidates(students, teacher, training, setting, dry):
        for recompute in dict.fromkeys((setting.performance.recompute, Recompute.full)):
            options = dataclasses.replace(setting.performance, recompute=recompute)
            candidate = dataclasses.replace(setting, parallel=parallel, performance=options)
            stages = memory.training(students, teacher, training, candidate, cached)
            needed = max(stage["total"] for stage in stages) / memory.GIB
            if needed > dry.memory or (recompute == Recompute.full and training.hidden_state_loss.weight):
                continue
            figures = step(students, None if cached else teacher, training, candidate, dry)
            axes = {"TP": parallel.tensor, "PP": parallel.pipeline, "CP": parallel.context, "EP": parallel.expert}
            days = training.steps * figures["seconds"] / 86400
            rows.append(
                axes
                | {"DP": candidate.replicas, "recompute": recompute.value, "GiB": needed}
                | figures
                | {"days": days}
            )
            break
    return sorted(rows, key=lambda row: row["days"])


def _candidates(
    students: Sequence[Architecture],
    teacher: Architecture | None,
    training: DistillConfig,
    setting: Setting,
    dry: DryConfig,
) -> Iterator[ParallelConfig]:
    """Layouts that divide the models, the batch and the GPUs."""
    models, world = [*students, *filter(None, [teacher])], setting.world
    node = [n for n in range(1, min(dry.gpus_per_node, world) + 1) if world % n == 0]
    stages = [n for n in range(1, min(model.blocks for model in models) + 1) if world % n == 0]
    experts = [n for n in range(1, max(1, *(model.experts for model in models)) + 1) if world % n == 0]
    for tp, cp, pp, ep in ((a, b, c, d) for a in node for b in node for c in stages for d in experts):
        parallel = ParallelConfig(tensor=tp, pipeline=pp, context=cp, expert=ep, sequence=tp > 1)
        if tp * cp > dry.gpus_per_node or any(layout.problems(parallel, world, training.sequence_length)):
            continue
        dp = world // (tp * pp * cp)
        checked = (checks.problems(student, teacher, training, parallel, dp) for student in students)
        if not any(any(sharding.model_problems(model, parallel)) for model in models) and not any(map(any, checked)):
            yield parallel


def step(
    students: Sequence[Architecture],
    teacher: Architecture | None,
    training: DistillConfig,
    setting: Setting,
    dry: DryConfig,
) -> dict[str, float]:
    """Estimated seconds of a step, the share of each term in percent, and the GB that a GPU sends (see the head of this file)."""
    p, world = setting.parallel, setting.world
    m = training.global_batch // (training.micro_batch * setting.replicas)
    passes = [communication.Passes.training(student, setting) for student in students]
    passes += [communication.Passes(teacher, 1, 0)] if teacher else []
    operations = [sum(_operations(model, setting, stage) for model in passes) for stage in range(p.pipeline)]
    compute = m * max(operations) / (p.tensor * p.context * dry.peak_tflops * 1e12 * dry.mfu)
    stages = [
        communication.bytes_sent(communication.training_step(students, teacher, training, setting, n))
        for n in range(p.pipeline)
    ]
    sent = {kind: max(stage[kind] for stage in stages) for kind in communication.AXES}
    nvlink, network = dry.nvlink_gbs * 1e9, dry.network_gbs * 1e9
    rate = {kind: nvlink for kind in sent}
    rate["PP"] = nvlink if world <= dry.gpus_per_node else network
    rate["EP"] = nvlink if p.expert <= dry.gpus_per_node else network
    rate["DP"] = nvlink if world // p.pipeline <= dry.gpus_per_node else network
    seconds = {"compute": compute} | {kind: size / rate[kind] for kind, size in sent.items()}
    busy = sum(seconds[kind] for kind in ("compute", "TP", "CP", "EP", "PP"))
    seconds["bubble"] = (p.pipeline - 1) / m * busy
    total = sum(seconds.values())
    shares = {f"{kind} %": 100 * part / total for kind, part in seconds.items()}
    tokens = training.global_batch * training.sequence_length
    return {
        "GB sent": sum(sent.values()) / 1e9,
        **shares,
        "seconds": total,
        "tokens/s/GPU": tokens / total / world,
    }


def _operations(passes: communication.Passes, setting: Setting, stage: int) -> float:
    """Operations of a micro-batch on a pipeline stage, over all of its ranks."""
    arch = passes.arch
    share = sum(map(len, sharding.rank_chunks(arch, setting.parallel, stage))) / arch.blocks
    body = flops.forward_flops(arch, setting.sequence_length, head=False)
    ends = 2 * arch.vocab * arch.hidden * (stage == setting.last)
    return (
        setting.micro_batch
        * setting.sequence_length
        * (passes.products * share * body + (1 + 2 * passes.backward) * ends)
    )


def table_rows(rows: Sequence[dict[str, Any]], most: int = 10) -> list[dict[str, Any]]:
    """The fastest of `layouts`, without shares that are 0 in all of them."""
    rows = rows[:most]
    return [
        {key: value for key, value in row.items() if not key.endswith("%") or math.fsum(r[key] for r in rows)}
        for row in rows
    ]
