"""What lies beside exported weights: a failure means a card that lies, or a folder that others can't load."""

import dataclasses
import getpass
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from minitron_mcore.checkpoint import lineage
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.fields import is_changeable
from minitron_mcore.config.model import ModelConfig
from minitron_mcore.config.settings import (
    DataConfig,
    DistillConfig,
    HiddenStateLossConfig,
    OnPolicyConfig,
    PruneConfig,
)
from minitron_mcore.config.stages import STAGES, DistillRun
from minitron_mcore.data import datasets, token_cache
from minitron_mcore.errors import UserError
from minitron_mcore.export import model_card, transformers_check
from minitron_mcore.formats import hf_convert
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.importance.scores import Scores, load_scores, save_scores
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.pruning import apply
from minitron_mcore.pruning.plan import load_plan, make_plan
from minitron_mcore.reporting import artefacts
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models
from tests.helpers.cutting import ONE, cut_by_hand, random_scores, run_prune
from tests.helpers.launching import word_tokenizer
from tests.helpers.text_files import write_jsonl

SETTINGS = DistillConfig(steps=3, global_batch=2, sequence_length=12, warmup_steps=1, peak_lr=0.0123)
PARENTS_CARD = "---\nlicense: llama3.1\nlanguage:\n- en\n---\n# The parent\n"


def train(root: Path) -> str:
    """On every rank: distil `root`/pruned; the data's hash."""
    from minitron_mcore.distill import run

    config = DistillRun(
        model=ModelConfig(name="tiny", hf="hf"),
        data=DataConfig(train=[str(root / "text.jsonl")], cache=str(root / "cache")),
        distill=SETTINGS,
        student=str(root / "pruned"),
        teacher=str(root / "parent"),
        out_dir=str(root / "distill"),
    )
    student, teacher = open_checkpoint(config.student), open_checkpoint(config.teacher)
    run.train([config], SETTINGS, [student], teacher)
    return datasets.data_hash(token_cache.prepare(config.data, student.hf, student.arch.vocab)[0])


def deliver(source, folder: Path) -> str:
    folder.mkdir()
    hf_convert.export_folder(open_checkpoint(source), folder)
    return model_card.complete_folder(model_card.checkpoint_origin(open_checkpoint(source)), folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with everything from the parent to the delivery in it, and the training data's hash."""
    root = tmp_path_factory.mktemp("made")
    folder = models.tiny_llama(root / "Tiny-Llama")
    word_tokenizer(folder)
    for name, text in {"README.md": PARENTS_CARD, "LICENSE": "Be kind.", "USE_POLICY.md": "Really."}.items():
        (folder / name).write_text(text)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.25}')
    on_ranks(models.import_hf, 1, ONE, folder, root / "parent", ONE)
    opened = open_checkpoint(root / "parent")
    known = {"aggregation": "batch l2, sequence mean", "samples": "77", "fingerprint": opened.fingerprint}
    scores = Scores(random_scores(opened.arch).vectors, known)
    save_scores(root, scores)
    plan = make_plan(opened.arch, opened.fingerprint, scores, PruneConfig(hidden=24, ffn=17, drop_blocks=[1, 3]))
    on_ranks(run_prune, 1, ONE, root / "parent", plan, root / "pruned", ONE)
    write_jsonl(root / "text.jsonl", [" ".join(f"w{i + j}" for j in range(40)) for i in range(40)])
    (hashed,) = on_ranks(train, 1, ONE, root)
    deliver(root / "distill", root / "out")
    return root, hashed


def test_the_card_says_what_was_done(made):
    root, hashed = made
    parent, pruned, student = (open_checkpoint(root / name) for name in ("parent", "pruned", "distill"))
    _, front, text = (root / "out" / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model"] == "Tiny-Llama" and found["license"] == "llama3.1" and found["language"] == ["en"]
    assert found["license_link"] == "LICENSE" and found["library_name"] == "transformers"
    assert text.startswith("\n# Tiny-Llama, pruned and distilled: 29.4 k")
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:5]]
        for cells in (line.split("|") for line in text.splitlines())
        if len(cells) == 6
    }
    weights = models.weights(root / "out")
    parameters = [sum(w.numel() for w in of.values()) for of in (weights, models.weights(root / "Tiny-Llama"))]
    assert rows["parameters"][:2] == [f"{n:,}" for n in parameters]
    assert [rows[axis][:2] for axis in ("blocks", "hidden", "ffn", "heads")] == [
        ["3", "5"],
        ["24", "36"],
        ["17", "30"],
        ["12", "12"],
    ]
    order = [
        f"1. Weights `{parent.fingerprint}`",
        f"2. Weights `{pruned.fingerprint}`",
        f"3. Weights `{student.fingerprint}`",
    ]
    assert [text.find(part) for part in order] == sorted(text.find(part) for part in order) and order[2] in text
    plan = json.loads((root / "pruned" / "plan.json").read_text())
    plan_digest = pruned.lineage["plan"]
    for fact in (
        f"Scores `{plan['scores']}`: aggregation batch l2, sequence mean, samples 77.",
        f"dropped, counted from 0: 1, 3. Every kept index: `minitron/plan_{plan_digest}.json`.",
        f"`{parent.fingerprint}`, pruned by plan `{pruned.lineage['plan']}`",
        f"`{pruned.fingerprint}`, distilled from teacher `{parent.fingerprint}`",
        f"Data `{hashed}`: text.jsonl",
        "peak_lr 0.0123",
        "Its licence files are included: LICENSE, USE_POLICY.md",
    ):
        assert fact in text, fact
    for line in (root / "distill" / "metrics.jsonl").read_text().splitlines()[:: SETTINGS.steps - 1]:
        step = json.loads(line)
        losses = [f"{step[key]:#.4g}" for key in ("kd_loss", "lm_loss")]
        assert any(all(loss in row for loss in losses) for row in text.splitlines() if row.lstrip().startswith("|")), (
            losses
        )


def record(folder: Path) -> tuple[dict, dict]:
    """What an exported folder says of itself: its lineage, and its plans by digest."""
    files = {file.stem.removeprefix("plan_"): file for file in (folder / "minitron").glob("plan_*.json")}
    return json.loads((folder / "minitron" / "lineage.json").read_text()), {k: load_plan(v) for k, v in files.items()}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def test_an_exported_folder_leads_back_to_its_parent(made, tmp_path):
    """Distilled since: the plan that it carries still makes the pruned weights from the parent's, and every hash is somebody's."""
    root, _ = made
    parent, pruned, student = (open_checkpoint(root / name) for name in ("parent", "pruned", "distill"))
    found, plans = record(root / "out")
    assert (found["fingerprint"], found["lineage"]) == (student.fingerprint, student.lineage) and found["command"]
    step = found["lineage"]["ancestry"]
    (digest,), (plan,) = plans, plans.values()
    assert digest == plan.digest() == step["plan"]
    assert found["lineage"]["parents"]["student"]["fingerprint"] == pruned.fingerprint == apply.fingerprint(plan)
    assert step["parents"]["source"]["fingerprint"] == plan.fingerprint == parent.fingerprint
    assert step["scores"] == load_scores(root, parent.arch, parent.fingerprint).digest()
    folder = HFFolder(root / "Tiny-Llama")
    for parameter in parameter_table.parameters(parent.arch):
        folder.hash(parameter)
    assert step["ancestry"]["parents"]["huggingface"]["sha256"] == folder.fingerprint(parent.arch) == plan.fingerprint
    deliver(root / "pruned", tmp_path / "pruned")
    assert same(models.weights(tmp_path / "pruned"), cut_by_hand(models.weights(root / "Tiny-Llama"), plan))


def test_a_chain_carries_every_plan(made, tmp_path):
    root, _ = made
    middle = open_checkpoint(root / "distill")
    scores = Scores(random_scores(middle.arch).vectors, {})
    plan = make_plan(middle.arch, middle.fingerprint, scores, PruneConfig(ffn=11, blocks=2))
    on_ranks(run_prune, 1, ONE, root / "distill", plan, tmp_path / "again", ONE)
    deliver(tmp_path / "again", tmp_path / "out")
    found, plans = record(tmp_path / "out")
    assert plans == {plan.digest(): plan} | record(root / "out")[1] and len(plans) == 2
    assert found["lineage"]["ancestry"]["ancestry"]["plan"] in plans
    assert same(models.weights(tmp_path / "out"), cut_by_hand(models.weights(root / "out"), plan))


def test_a_corrected_teacher_is_told_too():
    """Its own way from the same parent, before the student that it taught."""
    parent, corrected, pruned, student = ({"path": f"/{name}", "fingerprint": name} for name in "abcd")
    convert = {"parents": {"huggingface": {}}}
    correct = {"parents": {"student": parent, "teacher": None}, "ancestry": convert, "teacher": None}
    prune = {"parents": {"source": parent}, "ancestry": convert}
    distil = {"parents": {"student": pruned, "teacher": corrected}, "ancestry": prune, "teacher": correct}
    found = lineage.history(distil, student)
    assert [step.identity["fingerprint"] for step in found] == ["a", "c", "b", "d"]
    assert [step.lineage for step in found] == [convert, prune, correct, distil]


def test_what_was_shipped_stays_as_it_was(made):
    root, _ = made
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "USE_POLICY.md"):
        assert (root / "out" / name).read_bytes() == (root / "Tiny-Llama" / name).read_bytes(), name
    assert PARENTS_CARD not in (root / "out" / "README.md").read_text()


def test_generation_settings_where_none_were_shipped(made, tmp_path):
    root, _ = made
    shutil.copytree(root / "pruned", tmp_path / "pruned")
    (tmp_path / "pruned" / "hf" / "generation_config.json").unlink()
    models.edit_config(tmp_path / "pruned" / "hf", bos_token_id=None, eos_token_id=[3, 5], pad_token_id=0)
    deliver(tmp_path / "pruned", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [3, 5] and found["pad_token_id"] == 0 and "bos_token_id" not in found


def test_evaluations_of_this_checkpoint_alone(made, tmp_path):
    root, _ = made
    shutil.copytree(root / "distill", tmp_path / "distill")
    finished = (open_checkpoint(tmp_path / "distill").step_dir / "integrity.json").stat().st_mtime
    for source, file, age in (("distill", "ours", -9), ("another", "theirs", -9), ("distill", "old", 9)):
        (tmp_path / file).mkdir()
        found = {"source": str(tmp_path / source), "files": [{"file": f"{file}.jsonl", "loss": 2.5}]}
        (tmp_path / file / "evaluation.json").write_text(json.dumps(found))
        os.utime(tmp_path / file / "evaluation.json", (finished - age,) * 2)
    deliver(tmp_path / "distill", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "ours.jsonl" in text and "theirs.jsonl" not in text and "old.jsonl" not in text


PATH = re.compile(r"(^|[\s\"'`=\[(,])(/|~/?|\.\.?/)[\w.]", re.MULTILINE)


def has_no_path(card: str, root: Path) -> bool:
    private = (str(root), str(Path.home()), f" {getpass.getuser()}", "somebody")
    return not PATH.search(card) and not any(text in card for text in private)


def test_results_measured_after_the_export_reach_the_card(made):
    """From the same data as the report's page; what is outside the results stays, and no path of this machine is told."""
    root, _ = made
    card = root / "out" / "README.md"
    before = card.read_text()
    edited = before.replace("## Licence", "My words.\n\n## Licence")
    card.write_text(edited)
    folders = [root / f"evaluate{number}" for number in range(3)]
    try:
        for folder, (name, loss) in zip(folders, {"Tiny-Llama": 2.0, "pruned": 6.0, "out": 3.0}.items(), strict=True):
            folder.mkdir()
            found = {"source": str(root / name), "files": [{"file": "/home/somebody/held.txt", "loss": loss}]}
            (folder / "evaluation.json").write_text(json.dumps(found))
        assert model_card.update_results(root) == [card]
        text = card.read_text()
    finally:
        card.write_text(before)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["pruned", "held.txt", "6.000"] in rows and ["distilled", "held.txt", "3.000"] in rows
    assert ["teacher", "held.txt", "2.000"] in rows and "recovered 75\N{NO-BREAK SPACE}% of the increase" in text
    (trained,) = [row for row in rows if row[0] == "distill"]
    tokens = json.loads((root / "distill" / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]
    assert f"{tokens:,}" in trained
    start, end = (text.index(line) for line in model_card.RESULTS)
    assert text[:start] == edited[: edited.index(model_card.RESULTS[0])]
    assert text[end:] == edited[edited.index(model_card.RESULTS[1]) :] and "My words." in text[end:]
    assert has_no_path(text, root) and not has_no_path("`x=/home/a`", root) and not has_no_path("in ~/x", root)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (
            "/home/somebody/clone/launch/distill.py +recipe=llama31_minitron_4b_width parallel=tp8 work_dir=somebody "
            "'data.train=[/data/somebody/a.jsonl]' distill.peak_lr=1e-4 'run.note=../somebody' ++model.hf=somebody runs=somebody",
            "`minitron distill +recipe=llama31_minitron_4b_width parallel=tp8 distill.peak_lr=1e-4`, with ",
        ),
        (
            "/home/somebody/.venv/bin/minitron prune --config-dir /home/somebody/conf prune.hidden=24 recipe.source=somebody",
            "`minitron prune prune.hidden=24`, with ",
        ),
        (
            "launch/distill.py model=tiny prompts=[somebody.jsonl] teachers=[0.5,somebody,0.5,b] distill.on_policy.share=0.5 "
            "distill.on_policy.prompts=[somebody.jsonl] +a.later.path=somebody distill.teacher_parallel.tensor=2 log.wandb=x "
            "'distill.on_policy={prompts: [somebody]}' recipe.student=somebody data.seed=7 data.cache=somebody distill=on_policy",
            "`minitron distill model=tiny distill.on_policy.share=0.5 data.seed=7 distill=on_policy`, with ",
        ),
        ("python -c 'from somebody import x'", ""),
        ("an unclosed ' quote", ""),
    ],
)
def test_a_command_is_told_without_paths(command, shown):
    assert model_card._command(command) == shown


def test_settings_are_told_by_name_without_paths(made):
    """Sections that are off are left out, also those of later versions; the only texts among the others are no paths."""
    assert not [key for key in artefacts.shown_settings(dataclasses.asdict(DistillConfig())) if "." in key]
    card = (made[0] / "out" / "README.md").read_text()
    assert not re.search(r"on_policy|prompts|teacher_parallel|save_every|\{", card[card.index("Settings:") :])
    on = OnPolicyConfig(share=0.5, prompts=["/home/somebody/p.jsonl", "somebody.jsonl"])
    hidden = HiddenStateLossConfig(weight=0.25)
    settings = DistillConfig(on_policy=on, hidden_state_loss=hidden, teacher_parallel={"tensor": 2})
    trained = {
        "parents": {"student": {"fingerprint": "a"}, "teacher": None},
        "data": {"files": ["/home/any/text.jsonl"], "hash": "dada"},
        "settings": dataclasses.asdict(settings),
        **{"command": "", "versions": {}},
    }
    identity = {"path": "nowhere", "fingerprint": "b", "step": "step_0000001"}
    text = model_card._step_paragraph(1, lineage.Step(trained, identity), {})
    assert "on_policy.share 0.5, on_policy.tokens 128" in text and "hidden_state_loss.weight 0.25" in text
    assert not re.search("somebody|home|prompts|teacher_parallel", text) and "{" not in text
    names = {name for schema in STAGES.values() for name in texts(schema)}
    assert names == {"data.split", "step"}, "a setting that holds a path is changeable (config/fields.py)"


def texts(schema: type, prefix: str = "") -> list[str]:
    """The settings of a stage that a card shows and that may hold any text."""
    names = []
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        if is_changeable(field):
            continue
        if dataclasses.is_dataclass(field.type):
            names += texts(field.type, f"{name}.")
        elif re.search(r"\bstr\b", str(field.type)):
            names.append(name)
    return names


def test_cutting_in_one_pass_is_told_as_pruning(made, tmp_path):
    root, _ = made
    plan = load_plan(root / "pruned")
    (tmp_path / "cut").mkdir()
    apply.cut_folder(root / "Tiny-Llama", plan, tmp_path / "cut")
    model_card.complete_folder(model_card.cut_origin(root / "Tiny-Llama", plan, tmp_path / "cut"), tmp_path / "cut")
    deliver(root / "pruned", tmp_path / "out")
    one, two = ((tmp_path / name / "README.md").read_text() for name in ("cut", "out"))
    assert one == two and open_checkpoint(root / "pruned").fingerprint in one
    (cut, plans), (pruned, same_plans) = record(tmp_path / "cut"), record(tmp_path / "out")
    assert plans == same_plans == {plan.digest(): plan}
    assert cut["fingerprint"] == pruned["fingerprint"]
    hashes = [
        (found["lineage"]["plan"], found["lineage"]["scores"], found["lineage"]["parents"]["source"]["fingerprint"])
        for found in (cut, pruned)
    ]
    assert hashes[0] == hashes[1]


def test_a_converted_model_without_anything(tmp_path):
    folder = families.tiny("nemotron", tmp_path / "hf")
    on_ranks(models.import_hf, 1, ONE, folder, tmp_path / "ckpt", ONE)
    loaded = deliver(tmp_path / "ckpt", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# hf, converted: 47.9 k" in text and "license: other" in text and "It has no licence file" in text
    assert "no tokenizer" in loaded and "NemotronForCausalLM, 47,880 parameters" in loaded


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f, w: w.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda f, w: w.update(foo=torch.ones(3)), "1 tensors that a llama model .* the first foo"),
        (lambda f, w: models.edit_config(f, rms_norm_eps=1e-3), "another model than was exported: norm_eps differ"),
        (lambda f, w: models.edit_config(f, num_attention_heads=7), "not a multiple of the number of attention heads"),
        (lambda f, w: (f / "tokenizer.json").write_text("{}"), "cannot load the tokenizer"),
        (lambda f, w: models.edit_config(f, model_type="no such type"), "model_type 'no such type' is not supported"),
    ],
)
def test_a_folder_that_transformers_does_not_take_is_an_error(made, tmp_path, damage, sentence):
    from safetensors.torch import save_file

    shutil.copytree(made[0] / "out", tmp_path / "out")
    weights = models.weights(tmp_path / "out")
    damage(tmp_path / "out", weights)
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        transformers_check.check_folder(tmp_path / "out", open_checkpoint(made[0] / "distill").arch)


@pytest.mark.parametrize("which", families.OF)
def test_transformers_takes_every_family(tmp_path, which):
    arch, _ = architecture.read_hf(families.tiny(which, tmp_path))
    assert f"{parameter_table.count(arch):,} parameters" in transformers_check.check_folder(tmp_path, arch)
