"""Evaluation: what is predicted, what it weighs, and that sharing it out changes nothing. Failure: figures that lie."""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.data.tokenizer import load
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import perplexity
from minitron_mcore.evaluation.windows import Windows, file_windows
from minitron_mcore.parallel import process_groups
from minitron_mcore.testing import on_ranks
from tests.helpers.text_files import texts, write_jsonl, write_tokenizer

S = 16


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(folder of a random Llama with a byte-level tokenizer, the model as it was built, in fp64)"""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(folder)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=307, tie_word_embeddings=True, initializer_range=0.3, **sizes))
    model.save_pretrained(folder)
    return str(folder), model.double()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "b.txt").write_bytes("naïve 😀\r\n日本語 the cat  ".encode() * 7)
    return [write_jsonl(folder / "a.jsonl.gz", texts(9, 4)), str(folder / "b.txt")]


def reference(model, windows: Windows) -> float:
    """Sum of -log p, window by window, in fp64."""
    total = 0.0
    for tokens, mask in zip(windows.tokens, windows.mask, strict=True):
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens[None]).logits[0], dim=-1)
        total -= sum(log_p[s - 1, tokens[s]].item() for s in range(len(tokens)) if mask[s])
    return total


@pytest.mark.parametrize("bos", [False, True])
def test_windows_hold_the_text_and_count_its_bytes(tmp_path, bos):
    folder = write_tokenizer(tmp_path / "tokenizer", bos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [text.encode("ascii", "ignore").decode() for text in texts(12, 7)]
    cut = file_windows(write_jsonl(tmp_path / "f.jsonl", rows), load(folder), S)
    stream = [token for row in rows for token in [*tokenizer(row).input_ids, tokenizer.eos_token_id]]
    assert cut.tokens.flatten()[: len(stream)].tolist() == stream and len(cut.tokens) == math.ceil(len(stream) / S)
    assert (cut.tokens.flatten()[len(stream) :] == tokenizer.eos_token_id).all()
    predicted = [token not in (tokenizer.eos_token_id, tokenizer.bos_token_id) for token in stream]
    predicted = [p and i % S > 0 for i, p in enumerate(predicted)]
    assert cut.mask.flatten().tolist() == predicted + [False] * (cut.mask.numel() - len(stream))
    # A byte-level token is as many bytes as it has letters of the byte alphabet.
    lengths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(cut.tokens.flatten().tolist())])
    assert cut.num_bytes.tolist() == (lengths.reshape(cut.tokens.shape) * cut.mask).sum(dim=1).tolist()


def test_unpredicted_bytes_are_those_of_each_windows_first_token(files, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama[0])
    text = Path(files[1]).read_bytes().decode()
    cut = file_windows(files[1], load(llama[0]), 1000)
    assert len(cut.tokens) == 1
    first = tokenizer(text, return_offsets_mapping=True).offset_mapping[0][1]
    assert int(cut.num_bytes.sum()) == os.path.getsize(files[1]) - len(text[:first].encode())


def test_bytes_do_not_depend_on_how_a_tokenizer_treats_spaces(tmp_path):
    """A tokenizer that drops spaces, cuts words or doesn't know them stands for the same bytes in the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "</s>": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]").save_pretrained(tmp_path)
    (tmp_path / "f.txt").write_bytes("  the naïve\n日本 cat \n".encode())
    cut = file_windows(str(tmp_path / "f.txt"), load(str(tmp_path)), 4)
    assert cut.tokens.tolist() == [[1, 0, 0, 2]]  # the window of EOS alone has nothing to predict
    assert cut.num_bytes.tolist() == [len(" naïve\n日本 cat \n".encode())]


def cuts(files, folder) -> dict[str, Windows]:
    return {file: file_windows(file, load(folder), S) for file in files}


def test_losses_equal_cross_entropy_in_fp64(files, llama, monkeypatch):
    folder, model = llama
    monkeypatch.setattr(perplexity, "_CHUNK_LOGITS", 307 * 5)  # several chunks a window, the last one short
    hf = perplexity.HFModel(folder)
    assert hf.parameters == sum(p.numel() for p in model.parameters())
    rows = perplexity.evaluate_windows(cuts(files, folder), hf.nll, micro_batch=2)
    for file, row in zip(files, rows, strict=True):
        cut = file_windows(file, load(folder), S)
        expected, tokens, size = reference(model, cut), int(cut.mask.sum()), int(cut.num_bytes.sum())
        assert row["file"] == file and row["tokens"] == tokens and row["bytes"] == size
        assert row["loss"] == pytest.approx(expected / tokens, rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(expected / tokens), rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(expected / math.log(2) / size, rel=1e-6)


def test_max_windows_are_spread_over_the_file(files, llama):
    folder, _ = llama
    seen = []

    def nll(tokens, mask):
        seen.append(tokens[mask.any(dim=1)])
        return mask.sum()

    (row,) = perplexity.evaluate_windows(cuts(files[:1], folder), nll, micro_batch=2, max_windows=3)
    cut = file_windows(files[0], load(folder), S)
    kept = [0, len(cut.tokens) // 3, 2 * len(cut.tokens) // 3]
    assert torch.equal(torch.cat(seen), cut.tokens[kept])
    assert row["loss"] == 1.0 and row["bytes"] == int(cut.num_bytes[kept].sum())


def _on_rank(files, folder):
    hf, shapes = perplexity.HFModel(folder), []

    def nll(tokens, mask):
        shapes.append(tuple(tokens.shape))
        return hf.nll(tokens, mask)

    rows = perplexity.evaluate_windows(cuts(files, folder), nll, micro_batch=2, group=process_groups.dp_group())
    return rows, shapes


@pytest.mark.parametrize(
    "world, parallel", [(2, ParallelConfig()), (3, ParallelConfig()), (4, ParallelConfig(tensor=2))]
)
def test_data_parallel_sums_equal_one_process(files, llama, world, parallel):
    folder, _ = llama
    alone = perplexity.evaluate_windows(cuts(files, folder), perplexity.HFModel(folder).nll, micro_batch=2)
    ranks = on_ranks(_on_rank, world, parallel, files, folder)
    for rows, shapes in ranks:
        assert set(shapes) == {(2, S)} and len(shapes) == len(ranks[0][1])  # as collectives inside nll need it
        for row, expected in zip(rows, alone, strict=True):
            assert {k: row[k] for k in ("file", "tokens", "bytes")} == {
                k: expected[k] for k in ("file", "tokens", "bytes")
            }
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-12)


def test_nothing_predicted_costs_nothing(llama):
    zero = perplexity.HFModel(llama[0]).nll(torch.zeros(2, S, dtype=torch.int64), torch.zeros(2, S, dtype=torch.bool))
    assert zero.item() == 0.0


def test_bad_input_is_one_sentence(tmp_path, files, llama):
    from safetensors.torch import load_file, save_file

    folder, _ = llama
    tokenizer = load(folder)
    with pytest.raises(UserError, match="no config.json"):
        perplexity.HFModel(str(tmp_path / "absent"))
    shutil.copy(Path(folder, "config.json"), tmp_path)
    with pytest.raises(UserError, match="has no weights"):
        perplexity.HFModel(str(tmp_path))
    weights = load_file(os.path.join(folder, "model.safetensors"))
    left_out = "model.layers.1.mlp.up_proj.weight"
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in weights.items() if k != left_out}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"missing_keys: {left_out}"):
        perplexity.HFModel(str(tmp_path))
    save_file(weights | {left_out: weights[left_out][:5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="up_proj"):
        perplexity.HFModel(str(tmp_path))
    save_file(weights, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        perplexity.HFModel(str(tmp_path))
    one = write_jsonl(tmp_path / "one.jsonl", ["a"])
    with pytest.raises(UserError, match="no token to predict"):
        file_windows(one, tokenizer, S)
    with pytest.raises(UserError, match="neither a file"):
        file_windows("absent.txt", tokenizer, S)


def test_models_that_change_their_logits_are_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    Gemma2ForCausalLM(Gemma2Config(vocab_size=50, head_dim=8, initializer_range=0.5, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gemma2 changes its logits"):
        perplexity.HFModel(str(tmp_path))
