"""What a training run will hold, told before anything is built."""

import torch.distributed as dist

from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import Device, DistillConfig, Dtype, ParallelConfig
from minitron_mcore.config.stages import CacheKind
from minitron_mcore.estimate import memory, run_memory
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.reporting import tables


def tell(
    students: list[Architecture],
    teacher: Architecture | None,
    config: DistillConfig,
    parallel: ParallelConfig,
    dtype: Dtype,
    cached: tuple[CacheKind, int | None] | None = None,
    performance: PerformanceConfig | None = None,
) -> None:
    """Print what a rank of the fullest pipeline stage will hold, by kind, and warn where rank 0 has less than that.

    `cached`: see `run_cost.run`.
    """
    device = Device(process_groups.device().type)
    sizes = config.micro_batch, config.sequence_length
    options = performance or PerformanceConfig()
    setting = memory.Setting(parallel, dist.get_world_size(), dtype, *sizes, device, options)
    rows, free = run_memory.run(students, teacher, config, setting, cached), process_groups.free_bytes() / memory.GIB
    stage = max(range(len(rows)), key=lambda n: rows[n]["total"])
    needed = {kind: size / memory.GIB for kind, size in rows[stage].items() if size}
    fullest = f"a rank of pipeline stage {stage}, the fullest," if len(rows) > 1 else "a rank"
    tables.table(f"GiB that {fullest} will hold", [needed], [f"free for rank 0: {free:.3g} GiB"])
    if teacher and config.teacher_ranks:
        row = max(run_memory.beside(teacher, config, setting), key=lambda row: row["total"])
        tables.table(
            "GiB that a rank of the teacher will hold", [{kind: size / memory.GIB for kind, size in row.items()}]
        )
    if needed["total"] > free:
        process_groups.log(
            f"warning: a rank needs {needed['total']:.3g} GiB, but {free:.3g} are free: share the model over more ranks "
            "(parallel.tensor, .pipeline, .sequence), recompute activations (performance.recompute=full) or take smaller "
            "micro-batches."
        )
