"""Training data: what a sample is, its order, its resumption. A failure means a run on other text than it says."""

import dataclasses
import gzip
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.data import blend, datasets, token_cache, token_files
from minitron_mcore.data.tokenizer import load
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.testing import on_ranks
from tests.helpers.text_files import VOCAB, texts, write_jsonl, write_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(tokenizer folder, prefixes of two tokenised files, their texts, cache)"""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = write_tokenizer(folder / "tokenizer")
    rows = [texts(40, 1), texts(25, 2)]
    files = [write_jsonl(folder / "a.jsonl", rows[0]), write_jsonl(folder / "b.jsonl.gz", rows[1])]
    cache = str(folder / "cache")
    return tokenizer, token_cache.tokenize(files, load(tokenizer), cache), rows, cache


def batches(prefixes, weights, cache, dp_rank=0, dp_size=1, **changes) -> list[dict[str, torch.Tensor]]:
    order = datasets.SampleOrder(prefixes, weights, seed=5, sequence_length=16, num_samples=12 * 9)
    known = {key: value for key, value in changes.items() if hasattr(order, key)}
    order = dataclasses.replace(order, **known)
    arguments = dict(micro_batch_size=2, global_batch_size=12, dp_rank=dp_rank, dp_size=dp_size)
    arguments |= {key: value for key, value in changes.items() if key not in known} | {"num_samples": order.num_samples}
    return list(datasets.train_batches(datasets.Samples(order, cache, VOCAB), **arguments))


def equal(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(torch.equal(p[key], q[key]) for p, q in zip(a, b, strict=True) for key in p | q)


@pytest.mark.parametrize("bos", [False, True])
def test_tokenize_keeps_the_text_and_ends_documents_with_eos(tmp_path, bos):
    folder = write_tokenizer(tmp_path / "tokenizer", bos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = ["naïve 😀 日本語\r\n", " cat", "cat</s>", "x" * 3000]
    whole = tmp_path / "whole.md"
    whole.write_bytes("# cat\r\n\r\n日本\n".encode())
    files = [write_jsonl(tmp_path / "rows.jsonl.gz", [*rows[:2], "", *rows[2:]]), str(whole)]
    prefixes = token_cache.tokenize(files, load(folder), str(tmp_path / "cache"))
    for prefix, expected in zip(prefixes, [rows, ["# cat\r\n\r\n日本\n"]], strict=True):
        stored = IndexedDataset(prefix)
        assert stored[0].dtype == np.uint16 and len(stored) == len(expected)
        for document, text in zip(stored, expected, strict=True):
            ids = document.tolist()
            assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
            assert (ids[0] == tokenizer.bos_token_id) == bos
            assert tokenizer.decode(ids[int(bos) : -1]) == text.removesuffix("</s>")


def test_tokenized_files_are_kept_and_changed_ones_made_anew(tmp_path, corpus):
    tokenizer, cache = load(corpus[0]), str(tmp_path / "cache")
    file = write_jsonl(tmp_path / "f.jsonl", ["the cat"])
    first = token_cache.tokenize([file, corpus[1][0]], tokenizer, cache)
    assert first[1] == corpus[1][0]
    (tmp_path / "elsewhere").mkdir()
    copy = write_jsonl(tmp_path / "elsewhere" / "f.jsonl", ["the cat"])
    assert token_cache.tokenize([copy], tokenizer, cache) == first[:1]
    write_jsonl(tmp_path / "f.jsonl", ["the dog"])
    assert token_cache.tokenize([file], tokenizer, cache) != first[:1]
    other = load(write_tokenizer(tmp_path / "other", bos=True))
    assert token_cache.tokenize([copy], other, cache) != first[:1]


def test_data_hash_names_content_not_place(tmp_path, corpus):
    prefix = corpus[1][0]
    moved = tmp_path / "moved"
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, moved.with_suffix(suffix))
    assert datasets.data_hash([prefix]) == datasets.data_hash([str(moved)])
    content = bytearray(moved.with_suffix(".bin").read_bytes())
    content[len(content) // 2] ^= 1
    moved.with_suffix(".bin").write_bytes(content)
    assert datasets.data_hash([prefix]) != datasets.data_hash([str(moved)])
    assert datasets.data_hash(corpus[1]) != datasets.data_hash(corpus[1][::-1])


def test_labels_follow_tokens_and_an_epoch_holds_every_token_once(corpus):
    _, prefixes, _, cache = corpus
    stream = token_files.TokenStream(prefixes, VOCAB)
    num_samples = (stream.num_tokens - 1) // 16
    seen = batches(prefixes, None, cache, global_batch_size=1, micro_batch_size=1, num_samples=num_samples)
    assert len(seen) == num_samples
    for batch in seen:
        assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
        assert batch["loss_mask"].dtype == torch.float32 and batch["loss_mask"].all()
        assert torch.equal(batch["position_ids"], torch.arange(16)[None])
    # One shuffled concatenation of both files' documents: every token but the few that don't fill a sample.
    drawn = np.bincount(torch.cat([batch["tokens"] for batch in seen]).flatten().numpy(), minlength=400)
    held = np.bincount(stream.tokens(0, stream.num_tokens), minlength=400)
    assert (drawn <= held).all() and held.sum() - drawn.sum() <= 16


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_order_of_samples_does_not_depend_on_data_parallelism(corpus, weights, dp_size):
    _, prefixes, _, cache = corpus
    alone = batches(prefixes, weights, cache, global_batch_size=12, micro_batch_size=12)
    ranks = [batches(prefixes, weights, cache, r, dp_size) for r in range(dp_size)]
    microbatches = 12 // (2 * dp_size)
    for k, expected in enumerate(alone):
        step = slice(k * microbatches, (k + 1) * microbatches)
        parts = [ranks[r][step][m] for m in range(microbatches) for r in range(dp_size)]
        assert equal([{key: torch.cat([part[key] for part in parts]) for key in expected}], [expected])


def test_resuming_goes_on_where_the_run_stopped(corpus, tmp_path):
    _, prefixes, _, cache = corpus
    whole = batches(prefixes, [2.0, 1.0], cache, 1, 2)
    again = batches(prefixes, [2.0, 1.0], str(tmp_path), 1, 2, consumed_samples=12 * 4)
    assert equal(whole[4 * 3 :], again) and len(again) == 5 * 3
    assert not equal(whole, batches(prefixes, [2.0, 1.0], cache, 1, 2, seed=6))


def test_blend_gives_each_file_its_exact_share(tmp_path, corpus):
    tokenizer, cache = load(corpus[0]), str(tmp_path / "cache")
    files = [write_jsonl(tmp_path / f"{c}.jsonl", [f"{c}{c}{c}{c}{c}" * 40] * 3) for c in "QXZ"]
    entries = [f"{w} {file}" for w, file in zip((0.31, 0.58, 0.11), files, strict=True)]
    paths, weights = blend.parse_blend(entries)
    assert paths == files and weights == [0.31, 0.58, 0.11]
    seen = batches(token_cache.tokenize(paths, tokenizer, cache), weights, cache, num_samples=120)
    decode = AutoTokenizer.from_pretrained(corpus[0]).decode
    rows = ["".join(decode(row)) for batch in seen for row in batch["tokens"]]
    assert [sum(c in row for row in rows) for c in "QXZ"] == [37, 70, 13]  # of 37.2, 69.6, 13.2
    per_batch = [sum("X" in row for row in rows[i : i + 12]) for i in range(0, 120, 12)]
    assert set(per_batch) <= {6, 7, 8}  # interleaved, not in blocks
    assert blend.parse_blend(["0.5.txt", "a b.txt"]) == (["0.5.txt", "a b.txt"], None)


def test_tiny_files_without_weights_are_one_pool(tmp_path, corpus):
    tokenizer, cache = load(corpus[0]), str(tmp_path / "cache")
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [text]) for i, text in enumerate(texts(30, 3))]
    seen = batches(token_cache.tokenize(files, tokenizer, cache), None, cache)
    assert len(seen) == 9 * 6


DRAWN = dict(vocab_size=VOCAB, sequence_length=16, num_samples=8, seed=3)
WORLD = dict(global_batch_size=24, num_samples=24 * 3)


def _on_rank(prefixes, cache, files, tokenizer):
    rank, size = process_groups.dp_group().rank(), process_groups.dp_group().size()
    made = token_cache.tokenize(files, load(tokenizer), cache)
    return made, batches(prefixes, [1.0, 1.0], cache, rank, size, **WORLD), datasets.calibration(prefixes, **DRAWN)


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2)], ids=["dp4", "tp2-dp2"])
def test_ranks_of_a_world_read_what_one_process_reads(corpus, tmp_path, parallel):
    tokenizer, prefixes, _, cache = corpus
    files = [write_jsonl(tmp_path / "new.jsonl", texts(5, 9))]
    results = on_ranks(_on_rank, 4, parallel, prefixes, str(tmp_path / "cache"), files, tokenizer)
    dp_size = 4 // parallel.tensor
    for rank, (made, seen, drawn) in enumerate(results):
        assert made == results[0][0] and IndexedDataset.exists(made[0])
        assert equal(seen, batches(prefixes, [1.0, 1.0], cache, rank // parallel.tensor, dp_size, **WORLD))
        assert all(torch.equal(a, b) for a, b in zip(drawn, datasets.calibration(prefixes, **DRAWN), strict=True))
    assert not list(tmp_path.glob("cache/*unfinished*"))


def _refusal(file, tokenizer, cache) -> str | None:
    try:
        token_cache.tokenize([file], load(tokenizer), cache)
    except UserError as error:
        return str(error)


def test_a_mistake_on_rank_0_is_everyones(corpus, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "the cat"}\n{"txt": "the cat"}\n')
    first, second = on_ranks(_refusal, 2, ParallelConfig(), str(file), corpus[0], str(tmp_path / "cache"), timeout=60)
    assert first == second and "line 2" in first
    assert not list(tmp_path.glob("cache/*"))  # nothing half written stays


def test_calibration_draws_windows_without_repetition(corpus):
    _, prefixes, _, _ = corpus
    stream = token_files.TokenStream(prefixes, VOCAB)
    flat = stream.tokens(0, stream.num_tokens)
    expected = np.concatenate([document.copy() for prefix in prefixes for document in IndexedDataset(prefix)])
    assert np.array_equal(flat, expected)
    available = stream.num_tokens // 16
    tokens, mask = datasets.calibration(prefixes, vocab_size=VOCAB, sequence_length=16, num_samples=available, seed=0)
    assert mask.all() and tokens.dtype == torch.int64
    rows = {tuple(row) for row in flat[: available * 16].reshape(-1, 16).tolist()}
    assert {tuple(row) for row in tokens.tolist()} == rows
    assert not torch.equal(tokens, torch.from_numpy(flat[: available * 16].reshape(-1, 16)))
    again = datasets.calibration(prefixes, vocab_size=VOCAB, sequence_length=16, num_samples=5, seed=0)
    other = datasets.calibration(prefixes, vocab_size=VOCAB, sequence_length=16, num_samples=5, seed=1)
    assert torch.equal(
        again[0], datasets.calibration(prefixes, vocab_size=VOCAB, sequence_length=16, num_samples=5, seed=0)[0]
    )
    assert not torch.equal(again[0], other[0])


def test_calibration_on_whole_documents_pads_at_the_end(corpus):
    _, prefixes, rows, _ = corpus
    tokens, mask = datasets.calibration(
        prefixes, vocab_size=VOCAB, sequence_length=50, num_samples=65, seed=0, whole_documents=True
    )
    starts = [np.asarray(d)[:50].tolist() for prefix in prefixes for d in IndexedDataset(prefix)]
    assert len(starts) == sum(map(len, rows)) == 65
    assert sorted(row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)) == sorted(starts)
    assert (mask.int().diff(dim=1) <= 0).all() and not mask.all() and (tokens[~mask] == 0).all()


def test_bad_input_is_one_sentence(tmp_path, corpus):
    tokenizer, prefixes, _, cache = corpus
    loaded = load(tokenizer)

    def refused(name: str, content: bytes, match: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            token_cache.tokenize([str(path)], loaded, cache)

    refused("a.pdf", b"x", "no known kind")
    refused("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2")
    refused("b.jsonl", b'["x"]', 'line 1: no string under "text"')
    refused("c.jsonl", b'{"text": 3}', 'no string under "text"')
    refused("d.jsonl", b'{"text": "\\ud800"}', "UTF-8")
    refused("e.txt", b"\xff\xfe", "UTF-8")
    refused("f.txt", b"", "no text")
    refused("g.jsonl", b"\n\n", "no text")
    refused("h.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-20], "is it complete")
    refused("i.jsonl.gz", b'{"text": "x"}', "is it complete")
    with pytest.raises(UserError, match="neither a file"):
        token_cache.tokenize([str(tmp_path / "absent.txt")], loaded, cache)
    for entries, match in ([], "empty"), ([" "], "empty"), (["0.3 a", "b"], "b has weight None"), (["0 a"], "weight 0"):
        with pytest.raises(UserError, match=match):
            blend.parse_blend(entries)
    with pytest.raises(UserError, match=r"tokens are fewer than one sample of 100000 \+ 1"):
        batches(prefixes, None, cache, sequence_length=100000)
    with pytest.raises(UserError, match="multiple of 10"):
        batches(prefixes, None, cache, dp_size=5)
    with pytest.raises(UserError, match="windows of 16 tokens, not 9999"):
        datasets.calibration(prefixes, vocab_size=VOCAB, sequence_length=16, num_samples=9999, seed=0)


def test_an_index_that_was_cut_short_is_made_again(corpus, tmp_path):
    """megatron-core writes its index files in place: a run killed there must not poison the next."""
    _, prefixes, _, _ = corpus
    cache = tmp_path / "cache"
    expected = batches(prefixes, None, str(cache))
    (folder,) = cache.glob("order-*")
    half = folder.rename(f"{folder}.unfinished1")
    next(half.glob("*shuffle_index.npy")).write_bytes(b"")
    assert equal(batches(prefixes, None, str(cache)), expected)


def test_files_and_lists_of_paths_hash_as_before(corpus):
    """Numbers that runs have stored: the order of samples, of one pool and of a blend."""
    _, prefixes, _, _ = corpus
    first, second = (datasets.SampleOrder(prefixes, weights, 5, 16, 108) for weights in (None, [0.3, 0.7]))
    assert (first.digest(), second.digest()) == ("a7198bf91e6fe92a", "ee4c08d314b2d880")


EPOCHS = dict(global_batch_size=8, seed=5)


def _seen(prefixes, cache, count, prefetch):
    dp = process_groups.dp_group()
    return batches(prefixes, None, cache, dp.rank(), dp.size(), num_samples=count, prefetch=prefetch, **EPOCHS)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(context=2)],
    ids=["tp2", "pp2", "cp2"],
)
@pytest.mark.default_cases("tp2")
def test_all_layouts_see_the_same_samples_for_two_and_a_half_epochs(corpus, tmp_path, parallel):
    """Two replicas, whose ranks read ahead, see what one process sees that does not."""
    _, prefixes, _, _ = corpus
    epoch = (token_files.TokenStream(prefixes, VOCAB).num_tokens - 1) // 16
    count = int(2.5 * epoch) // 8 * 8
    alone = batches(prefixes, None, str(tmp_path), micro_batch_size=8, num_samples=count, **EPOCHS)
    results = on_ranks(_seen, 4, parallel, prefixes, str(tmp_path), count, 1)
    replicas = [results[0], results[1 if parallel.pipeline > 1 else 2]]
    assert sum(any(equal(seen, replica) for replica in replicas) for seen in results) == 4
    for step, expected in enumerate(alone):
        parts = [replica[2 * step + m] for m in range(2) for replica in replicas]
        assert equal([{key: torch.cat([part[key] for part in parts]) for key in expected}], [expected])
    ids = torch.cat([batch["samples"] for batch in alone])
    assert torch.equal(ids, torch.arange(count))
    rows = torch.cat([batch["tokens"] for batch in alone]).tolist()
    assert rows[:epoch] != rows[epoch : 2 * epoch]  # an epoch has an order of its own


def test_samples_read_ahead_are_the_same_and_errors_reach_the_loop(corpus, tmp_path):
    _, prefixes, _, cache = corpus
    plain = batches(prefixes, None, cache, prefetch=0)
    before = threading.active_count()
    assert equal(plain, batches(prefixes, None, cache, prefetch=2)) and threading.active_count() == before
    order = datasets.SampleOrder(prefixes, None, 5, 16, 108)
    samples, read = datasets.Samples(order, cache, VOCAB), []
    batch = samples.batch
    samples.batch = lambda rows: (read.append(rows[0]), batch(rows))[1]
    ahead = datasets.train_batches(samples, micro_batch_size=2, global_batch_size=12, num_samples=108, prefetch=1)
    next(ahead)
    deadline = time.monotonic() + 10
    while len(read) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == list(range(0, 14, 2))  # a step's six, and the one that was taken
    del ahead  # the loop ends early
    assert threading.active_count() == before
    few = datasets.Samples(order, cache, 260)  # rows of the embedding
    with pytest.raises(UserError, match="the model's embedding has 260 rows"):
        list(datasets.train_batches(few, micro_batch_size=2, global_batch_size=12, num_samples=108, prefetch=1))
    assert threading.active_count() == before
