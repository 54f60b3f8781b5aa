"""Which fields of a config may change when a run resumes. No torch import."""

import dataclasses
from typing import Any

_KEY = "changeable"
_IN_PHASE = "in a new phase"


def changeable(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field of a config that does not identify a run: layout, paths, intervals, limits, reactions to failures, and what changes
    the order of summation only. All other fields do (see `config.identity`)."""
    return dataclasses.field(default=default, default_factory=default_factory, metadata={_KEY: True})


def of_phase(default: Any) -> Any:
    """A field that a resume may change if it raises `phase` of the same section; `phase` itself is such a field."""
    return dataclasses.field(default=default, metadata={_KEY: _IN_PHASE})


def is_of_phase(field: dataclasses.Field[Any]) -> bool:
    """Whether the field was made by `of_phase`."""
    return field.metadata.get(_KEY) == _IN_PHASE


def is_changeable(field: dataclasses.Field[Any]) -> bool:
    """Whether the field was made by `changeable`."""
    return field.metadata.get(_KEY) is True
