"""Text from a run directory as it is shown: a name may hold anything, a terminal obeys some of it."""

from __future__ import annotations

from collections.abc import Iterable

from ._limits import MESSAGE, NAMED


def safe(text: str) -> str:
    """`text` with what is no printable character spelled out: line breaks, escapes, marks that change the direction."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _spelled(c) for c in text)


def _spelled(c: str) -> str:
    return c.encode("unicode_escape", "backslashreplace").decode() if c != " " else c


def clip(text: str) -> str:
    """The start of a text that is too long for a message."""
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]}..."


def few(values: Iterable[object]) -> str:
    """The first of many values, and how many more there are."""
    names = [str(value) for value in values]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
