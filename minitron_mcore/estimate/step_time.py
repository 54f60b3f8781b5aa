"""Estimated time of a training step, and the layouts of some GPUs sorted by it. Pure formulas, no torch import.

Compared are all layouts of `dry.gpus` GPUs with TP x CP within a node, sequence parallelism where TP is above 1, and no
interleaving, that divide the models and fit into `dry.memory` (see `memory`), if necessary with performance.recompute=full.
A step takes m = global_batch / (micro_batch x DP) micro-batches on each replica; a rank holds R = T / (TP x CP) of a
micro-batch's T tokens; an element has b bytes. The seconds of a step are

    compute    m x (operations of the slowest stage for a micro-batch) / (TP x CP x dry.peak_tflops x dry.mfu): a student's blocks
               three times their forward operations, four times with full recomputation; its head three times, a live teacher once
    TP         m x (collectives of that stage's layers) x (TP - 1) x R H b / dry.nvlink_gbs: an attention or dense MLP layer makes
               5 gathers and scatters of its hidden states (2 forward, 3 backward), 7 with full recomputation. The loss gathers the
               student's and the teacher's final states and scatters the student's gradient
    CP         m x (attention layers) x (CP - 1) x keys and values of a rank's tokens, T / CP x 2 G D / TP x b, over
               dry.nvlink_gbs; forward once, backward twice, once more with full recomputation
    EP         m x (layers of experts) x experts a token x (EP - 1) / EP x R H b: 4 times, sent and returned in both directions
               (2 for a teacher); dry.nvlink_gbs if the EP ranks share a node, otherwise dry.network_gbs
    PP         m x R H b, forward and backward, over dry.network_gbs (dry.nvlink_gbs if all GPUs share a node)
    bubble     (PP - 1) / m of all of these
    DP         (D - 1) / D x a rank's parameters x (gradient's + weight's bytes), D = DP x CP; without the distributed optimizer
               twice the gradient's; dry.nvlink_gbs if a stage's ranks share a node, otherwise dry.network_gbs

Nothing overlaps and all stages take as long as the slowest, which makes the estimate too long. Products are as fast on small shards
as on large ones, which makes large TP look too good. The order of the layouts is more reliable than the times.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from minitron_mcore.config.hardware import DryConfig
from minitron_mcore.config.performance import Recompute
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks
from minitron_mcore.estimate import memory
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
) -> list[dict]:
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
    recomputed = setting.performance.recompute == Recompute.full
    passes = [_Passes(student, 3 + recomputed, 3, 5 + 2 * recomputed) for student in students]
    passes += [_Passes(teacher, 1, 1, 2)] if teacher else []
    operations = [sum(_operations(model, setting, stage) for model in passes) for stage in range(p.pipeline)]
    compute = m * max(operations) / (p.tensor * p.context * dry.peak_tflops * 1e12 * dry.mfu)
    sent = {"TP": 0.0, "CP": 0.0, "EP": 0.0, "PP": 0.0}
    for model in passes:
        for kind, size in _sent(model, setting).items():
            sent[kind] += m * size
    rows = [
        memory.model_states(student, setting, n, training.distributed_optimizer)
        for student in students
        for n in {0, setting.last}
    ]
    replicas = setting.replicas * p.context
    weights = max(
        row["gradients"] + (row["weights"] if training.distributed_optimizer else row["gradients"]) for row in rows
    )
    sent["DP"] = (replicas - 1) / replicas * weights * len(students)
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


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Passes of one model over a micro-batch."""

    arch: Architecture
    blocks: int
    """Forward passes of its blocks; a backward pass counts as two."""
    head: int
    """Likewise of its head."""
    collectives: int
    """Of an attention or dense MLP layer over the tensor-parallel ranks."""

    @property
    def trained(self) -> bool:
        return self.blocks > 1


def _operations(passes: _Passes, setting: Setting, stage: int) -> float:
    """Operations of a micro-batch on a pipeline stage, over all of its ranks."""
    arch = passes.arch
    share = sum(map(len, sharding.rank_chunks(arch, setting.parallel, stage))) / arch.blocks
    body = flops.forward_flops(arch, setting.sequence_length, head=False)
    ends = 2 * arch.vocab * arch.hidden * (stage == setting.last)
    return setting.micro_batch * setting.sequence_length * (passes.blocks * share * body + passes.head * ends)


def _sent(passes: _Passes, setting: Setting) -> dict[str, float]:
    """Bytes that a GPU of the largest stage sends for a micro-batch through one model, by kind, without DP."""
    arch, trained, p, b = passes.arch, passes.trained, setting.parallel, setting.dtype_bytes
    blocks = set(sharding.stage_blocks(arch, p)[0])
    parts = [part for block, part in arch.layers if block in blocks]
    attention, mlp = parts.count("attention"), parts.count("mlp")
    states = b * arch.hidden * setting.tokens / p.tensor
    shared = passes.collectives * (attention + (0 if arch.experts else mlp)) + (2 if trained else 1)
    keys = 2 * b * arch.groups * arch.head_dim / p.tensor * setting.tokens
    routed = arch.experts_per_token * (p.expert - 1) / p.expert * states if arch.experts else 0
    return {
        "TP": shared * (p.tensor - 1) * states,
        "CP": attention * passes.blocks * (p.context - 1) * keys,
        "EP": mlp * routed * (4 if trained else 2),
        "PP": (1 + trained) * states * min(1, p.pipeline - 1),
    }


def table_rows(rows: Sequence[dict], most: int = 10) -> list[dict]:
    """The fastest of `layouts`, without shares that are 0 in all of them."""
    rows = rows[:most]
    return [
        {key: value for key, value in row.items() if not key.endswith("%") or math.fsum(r[key] for r in rows)}
        for row in rows
    ]
