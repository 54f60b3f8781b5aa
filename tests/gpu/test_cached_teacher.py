"""A teacher's cache written and read on a CUDA device: a failure means that what was cached is not what the teacher says."""

import pytest
import torch

from minitron_mcore.config.settings import Dtype, PruneConfig
from tests.gpu.training import FIGURES
from tests.gpu.world import here
from tests.helpers import cached_teacher, models
from tests.helpers.cached_teacher import World, write_text
from tests.helpers.cutting import export, family_on_rank

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu_cached")]  # one worker, so that its caches are made once

KINDS = {
    "fp32": {name: cached_teacher.KINDS[name] for name in ("hidden", "hidden_int8", "top")},
    "bf16": {name: cached_teacher.KINDS[name] for name in ("hidden", "top")},
}
RESUMED = {"fp32": "top", "bf16": "hidden"}


@pytest.fixture(scope="module", params=list(KINDS))
def cached(request, tmp_path_factory):
    """Caches of a teacher written on the device, and runs from them, whole and in parts, and from the live teacher."""
    at = tmp_path_factory.mktemp("cached")
    models.tiny_llama(at / "hf")
    here(family_on_rank, at, {"student": PruneConfig(hidden=24, ffn=18)})
    world = World(at, write_text(at), Dtype(request.param))
    here(cached_teacher.record, *(world.writer(name, **kind) for name, kind in KINDS[request.param].items()))
    top = {"top_k": cached_teacher.K}
    runs = [world.run("live", "teacher"), world.run("live_top", "teacher", changes=top)]
    runs += [world.run(f"from_{name}", name) for name in KINDS[request.param]]
    runs += [world.run("parts", RESUMED[request.param], changes={"stop_after": stop}) for stop in (2, None)]
    assert here(cached_teacher.distill, *runs) == [None] * len(runs)
    return world


def test_cached_runs_are_live_ones(cached):
    fp32 = cached.dtype == Dtype.fp32
    same = cached_teacher.assert_same
    same(cached.history("from_hidden"), cached.history("live"), 1e-4 if fp32 else 1e-2, FIGURES)
    if fp32:
        same(cached.history("from_hidden_int8"), cached.history("live"), 3e-2)
    same(cached.history("from_top"), cached.history("live_top"), 1e-3 if fp32 else 5e-2)


def test_resumed_run_from_a_cache_is_bit_equal(tmp_path, cached):
    name = f"from_{RESUMED[cached.dtype.value]}"
    for a, b in zip(cached.history(name), cached.history("parts"), strict=True):
        assert all(a[key] == b[key] for key in ("step", "tokens", *FIGURES)), (a, b)
    found, expected = export(cached.path / "parts", tmp_path / "a"), export(cached.path / name, tmp_path / "b")
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
