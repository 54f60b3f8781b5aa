"""Exceptions that are shown to users as one sentence, and the exit statuses of a stage."""

from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in the user's input. The message has one sentence per line: the value, the limit and the remedy."""

    exit_status = 2


class NotFinite(UserError):
    """A training run ended because of a loss or gradient that is NaN or infinite; its folder keeps what was saved."""

    exit_status = 3


class Stopped(BaseException):
    """A signal asked the process to stop (see `parallel.stop_signal`). The message says what was done and how to continue.

    Attributes:
        on_all_ranks: whether every rank raises it at the same place, so that the process groups can be shut down in order.
    """

    exit_status = 5

    def __init__(self, message: str, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


STOPPED_STATUS = Stopped.exit_status
"""Exit status of a stage that a signal stopped, and that the same command continues or starts again."""

HUNG_STATUS = 4
"""Exit status of all ranks when `parallel.hang_watchdog` ends the job."""


def refuse(problems: Iterable[str]) -> None:
    """Raise a UserError with all `problems`, one sentence each; return if there are none."""
    if sentences := list(problems):
        raise UserError("\n".join(sentences))


def result_file(path: str | Path, name: str, what: str, remedy: str) -> Path:
    """Path of a file that a stage wrote.

    Args:
        path: the file, or its folder.
        name: the file's name in the folder.
        what: describes the file in the message.
        remedy: start of the option that names the file, as in "model.scores=".

    Raises:
        UserError: there is no such file.
    """
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no {what} at {path}: {remedy}/path/to/{name}.")
    return path
