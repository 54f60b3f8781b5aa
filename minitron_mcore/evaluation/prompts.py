"""Prompts to answer, from .jsonl files: {"prompt": text} or {"messages": [{"role", "content"}, ...]} on each line.
No torch import."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minitron_mcore.config import ranges
from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data.blend import expand
from minitron_mcore.data.messages import ASSISTANT, Message, check_messages
from minitron_mcore.data.text_reader import check_readable, lines
from minitron_mcore.errors import UserError, refuse


class Prompt(NamedTuple):
    """A text, or a conversation up to the answer."""

    content: str | list[Message]
    where: str
    """File and line."""
    id: str
    """16 hex digits of a hash of the content."""

    def answered(self, completion: str) -> dict[str, object]:
        """A line of training text."""
        if isinstance(self.content, str):
            return {"prompt": self.content, "completion": completion}
        return {"messages": [*self.content, {"role": ASSISTANT, "content": completion}]}


def read(entries: Sequence[str], data: DataConfig) -> list[Prompt]:
    """The prompts of files, folders and patterns, in order; equal ones once. Answers in the lines are ignored.

    Raises:
        UserError: see `blend.expand` and `text_reader.lines`; a file of another kind, a line without a prompt, no prompts.
    """
    refuse(ranges.text_files("prompts", entries))
    prompts: dict[str, Prompt] = {}
    for path in (path for entry in entries for path in expand(entry)):
        check_readable(path)
        if not path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            raise UserError(f"{path} is no file of prompts: write them as .jsonl, .jsonl.gz or .jsonl.zst.")
        for number, line, _ in lines(path, data.line_mb):
            prompt = _prompt(line, f"{path}, line {number}")
            prompts.setdefault(prompt.id, prompt)
    if not prompts:
        raise UserError(f'{", ".join(entries)}: no prompts: write one {{"prompt": ...}} a line.')
    return list(prompts.values())


def problems(entries: Sequence[str], data: DataConfig) -> Iterator[str]:
    """Why prompts cannot be read."""
    try:
        read(entries, data)
    except UserError as error:
        yield str(error)


def _prompt(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
        content = _messages(fields["messages"]) if "messages" in fields else _text(fields["prompt"])
        plain = json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8")
        return Prompt(content, where, hashlib.sha256(plain).hexdigest()[:16])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{where} has no prompt ({type(error).__name__}: {error}): write {{"prompt": ...}} or {{"messages": [...]}}.'
        ) from error


def _text(prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{str(prompt)[:40]!r} is no text")
    return prompt


def _messages(messages: object) -> list[Message]:
    """A conversation without the answers at its end."""
    kept = list(check_messages(messages))
    while kept and kept[-1]["role"] == ASSISTANT:
        kept.pop()
    if not kept:
        raise UserError("the conversation has answers only: write the message to answer.")
    return kept
