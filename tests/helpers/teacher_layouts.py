"""Distillation from a teacher of another layout or on ranks of its own."""

import dataclasses
import math

import pytest

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import HiddenStateLossConfig, ParallelConfig
from minitron_mcore.errors import UserError
from tests.helpers import models, training
from tests.helpers.cutting import export

# Blocks of different stages in most layouts, one of the teacher's twice, and the embeddings.
STATES = HiddenStateLossConfig(0.7, pairs=[[0, 3], [3, 1], [2, 3]])


CONFIG = dataclasses.replace(
    training.CONFIG,
    clip_grad=1e9,
    lm_weight=0.5,
    hidden_state_loss=STATES,
    teacher_ahead=2,
)


PAIRS = {
    # processes, student, teacher
    "dp4_of_tp2_pp2": (4, ParallelConfig(), ParallelConfig(tensor=2, pipeline=2)),
    "tp3_of_dp3": (3, ParallelConfig(tensor=3), ParallelConfig()),  # two micro-batches at a time for three replicas
    "tp2_sp_dp2_of_pp2_dp2": (4, ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)),
    "pp2_of_tp2_sp": (2, ParallelConfig(pipeline=2), ParallelConfig(tensor=2, sequence=True)),
    "pp2_virtual2_dp2_of_cp2_tp2_sp": (
        4,
        ParallelConfig(pipeline=2, virtual=2),
        ParallelConfig(context=2, tensor=2, sequence=True),
    ),
    "cp2_tp2_sp_of_pp2_virtual2_dp2": (
        4,
        ParallelConfig(context=2, tensor=2, sequence=True),
        ParallelConfig(pipeline=2, virtual=2),
    ),
}


def two_steps(folders, config, parallel, out_dir):
    """Figures of two steps; the first one's gradients are saved as if they were weights."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill.trainer import Trainer
    from minitron_mcore.parallel import process_groups

    student, dp = open_checkpoint(folders / "student"), process_groups.dp_group()
    trainer = Trainer(student, open_checkpoint(folders / "teacher"), config, parallel, "fp32")
    batches, count = (
        models.placed(training.micro_batches(config, 0, dp.rank(), dp.size())),
        config.global_batch // dp.size(),
    )
    figures = [trainer.train_step([next(batches) for _ in range(count)])]
    training.gather_gradients(trainer)
    gradients = [parameter.main_grad.clone() for parameter in trainer.model.parameters()]
    figures.append(trainer.train_step([next(batches) for _ in range(count)]))
    for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        parameter.data.copy_(gradient)
    trainer.save(out_dir)
    trainer.finish_save()
    run_folder.describe(out_dir, student.arch, "test", {}, student.hf)
    return figures


def hold(alone, expected, ranks, tmp_path, tolerance=2e-5):
    """The figures of every rank, and the gradients in `run`, against those of one process."""
    for figures in ranks:
        for a, b in zip(alone, figures, strict=True):
            for key in ("kd_loss", "lm_loss", "hidden_state_loss", "teacher_entropy", "grad_norm"):
                assert key not in a or math.isclose(a[key], b[key], rel_tol=tolerance), (key, a, b)
    found = export(tmp_path / "run", tmp_path / "hf")
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= tolerance * gradient.abs().max(), key


APART = {
    # processes of the student, layout, of the teacher, layout
    "dp2_of_tp2_sp": (2, ParallelConfig(), 2, ParallelConfig(tensor=2, sequence=True)),
    "tp2_sp_of_one": (2, ParallelConfig(tensor=2, sequence=True), 1, ParallelConfig()),
    "pp2_of_dp2": (2, ParallelConfig(pipeline=2), 2, ParallelConfig()),
}


def serve_or_learn(folders, config, parallel, out_dir, damaged=False):
    """The teacher's ranks are told to stop after their first request, as SLURM tells all, but the student's decide when."""
    import os
    import signal

    from minitron_mcore.distill import remote_teacher
    from minitron_mcore.parallel import process_groups

    bridge = process_groups.bridge()
    if not bridge.is_teacher:
        return two_steps(folders, config, parallel, out_dir)
    if damaged:
        with pytest.raises(UserError), bridge.report_user_errors():
            raise UserError("the teacher's weights are zero.")
        return None
    every = bridge.receive_requests

    def requests():
        for asked in every():
            yield asked
            os.kill(os.getpid(), signal.SIGUSR1)

    bridge.receive_requests = requests
    return remote_teacher.serve(open_checkpoint(folders / "teacher"), config, parallel, "fp32")


def taught_apart(launch, name: str, folders, out_dir) -> list:
    """`two_steps` of each student's rank, whose teacher has ranks of its own; `launch` is `on_ranks` or runs on devices."""
    world, parallel, teacher_ranks, teacher_parallel = APART[name]
    config = dataclasses.replace(CONFIG, teacher_parallel=teacher_parallel, teacher_ranks=teacher_ranks)
    args = serve_or_learn, world + teacher_ranks, parallel, folders, config, parallel, out_dir
    found = launch(*args, teacher_ranks=teacher_ranks, teacher_parallel=teacher_parallel)
    assert found[world:] == [None] * teacher_ranks
    return found[:world]
