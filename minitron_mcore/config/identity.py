"""The part of a stage's config that identifies a run: a resumed run must agree with it."""

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
    *("on_bad_loss", "bad_loss_limit", "hang_minutes", "save_minutes", "async_save"),
    *("line_mb", "file_mb"),
)


def run_identity(config: StageRun) -> dict[str, Any]:
    """A stage's config as YAML-ready values, as it goes into config.yaml: without the sections that it doesn't read, without
    what says only when to pause (`stop_after`), who does which part (`shard`), what to do about failures or what to refuse, without
    `dry_run`, and of `performance` with nothing but options that change the run's numbers (see `performance.numerics`)."""
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
