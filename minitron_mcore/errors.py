"""The one exception that users see as a sentence."""

from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names the value, the limit and the remedy; several on a line each."""


def refuse(problems: Iterable[str]) -> None:
    """Raise a UserError of all these sentences, where there are any."""
    if found := list(problems):
        raise UserError("\n".join(found))


def result_of(path: str | Path, name: str, what: str, remedy: str) -> Path:
    """The file `name` that a stage wrote, given itself or by its folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no {what} at {path}: {remedy}/path/to/{name}.")
    return path
