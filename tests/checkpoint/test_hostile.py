"""Hostile files: a failure means that a file ran code, or that a user sees a traceback instead of a sentence."""

import contextlib
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_mcore.checkpoint import run_folder, safe_metadata, streaming
from minitron_mcore.checkpoint.claim import claim_run_folder
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.data import tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.formats import gguf_file, hf_convert, sources
from minitron_mcore.importance.scores import load_scores
from minitron_mcore.models import parameter_table
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import gguf_files, hostile, models
from tests.helpers.models import read_all, whole
from tests.helpers.training import CONFIG, micro_batches

ONE = ParallelConfig()
KEY = "decoder.final_norm.weight"
GPT_KEY = "decoder.final_layernorm.weight"


def trainer(folder):
    from minitron_mcore.distill.trainer import Trainer

    config = dataclasses.replace(CONFIG, kd_weight=0.0, lm_weight=1.0)
    return Trainer(open_checkpoint(folder), None, config, ONE, "fp32")


def write(base: Path) -> None:
    """A model as Hugging Face folder, and as what each stage makes of it (one rank)."""
    from minitron_mcore.formats import megatron_gpt

    models.tiny_llama(base / "hf")
    hf_convert.import_folder(base / "hf", base / "convert", ONE)
    source = open_checkpoint(base / "convert")
    (base / "gpt").mkdir()
    megatron_gpt.export_folder(source, base / "gpt", ONE, "fp32")
    run_folder.describe(base / "run", source.arch, "test", {}, source.hf)
    made, batches = trainer(base / "convert"), micro_batches(CONFIG, 0, 0, 1)
    made.train_step([next(batches) for _ in range(CONFIG.global_batch)])
    made.save(base / "run")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    on_ranks(write, 1, ONE, folder)
    return folder


def export(folder: Path):
    out = folder.parent / "export"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return hf_convert.export_folder(open_checkpoint(folder), out)


def export_gpt(folder: Path):
    from minitron_mcore.formats import megatron_gpt

    out = folder.parent / "export"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return megatron_gpt.export_folder(open_checkpoint(folder), out, ONE, "fp32")


def read_pieces(folder: Path):
    source = open_checkpoint(folder)
    return whole(streaming.Reader(source), parameter_table.parameters(source.arch))


READERS = {
    "model": lambda folder: run_folder.build_model(open_checkpoint(folder), ONE, "fp32"),
    "pieces": read_pieces,
    "export": export,
    "export to GPTModel": export_gpt,
}
"""By what each stage reads a checkpoint: evaluate, importance, generate, distill and depth; prune and search; export."""


def tried(call) -> str:
    """The sentence that a user would see, or nothing where the file was read."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def attack_checkpoints(base: Path, folder: Path) -> dict:
    """Outcome of every attack by every reader: a sentence or nothing; a traceback fails the rank."""
    flag, found = folder / "flag", {}
    resume = {"resume": lambda path: trainer(base / "convert").resume(path)}
    for name, put in hostile.places(KEY).items():
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base / "run", copy)
        step = open_checkpoint(copy).step_dir
        put(step, hostile.Attack(flag))
        hostile.reseal(step)
        for reader, read in (READERS | resume).items():
            sentence = tried(lambda read=read, copy=copy: read(copy))
            found[name, reader] = (sentence, flag.exists())
            flag.unlink(missing_ok=True)
    return found


def test_no_checkpoint_of_ours_runs_code(tmp_path, base):
    """The common state above all: its reader in megatron-core unpickles anything."""
    [found] = on_ranks(attack_checkpoints, 1, ONE, base, tmp_path)
    assert not [case for case, (_, ran) in found.items() if ran]
    read = {case for case, (sentence, _) in found.items() if not sentence}
    # What reads tensors alone never opens a byte item or common.pt.
    harmless = {"common.pt", "common.pt, old", *(f"byte items, {name}" for name in hostile.PAYLOADS)}
    assert {name for name, _ in read} <= harmless
    assert not {reader for _, reader in read} & {"model", "resume"}
    for case, (sentence, _) in found.items():
        assert case in read or (len(sentence.splitlines()) == 1 and "copy" in sentence), (case, sentence)


def unguarded(step: Path) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.load({}, str(step))


@pytest.mark.parametrize("payload", hostile.PAYLOADS)
def test_the_attacks_run_where_nothing_guards(tmp_path, base, payload):
    step = shutil.copytree(base / "convert/step_0000000", tmp_path / "step")
    hostile.in_items(step, hostile.Attack(tmp_path / "flag"), hostile.PAYLOADS[payload])
    with contextlib.suppress(RankError):  # what comes after the attack
        on_ranks(unguarded, 1, ONE, step)
    assert (tmp_path / "flag").exists()


@pytest.mark.parametrize("place", hostile.places(GPT_KEY))
def test_no_gptmodel_runs_code(tmp_path, base, place):
    folder = shutil.copytree(base / "gpt", tmp_path / "gpt")
    hostile.places(GPT_KEY)[place](folder / "release", hostile.Attack(tmp_path / "flag"))
    sentence = tried(lambda: read_all(base / "hf", folder))
    assert not (tmp_path / "flag").exists()
    assert bool(sentence) != place.startswith(("common.pt", "byte items"))


def load_plain(folder: Path, wanted: dict) -> dict:
    return run_folder.load(open_checkpoint(folder), wanted)


def test_plain_common_state_is_read(base):
    """Also from common.pt, where older versions of megatron-core keep it."""
    [found] = on_ranks(load_plain, 1, ONE, base / "run", {})
    assert found["step"] == 1 and found["scheduler"]["max_lr"] == CONFIG.peak_lr


def test_common_pt_is_read(tmp_path, base):
    folder = shutil.copytree(base / "run", tmp_path / "run")
    step = open_checkpoint(folder).step_dir
    torch.save({"step": 7}, step / "common.pt")
    hostile.reseal(step)
    assert on_ranks(load_plain, 1, ONE, folder, {}) == [{"step": 7}]


MANIFESTS = {
    "{": "integrity.json cannot be read as JSON (JSONDecodeError",
    "[]": "integrity.json holds list",
    '{"files": {}}': "integrity.json does not list .metadata",
    '{"files": {".metadata": 1}}': "not all of its hashes are text",
    '{"files": {"../x": "0"}}': "it lists ../x",
    "[" * 100_000: "integrity.json cannot be read as JSON (RecursionError",
}


@pytest.mark.parametrize("text", MANIFESTS, ids=lambda text: text[:20])
def test_bad_manifests_are_named(tmp_path, base, text):
    folder = shutil.copytree(base / "convert", tmp_path / "copy")
    (open_checkpoint(folder).step_dir / "integrity.json").write_text(text)
    assert MANIFESTS[text] in tried(lambda: read_pieces(folder))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '{"architecture": []}', '{"architecture": {}}', "[" * 10**5]
)
def test_bad_descriptions_are_named(tmp_path, base, text):
    folder = shutil.copytree(base / "convert", tmp_path / "copy")
    (folder / "model.json").write_text(text)
    sentence = tried(lambda: open_checkpoint(folder))
    assert f"{folder}/model.json " in sentence and "\n" not in sentence


def index_claims(index) -> None:
    next(iter(index.storage_data.values())).length = 1 << 60


def overlap(index) -> None:
    entry = next(e for e in index.state_dict_metadata.values() if len(getattr(e, "size", ())) == 2)
    entry.chunks = [*entry.chunks, entry.chunks[0]]


CLAIMS = {
    "a length": (lambda step: hostile.edit_index(step, index_claims), "bytes, but .metadata asks for bytes"),
    "a part twice": (lambda step: hostile.edit_index(step, overlap), "has holes"),
    "a memo index": (lambda step: (step / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\xff."), "no|damaged"),
    "a bytearray": (lambda step: (step / ".metadata").write_bytes(b"\x80\x05\x96" + bytes(5) + b"\xff\0\0."), "KeyError"),
    "a compressed tensor": (lambda step: hostile.put_item(step, KEY, hostile.bomb(1 << 22)), "__9_0.distcp: .*claims to hold"),
    "not a torch file": (lambda step: hostile.put_item(step, KEY, b"x" * 999), "__9_0.distcp: BadZipFile"),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_claimed_sizes_of_a_checkpoint(tmp_path, base, claim):
    folder = shutil.copytree(base / "convert", tmp_path / "copy")
    change, sentence = CLAIMS[claim]
    step = open_checkpoint(folder).step_dir
    change(step)
    hostile.reseal(step)
    with pytest.raises(UserError, match=sentence):
        read_pieces(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", hostile.LONG_TO_HASH)
def test_an_index_that_takes_long_to_hash(tmp_path, name):
    (tmp_path / ".metadata").write_bytes(hostile.LONG_TO_HASH[name])
    with pytest.raises(UserError, match=r"\.metadata") as error:
        safe_metadata.read_metadata(tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("claim", hostile.GGUF_CLAIMS)
def test_claimed_sizes_of_a_gguf(tmp_path, claim):
    (tmp_path / "model.gguf").write_bytes(hostile.GGUF_CLAIMS[claim])
    with pytest.raises(UserError, match=r"model.gguf is not a whole GGUF file"):
        gguf_file.GGUFFile(tmp_path / "model.gguf", torch.float32)


def planted(folder: Path, text: str) -> str:
    return text.replace("FLAG", str(folder / "flag"))


def test_a_gguf_s_chat_template_is_text(tmp_path, base, monkeypatch):
    template = planted(tmp_path, hostile.TEMPLATE)
    monkeypatch.setattr(
        gguf_files.gguf.GGUFWriter,
        "add_chat_template",
        lambda self, _: self.add_string("tokenizer.chat_template", template),
    )
    folder = models.tiny_llama(tmp_path / "hf", vocab_size=288, hidden_size=96, intermediate_size=96)
    file = gguf_files.write(tmp_path / "model.gguf", folder, "llama", gguf_files.Q.F32)
    with sources.open_source(file, file, torch.float32) as (made, _):
        found = tokenizer.load(made)
        assert template in "".join(path.read_text() for path in made.glob("*") if path.suffix in (".jinja", ".json"))
    assert found.vocab_size and not (tmp_path / "flag").exists()


def test_no_code_beside_weights_runs(tmp_path, base):
    """auto_map in config and tokenizer, a .bin in place of weights: refused or passed over."""
    from minitron_mcore.export import transformers_check

    flag, folder = tmp_path / "flag", shutil.copytree(base / "hf", tmp_path / "hf")
    (folder / "custom.py").write_text(planted(tmp_path, hostile.REMOTE))
    models.edit_config(folder, auto_map={name: "custom.X" for name in ("AutoConfig", "AutoModelForCausalLM")})
    made = {
        "auto_map": {"AutoTokenizer": ["custom.X", None]},
        "tokenizer_class": "X",
        "chat_template": hostile.TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(planted(tmp_path, json.dumps(made)))
    for call in (
        lambda: read_all(folder, folder),
        lambda: transformers_check.load(folder),
        lambda: tokenizer.load(folder),
    ):
        tried(call)
        assert not flag.exists()
    (folder / "model.safetensors").unlink()
    for payload in hostile.PAYLOADS.values():
        for name in ("pytorch_model.bin", "model.pt", "model.safetensors"):
            (folder / name).write_bytes(payload(hostile.Attack(flag)))
            assert tried(lambda: read_all(folder, folder))
            assert tried(lambda: transformers_check.load(folder))
            assert tried(lambda name=name: read_all(folder, folder / name))
            assert not flag.exists()
            (folder / name).unlink()


def test_no_scores_run_code(tmp_path, base):
    arch, flag = open_checkpoint(base / "convert").arch, tmp_path / "flag"
    np.save(tmp_path / "a.npy", np.array([hostile.Attack(flag)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", x=np.array([hostile.Attack(flag)], dtype=object))
    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(hostile.Attack(flag)))
    for name in ("a.npy", "b.npz", "c.safetensors"):
        assert f"{name} is damaged or incomplete" in tried(lambda name=name: load_scores(tmp_path / name, arch, ""))
    assert not flag.exists()


@pytest.mark.parametrize("kind", hostile.YAML)
def test_no_config_runs_code(tmp_path, kind):
    """config.yaml of a folder that a run is to be written to."""
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    (out_dir / "config.yaml").write_text(planted(tmp_path, hostile.YAML[kind]))

    def claim():
        with claim_run_folder(out_dir, {"stage": "distill"}):
            pass

    assert f"{out_dir}" in tried(claim) and not (tmp_path / "flag").exists()


def count_readers(folder: Path) -> int:
    """How often a load asks `Files` for its index."""
    calls, original = [], safe_metadata.Files.read_metadata
    safe_metadata.Files.read_metadata = lambda self, *args, **kwargs: calls.append(1) or original(self)
    run_folder.build_model(open_checkpoint(folder), ONE, "fp32")
    return len(calls)


def test_megatron_core_reads_through_our_reader(base):
    """Common state and tensors. Fails when megatron-core makes its readers elsewhere: `distcp.load` must then guard that place."""
    assert on_ranks(count_readers, 1, ONE, base / "run") == [2]
