"""
Booking upstream exchanges to the inbound call that made them.

The listener of the upstream client: knows calls and readings, and nothing of HTTP libraries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from asgi_metering.call import Call
from asgi_metering.folding import fold
from asgi_metering.itemised import ERRORS
from asgi_metering.opening import CURRENT
from asgi_metering.prices import FixedPrice
from asgi_metering.quotas.bodies import status_in_band
from asgi_metering.upstream.headroom import Reservation
from asgi_metering.upstream.refused import AnswerReader, RefusalReader
from asgi_metering.usage import UsageReader, UsageReport

if TYPE_CHECKING:
    from asgi_metering.clients import UpstreamClients

__all__ = ["UpstreamBooking"]

_OVER: Final = object()
"""Stands for a call that is over: what outlives its request is charged to nobody (pitfall 1)."""

log = logging.getLogger("asgi_metering.upstream")


class UpstreamBooking:
    """
    Takes what the upstream client tells: quotas to the readings, usage to the call that was current at its start.

    Args:
        metering: Whose readings, reservations and tallies.
        label: Which of several keys of the provider its exchanges go by.
    """

    def __init__(self, metering: UpstreamClients, label: str | None = None) -> None:
        self._metering = metering
        self._label = label

    def started(self, provider: str) -> object:
        """The call in whose context the exchange was begun; concurrent and nested calls never mix."""
        opening = CURRENT.get()
        if opening is not None and opening.closed:
            return _OVER
        call = None if opening is None else opening.call
        reservation = self._reservation(call, provider)
        if reservation is not None:
            self._metering.headroom.sent(reservation)
        return call

    def _reservation(self, call: Call | None, provider: str) -> Reservation | None:
        """What *call*, or the one that it runs inside of, has reserved of the provider."""
        while call is not None:
            found = None if call.beside is None else call.beside.reservation(provider, self._label)
            if found is not None:
                return found
            around = call.opening.around
            call = None if around is None else around.call
        return None

    def answered(
        self, token: object, provider: str, status: int, headers: Iterable[tuple[bytes, bytes]], started_at: float
    ) -> None:
        """Capture the quotas of every answer, 429s included (S1.44)."""
        quotas = self._metering.quotas
        quotas.record(provider, headers, status=status, started_at=started_at, label=self._label)
        reservation = self._reservation(token, provider) if isinstance(token, Call) else None
        if reservation is None:
            return
        latest = quotas.latest(provider, label=self._label)
        seen = None if latest is None else latest.limits_observed_at
        if seen is not None and seen >= started_at:
            # Its own answer, or a later one, told the limits with this request in them.
            self._metering.headroom.shown(reservation)

    def body_started(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """
        Give the call the reader while its body passes: heartbeats and hang-ups see what is known so far.

        Unless nothing depends on usage the reader keeps the text too, bounded: should the body break before it reports,
        its own deltas are what was observed of it, also where the application transforms them (DESIGN 6).
        """
        if not isinstance(token, Call):
            return
        if token.closed:
            self._metering.meters.count("usage_late", line=token.line)
        else:
            if not isinstance(token.price, FixedPrice) or token.counts_usage:
                reader.keep_text()
            if token.exchanges.take((provider, reader, status)):
                fold(token)

    def finished(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """The call has the reader; text that a report made needless is given up, and a refusal read for its reasons."""
        if isinstance(reader, RefusalReader):
            self._metering.quotas.record(
                provider, reader.headers, status, reader.started_at, label=self._label, body=reader.body
            )
        elif isinstance(reader, AnswerReader) and (failure := reader.failure):
            # Behind a success its words are all that says what the refusal is (S1.44).
            code = status_in_band(failure)
            if code is not None:
                quotas = self._metering.quotas
                quotas.record(provider, (), code, reader.started_at, label=self._label, body=failure)
        reader.over = True
        report = reader.report()
        known = report.usage if report is not None and report.complete and not report.partial else None
        if known is not None and known.output is not None:
            reader.forget_text()
        if isinstance(token, Call) and not token.closed:
            if token.growth is not None:
                token.growth.nudge()
        elif report is not None and report.usage is not None and status < ERRORS:
            self._refused(token, reader, report)

    def _refused(self, token: object, reader: UsageReader, report: UsageReport) -> None:
        """Count usage that no call takes (S3.26): it began in none, or its call has ended before."""
        meters = self._metering.meters
        if token is _OVER:
            meters.count("usage_late")
        elif not isinstance(token, Call):
            meters.count("usage_unscoped")
            log.debug("The usage of an answer of %s belongs to no call; it is not charged.", report.model)
        elif report.complete and any(known is reader for _, known, _ in token.exchanges.latest()):
            # It went on behind the end of its call, which was charged by what had passed until then.
            meters.count("usage_late", line=token.line)
