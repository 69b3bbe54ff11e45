"""Checks of texts and of the prompts that they are put into."""

from collections.abc import Sequence


def check_text(text: str) -> str:
    """Returns a text. Raises `ValueError` unless it has a character other than white space and is valid Unicode."""
    if not text.strip() or not _is_encodable(text):
        raise ValueError(f"Expected texts with at least one character, in valid Unicode, got {text!r}.")
    return text


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """Returns prompts as a list. Raises `ValueError` unless each has exactly one `{}`."""
    templates = [templates] if isinstance(templates, str) else templates
    fits = isinstance(templates, Sequence) and len(templates) > 0
    if not fits or any(not isinstance(t, str) or t.count("{}") != 1 for t in templates):
        raise ValueError(f'Expected templates with one {{}} each, such as "a photo of the {{}}", got {templates}.')
    return list(templates)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
