"""Tests start processes of their own; OpenMP's threads would outnumber the cores."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.helpers")


def pytest_addoption(parser):
    parser.addoption("--on-cpu", action="store_true", help="run the tests marked gpu and multigpu on the CPU")


def pytest_collection_modifyitems(config, items):
    """Skip slow tests unless -m names them; gpu and multigpu tests where there are not enough CUDA devices, unless --on-cpu asks
    for them."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow (pytest -m slow runs it)"))
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("multigpu")]
    if not marked or config.getoption("--on-cpu"):
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (--on-cpu runs it on the CPU)"))
