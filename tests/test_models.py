"""Hugging Face -> Megatron-Core -> Hugging Face: a failure means users' weights or logits are not the ones they gave."""

import pytest
import torch

from minitron_mcore.config import ParallelConfig
from tests import models

LAYOUTS = {
    "tp1": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "tp3": (3, ParallelConfig(tensor=3)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "dp2": (2, ParallelConfig()),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(pool, tmp_path, layout, tied):
    world, parallel = LAYOUTS[layout]
    folder = models.tiny_llama(tmp_path / "hf", tied=tied)
    pool.run(models.import_hf, world, parallel, folder, tmp_path / "ckpt", parallel)
    ids = models.tokens()
    logits = next(x for x in pool.run(models.mcore_logits, world, parallel, tmp_path / "ckpt", parallel, ids) if x is not None)
    assert (logits - models.hf_logits(folder, ids)).abs().max() <= 2e-4
