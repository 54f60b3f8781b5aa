"""Benchmarks, throughput and findings on the page, and runs that were copied: figures are those of the files."""

import dataclasses
import json
from pathlib import Path

import pytest

from minitron_mcore.errors import UserError
from minitron_mcore.reporting import artefacts, costs, measurements
from minitron_mcore.reporting.page import collect, render
from minitron_mcore.reporting.sections import Section
from tests.helpers import work_dir
from tests.reporting.test_page import Page

SCORES = {"teacher": (0.5, 0.4), "pruned": (0.2, 0.1), "distilled": (0.4, 0.36)}
OLD = "runs/old"
"""The work_dir in which the stages ran; the folder was copied since."""


def figure(*values: object) -> dict:
    return dict(zip(("benchmark", "case", "implementation", "metric", "value", "unit"), values, strict=True))


FIGURES = [
    figure("throughput", "fp32, 8 + 8 tokens", "teacher", "rate", 2.0, "requests/s"),
    figure("throughput", "fp32, 8 + 8 tokens", "width", "ratio", 1.5, "x"),
    figure("throughput", "fp32, 8 + 128 tokens", "width", "ratio", 2.5, "x"),
    figure("throughput", "fp8, 8 + 8 tokens", "roofline, width", "ratio", 9.0, "x"),
    figure("depth", "half of the blocks", work_dir.EVIL, "loss", 3.25, "nats/token"),
]


def write_benchmarks(folder: Path) -> None:
    """What `minitron benchmark` leaves, under names of the user; one result without a standard error."""
    measured = {}
    for name, (role, scores) in zip("abc", SCORES.items(), strict=True):
        source = {"teacher": "convert", "pruned": "prune", "distilled": "distill"}[role]
        measured[name] = {
            benchmark: {"score": score, "stderr": 0.01, "questions": 200, "shots": 5, "metric": "acc", "limit": 200}
            for benchmark, score in zip(("mmlu", "winogrande"), scores, strict=True)
        }
        (folder / name).mkdir(parents=True)
        record = {"source": {"path": f"{OLD}/{source}", "fingerprint": "f"}, "benchmarks": measured[name]}
        (folder / name / "benchmark.json").write_text(json.dumps(record))
        claimed = f"stage: benchmark\nwork_dir: {OLD}\nout_dir: {OLD}/{folder.name}/{name}\n"
        (folder / name / "config.yaml").write_text(claimed)
        complete = {"format_version": 1, "seconds": 60.0, "ranks": 2, "device": "H100", "files": {}}
        (folder / name / ".complete").write_text(json.dumps(complete))
    measured["c"]["winogrande"]["stderr"] = None
    published = {"A paper": {"mmlu": 65.3}}
    (folder / "benchmark.json").write_text(json.dumps({"models": measured, "published": published}))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A copied run: what the stages recorded about its folders names the old ones."""
    run = work_dir.write(tmp_path_factory.mktemp("measured") / "copy")
    for model in (run / "prune" / "model.json", run / "distill" / "model.json", run / "out/minitron/lineage.json"):
        text = model.read_text().replace(f'"{run}/gone"', f'"{OLD}/convert"').replace("0123456789abcdef", "f" * 16)
        model.write_text(text.replace(f'"{run}/', f'"{OLD}/'))
    (run / "prune" / "config.yaml").write_text(f"stage: prune\nwork_dir: {OLD}\nout_dir: {OLD}/prune\n")
    write_benchmarks(run / "benchmark")
    (run / "figures").mkdir()
    (run / "figures" / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in FIGURES))
    return run


def section(found: list[Section], title: str) -> Section:
    return next(section for section in found if section.title == title)


def test_benchmarks_by_role_of_a_copied_run(run):
    found = collect(run)
    page = Page(render(run, found))
    head = ["benchmark", "shots", "questions", "teacher", "pruned", "distilled", "kept", "published: A paper"]
    assert head in page.rows
    assert page.row("mmlu") == [
        "mmlu",
        "5",
        "200",
        "50.0 ± 1.0",
        "20.0 ± 1.0",
        "40.0 ± 1.0",
        "80\N{NO-BREAK SPACE}%",
        "65.3",
    ]
    assert page.row("winogrande")[3:] == ["40.0 ± 1.0", "10.0 ± 1.0", "36.0", "90\N{NO-BREAK SPACE}%", ""]
    assert page.row("mean of 2")[3:] == ["45.0", "15.0", "38.0", "84\N{NO-BREAK SPACE}%", ""]
    (part,) = section(found, "Benchmark").parts
    assert "the first 200 questions of each" in part.tables[0].caption
    tiles = {tile.label: (tile.value, tile.note) for tile in section(found, "Summary").tiles["Kept"]}
    assert tiles["benchmarks"] == ("84\N{NO-BREAK SPACE}%", "of the teacher's mean over 2: 45.0 → 38.0")
    assert page.row("benchmark", "benchmark/a") == [
        "benchmark",
        "benchmark/a",
        "1.0\N{NO-BREAK SPACE}min",
        "2",
        "H100",
    ]
    folders = artefacts.folders(run)
    assert {model.role: model.folder for model in artefacts.models(folders)} == {
        "teacher": run / "convert",
        "pruned": run / "prune",
        "distilled": run / "distill",
    }


def test_figures_of_benchmarks(run, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps(figure("serving", "batch 8", "vllm", "rate", 7.5, "requests/s")) + "\n")
    found = collect(run, [str(more)])
    page = Page(render(run, found))
    assert [part.name for part in section(found, "Throughput").parts] == ["throughput", "serving"]
    assert ["case", "implementation", "rate (requests/s)", "ratio (x)"] in page.rows
    assert page.row("fp32, 8 + 8 tokens", "width") == ["fp32, 8 + 8 tokens", "width", "", "1.500"]
    assert page.row("batch 8") == ["batch 8", "vllm", "7.500"]
    assert page.row("half of the blocks") == ["half of the blocks", work_dir.EVIL, "3.250"]
    assert [part.name for part in section(found, "Findings").parts] == ["depth"]
    tiles = {tile.label: tile.value for tile in section(found, "Summary").tiles["Kept"]}
    assert tiles["throughput, width"] == "2.00\N{NO-BREAK SPACE}x", "the mean of what was measured, not of estimates"
    with pytest.raises(UserError, match=f"figures names {tmp_path}/none, which is no file"):
        collect(run, [f"{tmp_path}/none"])
    more.write_text('{"benchmark": "throughput"}\n')
    (row,) = section(collect(run, [str(more)]), "Problems").parts[0].tables[0].rows
    assert row["left out"] == "more.jsonl" and str(more) in row["problem"]


def test_speeds_of_a_search(run):
    models = artefacts.models(artefacts.folders(run))
    teacher, student = ({"sizes": {"hidden": 36}}, {"sizes": {"hidden": 24}})
    speeds = {"prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 10.0, "measured_on": "H100"}
    models[-1] = models[-1]._replace(arch=dataclasses.replace(models[-1].arch, hidden=24))
    study = {"candidates": [{}, teacher | speeds, student | speeds | {"decode_tokens_per_second": 15.0}]}
    rows = measurements.search_speeds(study, models)
    assert [row["decode_tokens_per_second"] for row in rows] == [10.0, 15.0, 1.5] and rows[0]["measured on"] == "H100"
    assert measurements.search_speeds({"candidates": [teacher | speeds]}, models) == []


@pytest.mark.parametrize(
    "content",
    ['{"models": {"a": {"mmlu": {"score": "high"}}}}', '{"models": [1]}', '{"published": {"x": {"mmlu": null}}}', "[]"],
)
def test_damaged_results_do_not_break_the_page(run, tmp_path, content):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "benchmark.json").write_text(content)
    with pytest.raises(UserError, match="benchmark/benchmark.json"):
        collect(tmp_path)


def test_cost_of_steps(tmp_path):
    """Sums of `step_seconds`, of all steps where not each has a line; older files have speeds only."""
    (tmp_path / "distill").mkdir()
    speed = {"tokens_per_second": 6.4, "student_tflops": 2.0, "teacher_tflops": 1.0}  # of masked tokens
    steps = [{"step": n, "tokens": 64 * n, "step_seconds": 1.0} | speed for n in range(1, 11)]
    for lines, seconds in (
        (steps, 10.0),
        (steps[4::5], 10.0),
        ([steps[0] | {"save_seconds": 2.5}], 3.5),
        ([{key: value for key, value in step.items() if key != "step_seconds"} for step in steps], 100.0),
    ):
        (tmp_path / "distill" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = costs.trained(tmp_path / "distill")
        waited = sum(line.get("save_seconds", 0.0) for line in lines)
        assert found["seconds"] == pytest.approx(seconds) and found["tokens"] == lines[-1]["tokens"]
        assert found["FLOPs"] == pytest.approx(3e12 * (seconds - waited))


def test_what_an_old_run_lacks_leaves_no_hole(tmp_path):
    """Metrics without operations or speed, a manifest without costs, a benchmark of one model, an empty file of figures."""
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "config.yaml").write_text("stage: distill\n")
    (tmp_path / "distill" / ".complete").write_text("")
    (tmp_path / "distill" / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "lm_loss": 3.0}\n')
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "benchmark.json").write_text(
        '{"models": {"x": {"mmlu": {"score": 0.5}}}, "published": null}'
    )
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "none.jsonl").write_text("")
    found = collect(tmp_path)
    assert [section.title for section in found] == ["Summary", "Benchmark", "Training"]
    page = Page(render(tmp_path, found))
    assert page.row("mmlu") == ["mmlu", "50.0"] and page.row("distill") == ["distill", "distill", "64"]
    assert found[0].tiles == {}
