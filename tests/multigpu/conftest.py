"""Ranks over NCCL, a CUDA device each (--on-cpu: over gloo). Layers are torch's, uncompiled, so that fp32 stays fp32 and a start
takes no compiler."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def ranks_environment():
    """What every rank inherits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRON_LAYERS", "torch")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield
