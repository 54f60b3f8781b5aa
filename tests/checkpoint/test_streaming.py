"""Checkpoints in pieces, and the direct way from folder to folder: a failure means weights that differ by the way they took, damage
that goes unnoticed, or memory that grows with the model."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_mcore.checkpoint import disk, steps
from minitron_mcore.checkpoint.claim import new_run_folder
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.errors import UserError
from minitron_mcore.formats import hf_convert
from minitron_mcore.formats import hf_folder as folders
from minitron_mcore.pruning import apply
from minitron_mcore.pruning.plan import make_plan
from minitron_mcore.testing import on_ranks
from tests.helpers import models
from tests.helpers.cutting import cut_by_hand, random_scores
from tests.helpers.memory import peak_growth

TWO = ParallelConfig(tensor=2)


def import_in_pieces(elements, folder, out_dir, parallel) -> str:
    disk.PIECE_ELEMENTS, disk.FILE_ELEMENTS = elements, 4 * elements
    hf_convert.import_folder(folder, out_dir, parallel)
    return open_checkpoint(out_dir).fingerprint


def prune_in_pieces(elements, source, plan, out_dir, parallel) -> str | None:
    """What a user is told, if anything."""
    disk.PIECE_ELEMENTS, disk.FILE_ELEMENTS = elements, 4 * elements
    try:
        apply.prune(open_checkpoint(source), plan, out_dir, parallel)
    except UserError as error:
        return str(error)


def plan_for(checkpoint: Path, **targets):
    opened = open_checkpoint(checkpoint)
    return make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), PruneConfig(**targets))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_direct_way_gives_the_same_files(tmp_path, monkeypatch, tied):
    folder = models.tiny_llama(tmp_path / "hf", tied=tied)
    # Pieces of a few rows, which cut every tensor and fit no shard of the other layout; files of a few tensors.
    on_ranks(import_in_pieces, 2, TWO, 500, folder, tmp_path / "parent", TWO)
    plan = plan_for(tmp_path / "parent", hidden=24, ffn=17, heads=6, blocks=3)
    three = ParallelConfig(tensor=3)
    assert on_ranks(prune_in_pieces, 3, three, 300, tmp_path / "parent", plan, tmp_path / "pruned", three) == [None] * 3
    monkeypatch.setattr(disk, "PIECE_ELEMENTS", 400)
    monkeypatch.setattr(folders, "MAX_FILE_BYTES", 20_000)
    for name in ("long", "direct"):
        (tmp_path / name).mkdir()
    counts = (
        hf_convert.export_folder(open_checkpoint(tmp_path / "pruned"), tmp_path / "long"),
        apply.cut_folder(folder, plan, tmp_path / "direct"),
    )
    long, direct = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("long", "direct"))
    assert len(direct) > 5 and "model.safetensors.index.json" in direct
    assert long == direct
    found, expected = models.weights(tmp_path / "direct"), cut_by_hand(models.weights(folder), plan, tied)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    assert counts == (sum(t.numel() for t in found.values()),) * 2
    ids = models.tokens()
    assert torch.equal(models.hf_logits(tmp_path / "long", ids), models.hf_logits(tmp_path / "direct", ids))


def cut(folder, plan, out_dir) -> None:
    with new_run_folder(out_dir, {}) as new:
        apply.cut_folder(folder, plan, new)


def test_a_plan_for_another_folder_is_refused(tmp_path):
    """By its sizes at once, by its weights at the end: either way nothing is left behind."""
    folder = models.tiny_llama(tmp_path / "hf")
    on_ranks(models.import_hf, 1, ParallelConfig(), folder, tmp_path / "parent", ParallelConfig())
    plan = plan_for(tmp_path / "parent", hidden=24)
    for sentence, other in (
        (f"the plan is for model {plan.fingerprint}, but .*other1 is", {"seed": 1}),
        ("the plan is for a model whose blocks is 5, but .*other2 has 4", {"num_hidden_layers": 4}),
    ):
        name = "other1" if "seed" in other else "other2"
        with pytest.raises(UserError, match=sentence):
            cut(models.tiny_llama(tmp_path / name, **other), plan, tmp_path / "cut")
        assert not list(tmp_path.glob("cut*"))
    cut(folder, plan, tmp_path / "cut")
    assert (tmp_path / "cut/model.safetensors").is_file()


def test_fingerprints_name_the_weights(tmp_path):
    """Not the files, dtypes' padding or layout that hold them; one element makes another name."""
    folder = models.tiny_llama(tmp_path / "hf", tied=True)
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    for part in ("split", "changed"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_bytes((folder / "config.json").read_bytes())
    for n in (0, 1):
        save_file({name: weights[name] for name in names[n::2]}, tmp_path / f"split/model-{n}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"model-{n % 2}.safetensors" for n, name in enumerate(names)}}
    (tmp_path / "split/model.safetensors.index.json").write_text(json.dumps(index))
    weights[names[-1]].view(-1)[-1] += 1
    save_file(weights, tmp_path / "changed/model.safetensors")
    found = {}
    for n, (source, world, parallel) in enumerate(
        [
            ("hf", 1, ParallelConfig()),
            ("hf", 4, ParallelConfig(tensor=2, pipeline=2)),
            ("split", 2, TWO),
            ("changed", 2, TWO),
        ]
    ):
        out_dir = tmp_path / f"ckpt{n}"
        found[n] = set(on_ranks(import_in_pieces, world, parallel, 500, tmp_path / source, out_dir, parallel))
    assert found[0] == found[1] == found[2] != found[3] and len(found[0]) == 1


def test_the_manifest_names_every_file(tmp_path):
    folder = models.tiny_llama(tmp_path / "hf")
    on_ranks(import_in_pieces, 2, TWO, 500, folder, tmp_path / "parent", TWO)
    step = open_checkpoint(tmp_path / "parent").step_dir
    found, sizes = steps.read_manifest(step)
    files = {file.name: file.read_bytes() for file in step.iterdir() if file.name != "integrity.json"}
    assert found == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert sizes == {name: len(content) for name, content in files.items()}
    pieces = [content for name, content in files.items() if name.endswith(".distcp")]
    assert len(pieces) > 10


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_told_on_every_rank(tmp_path, damage):
    folder = models.tiny_llama(tmp_path / "hf")
    on_ranks(models.import_hf, 2, TWO, folder, tmp_path / "parent", TWO)
    plan = plan_for(tmp_path / "parent", ffn=18)
    # A piece of the second rank: the first meets no damage of its own.
    piece = max((tmp_path / "parent").glob("step_*/__1_*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes({"flipped": content, "truncated": content[:-1000], "missing": b""}[damage])
    if damage == "missing":
        piece.unlink()
    told = on_ranks(prune_in_pieces, 2, TWO, 1 << 20, tmp_path / "parent", plan, tmp_path / "pruned", TWO)
    assert told[0] == told[1] and "damaged or incomplete" in told[0] and piece.name in told[0]
    assert not steps.published(tmp_path / "pruned")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"damaged or incomplete.*{piece.name}"):
        hf_convert.export_folder(open_checkpoint(tmp_path / "parent"), tmp_path / "out")


def import_peak(folder, out_dir, parallel) -> int:
    return peak_growth(lambda: import_in_pieces(1 << 17, folder, out_dir, parallel))


def prune_peak(source, plan, out_dir, parallel) -> int:
    return peak_growth(lambda: prune_in_pieces(1 << 17, source, plan, out_dir, parallel))


@pytest.mark.slow
def test_memory_is_that_of_pieces(tmp_path, monkeypatch):
    """Weights of 330 MB in pieces of 512 KB: no stage may hold an eighth of them."""
    folder = models.tiny_llama(tmp_path / "hf", vocab_size=40001, hidden_size=960, intermediate_size=960)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 300e6
    limit = size / 8
    assert max(on_ranks(import_peak, 2, TWO, folder, tmp_path / "parent", TWO)) < limit
    plan = plan_for(tmp_path / "parent", hidden=840)
    assert max(on_ranks(prune_peak, 2, TWO, tmp_path / "parent", plan, tmp_path / "pruned", TWO)) < limit
    monkeypatch.setattr(disk, "PIECE_ELEMENTS", 1 << 17)
    for name in ("long", "direct"):
        (tmp_path / name).mkdir()
    assert (
        peak_growth(lambda: hf_convert.export_folder(open_checkpoint(tmp_path / "pruned"), tmp_path / "long")) < limit
    )
    assert peak_growth(lambda: apply.cut_folder(folder, plan, tmp_path / "direct")) < limit
