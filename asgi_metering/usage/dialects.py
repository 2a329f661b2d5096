"""
The registry of dialects, and the detection of one by the shape of a payload.

Knows which dialects there are and the order in which they are asked. Never knows their fields.
"""

from __future__ import annotations

from typing import Final

from asgi_metering.errors import ConfigurationError
from asgi_metering.usage import anthropic, gemini, ollama, openai
from asgi_metering.usage.notes import Dialect, Json, as_object
from asgi_metering.usage.skim import Marks

__all__ = ["DIALECTS", "SHOWN", "detect", "detect_usage", "marks", "named"]

DIALECTS: Final = {
    dialect.name: dialect
    for dialect in (openai.CHAT, openai.RESPONSES, anthropic.MESSAGES, gemini.GENERATE, ollama.CHAT)
}
"""
Every dialect by name, in the order of detection.

Responses comes before Anthropic: a bare usage with ``input_tokens`` and a total is inclusive, without one the two
shapes count the same, unless Anthropic's cache fields are there (exclusive).
"""


SHOWN: Final = Marks(
    ["object", "type", "usage", "usageMetadata", "modelVersion", "prompt_eval_count", "model"],
)
"""A payload without any of these is nobody's: `detect` finds none for it, unless its names are written with escapes."""


def named(name: str) -> Dialect:
    """
    Return the dialect of that name; it then overrides detection.

    Raises:
        ConfigurationError: There is none.
    """
    if name not in DIALECTS:
        raise ConfigurationError(
            f"There is no usage dialect {name!r}. Choose {', '.join(map(repr, DIALECTS))}, or None to detect it."
        )
    return DIALECTS[name]


def detect(payload: Json) -> Dialect | None:
    """Find the dialect of a payload by its type marks, else by the shape of its usage; `None` if nobody claims it."""
    for dialect in DIALECTS.values():
        if dialect.claims(payload):
            return dialect
    return detect_usage(as_object(payload.get("usage")))


def marks(value: str) -> Json:
    """Return a payload that shows nothing but one ``object`` or ``type`` mark, for `detect`."""
    return {"object": value, "type": value, "content": []}


def detect_usage(usage: Json) -> Dialect | None:
    """Find the dialect of a bare usage object by its shape."""
    return next((dialect for dialect in DIALECTS.values() if dialect.claims_usage(usage)), None)
