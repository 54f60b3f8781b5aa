"""Pairs of student and teacher."""

import pytest


@pytest.fixture(params=[True, False], ids=["tied", "untied"], scope="module")
def pair(request, pair_of):
    """A pruned student and its teacher on disk."""
    return pair_of(request.param)
