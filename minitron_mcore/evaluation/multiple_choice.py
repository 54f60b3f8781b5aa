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
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

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
_LENGTH_MULTIPLE = 32  # of padded sequences


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
    """Questions as batches for a sharded model.

    Each option is a sequence; sequences are sorted by length. Data-parallel rank r takes every dp-th micro-batch, and all ranks
    make the same number of passes of the same shapes. The ranks of a model replica process the same sequences.
    """

    def __init__(
        self, model: Model, arch: Architecture, questions: Sequence[Question], tokenizer: Tokenizer, micro_batch: int
    ):
        self.model, self.arch, self.questions = model, arch, questions
        options = [option for question in questions for option in question.options]
        rows = []
        for spans, (context, _) in zip(tokenizer.spans([a + b for a, b in options]), options, strict=True):
            ends = zip(spans.ends, spans.special, strict=True)
            scored = [end > len(context) and not special for end, special in ends]
            # Tokens after the last scored one, such as an EOS, do not affect the score.
            length = 1 + max((n for n, is_scored in enumerate(scored) if is_scored), default=0)
            rows.append((spans.ids[:length], scored[:length]))
        self.num_rows = len(rows)
        self.batches = list(self._batches(rows, micro_batch))

    @property
    def chance(self) -> float:
        """Expected accuracy of random answers."""
        return sum(1 / len(question.options) for question in self.questions) / len(self.questions)

    def _batches(self, rows: list[tuple[list[int], list[bool]]], micro_batch: int) -> Iterator[Batch]:
        config, dp = self.model.config, process_groups.dp_group()
        multiple = math.lcm(_LENGTH_MULTIPLE, 2 * config.context_parallel_size * config.tensor_model_parallel_size)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        batch_size = micro_batch * dp.size()
        for start in range(0, len(order), batch_size):
            batch_rows = order[start : start + batch_size]
            length = -(-len(rows[batch_rows[-1]][0]) // multiple) * multiple
            tokens = torch.zeros(batch_size, length, dtype=torch.int64)
            scored = torch.zeros(batch_size, length, dtype=torch.bool)
            for n, row in enumerate(batch_rows):
                ids, flags = (torch.tensor(column) for column in rows[row])
                tokens[n, : len(ids)], scored[n, : len(ids)] = ids, flags
            batch = {
                "tokens": tokens,
                "labels": tokens.roll(-1, 1),
                "predicted": F.pad(scored[:, 1:], (0, 1)),
                "row": F.pad(torch.tensor(batch_rows), (0, batch_size - len(batch_rows))),
            }
            own = slice(dp.rank() * micro_batch, (dp.rank() + 1) * micro_batch)
            yield {key: value[own].to(process_groups.device()) for key, value in batch.items()}

    def scores(self) -> list[Tensor]:
        """log p of the options of each question, in nats, fp64 on the CPU (collective); the same on every rank."""
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
        """log p [T] of `labels` [T] from hidden states [T, H], over the sharded head (collective over tensor-parallel ranks)."""
        head, tp = self.model.head(), process_groups.tp_group()
        first_padding = self.arch.vocab - tp.rank() * len(head)
        padding = torch.arange(len(head), device=head.device) >= first_padding
        rows = max(1, _CHUNK_LOGITS // len(head))
        chunks = []
        for states, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = (states @ head.t()).float().masked_fill_(padding, -torch.inf)
            chunks.append(-vocab_parallel_cross_entropy(logits, targets, tp_group=tp))
        return torch.cat(chunks)

    def accuracy(self) -> float:
        """Fraction of questions whose correct option has the highest score; the first of equal scores wins (collective)."""
        answers = [int(scores.argmax()) for scores in self.scores()]
        return sum(a == q.answer for a, q in zip(answers, self.questions, strict=True)) / len(answers)
