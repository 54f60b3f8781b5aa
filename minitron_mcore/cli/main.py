"""From a command line to a stage: Hydra composes and checks the config, mistakes end in one sentence."""

import dataclasses
import functools
import gc
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from minitron_mcore.config import performance, ranges
from minitron_mcore.config.stages import (
    STAGES,
    ConvertRun,
    CutRun,
    GenerateRun,
    PipelineRun,
    ReportRun,
    Run,
    SearchRun,
    StageRun,
)
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.parallel import rendezvous
from minitron_mcore.reading import first_line

CONF = Path(__file__).parents[1] / "conf"
LAUNCH_FILES = STAGES | {"pipeline": PipelineRun, "generate": GenerateRun, "search": SearchRun, "report": ReportRun}
SECTIONS = {field.name for field in dataclasses.fields(Run) if dataclasses.is_dataclass(field.type)} - {
    "model",
    "parallel",
}

_UNIDENTIFYING = (
    *("stop_after", "shard", "shards", "together"),
    *("on_bad_loss", "bad_loss_limit", "hang_minutes", "save_minutes", "async_save"),
    *("line_mb", "file_mb"),
)

for _name, _schema in LAUNCH_FILES.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def entry(stage: str) -> Callable[[Callable], Callable[[], None]]:
    """Make `fn(config)` the main function of launch/`stage`.py; `config` is its dataclass from `LAUNCH_FILES`.

    A UserError becomes its sentence, printed by one rank, and its exit status (see `errors`). Any other exception on a rank of a
    process group becomes its traceback. Either ends this rank's process at once; torchrun then ends the others. With `dry_run`
    the stage is planned instead (see `dryrun`).
    """

    def decorate(fn: Callable) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF), config_name=stage)
        @functools.wraps(fn)
        def main(raw: DictConfig) -> None:
            # Imports make objects by the hundred thousand that all stay: looking through them takes a sixth of a start.
            gc.set_threshold(50_000)
            _check_world()
            try:
                config = resolve(raw)
                if config.dry_run and not isinstance(config, PipelineRun | ReportRun):  # which do so themselves
                    from minitron_mcore.cli import dry_run

                    dry_run.run(config)
                else:
                    refuse(ranges.problems(config))
                    fn(config)
            except UserError as error:
                _print_once(error)
                _end(error.exit_status)
            except Exception:
                if _store() is None:
                    raise
                print(f"rank {os.environ.get('RANK', 0)} failed:\n{traceback.format_exc()}", file=sys.stderr)
                _end(1)

        return main

    return decorate


def _check_world() -> None:
    """End this process where its environment describes no world, in which it could not say so only once."""
    try:
        rendezvous.check()
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()))
        sys.exit(error.exit_status)


def _store():
    """The store of this process's default process group; None without one. Does not import torch."""
    dist = sys.modules.get("torch.distributed")
    return dist.distributed_c10d._get_default_store() if dist and dist.is_initialized() else None


def _print_once(error: UserError) -> None:
    """Print an error's lines unless another rank prints the same: rank 0 at once, another rank after rank 0 had time to."""
    store, lines = _store(), str(error).splitlines()
    if not alone():
        lines = [f"rank {os.environ['RANK']}: {line}" for line in lines]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun sends it when rank 0 has ended
        # Without a process group the ranks are as far apart as their imports.
        time.sleep(10 if store is None else 2)
    if store is not None:
        try:
            if store.add(f"error {hashlib.sha256(str(error).encode()).hexdigest()}", 1) > 1:
                return
        except RuntimeError:  # rank 0 had the store, and has ended
            return
    print("\n".join(f"error: {line}" for line in lines))


def _end(status: int) -> NoReturn:
    """End this process; in a process group without its shutdown, which may wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _store() is not None:
        os._exit(status)
    sys.exit(status)


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


def plain(config: StageRun) -> dict:
    """A stage's config as YAML-ready values, as it goes into config.yaml: without the sections that it doesn't read, without
    what says only when to pause (`stop_after`), who does which part (`shard`), what to do about failures or what to refuse, without
    `dry_run`, and of `performance` with nothing but options that change the run's numbers (see `performance.numerics`)."""
    data = {k: v for k, v in dataclasses.asdict(config).items() if k in config.reads or k not in SECTIONS | {"dry_run"}}
    if changes := performance.numerics(data.pop("performance", {})):
        data["performance"] = changes
    for section in ("correct", "distill", "search", "data"):
        for key in _UNIDENTIFYING:
            data.get(section, {}).pop(key, None)

    def simple(value):
        if isinstance(value, dict):
            return {k: simple(v) for k, v in value.items()}
        return value.value if isinstance(value, Enum) else value

    return {"stage": type(config).__name__.removesuffix("Run").lower(), **simple(data)}


def alone() -> bool:
    """True on the one process that does a stage which needs no others; the rest of a torchrun world has nothing to do."""
    return int(os.environ.get("RANK", 0)) == 0
