"""What distilling costs beyond its parts: a whole training step, beside the teacher's forward passes and the student's own step.

In one run, in turn, on the same micro-batches, each from its start to its end on the slowest rank:

    step      teacher forward, student forward and backward, distillation loss, optimizer: `Trainer.train_step`
    teacher   the teacher's forward passes to its logits, nothing kept
    student   a training step on the labels' cross-entropy, no teacher
    over parts = step / (teacher + student), the median over the rounds

The second table says what a step's time goes into, by megatron-core's timers and clocks around the teacher and the loss. Random
weights, bf16. On CPU ranks: SmolLM2-135M teaching its 100 M cut. On a GPU: six blocks of Llama-3.1-8B teaching six of
Llama-3.1-Minitron-4B-Width, whole vocabularies, and small students of a 2 B teacher; tokens a second, percent of the card's dense
peak (--peak-tflops, by default an H100's 989), and with --kernels what the GPU's time goes into. From the six blocks follows
what all 32 would reach at the same speed, without the communication of the tensor parallelism that their memory takes. Measure
on an idle machine.
"""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import Figure, parser, ranks, write

from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.models import flops
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups, schedule
from minitron_mcore.reporting import tables
from minitron_mcore.testing import random_checkpoint

SMOLLM2 = Architecture("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, None, True)
CUT = dataclasses.replace(SMOLLM2, hidden=504, ffn=1152)
ONE_B = Architecture("llama", 16, 2048, 8192, 32, 8, 64, 49152, 8192, 1e-5, 1e5, None, True)
TWO_B = dataclasses.replace(ONE_B, blocks=32, hidden=2048, ffn=8192)
SIX_OF_8B = Architecture("llama", 6, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5, None, False)
SIX_OF_4B = dataclasses.replace(SIX_OF_8B, hidden=3072, ffn=9216)
TOY = Architecture("llama", 2, 32, 64, 4, 2, 8, 128, 64, 1e-5, 1e5, None, False)
MODELS = {
    "toy": TOY,
    "135M": SMOLLM2,
    "100M": CUT,
    "1B": ONE_B,
    "2B": TWO_B,
    "6 blocks of 8B": SIX_OF_8B,
    "6 blocks of 4B": SIX_OF_4B,
}
CASES = {
    # name: teacher, student, ranks, layout, micro-batch, length, micro-batches
    "toy": {"toy of toy": ("toy", "toy", 1, ParallelConfig(), 2, 64, 2)},
    "cpu": {
        "100M of 135M, TP 1": ("135M", "100M", 1, ParallelConfig(), 4, 512, 1),
        "100M of 135M, TP 3": ("135M", "100M", 3, ParallelConfig(tensor=3), 4, 512, 1),
    },
    "cuda": {
        "6 blocks of 8B -> 4B": ("6 blocks of 8B", "6 blocks of 4B", 1, ParallelConfig(), 1, 8192, 4),
        "135M of 2B": ("2B", "135M", 1, ParallelConfig(), 4, 4096, 4),
        "1B of 2B": ("2B", "1B", 1, ParallelConfig(), 4, 4096, 4),
    },
}


def clock() -> float:
    if process_groups.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(folder: Path, names: tuple, parallel: ParallelConfig, sizes: tuple, rounds: int, kernels: bool) -> dict:
    """Seconds of the step and of its parts in every round, seconds by what they went into, and the step's own figures."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer

    micro_batch, length, count = sizes
    batch = micro_batch * count * process_groups.dp_group().size()
    config = DistillConfig(
        steps=99,
        global_batch=batch,
        micro_batch=micro_batch,
        sequence_length=length,
        warmup_steps=1,
        teacher_ahead=count,
    )
    teacher, student = (run_folder.open_checkpoint(folder / name) for name in names)
    whole = Trainer(student, teacher, config, parallel, "bf16")
    alone = Trainer(student, None, dataclasses.replace(config, kd_weight=0.0, lm_weight=1.0), parallel, "bf16")
    ids = torch.randint(
        0, student.arch.vocab, (count, micro_batch, length + 1), generator=torch.Generator().manual_seed(0)
    )
    batches = [{"tokens": x[:, :-1], "labels": x[:, 1:], "loss_mask": torch.ones(x[:, 1:].shape)} for x in ids]
    batches = [{key: x.to(process_groups.device()).contiguous() for key, x in batch.items()} for batch in batches]
    model = whole.teacher.model
    parts = {
        "step": lambda: whole.train_step(batches),
        "teacher": lambda: schedule.forward(model, batches, lambda output, batch: output @ model.head().t()),
        "student": lambda: alone.train_step(batches),
    }
    for part in parts.values():
        part()  # what is made on first use
    seconds = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            dist.barrier()
            start = clock()
            part()
            seconds[name].append(clock() - start)
    if process_groups.device().type == "cuda":
        process_groups.log(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        if kernels:
            show_kernels(parts["step"])
    return {"seconds": seconds} | profile(whole, batches)


def show_kernels(call: Callable[[], object]) -> None:
    """Print the kernels that take most of the GPU's time in a call."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


def profile(trainer, batches: list[dict]) -> dict:
    """Seconds of one more step by what they go into."""
    from megatron.core.timers import Timers

    spent, config = Counter(), trainer.model.config
    timers = config.timers = Timers(log_level=2, log_option="max")
    config.barrier_with_L1_time = False

    def timed(name: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            start = clock()
            result = call(*args, **kwargs)
            spent[name] += clock() - start
            return result

        return run

    add_teacher_outputs, finalize = trainer.teacher.add_teacher_outputs, config.finalize_model_grads_func

    def with_teacher_outputs(batches):
        source = iter(add_teacher_outputs(batches))
        following = timed("teacher's forward", lambda: next(source, None))
        while (batch := following()) is not None:
            yield batch

    trainer.teacher.add_teacher_outputs, trainer.loss_fn = (
        with_teacher_outputs,
        timed("both heads and the loss", trainer.loss_fn),
    )
    config.finalize_model_grads_func = timed("reducing gradients", finalize)
    trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
    start = clock()
    trainer.train_step(batches)
    total = clock() - start
    spent["student's backward"] = timers("backward-compute").elapsed()
    inside = spent["teacher's forward"] + spent["both heads and the loss"]
    spent["student's forward"] = timers("forward-compute").elapsed() - inside
    spent["rest"] = total - spent.total()
    return {"profile": dict(spent)}


def utilisation(teacher: Architecture, student: Architecture, sizes: tuple, seconds: float, options) -> float:
    """Share of the card's peak: three forward passes' operations of the student and one of the teacher a token."""
    micro_batch, length, count = sizes
    operations = 3 * flops.forward_flops(student, length) + flops.forward_flops(teacher, length)
    return operations * micro_batch * length * count / seconds / 1e12 / options.peak_tflops


def whole_models(name: str, sizes: tuple, spent: dict[str, float], options) -> float | None:
    """What 32 blocks would reach: the blocks' time grows with their number, and so does the optimizer's, the rest stays."""
    if not name.startswith("6 blocks"):
        return None
    teacher, student = (dataclasses.replace(arch, blocks=32) for arch in (SIX_OF_8B, SIX_OF_4B))
    fixed = spent["both heads and the loss"]
    seconds = fixed + (sum(spent.values()) - fixed) * 32 / 6
    return utilisation(teacher, student, sizes, seconds, options)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, dense")
    options.add_argument("--toy", action="store_true", help="a model of a test's size: shows that it runs")
    options.add_argument("--kernels", action="store_true", help="print what the GPU's time goes into")
    options = options.parse_args()
    kind = "toy" if options.toy else process_groups.device().type
    rounds = 2 if options.quick else 7
    rows, profiles, figures = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        cases = list(CASES[kind].items())[: 1 if options.quick else None]
        for name in sorted({name for _, case in cases for name in case[:2]}):
            ranks(random_checkpoint, 1, ParallelConfig(), MODELS[name], Path(folder) / name, "bf16", timeout=900)
        for name, (teacher, student, count, parallel, *sizes) in cases:
            run = (Path(folder), (teacher, student), parallel, sizes, rounds, options.kernels)
            found = ranks(measure, count, parallel, *run, timeout=1800)
            times = {
                part: torch.tensor([rank["seconds"][part] for rank in found]).amax(0)
                for part in ("step", "teacher", "student")
            }
            over = (times["step"] / (times["teacher"] + times["student"])).median().item()
            medians = {part: each.median().item() for part, each in times.items()}
            speed = sizes[0] * sizes[1] * sizes[2] / medians["step"]
            row = {"case": name} | {f"{part} [s]": seconds for part, seconds in medians.items()}
            row |= {"step over parts": over, "tokens/s": speed}
            spent = found[0]["profile"]
            if kind == "cuda":
                row["% of peak"] = 100 * utilisation(MODELS[teacher], MODELS[student], sizes, medians["step"], options)
                row["32 blocks: % of peak"] = 100 * whole_models(name, sizes, spent, options)
            rows.append(row)
            profiles.append({"% of a step": name} | {part: 100 * s / sum(spent.values()) for part, s in spent.items()})
            figures.append(Figure("distill_step", name, "minitron", "step_over_parts", over, "1"))
            figures += [
                Figure("distill_step", name, "minitron", label, row[label], "%")
                for label in row
                if label.endswith("peak")
            ]
            figures += [Figure("distill_step", name, part, "time", seconds, "s") for part, seconds in medians.items()]
            figures += [
                Figure("distill_step", name, part, "share", s / sum(spent.values()), "1") for part, s in spent.items()
            ]
    tables.table("a training step over the sum of its parts", rows)
    tables.table("where a step's time goes, rank 0", profiles)
    write(figures, options.json)


if __name__ == "__main__":
    main()
