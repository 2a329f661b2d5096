"""
Texts: what a model wrote, kept up to a bound and counted beyond it, and the words of payloads that nobody knows.

Knows characters, labels and encoded bytes in JSON. Never knows a provider's fields, nor how characters become tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

__all__ = ["MAX_TEXT", "Heard", "Text", "join", "prose", "words"]

MAX_TEXT: Final = 200_000
"""Characters of text that are kept: more is not tokenised anyway (see `tokens`), only counted."""

_LABELS: Final = frozenset({"type", "object", "id", "model", "role", "event", "finish_reason", "error"})
"""Fields whose strings are marks, not words: in most formats each event repeats some of them."""

_LONG: Final = 512
_CODES: Final = "[A-Za-z0-9+/_=-]"
_BLOB: Final = re.compile(rf"(?<!{_CODES}){_CODES}{{{_LONG},}}")
"""
A run that no language has without a blank: base64 of an image or a voice, which is not counted as text.

It is counted from its first letter alone: from each letter of one that is nearly as long it would take a second a MiB.
"""


class Heard(NamedTuple):
    """
    What a body said, for counting its tokens.

    Args:
        text: At most `MAX_TEXT` characters.
        more_chars: Characters beyond them, and those that bytes stand for which could not be read.
        estimated: Not all of it was read from fields that are known to be the model's words.
    """

    text: str = ""
    more_chars: int = 0
    estimated: bool = False


LOOSE: Final = 1_024
"""Parts that lie loose: a string of one word takes ten times its letters, so many are put together now and then."""


class Text:
    """Text that passed: kept up to `MAX_TEXT` characters, counted beyond."""

    __slots__ = ("chars", "kept", "parts")

    def __init__(self, kept: int = 0) -> None:
        self.parts: list[str] = []
        self.kept = kept
        self.chars = 0

    def add(self, part: str) -> None:
        """Take the next part; an empty one leaves nothing behind."""
        if not part:
            return
        self.chars += len(part)
        room = MAX_TEXT - self.kept
        if room > 0:
            self.parts.append(part[:room])
            self.kept += min(len(part), room)
            if len(self.parts) >= LOOSE:
                self.parts = ["".join(self.parts)]


def join(parts: list[str]) -> str:
    """Join parts; a pair of surrogates that was cut between two of them is one character again."""
    joined = "".join(parts)
    try:
        joined.encode()
    except UnicodeEncodeError:
        return joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return joined


def prose(data: bytes) -> str:
    """Return *data* as text without encoded binary in it; nothing for bytes that are no text."""
    return "" if b"\0" in data else _spoken(data.decode("utf-8", "replace"))


def _spoken(text: str) -> str:
    # The pattern is asked at every letter; nearly every text shows sooner that all of its words are short.
    if len(text) < _LONG or max(map(len, text.split()), default=0) < _LONG:
        return text
    return _BLOB.sub("", text)


def words(document: Any) -> Iterator[str]:
    """Yield the strings of a JSON document of unknown shape in order, without labels, errors and encoded binary."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield _spoken(value)
        elif isinstance(value, list):
            waiting.extend(reversed(value))
        elif isinstance(value, dict) and value.get("type") != "error":
            waiting.extend(inner for name, inner in reversed(value.items()) if name not in _LABELS)
