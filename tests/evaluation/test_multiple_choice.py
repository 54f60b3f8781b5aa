"""Multiple-choice questions: a failure means that a line is read as another question, or refused without its number."""

import gzip
import json

import pytest

from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import multiple_choice


def test_questions_of_every_form(tmp_path):
    rows = [
        {"sentence": "The _ 's lid. ", "option1": "cup", "option2": "pot", "answer": "2"},
        {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        {"query": "Q?", "choices": ["a", "b"], "label": 1, "gold": 0},
        {"question": "Q?", "choices": ["a", "b"], "answer": "B"},
        {"question": "Q?", "choices": ["a", "b"], "answer": "b"},
        {"question": "Q?", "choices": ["a", "b"], "answer": "1"},
    ]
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write("\n\n".join(map(json.dumps, rows)))
    first, *others = multiple_choice.read(str(tmp_path / "q.jsonl.gz"))
    assert first == multiple_choice.Question([("The cup", " 's lid."), ("The pot", " 's lid.")], 1)
    assert others == [multiple_choice.Question([("Q?", " a"), ("Q?", " b")], 1)] * 5
    assert len(multiple_choice.read(str(tmp_path / "q.jsonl.gz"), 2)) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
        {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"},
        {"sentence": "ends in _", "option1": "a", "option2": "b", "answer": "1"},
        {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "3"},
        {"query": "q", "choices": ["a", "b"], "label": 2},
        {"query": "q", "choices": ["a", "b"], "label": "C"},
        {"query": "q", "choices": "ab", "label": 0},
        {"query": "q", "choices": ["a", "b"]},
        "a string",
    ],
)
def test_lines_of_no_known_form_are_refused_by_number(tmp_path, row):
    good = json.dumps({"query": "q", "choices": ["a", "b"], "label": 1})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{good}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match="q.jsonl, line 3 is not a question .*option1"):
        multiple_choice.read(str(tmp_path / "q.jsonl"))
