"""What collecting importance costs: forward passes with the hooks over the same passes without, interleaved in one run.

Random models in bf16, batches of 4 x 510 tokens; time does not depend on the weights. The reductions run as torch's separate
operations, as in a short run, or compiled, as in a long one. Seconds are rank 0's processor time with one thread a rank, so that
other work on the machine counts little; medians over the rounds, after the first passes, which compile. `spread` is how far apart
the same measurement's quarters lie: half of the rounds are within it.
"""

import time
from statistics import median, quantiles

import torch
from common import Figure, arguments, write

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reporting import tables
from minitron_mcore.testing import on_ranks

SMOLLM2 = Architecture("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, None, True)
LLAMA_1B = Architecture("llama", 4, 2048, 8192, 32, 8, 64, 128256, 8192, 1e-5, 5e5, None, True)
CASES = {
    "smollm2_135m tp1": (SMOLLM2, 1, ParallelConfig()),
    "smollm2_135m tp3": (SMOLLM2, 3, ParallelConfig(tensor=3)),
    "smollm2_135m tp3_sp": (SMOLLM2, 3, ParallelConfig(tensor=3, sequence=True)),
    "llama32_1b, 4 blocks, tp1": (LLAMA_1B, 1, ParallelConfig()),
}


def measure(arch: Architecture, parallel: ParallelConfig, rounds: int) -> list[tuple[float, float, float]]:
    """Seconds of each round: plain, collecting, collecting compiled."""
    import torch.distributed as dist

    from minitron_mcore.importance.collector import collect_importance
    from minitron_mcore.models import build
    from minitron_mcore.parallel.schedule import forward

    model = build.build(arch, parallel, "bf16")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    batch = {"tokens": torch.randint(0, arch.vocab, (4, 510))}

    def plain() -> float:
        dist.barrier()
        start = time.process_time()
        forward(model, [batch], lambda hidden, batch: None)
        return time.process_time() - start

    def collected(fused: bool) -> float:
        with collect_importance(model, arch, fused=fused):
            return plain()

    def once() -> tuple[float, float, float]:
        return plain(), collected(fused=False), collected(fused=True)

    once()
    return [once() for _ in range(rounds)]


def main() -> None:
    options = arguments(__doc__)
    rounds, cases = (3, list(CASES)[:1]) if options.quick else (15, list(CASES))
    rows, figures = [], []
    for case in cases:
        arch, world, parallel = CASES[case]
        found = on_ranks(measure, world, parallel, arch, parallel, rounds, timeout=900)[0]
        rows.append({"case": case, "forward (s)": median(plain for plain, _, _ in found)})
        for column, name in enumerate(("operations", "compiled"), 1):
            shares = [times[column] / times[0] - 1 for times in found]
            low, overhead, high = quantiles(shares, n=4)
            rows[-1] |= {f"{name} (%)": 100 * overhead, f"{name}, spread": 100 * (high - low)}
            figures.append(Figure("importance", case, name, "overhead", overhead, "1"))
        figures.append(Figure("importance", case, "plain", "time", rows[-1]["forward (s)"], "s"))
    tables.table("collecting importance over the same forward passes", rows)
    write(figures, options.json)


if __name__ == "__main__":
    main()
