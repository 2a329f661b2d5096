"""
Dressing: the start of an admitted call's response as it goes out, and what watches its body.

A provider's quota fields are captured and removed, ours are added. Decides nothing about the call, and sends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from asgi_metering.amounts import CREDITS
from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.asgi.discretion import tells_balance
from asgi_metering.asgi.fields import limit_fields, payer_field
from asgi_metering.asgi.tap import Tap
from asgi_metering.asgi.types import Headers, Message, Scope
from asgi_metering.call import Call
from asgi_metering.decisions import Decision
from asgi_metering.opening import Before
from asgi_metering.quotas import DIALECTS, DialectRegistry
from asgi_metering.quotas.dialects import UNKNOWN

__all__ = ["dressed", "tap_of", "told", "with_windows"]

CUSTOMARY = frozenset((b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"))
"""
What applications say of limits of their own, by custom. Providers that use these names, too, send others with them; of
one that does not, a route says that it passes the answers on by naming their dialect.
"""

DRAFT = frozenset((b"ratelimit", b"ratelimit-policy"))
"""What the IETF's draft names them: an application's own likewise, and a provider's (Hugging Face) on such a route."""


def dressed(call: Call, decision: Decision, message: Message, options: AnswerOptions) -> Message:
    """
    The start of an admitted call's response: a provider's quota fields captured and removed, those of *decision* added.

    Always a new list: frameworks may reuse a response object, whose own list must not grow.
    """
    names = options.names
    given: Headers = [*message.get("headers", ())]
    dialects = call.metering.quotas.dialects
    # Names of ours and of the dialects that are shipped have been put together before.
    initials = names.initials if dialects is DIALECTS else names.initials | dialects.private_initials
    concerns_us = _concerns_us(given, initials)
    if concerns_us:
        given = [(bytes(name), bytes(value)) for name, value in given]
        if call.policy is not None and "quotas" in call.opening.features:
            given = _capture(call, dialects, given, message["status"])
    if call.opening.before is not None:
        decision = with_windows(decision, call.opening.before)
    charge = call.charge
    if charge is not None and charge.has_payers and decision.available is not None and not tells_balance(call):
        decision = decision._replace(available=None)
    if charge is None or not charge.has_levels:
        fields = limit_fields(decision, call.unit, names)
    else:
        fields = limit_fields(decision, call.unit, names, warn_below=call.warning_level, overdraft=call.overdraft)
    if charge is not None and charge.has_payers and (payer := call.payer_name) is not None:
        fields += payer_field(payer, names, switched=call.payer_switched)
    if concerns_us:
        given = _without(given, fields)
    given += fields
    return {**message, "headers": given}


def _concerns_us(given: Headers, initials: frozenset[bytes]) -> bool:
    """Whether any field of *given* may be a provider's quota, or have a name of ours: nearly always none does."""
    try:
        for name, _ in given:
            if name[:1] in initials:
                return True
    except (TypeError, ValueError):
        # Bytes of another kind, which some applications send, and which cannot be looked up.
        return True
    return False


def _without(given: Headers, fields: Headers) -> Headers:
    """*given* without what *fields* say: there is one set of them (S2.33)."""
    ours = [name for name, _ in fields]
    return [field for field in given if field[0].lower() not in ours]


def told(before: Before, message: Message, options: AnswerOptions) -> Message:
    """The start of a response that no endpoint was asked for, with what the limits of the middleware say of it."""
    if not before.windows:
        return message
    given: Headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
    fields = limit_fields(Decision("", time.time(), windows=before.windows), CREDITS, options.names)
    return {**message, "headers": [*_without(given, fields), *fields]}


def with_windows(decision: Decision, before: Before) -> Decision:
    """*decision* with the windows that the limits of a middleware counted the same request in."""
    return decision._replace(windows=(*decision.windows, *before.windows))


def _capture(call: Call, dialects: DialectRegistry, given: Headers, status: int) -> Headers:
    charge = None if call.policy is None else call.policy.charge
    is_named = charge is not None and charge.dialect is not None

    def is_quota_header(name: bytes) -> bool:
        return dialects.is_quota_header(name) or (is_named and name.lower() in DRAFT)

    quotas = [field for field in given if is_quota_header(field[0])]
    if not quotas:
        return given
    if not is_named and all(name.lower() in CUSTOMARY for name, _ in quotas):
        return given
    provider = (charge.dialect if charge is not None else None) or _provider_of(dialects, quotas, status)
    call.metering.quotas.record(provider, given, status=status, started_at=call.started_at)
    if charge is not None and charge.forward_quota_headers:
        return given
    return [field for field in given if not is_quota_header(field[0])]


def _provider_of(dialects: DialectRegistry, quotas: Headers, status: int) -> str:
    """Nobody named the provider, so it is called by the dialect of its header fields."""
    reading = dialects.read(quotas, provider=None, status=status, now=time.time())
    return UNKNOWN if reading is None else reading.dialect


def tap_of(call: Call, given: Iterable[tuple[bytes, bytes]], scope: Scope) -> Tap | None:
    """Only calls whose price or limits depend on usage have their bodies watched."""
    charge = call.charge
    if not call.counts_usage or scope["method"] == "HEAD":
        return None
    fields = [(bytes(name).lower(), bytes(value)) for name, value in given]
    found = {name: value for name, value in fields if name in (b"content-type", b"content-encoding")}
    content_type, encoding = found.get(b"content-type"), found.get(b"content-encoding")
    return Tap(
        None if content_type is None else content_type.decode("latin-1"),
        None if encoding is None else encoding.decode("latin-1"),
        None if charge is None else charge.dialect,
    )
