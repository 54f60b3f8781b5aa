"""Layers are torch's unless a test asks for Transformer Engine's, which computes fp32 products in TF32."""

import os

import pytest

# Layers of a few rows compile in less time than a pool of compilers takes to start.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def torch_layers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRON_LAYERS", "torch")
        yield


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    """A world of one rank finds itself through a file."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
