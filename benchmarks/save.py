"""What a save costs: memory beside training, and its speed beside plain writing of the same bytes.

Random weights, bf16, two CPU ranks. Memory is each process's high-water mark: of a training step, and from the begin of a save to
its publication, with training steps in between where the save is in the background. The plain write is of as many bytes from one
buffer, by the same ranks at the same time, with fsync. The save also hashes what it writes.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import Figure, arguments, write
from rich.console import Console
from rich.table import Table

from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.testing import on_ranks, random_checkpoint

SMALL = Architecture("llama", 6, 768, 2048, 12, 12, 64, 32000, 8192, 1e-5, 1e5, None, True)
LARGE = Architecture("llama", 16, 1024, 2816, 16, 16, 64, 64000, 8192, 1e-5, 1e5, None, True)
LAYOUTS = {"tp2": ParallelConfig(tensor=2), "dp2": ParallelConfig()}
RANKS, LENGTH = 2, 64
BUFFER = 8 << 20


def high_water(call: Callable[[], object]) -> int:
    """Largest resident memory of this process in a call, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    call()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def plain_write(path: Path, size: int) -> None:
    buffer = os.urandom(BUFFER)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BUFFER):
            file.write(buffer[: size - start])
        os.fsync(file.fileno())


def measure(source: Path, out_dir: Path, parallel: ParallelConfig, background: bool) -> dict[str, float]:
    """Figures of this rank; the time of writing is the slowest rank's."""
    from minitron_mcore.checkpoint import run_folder, steps
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    config = DistillConfig(
        steps=9,
        global_batch=RANKS,
        micro_batch=1,
        sequence_length=LENGTH,
        warmup_steps=1,
        kd_weight=0.0,
        lm_weight=1.0,
        async_save=background,
    )
    trainer = Trainer(run_folder.open_checkpoint(source), None, config, parallel, "bf16")

    def step() -> None:
        ids = torch.randint(0, trainer.arch.vocab, (RANKS // process_groups.dp_group().size(), 1, LENGTH + 1))
        trainer.train_step([{"tokens": x[:, :-1], "labels": x[:, 1:], "loss_mask": torch.ones(1, LENGTH)} for x in ids])

    times = {}

    def save() -> None:
        start = time.perf_counter()
        trainer.save(out_dir)
        times["waited"] = time.perf_counter() - start
        if background:
            step()
        trainer.finish_save()
        times["save"] = time.perf_counter() - start

    step()
    training = high_water(step)
    saving = high_water(save)
    step_dir = steps.published(out_dir)[0].path
    own = sum(file.stat().st_size for file in step_dir.glob(f"__{dist.get_rank()}_*.distcp"))
    dist.barrier()
    start = time.perf_counter()
    plain_write(out_dir / f"plain_{dist.get_rank()}", own)
    dist.barrier()
    times["plain"] = time.perf_counter() - start
    return {"training": training, "saving": saving, "bytes": own, **times}


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    arch, figures = SMALL if options.quick else LARGE, []
    shown = Table("", "training GiB", "with the save", "ratio", "GB", "save MB/s", "plain MB/s", "training waits (s)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        on_ranks(random_checkpoint, 1, ParallelConfig(), arch, source, "bf16")
        for name in ("tp2",) if options.quick else LAYOUTS:
            for background in (False, True):
                case = f"{name} {'background' if background else 'waiting'}"
                out_dir = Path(folder) / case.replace(" ", "_")
                out_dir.mkdir()
                ranks = on_ranks(measure, RANKS, LAYOUTS[name], source, out_dir, LAYOUTS[name], background)
                worst = max(ranks, key=lambda rank: rank["saving"] / rank["training"])
                size = sum(rank["bytes"] for rank in ranks)
                ratio = worst["saving"] / worst["training"]
                rates = [size / max(rank[key] for rank in ranks) / 1e6 for key in ("save", "plain")]
                waited = max(rank["waited"] for rank in ranks)
                memory = [worst[key] / 2**30 for key in ("training", "saving")]
                row = [f"{x:.3g}" for x in (*memory, ratio, size / 1e9, *rates, waited)]
                shown.add_row(case, *row)
                metrics = (("memory_ratio", ratio, "1"), ("save", rates[0], "MB/s"), ("waited", waited, "s"))
                figures += [Figure("save", case, "minitron_mcore", *metric) for metric in metrics]
                figures.append(Figure("save", case, "plain write", "save", rates[1], "MB/s"))
    Console(width=120).print(shown)
    write(figures, options.json)


if __name__ == "__main__":
    main()
