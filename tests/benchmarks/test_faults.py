"""The fault campaign. A failure means that a killed, damaged or contested run loses work, hides it, hangs, or leaves processes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import faults  # noqa: E402


@pytest.mark.slow
def test_a_short_campaign(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["faults.py", "--quick", "--json", str(tmp_path / "figures")])
    with pytest.raises(SystemExit) as ended:
        faults.main()
    assert not ended.value.code
    assert '"outcome"' not in (tmp_path / "figures").read_text() and (tmp_path / "figures").stat().st_size
