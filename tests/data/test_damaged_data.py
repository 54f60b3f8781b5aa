"""Data that is damaged, foreign or too large: a failure means training on other numbers than the text's, or a traceback."""

import gzip
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from minitron_mcore.config.settings import DataConfig, ParallelConfig
from minitron_mcore.data import datasets, token_cache, token_files
from minitron_mcore.data.text_reader import Limits, documents
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import multiple_choice
from minitron_mcore.testing import on_ranks

LENGTHS = [5, 9, 3]
N, D, START = len(LENGTHS), len(LENGTHS) + 1, 34


def write_pair(prefix: Path, rows=None, dtype=np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for row in rows or [range(n) for n in LENGTHS]:
        builder.add_document(np.asarray(row), [len(row)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def put(content: bytes, at: int, layout: str, *values) -> bytes:
    packed = struct.pack(layout, *values)
    return content[:at] + packed + content[at + len(packed) :]


DAMAGE = {
    "empty index": ("idx", lambda c: b"", "no index"),
    "cut header": ("idx", lambda c: c[:20], "no index"),
    "foreign index": ("idx", lambda c: b"\x93NUMPY" + c, "no index"),
    "legacy index": ("idx", lambda c: b"TNTIDX\x00\x00" + c, "legacy"),
    "version": ("idx", lambda c: put(c, 9, "<Q", 2), "version 2"),
    "unknown type": ("idx", lambda c: put(c, 17, "<B", 99), "type 99"),
    "float ids": ("idx", lambda c: put(c, 17, "<B", DType.float32.value), "float32 numbers"),
    "cut index": ("idx", lambda c: c[:-9], "says that it holds"),
    "longer index": ("idx", lambda c: c + b"\x00" * 3, "says that it holds"),
    "sequences claimed": ("idx", lambda c: put(c, 18, "<Q", 1 << 60), "says that it holds"),
    "documents claimed": ("idx", lambda c: put(c, 26, "<Q", 1_000_000_000), "says that it holds"),
    "length claimed": ("idx", lambda c: put(c, START, "<i", 1_000_000_000), "does not begin where"),
    "last length claimed": ("idx", lambda c: put(c, START + 8, "<i", 1_000_000_000), "describes"),
    "negative length": ("idx", lambda c: put(c, START, "<i", -5), "has length -5"),
    "empty document": ("idx", lambda c: put(c, START + 4, "<i", 0), "sequence 1 is empty"),
    "offset": ("idx", lambda c: put(c, START + 4 * N + 8, "<q", -8), "does not begin where"),
    "boundary": ("idx", lambda c: put(c, START + 12 * N + 8, "<q", 77), "boundaries"),
    "no documents": ("idx", lambda c: c[:18] + struct.pack("<QQq", 0, 1, 0), "no documents"),
    "short bin": ("bin", lambda c: c[:-4], "describes"),
    "long bin": ("bin", lambda c: c + c, "describes"),
    "empty bin": ("bin", lambda c: b"", "describes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_pair_is_refused_by_name_before_work_starts(tmp_path, name):
    suffix, change, sentence = DAMAGE[name]
    prefix = write_pair(tmp_path / "text")
    file = prefix.with_suffix(f".{suffix}")
    file.write_bytes(change(file.read_bytes()))
    for read in (
        lambda: token_cache.prepare(DataConfig(train=[str(prefix)], cache=str(tmp_path / "cache")), tmp_path, 100),
        lambda: token_files.TokenStream([str(prefix)], 100),
    ):
        with pytest.raises(UserError, match=rf"{re.escape(str(prefix))}\.idx.*{sentence}") as error:
            read()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("rows", "dtype", "sentence"),
    [
        ([[1, -3, 2]], np.int32, "holds token -3; ids begin at 0"),
        ([[1, -3, 2]], np.int64, "holds token -3; ids begin at 0"),
        ([[1, 2], [7, 1]], np.int32, "holds token 7, and the model's embedding has 7 rows"),
        ([[1, 2**31 + 1]], np.int64, "holds token 2147483649"),
        ([[0.5, 1.0]], np.float32, "float32 numbers"),
        ([[0.5, 1.0]], np.float64, "float64 numbers"),
    ],
)
def test_ids_that_no_embedding_has_are_found_anywhere(tmp_path, monkeypatch, rows, dtype, sentence):
    monkeypatch.setattr(token_files, "BLOCK", 16)  # the bad one lies beyond the first blocks
    prefix = write_pair(tmp_path / "text", [[1] * 2000, *rows, [1] * 2000], dtype)
    with pytest.raises(UserError, match=sentence):
        token_cache.prepare(DataConfig(train=[str(prefix)], cache=str(tmp_path / "cache")), tmp_path, 7)
    with pytest.raises(UserError, match=sentence):
        datasets.calibration([str(prefix)], vocab_size=7, sequence_length=1, num_samples=4002, seed=0)


def test_what_other_writers_make_is_read(tmp_path):
    """Repeated boundaries (Megatron-LM's for a text without tokens), and every integer type."""
    for dtype in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64):
        prefix = write_pair(tmp_path / dtype.__name__, dtype=dtype)
        index = prefix.with_suffix(".idx")
        content = put(index.read_bytes(), 26, "<Q", D + 1)
        index.write_bytes(content[: START + 12 * N] + struct.pack("<q", 0) + content[START + 12 * N :])
        token_cache.prepare(DataConfig(train=[str(prefix)], cache=str(tmp_path / "cache")), tmp_path, 9)
        stream = token_files.TokenStream([str(prefix)], 9)
        assert stream.tokens(0, sum(LENGTHS)).tolist() == [n for length in LENGTHS for n in range(length)]
        assert len(IndexedDataset(str(prefix))) == N


def _prepare(prefix: str, cache: str) -> str:
    try:
        token_cache.prepare(DataConfig(train=[prefix], cache=cache), "nowhere", 7)
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_end_with_the_one_sentence(tmp_path):
    prefix = write_pair(tmp_path / "text", [[1, -3, 2]], np.int32)
    found = on_ranks(_prepare, 2, ParallelConfig(tensor=2), str(prefix), str(tmp_path / "cache"), timeout=60)
    assert found[0] == found[1] and "holds token -3" in found[0]


def test_half_a_pair_is_named(tmp_path):
    prefix = write_pair(tmp_path / "text")
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=r"text\.bin is there, but .*text\.idx is not"):
        token_cache.tokenize([str(prefix)], None, str(tmp_path / "cache"))


def refused(path: Path, sentence: str, limits: Limits | None = None) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*{sentence}") as error:
        list(documents(str(path), limits))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["long.jsonl.gz", "long.jsonl"])
def test_a_line_above_the_limit_is_refused_without_reading_it(tmp_path, name):
    path, length = tmp_path / name, 200 << 20
    with gzip.open(path, "wb", compresslevel=1) if name.endswith(".gz") else path.open("wb") as file:
        file.write(b'{"text": "ok"}\n{"text": "')
        for _ in range(length >> 20):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')
    tracemalloc.start()
    refused(path, r"line 2 is longer than 16 MiB: .*data\.line_mb")
    with pytest.raises(UserError, match=r"line 2 is longer than 2 MiB"):
        list(documents(str(path), Limits(2, 1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20, peak


def test_questions_have_the_same_limit(tmp_path):
    path = tmp_path / "questions.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"query": "' + b"a" * (3 << 20) + b'", "choices": ["a", "b"], "label": 0}\n'))
    with pytest.raises(UserError, match="line 1 is longer than 2 MiB"):
        multiple_choice.read(str(path), None, Limits(2, 1))
    assert len(multiple_choice.read(str(path), None, Limits(4, 1))) == 1


def test_a_file_above_the_limit_is_refused_unread(tmp_path):
    path = tmp_path / "whole.txt"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    refused(path, r"one document of 3,072 MiB, and data\.file_mb is 1024")
    with pytest.raises(UserError, match=r"data\.file_mb is 2"):
        token_cache.tokenize([str(path)], None, str(tmp_path / "cache"), Limits(1, 2))


def test_text_that_is_not_utf8_is_named_by_file_and_line(tmp_path):
    for name, content, sentence in (
        ("a.txt", b"one\ntwo\nthr\xffe\n", r"line 3 is not UTF-8 text \(byte 0xff at position 11"),
        ("b.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', "line 3 is not UTF-8"),
        ("c.jsonl", '{"text": "x"}\n'.encode("utf-16"), "line 1 is not UTF-8"),
        ("d.jsonl", b'{"text": ' + b"[" * 100_000 + b"}\n", "line 1"),
        ("e.jsonl", b'{"text": "x", "n": ' + b"1" * 10_000 + b"}\n", "line 1"),
        ("f.jsonl.gz", gzip.compress(b'{"text": "x"}\n') + b"trailing", "cannot be read to its end"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refused(path, sentence)
    marked = tmp_path / "g.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + b'{"text": "x"}\n')
    assert list(documents(str(marked)))[0][0] == ["x"]
