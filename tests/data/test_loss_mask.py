"""Masked spans: a failure means a loss on tokens that do not count, or none on some that do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from minitron_mcore.config.model import ModelConfig
from minitron_mcore.config.stages import TokenizeTextRun
from minitron_mcore.data import blend, token_cache
from minitron_mcore.data.corpus import Corpus
from minitron_mcore.data.datasets import SampleOrder, Samples, data_hash
from minitron_mcore.data.text_reader import documents
from minitron_mcore.data.tokenizer import load
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import perplexity
from tests.data.test_documents import write_documents
from tests.helpers.text_files import texts, write_tokenizer

LENGTH = 16


def rows(count: int) -> list[dict]:
    """Lines of all kinds, with an empty completion, and characters of several tokens."""
    kinds = []
    for number, text in enumerate(texts(count, 3)):
        half = len(text) // 2
        kinds += [
            {"prompt": f"naïve {text[:half]}", "completion": text[half:]},
            {"text": text},
            {"text": text + "日本", "loss_spans": [[0, 3], [half, half], [half, len(text) + 2]]},
            {"text": text, "loss_spans": [[1, 2]], "number": number},
            {"prompt": text, "completion": ""},
        ]
    return kinds


def expected_mask(row: dict, tokenizer) -> list[int]:
    """From transformers' own offsets."""
    text = row.get("text") or row["prompt"] + row["completion"]
    spans = row.get("loss_spans", [[0, len(text)]]) if "text" in row else [[len(row["prompt"]), len(text)]]
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True).offset_mapping]
    return [int(any(a < end <= b for a, b in spans)) for end in ends] + [int(any(b == len(text) for _, b in spans))]


def write_lines(path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return str(path)


def test_masks_are_those_of_the_spans_and_do_not_depend_on_processes(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    lines = [{"text": text} for text in texts(30, 1)] + rows(12) + [{"text": "the cat"}] * 30
    path, plain = write_lines(tmp_path / "a.jsonl", lines), write_lines(tmp_path / "plain.jsonl", lines[:30])
    prefix, unmasked = token_cache.tokenize([path, plain], load(folder), str(tmp_path / "cache"))
    masks, tokens, tokenizer = (
        IndexedDataset(f"{prefix}.mask"),
        IndexedDataset(prefix),
        AutoTokenizer.from_pretrained(folder),
    )
    assert len(masks) == len(tokens) == len(lines)
    for row, mask, ids in zip(lines, masks, tokens, strict=True):
        assert mask.tolist() == expected_mask(row, tokenizer) and len(mask) == len(ids), row
    for n in range(30, 90, 5):
        assert tokenizer.decode(tokens[n][masks[n] == 1][:-1]).endswith(lines[n]["completion"])
    # In parts, of which the first and the last have no mask.
    run = TokenizeTextRun(
        model=ModelConfig(name="x", hf=folder), files=[path, plain], out_dir=str(tmp_path / "out"), processes=2
    )
    Corpus(run, part_bytes=700).tokenize()
    for suffix in (".bin", ".idx"):
        for name in ("", ".mask"):
            made = (tmp_path / f"out/a_text_document{name}{suffix}").read_bytes()
            assert made == Path(f"{prefix}{name}{suffix}").read_bytes()
    assert blend.expand(str(tmp_path / "out")) == [
        str(tmp_path / f"out/{name}_text_document") for name in ("a", "plain")
    ]
    assert data_hash([unmasked]) == data_hash([str(tmp_path / "out/plain_text_document")])
    assert not list((tmp_path / "out").glob("plain*.mask*"))


def write_mask(prefix, lengths: list[int], first: int = 0) -> None:
    """Token t of `write_documents` counts if t is a multiple of 3."""
    builder = IndexedDatasetBuilder(f"{prefix}.mask.bin", dtype=np.uint8)
    for number, length in enumerate(lengths, first):
        builder.add_document((torch.arange(length) + 100 * number) % 3 == 0, [length])
    builder.finalize(f"{prefix}.mask.idx")


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]], ids=["pool", "blend"])
def test_samples_count_the_labels_of_the_masks(tmp_path, weights):
    """Where one of two pairs has a mask, over several epochs."""
    lengths = [1, 5, 1, 40, 3, 16, 17, 90]
    prefixes = [write_documents(tmp_path / "a", lengths), write_documents(tmp_path / "b", lengths, 50)]
    order, hashes = SampleOrder(prefixes, weights, 5, LENGTH, 60, True), [data_hash(prefixes)]
    plain = Samples(order, str(tmp_path / "cache"), 1 << 20).batch(range(60))
    assert (plain["loss_mask"] == 1).all()
    write_mask(tmp_path / "b", lengths, 50)
    hashes.append(data_hash(prefixes))
    batch = Samples(order, str(tmp_path / "cache"), 1 << 20).batch(range(60))
    assert torch.equal(batch["loss_mask"], ((batch["labels"] < 5000) | (batch["labels"] % 3 == 0)).float())
    assert all(torch.equal(batch[key], plain[key]) for key in plain if key != "loss_mask")
    write_mask(tmp_path / "b", [*lengths[:-1], 91], 50)
    with pytest.raises(UserError, match="b.mask.idx has other documents than the pair beside it"):
        Samples(order, str(tmp_path / "cache"), 1 << 20)
    assert len({*hashes, data_hash(prefixes)}) == 3


def test_held_out_completions_alone_are_predicted(tmp_path):
    tokenizer = load(write_tokenizer(tmp_path / "tokenizer"))
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "the cat ", "completion": "sat on the mat"}] * 3)
    cut = perplexity.windows(path, tokenizer, 64)
    found = tokenizer.decode(cut.tokens[cut.mask].tolist())
    assert found.replace(" ", "") == "satonthemat" * 3 and int(cut.num_bytes.sum()) == len(found)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"prompt": "a"}, 'line 1: no string under "text": write one'),
        ({"prompt": "a", "completion": 3}, 'line 1: no string under "text": write one'),
        ({"text": "abc", "loss_spans": [[1, 4]]}, r"loss_spans has \[1, 4\], which is no \[first, end\] within the 3"),
        ({"text": "abc", "loss_spans": [3]}, r"loss_spans has 3, which is no \[first, end\] within the 3"),
    ],
)
def test_other_lines_are_refused(tmp_path, line, sentence):
    with pytest.raises(UserError, match=sentence):
        list(documents(write_lines(tmp_path / "a.jsonl", [line])))
