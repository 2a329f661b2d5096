"""
What the wire formats have in common: a request as read, a call, an event, a refusal, SSE framing.

Knows JSON and server-sent events. Never knows which provider speaks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from asgi_metering.testing.provider.answers import Answer, TokenCounts
    from asgi_metering.testing.provider.behaviour import Behaviour
    from asgi_metering.testing.provider.quota import Account, Shortage

__all__ = [
    "Asked",
    "Call",
    "Endpoint",
    "Event",
    "Json",
    "Refusal",
    "RefusalKind",
    "Vendor",
    "encode_event",
    "encode_json",
    "flag",
    "flat_text",
    "limited",
    "whole_number",
]

Json = dict[str, Any]

RefusalKind = Literal[
    "no_key",
    "wrong_key",
    "bad_json",
    "missing",
    "invalid",
    "unknown_path",
    "wrong_method",
    "too_large",
    "unknown_model",
    "status",
    "rate_limited",
    "never_fits",
    "out_of_credit",
    "overloaded",
]


class Refusal(Exception):  # noqa: N818 (an answer, not a fault)
    """
    A request that is answered with an error.

    Args:
        kind: What is wrong; each vendor has its own status, type and words for it.
        detail: What the vendor's sentence needs: a parameter's fault, a path, a model.
        param: The parameter that is wrong.
        status: For the kind ``status``.
        retry_after_s: When it is worth asking again.
        family: The limit that is used up.
    """

    def __init__(
        self,
        kind: RefusalKind,
        detail: str = "",
        *,
        param: str | None = None,
        status: int = 0,
        retry_after_s: float | None = None,
        family: str = "requests",
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.param = param
        self.status = status
        self.retry_after_s = retry_after_s
        self.family = family


@dataclass(frozen=True, slots=True)
class Asked:
    """
    A request, read and found well-formed.

    Args:
        model: As written, behaviours included.
        prompt: All its text, joined by line ends.
        stream: Whether events are wanted.
        max_tokens: Bound of the output, or `None`.
        choices: How many answers.
        include_usage: Whether a stream reports usage.
    """

    model: str
    prompt: str
    stream: bool
    max_tokens: int | None
    choices: int = 1
    include_usage: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """One answer on its way: its number, its time in whole seconds of the epoch, and everything decided on."""

    number: int
    created: int
    asked: Asked
    behaviour: Behaviour
    answer: Answer

    def put_usage(self, payload: Json, usage: TokenCounts | None, shape: Callable[[TokenCounts], Json]) -> Json:
        """Add ``usage`` to *payload* in the vendor's *shape*: null for `None`, and nothing where none is reported."""
        if self.answer.reports:
            payload["usage"] = None if usage is None else shape(usage)
        return payload


class Event(NamedTuple):
    """
    One event of a stream.

    Args:
        name: The ``event`` field, or `None`.
        data: The ``data`` field: JSON, or a literal.
        is_delta: It carries a word of the answer.
        has_usage: It carries the final usage.
    """

    name: str | None
    data: Json | str
    is_delta: bool = False
    has_usage: bool = False


class Endpoint(Protocol):
    """
    One path of a vendor.

    Attributes:
        path: With its version.
        uses: Whether a call takes from the account's limits.
        fails_in_body: Whether a whole answer can say by itself, with status 200, that it failed.
    """

    path: str
    uses: bool
    fails_in_body: bool

    def read(self, body: Json) -> Asked:
        """Read a request. Raises `Refusal`."""
        ...

    def answer(self, call: Call) -> Json:
        """Return the whole answer as JSON."""
        ...

    def events(self, call: Call) -> Iterator[Event]:
        """Return the events of a stream."""
        ...

    def broken(self, call: Call, sent: int) -> Event:
        """Return the in-band error that ends the call's stream after *sent* events."""
        ...


class Vendor(Protocol):
    """One provider: its keys, limits, header fields and errors."""

    def credential(self, headers: Mapping[str, str]) -> str | None:
        """Return the key that the request carries."""
        ...

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Check what else the header must say. Raises `Refusal`."""
        ...

    def amounts(self, counts: TokenCounts) -> dict[str, int]:
        """Return what a call takes from each limit."""
        ...

    def fields(self, request_id: str) -> dict[str, str]:
        """Return the fields of every answer."""
        ...

    def quota_fields(self, account: Account) -> dict[str, str]:
        """Return the fields that say what is left."""
        ...

    def spent_fields(self, account: Account, refusal: Refusal) -> dict[str, str]:
        """Return the fields of a 429: nothing left of the limit in question."""
        ...

    def error(self, refusal: Refusal, request_id: str) -> tuple[int, Json]:
        """Return status and body of an error."""
        ...


def limited(shortage: Shortage) -> Refusal:
    """Return the refusal that the account's own limits ask for."""
    limit, asked = shortage.bucket.limit, shortage.asked
    used = limit - shortage.bucket.remaining
    detail = f"Limit {limit}, Used {used}, Requested {asked}."
    if asked > limit:
        return Refusal("never_fits", detail, family=shortage.family)
    return Refusal("rate_limited", detail, retry_after_s=shortage.wait_s, family=shortage.family)


def encode_json(payload: Json) -> bytes:
    """Write JSON as both vendors do: compact, and not only ASCII."""
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


def encode_event(event: Event, behaviour: Behaviour) -> list[bytes]:
    """Write one event as the pieces in which it is sent: one, or two where the behaviour tears it."""
    data = event.data if isinstance(event.data, str) else encode_json(event.data).decode()
    lines = [": keep-alive", ""] if behaviour.comments else []
    lines += [f"event: {event.name}"] if event.name else []
    lines += [f"data: {data}", "", ""]
    frame = behaviour.line_end.join(line.encode() for line in lines)
    if not behaviour.torn:
        return [frame]
    inside = next((at for at, byte in enumerate(frame) if byte >= 0xC0), len(frame) // 2) + 1
    return [frame[:inside], frame[inside:]]


def flat_text(content: object) -> str:
    """Return all text in a prompt: strings, parts with ``text``, messages with ``content``, lists of these."""
    return "\n".join(_texts(content))


def _texts(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _texts(part)
    elif isinstance(content, dict):
        yield from _texts(content.get("content", content.get("text")))


def flag(body: Json, name: str) -> bool:
    """Read an optional boolean, false by default. Raises `Refusal`."""
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise Refusal("invalid", f"Expected a boolean, got {value!r}.", param=name)


def whole_number(body: Json, name: str, highest: int | None = None) -> int | None:
    """Read an optional whole number from 1 to *highest*. Raises `Refusal`."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (highest is not None and value > highest):
        bound = "" if highest is None else f" and at most {highest}"
        raise Refusal("invalid", f"Expected an integer of at least 1{bound}, got {value!r}.", param=name)
    return value
