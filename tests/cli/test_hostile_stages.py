"""Hostile files as a user meets them, at every launch file: a failure means that a command ran code or ended in a traceback."""

import contextlib
import gc
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minitron_mcore import testing
from minitron_mcore.checkpoint import claim
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from tests.helpers import hostile, models, tiny_run
from tests.helpers.launching import ROOT, word_tokenizer

OURS, GPT = "decoder.final_norm.weight", "decoder.final_layernorm.weight"
COMMON = [
    *(*tiny_run.STAGES, "prune.ffn=18", "tokens=2", "importance.samples=4"),
    *("evaluate.max_windows=2", "depth.windows=1", "search.steps=1"),
    *tiny_run.training(steps=2, micro_batch=2, log_every=1, save_every=1),
]


def _typed(folder: Path, stage: str, overrides: list[str]) -> None:
    """Become `python launch/STAGE.py overrides...` in a folder."""
    gc.freeze()
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / "launch" / f"{stage}.py"), *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


def typed(folder: Path, stage: str, *overrides: str) -> tuple[int, list[str]]:
    """Exit status and printed lines of a launch file, run in a process of its own that has all imports already."""
    given = [option for option in COMMON if stage == "generate" or not option.startswith("tokens=")]
    process = testing._processes().Process(target=_typed, args=(folder, stage, [*given, *overrides]))
    process.start()
    process.join(120)
    status = process.exitcode
    process.kill()
    return status, (folder / "log").read_text().splitlines()


WHOLE = [
    *(("convert",), ("importance",), ("plan",), ("prune",), ("correct", "correct.stop_after=1")),
    *(("distill", "distill.stop_after=1"), ("teacher_cache", "kind=hidden"), ("export", "source=runs/tiny/prune")),
    ("export", "format=gpt", "source=runs/tiny/convert"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What every stage makes of a tiny model, by its own command; two trainings are stopped after their first step."""
    root = tmp_path_factory.mktemp("made")
    tiny_run.write(root)
    for stage, *overrides in WHOLE:
        status, told = typed(root, stage, *overrides)
        assert status == 0, told
    return root


NEW = "out_dir=new"
DOORS = {
    "importance": ("convert", ["importance", NEW]),
    "depth": ("convert", ["depth", NEW]),
    "evaluate": ("convert", ["evaluate", "source=runs/tiny/convert"]),
    "generate": ("convert", ["generate", "source=runs/tiny/convert"]),
    "synthesize": ("convert", ["synthesize", NEW, *tiny_run.SYNTHESIZE]),
    "correct": ("convert", ["correct", NEW]),
    "correct, resumed": ("correct", ["correct"]),
    "distill, student": ("prune", ["distill", NEW]),
    "distill, teacher": ("convert", ["distill", NEW]),
    "distill, resumed": ("distill", ["distill"]),
    "teacher_cache": ("convert", ["teacher_cache", NEW]),
    "search": ("convert", ["search", NEW]),  # source and teacher
    "search, teacher": ("correct", ["search", NEW, "teacher=runs/tiny/correct"]),
    "prune": ("convert", ["prune", NEW]),
    "export": ("prune", ["export", NEW, "source=runs/tiny/prune"]),
    "export, gpt": ("prune", ["export", NEW, "format=gpt", "source=runs/tiny/prune"]),
    "convert, gpt": ("gpt", ["convert", NEW, "model.weights=runs/tiny/gpt"]),
}
"""Way in -> the folder that is attacked, and the command that reads it."""
TENSORS_ALONE = {"prune", "export", "export, gpt", "convert, gpt"}
"""They never open a byte item or common.pt."""
SLOW = pytest.mark.slow


def cases() -> list:
    """(door, place): of every way in a place that it reads, and, slow, another; every place is among these. That no reader runs
    code in any place stands in tests/checkpoint/test_hostile.py."""
    places, found = list(hostile.places(OURS)), []
    for number, door in enumerate(DOORS):
        usual, other = (
            "tensor as byte item" if door in TENSORS_ALONE else "byte items, torch.save",
            places[number % len(places)],
        )
        found.append(pytest.param(door, usual, id=f"{door}-{usual}"))
        if other != usual:
            found.append(pytest.param(door, other, marks=SLOW, id=f"{door}-{other}"))
    return found


@pytest.mark.default_cases("evaluate", "export")
@pytest.mark.parametrize("door", DOORS)
def test_every_command_works_where_nothing_is_wrong(tmp_path, made, door):
    """Else the refusals below could have other reasons."""
    folder = shutil.copytree(made, tmp_path / "copy")
    _, (stage, *overrides) = DOORS[door]
    status, told = typed(folder, stage, *overrides)
    assert status == 0, told


def refused(folder: Path, command: list[str], *names: str) -> None:
    """The command ends with status 2 and one sentence that has these names; nothing has run."""
    status, told = typed(folder, *command)
    assert not (folder / "flag").exists()
    errors = [line for line in told if line.startswith("error:")]
    assert status == 2 and len(errors) == 1 and all(name in errors[0] for name in names), (status, told)
    assert "Traceback" not in "\n".join(told)


@pytest.mark.parametrize(("door", "place"), cases())
def test_no_command_runs_what_a_checkpoint_holds(tmp_path, made, door, place):
    folder = shutil.copytree(made, tmp_path / "copy")
    attacked, command = DOORS[door]
    at = folder / "runs/tiny" / attacked
    step = at / "release" if attacked == "gpt" else open_checkpoint(at).step_dir
    hostile.places(GPT if attacked == "gpt" else OURS)[place](step, hostile.Attack(folder / "flag"))
    hostile.reseal(step)
    if door in TENSORS_ALONE and place.startswith(("byte items", "common.pt")):
        status, told = typed(folder, *command)
        assert status == 0 and not (folder / "flag").exists(), told
    else:
        refused(folder, command, f"runs/tiny/{attacked}")


FOLDER_DOORS = {
    "convert": ["convert", NEW],
    "evaluate": ["evaluate", "source=hf"],
    "cut": ["cut", NEW],
}


@pytest.mark.parametrize(
    ("name", "payload"),
    [("pytorch_model.bin", "torch.save"), pytest.param("model.safetensors", "pickle", marks=SLOW)],
)
@pytest.mark.parametrize("door", FOLDER_DOORS)
def test_no_command_runs_weights(tmp_path, made, door, name, payload):
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "hf/model.safetensors").unlink()
    (folder / "hf" / name).write_bytes(hostile.PAYLOADS[payload](hostile.Attack(folder / "flag")))
    refused(folder, FOLDER_DOORS[door], "hf")


@pytest.mark.parametrize(
    "door",
    [pytest.param(d, marks=SLOW) for d in ("cut", "generate", "synthesize", "distill, teacher", "export")]
    + ["convert", "evaluate"],
)
def test_no_command_runs_code_of_a_folder(tmp_path, made, door):
    """auto_map of config and tokenizer beside a Python file, a template: in the model's folder and in all made of it."""
    folder = shutil.copytree(made, tmp_path / "copy")
    command = FOLDER_DOORS[door] if door in FOLDER_DOORS else DOORS[door][1]
    code = {"AutoConfig": "custom.X", "AutoModelForCausalLM": "custom.X", "AutoTokenizer": ["custom.X", None]}
    for hf in (folder / "hf", *folder.glob("runs/tiny/*/hf")):
        (hf / "custom.py").write_text(hostile.REMOTE.replace("FLAG", str(folder / "flag")))
        models.edit_config(hf, auto_map=code)
        settings = json.loads((hf / "tokenizer_config.json").read_text()) | {"auto_map": code}
        settings["chat_template"] = hostile.TEMPLATE.replace("FLAG", str(folder / "flag"))
        (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    status, told = typed(folder, *command)
    assert not (folder / "flag").exists() and "Traceback" not in "\n".join(told), told
    assert status == 0, told


@pytest.mark.parametrize(
    ("spoiled", "command"),
    [
        ("runs/tiny/importance/scores.safetensors", ["plan", NEW]),
        ("runs/tiny/teacher_cache/*.safetensors", ["distill", NEW, "teacher=runs/tiny/teacher_cache"]),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                ("runs/tiny/importance/scores.safetensors", ["search", NEW]),
                ("runs/tiny/plan/plan.json", ["prune", NEW]),
                ("runs/tiny/plan/plan.json", ["cut", NEW]),
                ("runs/tiny/convert/model.json", ["importance", NEW]),
                ("runs/tiny/teacher_cache/index.json", ["distill", NEW, "teacher=runs/tiny/teacher_cache"]),
                ("text.txt", ["importance", NEW]),
                ("prompts.jsonl", ["synthesize", NEW, *tiny_run.SYNTHESIZE]),
            )
        ),
    ],
)
def test_no_command_runs_other_files(tmp_path, made, spoiled, command):
    folder = shutil.copytree(made, tmp_path / "copy")
    file = sorted(folder.glob(spoiled))[0]
    file.write_bytes(hostile.PAYLOADS["pickle"](hostile.Attack(folder / "flag")))
    refused(folder, command, file.name)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("importance", "apply"),
        *(
            pytest.param(stage, "target", marks=SLOW)
            for stage in ("convert", "importance", "distill", "search", "export")
        ),
    ],
)
def test_no_command_runs_a_config(tmp_path, made, stage, kind):
    """config.yaml of the folder that it is to write to."""
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "new").mkdir()
    (folder / "new/config.yaml").write_text(hostile.YAML[kind].replace("FLAG", str(folder / "flag")))
    source = ["source=runs/tiny/prune"] if stage == "export" else []
    refused(folder, [stage, NEW, *source], "out_dir")


TEXTS = {
    "bad line": ('{"text": "a"}\n{"text": \n', "a.jsonl, line 2:"),
    "wrong key": ('{"text": "a"}\n{"body": "b"}\n', 'a.jsonl, line 2: no string under "text"'),
    "unreadable gz": ("no gzip", "a.jsonl.gz cannot be read to its end"),
    "missing": (None, "a.jsonl is neither a file nor the prefix of a .bin/.idx pair: check the path"),
    "other content in out_dir": ('{"text": "a b"}\n', "tokens.json is of text files or a tokenizer that have changed"),
    "out_dir in use": ('{"text": "a"}\n', "new"),
    "another stage's out_dir": ('{"text": "a"}\n', "new holds another run (stage was importance, is tokenizetext)"),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "bad line" else SLOW) for kind in TEXTS])
def test_tokenize_text_refuses_in_one_sentence(tmp_path, kind):
    """Text that is damaged or absent, and folders that hold something else; nothing half made is left as if it were whole."""
    content, sentence = TEXTS[kind]
    word_tokenizer(tmp_path / "hf")
    text = tmp_path / ("a.jsonl.gz" if kind == "unreadable gz" else "a.jsonl")
    if content is not None:
        text.write_text(content)
    command = ["tokenize_text", NEW, f"files=[{text.name}]", "processes=1"]
    if kind == "other content in out_dir":
        text.write_text('{"text": "a"}\n')
        assert typed(tmp_path, *command)[0] == 0
        text.write_text(content)
    if kind == "another stage's out_dir":
        (tmp_path / "new").mkdir()
        (tmp_path / "new/config.yaml").write_text("stage: importance\n")
    is_used = kind == "out_dir in use"
    with claim.claim_run_folder(tmp_path / "new", {"stage": "tokenizetext"}) if is_used else contextlib.nullcontext():
        refused(tmp_path, command, sentence)
    assert not (tmp_path / "new/tokens.json").exists() or kind == "other content in out_dir"
