"""Hydra's composition of a stage's config, and its conversion to the stage's dataclass."""

from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
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
    StageRun,
)
from minitron_mcore.errors import UserError
from minitron_mcore.reading import first_line

CONF = Path(__file__).parents[2] / "conf"


LAUNCH_FILES = STAGES | {"pipeline": PipelineRun, "generate": GenerateRun, "search": SearchRun, "report": ReportRun}

for _name, _schema in LAUNCH_FILES.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def compose(stage: str, overrides: list[str]) -> StageRun:
    """What launch/`stage`.py would run; Hydra must be initialised, as it is inside another launch file."""
    try:
        raw = hydra.compose(stage, overrides)
    except HydraException as error:
        causes = (str(error), str(error.__cause__ or ""))  # Hydra's own words, then what OmegaConf found
        raise UserError(" ".join(line.strip() for text in causes for line in text.splitlines()[:2])) from error
    return resolve(raw)


def resolve(raw: DictConfig):
    """The composed config as its dataclass, every interpolation resolved.

    Raises:
        UserError: a value that is asked for and not given; what OmegaConf refuses, in its words.
    """
    # Only two stages read the folder that a model came from; the others find all in its checkpoint.
    if OmegaConf.get_type(raw) not in (ConvertRun, CutRun) and OmegaConf.is_missing(raw.model, "hf"):
        raw.model.hf = ""
    try:
        return OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        if not isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
            raise UserError(f"{error.full_key or 'the config'}: {first_line(error)}") from error
        known = ", ".join(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
        key = error.full_key or "model"
        raise UserError(
            f"{key} is not given: say {key}=..., or name a recipe (+recipe=NAME) or a model (+model=NAME, one of {known})."
        ) from error
