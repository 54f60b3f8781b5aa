"""The one exception that users see as a sentence."""


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names the value, the limit and the remedy."""
