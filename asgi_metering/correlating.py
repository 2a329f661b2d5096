"""
Correlation: by what ids of its own an application finds a call again, on its usage event.

Knows where they come from: the endpoint's arguments, a header field, the call around. Cleans what a client chose, and
never takes it for an identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from asgi_metering.arguments import From
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import is_field_name

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.policies import ChargePolicy

__all__ = ["IDS", "clean_id", "ids_around", "ids_of", "read_id"]

IDS: Final = ("request_id", "session_id")
"""What they are called, as arguments and on the event."""

MAX_ID = 128
"""Characters of an id that are kept: it goes on every event."""

MAX_FIELD_NAME = 64
"""Characters of a header field that carries one: longer ones are not in use."""

_NOT_IN_IDS = re.compile(r"[^\x21-\x7e]")


def clean_id(text: str) -> str | None:
    """*text* without what is not printable ASCII, or is white space, and bounded; None where nothing is left."""
    return _NOT_IN_IDS.sub("", text)[:MAX_ID] or None


def read_id(given: Any, name: str) -> From | str | None:
    """
    What was written as the id *name*: a function of the endpoint's arguments, or the name of a header field.

    Raises:
        ConfigurationError: It is neither.
    """
    if given is None:
        return None
    if callable(given):
        return From(given, name.replace("_", " "))
    if not is_field_name(given, MAX_FIELD_NAME):
        raise ConfigurationError(
            f"{name}={given!r} is neither a function nor the name of a header field. Pass lambda body: body.{name}, or "
            f"'X-Correlation-ID', say."
        )
    return str(given).lower()


async def ids_of(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The ids that *charge* finds for *call*, by their names; raises whatever the application's functions raise."""
    found: dict[str, str] = {}
    for name, asked in zip(IDS, (charge.request_id, charge.session_id), strict=True):
        if isinstance(asked, From):
            answered = await asked.compute(call, arguments)
            told = None if answered is None else clean_id(str(answered))
        else:
            origin = call.opening.origin
            lines = [] if asked is None or origin is None else origin.fields(asked)
            told = clean_id(lines[0]) if lines else None
        if told is not None:
            found[name] = told
    return found


def ids_around(call: Call) -> dict[str, str]:
    """
    The ids of *call*, which no request came with: those of the call around it (S0.29), else its own.

    A request around it that is not charged has the id that its client sent, or that of its call.
    """
    around = call.opening.around
    outer = None if around is None else around.call
    found = {} if outer is None else {name: outer.facts[name] for name in IDS if name in outer.facts}
    if "request_id" not in found:
        origin = None if around is None else around.origin
        sent = None if origin is None else origin.request_id
        found["request_id"] = sent or (call.id if outer is None else outer.id)
    return found
