"""Layers are torch's unless a test asks for Transformer Engine's, which computes fp32 products in TF32."""

import os

import pytest

from tests.gpu.world import leave

# Layers of a few rows compile in less time than a pool of compilers takes to start.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def torch_layers():
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRON_LAYERS", "torch")
        # megatron-core's fused activations are compiled on the device that they are for; a CPU's compiler takes 16 s.
        with torch.compiler.set_stance("default" if torch.cuda.is_available() else "force_eager"):
            yield
    leave()


@pytest.fixture
def eager():
    """Runs megatron-core's fused activations without compiling them: a test of many models would compile for each."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    """A world of one rank finds itself through a file."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
