"""Text files as people's editors save them: with a byte order mark, in UTF-16, with the line ends of another system."""

from __future__ import annotations

import codecs

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""What a file begins with -> how Python calls its encoding."""
FIRST = {mark[:1] for mark, _ in MARKS}


def text_of(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is no part of it; lines end with
    '\\n', whatever they ended with.

    Raises:
        ValueError: it is in another encoding; says which byte, and what would be right.
    """
    marked = data[:1] in FIRST
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8") if marked else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} is not {error.encoding.upper()} text; expected UTF-8, or UTF-16 with a byte order mark"
        ) from error
    if encoding == "utf-8" and "\0" in text:
        raise ValueError("it holds zero bytes, as UTF-16 without a byte order mark does; expected UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
