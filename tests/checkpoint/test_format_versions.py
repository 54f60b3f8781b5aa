"""Artefacts carry `format_version`: a failure means that a file of a later format would be misread, or one of today's refused."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_mcore.checkpoint import run_folder
from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.depth import study
from minitron_mcore.distill.cache import open_teacher
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import load_scores, save_scores
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.plan import load_plan, make_plan
from minitron_mcore.reporting import artefacts
from tests.helpers.cutting import random_scores

ARCH = Architecture("llama", 2, 36, 30, 12, 4, 8, 101, 256, 1e-5, 1e4, None, tied=False)
FINGERPRINT = "f" * 16


def plan_text() -> str:
    return make_plan(ARCH, FINGERPRINT, random_scores(ARCH), PruneConfig(hidden=24)).to_json()


def model_json(folder: Path) -> str:
    (folder / "step_0000000").mkdir()
    (folder / "step_0000000" / "integrity.json").write_text('{"files": {}}')
    run_folder.describe(folder, ARCH, FINGERPRINT, {}, folder)
    return (folder / "model.json").read_text()


def cache_index() -> str:
    teacher = {"path": "/teacher", "step": "step_0000000", "fingerprint": FINGERPRINT}
    counts = {"samples": 2, "file_samples": 2, "sequence_length": 8, "seed": 1, "data": [], "order": "x"}
    content = {
        "kind": "hidden",
        "top_k": None,
        "dtype": "fp32",
        "teacher": teacher,
        "architecture": ARCH.to_json(),
        "lineage": {},
        "files": {"samples_0000000": ""},
    } | counts
    return json.dumps({"format_version": 1} | content)


def depth_study() -> str:
    content = {"model": FINGERPRINT, "metric": "loss", "kind": "best", "drop": {"1": [0]}}
    return json.dumps({"format_version": 1} | content)


ARTEFACTS = {
    "model.json": (model_json, lambda file: run_folder.open_checkpoint(file.parent).arch),
    "plan.json": (lambda _: plan_text(), lambda file: load_plan(file).hidden),
    "index.json": (lambda _: cache_index(), lambda file: open_teacher(file.parent).arch),
    "depth.json": (lambda _: depth_study(), lambda file: study.load_study(file, FINGERPRINT)["drop"]),
    "search.json": (
        lambda _: json.dumps({"format_version": 1, "model": "x"}),
        lambda file: artefacts.read_json(file)["model"],
    ),
}
"""File name -> (what writes its text, given its folder; what reads it)."""


@pytest.mark.parametrize("name", ARTEFACTS)
def test_json_artefacts(tmp_path, name):
    make_text, load = ARTEFACTS[name]
    path, content = tmp_path / name, json.loads(make_text(tmp_path))
    assert content["format_version"] == 1
    path.write_text(json.dumps(content))
    expected = load(path)
    for version in (2, 0, "1", True, None):
        path.write_text(json.dumps(content | {"format_version": version}))
        message = rf"{name} has format_version {version!r}, but this version of minitron_mcore reads 1: .*"
        with pytest.raises(UserError, match=message):
            load(path)
    del content["format_version"]
    path.write_text(json.dumps(content))
    assert load(path) == expected


def test_scores(tmp_path):
    scores = random_scores(ARCH)
    scores.metadata["fingerprint"] = FINGERPRINT
    path = save_scores(tmp_path, scores)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format_version"] == "1"
    assert load_scores(path, ARCH, FINGERPRINT).digest() == scores.digest()
    save_file(scores.vectors, path, metadata=scores.metadata)
    assert load_scores(path, ARCH, FINGERPRINT).digest() == scores.digest()
    save_file(scores.vectors, path, metadata=scores.metadata | {"format_version": "2"})
    with pytest.raises(
        UserError, match="scores.safetensors has format_version 2, .* reads 1: run launch/importance.py"
    ):
        load_scores(path, ARCH, FINGERPRINT)


def test_a_plan_without_a_version_keeps_its_digest(tmp_path):
    """Lineages name plans by the hash of the file's text."""
    old = plan_text().replace('"format_version": 1,\n ', "")
    (tmp_path / "plan.json").write_text(old)
    assert load_plan(tmp_path / "plan.json").to_json() == old
