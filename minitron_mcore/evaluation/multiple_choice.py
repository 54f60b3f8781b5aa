"""Multiple-choice questions: read from JSONL, scored by the likelihood that a sharded model gives each option.

Two forms, a question a line:

    {"sentence": "... _ ...", "option1", "option2", "answer": "1" or "2"}
        WinoGrande's. An option stands in the blank, and what is scored is the text after it, which all options share (partial
        scoring, arXiv 1806.02847; so does lm-evaluation-harness).
    {"query" or "question", "choices", "label", "gold", "answer" or "answerKey"}
        A choice follows the text after a space, and is what is scored. The answer is a choice's index from 0, its letter, its
        label where `choices` has {"text", "label"} (ARC's form), or its text.

An option's score is the sum of log p over the tokens that end after the context; the highest is the model's answer.
"""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_mcore.data.text_reader import Limits, lines
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch, forward

from megatron.core.tensor_parallel import (  # isort: skip
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

_CHUNK_LOGITS = 2**25  # fp32 logits held at once: 128 MB
_ANSWERS = ("label", "gold", "answer", "answerKey")
_LENGTHS = 32  # sequences are padded to a multiple


class Question(NamedTuple):
    options: list[tuple[str, str]]
    """(context, what follows it and is scored) of each option"""
    answer: int
    """The right option, from 0."""


def read(path: str, limit: int | None = None, limits: Limits | None = None) -> list[Question]:
    """The first `limit` questions of a .jsonl or .jsonl.gz file; None takes all.

    Args:
        limits: of a line; None is the default ones.

    Raises:
        UserError: a file that is missing or cut short, a line above the limits, without questions, or a line of no known form.
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
                f'{path}, line {number} is no question ({type(error).__name__}: {error}): write {{"sentence", "option1", '
                '"option2", "answer"} with a _ in the sentence and text after it, or {"query", "choices", "label"}.'
            ) from error
    if not questions:
        raise UserError(f"{path} holds no questions: write one a line.")
    return questions


def _question(record: dict) -> Question:
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
    """Questions as batches for a sharded model.

    Options are sequences of their own, sorted by length. Ranks of a model replica hold the same ones; data-parallel rank r takes
    every dp-th micro-batch, and all ranks make equally many passes of the same shapes.
    """

    def __init__(
        self,
        model: Model,
        arch: Architecture,
        questions: Sequence[Question],
        tokenizer: Tokenizer,
        micro_batch: int,
    ):
        self.model, self.arch, self.questions = model, arch, questions
        options = [option for question in questions for option in question.options]
        rows = []
        for found, (context, _) in zip(tokenizer.spans([a + b for a, b in options]), options, strict=True):
            scored = [
                end > len(context) and not special for end, special in zip(found.ends, found.special, strict=True)
            ]
            # Nothing after the last scored token, such as an EOS, has a say.
            length = 1 + max((n for n, it in enumerate(scored) if it), default=0)
            rows.append((found.ids[:length], scored[:length]))
        self.num_rows = len(rows)
        self.batches = list(self._batches(rows, micro_batch))

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return sum(1 / len(question.options) for question in self.questions) / len(self.questions)

    def _batches(self, rows: list[tuple[list[int], list[bool]]], micro_batch: int) -> Iterator[Batch]:
        config, dp = self.model.config, process_groups.dp_group()
        multiple = math.lcm(_LENGTHS, 2 * config.context_parallel_size * config.tensor_model_parallel_size)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        together = micro_batch * dp.size()
        for start in range(0, len(order), together):
            taken = order[start : start + together]
            length = -(-len(rows[taken[-1]][0]) // multiple) * multiple
            tokens = torch.zeros(together, length, dtype=torch.int64)
            scored = torch.zeros(together, length, dtype=torch.bool)
            for n, row in enumerate(taken):
                ids, flags = (torch.tensor(column) for column in rows[row])
                tokens[n, : len(ids)], scored[n, : len(ids)] = ids, flags
            batch = {
                "tokens": tokens,
                "labels": tokens.roll(-1, 1),
                "predicted": F.pad(scored[:, 1:], (0, 1)),
                "row": F.pad(torch.tensor(taken), (0, together - len(taken))),
            }
            mine = slice(dp.rank() * micro_batch, (dp.rank() + 1) * micro_batch)
            yield {key: value[mine].to(process_groups.device()) for key, value in batch.items()}

    def scores(self) -> list[Tensor]:
        """log p of each option of each question, nats, fp64 on the CPU (collective); the same on every rank."""
        total = torch.zeros(self.num_rows, dtype=torch.float64, device=process_groups.device())

        def on_output(hidden: Tensor, batch: Batch) -> None:
            if self.model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=process_groups.tp_group())
            at = batch["predicted"]
            rows = batch["row"][:, None].expand_as(at)[at]
            total.index_add_(0, rows, self._log_p(hidden.transpose(0, 1)[at], batch["labels"][at]).double())

        for _, same in groupby(self.batches, key=lambda batch: batch["tokens"].shape):
            forward(self.model, list(same), on_output)
        process_groups.from_last_stage(total)
        dist.all_reduce(total, group=process_groups.dp_cp_group())
        return list(total.cpu().split([len(question.options) for question in self.questions]))

    def _log_p(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p [T] of `labels` [T] from hidden states [T, H], over this rank's rows of the head and the others'."""
        head, tp = self.model.head(), process_groups.tp_group()
        first_padding = self.arch.vocab - tp.rank() * len(head)
        padding = torch.arange(len(head), device=head.device) >= first_padding
        found = [
            -vocab_parallel_cross_entropy(
                (states @ head.t()).float().masked_fill_(padding, -torch.inf), wanted, tp_group=tp
            )
            for states, wanted in zip(
                *(x.split(max(1, _CHUNK_LOGITS // len(head))) for x in (hidden, labels)), strict=True
            )
        ]
        return torch.cat(found)

    def accuracy(self) -> float:
        """Share of the questions whose right option has the highest score, of equals the first (collective)."""
        answers = [int(scores.argmax()) for scores in self.scores()]
        return sum(a == q.answer for a, q in zip(answers, self.questions, strict=True)) / len(answers)
