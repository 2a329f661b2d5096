"""
The registry of dialects, and the detection of one by the shape of a payload.

Knows which dialects there are, the order in which they are asked, and what they have in common to look for. Never
knows their fields.
"""

from __future__ import annotations

import re
import threading
from re import Pattern
from typing import Final

from asgi_metering.errors import ConfigurationError
from asgi_metering.usage import anthropic, bedrock, cohere, gemini, live, ollama, openai, realtime, vercel
from asgi_metering.usage.notes import Dialect, Json, as_object
from asgi_metering.usage.skim import LEAST, MOST, Marks, is_searchable, sieve

__all__ = [
    "COMMON",
    "DIALECTS",
    "ERROR",
    "Sieves",
    "claiming",
    "detect",
    "detect_usage",
    "marks",
    "named",
    "register_dialect",
    "sieves",
]

DIALECTS: Final = {
    dialect.name: dialect
    for dialect in (
        openai.CHAT,
        realtime.REALTIME,
        openai.RESPONSES,
        bedrock.CONVERSE,
        anthropic.MESSAGES,
        live.LIVE,
        gemini.GENERATE,
        ollama.CHAT,
        cohere.CHAT,
        vercel.DATA,
        vercel.UI,
    )
}
"""
Every dialect by name, in the order of detection.

Responses comes before Anthropic: a bare usage with ``input_tokens`` and a total is inclusive, without one the two
shapes count the same, unless Anthropic's cache fields are there (exclusive). Bedrock does as well: its last chunk may
be an event of Anthropic's with metrics beside it. Realtime and Live
come before those whose types and fields they share.
"""


COMMON: Final = ("object", "type", "usage", "usageMetadata", "modelVersion", "prompt_eval_count", "model")
"""Names by which the payloads of most dialects show themselves."""

ERROR: Final = Marks(["error"])
"""What shows an error in every dialect."""


class Sieves:
    """
    What is searched for in the bytes, made once out of all dialects.

    Attributes:
        introducing: What may show a dialect: a payload without it is nobody's, unless its names are written with
            escapes.
        named: By dialect, what may change its notes.
        any: What may change anybody's.
        usage_key: The fields that hold usage objects, before one.
    """

    __slots__ = ("any", "introducing", "named", "usage_key")

    def __init__(self, dialects: dict[str, Dialect]) -> None:
        every = dialects.values()
        own = [name for dialect in every for name in dialect.shows]
        self.introducing: Pattern[bytes] = sieve(Marks({*COMMON, *own}), ERROR)
        self.named = {dialect.name: sieve(dialect.telling, ERROR) for dialect in every}
        self.any: Pattern[bytes] = sieve(*(dialect.telling for dialect in every))
        keys = "|".join(sorted({re.escape(dialect.usage_key) for dialect in every}))
        self.usage_key: Pattern[str] = re.compile(rf'"(?:{keys})"\s*:\s*(?=\{{)')


_SIEVES: list[Sieves] = [Sieves(DIALECTS)]
_REGISTERING: Final = threading.Lock()


def sieves() -> Sieves:
    """Return what is searched for now."""
    return _SIEVES[-1]


def register_dialect(dialect: Dialect) -> None:
    """
    Add a dialect of your own, which is found by its shape from now on, and by its name in ``billable(usage=...)``.

    It is asked before those that come with the package. Call it while modules are imported: a body that is being read
    may not see it. Again with the same dialect changes nothing.

    Raises:
        ConfigurationError: There is another one of that name, or a name that it is found by is not `is_searchable`.
    """
    for name in (*dialect.telling.names, *dialect.telling.fields, *dialect.shows):
        if not is_searchable(name):
            raise ConfigurationError(
                f"The name {name!r} of usage dialect {dialect.name!r} cannot be searched for. Use one of {LEAST} to "
                f"{MOST} letters that JSON writes as they are: of ASCII, and no quotation marks."
            )
    with _REGISTERING:
        if DIALECTS.get(dialect.name, dialect) is not dialect:
            raise ConfigurationError(f"There is a usage dialect {dialect.name!r} already. Choose another name.")
        others = {name: known for name, known in DIALECTS.items() if name != dialect.name}
        made = Sieves({dialect.name: dialect, **others})
        DIALECTS.clear()
        DIALECTS.update({dialect.name: dialect, **others})
        _SIEVES[:] = [made]


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
    return claiming(payload) or detect_usage(as_object(payload.get("usage")))


def claiming(payload: Json) -> Dialect | None:
    """Find the dialect of a payload by its type marks alone; `None` if nobody claims it."""
    return next((dialect for dialect in DIALECTS.values() if dialect.claims(payload)), None)


def marks(value: str) -> Json:
    """Return a payload that shows nothing but one ``object`` or ``type`` mark, for `detect`."""
    return {"object": value, "type": value, "content": []}


def detect_usage(usage: Json) -> Dialect | None:
    """Find the dialect of a bare usage object by its shape."""
    return next((dialect for dialect in DIALECTS.values() if dialect.claims_usage(usage)), None)
