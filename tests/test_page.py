"""report.html: a failure means a page that leaves something out, shows what is not so, or runs what a file says."""

import base64
import html.parser
import inspect
import json
import runpy
import shutil
from pathlib import Path

import pytest

from minitron_mcore import checkpoint, pictures
from minitron_mcore.config import PruneConfig
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores, save_scores
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.page import sections, write
from minitron_mcore.plan.plan import Plan, make_plan
from minitron_mcore.prune import fingerprint
from tests.test_launch import ROOT, config_of
from tests.test_prune import random_scores

ARCH = Architecture("llama", 5, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, tied=False)
EVIL = "<img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
SWEEP = [
    {"size": 1, "first": n, "dropped": [n], "loss": loss, "kl": loss - 3, "mse": 0.1, "accuracy": accuracy}
    for n, (loss, accuracy) in enumerate([(9.5, 0.5), (3.25, 0.55), (3.5, 0.65), (4.0, 0.6), (8.0, 0.5)])
] + [{"size": 2, "first": n, "dropped": [n, n + 1], "loss": 10.0 - n, "kl": 1.0, "mse": 0.2} for n in range(4)]
DEPTH = {
    "model": "f" * 16,
    "metric": "loss",
    "kind": "contiguous",
    "baseline": {"loss": 3.125, "accuracy": None},
    "sweep": SWEEP,
    "drop": {"1": [1], "2": [3, 4]},
}
CANDIDATES = [
    {
        "name": name,
        "sizes": {"blocks": 5, "hidden": hidden, "ffn": 20},
        "parameters": 1000 + hidden,
        "zero_shot_loss": z,
    }
    | {"without_embeddings": hidden, "steps": steps, "losses": [], "loss": loss, "decode_tokens_per_second": None}
    for name, hidden, z, steps, loss in [
        ("wide", 32, 5.5, [8, 16], 4.75),
        (EVIL, 28, 5.25, [8, 16], 5.0),
        ("c", 24, 7.0, [], None),
    ]
]
WRITTEN = ("importance", "plan", "depth", "search", "distill", "evaluate", "out")


def made(folder: Path, name: str, parents: dict, **details) -> dict:
    """model.json of a checkpoint; its lineage."""
    folder.mkdir()
    checkpoint.describe(folder, ARCH, name, parents, folder, **details)
    return json.loads((folder / "model.json").read_text())["lineage"]


def planned() -> tuple[Scores, Plan]:
    known = {"fingerprint": "f" * 16, "samples": "77", "data": EVIL}
    scores = Scores(random_scores(ARCH).vectors, known)
    return scores, make_plan(ARCH, "f" * 16, scores, PruneConfig(hidden=24, ffn=17, drop_blocks=[1, 3]))


def write_work_dir(root: Path) -> Path:
    """A work_dir with something of every stage."""
    for name in WRITTEN:
        (root / name).mkdir(parents=True)
    scores, plan = planned()
    file = save_scores(root / "importance", scores)
    pictures.plot_importance(file, root / "importance" / "importance.png")
    (root / "plan" / "plan.json").write_text(plan.to_json())
    pictures.plot_plan(plan, scores.vectors, root / "plan" / "plan.png")
    converted = made(root / "convert", "f" * 16, {"huggingface": {"path": "/models/Tiny", "sha256": "f" * 16}})
    source = {"path": str(root / "convert"), "fingerprint": "f" * 16, "step": "step_0000000"}
    cut = {"plan": plan.digest(), "scores": plan.scores, "ancestry": converted}
    pruned = made(root / "prune", fingerprint(plan), {"source": source}, **cut)
    (root / "prune" / "plan.json").write_text(plan.to_json())
    student = {"path": str(root / "prune"), "fingerprint": fingerprint(plan), "step": "step_0000000"}
    away = {"path": str(root / "gone"), "fingerprint": "0123456789abcdef", "step": "step_0000004"}
    training = {"settings": {"peak_lr": 0.0123, "steps": 30}, "data": {"files": [], "hash": "dada"}}
    taught = {"parents": {"source": away}, "versions": {}, "command": EVIL}
    lineages = {"ancestry": pruned, "teacher": taught}
    shutil.rmtree(root / "distill")
    distilled = made(root / "distill", "d" * 16, {"student": student, "teacher": away}, **training, **lineages)
    steps = [
        {"step": n, "tokens": 64 * n, "kd_loss": 4.5 / n, "lm_loss": 2.5 + 2 / n, "lr": 1e-3, "grad_norm": 1.0}
        for n in range(1, 31)
    ]
    lines = [json.dumps(step) for step in steps]
    (root / "distill" / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:9]]))  # a run is writing
    (root / "distill" / "losses of <b>.png").write_bytes((root / "plan" / "plan.png").read_bytes())
    (root / "depth" / "depth.json").write_text(json.dumps(DEPTH))
    (root / "depth" / "loss_by_last_block.png").write_bytes((root / "plan" / "plan.png").read_bytes())
    (root / "search" / "search.json").write_text(json.dumps({"model": "f" * 16, "candidates": CANDIDATES}))
    figures = {"file": "/text/heldout.jsonl", "tokens": 11, "bytes": 44, "loss": 2.25, "perplexity": 9.488}
    evaluation = {"source": str(root / "out"), "parameters": 29400, "files": [figures, figures | {"file": EVIL}]}
    (root / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation))
    (root / "out" / "minitron").mkdir()
    (root / "out" / "minitron" / f"plan_{plan.digest()}.json").write_text(plan.to_json())
    record = {
        "path": str(root / "distill"),
        "step": "step_0000030",
        "fingerprint": "d" * 16,
        "command": "launch/export.py x",
    }
    (root / "out" / "minitron" / "lineage.json").write_text(json.dumps(record | {"lineage": distilled}))
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_work_dir(tmp_path_factory.mktemp("run") / "a & <b>")


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
    write.write(whole, whole / "report.html")
    return Page((whole / "report.html").read_text())


def test_it_needs_nothing_but_itself(whole, page):
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert "url(" not in (whole / "report.html").read_text() and "@import" not in (whole / "report.html").read_text()
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {link["href"].removeprefix("#") for link in page.all("a")} == ids
    assert ids == {"evaluation", "importance", "plan", "depth", "search", "training", "lineage"}


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
    assert "1,920 tokens in 30 steps took the KD loss from 4.5 to 0.15 and the LM loss from 4.5 to 2.57" in text
    assert page.row("30")[:4] == ["30", "1,920", "0.1500", "2.567"]
    assert page.row("out", "d" * 16, "29,400", "heldout.jsonl") == [
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
    found = write.collect(work_dir)
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
    titles = [section.title for section in write.collect(tmp_path)]
    own = {"distill": ["Training"], "evaluate": ["Evaluation"], "convert": [], "out": []}.get(
        stage, [stage.capitalize()]
    )
    assert titles == own + (["Lineage"] if stage not in ("depth", "search", "evaluate") else [])
    Page(write.render(tmp_path, write.collect(tmp_path)))


@pytest.mark.parametrize("content", [{}, {"sweep": [{"size": 1}], "candidates": [{"name": "x"}]}])
def test_sections_that_a_study_left_out(tmp_path, content):
    for name in ("depth", "search"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(content))
    Page(write.render(tmp_path, write.collect(tmp_path)))


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
def test_a_damaged_file_is_named_and_the_old_page_stays(whole, tmp_path, file, content):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text(f"{write.GENERATOR}, an older one")
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(UserError, match=file.split("/")[-1].replace(".", r"\.")) as refused:
        write.write(tmp_path / "run", tmp_path / "run" / "report.html")
    assert "\n" not in str(refused.value)
    assert (tmp_path / "run" / "report.html").read_text() == f"{write.GENERATOR}, an older one"


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
        with pytest.raises(UserError, match="is no report of ours"):
            launched(f"work_dir={run}", f"html={other}")
    assert (run / "mine.html").read_text() == "<p>My page</p>"


def test_ranks_are_of_what_was_measured():
    assert sections._ranks([5.5, None, 5.25, 7.0]) == [2, None, 1, 3]
