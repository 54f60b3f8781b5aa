"""Roles of models: a failure means that a table, a headline or a card gives a model the numbers of another."""

import json
from pathlib import Path

import pytest

from minitron_mcore.export import model_card
from minitron_mcore.reporting import artefacts, comparison, overview, page
from tests.helpers.work_dir import made

DONE = {"settings": {"peak_lr": 0.1}, "data": {"files": ["chats.jsonl"], "hash": "dada"}}
LOSSES = {"convert": 2.0, "prune": 6.0, "distill": 3.0, "sft": 2.5, "sft_kd": 2.25, "correct": 1.5}


class Run:
    """A work_dir of hand-made checkpoints, whose fingerprints are their folders' names."""

    def __init__(self, root: Path):
        self.root, self.lineages = root, {}
        root.mkdir()
        self.make("convert", {"huggingface": {"path": "/models/Tiny", "sha256": "convert"}})

    def make(self, name: str, parents: dict, **details) -> None:
        self.lineages[name] = made(self.root / name, name, parents, **details)

    def of(self, name: str) -> dict:
        return {"path": str(self.root / name), "fingerprint": name, "step": "step_0000001"}

    def prune(self, name: str, source: str) -> None:
        known = {"plan": "p", "scores": "s", "statistic": {}, "dropped_blocks": [], "ancestry": self.lineages[source]}
        self.make(name, {"source": self.of(source)}, **known)

    def train(self, name: str, student: str, *teachers: str) -> None:
        roles = dict(zip(("teacher", "teacher 2"), teachers, strict=False))
        parents = {"student": self.of(student), "teacher": None} | {role: self.of(of) for role, of in roles.items()}
        lineages = {"ancestry": self.lineages[student]} | {role: self.lineages[of] for role, of in roles.items()}
        self.make(name, parents, **DONE, **lineages)
        line = {"step": 1, "tokens": 8, "kd_loss": None, "lm_loss": 1.0, "teacher_entropy": None, "lr": 0.1}
        (self.root / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    def correct(self, name: str) -> None:
        self.train(name, "convert")
        record = json.loads((self.root / name / "model.json").read_text())
        record["lineage"]["command"] = "/clone/launch/correct.py +model=tiny"
        self.lineages[name] = record["lineage"]
        (self.root / name / "model.json").write_text(json.dumps(record))

    def export(self, name: str) -> Path:
        folder = self.root / f"{name}_hf"
        (folder / "minitron").mkdir(parents=True)
        record = {"format_version": 1, **self.of(name), "lineage": self.lineages[name]}
        (folder / "minitron" / "lineage.json").write_text(json.dumps(record))
        (folder / "README.md").write_text("\n".join(model_card.RESULTS))
        return folder

    def evaluate(self, *names: str) -> None:
        for name in names:
            folder = self.root / f"evaluate_{name}"
            folder.mkdir()
            figures = {"file": "/text/held.jsonl", "loss": LOSSES[name]}
            (folder / "evaluation.json").write_text(json.dumps({"source": str(self.root / name), "files": [figures]}))

    def benchmark(self, **sources: str) -> None:
        """Name -> folder; a model's score is its loss over ten."""
        scores = {name: {"mmlu": {"score": LOSSES[of.removesuffix("_hf")] / 10}} for name, of in sources.items()}
        for name, of in sources.items():
            (self.root / "benchmark" / name).mkdir(parents=True)
            record = {"source": {"path": str(self.root / of)}}
            (self.root / "benchmark" / name / "benchmark.json").write_text(json.dumps(record))
        (self.root / "benchmark" / "benchmark.json").write_text(json.dumps({"models": scores}))

    def models(self) -> list[artefacts.Model]:
        return artefacts.models(artefacts.folders(self.root))

    def roles(self) -> dict[str, str]:
        return {model.role: model.folder.name for model in self.models()}

    def next(self) -> dict[str, str]:
        return {row["next"]: row["command"] for row in overview.commands(self.models(), artefacts.folders(self.root))}


@pytest.fixture
def chat(tmp_path) -> Run:
    """The run of docs/tutorials/chat.md: fine-tuned after a distillation, without and with a teacher."""
    run = Run(tmp_path / "chat")
    run.prune("prune", "convert")
    run.train("distill", "prune", "convert")
    run.train("sft", "distill")
    return run


def test_runs_side_by_side_have_their_own_numbers(chat):
    chat.train("sft_kd", "distill", "convert")
    chat.evaluate("convert", "prune", "distill", "sft", "sft_kd")
    chat.benchmark(teacher="convert", pruned="prune", distilled="distill", sft="sft")
    rows = {row["run"]: row for row in comparison.compare({n: chat.root / n for n in ("distill", "sft", "sft_kd")})}
    assert {name: row["loss on held.jsonl"] for name, row in rows.items()} == {
        name: LOSSES[name] for name in ("distill", "sft", "sft_kd")
    }
    assert [row["recovered"] for row in rows.values()] == [0.75, 0.875, 0.9375]
    kept = {name: row.get("benchmarks kept") for name, row in rows.items()}
    assert kept == {
        "distill": pytest.approx(1.5),
        "sft": 1.25,
        "sft_kd": None,  # not measured, and the results called "distilled" are of the model before
    }
    assert list(chat.roles().values()) == ["convert", "prune", "sft_kd"], "the last made"


def test_a_run_that_was_not_evaluated_has_no_numbers(chat):
    chat.evaluate("convert", "prune", "distill")
    chat.benchmark(teacher="convert", pruned="prune", distilled="distill")
    (row,) = comparison.compare({"sft": chat.root / "sft"})
    assert row["recovered"] is None and not {"loss on held.jsonl", "benchmarks kept"} & row.keys()
    assert "recovered" not in overview.headline(chat.models())


def test_the_report_and_the_card_of_a_fine_tuned_model(chat):
    chat.evaluate("convert", "prune", "distill", "sft")
    found = chat.next()
    assert chat.roles() == {"teacher": "convert", "pruned": "prune", "distilled": "distill", "trained": "sft"}
    assert found["Export to a Hugging Face folder"] == (
        f"python launch/export.py source={chat.root}/sft out_dir={chat.root}/sft_hf"
    )
    assert "Distil the pruned model" not in found and f"source={chat.root}/sft " in found["Continue a prompt"]
    folder = chat.export("sft")
    chat.benchmark(teacher="convert", distilled="distill", sft="sft_hf")
    assert "Export to a Hugging Face folder" not in chat.next()
    assert model_card.update_results(chat.root) == [folder / "README.md"]
    card = (folder / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    assert ["trained", "held.jsonl", "2.500"] in rows and ["distilled", "held.jsonl", "3.000"] in rows
    assert "Training lowered it to 2.500 and recovered 88\N{NO-BREAK SPACE}% of the increase." in card
    assert ["benchmark", "teacher", "distilled", "trained", "kept"] in rows
    assert ["mmlu", "20.0", "30.0", "25.0", "125\N{NO-BREAK SPACE}%"] in rows
    (summary, *_) = page.collect(str(chat.root))
    assert ("training", "8 tokens") in [(tile.label, tile.value) for tile in summary.tiles["Cost"]]
    assert [tile.value for tile in summary.tiles["Kept"] if tile.label == "loss"] == ["2.00 → 2.50"]


def test_a_fine_tuned_model_is_not_its_own_teacher(tmp_path):
    run = Run(tmp_path / "instruct")
    run.train("distill", "convert")
    assert run.roles() == {"teacher": "convert", "trained": "distill"}
    assert run.next()["Export to a Hugging Face folder"] == "python launch/export.py"


def test_chains_corrections_and_several_teachers(tmp_path):
    run = Run(tmp_path / "run")
    assert run.roles() == {"teacher": "convert"}
    run.correct("correct")
    assert run.roles() == {"teacher": "correct"} and "Run the next stage, importance" in run.next()
    run.prune("prune", "convert")
    assert run.roles() == {"teacher": "convert", "pruned": "prune"}
    run.train("distill", "prune", "correct", "convert")
    first = {"teacher": "correct", "source": "convert", "pruned": "prune", "distilled": "distill"}
    assert run.roles() == first
    run.train("other", "prune", "convert")  # a second student
    assert run.roles() == {"teacher": "convert", "pruned": "prune", "distilled": "other"}
    run.prune("prune_2", "distill")  # the second cut, not trained yet
    run.evaluate("distill")
    chain = artefacts.lineage.history(run.lineages["prune_2"], run.of("prune_2"))
    cut = artefacts.models(artefacts.folders(run.root), chain)
    assert {m.role: m.folder.name for m in cut} == {"teacher": "correct", "source": "distill", "pruned": "prune_2"}
    assert not cut[-1].losses, "those of the first student are not its own"
    run.train("sft", "prune_2")
    assert list(run.roles().items())[1:] == [("source", "distill"), ("pruned", "prune_2"), ("trained", "sft")]
