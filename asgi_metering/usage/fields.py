"""
Dialects out of names alone: most providers put a few counts into one object, and say so under names of their own.

Knows how to follow a path of names through untrusted JSON. Never knows a provider.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from asgi_metering.errors import ConfigurationError
from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, compact
from asgi_metering.usage.skim import LEAST, MOST, Marks, is_searchable
from asgi_metering.usage.values import TokenUsage

__all__ = ["dialect_of_fields"]


def _follow(payload: Json, path: str) -> Any:
    value: Any = payload
    for name in path.split("."):
        value = as_object(value).get(name)
    return value


def _none(_usage: Json) -> bool:
    """A bare usage object of such names shows nobody."""
    return False


def dialect_of_fields(
    name: str,
    *,
    shows: str,
    usage: str,
    input: str,
    output: str,
    cached: str | None = None,
    reasoning: str | None = None,
    total: str | None = None,
    text: str | None = None,
    model: str = "model",
    finish: str | None = None,
) -> Dialect:
    """
    Make a dialect out of the names of its fields, for `register_dialect`.

    Every payload (an event, a line, or the whole body) is looked at by itself. Of usage that is reported several times
    the last counts, as running totals have it. ``input`` holds what was cached, and ``output`` the reasoning.

    Args:
        name: What `UsageReport.dialect` says, and ``billable(usage=...)`` takes.
        shows: A field at the top of its payloads that nobody else's have.
        usage: Where the object with the counts stands, as names with dots between them: ``"result.stats"``.
        input: Its field for input tokens.
        output: Its field for output tokens.
        cached: Its field for input tokens that were read from a cache.
        reasoning: Its field for output tokens that were spent on thinking.
        total: Its field for both sides together, which is checked against them.
        text: Where the text of a payload stands, as a path from its top; tool calls may stand there as objects.
        model: Where the model's name stands, as a path.
        finish: Where the reason stands for which the answer ended, as a path; with one that is neither null, false nor
            empty the answer is complete.

    Raises:
        ConfigurationError: A name that is searched for has less than `LEAST` letters, more than `MOST`, or some that
            JSON may write in another way.
    """
    paths = [path for path in (usage, text, model, finish) if path is not None]
    for part in [shows, *(part for path in paths for part in path.split("."))]:
        if not is_searchable(part):
            raise ConfigurationError(
                f"The field {part!r} of dialect {name!r} cannot be searched for. Use one of {LEAST} to {MOST} letters "
                "that JSON writes as they are: of ASCII, and no quotation marks."
            )

    def claims(payload: Json) -> bool:
        return shows in payload

    def note_usage(notes: Notes, found: Json) -> bool:
        asked, given = notes.count(found.get(input)), notes.count(found.get(output))
        if asked is None and given is None:
            return False
        notes.add_up(asked, given, None if total is None else notes.count(found.get(total)))
        read = None if cached is None else notes.part(notes.count(found.get(cached)), asked)
        thought = None if reasoning is None else notes.part(notes.count(found.get(reasoning)), given)
        notes.take(TokenUsage(input=asked, output=given, cached=read, reasoning=thought))
        return True

    def note(notes: Notes, payload: Json) -> None:
        notes.identify({"model": _follow(payload, model), "id": payload.get("id")})
        reason = None if finish is None else _follow(payload, finish)
        notes.finish(reason)
        notes.complete = notes.complete or not (reason is None or reason is False or reason == "")
        note_usage(notes, as_object(_follow(payload, usage)))

    def texts(payload: Json) -> Iterator[str]:
        said = None if text is None else _follow(payload, text)
        if isinstance(said, str) and said:
            yield said
        elif isinstance(said, dict):
            yield compact(said)

    key = usage.split(".")[-1]
    ends = {} if finish is None else {finish.split(".")[-1]: r"[^\snf]"}
    return Dialect(
        name=name,
        claims=claims,
        claims_usage=_none,
        note=note,
        note_usage=note_usage,
        text=texts,
        telling=Marks([], {key: r"\{", **ends}),
        texty=re.compile(f'"{re.escape((text or shows).split(".")[-1])}"'.encode()),
        shows=(shows,),
        usage_key=key,
    )
