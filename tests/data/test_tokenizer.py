"""Tokenizers of every kind give the model's own ids. A failure means a model is trained or judged on tokens it never saw."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer
from transformers.tokenization_utils_base import generate_merges

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import DataConfig, Dtype, EvaluateConfig, ParallelConfig
from minitron_mcore.config.stages import EvaluateRun
from minitron_mcore.data import datasets, token_cache, token_files
from minitron_mcore.data.tokenizer import load, open_tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import perplexity
from minitron_mcore.evaluation.windows import file_windows
from minitron_mcore.testing import on_ranks
from tests.helpers import models as tiny
from tests.helpers.sentencepieces import DOCS, LLAMA, PLAIN, proto, train
from tests.helpers.text_files import write_jsonl, write_tokenizer

UNSEEN = [part for part in DOCS[400:700] if "**" not in part and "--" not in part]  # ties aside
VARIED = [" ", "x", "  lead", "   if x:\n\treturn  y\n\n\n", "a\r\nb ", "naïve 😀 日本語", "▁under ▁x", "ﬁ ① Å", "12345 6,7",
          "\x01 a\u200bb\u3000c"]  # fmt: skip
MARKED = ["</s>", "<s> a </s>", "<unk>", "<0x0A>"]  # text that spells control tokens stays text
NEMOTRON = LLAMA | dict(pad_id=1, bos_id=2, eos_id=3, user_defined_symbols=["<extra_id_0>", "<extra_id_1>"])
KINDS = {"llama": LLAMA, "nemotron": NEMOTRON, "unigram": dict(model_type="unigram"), "bytes": PLAIN}


@pytest.fixture(scope="module")
def spms(tmp_path_factory) -> dict[str, Path]:
    """A sentencepiece .model of each kind, trained on the standard library's docs."""
    return {kind: train(tmp_path_factory.mktemp(kind), **options) for kind, options in KINDS.items()}


def rebuilt(spm: Path) -> Tokenizer:
    """A .model in Hugging Face's tokenizers, another program, laid out as Llama-2's tokenizer.json is."""
    model = proto(spm)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    byte_fallback, rules = model.trainer_spec.byte_fallback, model.normalizer_spec
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        made = Tokenizer(models.Unigram(pieces, model.trainer_spec.unk_id, byte_fallback))
    else:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        made = Tokenizer(
            models.BPE(vocab, generate_merges(vocab), byte_fallback=byte_fallback, fuse_unk=True, unk_token="<unk>")
        )
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    made.normalizer = normalizers.Sequence([*steps, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def beside(spm: Path, folder: Path, **files) -> Path:
    folder.mkdir()
    shutil.copy(spm, folder / "tokenizer.model")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_gives_its_own_ids(spms, kind):
    spm = spms[kind]
    found, own = load(spm), rebuilt(spm)
    pieces = [piece.piece for piece in proto(spm).pieces]
    assert found.vocab_size == len(pieces) == 500 and pieces[found.eos] == "</s>"
    for text, ids in zip(VARIED + UNSEEN, found.documents(VARIED + UNSEEN), strict=True):
        assert ids == [*own.encode(text).ids, found.eos], text
    for text, ids in zip(MARKED, found.documents(MARKED), strict=True):
        assert "".join(pieces[i] for i in ids[:-1]).replace("▁", " ").strip() == text and ids[-1] == found.eos
    if kind == "nemotron":
        assert pieces[found.documents(["<extra_id_1>hello"])[0][1]] == "<extra_id_1>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_models_tokens_stand_where_their_bytes_are(spms, kind):
    pieces = [piece.piece for piece in proto(spms[kind]).pieces]
    for text, (ids, ends, special) in zip(VARIED, load(spms[kind]).spans(VARIED), strict=True):
        assert (
            list(special) == [False] * (len(ids) - 1) + [True] and list(ends) == sorted(ends) and len(ends) == len(ids)
        )
        if kind != "unigram" and "▁" not in text:  # it cuts nothing off: a text is its pieces behind one more space
            spelled = [pieces[i].replace("▁", " ") for i in ids[:-1]]
            content = [bytes.fromhex(piece[3:5]) if piece.startswith("<0x") else piece.encode() for piece in spelled]
            so_far = [b"".join(content[: i + 1])[1:].decode(errors="ignore") for i in range(len(content))]
            assert so_far[-1] == text and list(ends[:-1]) == [len(part) for part in so_far]


HF_LLAMA = {"model_type": "llama"}
CLASS = "LlamaTokenizerFast"


@pytest.mark.parametrize(
    "files, model, bos",
    [
        ({}, {}, False),
        ({"config": HF_LLAMA}, {}, True),
        ({"config": {"model_type": "nemotron"}}, {"config": HF_LLAMA}, False),
        ({}, {"config": HF_LLAMA}, True),
        ({}, {"config": {"model_type": "nemotron"}}, False),
        ({"tokenizer_config": {"tokenizer_class": CLASS}}, {}, True),
        ({"tokenizer_config": {"tokenizer_class": CLASS, "add_bos_token": False}, "config": HF_LLAMA}, {}, False),
        ({"tokenizer_config": {"add_bos_token": True}}, {"config": {"model_type": "nemotron"}}, True),
        ({}, {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}}, True),
    ],
)
def test_who_begins_with_bos(spms, tmp_path, files, model, bos):
    spm = spms["llama"]
    folder, model = beside(spm, tmp_path / "tokenizer", **files), beside(spm, tmp_path / "model", **model)
    for path in (folder, folder / "tokenizer.model"):
        found, (document, empty) = load(path, model), load(path, model).documents(["the cat", ""])
        assert document == [1] * bos + load(spm).documents(["the cat"])[0] and empty == [1] * bos + [2]
        ((ids, ends, special),) = found.spans(["the cat"])
        assert ids == document and special == [True] * bos + [False] * (len(ids) - 1 - bos) + [True]
        assert ends[-1] == 7 and ends[0] == (0 if bos else load(spm).spans(["the cat"])[0].ends[0])
    assert (found.fingerprint == load(spm).fingerprint) == (not bos)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_json_is_taken_whole(spms, tmp_path, kind):
    """transformers builds some classes anew from the vocabulary, without the spaces or the digits of the file."""
    if kind == "GPT2Tokenizer":
        own = Tokenizer.from_file(f"{write_tokenizer(tmp_path)}/tokenizer.json")
        own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), own.pre_tokenizer])
    else:
        own = rebuilt(spms["llama"])
    own.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(HF_LLAMA))
    found = load(tmp_path).documents(VARIED + UNSEEN)
    assert found == [[*own.encode(text).ids, own.token_to_id("</s>")] for text in VARIED + UNSEEN]


def test_a_slow_tokenizer_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="is ByT5Tokenizer, which has no fast version: give a folder with tokenizer.json"
    ):
        load(tmp_path)


def _stages(hf, files, out_dir):
    """What each stage of a run reads, on every rank; `hf` holds config.json, weights and tokenizer.model alone."""
    parallel = ParallelConfig(tensor=2)
    tiny.import_hf(hf, out_dir / "ckpt", parallel)
    source = open_checkpoint(out_dir / "ckpt")
    files = DataConfig(train=files, heldout=files, cache=str(out_dir / "cache"))
    prefixes, _ = token_cache.prepare(files, source.hf, source.arch.vocab)
    config = EvaluateRun(source=str(source.path), parallel=parallel, data=files, dtype=Dtype.fp32)
    config.evaluate.micro_batch = 1
    model, tokenizer = perplexity.open_model(config)
    rows = perplexity.evaluate_run(model, tokenizer, config)
    return [document.tolist() for document in IndexedDataset(prefixes[0])], rows[0]


def test_a_run_reads_text_with_the_models_sentencepiece_model(spms, tmp_path):
    hf = tiny.tiny_llama(tmp_path / "hf", vocab_size=503, max_position_embeddings=2048)
    shutil.copy(spms["llama"], hf)
    rows = UNSEEN[:5]
    file = write_jsonl(tmp_path / "text.jsonl", rows)
    expected = [[1, *rebuilt(spms["llama"]).encode(text).ids, 2] for text in rows]
    assert sum(map(len, expected)) < 1024  # one window: all but its first token, which is BOS, are predicted
    for documents, row in on_ranks(_stages, 2, ParallelConfig(tensor=2), hf, [file], tmp_path):
        assert documents == expected
        assert row["bytes"] == sum(len(text.encode()) for text in rows) and 5 < row["loss"] < 8


def _refusals(spm, folder, file, prefix):
    """What a rank is told by each reader of text whose model is too small."""
    found = []
    for tokenizer, files in ((str(spm), [file]), (None, [file]), (None, [prefix])):
        config = DataConfig(train=files, tokenizer=tokenizer, cache=str(folder / "cache"))
        with pytest.raises(UserError) as error:
            token_cache.prepare(config, folder, ROWS)
        found.append(str(error.value))
    return found


ROWS = 280
"""Of a model's embedding, fewer than the ids of `TEXT`."""
TEXT = "12 34"


def test_texts_beyond_the_embedding_are_refused_with_both_numbers(spms, tmp_path):
    write_tokenizer(tmp_path)
    file = write_jsonl(tmp_path / "text.jsonl", [TEXT])
    readers = [load(spms["llama"], tmp_path), load(tmp_path), load(tmp_path)]
    (prefix,) = token_cache.tokenize([file], readers[1], str(tmp_path / "made"))
    told = on_ranks(_refusals, 2, ParallelConfig(), spms["llama"], tmp_path, file, prefix)
    assert told[0] == told[1]
    for sentence, reader in zip(told[0], readers, strict=True):
        largest = max(reader.documents([TEXT])[0])
        assert f"token {largest}" in sentence and f"{ROWS} rows" in sentence
    assert not list((tmp_path / "cache").iterdir())  # nothing that another run could take for whole
    hf = tiny.tiny_llama(tmp_path / "hf", vocab_size=ROWS)
    texts = DataConfig(heldout=[file], tokenizer=str(tmp_path))
    _, reader = perplexity.open_model(
        EvaluateRun(source=str(hf), data=texts, evaluate=EvaluateConfig(sequence_length=64))
    )
    with pytest.raises(UserError, match=rf"token \d+ .*{ROWS} rows"):
        file_windows(file, reader, 64)


def test_ids_that_no_text_uses_need_no_row(tmp_path):
    """Such as a token of padding that was added to a tokenizer and never to its model."""
    write_tokenizer(tmp_path)
    file, free = write_jsonl(tmp_path / "text.jsonl", [TEXT]), load(tmp_path)
    [ids] = free.documents([TEXT])
    rows = max(ids) + 1
    assert rows < free.vocab_size
    config = DataConfig(train=[file], cache=str(tmp_path / "cache"))
    [prefix], _ = token_cache.prepare(config, tmp_path, rows)
    assert token_files.TokenStream([prefix], rows).tokens(0, len(ids)).tolist() == ids
    fitting = open_tokenizer(config, tmp_path, rows)
    assert fitting.documents([TEXT]) == [ids] and fitting.spans([TEXT])[0].ids == ids
    for read in (fitting.documents, fitting.spans):
        fitting.rows = rows - 1
        with pytest.raises(UserError, match=rf"token {rows - 1} .* embedding {rows - 1} rows"):
            read([TEXT])
    with pytest.raises(UserError, match=f"holds token {rows - 1}"):  # tokenised above, for a model with more rows
        token_cache.prepare(config, tmp_path, rows - 1)
    with pytest.raises(UserError, match=f"ends documents with token {free.eos}.* {free.eos} rows"):
        open_tokenizer(config, tmp_path, free.eos)


@pytest.mark.parametrize("number", [1 << 31, (1 << 32) - 2, 1 << 70, -1, 0.5, True, None, "7"])
def test_ids_that_a_vocabulary_only_claims(tmp_path, number):
    """In tokenizer.json, and in the vocab.json that transformers makes one of; 2^31 takes 9 GB, 2^32 ends the process."""
    write_tokenizer(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    made["model"]["vocab"]["more"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=rf"{tmp_path}/tokenizer.json gives 'more' the id {number}; ids are"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/vocab.json gives 'more' the id {number}; ids are"):
        load(tmp_path)


def test_ids_that_the_sample_of_a_large_file_misses_are_refused_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BLOCK", 16)
    monkeypatch.setattr(token_files, "SCAN_BYTES", 0)
    prefix, rows = str(tmp_path / "big"), np.ones((100, 64), dtype=np.int64)
    rows[50, 20] = 7
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(8))
    for row in rows:
        builder.add_document(row, [64])
    builder.finalize(f"{prefix}.idx")
    config = DataConfig(train=[prefix], cache=str(tmp_path))
    token_cache.prepare(config, tmp_path / "no_tokenizer_is_needed", 7)
    drawn = dict(sequence_length=64, num_samples=100, seed=0)
    with pytest.raises(UserError, match="holds token 7, and the model's embedding has 7 rows"):
        datasets.calibration([prefix], vocab_size=7, **drawn)
    assert datasets.calibration([prefix], vocab_size=8, **drawn)[0].max() == 7
    samples = datasets.Samples(datasets.SampleOrder([prefix], None, 1, 63, 99), str(tmp_path), vocab_size=7)
    with pytest.raises(UserError, match="holds token 7"):
        samples.batch(range(99))
    rows[-1, -1] = 9
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(10))
    for row in rows:
        builder.add_document(row, [64])
    builder.finalize(f"{prefix}.idx")
    with pytest.raises(UserError, match="holds token 9"):
        token_cache.prepare(config, tmp_path, 8)


def test_bad_tokenizers_are_one_sentence(spms, tmp_path):
    def refused(match: str, path, **files) -> None:
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content)
        with pytest.raises(UserError, match=match):
            load(path)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()

    refused("no such file or folder", tmp_path / "absent")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused("No tokenizer can be read", folder)
    refused("tokenizer.json cannot be read as JSON", folder, tokenizer__json=b"{")
    refused("No tokenizer can be read", folder, tokenizer__json=b"{}")
    refused("no vocabulary", folder, tokenizer_config__json=b'{"tokenizer_class": "LlamaTokenizer"}')
    refused("cannot be read by sentencepiece", folder, tokenizer__model=b"IQ== 0\nIg== 1\n")  # tiktoken's
    model = spms["llama"].read_bytes()
    refused("cannot be read by sentencepiece", folder, tokenizer__model=model[: len(model) // 2])
    refused("tokenizer_config.json cannot be read as JSON", folder, tokenizer__model=model, tokenizer_config__json=b"{")
    refused("add token 500", folder, tokenizer__model=model, added_tokens__json=b'{"<pad>": 500}')
    added = json.dumps({"added_tokens_decoder": {"2": {"content": "</s>"}, "501": {"content": "<pad>"}}}).encode()
    refused("add token 501", folder, tokenizer__model=model, tokenizer_config__json=added)
    refused("no EOS to end", train(folder, model_type="bpe", eos_id=-1).parent)
    without_bos = train(folder, model_type="bpe", bos_id=-1)
    refused("no BOS to begin", without_bos.parent, config__json=json.dumps(HF_LLAMA).encode())
    rebuilt(spms["llama"]).save(str(folder / "tokenizer.json"))
    refused("no eos_token", folder)
    auto = json.dumps({"auto_map": {"AutoTokenizer": ["custom.X", None]}, "tokenizer_class": "X"}).encode()
    refused("custom code", folder, tokenizer_config__json=auto, custom__py=b"raise OSError('ran')")
