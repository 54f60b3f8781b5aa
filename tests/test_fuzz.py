"""A short run of `tests.fuzz`: a failure means that a damaged file causes a traceback, a hang, or too much memory."""

import mmap
import os
import signal
from functools import partial

import pytest

from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks
from tests import fuzz
from tests.helpers import readers

CASES = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "valid"
    readers.BASE = folder
    on_ranks(readers.make, 1, readers.ONE, folder)
    return folder


@pytest.mark.parametrize("kind", readers.KINDS)
def test_damaged_files_end_in_a_sentence(base, kind):
    valid, *damaged = fuzz.run(kind, 0, -1, CASES + 1, base, 120)
    assert valid[1] == "read", valid
    assert len(damaged) == CASES and not [case for case in damaged if case[1] not in ("refused", "read")], damaged


def fill(folder) -> None:
    """Use new pages: the heap may have freed ones, which count for the process already."""
    pages = mmap.mmap(-1, fuzz.MEMORY + (1 << 20))
    pages[:: mmap.PAGESIZE] = b"x" * (len(pages) // mmap.PAGESIZE)


def test_findings_are_reported(base, monkeypatch, capsys):
    """An exception, a case over the time limit, one over the memory limit, and one that ends its process."""
    acts = {
        "exception": lambda folder: folder / 1,
        "hang": lambda folder: [None for _ in iter(int, 1)],
        "memory": fill,
        "died": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    }

    def read(folder, act) -> None:
        with (base / "turns").open("a") as file:
            file.write("x")
        if (base / "turns").stat().st_size % 3 == 2:
            act(folder)
        raise UserError("it is damaged")

    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "MEMORY", 64 << 20)
    for outcome, act in acts.items():
        monkeypatch.setitem(readers.KINDS, "x", readers.Kind("piped", "config.yaml", partial(read, act=act)))
        found = fuzz.run("x", 0, 0, 3, base, 60)
        assert [case[1] for case in found] == ["refused", outcome, "refused"], found
        assert fuzz.table({"x": found}, 0) == 1
        assert f"{outcome} x 1: [" in capsys.readouterr().out
