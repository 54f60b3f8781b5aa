"""What distilling costs beyond its parts: a whole training step, beside the teacher's forward passes and the student's own step.

In one run, in turn, on the same micro-batches, each from its start to its end on the slowest rank:

    step      teacher forward, student forward and backward, distillation loss, optimizer: `Trainer.train_step`
    teacher   the teacher's forward passes to its logits, nothing kept
    student   a training step on the labels' cross-entropy, no teacher
    over parts = step / (teacher + student), the median over the rounds

The second table says what a step's time goes into, by megatron-core's timers and clocks around the teacher and the loss. Random
weights, bf16. On CPU ranks: SmolLM2-135M teaching its 100 M cut. On a GPU: a 2 B teacher with students of 135 M and 1 B, tokens
a second and percent of the card's dense peak (--peak-tflops, by default an H100's 989). Measure on an idle machine.
"""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import Figure, parser, write

from minitron_mcore import report, runtime, schedule
from minitron_mcore.config import DistillConfig, ParallelConfig
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.testing import on_ranks, random_checkpoint

SMOLLM2 = Architecture("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, None, True)
CUT = dataclasses.replace(SMOLLM2, hidden=504, ffn=1152)
ONE_B = Architecture("llama", 16, 2048, 8192, 32, 8, 64, 49152, 8192, 1e-5, 1e5, None, True)
TWO_B = dataclasses.replace(ONE_B, blocks=32, hidden=2048, ffn=8192)
MODELS = {"135M": SMOLLM2, "100M": CUT, "1B": ONE_B, "2B": TWO_B}
CASES = {
    # name: teacher, student, ranks, layout, micro-batch, length, micro-batches
    "cpu": {
        "100M of 135M, TP 1": ("135M", "100M", 1, ParallelConfig(), 4, 512, 1),
        "100M of 135M, TP 3": ("135M", "100M", 3, ParallelConfig(tensor=3), 4, 512, 1),
    },
    "cuda": {
        "135M of 2B": ("2B", "135M", 1, ParallelConfig(), 4, 4096, 4),
        "1B of 2B": ("2B", "1B", 1, ParallelConfig(), 4, 4096, 4),
    },
}


def clock() -> float:
    if runtime.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(folder: Path, names: tuple, parallel: ParallelConfig, sizes: tuple, rounds: int) -> dict:
    """Seconds of the step and of its parts in every round, seconds by what they went into, and the step's own figures."""
    from minitron_mcore import checkpoint
    from minitron_mcore.distill.train import Trainer

    micro_batch, length, count = sizes
    batch = micro_batch * count * runtime.dp_group().size()
    config = DistillConfig(
        steps=99,
        global_batch=batch,
        micro_batch=micro_batch,
        sequence_length=length,
        warmup_steps=1,
        teacher_ahead=count,
    )
    teacher, student = (checkpoint.open_checkpoint(folder / name) for name in names)
    whole = Trainer(student, teacher, config, parallel, "bf16")
    alone = Trainer(student, None, dataclasses.replace(config, kd_weight=0.0, lm_weight=1.0), parallel, "bf16")
    ids = torch.randint(
        0, student.arch.vocab, (count, micro_batch, length + 1), generator=torch.Generator().manual_seed(0)
    )
    batches = [{"tokens": x[:, :-1], "labels": x[:, 1:], "loss_mask": torch.ones(x[:, 1:].shape)} for x in ids]
    batches = [{key: x.to(runtime.device()).contiguous() for key, x in batch.items()} for batch in batches]
    model = whole.teacher.model
    parts = {
        "step": lambda: whole.train_step(batches),
        "teacher": lambda: schedule.forward(model, batches, lambda output, batch: None, headless=False),
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
    return {"seconds": seconds} | profile(whole, batches)


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

    feed, finalize = trainer.teacher.feed, config.finalize_model_grads_func

    def fed(batches):
        source = iter(feed(batches))
        following = timed("teacher's forward", lambda: next(source, None))
        while (batch := following()) is not None:
            yield batch

    trainer.teacher.feed, trainer.objective = fed, timed("both heads and the loss", trainer.objective)
    config.finalize_model_grads_func = timed("reducing gradients", finalize)
    trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
    start = clock()
    figures = trainer.train_step(batches)
    total = clock() - start
    spent["student's backward"] = timers("backward-compute").elapsed()
    inside = spent["teacher's forward"] + spent["both heads and the loss"]
    spent["student's forward"] = timers("forward-compute").elapsed() - inside
    spent["rest"] = total - spent.total()
    return {"profile": dict(spent), "tflops": figures["student_tflops"] + figures["teacher_tflops"]}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, dense")
    options = options.parse_args()
    kind, rounds = "cuda" if torch.cuda.is_available() else "cpu", 1 if options.quick else 7
    rows, profiles, figures = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        cases = list(CASES[kind].items())[: 1 if options.quick else None]
        for name in sorted({name for _, case in cases for name in case[:2]}):
            on_ranks(random_checkpoint, 1, ParallelConfig(), MODELS[name], Path(folder) / name, "bf16")
        for name, (teacher, student, ranks, parallel, *sizes) in cases:
            found = on_ranks(
                measure, ranks, parallel, Path(folder), (teacher, student), parallel, sizes, rounds, timeout=1800
            )
            times = {
                part: torch.tensor([rank["seconds"][part] for rank in found]).amax(0)
                for part in ("step", "teacher", "student")
            }
            over = (times["step"] / (times["teacher"] + times["student"])).median().item()
            medians = {part: each.median().item() for part, each in times.items()}
            speed = sizes[0] * sizes[1] * sizes[2] / medians["step"]
            row = {"case": name} | {f"{part} [s]": seconds for part, seconds in medians.items()}
            row |= {"step over parts": over, "tokens/s": speed}
            if kind == "cuda":
                row["% of peak"] = 100 * found[0]["tflops"] / options.peak_tflops
            rows.append(row)
            spent = found[0]["profile"]
            profiles.append({"% of a step": name} | {part: 100 * s / sum(spent.values()) for part, s in spent.items()})
            figures.append(Figure("distill_step", name, "minitron", "step_over_parts", over, "1"))
            figures += [Figure("distill_step", name, part, "time", seconds, "s") for part, seconds in medians.items()]
            figures += [
                Figure("distill_step", name, part, "share", s / sum(spent.values()), "1") for part, s in spent.items()
            ]
    report.table("a training step over the sum of its parts", rows)
    report.table("where a step's time goes, rank 0", profiles)
    write(figures, options.json)


if __name__ == "__main__":
    main()
