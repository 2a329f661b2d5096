"""
Booking upstream exchanges to the inbound call that made them.

The listener of the upstream client: knows calls and readings, and nothing of HTTP libraries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from asgi_metering.call import Call
from asgi_metering.opening import CURRENT
from asgi_metering.prices import FixedPrice
from asgi_metering.usage import UsageReader

if TYPE_CHECKING:
    from asgi_metering.clients import UpstreamClients

__all__ = ["UpstreamBooking"]

MAX_EXCHANGES = 1_000
"""Upstream exchanges of one call whose bodies are read: beyond it an agent loop would keep every body's reader."""


class UpstreamBooking:
    """
    Takes what the upstream client tells: quotas to the readings, usage to the call that was current at its start.

    Args:
        metering: Whose readings and tallies.
    """

    def __init__(self, metering: UpstreamClients) -> None:
        self._metering = metering

    def started(self, provider: str) -> Call | None:
        """The call in whose context the exchange was begun; concurrent and nested calls never mix."""
        opening = CURRENT.get()
        return opening.call if opening is not None and not opening.closed else None

    def answered(
        self, token: object, provider: str, status: int, headers: Iterable[tuple[bytes, bytes]], started_at: float
    ) -> None:
        """Capture the quotas of every answer, 429s included (S1.44)."""
        self._metering.quotas.record(provider, headers, status=status, started_at=started_at)

    def body_started(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """
        Give the call the reader while its body passes: heartbeats and hang-ups see what is known so far.

        Unless nothing depends on usage the reader keeps the text too, bounded: should the body break before it reports,
        its own deltas are what was observed of it, also where the application transforms them (DESIGN 6).
        """
        if not isinstance(token, Call):
            return
        if token.closed or len(token.exchanges) >= MAX_EXCHANGES:
            self._metering.meters.count("usage_late", line=token.line)
        else:
            if not isinstance(token.price, FixedPrice) or token.counts_usage:
                reader.keep_text()
            token.exchanges.append((provider, reader, status))

    def finished(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """The call has the reader; the text of an answer that was reported to its end is given up."""
        report = reader.report()
        if report is not None and report.complete and report.usage is not None and not report.partial:
            reader.forget_text()
        if isinstance(token, Call) and token.growth is not None:
            token.growth.nudge()
