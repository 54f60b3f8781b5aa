"""The pipeline: a failure means that a stage is run, skipped or chained wrongly, or that a change of what it read or wrote goes
unnoticed. Folders are those of stages, with small files in them; the slow test runs the stages."""

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from minitron_mcore import testing
from minitron_mcore.checkpoint import stage_record
from minitron_mcore.checkpoint import steps as steps_on_disk
from minitron_mcore.cli import compose, pipeline
from minitron_mcore.config import identity
from minitron_mcore.errors import STOPPED_STATUS, UserError
from tests.helpers import launching, tiny_run

FROM_IMPORTANCE = ["importance", "plan", "prune", "distill", "export"]
RESULTS = {"importance": "scores.safetensors", "plan": "plan.json", "depth": "depth.json", "export": "config.json"}
"""Stage -> its file; other stages write a checkpoint."""


@pytest.fixture(autouse=True)
def hydra_is_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with launching.conf():
        yield


def write_stage(run, name: str, content: str) -> Path:
    """A finished stage's folder, whose result is `content`."""
    folder = Path(run.out_dir)
    (folder / "step_0000001").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(identity.resolved(run)))
    if name in RESULTS:
        (folder / RESULTS[name]).write_text(json.dumps({"of": content}))
    else:
        (folder / "model.json").write_text(json.dumps({"fingerprint": content}))
        (folder / "step_0000001" / "weights").write_text("w" * 9)
    stage_record.record_inputs(folder, stage_record.inputs(identity.resolved(run)))
    stage_record.finish(folder)
    return folder


def planned(*overrides: str) -> list[pipeline.Step]:
    return pipeline.plan(compose.compose("pipeline", list(overrides)), list(overrides))


def finish(steps: list[pipeline.Step]) -> list[str]:
    """Write the folders of all steps; the stages' names."""
    for step in steps:
        for run in step.folders.values():
            write_stage(run, step.name, f"{run.out_dir} {step.name}")
    return [step.name for step in steps]


@pytest.mark.parametrize(
    ("recipe", "overrides", "stages"),
    [
        ("llama31_minitron_4b_width", [], ["convert", *FROM_IMPORTANCE[:3], "correct", *FROM_IMPORTANCE[3:]]),
        ("llama31_minitron_4b_width", ["recipe.teacher=${recipe.source}"], ["convert", *FROM_IMPORTANCE]),
        ("smollm2_100m", ["recipe.study=${work_dir}/depth"], ["convert", "importance", "depth", *FROM_IMPORTANCE[1:]]),
        ("smollm2_100m", ["data.heldout=[x]", "parallel=tp3"], ["convert", *FROM_IMPORTANCE, "evaluate"]),
        ("nemotron_mini_4b_instruct", [], ["convert", "distill", "export"]),
    ],
)
def test_runs_what_the_last_stages_build_on(recipe, overrides, stages):
    assert [step.name for step in planned(f"+recipe={recipe}", *overrides)] == stages


def test_a_chain_of_recipes():
    second = planned("+recipe=minitron_4b")
    with pytest.raises(
        UserError, match=r"runs/minitron_8b/distill, which .*\+recipe=minitron_8b first.*recipe.source="
    ):
        pipeline.check(second)
    finish(planned("+recipe=minitron_8b"))
    assert finish(second) == FROM_IMPORTANCE
    pipeline.check(second)
    (Path("runs/minitron_8b/distill") / "step_0000001" / "weights").unlink()
    with pytest.raises(UserError, match="runs/minitron_8b/distill/step_0000001/weights is missing"):
        pipeline.check(second)


def test_unknown_stages_are_refused():
    with pytest.raises(UserError, match="stages names prnue: give some of convert, importance"):
        planned("+recipe=smollm2_100m", "stages=[prnue]")


def write(path: str, text: str):
    return lambda: Path(path).write_text(text)


WORK = "runs/smollm2_100m"


def other_rate() -> None:
    path = Path(f"{WORK}/distill/config.yaml")
    path.write_text(path.read_text().replace("peak_lr: 0.0008", "peak_lr: 0.1"))


def other_step() -> None:
    Path(f"{WORK}/prune/step_0000002").mkdir()


def lost_file() -> None:
    Path(f"{WORK}/prune/step_0000001/weights").unlink()


CHANGES = [
    (other_rate, r"minitron distill: runs/.*/distill holds another run \(distill.peak_lr was 0.1, is 0.0008\): give the old"),
    (write("text.jsonl", "{}"), r"minitron importance: \S+ was made from data.train\[0\] text.jsonl \(0.5 x \w{16}\), which"),
    (write("hf/config.json", "[]"), r"convert: \S+ was made from model.hf hf \(\w{16}\), which is hf \(\w{16}\) now"),
    (write(f"{WORK}/importance/scores.safetensors", "{}"), r"minitron plan: \S+ was made from scores \S+ .* now: restore the old"),
    (write(f"{WORK}/plan/plan.json", "{"), r"plan/plan.json has 1 bytes, but its stage wrote 37: restore it, or remove runs/"),
    (write(f"{WORK}/plan/plan.json", "?" * 37), "plan/plan.json has another content than its stage wrote"),
    (write(f"{WORK}/convert/model.json", '{"fingerprint": "x"}'), r"distill: \S+ was made from teacher .* which is \S+ \(x"),
    (other_step, r"minitron distill: \S+ was made from student .* step_0000001\), .*0002\) now"),
    (lost_file, "minitron prune: runs/.*/weights is missing, although its stage has finished"),
    (write(f"{WORK}/distill/inputs.json", ""), "distill/inputs.json cannot be read as JSON"),
]  # fmt: skip


def test_changes_are_refused_by_name_and_copies_are_not(tmp_path, monkeypatch):
    """Contents count, not time stamps; a folder of an earlier version, without records, is accepted."""
    Path("text.jsonl").write_text('{"text": "a"}')
    Path("hf").mkdir()
    Path("hf/config.json").write_text("{}")
    steps = planned("+recipe=smollm2_100m", "model.hf=hf", "data.train=['0.5 text.jsonl']")
    stages = finish(steps)
    for number, (change, sentence) in enumerate(CHANGES):
        shutil.copytree(tmp_path, copy := tmp_path.with_name(f"copy {number}"), copy_function=shutil.copyfile)
        monkeypatch.chdir(copy)
        for at, path in enumerate(sorted(copy.rglob("*"), reverse=True)):
            os.utime(path, (at, at))
        pipeline.check(steps)
        change()
        with pytest.raises(UserError, match=sentence):
            pipeline.check(steps)
    for step in steps:
        (Path(step.run.out_dir) / stage_record.INPUTS).unlink()
        (Path(step.run.out_dir) / stage_record.COMPLETE).write_text("")
    rows = pipeline.run(steps, 1)
    assert [row["stage"] for row in rows] == stages and all(row["seconds"] is None for row in rows)


def test_several_students():
    """The distillation has finished when all have; each is exported and evaluated."""
    steps = planned("+recipe=smollm2_100m", "data.heldout=[x]", "students={a: runs/a/prune, b: runs/b/prune}")
    with pytest.raises(UserError, match="runs/[ab]/prune, which minitron distill reads, does not exist"):
        pipeline.check(steps)
    assert [step.name for step in steps] == ["convert", "distill", *["export"] * 2, *["evaluate"] * 2]
    distill, *after = steps[1:]
    assert [step.run.source for step in after] == [
        *("runs/smollm2_100m/distill/a", "runs/smollm2_100m/distill/b"),
        *("runs/smollm2_100m/hf_a", "runs/smollm2_100m/hf_b"),
    ]
    for number, run in enumerate(distill.folders.values()):
        assert not pipeline.is_finished(distill), number
        write_stage(run, "distill", f"student {number}")
    assert pipeline.is_finished(distill)


def test_several_teachers():
    """They are inputs instead of the recipe's teacher: one that a stage writes is made, another must be there."""
    assert stage_record.inputs({"teacher": "", "teachers": ["a", "b"]}).keys() == {"teachers[0]", "teachers[1]"}
    steps = planned("+recipe=smollm2_100m", "teachers=[0.7,runs/smollm2_100m/correct,0.3,runs/b/convert]")
    assert "correct" in [step.name for step in steps]
    distill = next(step for step in steps if step.name == "distill")
    assert {str(path) for path in distill.inputs} == {
        "runs/smollm2_100m/correct",
        "runs/b/convert",
        "runs/smollm2_100m/prune",
    }
    with pytest.raises(UserError, match="runs/b/convert, which minitron distill reads, does not exist"):
        pipeline.check(steps)


SBATCH = """#!/bin/sh
echo "$STAGE $PROCESSES" "$@" >> jobs
[ "$STAGE" = "$REFUSE" ] && echo "no such partition" >&2 && exit 1
echo "$((100 + $(wc -l < jobs)));cluster"
"""


def test_slurm_jobs(tmp_path, monkeypatch):
    """One job for each unfinished stage, after the one before."""
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    steps = planned("+recipe=smollm2_100m", submit := "submit=sbatch --nodes 2 job.sh")
    sbatch = submit.removeprefix("submit=")
    finish(steps)
    for folder in ("plan", "distill", "hf"):
        shutil.rmtree(f"runs/smollm2_100m/{folder}")
    rows = pipeline.submit(steps, sbatch)
    assert {row["stage"]: row["job"] for row in rows if row["job"]} == {"plan": 101, "distill": 102, "export": 103}
    assert Path("jobs").read_text().splitlines() == [
        "plan 1 --parsable --job-name=plan --nodes 2 job.sh +recipe=smollm2_100m",
        "distill  --parsable --job-name=distill --dependency=afterok:101 --kill-on-invalid-dep=yes --nodes 2 job.sh "
        "+recipe=smollm2_100m",
        "export 1 --parsable --job-name=export --dependency=afterok:102 --kill-on-invalid-dep=yes --nodes 2 job.sh "
        "+recipe=smollm2_100m",
    ]
    monkeypatch.setenv("REFUSE", "distill")
    with pytest.raises(UserError, match=r"sbatch did not queue distill \(no such partition\)"):
        pipeline.submit(steps, sbatch)


def forked(cwd: Path, output: str, command: list[str]) -> None:
    os.setsid()
    launching._in_fork(cwd, output, "pipeline", command, 1, None)


def killed_when(cwd: Path, command: list[str], reached) -> None:
    """Start a pipeline, and kill it and all its processes once `reached()`."""
    with tempfile.NamedTemporaryFile("r") as output:
        main = testing._processes().Process(target=forked, args=(cwd, output.name, command))
        main.start()
        while not reached():
            assert main.is_alive(), output.read()
            time.sleep(0.02)
        os.killpg(main.pid, signal.SIGKILL)
        main.join()


@pytest.mark.slow
def test_killed_anywhere_the_same_command_goes_on(tmp_path):
    """In a conversion, while importance is scored, and during training, whose finished steps are not repeated. A signal to a
    stage stops the pipeline with the same status."""
    tiny_run.write(tmp_path, seed=1, count=2000)
    command = [
        *(*tiny_run.MODEL, "data.train=[text.txt]", "prune.hidden=24", "importance.samples=8"),
        *("importance.sequence_length=16", *tiny_run.training(steps=20, global_batch=4, save_every=1)),
    ]
    run = tmp_path / "runs/tiny"

    def begun(stage: str):
        return lambda: any(run.glob(f"{stage}*/config.yaml"))

    def trained() -> bool:
        return (run / "distill/step_0000002").is_dir()

    for moment in (begun("convert"), begun("importance"), trained):
        killed_when(tmp_path, command, moment)
    stopped = launching.fork(tmp_path, "pipeline", *command, fails=STOPPED_STATUS, stop_at=(2, signal.SIGUSR1))
    assert "minitron distill stopped: the same command continues." in stopped
    newest = steps_on_disk.newest_complete(run / "distill").number
    output = launching.fork(tmp_path, "pipeline", *command)
    assert f"resuming after step {newest}" in output and "minitron importance" not in output
    lines = [json.loads(line) for line in (run / "distill/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 21)]
    steps = planned(*command)
    pipeline.check(steps)
    assert all(map(pipeline.is_finished, steps))
    (tmp_path / "text.txt").write_text(launching.words(2000, 2))
    with pytest.raises(
        UserError, match=r"minitron importance: .*data.train\[0\].*\n.*minitron distill: .*data.train\[0\]"
    ):
        pipeline.check(steps)
