"""The tokenize_text stage: a failure means tokens that depend on processes or interruptions, a lost or repeated document, or
processes that outlive the command."""

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from minitron_mcore import testing
from minitron_mcore.checkpoint import owner
from minitron_mcore.config.model import ModelConfig
from minitron_mcore.config.settings import DataConfig
from minitron_mcore.config.stages import TokenizeTextRun
from minitron_mcore.data import token_cache
from minitron_mcore.data.corpus import Corpus
from minitron_mcore.data.text_reader import documents, parts
from minitron_mcore.data.tokenizer import load
from minitron_mcore.errors import UserError
from tests.helpers.launching import fork
from tests.helpers.text_files import texts, write_jsonl, write_tokenizer

PART, SMALL = 2000, 500  # bytes, less than the longest line; less than most


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with a tokenizer, and text in two folders: lines (one blank, one longer than parts), gz, plain text."""
    root = tmp_path_factory.mktemp("text")
    write_tokenizer(root / "tokenizer")
    (root / "in/deep").mkdir(parents=True)
    rows = texts(80, 1)
    rows[20] = rows[20] * 50
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    content = "\ufeff" + "\n".join([*lines[:9], "", *lines[9:]])  # no line end at the end
    (root / "in/a.jsonl").write_text(content, encoding="utf-8")
    write_jsonl(root / "in/b.jsonl.gz", texts(15, 2))
    write_jsonl(root / "in/deep/c.jsonl", texts(60, 3))
    (root / "whole.txt").write_text("a cat\nsat")
    return root


def corpus(root: Path, out_dir: Path, processes: int, *files: str, part: int = PART, **settings) -> Corpus:
    given = [str(root / name) for name in files or ("in", "whole.t*")]
    model = ModelConfig(name="x", hf=str(root / "tokenizer"))
    run = TokenizeTextRun(model=model, files=given, out_dir=str(out_dir), processes=processes, **settings)
    return Corpus(run, part)


VARYING = ("tokens.json", "config.yaml", ".claim")


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(VARYING)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def expected(text, tmp_path_factory) -> dict[str, bytes]:
    """What megatron-core's own builder makes of the files, read whole."""
    folder, tokenizer = tmp_path_factory.mktemp("expected"), load(text / "tokenizer")
    (folder / "in/deep").mkdir(parents=True)
    for name in ("in/a.jsonl", "in/b.jsonl.gz", "in/deep/c.jsonl", "whole.txt"):
        prefix = folder / f"{name.split('.')[0]}_text_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for batch, _ in documents(str(text / name)):
            for ids in tokenizer.documents(batch):
                builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
    return content(folder)


def test_pairs_are_megatrons_and_do_not_depend_on_processes_or_parts(text, tmp_path, expected):
    assert len(parts(str(text / "in/a.jsonl"), PART)) > 10
    for processes, part in ((1, PART), (3, PART), (2, SMALL), (2, 1 << 20)):
        files = ["in/deep/c.jsonl"] if part == SMALL else []
        out_dir = tmp_path / f"{processes}-{part}"
        rows = corpus(text, out_dir, processes, *files, part=part).tokenize()
        if files:
            name = "c_text_document"
            assert content(out_dir) == {f"{name}{s}": expected[f"in/deep/{name}{s}"] for s in (".bin", ".idx")}
        else:
            assert content(out_dir) == expected
            assert [row["documents"] for row in rows] == [80, 15, 60, 1]
            sizes = [os.path.getsize(f"{row['pair']}.bin") for row in rows]
            assert [row["tokens"] * 2 for row in rows] == sizes


def _tokenize(root: Path, out_dir: Path) -> None:
    corpus(root, out_dir, 2, part=SMALL).tokenize()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_leaves_no_process(text, tmp_path, expected):
    """The command is killed with few and many parts done and when a pair is in its place; then one of its processes is."""
    for found, count, whom in (
        ("unfinished/*/[0-9]*", 3, "command"),
        ("unfinished/*/[0-9]*", 20, "process"),
        ("in/**/*.bin", 1, "command"),
    ):
        process = testing._processes().Process(target=_tokenize, args=(text, tmp_path))
        done, children = {*tmp_path.glob("unfinished/*/[0-9]*/figures.json")}, []
        process.start()
        while not children or len([path for path in tmp_path.glob(found) if "unfinished-" not in path.name]) < count:
            children = psutil.Process(process.pid).children()
        os.kill(process.pid if whom == "command" else children[-1].pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == (-signal.SIGKILL if whom == "command" else 1)
        assert not psutil.wait_procs(children, timeout=10)[1]
        assert all(file.is_file() or (file.parents[1] / "whole").is_dir() for file in done)
    corpus(text, tmp_path, 3, part=SMALL).tokenize()
    assert content(tmp_path) == expected


def test_errors_name_file_and_line_and_keep_what_is_done(text, tmp_path):
    good = text / "in/deep/c.jsonl"
    lines = good.read_text().splitlines()
    for name, line, sentence in (
        ("json", '{"text": ', "line 41: "),
        ("key", '{"txt": "x"}', 'line 41: no string under "text"'),
        ("utf8", '{"text": "\udcff"}', "line 41 is not UTF-8"),
        ("long", '{"text": "' + "a" * (2 << 20) + '"}', "line 41 is longer than 1 MiB"),
    ):
        bad = tmp_path / f"{name}.jsonl"
        bad.write_text("\n".join([*lines[:40], line, *lines[40:]]), errors="surrogateescape")
        run = corpus(text, tmp_path / name, 2, str(bad), str(good), data=DataConfig(line_mb=1))
        with pytest.raises(UserError, match=rf"{re.escape(str(bad))}, {sentence}"):
            run.tokenize()
    assert list((tmp_path / "json").glob("unfinished/*/*/figures.json"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl holds no text"):
        corpus(text, tmp_path / "none", 1, str(tmp_path / "empty.jsonl")).tokenize()


def test_mistakes_are_refused_before_work(text, tmp_path):
    write_jsonl(text / "a.jsonl", ["x"])
    try:
        for files, sentence in (
            (["in/a.jsonl", "in/a.jsonl"], "would both become a_text_document.bin"),
            (["none"], "none is neither a file"),
            (["no*.jsonl"], "stands for no text files"),
            (["tokenizer"], "stands for no text files"),
        ):
            with pytest.raises(UserError, match=sentence):
                corpus(text, tmp_path, 1, *files)
        with pytest.raises(UserError, match="files is empty"):
            Corpus(TokenizeTextRun(out_dir=str(tmp_path)))
        with pytest.raises(UserError, match="no tokenizer is set"):
            Corpus(TokenizeTextRun(model=ModelConfig("x", ""), files=["in"], out_dir=str(tmp_path)))
    finally:
        (text / "a.jsonl").unlink()
    assert not list(tmp_path.iterdir())


def test_the_command_and_a_training_on_its_folder(text, tmp_path, expected):
    command = [f"model.hf={text}/tokenizer", "model.name=tiny", f"files=[{text}/in,{text}/whole.txt]", "out_dir=tokens"]
    planned = fork(tmp_path, "tokenize_text", *command, "dry_run=true")
    assert "files to tokenise" in planned and not (tmp_path / "tokens").exists()
    with owner.Claim(tmp_path / "tokens"):  # another tokenisation into this folder
        refused = fork(tmp_path, "tokenize_text", *command, fails=True)
        assert f"error: tokens belongs to a run that is still going: process {os.getpid()}" in refused
        assert not content(tmp_path / "tokens")
    output = fork(tmp_path, "tokenize_text", *command, "processes=2")
    assert "train on them: data.train=[tokens]" in output
    rows = json.loads((tmp_path / "tokens/tokens.json").read_text())["files"]
    assert [row["pair"] for row in rows][2:] == ["tokens/in/deep/c_text_document", "tokens/whole_text_document"]
    assert all(row["tokens"] > row["documents"] and row["bytes"] and row["seconds"] > 0 for row in rows)
    made = content(tmp_path / "tokens")
    assert expected.items() <= made.items() and {*made} - {*expected} == {"inputs.json", ".complete"}
    assert "train on them" in fork(tmp_path, "tokenize_text", *command) and content(tmp_path / "tokens") == made
    os.utime(text / "in/a.jsonl")
    changed = fork(tmp_path, "tokenize_text", *command, fails=True)
    assert "error: tokens/tokens.json is of text files or a tokenizer that have changed" in changed
    assert "error: processes is 0; it must be at least 1" in fork(
        tmp_path, "tokenize_text", *command, "processes=0", fails=True
    )
    prefixes, weights = token_cache.prepare(DataConfig(train=[str(tmp_path / "tokens")]), "nowhere", 300)
    assert [prefix.removeprefix(f"{tmp_path}/tokens/") for prefix in prefixes] == sorted(
        {name[:-4] for name in expected}
    )
    assert weights is None
    (tmp_path / "tokens/unfinished").mkdir()
    with pytest.raises(UserError, match="holds tokens of a run that has not finished"):
        token_cache.prepare(DataConfig(train=[str(tmp_path / "tokens")]), "nowhere", 300)


def test_parquet_and_zst(text, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [row for batch, _ in documents(str(text / "in/a.jsonl")) for row in batch]
    table = pyarrow.table({"n": list(range(len(rows))), "body": rows})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "z").mkdir()
    lines = "".join(json.dumps({"body": row}) + "\n" for row in rows).encode()
    zst = [pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[:999], lines[999:])]
    (tmp_path / "z/a.jsonl.zst").write_bytes(b"".join(zst))
    made = [
        _column(text, tmp_path, path, n, part)
        for n, (path, part) in enumerate((("z/a.jsonl.zst", PART), ("a.parquet", PART), ("a.parquet", 1 << 30)), 1)
    ]
    assert made[0] == made[1] == made[2] and len(parts(str(tmp_path / "a.parquet"), PART, "body")) > 5
    (tmp_path / "z/cut.jsonl.zst").write_bytes(b"".join(zst)[:-20])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    parquet.write_table(pyarrow.table({"body": ["x", None]}), tmp_path / "null.parquet")
    parquet.write_table(pyarrow.table({"body": ["x", "y" * (2 << 20)]}), tmp_path / "long.parquet")
    for name, sentence in (
        ("z/cut.jsonl.zst", "cannot be read to its end"),
        ("cut.parquet", "is damaged or incomplete"),
        ("null.parquet", 'row 2: no string in column "body"'),
        ("long.parquet", "row 2 is longer than 1 MiB"),
    ):
        with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))}.*{sentence}"):
            _column(text, tmp_path, name, 1, PART)
    with pytest.raises(UserError, match=r'no column "text" of strings, but n \(int64\), body \(string\)'):
        corpus(text, tmp_path / "new", 1, str(tmp_path / "a.parquet"))


def _column(text: Path, folder: Path, name: str, processes: int, part: int) -> dict[str, bytes]:
    out_dir = folder / f"out-{name.replace('/', '-')}-{part}"
    corpus(
        text, out_dir, processes, str(folder / name), part=part, column="body", data=DataConfig(line_mb=1)
    ).tokenize()
    return content(out_dir)
