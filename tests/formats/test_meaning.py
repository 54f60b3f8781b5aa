"""A folder means what transformers says it means: a failure means that a config gives another model here than there, in silence."""

import json
import os
import subprocess
import sys
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.export import transformers_check
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.testing import on_ranks
from tests.helpers import families, meaning, models
from tests.helpers.cutting import export
from tests.helpers.launching import word_tokenizer

ONE = ParallelConfig()
FAST = ["llama31", "nemotron", "qwen3_moe_raw"]
GENERATED = 80  # cases a family


@pytest.mark.parametrize(
    "names",
    [FAST, pytest.param([x for x in families.OF if x not in FAST], marks=pytest.mark.slow)],
    ids=["fast", "rest"],
)
def test_every_key_of_every_family(tmp_path, names):
    [(counts, faults)] = on_ranks(meaning.count, 1, ONE, names, tmp_path, timeout=1200)
    print(counts)
    assert not faults, faults
    assert all(found["equal"] > 50 and found["refused"] > 200 for found in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("which", families.OF)
def test_generated_configs(tmp_path, which):
    """Several edits at once: 960 cases over all families."""
    [(counts, faults)] = on_ranks(meaning.generate, 1, ONE, which, tmp_path, GENERATED, timeout=1200)
    print(which, counts)
    assert not faults, faults
    assert sum(counts.values()) >= GENERATED * 0.9


def shards(folder):
    """Two shards and their index instead of model.safetensors."""
    weights = models.weights(folder)
    names = sorted(weights)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: weights[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def sharded(folder):
    shards(folder)
    (folder / "model.safetensors").unlink()
    save_file({"stray": torch.ones(3)}, folder / "consolidated.safetensors")


def head(folder, change=0.0):
    weights = models.weights(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + change
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def twice(folder):
    index = shards(folder)
    (folder / "model.safetensors").unlink()
    first, second = sorted(set(index["weight_map"].values()))
    both = load_file(folder / first) | {"model.norm.weight": torch.ones(36)}
    save_file(both, folder / first)
    save_file(load_file(folder / second) | {"model.norm.weight": torch.zeros(36)}, folder / second)


def index_of(text):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / INDEX).write_text(text)

    return damage


INDEX = "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
FOLDERS = {
    "one file": (lambda folder: None, None),
    "shards, and another tool's file": (sharded, None),
    "the tied head again": (head, None),
    "another head than the tied one": (lambda folder: head(folder, 1e-3), "differs from model.embed_tokens.weight"),
    "one file beside shards": (shards, "another model's index beside it"),
    "a tensor twice": (twice, "model.norm.weight is in both"),
    "another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
        "holds no model.safetensors weights",
    ),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter"),
    "an index that leaves the folder": (
        index_of('{"metadata": {}, "weight_map": {"a": "../hf/weights.safetensors"}}'),
        "names the file '../hf",
    ),
    "an index of pickles": (index_of('{"metadata": {}, "weight_map": {"a": "x.bin"}}'), "names the file 'x.bin'"),
    "an index of a number": (index_of('{"metadata": {}, "weight_map": {"a": 3}}'), "names the file 3"),
    "an empty index": (index_of(""), "cannot be read as JSON"),
    "an index that git-lfs left": (index_of(LFS), "cannot be read as JSON"),
    "a null index": (index_of("null"), "holds NoneType 'None' where a JSON object is expected"),
    "an index without a map": (index_of("{}"), "has no weight_map"),
    "a deep index": (index_of("[" * 10**5), "cannot be read as JSON"),
}


@pytest.mark.parametrize(("damage", "sentence"), FOLDERS.values(), ids=FOLDERS)
def test_weights_are_those_that_transformers_takes(tmp_path, damage, sentence):
    folder = families.tiny("llama32", tmp_path / "hf")
    damage(folder)
    arch, _ = architecture.read_hf(folder)
    if sentence:
        with pytest.raises(UserError, match=sentence):
            HFFolder(folder).check(arch)
        return
    weights, expected = HFFolder(folder), transformers_check.load(folder, dtype=torch.float32).state_dict()
    weights.check(arch)
    for name, tensor in models.whole(weights, parameter_table.parameters(arch)).items():
        assert tensor.shape and torch.isfinite(tensor).all(), name
    assert all(torch.equal(weights.slice(name)[:], expected[name]) for name in expected.keys() & weights.file_of.keys())


@pytest.mark.parametrize(
    "text", ["", LFS, "null", "[]", '"x"', "[" * 10**5, '{"a": ' * 10**5, b"\xff{}", "{", "1" * 5000]
)
def test_what_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="config.json (cannot be read as JSON|holds .* where a JSON object)"):
        architecture.read_hf(tmp_path)


@pytest.mark.parametrize(
    ("which", "key", "field", "default"),
    [
        ("mixtral", "rope_parameters", "rope_theta", 1e6),
        ("llama31", "rope_parameters", "rope_theta", 1e4),
        ("mistral", "sliding_window", "window", 4096),
        ("mixtral", "sliding_window", "window", None),
        ("nemotron", "rope_parameters", "rotary_fraction", 0.5),
        ("qwen3", "head_dim", "head_dim", 128),
        ("qwen3_moe", "norm_topk_prob", "normalize_experts", False),
    ],
)
def test_a_missing_key_takes_its_classes_default(tmp_path, which, key, field, default):
    _, config = architecture.read_hf(families.tiny(which, tmp_path))
    del config[key]
    assert getattr(architecture.from_hf(config), field) == default


def claims(which, tmp_path, **sizes):
    _, config = architecture.read_hf(families.tiny(which, tmp_path))
    architecture.from_hf(config | sizes)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_local_experts", "num_labels", "vocab_size", "intermediate_size"]
)
def test_claimed_sizes_have_limits(tmp_path, key):
    """Before transformers makes a list of one entry a block, or this package one of the parameters."""
    tracemalloc.start()
    with pytest.raises(UserError, match=f"config.json: {key} is 1000000000: expected an integer from 1 to"):
        claims("mixtral" if key == "num_local_experts" else "qwen2", tmp_path, **{key: 10**9})
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


OLD = ("rope_theta", "rope_scaling", "torch_dtype", "partial_rotary_factor")
NEW = ("rope_parameters", "dtype")


def without(config, keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("source", ["new", "old"])
@pytest.mark.parametrize("which", families.OF)
def test_exports_say_the_same_to_old_and_new_readers(tmp_path, which, source):
    """transformers 4 reads the old keys, transformers 5 both, vLLM `architectures`, too: whatever the source had."""
    arch, config = architecture.read_hf(families.tiny(which, tmp_path))
    if source == "old":
        rope = config["rope_parameters"]
        config = without(config, (*NEW, "transformers_version")) | {"rope_theta": rope["rope_theta"]}
        config["rope_scaling"] = without(rope, ("rope_theta",)) if rope["rope_type"] == "llama3" else None
        assert architecture.from_hf(config) == arch
    found = architecture.to_hf(arch, config | {"auto_map": {"AutoConfig": "x.Y"}}, "bfloat16")
    assert json.loads(json.dumps(found)) == found
    assert found["torch_dtype"] == found["dtype"] == "bfloat16"
    assert found["architectures"] == [arch.traits.hf_class] and found["transformers_version"]
    assert "auto_map" not in found
    new, old = found["rope_parameters"], found["rope_scaling"] or {"rope_type": "default"}
    fraction = {key: found[key] for key in ("partial_rotary_factor",) if key in found}
    assert new == old | {"rope_theta": found["rope_theta"]} | fraction
    for dropped in ((), OLD, NEW):
        assert architecture.from_hf(without(found, dropped)) == arch


def test_a_tokenizer_that_both_know(tmp_path):
    """transformers 5 names a class that transformers 4 doesn't have, and lists special tokens where that wants a dictionary."""
    folder = families.tiny("llama32", tmp_path / "hf")
    word_tokenizer(folder)
    shipped = json.loads((folder / "tokenizer_config.json").read_text())
    assert shipped["tokenizer_class"] == "TokenizersBackend"
    shipped |= {"extra_special_tokens": ["w7"], "auto_map": {"AutoTokenizer": ["x.Y", None]}, "note": "\ud800"}
    (folder / "tokenizer_config.json").write_text(json.dumps(shipped))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    on_ranks(models.import_hf, 1, ONE, folder, tmp_path / "ckpt", ONE)
    out = tmp_path / "out"
    export(tmp_path / "ckpt", out)
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast" and found["additional_special_tokens"] == ["w7"]
    assert "auto_map" not in found and "extra_special_tokens" not in found and found["note"] == "\ud800"
    for name in ("additional_chat_templates/tool.jinja", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    one, two = (AutoTokenizer.from_pretrained(path) for path in (folder, out))
    assert one("w3 w7 w4").input_ids == two("w3 w7 w4").input_ids and one.all_special_tokens == two.all_special_tokens
    assert one.chat_template == two.chat_template and set(two.chat_template) == {"default", "tool"}


OLD_TRANSFORMERS = """
import sys, torch, transformers
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = torch.load(out)
with torch.no_grad():
    torch.save((transformers.__version__, str(model.config.torch_dtype), tokenizer("w3 w7 w4").input_ids, model(ids).logits), out)
"""


@pytest.mark.skipif("MINITRON_OLD_TRANSFORMERS" not in os.environ, reason="MINITRON_OLD_TRANSFORMERS names no folder")
@pytest.mark.parametrize("which", families.OF)
def test_transformers_4_reads_the_same(tmp_path, which):
    """MINITRON_OLD_TRANSFORMERS: a folder of transformers 4.5x and what it needs (`pip install --target`)."""
    folder, out, answer = families.tiny(which, tmp_path / "hf"), tmp_path / "out", tmp_path / "answer"
    word_tokenizer(folder)
    on_ranks(models.import_hf, 1, ONE, folder, tmp_path / "ckpt", ONE)
    export(tmp_path / "ckpt", out)
    torch.save(models.tokens(), answer)
    paths = os.environ | {"PYTHONPATH": os.environ["MINITRON_OLD_TRANSFORMERS"]}
    subprocess.run([sys.executable, "-c", OLD_TRANSFORMERS, out, answer], check=True, env=paths)
    version, dtype, ids, logits = torch.load(answer)
    assert version.startswith("4.") and dtype == "torch.float32" and ids == [3, 7, 4]
    assert (logits - models.hf_logits(out, models.tokens())).abs().max() <= 2e-5
