"""The one exception that users see as a sentence."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names the value, the limit and the remedy; several on a line each."""


def refuse(problems: Iterable[str]) -> None:
    """Raise a UserError of all these sentences, where there are any."""
    if found := list(problems):
        raise UserError("\n".join(found))
