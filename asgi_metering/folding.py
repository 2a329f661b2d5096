"""
Folding: how the oldest upstream exchanges of a call become sums, once there are very many.

Decides which of them are over, and what each of these counts as from then on. Asks no store.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from asgi_metering.exchanges import Exchanges, Sum, kind_of
from asgi_metering.itemised import ERRORS, as_asked, counted_call, model_call
from asgi_metering.measuring import Part, given_input, observation, parts_in
from asgi_metering.tokens import estimate_tokens, tokens_of

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["fold"]


def fold(call: Call, exchanges: Exchanges | None = None) -> None:
    """
    Make sums of the oldest of the *exchanges* of *call* that are over, and let go what used nothing.

    Without any given they are its upstream ones.

    What reported to its end is added as it reported. Of a body that broke the text is counted now, by its length, for
    nobody keeps it (DESIGN 4 "Observed"); its input is what it reported, else what the request asked for: not in a
    session, which asks for all of its answers at once.
    """
    exchanges = call.exchanges if exchanges is None else exchanges
    try:
        # In this order: what is over by now has told all that it will, whatever other threads are reading.
        gone = [entry for entry in exchanges.latest()[: exchanges.spare - exchanges.most] if entry[1].over]
        parts = {id(part.reader): part for part in parts_in(exchanges)}
        folded: list[tuple[Hashable, Sum, str | None]] = []
        for _, reader, status in gone:
            part = parts.get(id(reader))
            if status < ERRORS and part is not None:
                folded += _folded(call, part, is_upstream=exchanges is call.exchanges)
        exchanges.fold(gone, folded)
    finally:
        exchanges.rest()


def _folded(call: Call, part: Part, *, is_upstream: bool) -> list[tuple[Hashable, Sum, str | None]]:
    report, reader = part.report, part.reader
    if report is not None and part.final:
        used = model_call(report, part.provider)
    elif reader is None or not (part.usage is not None or part.wrote) or (reader.fetched and part.usage is None):
        # A search, or a poll of what is not there yet.
        return []
    else:
        given, _ = given_input(call, part, begun=is_upstream)
        heard = reader.heard()
        counted = 0 if part.written is not None else estimate_tokens(heard.text) + tokens_of(heard.more_chars)
        seen = observation(given, max(part.told_output, counted))
        used = as_asked(call, counted_call(seen, None if report is None else report.model, part.provider, report))
    one = Sum(
        used,
        () if report is None else report.problems,
        truncated=report is not None and report.truncated(),
        counted=used.estimated,
        unreported=part.usage is None,
    )
    # Only an upstream's answers are fetched again, and recognised by their ids.
    return [(kind_of(call.price, used), one, report.response_id if report is not None and is_upstream else None)]
