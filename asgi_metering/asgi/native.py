"""
Refusals as frameworks know them: the exception that rises is of the framework's own kind as well (pitfalls 17, 20).

An exception that a framework does not know is a crash to it: Django, Quart, Falcon and BlackSheep write each refused
call into the log as an error with a traceback, and MCP hides from its client what happened. Knows the names of their
exceptions, and imports none of them: whoever has not loaded a framework does not run it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

from asgi_metering.call import Call, CallRefused
from asgi_metering.decisions import Decision, Refusal

__all__ = ["DJANGO", "FORBIDDEN", "framework_of", "known_refusal"]

FORBIDDEN: Final = 403
"""What Django makes of the refusal; see `known_refusal`."""

DJANGO: Final = "django"

_KINDS: Final = {
    DJANGO: ("django.core.exceptions", "PermissionDenied"),
    "quart": ("werkzeug.exceptions", "HTTPException"),
    "falcon": ("falcon", "HTTPError"),
    "blacksheep": ("blacksheep.exceptions", "HTTPException"),
}
"""Frameworks by their packages, and what they know."""

_TOOLS: Final = (
    ("mcp.server.mcpserver.exceptions", "ToolError"),
    ("mcp.server.fastmcp.exceptions", "ToolError"),  # its name before 2.0
)

_MODULES: Final = frozenset(module for module, _ in (*_KINDS.values(), *_TOOLS))

_MAX_DEPTH: Final = 32  # Applications around each other that are looked through.
_INSIDE: Final = ("app", "asgi_app", "application", "inner", "__self__")
"""Where wrappers keep what they wrap; methods, such as Quart's ``asgi_app``, whose they are."""


class _KnownRefusal(CallRefused):
    """What frameworks look at where an exception is theirs. A status from 500 on: whoever sees it replaces it."""

    code: int | None = 500
    status: int = 500
    description: str | None = None
    response = title = headers = link = None

    # Where compiled frameworks keep the status: BlackSheep does not ask the attribute.
    places: tuple[Any, ...] = ()
    told: str | None = None

    def __init__(self, call: Call, refusal: Refusal, decision: Decision | None = None) -> None:
        super().__init__(call, refusal, decision)
        for place in self.places:
            place.__set__(self, self.status)

    def __str__(self) -> str:
        return super().__str__() if self.told is None else self.told

    def __reduce__(self) -> tuple[object, ...]:
        # In another process nobody has joined anything.
        return CallRefused, super().__reduce__()[1]


def known_refusal(
    call: Call, refusal: Refusal, decision: Decision | None, *, framework: str | None, told: Callable[[], str]
) -> CallRefused:
    """
    Return what rises of *refusal*: what every framework that this process has loaded knows as one of its own.

    Quart, Falcon and BlackSheep then answer 500, which is replaced like any other, without a word in the log. Django
    has no such exception: it answers 403, and warns. A tool of MCP fails with what *told* answers, for its client.

    Args:
        call: Which may not run.
        refusal: Why.
        decision: The store's, if it was asked.
        framework: Whose the application is, as `framework_of` tells: where compiled exceptions of several cannot be
            joined, its own counts. Django's is taken only here, for it is no 500.
        told: Called for the text that the client of a tool reads.
    """
    # Nearly everywhere there is none of them, and a flood of refusals asks again and again.
    if sys.modules.keys().isdisjoint(_MODULES):
        return CallRefused(call, refusal, decision)
    # Its own first.
    order = [framework, *_KINDS] if framework is not None else _KINDS
    kinds = _loaded(_KINDS[each] for each in order if each != DJANGO or framework == DJANGO)
    tools = _loaded(_TOOLS)
    if not (kinds or tools):
        return CallRefused(call, refusal, decision)
    known: _KnownRefusal = _joined(*kinds, *tools)(call, refusal, decision)
    if tools:
        known.told = told()
    return known


def _loaded(names: Iterable[tuple[str, str]]) -> list[Any]:
    loaded = sys.modules
    return [kind for module, name in names if (kind := getattr(loaded.get(module), name, None)) is not None]


@lru_cache(maxsize=16)
def _joined(*kinds: Any) -> Any:
    """One class of all that are exceptions and can be joined; those that cannot see a crash, as they would without."""
    joined: Any = _KnownRefusal
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(joined, kind):
            place = vars(kind).get("status")
            places = (*joined.places, place) if hasattr(place, "__set__") else joined.places
            try:
                joined = type("CallRefused", (joined, kind), {"__module__": CallRefused.__module__, "places": places})
            except TypeError:
                continue
    return joined


def framework_of(app: Any) -> str | None:
    """Which framework *app* is of, as far as what is around it keeps it where most wrappers do; None for another."""
    for _ in range(_MAX_DEPTH):
        if app is None:
            return None
        for kind in type(app).__mro__:
            package = kind.__module__.partition(".")[0]
            if package in _KINDS:
                return package
        app = next((inner for name in _INSIDE if (inner := getattr(app, name, None)) is not None), None)
    return None
