"""What people type and keep in YAML files: a failure means that an accepted spelling is refused, or an old key misread."""

import dataclasses

import pytest
from hydra import initialize_config_dir

from minitron_mcore.cli import compose, help
from minitron_mcore.config.settings import Divergence
from minitron_mcore.config.stages import STAGES, DistillRun
from minitron_mcore.errors import UserError
from tests.helpers.launching import fork

MINE = """# @package _global_
defaults:
  - smollm2_100m
  - override /distill: half
  - _self_
work_dir: ${runs}/mine
prune:
  ffn: 1200
"""


@pytest.fixture(autouse=True)
def hydra_is_up():
    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        yield


def write(folder, **files) -> str:
    """YAML files by GROUP__NAME; the override that makes Hydra search the folder."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return f"hydra.searchpath=[file://{folder}]"


@pytest.mark.parametrize("sign", ["", "+"])
def test_model_and_recipe_with_and_without_a_plus(sign):
    assert compose.compose("plan", [f"{sign}model=llama31_8b"]).out_dir == "runs/llama31_8b/plan"
    run = compose.compose("plan", [f"{sign}recipe=minitron_4b", f"{sign}model=nemotron4_15b"])
    assert (run.source, run.model.name, run.prune.heads) == ("runs/minitron_8b/distill", "nemotron4_15b", 24)


def test_a_recipe_in_a_folder_of_its_own(tmp_path):
    searched = write(tmp_path, recipe__mine=MINE, distill__half="steps: 7\nglobal_batch: 4\n")
    run = compose.compose("distill", [searched, "recipe=mine", "runs=/r"])
    assert (run.out_dir, run.distill.steps, run.prune.ffn, run.prune.hidden) == ("/r/mine/distill", 7, 1200, 504)
    assert run.teacher == "/r/mine/convert" and run.model.name == "smollm2_135m"


def test_a_pipeline_searches_the_folder_in_its_stages_too(tmp_path):
    searched = write(tmp_path, recipe__mine=MINE, distill__half="steps: 7\nglobal_batch: 4\n")
    output = fork(tmp_path, "pipeline", searched, "+recipe=mine", "model.hf=no", "stages=[convert]", fails=2)
    assert f"$ minitron convert '{searched}' recipe=mine model.hf=no\nerror: no Hugging Face model at no:" in output


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.hf=/models/My-Llama-1.5/"], "My-Llama-1.5"),
        (["model.hf=/models/small.Q4_1.gguf"], "small.Q4_1"),
        (["work_dir=/runs/demo"], "demo"),
        (["model.hf=/models/x", "model.name=y"], "y"),
    ],
)
def test_the_folder_names_a_model(overrides, name):
    run = compose.compose("distill", overrides)
    assert run.model.name == name and run.out_dir.endswith(f"{name}/distill")


@pytest.mark.parametrize("stage", ["convert", "distill"])
def test_a_model_must_be_named(stage):
    with pytest.raises(UserError, match="is not set: give .*model=NAME, one of llama31_70b, llama31_8b"):
        compose.compose(stage, [])


OLD = {
    "distill.states": "distill.hidden_state_loss",
    "search.look_every": "search.eval_every",
    "search.together": "search.students_per_pass",
}


@pytest.mark.parametrize("old", OLD)
def test_renamed_keys_are_refused_with_the_new_name(tmp_path, old):
    sentence = f"^{old} is called {OLD[old]} now: change the key.$"
    for sign in ("", "+", "++"):
        with pytest.raises(UserError, match=sentence):
            compose.compose("search", ["model=llama31_8b", f"{sign}{old}=3"])
    section, key = old.split(".")
    text = f"{key}:\n  weight: 1\n" if key == "states" else f"{key}: 3\n"
    searched = write(tmp_path, **{f"{section}__old": text})
    with pytest.raises(UserError, match=sentence):
        compose.compose("search", [searched, "model=llama31_8b", f"{section}=old"])
    indented = text.replace("\n ", "\n   ")
    recipe = f"# @package _global_\ndefaults: [smollm2_100m, _self_]\n{section}:\n  {indented}"
    searched = write(tmp_path, recipe__old=recipe)
    with pytest.raises(UserError, match=sentence):
        compose.compose("search", [searched, "recipe=old"])
    assert old in compose.RENAMED


def test_a_part_of_a_renamed_section_too():
    with pytest.raises(UserError, match="distill.states.weight is called distill.hidden_state_loss.weight now"):
        compose.normalize_overrides(["distill.states.weight=1"])


def test_an_unknown_option_lists_the_options():
    with pytest.raises(
        UserError, match="Could not find 'prune/tiny' Available options in 'prune': keep llama31_4b_depth"
    ):
        compose.compose("plan", ["model=llama31_8b", "prune=tiny"])


def test_every_setting_and_value_has_a_description():
    """The docstring below each field is what --help and docs/configuration.md show."""
    sections = {row.name: row for row in help.settings(DistillRun)}
    rows = {row.name: row for row in help.settings(sections["distill"].type)}
    assert rows["steps"].text.startswith("Optimizer steps")  # inherited from TrainConfig
    assert help.choices(rows["divergence"].type)["forward_kl"].startswith("KL(teacher || student)")
    assert list(help.choices(Divergence | None)) == [value.value for value in Divergence]
    bare = [f"{stage}: {row.name}" for stage, schema in STAGES.items() for row in help.settings(schema) if not row.text]
    bare += [f"{name}.{row.name}" for name, section in sections.items() for row in _rows(section) if not row.text]
    assert not bare


def _rows(section) -> list[help.Setting]:
    return help.settings(section.type) if dataclasses.is_dataclass(section.type) else []
