"""Multiple-choice questions from JSONL, scored by the likelihood of each option under a sharded model.

Two forms, one question per line:

    {"sentence": "... _ ...", "option1", "option2", "answer": "1" or "2"}
        WinoGrande. An option replaces the blank; the text after it, the same for all options, is scored (partial scoring,
        arXiv 1806.02847, as in lm-evaluation-harness).
    {"query" or "question", "choices", "label", "gold", "answer" or "answerKey"}
        A choice follows the text after a space and is scored. The answer is a choice's index from 0, its letter, its text or, if
        `choices` has {"text", "label"} (ARC), its label.

The score of an option is the sum of log p over the tokens that end after the context. The model's answer is the highest score.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minitron_mcore.data.text_reader import Limits, lines
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation.likelihood import Likelihoods, Request
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model

_ANSWERS = ("label", "gold", "answer", "answerKey")


class Question(NamedTuple):
    options: list[tuple[str, str]]
    """(context, scored continuation) of each option"""
    answer: int
    """Index of the correct option."""


def read(path: str, limit: int | None = None, limits: Limits | None = None) -> list[Question]:
    """The first `limit` questions of a .jsonl or .jsonl.gz file; None for all.

    Args:
        limits: on lines; None for the default.

    Raises:
        UserError: the file is missing, truncated or empty, or a line is above the limits or not a question.
    """
    if not Path(path).is_file():
        raise UserError(f"no questions at {path}: check depth.choices.")
    questions: list[Question] = []
    for number, line, _ in lines(path, (limits or Limits()).line_mb):
        if limit is not None and len(questions) == limit:
            break
        try:
            questions.append(_question(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(
                f'{path}, line {number} is not a question ({type(error).__name__}: {error}): write {{"sentence", "option1", '
                '"option2", "answer"} with a _ in the sentence and text after it, or {"query", "choices", "label"}.'
            ) from error
    if not questions:
        raise UserError(f"{path} holds no questions: write one a line.")
    return questions


def _question(record: dict[str, Any]) -> Question:
    if "sentence" in record:
        before, _, after = record["sentence"].partition("_")
        if not after.strip():
            raise ValueError("no text after a _")
        options = [(before + record[option], f" {after.strip()}") for option in ("option1", "option2")]
        return Question(options, ("1", "2").index(str(record["answer"])))
    text = record["query"] if "query" in record else record["question"]
    choices, labels = record["choices"], []
    if isinstance(choices, dict):
        choices, labels = choices["text"], choices["label"]
    if not all(isinstance(choice, str) and choice for choice in choices) or not isinstance(choices, list):
        raise TypeError("choices must be texts")
    answer = next((record[key] for key in _ANSWERS if key in record), None)
    if answer is None:
        raise KeyError("label")
    return Question([(text, f" {choice}") for choice in choices], _index(answer, choices, labels))


def _index(answer: int | str, choices: list[str], labels: list[str]) -> int:
    if isinstance(answer, str):
        letters = [chr(ord("A") + n) for n in range(len(choices))]
        digits = [str(n) for n in range(len(choices))]
        known = next((names for names in (labels, choices, letters, digits) if answer in names), [])
        return known.index(answer)
    if not 0 <= answer < len(choices):
        raise IndexError(f"answer {answer} of {len(choices)} choices")
    return answer


class MultipleChoice:
    """Questions for a sharded model; each option is a `likelihood.Request`."""

    def __init__(
        self, model: Model, arch: Architecture, questions: Sequence[Question], tokenizer: Tokenizer, micro_batch: int
    ):
        self.questions = questions
        options = [option for question in questions for option in question.options]
        requests = []
        for spans, (context, _) in zip(tokenizer.spans([a + b for a, b in options]), options, strict=True):
            ends = zip(spans.ends, spans.special, strict=True)
            scored = [n for n, (end, special) in enumerate(ends) if n and end > len(context) and not special]
            # Tokens after the last scored one, such as an EOS, do not affect the score.
            tokens = spans.ids[: scored[-1] + 1 if scored else 1]
            requests.append(Request(tokens, [n - 1 for n in scored], [tokens[n] for n in scored]))
        self.likelihoods = Likelihoods(model, arch, requests, micro_batch)

    @property
    def chance(self) -> float:
        """Expected accuracy of random answers."""
        return sum(1 / len(question.options) for question in self.questions) / len(self.questions)

    def scores(self) -> list[Tensor]:
        """log p of the options of each question, in nats, fp64 on the CPU (collective); the same on every rank."""
        log_p, _ = self.likelihoods.compute()
        return list(log_p.split([len(question.options) for question in self.questions]))

    def accuracy(self) -> float:
        """Fraction of questions whose correct option has the highest score; the first of equal scores wins (collective)."""
        answers = [int(scores.argmax()) for scores in self.scores()]
        return sum(a == q.answer for a, q in zip(answers, self.questions, strict=True)) / len(answers)
