"""
Replays: what a repeat of a request is answered with, the first one's answer or the receipt of its charge.

Keeps an answer while it passes to the client, within a bound, and writes it again. Never decides whether a request is
a repeat, and never keeps what belongs to one client alone, such as a cookie.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from asgi_metering.asgi.problems import Rendered
from asgi_metering.asgi.tap import Tap
from asgi_metering.asgi.types import Headers, Message
from asgi_metering.call import Call
from asgi_metering.receipts import Receipt

__all__ = ["REPLAYED", "Reply", "keeper", "replay_response"]

REPLAYED = (b"idempotency-replayed", b"true")
"""What every answer to a repeat has."""

KEPT_FIELDS = frozenset(
    {
        b"cache-control",
        b"content-disposition",
        b"content-encoding",
        b"content-language",
        b"content-type",
        b"etag",
        b"last-modified",
        b"location",
    }
)
"""Fields that describe an answer, and not the client or the moment that it was made for."""

MAX_FIELD = 1_024
"""Bytes of one such field that are kept."""

BODILESS = frozenset({204, 205, 304})
"""Statuses that frame no body, and may not say its length (RFC 9110 section 8.6)."""


class Reply:
    """
    One answer, kept while it passes.

    Args:
        start: The message that began it.
        limit: Bytes of its body up to which it is kept.
    """

    __slots__ = ("_chunks", "_fields", "_left", "_status")

    def __init__(self, start: Message, limit: int) -> None:
        self._status: int = start["status"]
        self._fields = [
            (bytes(name).lower().decode("latin-1"), bytes(value).decode("latin-1"))
            for name, value in start.get("headers", ())
            if bytes(name).lower() in KEPT_FIELDS and len(value) <= MAX_FIELD
        ]
        self._chunks: list[bytes] = []
        self._left = limit

    def keep(self, chunk: bytes) -> None:
        """Keep a chunk that was sent, or nothing at all any more where it is too much."""
        if self._left >= 0:
            self._left -= len(chunk)
            self._chunks.append(chunk)
            if self._left < 0:
                self._chunks.clear()

    def lose(self) -> None:
        """Some of it passes unseen: a file by its path."""
        self._left = -1
        self._chunks.clear()

    def told(self) -> Mapping[str, Any] | None:
        """The answer as a store keeps it; None where it was too large, or not seen whole."""
        if self._left < 0:
            return None
        body = base64.b64encode(b"".join(self._chunks)).decode("ascii")
        return {"status": self._status, "headers": [list(field) for field in self._fields], "body": body}


def keeper(call: Call, start: Message, tap: Tap | None) -> Callable[[bytes], None] | None:
    """What every chunk of an answer that has begun with *start* is shown to; None for nobody, as on most routes."""
    watch = None if tap is None else tap.keep
    once = call.charge.idempotency if call.charge is not None and call.once is not None else None
    if once is None or once.store_body is None:
        return watch
    reply = call.reply = Reply(start, once.store_body)
    if watch is None:
        return reply.keep

    def both(chunk: bytes) -> None:
        watch(chunk)
        reply.keep(chunk)

    return both


def replay_response(call: Call, receipt: Receipt) -> Rendered:
    """The whole answer to a repeat of the request that *receipt* charged: that one's, or the receipt."""
    reply = call.decision.reply if call.decision is not None else None
    if reply is None:
        body = json.dumps(_public(call, receipt), separators=(",", ":")).encode("ascii")
        fields = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        return _framed(200, fields, body)
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply["headers"]]
    return _framed(reply["status"], fields, base64.b64decode(reply["body"]))


def _framed(status: int, fields: Headers, body: bytes) -> Rendered:
    length = [] if status in BODILESS else [(b"content-length", b"%d" % len(body))]
    return Rendered(status, [*fields, *length, REPLAYED], body)


def _public(call: Call, receipt: Receipt) -> dict[str, Any]:
    """What of a receipt is its payer's business: not which grants paid."""
    return {
        "id": receipt.id,
        "line": call.line,
        "unit": receipt.unit,
        "amount": call.unit.text(receipt.amount + (receipt.late or 0)),
        "basis": receipt.basis.value,
        "estimated": receipt.estimated,
        "ended_by": receipt.ended_by.value,
        "ended_at": f"{datetime.fromtimestamp(receipt.at, UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
