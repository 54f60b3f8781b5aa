"""Pauses on a CUDA device: a failure means that a stop and a resume change what the student learns there."""

import pytest
import torch

from tests.gpu.training import FIGURES, make_folders, train
from tests.gpu.world import here
from tests.helpers.cutting import export

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu_resume")]  # one worker, so that its models are made once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tied", "untied, label loss", "states"])
def test_resumed_run_is_bit_equal(tmp_path, folders, name, dtype):
    """With the distributed optimizer, whose state is resharded; intermediate states train a projection of their own."""
    whole = here(train, folders, name, tmp_path / "whole", dtype)
    parts = here(train, folders, name, tmp_path / "parts", dtype, 2)
    parts += here(train, folders, name, tmp_path / "parts", dtype, None, True)
    for a, b in zip(whole, parts, strict=True):
        assert all(a[key] == b[key] for key in ("step", "tokens", *FIGURES)), (a, b)
    found, expected = export(tmp_path / "parts", tmp_path / "a"), export(tmp_path / "whole", tmp_path / "b")
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
