"""What a dry run says a rank needs, beside what real training steps take: by kind of tensor, and in all at the worst moment.

Random weights, a pruned student and its teacher, bf16, on CPU ranks. Kinds are counted in bytes of tensors: weights, gradients and
optimizer as they lie there, activations as the most that autograd holds at once; the workspace is what is left of the whole. The
whole is the process's high-water mark above its level before the models are built, with libraries warm from training tiny
ones. For this mark the C library is told to give freed memory back at once, so that it is of memory in use. `resident` is the
same run's mark without that, as the package sets the C library: it keeps what is freed for the next temporary.
"""

import ctypes
import dataclasses
import tempfile
from pathlib import Path

import torch
from common import Figure, arguments, peak_bytes, write
from rich.console import Console
from rich.table import Table

from minitron_mcore.config.settings import Device, DistillConfig, Dtype, ParallelConfig
from minitron_mcore.estimate import memory
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.testing import on_ranks, random_checkpoint, saved_bytes

TEACHER = Architecture("llama", 12, 576, 1536, 8, 4, 64, 49152, 8192, 1e-5, 1e5, None, True)
MODELS = {
    "teacher": TEACHER,
    "student": dataclasses.replace(TEACHER, hidden=504, ffn=1152),
    "tiny": dataclasses.replace(TEACHER, blocks=2, hidden=32, ffn=16, vocab=256),
}
LAYOUTS = {
    "tp1": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
}
KINDS = ("weights", "gradients", "optimizer", "teacher", "hand-off", "activations", "workspace", "total")
MICRO_BATCH, SEQUENCE_LENGTH, MICRO_BATCHES = 2, 512, 2


def distill_config(replicas: int) -> DistillConfig:
    batch, sizes = (
        MICRO_BATCH * MICRO_BATCHES * replicas,
        {"micro_batch": MICRO_BATCH, "sequence_length": SEQUENCE_LENGTH},
    )
    return DistillConfig(steps=9, global_batch=batch, **sizes, warmup_steps=1)


def steps(folder: Path, names: tuple[str, str], parallel: ParallelConfig) -> dict[str, float]:
    """Bytes by kind on this rank, while a teacher and a student train for two steps."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    teacher, student = (run_folder.open_checkpoint(folder / name) for name in names)
    config = distill_config(process_groups.dp_group().size())
    trainer = Trainer(student, teacher, config, parallel, "bf16")
    weights, taught = list(trainer.model.parameters()), list(trainer.teacher.model.parameters())

    def batches() -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(0, student.arch.vocab, (MICRO_BATCHES, MICRO_BATCH, SEQUENCE_LENGTH + 1))
        return [{"tokens": x[:, :-1], "labels": x[:, 1:], "loss_mask": torch.ones(x[:, 1:].shape)} for x in ids]

    trainer.train_step(batches())
    with saved_bytes([*weights, *taught]) as saved:
        trainer.train_step(batches())
    with_teacher_outputs = (batch["teacher_hidden"] for batch in trainer.teacher.add_teacher_outputs(batches()))
    handed = [states.nbytes for states in with_teacher_outputs if states is not None]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept = [
        tensor
        for optimizer in trainer.optimizer.chained_optimizers
        for parameter, state in optimizer.optimizer.state.items()
        for tensor in (parameter, *state.values())
        if tensor.untyped_storage().data_ptr() not in own
    ]
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.main_grad.nbytes for weight in weights),
        "optimizer": sum(tensor.nbytes for tensor in kept),
        "teacher": sum(weight.nbytes for weight in taught),
        "hand-off": sum(handed[: None if parallel.pipeline > 1 else config.teacher_ahead]),
        "activations": saved.peak,
    }


def measure(folder: Path, parallel: ParallelConfig, in_use: bool) -> dict[str, float]:
    if in_use:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
        for option, size in ((trim_threshold, 128 << 10), (top_pad, 0), (mmap_threshold, 64 << 10)):
            ctypes.CDLL(None).mallopt(option, size)
    steps(folder, ("tiny", "tiny"), parallel)
    found = {}
    total = peak_bytes(lambda: found.update(steps(folder, ("teacher", "student"), parallel)))
    return found | {"workspace": total - sum(found.values()), "total": total}


def compare(folder: Path, name: str) -> tuple[list[Figure], Table]:
    world, parallel = LAYOUTS[name]
    measured = on_ranks(measure, world, parallel, folder, parallel, True, timeout=900)
    resident = on_ranks(measure, world, parallel, folder, parallel, False, timeout=900)
    setting = Setting(parallel, world, Dtype.bf16, MICRO_BATCH, SEQUENCE_LENGTH, Device.cpu)
    figures, shown = [], Table(f"{name} (MB)", "", *KINDS, "resident")
    rows = memory.training([MODELS["student"]], MODELS["teacher"], distill_config(setting.replicas), setting)
    for stage, estimate in enumerate(rows):
        rank = stage * (world // parallel.pipeline)
        found = measured[rank] | {"resident": resident[rank]["total"]}
        shown.add_row(f"stage {stage}", "estimated", *(f"{estimate[kind] / 1e6:.1f}" for kind in KINDS))
        shown.add_row(
            "", "measured", *(f"{value / 1e6:.1f}" for value in (*(found[kind] for kind in KINDS), found["resident"]))
        )
        for kind, value in found.items():
            case = f"{name} stage {stage}"
            figures.append(Figure("memory", case, "measured", kind, value, "B"))
            figures += [Figure("memory", case, "estimated", kind, estimate[kind], "B")] if kind in estimate else []
        shown.add_row("", "of measured", *(f"{estimate[k] / found[k]:.1%}" if found[k] else "" for k in KINDS))
    return figures, shown


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arch in MODELS.items():
            on_ranks(random_checkpoint, 1, ParallelConfig(), arch, Path(folder) / name, "bf16")
        for name in ("tp1",) if options.quick else LAYOUTS:
            found, shown = compare(Path(folder), name)
            figures += found
            Console(width=160).print(shown)
    write(figures, options.json)


if __name__ == "__main__":
    main()
