"""Held-out text from token files: a failure means that another text is measured than the one that was named."""

import json

import pytest
import torch

from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data import token_cache
from minitron_mcore.data.tokenizer import load, open_tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import perplexity
from minitron_mcore.evaluation.windows import file_windows, heldout_windows, spread
from tests.helpers.text_files import VOCAB, texts, write_jsonl, write_tokenizer

S = 16


def same(found, expected, document_starts=True) -> None:
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)
    assert found.num_bytes is None
    assert not document_starts or torch.equal(found.document_starts, expected.document_starts)


@pytest.mark.parametrize("bos", [False, True])
def test_a_pair_and_the_valid_part_are_the_text_they_were_made_of(tmp_path, bos):
    """By name, as a split of text and of pairs, with weights and without, in windows that are read alone, with masked spans."""
    folder = write_tokenizer(tmp_path / "tokenizer", bos)
    tokenizer = load(folder)
    rows = [{"text": text, "loss_spans": [[0, 2], [len(text) // 2, len(text)]]} for text in texts(20, 5)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [prefix] = token_cache.tokenize([str(path)], tokenizer, str(tmp_path / "cache"))
    text = file_windows(str(path), tokenizer, S, document_mask=True)
    assert text.mask.any(dim=1).all() and not text.mask.all() and (text.document_starts[:, -1] > 0).any()
    same(file_windows(prefix, tokenizer, S, document_mask=True), text)
    few = file_windows(prefix, tokenizer, S, max_windows=3, document_mask=True)
    same(few, spread(text, 3))

    last = tmp_path / "last.jsonl"
    last.write_text("".join(json.dumps(row) + "\n" for row in rows[15:]))
    expected = file_windows(str(last), tokenizer, S)
    other = write_jsonl(tmp_path / "b.jsonl", texts(8, 6))
    (tmp_path / "splits.json").write_text(json.dumps({"train": [other], "valid": ["3", str(last), "1", prefix]}))
    common = {"tokenizer": folder, "cache": str(tmp_path / "cache")}
    for train in (str(path), prefix):
        data = DataConfig(train=[train], split="75,25", **common)
        windows, weights = heldout_windows(data, open_tokenizer(data, folder, VOCAB + 7), S, None)
        (found,) = windows.values()
        same(found, expected, False)
        assert weights is None and found.document_starts is None
    data = DataConfig(splits_file=str(tmp_path / "splits.json"), document_mask=True, **common)
    windows, weights = heldout_windows(data, open_tokenizer(data, folder, VOCAB + 7), S, None)
    assert list(weights.values()) == [3.0, 1.0] and weights.keys() == windows.keys()
    same(list(windows.values())[1], text)
    pool = DataConfig(train=[prefix, other], split="75,25", **common)
    (found,), _ = (x and x.values() for x in heldout_windows(pool, tokenizer, S, None))
    assert len(found.tokens) > len(expected.tokens)  # of the valid parts of both


def test_no_held_out_text_is_one_sentence():
    for settings, sentence in (
        ({}, "data.heldout is empty: give text files, .* or a valid part, data.split='98,2,0'"),
        ({"split": "98"}, 'data.split is "98", which leaves no documents to valid, and data.heldout is empty'),
        ({"split": "98,0,2"}, "which leaves no documents to valid"),
    ):
        with pytest.raises(UserError, match=sentence):
            heldout_windows(DataConfig(train=["a"], **settings), None, S, None)


def test_documents_are_measured_as_if_alone(tmp_path):
    """transformers' model with the windows' documents, beside each document's part of a window by itself in fp64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load(write_tokenizer(tmp_path))
    sizes = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=307, initializer_range=0.3, **sizes))
    model.save_pretrained(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [text[:20] for text in texts(12, 2)])
    windows, total, dense = file_windows(path, tokenizer, S, document_mask=True), 0.0, model.double()
    for tokens, mask, starts in zip(windows.tokens, windows.mask, windows.document_starts, strict=True):
        for start in starts.unique().tolist():
            at = (starts == start).nonzero().flatten()
            log_p = dense(tokens[at][None]).logits[0].log_softmax(-1)
            after = [int(n) for n in at if n + 1 < S and mask[n + 1]]
            total -= sum(log_p[n - start, tokens[n + 1]].item() for n in after)
    hf = perplexity.HFModel(str(tmp_path))
    (row,) = perplexity.evaluate_windows({path: windows}, hf.nll, micro_batch=2)
    assert row["loss"] * row["tokens"] == pytest.approx(total, rel=1e-6)
    (plain,) = perplexity.evaluate_windows({path: windows._replace(document_starts=None)}, hf.nll, micro_batch=2)
    assert abs(plain["loss"] - row["loss"]) > 0.01
    (row,) = perplexity.evaluate_windows({path: windows._replace(num_bytes=None)}, hf.nll, micro_batch=2)
    assert row["bytes"] is None and row["bits_per_byte"] is None
