"""Text that every report can hold: what a layer says, or a dying process, may be anything."""

from __future__ import annotations

import re

NOT_TEXT = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters, which a terminal obeys and XML cannot hold, and halves of characters of UTF-16."""


def readable(text: str) -> str:
    r"""The text with a replacement character for everything that is no character to read.

    >>> readable("red: \x1b[31m")
    'red: �[31m'
    """
    return NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def first_line(text: str, most: int = 300) -> str:
    r"""The first line of a text that has something in it, not longer than so many characters.

    >>> first_line("\nsaid\nand more")
    'said'
    """
    line = next((line.strip() for line in readable(text).splitlines() if line.strip()), "")
    return line if len(line) <= most else f"{line[: most - 1]}…"


def said(error: BaseException) -> str:
    """An exception's type and text, whatever they are.

    >>> said(ValueError("expected 4 channels"))
    'ValueError: expected 4 channels'
    """
    try:
        text = str(error)
    except Exception:  # somebody's own exception, whose text is a mistake by itself
        text = "(an exception without a text)"
    return readable(f"{type(error).__name__}: {text}")
