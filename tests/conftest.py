"""Tests start processes of their own; OpenMP's threads would outnumber the cores."""

import functools
import os
import pkgutil
import sys
from fnmatch import fnmatchcase as fnmatch

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
pytest.register_assert_rewrite("tests.helpers")


def pytest_addoption(parser):
    parser.addoption("--on-cpu", action="store_true", help="run the tests marked gpu and multigpu on the CPU")


def pytest_collection_finish():
    """Ranks are forked from a process that has imported the whole package, so that they import little by themselves. Without CUDA
    they do not compile megatron-core's functions either: a compilation takes longer than most tests."""
    if testing := sys.modules.get("minitron_mcore.testing"):
        if not sys.modules["torch"].cuda.is_available():
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        package = sys.modules["minitron_mcore"]
        modules = {module.name for module in pkgutil.walk_packages(package.__path__, "minitron_mcore.")}
        modules -= {
            "minitron_mcore.distill.kernels"
        }  # a rank chooses whether Triton interprets them before it imports it
        testing.PRELOADED += [*sorted(modules), "matplotlib.backends.backend_agg", "pytest"]


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory):
    """Function of `tied`: a student pruned in width and its teacher, a tiny Llama, on disk."""

    @functools.cache
    def pair(tied: bool):
        from minitron_mcore.config.settings import PruneConfig
        from tests.helpers.cutting import write_family

        at = tmp_path_factory.mktemp("pair")
        write_family(at, {"student": PruneConfig(hidden=24, ffn=18)}, tied=tied)
        return at / "student", at / "teacher"

    return pair


def _shares_a_fixture(item) -> bool:
    """Whether a fixture of the test is made once a file."""
    return any(definitions[-1].scope == "module" for definitions in item._fixtureinfo.name2fixturedefs.values())


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(config, items):
    """Keep the tests that share a file's fixture on one worker. Mark as slow what `default_cases` does not name. Skip slow tests
    unless -m names the mark, and gpu and multigpu tests where there is no CUDA device, unless --on-cpu is given."""
    ids = {}
    for item in items:
        if _shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
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
