"""Conversations: a failure means tokens that the chat template does not give, or a loss on other turns than the assistant's."""

import re

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from minitron_mcore.data import token_cache
from minitron_mcore.data.loss_mask import loss_mask
from minitron_mcore.data.text_reader import Text, documents
from minitron_mcore.data.tokenizer import Spans, load
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation.windows import file_windows
from tests.data.test_loss_mask import write_lines
from tests.helpers import hostile
from tests.helpers.sentencepieces import train
from tests.helpers.text_files import texts, write_tokenizer

MARKED = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PLAIN = re.sub("{% (end)?generation %}", "", MARKED)
USER, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}


def write_chat_tokenizer(folder, template: str | None) -> str:
    """One that puts BOS before a text, as the templates do themselves."""
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder, bos=True))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def conversations(count: int) -> list[dict]:
    """Of one or more answers, in one of four with two in a row, some after a system message."""
    rows = []
    for number in range(count):
        contents = texts(8, number)
        turns = [USER | {"content": contents[0]}, ANSWER | {"content": contents[1]}] * (1 + number % 3)
        turns += [ANSWER | {"content": f" {contents[2]}😀\n"}] * (number % 4 == 0)
        rows.append({"messages": [{"role": "system", "content": contents[3]}] * (number % 2) + turns})
    return rows


def test_ids_and_masks_are_those_of_transformers(tmp_path):
    """With generation tags in the template and without, between lines of other kinds."""
    rows, others = conversations(24), [{"text": "the dogs"}, {"prompt": "a cat", "completion": " ran"}]
    path = write_lines(tmp_path / "a.jsonl", [*others, *rows[:10], *others, *rows[10:]])
    marked, plain = (write_chat_tokenizer(tmp_path / name, t) for name, t in (("marked", MARKED), ("plain", PLAIN)))
    oracle, made = AutoTokenizer.from_pretrained(marked), []
    for folder in (marked, plain):
        [prefix] = token_cache.tokenize([path], load(folder), str(tmp_path / "cache"))
        made.append([[row.copy() for row in IndexedDataset(f"{prefix}{suffix}")] for suffix in ("", ".mask")])
    for tokens, masks in made:
        for n, row in zip([*range(2, 12), *range(14, 28)], rows, strict=True):
            wanted = oracle.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
            assert tokens[n].tolist() == wanted["input_ids"] and masks[n].tolist() == wanted["assistant_masks"]
            answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
            assert oracle.decode(tokens[n][masks[n] == 1]) == "".join(f"{answer}<|im_end|>" for answer in answers)
        assert tokens[0][0] == oracle.bos_token_id and tokens[0][-1] == oracle.eos_token_id and masks[0].all()
    # Held-out conversations are measured on the same tokens.
    windows = file_windows(write_lines(tmp_path / "b.jsonl", rows), load(plain), 32)
    whole = np.concatenate([made[0][1][n] for n in [*range(2, 12), *range(14, 28)]])
    whole[::32] = 0
    assert windows.mask.sum() == whole.sum()


def test_a_token_that_is_longer_than_an_answer_counts():
    text = Text("a bc,,")
    text.is_chat, text.loss_spans = True, ((2, 5),)
    assert loss_mask(text, Spans([1, 2, 3], [1, 4, 6], [False] * 3)).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        (None, [USER, ANSWER], "has no chat template, which messages need"),
        (MARKED, 3, '"messages" is 3: write a list'),
        (MARKED, [], r'"messages" is \[\]: write a list'),
        (MARKED, ["hello"], "message 1 has the role 'None': write one of system"),
        (MARKED, [USER, ANSWER | {"role": "robot"}], "message 2 has the role 'robot': write one of system"),
        (MARKED, [USER, ANSWER | {"content": " \n"}], "message 2 .assistant. has the content .*: write a text"),
        (MARKED, [USER | {"content": ["a"]}, ANSWER], r"message 1 .user. has the content .\['a'\].: write a text"),
        (MARKED, [USER], "has no answer: write one message or more with the role 'assistant'"),
        ("{{ raise_exception('no system') }}", [USER, ANSWER], r"fails \(TemplateError: no system\)"),
        (hostile.TEMPLATE, [USER, ANSWER], "fails .SecurityError"),
        ("{% for m in messages %}", [USER, ANSWER], "fails .TemplateSyntaxError"),
        ("{{ messages | length }}", [USER, ANSWER, USER, ANSWER], "message 2 differently where others follow"),
        ("{% generation %}{% endgeneration %}", [USER, ANSWER], "has no text for the assistant's turns"),
    ],
)
def test_other_conversations_are_refused(tmp_path, template, messages, sentence):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "the cat"}, {"messages": messages}])
    chat = load(
        write_chat_tokenizer(tmp_path / "t", template and template.replace("FLAG", str(tmp_path / "flag")))
    ).chat
    with pytest.raises(UserError, match=f"a.jsonl, line 2: .*{sentence}") as refusal:
        list(documents(path, conversation=chat.conversation))
    assert len(str(refusal.value).splitlines()) == 1 and not (tmp_path / "flag").exists()


def test_the_date_of_a_template_is_the_same_every_day(tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}" + MARKED
    rendered = [
        load(write_chat_tokenizer(tmp_path / name, template)).chat.conversation([USER, ANSWER])
        for name, template in (("dated", dated), ("undated", MARKED))
    ]
    assert rendered[0] == f"26 Jul 2024{rendered[1]}"
    assert rendered[0].loss_spans == tuple((first + 11, end + 11) for first, end in rendered[1].loss_spans)


def test_sentencepiece_models_have_no_template(tmp_path):
    folder = train(tmp_path, model_type="bpe")
    with pytest.raises(UserError, match="has no chat template"):
        load(folder).chat.conversation([USER, ANSWER])
