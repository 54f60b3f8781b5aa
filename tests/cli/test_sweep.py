"""Sweeps: a failure means that a job that fails stops the others, or that the sweep hides it."""

import json
import re

from tests.helpers import models
from tests.helpers.launching import fork


def test_a_failed_job_does_not_stop_the_others(tmp_path):
    models.tiny_llama(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    command = [
        *("--multirun", "+model=smollm2_135m", "model.architecture=null", "dtype=fp32", "hydra.sweep.dir=sweep"),
        *("model.hf=bad,good", "work_dir=runs/${model.hf}"),
    ]
    output = fork(tmp_path, "convert", *command, fails=2)
    rows = re.findall(r"^ +\d +(bad|good) +(finished|failed \(\d\)) ", output, re.MULTILINE)
    assert rows == [("bad", "failed (2)"), ("good", "finished")], output
    assert "error: 1 of 2 jobs did not finish" in output and output.count("$ minitron convert") == 2
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep/jobs").iterdir())]
    assert [record["status"] for record in records] == [2, 0] and "model.hf=bad" in records[0]["overrides"]
    assert [path.parent.name for path in tmp_path.glob("runs/*/convert")] == ["good"]
    assert (tmp_path / "sweep/multirun.yaml").is_file()
