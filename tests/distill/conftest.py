"""Pairs of student and teacher."""

import pytest

from minitron_mcore.config.settings import PruneConfig
from tests.helpers.cutting import write_family


@pytest.fixture(params=[True, False], ids=["tied", "untied"], scope="module")
def pair(request, tmp_path_factory):
    """A pruned student and its teacher on disk."""
    at = tmp_path_factory.mktemp("pair")
    write_family(at, {"student": PruneConfig(hidden=24, ffn=18)}, tied=request.param)
    return at / "student", at / "teacher"
