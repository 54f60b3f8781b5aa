"""Prints the estimated memory and disk space of a training run before anything is built."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.settings import Device, DistillConfig
from minitron_mcore.config.stages import StageRun
from minitron_mcore.distill import teachers
from minitron_mcore.distill.cache import Cache
from minitron_mcore.estimate import checkpoints, memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.parallel import process_groups
from minitron_mcore.reporting import tables


def print_memory(
    config: StageRun, settings: DistillConfig, students: Sequence[Checkpoint], teacher: Checkpoint | Cache | None
) -> None:
    """Print the estimated GiB by kind of a rank of the fullest pipeline stage, and the size of checkpoints; warn if less is free.

    Call it on all ranks after `distill.run.check_run` with the same arguments.
    """
    device = Device(process_groups.device().type)
    cached = (teacher.kind, teacher.index["top_k"]) if isinstance(teacher, Cache) else None
    sizes, options = (settings.micro_batch, settings.sequence_length), (config.performance, config.data.document_mask)
    setting = Setting(config.parallel, dist.get_world_size(), config.dtype, *sizes, device, *options)
    archs = [student.arch for student in students]
    others = [each.arch for each in teachers.members(teacher)[1:]]
    rows = memory.training(archs, teacher.arch if teacher else None, settings, setting, cached, others)
    free = process_groups.free_bytes() / memory.GIB
    stage = max(range(len(rows)), key=lambda n: rows[n]["total"])
    needed = {kind: size / memory.GIB for kind, size in rows[stage].items() if size}
    fullest = f"a rank of pipeline stage {stage}, the fullest," if len(rows) > 1 else "a rank"
    tables.table(f"GiB that {fullest} will hold", [needed], [f"free for rank 0: {free:.3g} GiB"])
    if teacher and settings.teacher_ranks:
        row = max(memory.remote_teacher(teacher.arch, settings, setting), key=lambda row: row["total"])
        tables.table(
            "GiB that a rank of the teacher will hold", [{kind: size / memory.GIB for kind, size in row.items()}]
        )
    _print_checkpoints(config, checkpoints.estimate(archs, settings, config.dtype, config.dry.disk_gbs))
    if device == Device.cpu:  # copies for a background save are in the same memory
        needed["total"] += needed.get("host memory of a save", 0)
    if needed["total"] > free:
        process_groups.log(
            f"warning: a rank needs {needed['total']:.3g} GiB, but {free:.3g} are free: divide the model by more ranks "
            "(parallel.tensor, .pipeline, .sequence), recompute activations (performance.recompute=full) or use smaller "
            "micro-batches."
        )


def _print_checkpoints(config: StageRun, figures: dict[str, float]) -> None:
    folder = next(path for path in (Path(config.out_dir), *Path(config.out_dir).absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    notes = [f"written at dry.disk_gbs {config.dry.disk_gbs:g} GB/s; free for {config.out_dir}: {free / 1e9:.3g} GB"]
    tables.table("checkpoints", [checkpoints.table_row(figures)], notes)
    if figures["disk"] > free:
        process_groups.log(
            f"warning: checkpoints will take {figures['disk'] / 1e9:.3g} GB, but {free / 1e9:.3g} are free: make room, or keep "
            "fewer (keep_last, keep_every)."
        )
