"""What identifies a run: all settings except those declared `changeable`. A resumed run must have the same."""

import dataclasses
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

from minitron_mcore.config.fields import is_changeable, is_of_phase
from minitron_mcore.config.stages import (
    STAGES,
    BenchmarkRun,
    Run,
    SearchRun,
    StageRun,
    SynthesizeRun,
    TokenizeTextRun,
)

CONFIG_GROUPS = {field.name for field in dataclasses.fields(Run) if dataclasses.is_dataclass(field.type)}
"""Sections that every stage's config has; NAME=FILE chooses one of conf/."""
SECTIONS = CONFIG_GROUPS - {"model", "parallel"}
_REMOVED = object()
"""The new value of a setting that this version does not have."""


def _stage_name(schema: type[StageRun]) -> str:
    return schema.__name__.removesuffix("Run").lower()


_SCHEMAS = {
    _stage_name(each): each for each in (*STAGES.values(), BenchmarkRun, SearchRun, SynthesizeRun, TokenizeTextRun)
}


def resolved(config: StageRun) -> dict[str, Any]:
    """A stage's settings for config.yaml: its own, the sections in `reads`, and `changed`, the names of the identifying settings
    that differ from this version's defaults."""
    every = dataclasses.asdict(config).items()
    data = {key: _plain(v) for key, v in every if key in config.reads or key not in SECTIONS | {"dry_run"}}
    changed = [name for name, *_ in _changes({}, data, type(config))]
    return {"stage": _stage_name(type(config)), **data, "changed": changed}


def run_identity(config: StageRun) -> dict[str, Any]:
    """The settings in `resolved` that identify the run."""
    return {"stage": _stage_name(type(config)), **identifying(resolved(config), type(config))}


def identifies(name: str, schema: Any) -> bool:
    """Whether the setting `name`, such as distill.peak_lr, identifies a run; False for sections, paths and unknown names."""
    first, _, rest = name.partition(".")
    field = next((field for field in dataclasses.fields(schema) if field.name == first), None)
    if field is None or is_changeable(field):
        return False
    if dataclasses.is_dataclass(field.type):
        return bool(rest) and identifies(rest, field.type)
    return not rest


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Texts like "distill.peak_lr was 0.0001, is 0.0002", one for each identifying setting that differs; [] for the same run.

    A setting that `stored` lacks, since a later version added it, has its default. A setting that this version does not have
    counts only if `stored` names it in `changed`. Settings declared `of_phase` count within a phase.

    Args:
        stored: the content of a run's config.yaml.
        current: `resolved` of a config; or values of a stage without a config, which identify it as they are.
    """
    schema = _SCHEMAS.get(current.get("stage", ""))
    if stored.get("stage") != current.get("stage"):
        return [f"stage was {_shown(stored.get('stage'))}, is {_shown(current.get('stage'))}"]
    changed = stored.get("changed")
    return [
        f"{name} was {_shown(old)}, {'which this version does not have' if new is _REMOVED else f'is {_shown(new)}'}"
        for name, old, new in _changes(stored, current, schema)
        if new is not _REMOVED or not isinstance(changed, list) or name in changed
    ]


def _changes(stored: Any, current: dict[str, Any], schema: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each identifying setting that differs; nested sections too."""
    fields = {field.name: field for field in dataclasses.fields(schema)} if schema else {}
    before = stored.get("phase", 0)
    is_new_phase = "phase" in fields and isinstance(before, int) and current.get("phase", 0) > before
    for key in [*current, *(key for key in stored if key not in current)]:
        field, name, new = fields.get(key), f"{prefix}{key}", current.get(key, _REMOVED)
        is_section = field is not None and dataclasses.is_dataclass(field.type)
        old = stored.get(key, {} if is_section else _default(field))
        if name == "changed" or (
            field is not None and (is_changeable(field) or new is _REMOVED or (is_new_phase and is_of_phase(field)))
        ):
            continue
        if isinstance(old, dict) and (is_section or (field is None and new is _REMOVED)):
            yield from _changes(old, {} if new is _REMOVED else new, field and field.type, f"{name}.")
        elif old != new:
            yield name, old, new


def identifying(data: dict[str, Any], schema: Any) -> dict[str, Any]:
    """Those of the settings `data` of a config class that identify a run."""
    kept = {field.name: field.type for field in dataclasses.fields(schema) if not is_changeable(field)}
    return {
        key: identifying(value, kept[key]) if dataclasses.is_dataclass(kept[key]) else value
        for key, value in data.items()
        if key in kept
    }


def _default(field: dataclasses.Field[Any] | None) -> Any:
    if field is None:
        return None
    return _plain(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def _plain(value: Any) -> Any:
    """Values that YAML can hold."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value.value if isinstance(value, Enum) else value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)
