"""report.html: a failure means a page that leaves something out, shows what is not so, or runs what a file says."""

import base64
import html.parser
import inspect
import json
import runpy
import shutil
from pathlib import Path

import pytest

from minitron_mcore.checkpoint import stage_record
from minitron_mcore.checkpoint.stage_record import COMPLETE
from minitron_mcore.errors import UserError
from minitron_mcore.pruning.apply import fingerprint
from minitron_mcore.reporting import artefacts, costs, overview, sections
from minitron_mcore.reporting.page import GENERATOR, collect, render, write
from tests.helpers import work_dir
from tests.helpers.launching import ROOT, config_of
from tests.helpers.work_dir import ARCH, EVIL, planned


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return work_dir.write(tmp_path_factory.mktemp("run") / "a & <b>")


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: refuses tags that are left open; collects elements, table rows and text."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.rows, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]

    def row(self, *starts: str) -> list[str]:
        """The one table row that begins with these cells."""
        (found,) = [row for row in self.rows if row[: len(starts)] == list(starts)]
        return found


@pytest.fixture(scope="module")
def page(whole) -> Page:
    write(whole, whole / "report.html")
    return Page((whole / "report.html").read_text())


def test_it_needs_nothing_but_itself(whole, page):
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert "url(" not in (whole / "report.html").read_text() and "@import" not in (whole / "report.html").read_text()
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {link["href"].removeprefix("#") for link in page.all("a")} == ids
    assert ids == {"summary", "evaluation", "importance", "plan", "depth", "search", "training", "lineage"}


def test_pictures_are_within_and_told(whole, page):
    shown = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")]
    files = ["importance/importance.png", "plan/plan.png", "depth/loss_by_last_block.png", "distill/losses of <b>.png"]
    assert shown == [(whole / file).read_bytes() for file in files]
    alts = [image["alt"] for image in page.all("img")]
    assert "hidden 24 of 36; " in alts[1] and "blocks 3 of 5" in alts[1]
    assert "loss by last block" in alts[2] and "losses of <b>" in alts[3] and len(page.all("figcaption")) == 4
    assert len(page.all("table")) == len(page.all("caption")) and all("scope" in head for head in page.all("th"))


def test_figures_are_those_of_the_files(page):
    text = "".join(page.text)
    assert "1,920 tokens in 30 steps: KD loss from 4.5 to 0.15, LM loss from 4.5 to 2.57" in text
    assert page.row("30")[:4] == ["30", "1,920", "0.1500", "2.567"]
    assert page.row("distilled", "out", "d" * 16, "29,400", "heldout.jsonl") == [
        "distilled",
        "out",
        "d" * 16,
        "29,400",
        "heldout.jsonl",
        "11",
        "44",
        "2.250",
        "9.488",
    ]
    # depth: the best of each size by loss, and every point
    best = [row for row in page.rows if row[:3] in (["1", "1", "1"], ["2", "3", "4"])]
    assert [row[3] for row in best] == ["3.250", "7.000", "3.250", "7.000"] and page.row("2", "3, 4") == ["2", "3, 4"]
    assert len([row for row in page.rows if row[:1] == ["1"] and len(row) == 7]) == 6
    # search: ranks before and after, without the columns that nobody has
    assert page.row("wide")[1:] == ["5", "32", "20", "1,032", "32", "5.500", "2", "16", "4.750", "1"]
    assert page.row("c")[1:] == ["5", "24", "20", "1,024", "24", "7.000", "3", "", "", ""]
    assert "dropped blocks (from 0)" in text and "1, 3" in text and "0.0123" in text
    assert page.row("ffn")[1:4] == ["17", "30", "0.5667"]


def test_the_summary_compares_roles(whole, tmp_path):
    """The teacher is evaluated as the folder that was converted, the others as checkpoints."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "evaluate")
    record = json.loads((run / "distill" / "model.json").read_text())
    source = record["lineage"]["ancestry"]["parents"]["source"]
    record["lineage"]["parents"]["teacher"] = source
    record["lineage"]["teacher"] = record["lineage"]["ancestry"]["ancestry"]
    record["lineage"]["command"] = "launch/distill.py +model=tiny 'data.heldout=[a b.txt]' distill.steps=30 work_dir=w"
    (run / "distill" / "model.json").write_text(json.dumps(record))
    small = ARCH.to_json() | {"hidden": 24}
    for folder in ("prune", "distill"):
        model = json.loads((run / folder / "model.json").read_text())
        (run / folder / "model.json").write_text(json.dumps(model | {"architecture": small}))
    shutil.rmtree(run / "out")
    for number, (path, loss) in enumerate([("/models/Tiny", 2.0), (run / "prune", 6.0), (run / "distill", 3.0)]):
        (run / f"evaluate{number}").mkdir()
        figures = {"file": "/text/heldout.jsonl", "loss": loss, "perplexity": 2.0}
        (run / f"evaluate{number}" / "evaluation.json").write_text(
            json.dumps({"source": str(path), "files": [figures]})
        )
    steps = [{"step": n, "tokens": 64 * n, "tokens_per_second": 64.0} for n in range(1, 31)]
    (run / "distill" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "prune" / "config.yaml").write_text(f"stage: prune\nwork_dir: {tmp_path}\nout_dir: {tmp_path}/prune\n")
    stage_record.finish(run / "prune", {"ranks": 3, "device": "H100"})
    complete = json.loads((run / "prune" / COMPLETE).read_text())
    assert complete["seconds"] < 60
    (run / "prune" / COMPLETE).write_text(json.dumps(complete | {"seconds": 90.0}))
    for name in ("prune", "distill"):
        (run / name / "config.yaml").write_text(
            f"stage: {name}\nwork_dir: w\nout_dir: w/{name}\nmodel: {{name: tiny}}\n"
        )
    folders = artefacts.folders(run)
    models = artefacts.models(folders)
    costed = costs.rows(folders, {})
    rows, tiles = (
        overview.rows(models),
        overview.tiles(models, costed, overview.Kept((0.5, 0.4, 3), {"width": [1.5, 1.7]})),
    )
    assert [(row["model"], row["loss"]) for row in rows] == [
        ("teacher", 2.0),
        ("pruned", 6.0),
        ("distilled", 3.0),
    ]
    assert [row["parameters"] for row in rows] == [75708, 50472, 50472]
    assert rows[2][
        "of the teacher"
    ] == "67\N{NO-BREAK SPACE}%" and "recovered 75\N{NO-BREAK SPACE}% of the increase" in overview.headline(models)
    shown = {h: [(t.label, t.value.replace("\N{NO-BREAK SPACE}", " ")) for t in group] for h, group in tiles.items()}
    assert shown == {
        "Model": [("parameters", "75.7 k → 50.5 k"), ("sizes", "hidden 67 %")],
        "Cost": [("distillation", "1.92 k tokens"), ("time", "2.0 min"), ("ranks", "3")],
        "Kept": [
            ("loss", "2.00 → 3.00"),
            ("recovered", "75 %"),
            ("benchmarks", "80 %"),
            ("throughput, width", "1.60 x"),
        ],
    }
    assert [(row["stage"], row["minutes"], row["tokens"], row["ranks"], row["device"]) for row in costed] == [
        ("prune", 1.5, None, 3, "H100"),
        ("distill", 0.5, 1920, None, None),
    ]
    assert overview.headline(models).startswith(
        "Tiny, pruned and distilled. Pruning raised the loss from 2.000 to 6.000"
    )
    assert [row["command"] for row in overview.commands(models, folders)] == [
        "python launch/export.py +model=tiny work_dir=w",
        f"python launch/generate.py +model=tiny work_dir=w source={run}/distill prompt=Hello",
    ]
    shutil.rmtree(run / "evaluate1")
    folders = artefacts.folders(run)
    commands = {row["next"]: row["command"] for row in overview.commands(artefacts.models(folders), folders)}
    assert commands["Evaluate the pruned model"] == (
        f"python launch/evaluate.py +model=tiny work_dir=w 'data.heldout=[a b.txt]' source={run}/prune "
        f"out_dir={run}/evaluate_pruned"
    )
    for folder, made in (("a", "distill"), ("z", "prune")):  # the last by name is not the last that was made
        shutil.copytree(whole / "out", run / folder)
        identity = json.loads((run / folder / "minitron" / "lineage.json").read_text())
        identity["fingerprint"] = json.loads((run / made / "model.json").read_text())["fingerprint"]
        (run / folder / "minitron" / "lineage.json").write_text(json.dumps(identity))
    folders = artefacts.folders(run)
    commands = {row["next"]: row["command"] for row in overview.commands(artefacts.models(folders), folders)}
    assert commands["Serve the exported model"] == f"vllm serve {run}/a"


def test_the_lineage_leads_from_the_parent_to_the_delivery(whole, page):
    _, plan = planned()
    source, cut = "f" * 16, fingerprint(plan)
    expected = [
        ["weights", source, "converted", f"huggingface {source} in /models/Tiny", "", "convert"],
        ["weights", "0123456789abcdef", "converted", "source 0123456789abcdef", "", f"{whole}/gone (not there now)"],
        ["scores", plan.scores, "scored", f"weights {source}", "", "importance"],
        ["plan", plan.digest(), "planned", f"weights {source}, scores {plan.scores}", "", "plan"],
        ["weights", cut, "pruned", f"source {source}", f"plan {plan.digest()}, scores {plan.scores}", "prune"],
        ["weights", "d" * 16, "distilled", f"student {cut}, teacher 0123456789abcdef", "data dada", "distill"],
        ["folder", "d" * 16, "exported", f"weights {'d' * 16}", f"plan {plan.digest()}", "out"],
    ]
    found = [row for row in page.rows if row[0] in ("weights", "scores", "plan", "folder") and len(row) == 6]
    assert sorted(found) == sorted(expected)
    order = [row[2] for row in found]
    assert order.index("scored") < order.index("planned") < order.index("pruned") < order.index("distilled")
    assert ["d" * 16, "launch/export.py x", ""] in page.rows


def test_what_lies_elsewhere_is_looked_at(whole, tmp_path):
    shutil.copytree(whole / "distill", tmp_path / "run" / "distill")
    (there,) = [row for row in rows_of(tmp_path / "run") if row["how"] == "pruned"]
    assert there["folder"] == str(whole / "prune")
    record = json.loads((tmp_path / "run" / "distill" / "model.json").read_text())
    record["lineage"]["parents"]["student"]["path"] = str(whole / "convert")
    (tmp_path / "run" / "distill" / "model.json").write_text(json.dumps(record))
    (other,) = [row for row in rows_of(tmp_path / "run") if row["how"] == "pruned"]
    assert other["folder"] == f"{whole / 'convert'} (holds other weights now)"


def rows_of(work_dir: Path) -> list[dict]:
    found = collect(work_dir)
    return next(section for section in found if section.title == "Lineage").parts[0].tables[0].rows


def test_what_files_say_is_text(whole, page):
    text = (whole / "report.html").read_text()
    assert EVIL not in text and "<b>" not in text and "49" not in [cell for row in page.rows for cell in row]
    assert page.row(EVIL)[1:3] == ["5", "28"]  # a candidate's name
    assert any(EVIL in cell for row in page.rows for cell in row if "launch" not in cell)
    assert EVIL in "".join(page.text) and "a & <b>" in "".join(page.text)


@pytest.mark.parametrize("stage", ["importance", "plan", "depth", "search", "distill", "evaluate", "convert", "out"])
def test_one_stage_is_enough(whole, tmp_path, stage):
    shutil.copytree(whole / stage, tmp_path / stage)
    titles = [section.title for section in collect(tmp_path)]
    own = {"distill": ["Training"], "evaluate": ["Evaluation"], "convert": [], "out": []}.get(
        stage, [stage.capitalize()]
    )
    summary = ["Summary"] if stage in ("distill", "convert", "out") else []
    assert titles == summary + own + (["Lineage"] if stage not in ("depth", "search", "evaluate") else [])
    Page(render(tmp_path, collect(tmp_path)))


@pytest.mark.parametrize("content", [{}, {"sweep": [{"size": 1}], "candidates": [{"name": "x"}]}])
def test_sections_that_a_study_left_out(tmp_path, content):
    for name in ("depth", "search"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(content))
    Page(render(tmp_path, collect(tmp_path)))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("importance/scores.safetensors", b"\x00" * 40),
        ("plan/plan.json", b"{}"),
        ("depth/depth.json", b'{"sweep": [{"size": 1}'),
        ("depth/depth.json", b'{"sweep": [3]}'),
        ("depth/depth.json", b"[]"),
        ("search/search.json", b"\xff\xfe"),
        ("search/search.json", b'{"candidates": [{"sizes": {}}]}'),
        ("distill/metrics.jsonl", b'{"step": 1}\nnot a line\n'),
        ("distill/model.json", b'{"fingerprint": "x"}'),
        ("evaluate/evaluation.json", b'{"source": "x", "files": [{"loss": 1}]}'),
        ("out/minitron/lineage.json", b'{"fingerprint": "x", "lineage": {"parents": 3}}'),
        ("depth/loss_by_last_block.png", b"<svg/>"),
    ],
)
def test_a_damaged_file_is_named_and_its_folder_left_out(whole, tmp_path, file, content):
    """Without any other folder nothing is written, and an older page stays."""
    run, folder = tmp_path / "run", file.split("/")[0]
    shutil.copytree(whole, run)
    (run / file).write_bytes(content)
    found = collect(run)
    (problems,) = [section for section in found if section.title == "Problems"]
    (row,) = problems.parts[0].tables[0].rows
    assert row["left out"] == folder and file in row["problem"] and "\n" not in row["problem"]
    page = Page(render(run, found))
    assert page.row(folder, row["problem"]) and "Importance" in "".join(page.text) or folder == "importance"
    for other in run.iterdir():
        if other.is_dir() and other.name != folder:
            shutil.rmtree(other)
    (run / "report.html").write_text(f"{GENERATOR}, an older one")
    with pytest.raises(UserError, match=file.split("/")[-1].replace(".", r"\.")) as refused:
        write(run, run / "report.html")
    assert "\n" not in str(refused.value)
    assert (run / "report.html").read_text() == f"{GENERATOR}, an older one"


def launched(*overrides) -> None:
    """launch/report.py in this process."""
    inspect.unwrap(runpy.run_path(str(ROOT / "launch" / "report.py"))["main"])(config_of("report", *overrides))


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match=f"no folder {tmp_path}/run: give .*work_dir="):
        launched(f"work_dir={tmp_path}/run")
    (tmp_path / "run" / "notes").mkdir(parents=True)
    with pytest.raises(UserError, match="has nothing to report: no folder in it holds one of scores.safetensors, "):
        launched(f"work_dir={tmp_path}/run")
    (tmp_path / "run" / "notes" / "evaluation.json").write_text('{"source": "x", "files": []}')
    with pytest.raises(UserError, match="nothing to report yet"):
        launched(f"work_dir={tmp_path}/run")
    assert not (tmp_path / "run" / "report.html").exists()


def test_only_reports_are_replaced(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole / "depth", run / "depth")
    launched(f"work_dir={run}", "dry_run=true")
    assert not (run / "report.html").exists() and "would go into" in capsys.readouterr().out
    launched(f"work_dir={run}")
    launched(f"work_dir={run}")
    assert list(run.glob("report*")) == [run / "report.html"]
    (run / "mine.html").write_text("<p>My page</p>")
    for other in (run / "mine.html", run / "depth"):
        with pytest.raises(UserError, match="exists and is not a report"):
            launched(f"work_dir={run}", f"html={other}")
    assert (run / "mine.html").read_text() == "<p>My page</p>"


def test_ranks_are_of_what_was_measured():
    assert sections._ranks([5.5, None, 5.25, 7.0]) == [2, None, 1, 3]
