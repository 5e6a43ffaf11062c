"""The error that a user's input can cause: one line, no traceback, exit code 2."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line that says what was found, where, and what would be accepted. The command
    line prints it and exits with code 2; in Python it is an ordinary ``ValueError``.
    """


class FieldError(InputError):
    """A field of a configured object holds a value out of its range.

    Raised by ``check`` inside ``__post_init__``; ``certtrain.config`` puts the section's path in front.
    """

    def __init__(self, field: str, found: object, accepted: str):
        self.field, self.found, self.accepted = field, found, accepted
        super().__init__(f"{field}: found {found!r}; accepted: {accepted}")


def check(condition: object, field: str, found: object, accepted: str) -> None:
    """Raise ``FieldError`` unless ``condition`` holds. Write conditions that NaN fails (``0 <= x``)."""
    if not condition:
        raise FieldError(field, found, accepted)
