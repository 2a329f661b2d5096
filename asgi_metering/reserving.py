"""
Reserving: what a call takes of the providers that its policy requires, before anything is asked of the store.

In this process alone, by what providers said last. Knows neither how readings are kept nor how a call is refused on
the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asgi_metering.arguments import From
from asgi_metering.beside import is_cancellation
from asgi_metering.computed import check_models
from asgi_metering.counting import expected_usage
from asgi_metering.decisions import Reason, Refusal
from asgi_metering.errors import StoreError
from asgi_metering.policies import ESTIMATE, EndpointPolicy, UpstreamPolicy
from asgi_metering.quotas.headroom import Lack, Need
from asgi_metering.rules.operations import Admit
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["reserve"]


async def reserve(call: Call, policy: EndpointPolicy, asked: Admit | None, arguments: Mapping[str, Any]) -> None:
    """
    Count *call* as used of the providers that its policy requires.

    Raises:
        CallRefused: One has no room for it; or its idempotency key, which is looked for first, says something else.
    """
    metering, beside = call.metering, call.beside
    assert beside is not None  # noqa: S101 -- made for every policy with upstreams
    for upstream in policy.upstreams:
        is_shadow = upstream.shadow or metering.shadow
        try:
            need, label, models = await _need(call, upstream, arguments)
        except (Exception, asyncio.CancelledError) as failure:
            if not is_shadow or is_cancellation(failure):
                raise
            metering.meters.count("shadow_lost", line=beside.line, cause="computing")
            beside.tells_upstream = False
            continue
        lack, reservation = metering.headroom.reserve(
            upstream.provider, need, label=label, models=models, is_certain=is_shadow
        )
        if reservation is not None:
            beside.reserved.append(reservation)
        if lack is not None:
            refusal = _no_headroom(upstream, lack, models)
            if not is_shadow:
                await _known_key(call, asked)
                raise call.refused(refusal)
            metering.told_shadow(call, refusal)


async def _need(
    call: Call, upstream: UpstreamPolicy, arguments: Mapping[str, Any]
) -> tuple[Need, str | None, tuple[str, ...]]:
    """What *call* takes of a provider, under which label, and of which models."""
    tokens, label, models = upstream.tokens, upstream.label, upstream.models
    if isinstance(tokens, From):
        tokens = await tokens.compute(call, arguments)
    if isinstance(label, From):
        label = await label.compute(call, arguments)
    if isinstance(models, From):
        models = check_models(await models.compute(call, arguments))
    if tokens == ESTIMATE:
        if call.asked is None:
            call.asked = await expected_usage(call, arguments)
        tokens = call.asked
    if isinstance(tokens, TokenUsage):
        return Need(upstream.requests, tokens.input or 0, tokens.output or 0, tokens.total or 0), label, models
    return Need(upstream.requests, tokens=tokens or 0), label, models


def _no_headroom(upstream: UpstreamPolicy, lack: Lack, models: tuple[str, ...]) -> Refusal:
    of_model = "" if lack.model is None else f" for the model {lack.model!r}"
    mend = "" if lack.model is None or models else " Who asks for another one says so by requires_upstream(model=)."
    return Refusal(
        Reason.UPSTREAM,
        upstream.provider,
        lack.required,
        lack.available,
        limit=lack.limit,
        retry_after_s=lack.retry_after_s,
        detail=f"The provider {upstream.provider!r} has nothing left of {lack.resource!r}{of_model}.{mend}",
    )


async def _known_key(call: Call, asked: Admit | None) -> None:
    """What is known of the idempotency key comes before a provider's headroom: a repeat needs none."""
    if asked is None or asked.idempotency is None:
        return
    try:
        decision = await call.metering.foresee(asked)
    except StoreError:
        return
    if decision.replay:
        raise call.refused(Refusal(Reason.REPLAYED, "idempotency"), decision)
    if decision.refusal is not None and decision.refusal.reason in (Reason.IN_FLIGHT, Reason.FINGERPRINT):
        raise call.refused(decision.refusal, decision)
