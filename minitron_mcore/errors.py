"""The exceptions that users see as a sentence, and the exit statuses that go with them."""

from collections.abc import Iterable


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
