"""Conversations, [{"role", "content"}, ...], rendered by a tokenizer's own chat template in transformers' sandbox.

The turns of the assistant count in the loss: what the template has between {% generation %} and {% endgeneration %}. Without these
tags a turn is what its message adds to the rendering of the messages before it with the generation prompt, up to and including the
token that ends the turn.
"""

import datetime
import re
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minitron_mcore.data.messages import ASSISTANT, Message, check_messages
from minitron_mcore.data.text_reader import Text
from minitron_mcore.errors import UserError
from minitron_mcore.reading import first_line

DATE = datetime.date(2024, 7, 26)
"""What templates print that ask for today's date, on any day, so that a text has the same tokens tomorrow. It is the date that
Llama 3's template prints where it cannot ask."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The chat template of the tokenizer in a folder; None of a sentencepiece model, which has no template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None, folder: Path):
        self._tokenizer, self._folder = tokenizer, folder

    @property
    def identity(self) -> str:
        """Tokenizers with equal identities render equally; "" without a template."""
        if self._tokenizer is None or self._tokenizer.chat_template is None:
            return ""
        date = DATE if "strftime_now" in str(self._tokenizer.chat_template) else ""
        return f"{date}{self._tokenizer.chat_template}{sorted(self._tokenizer.special_tokens_map.items())}"

    def conversation(self, messages: object) -> Text:
        """A conversation with an answer as a document, whose `loss_spans` are the turns of the assistant.

        Raises:
            UserError: see `check_messages`; no assistant's message; no template, or one that fails; one without generation tags
                that renders a turn differently with other messages after it.
        """
        checked = check_messages(messages)
        if all(message["role"] != ASSISTANT for message in checked):
            raise UserError(f"the conversation has no answer: write one message or more with the role {ASSISTANT!r}.")
        if _GENERATION.search(self._template()):
            rendered, spans = self._render(checked, return_assistant_tokens_mask=True)
        else:
            rendered, _ = self._render(checked)
            spans = self._turns(checked, rendered)
        spans = [(first, end) for first, end in spans if first < end]
        if not spans:
            raise UserError(f"the chat template in {self._folder} has no text for the assistant's turns: use another.")
        return _text(rendered, spans)

    def prompt(self, messages: object) -> Text:
        """A conversation up to the place where the assistant's next turn begins.

        Raises:
            UserError: see `check_messages`; no template, or one that fails.
        """
        return _text(self._render(check_messages(messages), add_generation_prompt=True)[0], [])

    def _template(self) -> str:
        try:
            if self._tokenizer and isinstance(template := self._tokenizer.get_chat_template(), str):
                return template
        except ValueError:  # there is none, or none of several is the default
            pass
        raise UserError(
            f"the tokenizer in {self._folder} has no chat template, which messages need: put chat_template.jinja there, or give "
            "another folder with data.tokenizer=/path."
        )

    def _render(self, messages: list[Message], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        template = self._template()
        try:
            names = {"strftime_now": DATE.strftime, **self._tokenizer.special_tokens_map}
            rendered, spans = render_jinja_template([messages], chat_template=template, **options, **names)
        except MemoryError:
            raise
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"the chat template in {self._folder} fails ({type(error).__name__}: {first_line(error)[:200]}): change the "
                "messages, or give another tokenizer with data.tokenizer=/path."
            ) from error
        return rendered[0], spans[0] if spans else []

    def _turns(self, messages: list[Message], rendered: str) -> list[tuple[int, int]]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:number], add_generation_prompt=True)[0] if number else ""
            turn = self._render(messages[: number + 1])[0]
            if not (rendered.startswith(turn) and turn.startswith(before)):
                raise UserError(
                    f"the chat template in {self._folder} renders message {number + 1} differently where others follow, and does "
                    "not mark the assistant's turns: give one with {% generation %} tags (data.tokenizer=/path)."
                )
            spans.append((len(before), self._end(turn)))
        return spans

    def _end(self, turn: str) -> int:
        """Where a rendering ends without white space behind a special token, which no model has to generate."""
        stripped = turn.rstrip()
        return len(stripped if stripped.endswith(tuple(self._tokenizer.get_added_vocab())) else turn)


def _text(rendered: str, spans: list[tuple[int, int]]) -> Text:
    text = Text(rendered)
    text.is_chat, text.loss_spans = True, tuple(spans)
    return text
