"""Text of others, such as names of files, on a terminal."""

import re


# Characters that control a terminal or cannot be printed: controls, line separators, marks of writing direction,
# surrogates.
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text) -> str:
    """
    Escapes characters that control a terminal, as in JSON: control characters (escape sequences, new lines), marks of
    writing direction, and bytes of file names that are not UTF-8.
    """
    return _ACTING.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))
