"""
Keys of requests: from what a request says to the keys that the store is asked by.

An idempotency key lets a request run once; a charge key lets several be charged once. Knows how both are read,
scoped, hashed and fingerprinted. Decides nothing itself, and knows no messages of a server.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asgi_metering.arguments import From
from asgi_metering.decisions import Reason, Refusal
from asgi_metering.errors import ConfigurationError
from asgi_metering.policies import ChargeKey, ChargePolicy, Idempotency
from asgi_metering.prices import FixedPrice
from asgi_metering.rules.calendars import Period, boundaries
from asgi_metering.rules.operations import IdempotencyAsk, KeyAsk
from asgi_metering.rules.roots import rooted

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.policies import EndpointPolicy
    from asgi_metering.stores.contract import Store

__all__ = ["KEY_FIELD", "BodyError", "check_shared", "key_ask", "once", "read_key", "shared_key"]

KEY_FIELD = "idempotency-key"

MAX_KEY = 255
"""Characters of an idempotency key: what the APIs that have one allow."""

_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])+)"(?:;[ -~]*)?')
"""A structured String (RFC 9651 section 3.3.3), whose parameters say nothing here."""

_BARE = re.compile(r"[!#-+\--:<-\[\]-~]+")
"""Visible ASCII without what quotes, joins or parameterises: the clients of many APIs leave the quotes out."""


class BodyError(Exception):
    """A request's body cannot be fingerprinted; its text says why and what to do, for the caller to read."""


# -- idempotency keys --------------------------------------------------------------------------------------


def read_key(values: Sequence[str]) -> str | None:
    """
    Read the key from the field's lines, quoted or bare; both spell the same key. None where there is none.

    Raises:
        ValueError: More than one line, or no key of 1 to 255 printable ASCII characters.

    Source: draft-ietf-httpapi-idempotency-key-header-06 section 2.1.
    """
    if not values:
        return None
    if len(values) > 1:
        raise ValueError(f"The Idempotency-Key comes {len(values)} times.")
    text = values[0].strip(" \t")
    quoted = _QUOTED.fullmatch(text)
    if quoted is not None:
        text = re.sub(r"\\(.)", r"\1", quoted[1])
    elif not _BARE.fullmatch(text):
        raise ValueError("The Idempotency-Key is neither a quoted string nor a bare word of printable ASCII.")
    if len(text) > MAX_KEY:
        raise ValueError(f"The Idempotency-Key has {len(text)} characters.")
    return text


async def once(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> IdempotencyAsk | None:
    """
    What makes *call* run once; None where its route, or its request, does not ask for that.

    The caller is a part of the fingerprint: whoever shares a payer never gets another's answer by guessing its key.
    Outside HTTP a fixed price is as well, and there is no body.

    Raises:
        CallRefused: The key is missing or malformed, or the body is more than can be fingerprinted.
    """
    policy, origin = charge.idempotency, call.opening.origin
    if policy is None or call.policy is None:
        return None
    if charge.once is not None:
        price = str(charge.price.amount.normalize()) if isinstance(charge.price, FixedPrice) else ""
        return _ask(call, charge.once, policy.ttl_s, call.policy.name, (b"outside", _bytes(price)))
    if origin is None:
        return None
    try:
        key = read_key(origin.fields(KEY_FIELD))
    except ValueError as failure:
        raise call.refused(Refusal(Reason.KEY_INVALID, KEY_FIELD, detail=str(failure))) from None
    if key is None:
        if policy.required:
            raise call.refused(Refusal(Reason.KEY_MISSING, KEY_FIELD))
        return None
    try:
        content = await _content(call, policy, arguments)
    except BodyError as failure:
        raise call.refused(Refusal(Reason.BODY, KEY_FIELD, detail=str(failure))) from None
    # Without the number of a second endpoint of one name: it tells in what order a process made them, and all processes
    # know the key. Their paths differ, and so do their fingerprints.
    route = call.policy.name.partition("#")[0]
    return _ask(call, key, policy.ttl_s, route, (*origin.target, content))


def _ask(call: Call, key: str, ttl_s: float, route: str, content: tuple[bytes, ...]) -> IdempotencyAsk:
    """What to ask of *key*, which belongs to payer, line and *route*; *content* tells one request from another."""
    caller = call.caller.id if call.caller is not None else ""
    scope = (owner := call.payer or "", call.unit.name, call.line, route, key)
    *target, body = content
    fingerprint = _sha256(*target, _bytes(caller), body)
    return IdempotencyAsk(rooted(_sha256(*map(_bytes, scope)), owner), fingerprint, ttl_s)


async def _content(call: Call, policy: Idempotency, arguments: Mapping[str, Any]) -> bytes:
    """What tells this request from another one to the same place."""
    if isinstance(policy.fingerprint, From):
        computed = await policy.fingerprint.compute(call, arguments)
        return computed if isinstance(computed, bytes) else _bytes(f"{type(computed).__name__} {computed}")
    body = call.opening.request_body()
    return b"" if body is None else await body.digest()


# -- charge keys -------------------------------------------------------------------------------------------


def check_shared(policy: EndpointPolicy, store: Store) -> None:
    """
    Refuse a charge key that several owners may pay for, where their accounts may be in different places.

    Raises:
        ConfigurationError: With the mend.
    """
    charge = policy.charge
    if charge is None or charge.key is None or store.one_place:
        return
    for source in charge.sources:
        # A payer object without an account is the call's own payer, on another credential.
        if source.payer is not None and source.payer.account is not None and not source.each:
            raise ConfigurationError(
                f"{policy.name} has a charge_key, and {source.payer.name!r} may pay for it. On this {store.name} store "
                f"payers are kept apart, and a key has one place: it could be charged to each of them. Leave the "
                f"sources to the call's own payer, or keep all in one place: partitions=1."
            )


async def shared_key(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> str | None:
    """The key of the calls that are charged once together with *call*, scoped to payer and line, hashed."""
    if charge.key is None:
        return None
    key = await _charge_key(call, charge.key, arguments)
    if key is None:
        return None
    payer = call.payer or ""
    return rooted(_sha256(*map(_bytes, (payer, call.unit.name, charge.line, f"{type(key).__name__} {key}"))), payer)


async def _charge_key(call: Call, asked: ChargeKey, arguments: Mapping[str, Any]) -> Any:
    if isinstance(asked.key, From):
        return await asked.key.compute(call, arguments)
    origin = call.opening.origin
    return None if origin is None else ", ".join(origin.fields(asked.key)) or None


def key_ask(call: Call, asked: ChargeKey | None, now: float) -> KeyAsk | None:
    """What to ask the store of the key of *call*, around the time *now*."""
    if asked is None or call.shared is None:
        return None
    if isinstance(asked.per, str):
        # The window's kind is a part of the key: one that is changed begins anew.
        return KeyAsk(f"{call.shared}{asked.per}", boundaries(Period(asked.per), asked.zone, now))
    return KeyAsk(call.shared, (), float(asked.per))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _sha256(*parts: bytes) -> str:
    """Of the parts with their lengths, so that no two sequences of parts are one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()
