"""Which cases of a test run by default."""

from collections.abc import Iterable

import pytest


def slow_except(cases: Iterable[str], *default: str) -> list:
    """Parameters of a test: those named in `default` run in `make test`, the others in `make test-slow`."""
    cases = list(cases)
    assert set(default) <= set(cases), f"{set(default) - set(cases)} are not among {cases}"
    return [case if case in default else pytest.param(case, marks=pytest.mark.slow) for case in cases]
