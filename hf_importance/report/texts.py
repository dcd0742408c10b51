"""Makes texts safe to display on a page and to write to a file."""

LONGEST_TEXT = 500  # maximum number of characters that are shown


def readable(text: str) -> str:
    """Replace characters that cannot be displayed: lone UTF-16 surrogates and control characters.

    >>> readable("a" + chr(0xD83D) + "b" + chr(7))
    'a�b�'
    """
    text = text[: 4 * LONGEST_TEXT].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "�" for c in text)


def cut(text: str, longest: int) -> str:
    """Truncate a text to at most `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
