"""Layout, memory, communication and files of a recipe's stages on 8 to 16,384 GPUs, from formulas; nothing is run.

The formulas are those of the dry run, which tests hold against measured memory and counted collectives. The layout is the fastest
for training that fits (`dry.advise`); the other stages use the same.

    python benchmarks/scaling.py [--recipe NAME] [--json FILE]
"""

import argparse
import math
from collections.abc import Iterator

import hydra
from common import Figure, parser, write

from minitron_mcore.checkpoint import disk
from minitron_mcore.cli import compose, dry_run, resolve
from minitron_mcore.config.settings import Device, ParallelConfig
from minitron_mcore.config.stages import CacheKind, DistillRun
from minitron_mcore.distill import checks
from minitron_mcore.estimate import communication, memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models import parameter_table
from minitron_mcore.reporting import tables

GPUS = (8, 64, 512, 1024, 2304, 9216, 16384)
TOP_K, FILE_SAMPLES = 64, 32


def composed(recipe: str, gpus: int) -> DistillRun:
    overrides = [f"+recipe={recipe}", "dry_run=true", "dry.advise=true", f"dry.gpus={gpus}"]
    with hydra.initialize_config_dir(str(compose.CONF), version_base="1.3"):
        return compose.compose("distill", overrides)


def training(gpus: int, layouts: list[dict]) -> dict:
    """A row of the first table: the fastest layout."""
    best, baseline = layouts[0], ("TP", "PP", "CP", "DP", "recompute", "GiB", "GB sent", "compute %", "bubble %")
    return {"GPUs": gpus} | {key: best[key] for key in (*baseline, "seconds", "tokens/s/GPU", "days")}


def stages(config: DistillRun, gpus: int, best: dict) -> Iterator[dict]:
    """Rows of the second table: of each stage on a rank of the first pipeline stage, in the layout `best`."""
    student, teacher = (resolve.models(config, [])[role][0] for role in ("student", "teacher"))
    parallel = ParallelConfig(best["TP"], best["PP"], 1, best["CP"], best["EP"], best["TP"] > 1)
    settings, samples = config.distill, config.distill.steps * config.distill.global_batch
    setting = Setting(parallel, gpus, config.dtype, 1, settings.sequence_length, Device.cuda, config.performance)
    weights = parameter_table.count(student)
    cut = _files(weights, gpus // setting.replicas // parallel.context)
    tokens = 1024 * settings.sequence_length
    forward = memory.forward_passes(teacher, setting)[0]["total"] / memory.GIB
    scoring = communication.importance(teacher, setting, 0, 1024)
    cache = communication.teacher_cache(teacher, (CacheKind.topk, TOP_K), setting, 0, samples)
    step = communication.training_step([student], teacher, settings, setting, 0)
    cached = checks.cache_bytes(CacheKind.topk, TOP_K, teacher.vocab, teacher.hidden, 2)
    host = 4 * 4 * disk.PIECE_ELEMENTS / memory.GIB  # four pieces in fp32
    yield _row(gpus, "importance", forward, 8 * tokens / memory.GIB, scoring, 1)
    yield _row(gpus, "prune", 0, host, [], cut)
    file_gib = FILE_SAMPLES * settings.sequence_length * cached / memory.GIB
    yield _row(gpus, "teacher_cache", forward, file_gib, cache, math.ceil(samples / FILE_SAMPLES))
    saved = memory.save(student, setting, 0, background=True) / memory.GIB
    yield _row(gpus, "distill, a step", best["GiB"], saved, step, _files(4 * weights, gpus))


def _files(elements: int, ranks: int) -> int:
    """Of a checkpoint whose elements `ranks` ranks write in equal shares."""
    return ranks * math.ceil(elements / ranks / disk.FILE_ELEMENTS)


def _row(
    gpus: int, stage: str, gib: float, host: float, collectives: list[communication.Collective], files: int
) -> dict:
    sent = communication.bytes_sent(collectives)
    calls = sum(each.calls for each in collectives if each.ranks > 1)
    return {
        "GPUs": gpus,
        "stage": stage,
        "GiB": gib,
        "GiB of host": host,
        "collectives": calls,
        **{f"GB {axis}": sent[axis] / 1e9 for axis in ("TP", "CP", "PP", "DP")},
        "files": files,
    }


def main(arguments: argparse.Namespace) -> None:
    first, second = [], []
    for gpus in GPUS[:: 3 if arguments.quick else 1]:
        config = composed(arguments.recipe, gpus)
        layouts = dry_run.plan(config)["layouts"]
        if layouts:
            first.append(training(gpus, layouts))
            second += stages(config, gpus, layouts[0])
        else:
            print(f"{gpus} GPUs: no layout divides the batch and fits")
    tables.table(f"training of {arguments.recipe}: the fastest layout", first)
    tables.table("stages, on a rank of the first pipeline stage", second)
    figures = [
        Figure("scaling", f"{row['GPUs']} GPUs {row.get('stage', 'training')}", "formula", key, value, key.split()[0])
        for row in (*first, *second)
        for key, value in row.items()
        if isinstance(value, int | float)
    ]
    write(figures, arguments.json)


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--recipe", default="llama31_minitron_4b_width")
    main(options.parse_args())
