"""Which fields of a config may change when a run resumes. No torch import."""

import dataclasses
from typing import Any

_KEY = "changeable"


def changeable(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field of a config that does not identify a run: layout, paths, intervals, limits, reactions to failures, and what changes
    the order of summation only. All other fields do (see `config.identity`)."""
    return dataclasses.field(default=default, default_factory=default_factory, metadata={_KEY: True})


def is_changeable(field: dataclasses.Field[Any]) -> bool:
    """Whether the field was made by `changeable`."""
    return bool(field.metadata.get(_KEY))
