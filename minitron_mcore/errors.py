"""The exceptions that users see as a sentence, and the exit statuses that go with them."""

from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names the value, the limit and the remedy; several on a line each."""

    exit_status = 2


class NotFinite(UserError):
    """A loss or gradient that is NaN or infinite ended a training run; what it left in its folder stays there."""

    exit_status = 3


HUNG_STATUS = 4
"""Exit status of the ranks that waited in vain for another (see `watch`)."""


def refuse(problems: Iterable[str]) -> None:
    """Raise a UserError of all these sentences, where there are any."""
    if found := list(problems):
        raise UserError("\n".join(found))


def result_file(path: str | Path, name: str, what: str, remedy: str) -> Path:
    """The file `name` that a stage wrote, given itself or by its folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no {what} at {path}: {remedy}/path/to/{name}.")
    return path
