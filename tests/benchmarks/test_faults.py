"""The fault campaign. A failure means that a killed, damaged or contested run loses work, hides it, hangs, or leaves processes."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import faults  # noqa: E402


@pytest.mark.slow
def test_a_short_campaign(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["faults.py", "--quick", "--json", str(tmp_path / "lines")])
    with pytest.raises(SystemExit) as ended:
        faults.main()
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert not ended.value.code, lines
    assert {line["kind"] for line in lines} >= {"kill", "signal", "file", "second start"}
