"""Prints the estimated memory of a training run before anything is built."""

from collections.abc import Sequence

import torch.distributed as dist

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.settings import Device, DistillConfig
from minitron_mcore.config.stages import StageRun
from minitron_mcore.distill.cache import Cache
from minitron_mcore.estimate import memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.parallel import process_groups
from minitron_mcore.reporting import tables


def print_memory(
    config: StageRun, settings: DistillConfig, students: Sequence[Checkpoint], teacher: Checkpoint | Cache | None
) -> None:
    """Print the estimated GiB by kind of a rank of the fullest pipeline stage; warn if rank 0 has less free.

    Call it on all ranks after `distill.run.check_run` with the same arguments.
    """
    device = Device(process_groups.device().type)
    cached = (teacher.kind, teacher.index["top_k"]) if isinstance(teacher, Cache) else None
    sizes = settings.micro_batch, settings.sequence_length
    setting = Setting(config.parallel, dist.get_world_size(), config.dtype, *sizes, device, config.performance)
    archs = [student.arch for student in students]
    rows = memory.training(archs, teacher and teacher.arch, settings, setting, cached)
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
    if needed["total"] > free:
        process_groups.log(
            f"warning: a rank needs {needed['total']:.3g} GiB, but {free:.3g} are free: divide the model by more ranks "
            "(parallel.tensor, .pipeline, .sequence), recompute activations (performance.recompute=full) or use smaller "
            "micro-batches."
        )
