"""Other tools' models in and out: a failure means that a model of theirs becomes another one here, or ours there."""

import inspect
import io
import json
import pickle
import shutil
import unicodedata
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen2Tokenizer

from minitron_mcore.config import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks
from tests import families, gguf_files, models
from tests.gguf_files import Q
from tests.test_launch import launch
from tests.test_prune import export

VOCAB, PADDED = models.SIZES["vocab_size"], 128
ONE, TP2, PP2 = ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
# What Megatron-LM's options make of the same model: GPTModel.sharded_state_dict's metadata.
VARIANTS = {
    "default": {},
    "layer by layer": {"non_homogeneous_layers": True},
    "single shards": {"singleton_local_shards": True},
}


def gpt_model(parallel, vocab=PADDED, **changes):
    """megatron-core's own GPTModel of the sizes in tests.models, with random weights; `changes` of its config."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from minitron_mcore import runtime

    sizes = models.SIZES
    options = dict(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        kv_channels=sizes["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.15,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=3 if parallel.pipeline == 2 else None,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    config = TransformerConfig(**(options | changes))
    spec = get_gpt_layer_local_spec(
        normalization=config.normalization, num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    torch.manual_seed(7)
    model = GPTModel(
        config,
        spec,
        vocab_size=vocab,
        max_sequence_length=sizes["max_position_embeddings"],
        pre_process=runtime.is_first_stage(),
        post_process=runtime.is_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000,
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval()


def gpt_logits(model, ids):
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(ids, positions, None)[..., :VOCAB]


def load_gpt(model, folder, strict="raise_all"):
    """As strictly as megatron-core can, unless told otherwise: nothing missing, nothing too many."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict=strict)
    for key in ("checkpoint_version", "iteration"):
        state.pop(key)
    model.load_state_dict(state)


def keep_norm_names(model):
    """As a layer spec does that doesn't name its norms after the linear layers behind them."""
    for layer in model.decoder.layers:
        layer.submodules_config.sharded_state_dict_keys_map = {}


def write_gpt(out_dir, parallel, ids=None, resave=None, variant="default", plain=False, changes=None):
    """Save a GPTModel as Megatron-LM does; its logits where a rank has all of it. `resave`: whose weights it takes."""
    from megatron.core import dist_checkpointing

    model = gpt_model(parallel, **(changes or {}))
    if resave:
        load_gpt(model, resave / "iter_0000003")
    if plain:
        keep_norm_names(model)
    folder = out_dir / "iter_0000003"
    folder.mkdir(parents=True, exist_ok=True)
    state = model.sharded_state_dict(metadata=dict(VARIANTS[variant]) or None)
    state |= {"iteration": 3, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(folder), async_strategy="mcore")
    (out_dir / "latest_checkpointed_iteration.txt").write_text("3\n")
    return None if ids is None else gpt_logits(model, ids)


def read_gpt(folder, parallel, ids, names, changes=None):
    """Logits of a GPTModel that loads `folder` as Megatron-LM does."""
    model = gpt_model(parallel, **(changes or {}))
    if names == "plain":
        keep_norm_names(model)
    # Transformer Engine's norms have an empty state of their own, which the local spec's GPTModel doesn't ask for.
    load_gpt(model, folder / "release", "assume_ok_unexpected" if names == "te" else "raise_all")
    return gpt_logits(model, ids)


def convert(model, source, out_dir, parallel, dtype=torch.float32):
    from minitron_mcore.models import hf, sources

    with sources.opened(model, source, dtype) as (folder, weights):
        hf.import_folder(folder, out_dir, parallel, weights=weights)


def export_gpt(checkpoint, out_dir, parallel, options):
    from minitron_mcore.checkpoint import open_checkpoint
    from minitron_mcore.models import gpt

    out_dir.mkdir(parents=True, exist_ok=True)
    gpt.export_folder(open_checkpoint(checkpoint), out_dir, parallel, "fp32", **options)


def logits(checkpoint, ids):
    [found] = on_ranks(models.mcore_logits, 1, ONE, checkpoint, ONE, ids)
    return found


def stored(checkpoint) -> dict[str, torch.Tensor]:
    from minitron_mcore.checkpoint import open_checkpoint
    from minitron_mcore.models import table
    from minitron_mcore.stream import Reader

    opened = open_checkpoint(checkpoint)
    return whole(Reader(opened), table.parameters(opened.arch))


def whole(weights, parameters) -> dict[str, torch.Tensor]:
    return {p.name: weights.read(p, (0,) * len(p.shape), p.shape) for p in parameters}


def same(a, b) -> bool:
    first, second = stored(a), stored(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A GPTModel's checkpoint as megatron-core writes it on one rank, token ids, its logits, and a config.json of it."""
    base, ids = tmp_path_factory.mktemp("gpt"), models.tokens()
    [expected] = on_ranks(write_gpt, 1, ONE, base / "megatron", ONE, ids)
    config = models.SIZES | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (base / "hf").mkdir()
    (base / "hf/config.json").write_text(json.dumps(config))
    return base, ids, expected


CASES = {
    "dp2": (ONE, "default", False),
    "tp2": (TP2, "default", False),
    "pp2, norms' own names": (PP2, "default", True),
    "tp2, layer by layer": (TP2, "layer by layer", False),
    "pp2, single shards": (PP2, "single shards", True),
}


@pytest.mark.parametrize(("parallel", "variant", "plain"), CASES.values(), ids=CASES)
def test_gptmodel_is_read(tmp_path, trained, parallel, variant, plain):
    """Written by megatron-core in several layouts and variants, read here: the same logits."""
    base, ids, expected = trained
    found = on_ranks(resave_and_read, 2, parallel, tmp_path, parallel, base, ids, variant, plain)
    assert (next(x for x in found if x is not None) - expected).abs().max() <= 2e-4


def resave_and_read(folder, parallel, base, ids, variant, plain):
    write_gpt(folder / "megatron", parallel, None, base / "megatron", variant, plain)
    torch.distributed.barrier()
    convert(base / "hf", folder / "megatron", folder / "ckpt", parallel)
    return models.mcore_logits(folder / "ckpt", parallel, ids)


@pytest.fixture(scope="module")
def read(trained, tmp_path_factory):
    """The GPTModel as a checkpoint of ours, read on two ranks from what one wrote."""
    base, ids, expected = trained
    folder = tmp_path_factory.mktemp("read") / "ckpt"
    on_ranks(convert, 2, TP2, base / "hf", base / "megatron", folder, TP2)
    assert (logits(folder, ids) - expected).abs().max() <= 2e-4
    return folder


@pytest.mark.parametrize(
    ("parallel", "names"), [(ONE, "local"), (TP2, "te"), (PP2, "plain")], ids=["dp2", "tp2", "pp2"]
)
def test_gptmodel_loads_what_we_export(tmp_path, trained, read, parallel, names):
    """Strictly, in another layout than it was written; and back again, bit by bit."""
    base, ids, expected = trained
    on_ranks(export_gpt, 2, parallel, read, tmp_path / "out", parallel, {"names": names, "vocab_multiple": 64})
    head = pickle.loads((tmp_path / "out/release/.metadata").read_bytes()).state_dict_metadata["output_layer.weight"]
    assert tuple(head.size) == (128, models.SIZES["hidden_size"])
    [found] = on_ranks(read_gpt, 1, ONE, tmp_path / "out", ONE, ids, names)
    assert (found - expected).abs().max() <= 1e-5
    on_ranks(convert, 1, ONE, tmp_path / "out/hf", tmp_path / "out", tmp_path / "back", ONE)
    assert same(read, tmp_path / "back")


FAMILIES = {
    "qwen2": ({"architectures": ["Qwen2ForCausalLM"]}, {"add_qkv_bias": True}),
    "qwen3_moe": (
        {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        | {"moe_intermediate_size": models.SIZES["intermediate_size"]},
        {"qk_layernorm": True, "num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
        | {"moe_ffn_hidden_size": models.SIZES["intermediate_size"], "moe_token_dispatcher_type": "alltoall"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_norms_and_experts(tmp_path, trained, family):
    """A family's further tensors, written by megatron-core, through here, and read by megatron-core again: the same logits."""
    base, ids, _ = trained
    config, changes = FAMILIES[family]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(json.loads((base / "hf/config.json").read_text()) | config))
    [(first, here, last)] = on_ranks(there_and_back, 1, ONE, tmp_path, ids, changes)
    assert (here - first).abs().max() <= 2e-4
    assert torch.equal(last, first)


def there_and_back(folder, ids, changes):
    first = write_gpt(folder / "megatron", ONE, ids, changes=changes)
    convert(folder / "hf", folder / "megatron", folder / "ckpt", ONE)
    here = models.mcore_logits(folder / "ckpt", ONE, ids)
    export_gpt(folder / "ckpt", folder / "out", ONE, {"names": "local"})
    return first, here, read_gpt(folder / "out", ONE, ids, "local", changes)


@pytest.mark.parametrize("family", ["nemotron", "qwen3", "mixtral"])
def test_names_are_megatron_cores(tmp_path, family):
    """megatron-core's own map from HybridModel to GPTModel finds every tensor that we export, where we put it."""
    folder = families.tiny(family, tmp_path / "hf")
    on_ranks(load_through_interop, 1, ONE, folder, tmp_path)


def load_through_interop(folder, base):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import gpt_checkpoint_interop as interop

    from minitron_mcore.checkpoint import build_model, open_checkpoint

    models.import_hf(folder, base / "ckpt", ONE)
    export_gpt(base / "ckpt", base / "out", ONE, {"names": "plain"})
    opened = open_checkpoint(base / "ckpt")
    model = build_model(opened, ONE, "fp32")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
    for parameter in model.parameters():
        parameter.data.zero_()
    maps = interop.gpt_compatible_layer_maps(("*E" if opened.arch.experts else "*-") * opened.arch.blocks)
    state = model.sharded_state_dict()
    interop.retarget_sharded_state_dict_to_gpt_checkpoint(state, maps)
    state = dist_checkpointing.load(state, str(base / "out/release"), strict="raise_all")
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in model.state_dict()})
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.items())


class Attack:
    """A pickle that leaves a trace when it is run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def break_metadata(folder, change):
    index = folder / ".metadata"
    found = pickle.loads(index.read_bytes())
    change(found)
    index.write_bytes(pickle.dumps(found))


def set_size(found, key, size):
    found.state_dict_metadata[key].size = torch.Size(size)


def escape(found):
    next(iter(found.storage_data.values())).relative_path = "../iter_0000003/__0_0.distcp"


def lose_chunk(found):
    found.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()


FC1, QKV = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.self_attention.linear_qkv.weight"
DAMAGE = {
    "missing": (lambda f: break_metadata(f, lambda m: m.state_dict_metadata.pop(QKV)), f"tensor {QKV} is missing"),
    "shape": (
        lambda f: break_metadata(f, lambda m: set_size(m, FC1, (5, 62, 36))),
        rf"{FC1} .*\(5, 62, 36\), but .*\(5, 60",
    ),
    "vocabulary too small": (
        lambda f: break_metadata(f, lambda m: set_size(m, "output_layer.weight", (100, 36))),
        r"output_layer.weight .*\(100, 36\), but .*\(101, 36\)",
    ),
    "too many": (
        lambda f: break_metadata(
            f,
            lambda m: m.state_dict_metadata.update(
                {"decoder.layers.mlp.linear_fc2.bias": m.state_dict_metadata["decoder.final_layernorm.weight"]}
            ),
        ),
        "holds decoder.layers.mlp.linear_fc2.bias, which the model of config.json has no place for",
    ),
    "another model": (
        lambda f: break_metadata(f, lambda m: m.state_dict_metadata.pop("embedding.word_embeddings.weight")),
        "holds no GPTModel",
    ),
    "holes": (lambda f: break_metadata(f, lose_chunk), f"{FC1} .* has holes"),
    "another folder": (lambda f: break_metadata(f, escape), r"incomplete \(no \.\./iter_0000003/__0_0.distcp in it\)"),
    "cut index": (
        lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:-50]),
        r"damaged or incomplete \(.metadata: ",
    ),
    "no index": (lambda f: (f / ".metadata").unlink(), "no file .metadata"),
    "cut shard": (
        lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:2000]),
        "cannot be read",
    ),
    "no step": (lambda f: f.rename(f.with_name("gone")), "names iter_0000003, which is not there"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_gptmodels_are_refused(tmp_path, trained, kind):
    base, (damage, sentence) = trained[0], DAMAGE[kind]
    shutil.copytree(base / "megatron", tmp_path / "megatron")
    damage(tmp_path / "megatron/iter_0000003")
    with pytest.raises(UserError, match=sentence):
        read_all(base / "hf", tmp_path / "megatron")


def read_all(model, source):
    """Every tensor of a source, in this process."""
    from minitron_mcore.models import architecture, sources, table

    with sources.opened(model, source, torch.float32) as (folder, weights):
        arch, _ = architecture.read_hf(folder)
        weights.check(arch)
        return whole(weights, table.parameters(arch))


REFUSED = "asks for pathlib.*Path.touch, which has no place in a checkpoint's index"


@pytest.mark.parametrize("place", ["instead of the index", "within the index"])
def test_an_index_that_runs_code_is_refused(tmp_path, trained, place):
    shutil.copytree(trained[0] / "megatron/iter_0000003", tmp_path / "step")
    attack, index = Attack(tmp_path / "trace"), tmp_path / "step/.metadata"
    if place == "within the index":
        break_metadata(tmp_path / "step", lambda found: setattr(found, "planner_data", attack))
    else:
        index.write_bytes(pickle.dumps(attack))
    with pytest.raises(UserError, match=REFUSED):
        read_all(trained[0] / "hf", tmp_path / "step")
    assert not (tmp_path / "trace").exists()
    pickle.loads(index.read_bytes())
    assert (tmp_path / "trace").exists(), "the attack works where it is let run"


def test_a_checkpoint_of_ours_that_runs_code_is_refused(tmp_path, read):
    """Its manifest agrees with it; megatron-core's reader would run it."""
    from minitron_mcore import checkpoint, stream

    shutil.copytree(read, tmp_path / "ckpt")
    opened = checkpoint.open_checkpoint(tmp_path / "ckpt")
    break_metadata(opened.step_dir, lambda found: setattr(found, "planner_data", Attack(tmp_path / "trace")))
    manifest = json.loads((opened.step_dir / "integrity.json").read_text())
    manifest["files"][".metadata"] = stream.sha256(opened.step_dir / ".metadata")
    (opened.step_dir / "integrity.json").write_text(json.dumps(manifest))
    for load in (stream.Reader, lambda x: checkpoint.load(x, {})):
        with pytest.raises(UserError, match=REFUSED):
            load(opened)
    assert not (tmp_path / "trace").exists()


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GGUF_SIZES = dict(
    vocab_size=288, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, head_dim=16
)
MIXED = {"q_proj": Q.F16, "k_proj": Q.BF16, "v_proj": Q.Q4_1, "up_proj": Q.F32, "embed_tokens": Q.Q4_0}
GGUF = {
    "llama31": ("llama", "llama-bpe", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}}),
    "llama32": ("llama", "smollm", {"rope_parameters": families.PLAIN}),
    "qwen2": ("qwen2", "qwen2", {"head_dim": 8}),
    "qwen25_tied": ("qwen2", "qwen2", {"head_dim": 8}),
}


def stored_as(name: str):
    return MIXED.get(name.split(".")[-2], Q.Q8_0)


@pytest.mark.parametrize("which", GGUF)
def test_gguf_is_read(tmp_path, which):
    """Weights are the blocks' values, in the rows that transformers reads them to; config and logits the original's."""
    name, pre, sizes = GGUF[which]
    folder = families.tiny(which, tmp_path / "hf", **(GGUF_SIZES | sizes))
    file, ids = gguf_files.write(tmp_path / "model.gguf", folder, name, stored_as, pre), models.tokens()
    [found, _] = on_ranks(convert_and_run, 2, TP2, file, file, tmp_path / "ckpt", TP2, ids)
    weights = models.weights(folder)
    for key, weight in weights.items():  # rows are quantised each alone, so their order doesn't matter
        if weight.ndim > 1:
            kind = stored_as(key)
            weights[key] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind).copy())
    back = export(tmp_path / "ckpt", tmp_path / "out")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in back.items())
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in back.items())
    given, got = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    same = "architectures hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size rms_norm_eps"
    same += " tie_word_embeddings max_position_embeddings num_hidden_layers rope_parameters"
    assert {key: got[key] for key in same.split()} == {key: given[key] for key in same.split()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert (found - models.hf_logits(folder, ids)).abs().max() <= 2e-4


def convert_and_run(model, source, out_dir, parallel, ids):
    convert(model, source, out_dir, parallel)
    return models.mcore_logits(out_dir, parallel, ids)


TEXTS = [
    "a\n\n  12345 a end café",
    "cafe\u0301 1a2 — 日本語 😀",
    "▁ naïve — 日本語 😀\r\n\tend  ",
    "I'LL don't",
    " ",
    "<|im_start|>a<|im_end|>",
]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_byte_level_tokenizer(tmp_path, pre):
    folder = families.tiny("llama32", tmp_path / "hf", **GGUF_SIZES)
    tokenizer = read_tokenizer(gguf_files.write(tmp_path / "model.gguf", folder, "llama", Q.F16, pre), tmp_path / "out")
    tokens, merges = gguf_files.byte_tokens(GGUF_SIZES["vocab_size"])
    begin = [tokens[1]] if pre == "llama-bpe" else []
    digits = {"llama-bpe": ["123", "4", "5"], "qwen2": [*"12345"], "smollm": [*"12345"], "gpt-2": ["1234", "5"]}[pre]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12345").input_ids) == [*begin, "a", *digits]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    for text in TEXTS:
        decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens="im_start" not in text)
        assert decoded.removeprefix("".join(begin)) == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)
    if pre == "qwen2":
        vocab = {token: i for i, token in enumerate(tokens)}
        theirs = Qwen2Tokenizer(
            vocab, [tuple(merge.split()) for merge in merges], extra_special_tokens=gguf_files.SPECIAL
        )
        assert [tokenizer(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


def test_sentencepiece_tokenizer(tmp_path):
    """Llama 2's kind: the same ids as the sentencepiece library's own, from its vocabulary."""
    pieces = io.BytesIO()
    text = [" ".join(inspect.getsource(module).split("\n")) for module in (inspect, json, shutil)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=pieces, model_type="bpe", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentence_length=10**6, minloglevel=2,
    )  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(model_proto=pieces.getvalue())
    ids = range(oracle.get_piece_size())
    types = [2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1 for i in ids]
    vocabulary = [oracle.id_to_piece(i) for i in ids], [oracle.get_score(i) for i in ids], types
    folder = families.tiny("llama2", tmp_path / "hf", **(GGUF_SIZES | {"vocab_size": len(types)}))
    file = gguf_files.write(tmp_path / "model.gguf", folder, "llama", Q.F16, vocabulary=vocabulary)
    tokenizer = read_tokenizer(file, tmp_path / "out")
    for line in [*TEXTS[:2], *TEXTS[3:5], "def load(path):\n    return json.loads(path)  # " + "x" * 30]:
        assert tokenizer(line).input_ids == [1, *oracle.encode(line)], line
        assert tokenizer.decode(tokenizer(line).input_ids, skip_special_tokens=True) == line


def read_tokenizer(file, folder):
    from minitron_mcore.models import gguf_file, gguf_tokenizer

    gguf_tokenizer.read(gguf_file.File(file, torch.float32)).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


PLAIN = GGUF_SIZES | {"rope_parameters": families.PLAIN}
GGUF_MISTAKES = {  # 64 original positions and a factor of 4 are not Llama 3's
    "rope": ("llama", "llama31", GGUF_SIZES, "qwen2", "rope_freqs.weight in .* is not what RopeScaling.*8192.* makes"),
    "architecture": ("gemma2", "llama32", PLAIN, "qwen2", "holds a gemma2 model; supported in GGUF: llama, qwen2"),
    "biases": ("llama", "qwen2", PLAIN, "qwen2", "holds blk.0.attn_k.bias, which a llama model does not have"),
    "no biases": ("qwen2", "llama32", PLAIN | {"head_dim": 8}, "qwen2", "blk.0.attn_q.bias is missing"),
    "pre-tokenizer": (
        "llama",
        "llama32",
        PLAIN,
        "deepseek-llm",
        "pre-tokenizer 'deepseek-llm'; supported: gpt-2, smollm",
    ),
}


@pytest.mark.parametrize(("name", "which", "sizes", "pre", "sentence"), GGUF_MISTAKES.values(), ids=GGUF_MISTAKES)
def test_bad_ggufs_are_refused(tmp_path, name, which, sizes, pre, sentence):
    folder = families.tiny(which, tmp_path / "hf", **sizes)
    file = gguf_files.write(tmp_path / "model.gguf", folder, name, Q.Q8_0, pre)
    with pytest.raises(UserError, match=sentence):
        read_all(file, file)


def test_cut_ggufs_are_refused(tmp_path):
    folder = families.tiny("llama32", tmp_path / "hf", **PLAIN)
    file = gguf_files.write(tmp_path / "model.gguf", folder, "llama", Q.Q8_0)
    whole = file.read_bytes()
    for size in (0, 3, 1000, len(whole) - 5000):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a whole GGUF file"):
            read_all(file, file)
    gguf_files.write(file, folder, "llama", Q.Q8_0, parts=3)
    with pytest.raises(UserError, match="is one of 3 parts"):
        read_all(file, file)
    with pytest.raises(UserError, match="no GGUF file at"):
        read_all(tmp_path / "none.gguf", tmp_path / "none.gguf")


def test_launch_files(tmp_path, trained):
    """As users type it: Megatron-LM's folder in, Megatron-LM's folder out."""
    base, _, _ = trained
    model = ["model.name=tiny", f"model.hf={base / 'hf'}", "dtype=fp32"]
    launch(tmp_path, "convert", *model, f"model.weights={base / 'megatron'}")
    output = launch(tmp_path, "export", *model, "source=runs/tiny/convert", "format=gpt", "parallel=tp2", processes=2)
    assert "runs/tiny/gpt" in output
    given, back = (read_all(base / "hf", folder) for folder in (base / "megatron", tmp_path / "runs/tiny/gpt"))
    assert all(torch.equal(given[name], back[name]) for name in given)


def export_by_modelopt(shipped, out_dir, ids, sizes):
    """What ModelOpt's exporter writes of a pruned GPTModel, given the folder of the whole model; the GPTModel's logits."""
    from modelopt.torch.export import export_mcore_gpt_to_hf

    model = gpt_model(ONE, vocab=VOCAB, **sizes)
    export_mcore_gpt_to_hf(model, str(shipped), dtype=torch.float32, export_dir=str(out_dir))
    return gpt_logits(model, ids)


def test_modelopts_pruned_folder_is_a_student(tmp_path):
    """Fewer layers, channels and heads than the model it was pruned from; ModelOpt's state beside it is left alone."""
    whole, ids = (
        families.tiny("llama2", tmp_path / "whole", num_hidden_layers=5, num_key_value_heads=6),
        models.tokens(),
    )
    sizes = {"hidden_size": 30, "ffn_hidden_size": 22, "num_layers": 3, "num_attention_heads": 6}
    [expected] = on_ranks(export_by_modelopt, 1, ONE, whole, tmp_path / "pruned", ids, sizes)
    (tmp_path / "pruned/modelopt_state.pth").write_bytes(pickle.dumps(Attack(tmp_path / "trace")))
    [found, _] = on_ranks(
        convert_and_run, 2, TP2, tmp_path / "pruned", tmp_path / "pruned", tmp_path / "ckpt", TP2, ids
    )
    assert (found - expected).abs().max() <= 2e-4
    assert (found - models.hf_logits(tmp_path / "pruned", ids)).abs().max() <= 2e-4
    assert sorted(path.name for path in (tmp_path / "ckpt/hf").iterdir()) == ["config.json", "generation_config.json"]
    assert not (tmp_path / "trace").exists()


# ModelOpt's Puzzletron wants a package that isn't installed here: written after its block_config.py.
BLOCK = {"attention": {"no_op": False, "num_key_value_heads": 6}, "ffn": {"no_op": False, "intermediate_size": 30}}


def test_puzzletrons_mixed_blocks_are_refused(tmp_path):
    folder = families.tiny("llama31", tmp_path / "hf")
    other = BLOCK | {"ffn": {"no_op": True}}
    for differing in ({"block_configs": [BLOCK, BLOCK, other]}, {"per_layer_config": {"2": {"skip": ["mlp"]}}}):
        models.edit_config(folder, **(dict.fromkeys(["block_configs", "per_layer_config"]) | differing))
        with pytest.raises(UserError, match="LlamaForCausalLM whose blocks differ"):
            read_all(folder, folder)
    models.edit_config(folder, block_configs=[BLOCK] * 3, per_layer_config=None)
    assert read_all(folder, folder)
