"""Collectives by formula against those that ranks make: a failure means that the step time and docs/scaling.md are wrong."""

import collections
import dataclasses

import pytest
import torch

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.config.performance import PerformanceConfig, Recompute
from minitron_mcore.config.settings import Device, DistillConfig, Dtype, ParallelConfig
from minitron_mcore.config.stages import CacheKind
from minitron_mcore.distill import cache_writer, metrics
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.estimate import communication
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.importance.collector import score
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.testing import on_ranks, random_checkpoint
from tests.helpers import cached_teacher
from tests.helpers.collectives import SCALARS, counted

STUDENT = Architecture("llama", 5, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, tied=True)
MODELS = {
    "student": STUDENT,
    "teacher": dataclasses.replace(STUDENT, hidden=48, ffn=42),
    "experts": dataclasses.replace(STUDENT, family="mixtral", blocks=3, ffn=14, experts=6, experts_per_token=3),
}
CONFIG = DistillConfig(steps=4, global_batch=8, micro_batch=2, sequence_length=24, warmup_steps=1, teacher_ahead=2)
CACHES = [(CacheKind.topk, 5, 0), (CacheKind.topk, 7, 3), (CacheKind.hidden, None, 0)]
"""Kind, entries of a token, and how many of them are drawn."""
TABLE = {
    1: 101 * 48 * 2,
    2: 51 * 48 * 2,
}  # bytes of a rank's part of the teacher's table, by TP: 101 rows are padded to 102
FULL = PerformanceConfig(recompute=Recompute.full)
LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor=2), "student", PerformanceConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True), "student", PerformanceConfig(loss_chunk_mb=1)),
    "tp2_sp recomputed": (2, ParallelConfig(tensor=2, sequence=True), "student", FULL),
    "pp2": (2, ParallelConfig(pipeline=2), "student", PerformanceConfig()),
    "pp2 interleaved": (2, ParallelConfig(pipeline=2, virtual=2), "student", PerformanceConfig()),
    "cp2": (2, ParallelConfig(context=2), "student", FULL),
    "dp2": (2, ParallelConfig(), "student", PerformanceConfig(grad_reduce_in_fp32=False)),
    "ep2": (2, ParallelConfig(expert=2), "experts", PerformanceConfig()),
    "tp2_sp_ep2": (2, ParallelConfig(tensor=2, sequence=True, expert=2), "experts", PerformanceConfig()),
    "tp2_sp_pp2_cp2": (8, ParallelConfig(tensor=2, sequence=True, pipeline=2, context=2), "student", FULL),
    "tp2_sp_pp2_ep2_dp2": (
        8,
        ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2),
        "experts",
        PerformanceConfig(),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    on_ranks(write, 1, ParallelConfig(), folder)
    cached_teacher.write_text(folder)
    return folder


def write(folder) -> None:
    for name, arch in MODELS.items():
        random_checkpoint(arch, folder / name, "bf16")


def work(folder, student: str, parallel: ParallelConfig, performance: PerformanceConfig) -> tuple:
    """This rank's place, and its calls and bytes in a training step, in scoring, and in writing teacher caches."""
    opened = run_folder.open_checkpoint(folder / student)
    teacher = run_folder.open_checkpoint(folder / "teacher") if student == "student" else None
    config = CONFIG if teacher else dataclasses.replace(CONFIG, kd_weight=0.0, lm_weight=1.0)
    trainer = Trainer(opened, teacher, config, parallel, "bf16", performance=performance)
    count = config.global_batch // (config.micro_batch * process_groups.dp_group().size())
    ids = torch.randint(0, 101, (count, 2, 25))
    batches = [{"tokens": x[:, :-1], "labels": x[:, 1:], "loss_mask": torch.ones(2, 24)} for x in ids]
    trainer.train_step(batches)
    with counted() as training:
        trainer.train_step(batches)
        metrics.rank_figures(0.0, 0.0)
    model = run_folder.build_model(opened, parallel, "bf16")
    tokens = torch.randint(0, 101, (8, 24))
    with counted() as scoring:
        score(model, opened, tokens, torch.ones_like(tokens, dtype=torch.bool), 2)
    counts, world = [training, scoring], cached_teacher.World(folder, [str(folder / name) for name in "ab"], Dtype.bf16)
    for kind, entries, draws in CACHES if teacher else ():
        sizes = {"sequence_length": 24, "file_samples": 4, "kind": kind, "top_k": (entries or 64) - draws}
        name = f"{kind} {draws} {parallel} {performance.recompute}"
        cache = dataclasses.replace(world.writer(name, parallel), tail_draws=draws, **sizes)
        with counted() as writing:
            cache_writer.run(cache, teacher)
        counts.append(writing)
    return process_groups.place(), [(each.calls, each.bytes) for each in counts]


def by_formula(collectives: list[communication.Collective]) -> tuple:
    calls, sizes = collections.Counter(), collections.Counter()
    for each in collectives:
        if each.ranks > 1 and each.calls and each.size > SCALARS:
            ranks = 2 if each.operation == "send" else each.ranks
            calls[each.operation, ranks] += each.calls
            sizes[each.operation, ranks] += each.calls * each.size
    return calls, sizes


@pytest.mark.default_cases("tp2_sp", "tp2_sp_pp2_ep2_dp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_are_those_of_the_formulas(folder, layout):
    world, parallel, student, performance = LAYOUTS[layout]
    setting = Setting(parallel, world, Dtype.bf16, 2, 24, Device.cpu, performance)
    arch, teacher = MODELS[student], MODELS["teacher"] if student == "student" else None
    for place, counts in on_ranks(work, world, parallel, folder, student, parallel, performance):
        stage = place.pipeline
        expected = [
            communication.training_step([arch], teacher, CONFIG, setting, stage),
            communication.importance(arch, setting, stage, 8),
            *(communication.teacher_cache(teacher, each, setting, stage, 16, n) for *each, n in CACHES if teacher),
        ]
        for number, (measured, collectives) in enumerate(zip(counts, expected, strict=True)):
            if number > 1 and place.tensor:
                continue  # these ranks pack nothing
            if number > 1 and parallel.pipeline > 1:  # building a model with a tied table makes its copies agree
                collectives.append(communication.Collective("PP", "all_reduce", 2, 1, TABLE[parallel.tensor]))
            calls, sizes = by_formula(collectives)
            buffers = by_formula([each for each in collectives if each.axis == "DP"])[1]
            assert measured[0] == calls, (number, place)
            for key, size in sizes.items():
                # In a buffer of gradients each parameter starts at a multiple of 64 elements; all else is exact.
                assert measured[1][key] == pytest.approx(size, abs=0.04 * buffers[key], rel=0), (number, place, key)
