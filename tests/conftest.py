"""Tests start processes of their own; OpenMP's threads would outnumber the cores."""

import os
from fnmatch import fnmatchcase as fnmatch

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.helpers")


def pytest_addoption(parser):
    parser.addoption("--on-cpu", action="store_true", help="run the tests marked gpu and multigpu on the CPU")


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(config, items):
    """Mark as slow what `default_cases` does not name. Skip slow tests unless -m names the mark, and gpu and multigpu tests where
    there is no CUDA device, unless --on-cpu is given."""
    ids = {}
    for item in items:
        if cases := item.get_closest_marker("default_cases"):
            ids.setdefault((item.parent.nodeid, item.originalname, cases.args), set()).add(item.callspec.id)
            if not any(fnmatch(item.callspec.id, pattern) for pattern in cases.args):
                item.add_marker("slow")
    if not any("::" in argument for argument in config.args):
        for (file, name, cases), existing in ids.items():
            if unknown := [pattern for pattern in cases if not any(fnmatch(case, pattern) for case in existing)]:
                raise pytest.UsageError(f"{file}::{name} has no case {unknown}; it has {sorted(existing)}")
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
