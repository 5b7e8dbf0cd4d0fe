"""The one error that a user's input may cause; the command line prints it as a single line and exits with 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave cannot be used. The message is one line."""


class FieldError(UserError):
    """A field of the user's input has a value that is not allowed.

    ``str(error)`` reads ``<field>: got <value>, allowed: <allowed>``, always on one line.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(" ".join(f"{field}: got {_short(value)}, allowed: {allowed}".split()))

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, object, str]]:
        # An error crosses from a worker to the driver; what it holds there is its text.
        return FieldError, (self.field, _short(self.value), self.allowed)


def _short(value: object, limit: int = 120) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
