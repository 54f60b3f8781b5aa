"""Every family against transformers' own class: a failure means that users of that family get another model than they gave."""

import json

import pytest
import torch

from minitron_mcore.checkpoint import open_checkpoint
from minitron_mcore.config import ParallelConfig
from minitron_mcore.models import architecture, hf
from minitron_mcore.testing import on_ranks
from tests import families, models

DENSE = [which for which in families.OF if "moe" not in which and which != "mixtral"]
EXPERTS = [which for which in families.OF if which not in DENSE]


def round_trip(folder, root, parallel, ids):
    """On every rank: Hugging Face -> checkpoint -> logits."""
    models.import_hf(folder, root / "ckpt", parallel)
    return models.mcore_logits(root / "ckpt", parallel, ids)


def check(which, tmp_path, world, parallel):
    folder, ids = families.tiny(which, tmp_path / "hf"), models.tokens()
    found = next(x for x in on_ranks(round_trip, world, parallel, folder, tmp_path, parallel, ids) if x is not None)
    assert (found - models.hf_logits(folder, ids)).abs().max() <= 2e-4
    (tmp_path / "back").mkdir()
    hf.export_folder(open_checkpoint(tmp_path / "ckpt"), tmp_path / "back")
    back, given = models.weights(tmp_path / "back"), models.weights(folder)
    given = {name: weight for name, weight in given.items() if name in back or name != "lm_head.weight"}
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], weight) for name, weight in given.items())
    assert torch.equal(models.hf_logits(tmp_path / "back", ids), models.hf_logits(folder, ids))


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
@pytest.mark.parametrize("which", DENSE)
def test_dense(tmp_path, which, layout):
    world, parallel = {"tp1": (1, {}), "tp2": (2, {"tensor": 2}), "pp2": (2, {"pipeline": 2})}[layout]
    check(which, tmp_path, world, ParallelConfig(**parallel))


@pytest.mark.parametrize("layout", ["one", "tp2", "ep2", "tp2_ep2", "pp2", "ep3"])
@pytest.mark.parametrize("which", EXPERTS)
def test_experts(tmp_path, which, layout):
    world, parallel = {
        "one": (1, {}),
        "tp2": (2, {"tensor": 2, "sequence": True}),
        "ep2": (2, {"expert": 2}),
        "tp2_ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
        "pp2": (2, {"pipeline": 2}),
        "ep3": (3, {"expert": 3}),
    }[layout]
    check(which, tmp_path, world, ParallelConfig(**parallel))
