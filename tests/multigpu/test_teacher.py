"""Teachers in layouts, on ranks and in caches of their own over CUDA devices: a failure means that they teach something else."""

import dataclasses

import pytest
import torch

from minitron_mcore.config.settings import Dtype, ParallelConfig, PruneConfig
from tests.helpers import cached_teacher, teacher_layouts
from tests.helpers.cached_teacher import World, assert_same, write_text
from tests.helpers.cutting import ONE, export, family_on_rank
from tests.helpers.teacher_layouts import APART, CONFIG, hold, taught_apart, two_steps
from tests.multigpu.ranks import launch, need

pytestmark = pytest.mark.multigpu

SP = ParallelConfig(tensor=2, sequence=True)
PAIRS = {name: teacher_layouts.PAIRS[name] for name in ("pp2_of_tp2_sp", "dp4_of_tp2_pp2")} | {
    "cp2_tp2_sp_of_pp2_virtual2_dp2": teacher_layouts.PAIRS["cp2_tp2_sp_of_pp2_virtual2_dp2"],
    "tp2_sp_dp4_of_tp2_pp2_cp2": (8, SP, ParallelConfig(tensor=2, pipeline=2, context=2)),
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, its narrower student, and what the student learns on one device."""
    from tests.helpers import models

    at = tmp_path_factory.mktemp("teacher")
    models.tiny_llama(at / "hf", tied=True)
    launch(family_on_rank, 1, ONE, at, {"student": PruneConfig(hidden=24, ffn=18)})
    (alone,) = launch(two_steps, 1, ONE, at, CONFIG, ONE, at / "one")
    return at, alone, export(at / "one", at / "one_hf")


@pytest.mark.parametrize("name", PAIRS)
def test_a_layout_of_its_own(tmp_path, request, name):
    world, parallel, teacher_parallel = PAIRS[name]
    need(world)
    if not torch.cuda.is_available() and world > 4:
        pytest.skip("on the CPU at most four ranks")
    at, alone, expected = request.getfixturevalue("folders")
    config = dataclasses.replace(CONFIG, teacher_parallel=teacher_parallel)
    ranks = launch(two_steps, world, parallel, at, config, parallel, tmp_path / "run")
    hold(alone, expected, ranks, tmp_path, TOLERANCE)


@pytest.mark.parametrize("name", APART)
def test_ranks_of_its_own(tmp_path, request, name):
    world, _, teacher_ranks, _ = APART[name]
    need(world + teacher_ranks)
    at, alone, expected = request.getfixturevalue("folders")
    hold(alone, expected, taught_apart(launch, name, at, tmp_path / "run"), tmp_path, TOLERANCE)


CACHES = {
    "tp2_sp": (2, SP),
    "dp2": (2, ONE),
    "pp2_virtual2_cp2": (4, ParallelConfig(pipeline=2, virtual=2, context=2)),
    "tp2_sp_pp2_dp2": (8, dataclasses.replace(SP, pipeline=2)),
}
KINDS = ("hidden", "top")


def record_and_learn(writers, runs):
    cached_teacher.record(*writers)
    return cached_teacher.distill(*runs)


@pytest.mark.parametrize("layout", CACHES)
def test_a_cache(tmp_path, request, layout):
    """Written and read in a layout: the figures of the live teacher there."""
    size, parallel = CACHES[layout]
    need(size)
    if not torch.cuda.is_available() and size > 4:
        pytest.skip("on the CPU at most four ranks")
    at = request.getfixturevalue("folders")[0]
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(at / name)
    world = World(tmp_path, write_text(tmp_path), Dtype.fp32)
    writers = [world.writer(name, parallel, **cached_teacher.KINDS[name]) for name in KINDS]
    runs = [world.run(name, "teacher", parallel, changes) for name, changes in LIVE.items()]
    runs += [world.run(f"from_{name}", name, parallel) for name in KINDS]
    for refused in launch(record_and_learn, size, parallel, writers, runs):
        assert refused == [None] * len(runs)
    every = ("kd_loss", "lm_loss", "grad_norm", "teacher_entropy", "lr")
    assert_same(world.history("from_hidden"), world.history("live"), TOLERANCE, every)
    assert_same(world.history("from_top"), world.history("live_top"), 1e-3)


LIVE = {"live": {}, "live_top": {"top_k": cached_teacher.K}}
