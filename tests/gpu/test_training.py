"""Training steps on a CUDA device against the same steps on the CPU, and pauses that change nothing.

A failure means that a GPU, or a stop and a resume on one, changes what the student learns.
"""

import dataclasses
import math

import pytest

from minitron_mcore.config.settings import HiddenStateLossConfig, PruneConfig
from tests import families, models, test_distill, test_states
from tests.gpu.world import here, on_cpu
from tests.test_prune import ONE, _family, export

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu_training"),
]  # one worker, so that its references are made once

CONFIG = test_distill.CONFIG
FIGURES = ("kd_loss", "lm_loss", "teacher_entropy", "grad_norm", "lr")
STATES = dataclasses.replace(
    CONFIG, lm_weight=0.5, hidden_state_loss=HiddenStateLossConfig(0.7, pairs=[[2, 4], [1, 1]])
)
RUNS = {
    # folders of student and teacher, config
    "tied": ("width", "teacher", CONFIG),
    "untied, label loss": ("plain_width", "plain_teacher", dataclasses.replace(CONFIG, kd_weight=0.7, lm_weight=0.3)),
    "experts": ("mixtral1", "mixtral0", CONFIG),
    "reverse_kl": ("width", "teacher", dataclasses.replace(CONFIG, divergence="reverse_kl")),
    "states": ("width", "teacher", STATES),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("training"))


def make_folders(at):
    """Students and teachers: a tied Llama, an untied one, two mixtures of experts."""
    cut = PruneConfig(hidden=24, ffn=18)
    for prefix, tied in (("", True), ("plain_", False)):
        family = at / f"{prefix}family"
        models.tiny_llama(family / "hf", tied=tied)
        here(_family, family, {"width": cut})
        for name in ("teacher", "width"):
            (at / f"{prefix}{name}").symlink_to(family / name)
    for seed in (0, 1):
        families.tiny("mixtral", at / f"mixtral{seed}_hf", seed)
        here(models.import_hf, at / f"mixtral{seed}_hf", at / f"mixtral{seed}", ONE)
    return at


@pytest.fixture(scope="module")
def on_the_cpu(folders):
    """The figures of each run's steps on the CPU; its checkpoint is folders / "cpu" / name."""
    jobs = [(here, train, folders, name, folders / "cpu" / name) for name in RUNS]
    return dict(zip(RUNS, on_cpu(folders / "reference", *jobs), strict=True))


def train(folders, name, out_dir, dtype="fp32", stop_after=None, resume=False):
    student, teacher, config = RUNS[name]
    config = dataclasses.replace(config, stop_after=stop_after)
    return test_distill.distill(folders / student, folders / teacher, config, ONE, out_dir, resume, dtype)


@pytest.mark.parametrize("name", RUNS)
def test_fp32_steps_are_the_cpu_s(tmp_path, folders, on_the_cpu, name):
    found = here(train, folders, name, tmp_path / "run")
    for ours, theirs in zip(found, on_the_cpu[name], strict=True):
        for key in FIGURES + (("states_loss",) if name == "states" else ()):
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
    return test_states.first_step(folders, ONE, out_dir)


def test_intermediate_states_are_the_dense_ones(tmp_path):
    """Losses and gradients of the first step against transformers' modules in fp64."""
    models.tiny_llama(tmp_path / "hf", tied=True, num_hidden_layers=7)
    cuts = {"width": PruneConfig(hidden=24, ffn=18, blocks=5), "depth": PruneConfig(blocks=5)}
    here(_family, tmp_path, cuts)
    for name in ("teacher", *cuts):
        export(tmp_path / name, tmp_path / f"{name}_hf")
    found = here(first_states, tmp_path, tmp_path / "steps")
    for case, (figures, projection, gradient) in found.items():
        losses, gradients, lifted = test_states.oracle(tmp_path, case, projection)
        for key, loss in losses.items():
            assert math.isclose(figures[key], loss, rel_tol=5e-5), (case, key)
        if lifted is not None:
            assert (gradient - lifted).abs().max() <= 5e-5 * lifted.abs().max(), case
        weights = export(tmp_path / "steps" / case, tmp_path / f"{case}_steps")
        for key, expected in gradients.items():
            assert (weights[key] - expected).abs().max() <= 5e-5 * expected.abs().max(), (case, key)
