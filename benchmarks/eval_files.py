"""Lays out ../shared/data/eval as the folder that `minitron benchmark` reads (docs/stages/benchmark.md).

    python benchmarks/eval_files.py [folder]    # default runs/cache/eval

XLSum is not there, and no training questions of WinoGrande, HellaSwag and ARC. In XLSum's place stand pages of WikiText-2's test
set: the first sentence is the summary of the 120 words after it.
"""

import csv
import json
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "shared/data/eval"
LINKS = {
    "winogrande.validation.jsonl": "winogrande_winogrande_xl.validation.jsonl",
    "hellaswag.validation.jsonl.gz": "hellaswag.validation.jsonl.gz",
    "gsm8k.train.jsonl.gz": "gsm8k.train.jsonl.gz",
    "gsm8k.test.jsonl": "gsm8k.test.jsonl",
    "arc_challenge.validation.jsonl": "ai2_arc_ARC-Challenge.validation.jsonl",
    "humaneval.test.jsonl.gz": "HumanEval.jsonl.gz",
}


def main(folder: Path, source: Path = SOURCE) -> Path:
    """Write the folder; returns it."""
    (folder / "mmlu").mkdir(parents=True, exist_ok=True)
    for name, file in LINKS.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to((source / file).resolve())
    with tarfile.open(source / "mmlu.tar.gz") as archive:
        for member in archive:
            if member.name.endswith((".test.jsonl", ".dev.jsonl")):
                (folder / "mmlu" / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    _write(folder / "arc_challenge.test.jsonl", map(_arc, _rows(source / "arc_challenge.test.jsonl")))
    _write(
        folder / "mbpp.test.jsonl", (row for row in _rows(source / "mbpp.full.jsonl") if 11 <= row["task_id"] <= 510)
    )
    _write(folder / "xlsum.test.jsonl", map(_summary, _rows(source / "wikitext2_pages.test.jsonl")))
    with (source / "TruthfulQA.csv").open(encoding="utf-8", newline="") as file:
        _write(folder / "truthfulqa.validation.jsonl", map(_truthfulqa, csv.DictReader(file)))
    return folder


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _arc(row: dict) -> dict:
    labels = "ABCDE"[: len(row["choices"])]
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": row["choices"], "label": list(labels)}
    return {"id": row["id"], "question": question, "choices": choices, "answerKey": labels[row["label"]]}


def _summary(row: dict) -> dict:
    lead, *text = row["page"].split(" = \n", 1)[1].replace("\n", " ").split(" . ")
    return {"summary": f"{lead.strip()} .", "text": " ".join(" . ".join(text).split()[:120])}


def _truthfulqa(row: dict) -> dict:
    answers = [
        [text.strip() for text in row[key].split(";") if text.strip()]
        for key in ("Correct Answers", "Incorrect Answers")
    ]
    best = row["Best Answer"].strip()
    right = [best, *(text for text in answers[0] if text != best)]
    labels = [1] * len(right) + [0] * len(answers[1])
    multiple = {"choices": right + answers[1], "labels": labels}
    single = {"choices": [best, *answers[1]], "labels": [1] + [0] * len(answers[1])}
    return {"question": row["Question"], "mc1_targets": single, "mc2_targets": multiple}


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/cache/eval")))
