"""From a Hugging Face folder to a checkpoint and back."""

from pathlib import Path

import torch

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.testing import on_ranks
from tests.helpers import models
from tests.helpers.cutting import export
from tests.helpers.families import round_trip


def assert_same_model(folder: Path, at: Path, world: int, parallel: ParallelConfig) -> None:
    """The folder's model, made in at/ckpt by `world` ranks, has transformers' logits, and comes back bit by bit."""
    ids, given = models.tokens(), models.weights(folder)
    expected = models.hf_logits(folder, ids)
    found = next(x for x in on_ranks(round_trip, world, parallel, folder, at, parallel, ids) if x is not None)
    assert (found - expected).abs().max() <= 2e-4
    back = export(at / "ckpt", at / "back")
    given = {name: weight for name, weight in given.items() if name in back or name != "lm_head.weight"}
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], weight) for name, weight in given.items())
    assert torch.equal(models.hf_logits(at / "back", ids), expected)
