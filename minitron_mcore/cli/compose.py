"""Hydra's composition of a stage's config, and its conversion to the stage's dataclass."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from minitron_mcore.config.stages import (
    STAGES,
    ConvertRun,
    CutRun,
    GenerateRun,
    PipelineRun,
    ReportRun,
    SearchRun,
    TokenizeTextRun,
)
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.reading import first_line

_PACKAGE = Path(__file__).parents[1]
_HOME = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
"""The folder of conf/ and launch/: the package where a wheel installed it, else the repository."""
CONF, LAUNCH = _HOME / "conf", _HOME / "launch"

LAUNCH_FILES = STAGES | {
    "pipeline": PipelineRun,
    "tokenize_text": TokenizeTextRun,
    "generate": GenerateRun,
    "search": SearchRun,
    "report": ReportRun,
}

RENAMED = {
    "distill.states": "distill.hidden_state_loss",
    "search.look_every": "search.eval_every",
    "search.together": "search.students_per_pass",
    "distill.hang_minutes": "hang.step_minutes",
    "correct.hang_minutes": "hang.step_minutes",
    "distill.save_minutes": "hang.save_minutes",
    "correct.save_minutes": "hang.save_minutes",
}
"""Keys of earlier versions and what they are called now."""

# Hydra copies the whole store for each composition, which takes longer than the rest; what it loads it copies anyway.
ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
for _name, _schema in LAUNCH_FILES.items():
    ConfigStore.instance().store(group="stage", name=f"{_name}_schema", node=_schema, package="_global_")


def normalize_overrides(overrides: Iterable[str]) -> list[str]:
    """A command line with `model=x` and `recipe=x` for `+model=x` and `+recipe=x`.

    conf/base.yaml lists both groups, so Hydra refuses the plus sign, which this package's users may type.

    Raises:
        UserError: keys of `RENAMED`.
    """
    overrides = list(overrides)
    keys = (override.lstrip("+~").partition("=")[0] for override in overrides)
    refuse(message for key in keys if (message := _renamed(key)))
    return [text.removeprefix("+") if text.startswith(("+model=", "+recipe=")) else text for text in overrides]


def _renamed(key: str) -> str | None:
    """The refusal of a key that is, or lies below, one of `RENAMED`."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return f"{key} is called {new}{key.removeprefix(old)} now: change the key."
    return None


def compose(stage: str, overrides: list[str]) -> Any:
    """The config of launch/`stage`.py for a command line, as its dataclass in `LAUNCH_FILES`.

    Hydra must be initialised, as it is inside a launch file, whose `hydra.searchpath` also holds here.

    Raises:
        UserError: see `composition_error` and `resolve`.
    """
    try:
        raw = hydra.compose(f"stage/{stage}", normalize_overrides([*search_path(), *overrides]))
    except HydraException as error:
        raise composition_error(error) from error
    return resolve(raw)


def search_path() -> list[str]:
    """The launch file's `hydra.searchpath` as an override; none where it has the default."""
    folders = HydraConfig.get().searchpath if HydraConfig.initialized() else []
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []


def group_options(group: str, searched: list[str] | None = None) -> list[str]:
    """The names of a config group's files, in conf/ and on `hydra.searchpath`: the launch file's, or `searched`, an override."""
    overrides = search_path() if searched is None else searched
    return GlobalHydra.instance().config_loader().get_group_options(group, overrides=overrides)


def composition_error(error: HydraException) -> UserError:
    """What Hydra could not compose, as one line."""
    reason = error.__cause__ or error.__context__
    if isinstance(reason, OmegaConfBaseException) and (message := _renamed(str(reason.full_key))):
        return UserError(message)
    text = str(error).partition("Config search path:")[0]  # before it stand the options of the group
    causes = str(error.__cause__ or "").splitlines()[:2]
    return UserError(" ".join(" ".join([text, *causes]).split()))


def resolve(raw: DictConfig) -> Any:
    """The composed config as its dataclass, with every interpolation resolved.

    `model.name` defaults to the last part of `model.hf`, or of `work_dir` where `model.hf` is missing too.

    Raises:
        UserError: a mandatory value that is missing; a value that OmegaConf refuses.
    """
    model = raw.model
    try:
        if OmegaConf.is_missing(model, "name"):
            folder = raw.work_dir if OmegaConf.is_missing(model, "hf") else model.hf
            model.name = Path(os.path.abspath(folder)).name.removesuffix(".gguf")
        # Only these two stages read the folder that a model came from; a checkpoint holds all that the others need.
        if OmegaConf.get_type(raw) not in (ConvertRun, CutRun) and OmegaConf.is_missing(model, "hf"):
            model.hf = ""
        return OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        if not isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
            raise UserError(f"{error.full_key or 'the config'}: {first_line(error)}") from error
        key = error.full_key or "model"
        raise UserError(
            f"{key} is not set: give {key}=..., model.hf=/path/to/folder, a recipe (recipe=NAME) or a model (model=NAME, one of "
            f"{', '.join(group_options('model'))})."
        ) from error
