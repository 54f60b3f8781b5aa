"""GPTModel checkpoints in and out: a failure means that a model of Megatron-LM's becomes another one here, or ours there."""

import json
import pickle
import shutil

import pytest
import torch

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.gpt_models import read_gpt, write_gpt
from tests.helpers.hostile import Attack
from tests.helpers.launching import fork
from tests.helpers.models import convert, read_all, whole

ONE, TP2, PP2 = ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)


def export_gpt(checkpoint, out_dir, parallel, options):
    from minitron_mcore.checkpoint.run_folder import open_checkpoint
    from minitron_mcore.formats import megatron_gpt

    out_dir.mkdir(parents=True, exist_ok=True)
    megatron_gpt.export_folder(open_checkpoint(checkpoint), out_dir, parallel, "fp32", **options)


def logits(checkpoint, ids):
    [found] = on_ranks(models.mcore_logits, 1, ONE, checkpoint, ONE, ids)
    return found


def stored(checkpoint) -> dict[str, torch.Tensor]:
    from minitron_mcore.checkpoint.run_folder import open_checkpoint
    from minitron_mcore.checkpoint.streaming import Reader
    from minitron_mcore.models import parameter_table

    opened = open_checkpoint(checkpoint)
    return whole(Reader(opened), parameter_table.parameters(opened.arch))


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


@pytest.mark.default_cases("pp2, norms' own names")
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


@pytest.mark.default_cases("tp2")
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
    "qwen2": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, {"add_qkv_bias": True}),
    "qwen3_moe": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
        | {"norm_topk_prob": True, "moe_intermediate_size": models.SIZES["intermediate_size"]},
        {"qk_layernorm": True, "num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
        | {"moe_ffn_hidden_size": models.SIZES["intermediate_size"], "moe_token_dispatcher_type": "alltoall"},
    ),
}


@pytest.mark.default_cases("qwen3_moe")
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

    from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint

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
        "holds decoder.layers.mlp.linear_fc2.bias, which the model of config.json does not have",
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
        r"damaged or incomplete \(__0_0.distcp has 2000 bytes, but",
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


@pytest.mark.parametrize("text", ["", "\n", "iter_0000003", "-3", "3.0"])
def test_a_tracker_that_names_no_step_is_refused(tmp_path, trained, text):
    """Beside it stands release/, the starting weights, which must not be taken for the trained ones; Megatron-LM refuses it too."""
    base = trained[0]
    shutil.copytree(base / "megatron", tmp_path / "megatron")
    shutil.copytree(base / "megatron/iter_0000003", tmp_path / "megatron/release")
    (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match="latest_checkpointed_iteration.txt says .*, not a step's number or release"):
        read_all(base / "hf", tmp_path / "megatron")


REFUSED = "asks for pathlib.*Path.touch, which no checkpoint index contains"


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
    from minitron_mcore.checkpoint import disk, run_folder, streaming

    shutil.copytree(read, tmp_path / "ckpt")
    opened = run_folder.open_checkpoint(tmp_path / "ckpt")
    break_metadata(opened.step_dir, lambda found: setattr(found, "planner_data", Attack(tmp_path / "trace")))
    manifest = json.loads((opened.step_dir / "integrity.json").read_text())
    manifest["files"][".metadata"] = disk.sha256(opened.step_dir / ".metadata")
    (opened.step_dir / "integrity.json").write_text(json.dumps(manifest))
    for load in (streaming.Reader, lambda x: run_folder.load(x, {})):
        with pytest.raises(UserError, match=REFUSED):
            load(opened)
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
def test_launch_files(tmp_path, trained):
    """As users type it: Megatron-LM's folder in, Megatron-LM's folder out."""
    base, _, _ = trained
    model = ["model.name=tiny", f"model.hf={base / 'hf'}", "dtype=fp32"]
    fork(tmp_path, "convert", *model, f"model.weights={base / 'megatron'}")
    output = fork(tmp_path, "export", *model, "source=runs/tiny/convert", "format=gpt", "parallel=tp2", processes=2)
    assert "runs/tiny/gpt" in output
    given, back = (read_all(base / "hf", folder) for folder in (base / "megatron", tmp_path / "runs/tiny/gpt"))
    assert all(torch.equal(given[name], back[name]) for name in given)
