"""Runs of a few steps, on a CUDA device and on the CPU."""

import dataclasses

from minitron_mcore.config.settings import HiddenStateLossConfig, PruneConfig
from tests.gpu.world import here
from tests.helpers import families, models, training
from tests.helpers.cutting import ONE, family_on_rank

CONFIG = training.CONFIG


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


def make_folders(at):
    """Students and teachers: a tied Llama, an untied one, two mixtures of experts."""
    cut = PruneConfig(hidden=24, ffn=18)
    for prefix, tied in (("", True), ("plain_", False)):
        family = at / f"{prefix}family"
        models.tiny_llama(family / "hf", tied=tied)
        here(family_on_rank, family, {"width": cut})
        for name in ("teacher", "width"):
            (at / f"{prefix}{name}").symlink_to(family / name)
    for seed in (0, 1):
        families.tiny("mixtral", at / f"mixtral{seed}_hf", seed)
        here(models.import_hf, at / f"mixtral{seed}_hf", at / f"mixtral{seed}", ONE)
    return at


def train(folders, name, out_dir, dtype="fp32", stop_after=None, resume=False):
    student, teacher, config = RUNS[name]
    config = dataclasses.replace(config, stop_after=stop_after)
    return training.distill(folders / student, folders / teacher, config, ONE, out_dir, resume, dtype)
