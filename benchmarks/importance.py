"""What collecting importance costs: forward passes with the hooks over the same passes without, interleaved in one run.

A random model of SmolLM2-135M's shape in bf16, batches of 4 x 510 tokens; time does not depend on the weights. Seconds are
medians over the rounds, on rank 0, between barriers.
"""

import os
import time
from statistics import median

import torch
from common import Figure, arguments, write
from rich.console import Console
from rich.table import Table

from minitron_mcore.config import ParallelConfig
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.testing import on_ranks

SMOLLM2 = Architecture("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, None, True)
LAYOUTS = {
    "tp1": (1, ParallelConfig()),
    "tp3": (3, ParallelConfig(tensor=3)),
    "tp3_sp": (3, ParallelConfig(tensor=3, sequence=True)),
}


def measure(arch: Architecture, parallel: ParallelConfig, threads: int, rounds: int) -> list[tuple[float, float]]:
    """(seconds without, seconds with) of each round."""
    import torch.distributed as dist

    from minitron_mcore.importance.collect import collecting
    from minitron_mcore.models import build
    from minitron_mcore.schedule import forward

    torch.set_num_threads(threads)
    model = build.build(arch, parallel, "bf16")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    batch = {"tokens": torch.randint(0, arch.vocab, (4, 510))}

    def plain() -> float:
        dist.barrier()
        start = time.perf_counter()
        forward(model, [batch], lambda hidden, batch: None)
        dist.barrier()
        return time.perf_counter() - start

    def collected() -> float:
        with collecting(model, arch):
            return plain()

    plain(), collected()
    pairs = [(plain(), collected()) for _ in range(rounds)]
    torch.set_num_threads(1)
    return pairs


def main() -> None:
    options = arguments(__doc__)
    rounds, layouts = (3, ["tp1"]) if options.quick else (9, list(LAYOUTS))
    figures = []
    shown = Table("layout", "forward (s)", "collecting (s)", "overhead")
    for name in layouts:
        world, parallel = LAYOUTS[name]
        pairs = on_ranks(
            measure, world, parallel, SMOLLM2, parallel, max(1, os.cpu_count() // world), rounds, timeout=900
        )[0]
        without, collecting = (median(column) for column in zip(*pairs, strict=True))
        overhead = median(b / a for a, b in pairs) - 1
        shown.add_row(name, f"{without:.3f}", f"{collecting:.3f}", f"{overhead:.1%}")
        case = f"smollm2_135m bf16 4x510 {name}"
        for metric, value, unit in (
            ("time", without, "s"),
            ("time_collecting", collecting, "s"),
            ("overhead", overhead, "1"),
        ):
            figures.append(Figure("importance", case, "minitron", metric, value, unit))
    Console().print(shown)
    write(figures, options.json)


if __name__ == "__main__":
    main()
