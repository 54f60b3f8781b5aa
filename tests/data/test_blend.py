"""Lists of text: a failure means that folders, Megatron-LM's lists or its splits stand for other documents than they say."""

import json
import re

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from minitron_mcore.checkpoint import stage_record
from minitron_mcore.config import ranges
from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data import datasets, token_cache, token_files
from minitron_mcore.data.blend import expand, parse_blend, split_entries
from minitron_mcore.errors import UserError
from tests.helpers.launching import config_of
from tests.helpers.text_files import write_jsonl


def write_pair(prefix, documents: int, seed: int = 0) -> str:
    """Documents of 3 to 40 tokens, of which the first is the document's number."""
    prefix.parent.mkdir(exist_ok=True, parents=True)
    rng, builder = np.random.default_rng(seed), IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(999))
    for number in range(documents):
        ids = rng.integers(0, 999, rng.integers(3, 41))
        builder.add_document([number, *ids[1:]], [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_folders_and_patterns_are_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, ["x"])
    for name in ("readme.md", "notes.txt", "other.csv"):
        (tmp_path / name).write_text("x")

    def names(path: str) -> list[str]:
        return [file.removeprefix(f"{tmp_path}/") for file in expand(str(tmp_path / path))]

    assert names("") == ["a.jsonl.gz", "b.jsonl", "deep/c.jsonl"]
    assert names("*.jsonl") == ["b.jsonl"] and names("*.[tm]*") == ["notes.txt", "readme.md"]
    assert names("**/*.jsonl") == ["b.jsonl", "deep/c.jsonl"] and names("other.csv") == ["other.csv"]
    pairs = [write_pair(tmp_path / f"tokens/{name}", 5) for name in ("y", "deep/x")]
    assert expand(str(tmp_path / "tokens")) == sorted(pairs) and expand(pairs[0]) == pairs[:1]
    assert expand(str(tmp_path / "tokens/*.bin")) == pairs[:1]
    with pytest.raises(UserError, match=r"stands for text files and for .bin/.idx pairs"):
        expand(str(tmp_path))
    for nothing in ("*.json", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="stands for no text files"):
            expand(str(tmp_path / nothing))


def test_megatrons_lists(tmp_path):
    assert parse_blend(["0.3", "a", "0.7", "b"]) == parse_blend(["0.3 a", "0.7 b"]) == (["a", "b"], [0.3, 0.7])
    assert parse_blend(["30", "a b", "70", "c"]) == (["a b", "c"], [30, 70])
    for wrong in (["0.3", "a", "b"], ["a", "0.3"], ["0.3"], ["0.3", "0.7"], ["0.3", "a", "0.7"]):
        with pytest.raises(UserError):
            parse_blend(wrong)
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ["0.3", "a", "0.7", "b"], "valid": "c d"}))
    assert split_entries([], str(path)) == ["0.3", "a", "0.7", "b"]
    for content in ('{"valid": ["a"]}', '{"train": []}', '{"train": [1]}', "[]", "{"):
        path.write_text(content)
        with pytest.raises(UserError, match=re.escape(str(path))):
            split_entries([], str(path))


def test_a_folders_weight_is_shared_by_tokens(tmp_path):
    one, *many = [write_pair(tmp_path / name, count, count) for name, count in (("one", 9), ("f/x", 20), ("f/y", 60))]
    data = DataConfig(train=["0.25", one, "0.75", str(tmp_path / "f")], cache=str(tmp_path / "cache"))
    prefixes, weights = token_cache.prepare(data, "nowhere", 999)
    tokens = [token_files.sequence_lengths(prefix).sum() for prefix in many]
    assert prefixes == [one, *many] and weights[0] == 0.25
    assert np.allclose(weights[1:], 0.75 * np.array(tokens) / sum(tokens), rtol=1e-15)
    samples = datasets.Samples(datasets.SampleOrder.of(data, prefixes, weights, 8, 40), data.cache, 999)
    assert len(samples._dataset) == 40


@pytest.mark.parametrize(("split", "documents"), [("98,2,0", 151), ("969,30,1", 700), ("1,1", 7), ("100", 9)])
def test_a_split_is_megatrons(tmp_path, split, documents):
    """The samples of training and validation of one pair equal those of Megatron-LM's own builder."""
    prefix, length = write_pair(tmp_path / "pair", documents), 8
    config = GPTDatasetConfig(
        random_seed=1234, sequence_length=length, blend=([prefix], None), split=split, path_to_cache=str(tmp_path / "m"),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        tokenizer=type("T", (), {"eod": None, "vocab_size": None, "unique_identifiers": {}})(),
    )  # fmt: skip
    built = BlendedMegatronDatasetBuilder(GPTDataset, [70, 6, 0], lambda: True, config).build()
    data = DataConfig(train=[prefix], split=split, cache=str(tmp_path / "cache"))
    order = datasets.SampleOrder.of(data, *token_cache.prepare(data, "nowhere", 999), length, 70)
    samples = datasets.Samples(order, data.cache, 999).batch(range(70))
    assert torch.equal(samples["tokens"], torch.stack([built[0][n]["tokens"] for n in range(70)]))
    whole = datasets.SampleOrder([prefix], None, 1234, length, 70)
    assert (order.digest() == whole.digest()) == (split == "100")
    if built[1] is None:
        with pytest.raises(UserError, match='data.split is "100", which leaves no documents to valid'):
            token_files.split_share(split, "valid")
        return
    valid = token_files.TokenStream([prefix], 999, token_files.split_share(split, "valid"))
    stored = IndexedDataset(prefix)  # its arrays are invalid without it
    expected = np.concatenate([stored[n] for n in built[1].indices])
    assert np.array_equal(valid.tokens(0, valid.num_tokens), expected)


def test_mistakes_are_sentences(tmp_path):
    prefix = write_pair(tmp_path / "pair", 4)
    for overrides, sentence in (
        (["data.split='98;2'"], 'data.split is "98;2"; it must be up to three numbers'),
        (["data.split='1,2,3,4'"], "it must be up to three numbers"),
        (["data.split='0,0'"], "it must be up to three numbers"),
        (["data.splits_file=x.json", "data.train=[a]"], "data.splits_file and data.train are both set"),
        (["data.splits_file=x.json", "data.split='1,1'"], "data.splits_file and data.split are both set"),
        (["data.line_mb=0"], "data.line_mb is 0; it must be at least 1"),
        (["data.prefetch=-1"], "data.prefetch is -1"),
    ):
        problems = list(ranges.problems(config_of("distill", "+model=llama31_8b", *overrides)))
        assert len(problems) == 1 and sentence in problems[0]
    with pytest.raises(UserError, match="no document lies between the shares 0.98 and 1"):
        token_files.TokenStream([prefix], 999, (0.98, 1.0))
    with pytest.raises(UserError, match="leaves no documents to train"):
        token_files.split_share("0,1,0", "train")


def test_changed_files_of_a_folder_are_changed_inputs(tmp_path):
    """What a finished stage was made from is compared by content, in all forms of lists."""
    prefix = write_pair(tmp_path / "f/pair", 4)
    (tmp_path / "s.json").write_text(json.dumps({"train": ["1", prefix], "valid": [prefix]}))
    for stage, data in (
        ("distill", {"train": [str(tmp_path / "f")]}),
        ("distill", {"train": [f"{tmp_path}/f/*.bin"]}),
        ("distill", {"train": ["0.5", prefix]}),
        ("distill", {"train": [], "splits_file": str(tmp_path / "s.json")}),
        ("evaluate", {"heldout": [], "train": [], "splits_file": str(tmp_path / "s.json")}),
        ("evaluate", {"heldout": [], "train": [prefix], "split": "1,1"}),
        ("evaluate", {"heldout": [prefix], "train": ["absent"], "split": "1,1"}),
    ):
        config = {"stage": stage, "data": data}
        write_pair(tmp_path / "f/pair", 4)
        (before,) = stage_record.inputs(config).values()
        write_pair(tmp_path / "f/pair", 4, seed=1)
        (after,) = stage_record.inputs(config).values()
        assert before.fingerprint and after.fingerprint and before.fingerprint != after.fingerprint
