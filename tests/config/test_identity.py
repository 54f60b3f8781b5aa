import dataclasses

import pytest
import yaml

from minitron_mcore.config import identity
from minitron_mcore.config.fields import is_changeable
from minitron_mcore.config.performance import Fp8
from minitron_mcore.config.settings import DistillConfig, Dtype
from minitron_mcore.config.stages import CorrectRun, DistillRun
from minitron_mcore.errors import UserError
from minitron_mcore.reading import read_yaml

FOLDERS = {"student": "s", "teacher": "t", "out_dir": "o", "work_dir": "w"}


def config(settings: dict, stage=DistillRun):
    """A stage's config with settings "section.name" -> value."""
    run = stage(**{name: value for name, value in FOLDERS.items() if hasattr(stage, name)})
    for name, value in settings.items():
        *sections, last = name.split(".")
        section = run
        for part in sections:
            section = getattr(section, part)
        assert hasattr(section, last), name
        setattr(section, last, value)
    return run


def resolved(**settings) -> dict:
    return identity.resolved(config({name.replace("__", "."): value for name, value in settings.items()}))


def stored(**settings) -> dict:
    """The same as a later process reads it from config.yaml."""
    return yaml.safe_load(yaml.safe_dump(resolved(**settings), sort_keys=False))


CHANGEABLE = {
    "parallel.tensor": 8,
    "distill.teacher_parallel": {"tensor": 2},
    "distill.teacher_ranks": 2,
    "student": "elsewhere",
    "out_dir": "elsewhere",
    "model.hf": "elsewhere",
    "data.train": ["b.jsonl"],
    "data.cache": "elsewhere",
    "distill.save_every": 7,
    "distill.stop_after": 7,
    "distill.micro_batch": 2,
    "hang.step_minutes": 1.0,
    "performance.recompute_layers": 3,
    "performance.profile.start": 3,
    "prune.hidden": 0.5,
}


@pytest.mark.parametrize(
    ("name", "value", "change"),
    [
        ("distill.peak_lr", 2e-4, ["distill.peak_lr was 0.0001, is 0.0002"]),
        ("distill.hidden_state_loss.weight", 1.0, ["distill.hidden_state_loss.weight was 0.0, is 1.0"]),
        ("distill.top_k", 9, ["distill.top_k was null, is 9"]),
        ("dtype", Dtype.fp32, ["dtype was bf16, is fp32"]),
        ("performance.fp8", Fp8.hybrid, ["performance.fp8 was null, is hybrid"]),
        ("data.seed", 1, ["data.seed was 1234, is 1"]),
        *((name, value, []) for name, value in CHANGEABLE.items()),
    ],
)
def test_each_setting_that_changes_the_numbers_is_named(name, value, change):
    """... and no other; the config's part in the fingerprint differs in the same cases."""
    assert identity.differences(stored(), identity.resolved(config({name: value}))) == change
    same = identity.run_identity(config({})) == identity.run_identity(config({name: value}))
    assert same == (not change)


def test_settings_of_another_release():
    """Added ones take their defaults; removed ones count where they were changed."""
    old = stored(distill__temperature=2.0)
    del old["distill"]["top_k"], old["performance"]
    old["distill"] |= {"gone": 3, "kept": 4}
    old["vanished"] = {"weight": 0.5}
    assert identity.differences(old, resolved(distill__temperature=2.0)) == []
    assert identity.differences(old, resolved(distill__temperature=2.0, distill__top_k=5)) == [
        "distill.top_k was null, is 5"
    ]
    old["changed"] += ["distill.gone", "vanished.weight"]
    assert identity.differences(old, resolved(distill__temperature=2.0)) == [
        "distill.gone was 3, which this version does not have",
        "vanished.weight was 0.5, which this version does not have",
    ]
    assert resolved(distill__temperature=2.0)["changed"] == ["distill.temperature"]


def test_another_stage_is_named():
    assert identity.differences(stored(), identity.resolved(config({}, CorrectRun))) == [
        "stage was distill, is correct"
    ]


def test_the_schedule_and_the_losses_identify():
    """A new setting identifies a run unless it is declared changeable; these must never be."""
    names = {field.name for field in dataclasses.fields(DistillConfig) if not is_changeable(field)}
    assert {"steps", "global_batch", "sequence_length", "warmup_steps", "min_lr", "kd_weight", "divergence"} <= names


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"])
def test_aliases_in_a_stored_config_are_refused(tmp_path, text):
    """They would make a value endless, or exponentially large."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml is damaged .*it has an alias"):
        read_yaml(tmp_path / "config.yaml", "restore it")
