"""Training steps on a CUDA device against the same steps on the CPU, and pauses that change nothing.

A failure means that a GPU, or a stop and a resume on one, changes what the student learns.
"""

import math

import pytest

from minitron_mcore.config.settings import PruneConfig
from tests.gpu.training import CONFIG, FIGURES, RUNS, make_folders, train
from tests.gpu.world import here, on_cpu
from tests.helpers import hidden_states, models
from tests.helpers.cutting import ONE, export, family_on_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu_training"),
]  # one worker, so that its references are made once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def on_the_cpu(folders):
    """The figures of each run's steps on the CPU; its checkpoint is folders / "cpu" / name."""
    jobs = [(here, train, folders, name, folders / "cpu" / name) for name in RUNS]
    return dict(zip(RUNS, on_cpu(folders / "reference", *jobs), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_fp32_steps_are_the_cpu_s(tmp_path, folders, on_the_cpu, name):
    found = here(train, folders, name, tmp_path / "run")
    for ours, theirs in zip(found, on_the_cpu[name], strict=True):
        for key in FIGURES + (("hidden_state_loss",) if name == "states" else ()):
            assert math.isclose(ours[key], theirs[key], rel_tol=1e-4), (key, ours, theirs)
    weights, expected = export(tmp_path / "run", tmp_path / "a"), export(folders / "cpu" / name, tmp_path / "b")
    for key, weight in expected.items():
        # Adam divides by the gradient's size, so where that is near 0 rounding shows: compare what a step can move.
        assert (weights[key] - weight).abs().max() <= 0.05 * CONFIG.peak_lr * CONFIG.steps, key


@pytest.mark.parametrize("name", RUNS)
def test_bf16_steps_are_close(tmp_path, folders, on_the_cpu, name):
    """Losses within a few percent of fp32's; a mixture of experts may choose other experts, so its first step alone."""
    found = here(train, folders, name, tmp_path / "run", "bf16")
    for ours, theirs in list(zip(found, on_the_cpu[name], strict=True))[: 1 if name == "experts" else None]:
        for key in ("kd_loss", "lm_loss", "teacher_entropy"):
            assert math.isclose(ours[key], theirs[key], rel_tol=0.08), (key, ours, theirs)
        assert math.isclose(ours["grad_norm"], theirs["grad_norm"], rel_tol=0.15), (ours, theirs)


def first_states(folders, out_dir):
    return hidden_states.first_step(folders, ONE, out_dir)


def test_intermediate_states_are_the_dense_ones(tmp_path):
    """Losses and gradients of the first step against transformers' modules in fp64."""
    models.tiny_llama(tmp_path / "hf", tied=True, num_hidden_layers=7)
    cuts = {"width": PruneConfig(hidden=24, ffn=18, blocks=5), "depth": PruneConfig(blocks=5)}
    here(family_on_rank, tmp_path, cuts)
    for name in ("teacher", *cuts):
        export(tmp_path / name, tmp_path / f"{name}_hf")
    found = here(first_states, tmp_path, tmp_path / "steps")
    for case, (figures, projection, gradient) in found.items():
        losses, gradients, lifted = hidden_states.oracle(tmp_path, case, projection)
        for key, loss in losses.items():
            assert math.isclose(figures[key], loss, rel_tol=5e-5), (case, key)
        if lifted is not None:
            assert (gradient - lifted).abs().max() <= 5e-5 * lifted.abs().max(), case
        weights = export(tmp_path / "steps" / case, tmp_path / f"{case}_steps")
        for key, expected in gradients.items():
            assert (weights[key] - expected).abs().max() <= 5e-5 * expected.abs().max(), (case, key)
