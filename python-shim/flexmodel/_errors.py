"""The errors of the reader. Each message is one line that names the place, the reason and the way out."""

from ._native import safe


class RunError(ValueError):
    """A run directory, or a part of one, cannot be read: foreign, damaged, or of a newer format."""

    def __str__(self) -> str:
        # A message may quote names from the run: what a terminal would obey is spelled out.
        return safe(str(self.args[0])) if self.args else ""


class RunNotFoundError(RunError, FileNotFoundError):
    """There is no such run directory."""


class NotCapturedError(KeyError):
    """What was asked for is not in the run, or is one of several and the call does not say which."""

    def __str__(self) -> str:
        # KeyError shows repr() of its argument, which is unreadable for a sentence.
        return safe(str(self.args[0])) if self.args else ""
