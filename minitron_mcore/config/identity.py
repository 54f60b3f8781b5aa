"""The part of a stage's config that identifies a run; a resumed run must have the same."""

import dataclasses
from enum import Enum
from typing import Any

from minitron_mcore.config import performance
from minitron_mcore.config.stages import Run, StageRun

SECTIONS = {field.name for field in dataclasses.fields(Run) if dataclasses.is_dataclass(field.type)} - {
    "model",
    "parallel",
}

_UNIDENTIFYING = (
    *("stop_after", "shard", "shards", "students_per_pass"),
    *("on_bad_loss", "bad_loss_limit", "hang_minutes", "save_minutes", "async_save", "keep_last", "keep_every"),
    *("line_mb", "file_mb"),
)
"""Settings that change neither the result nor the numbers on the way: pauses, shares of the work, reactions to failures, limits."""


def run_identity(config: StageRun) -> dict[str, Any]:
    """A stage's config as YAML-ready values, for config.yaml: its own settings and the sections in `reads`, without
    `_UNIDENTIFYING` settings, `dry_run`, and options of `performance` that change no numbers (see `performance.numerics`)."""
    data = {k: v for k, v in dataclasses.asdict(config).items() if k in config.reads or k not in SECTIONS | {"dry_run"}}
    if changes := performance.numerics(data.pop("performance", {})):
        data["performance"] = changes
    for section in ("correct", "distill", "search", "data"):
        for key in _UNIDENTIFYING:
            data.get(section, {}).pop(key, None)

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: simple(v) for k, v in value.items()}
        return value.value if isinstance(value, Enum) else value

    return {"stage": type(config).__name__.removesuffix("Run").lower(), **simple(data)}
