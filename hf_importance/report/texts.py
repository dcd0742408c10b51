"""Texts as a page and a file can hold them."""

from __future__ import annotations

LONGEST_TEXT = 500
"""Characters that are shown."""


def readable(text: str) -> str:
    """The text without what no file can hold: halves of pairs of UTF-16, control characters.

    >>> readable("a" + chr(0xD83D) + "b" + chr(7))
    'a�b�'
    """
    text = text[: 4 * LONGEST_TEXT].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "�" for c in text)


def cut(text: str, longest: int) -> str:
    """At most so many characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
