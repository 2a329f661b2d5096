"""
`requires_upstream`: what a provider must have left for us before an endpoint runs, written on the endpoint.

Checks its arguments and answers a `Part`, as the other decorators do. Knows neither readings nor calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from asgi_metering.arguments import From
from asgi_metering.checks import check_flag
from asgi_metering.computed import check_models
from asgi_metering.errors import ConfigurationError
from asgi_metering.guards import Part
from asgi_metering.names import check_name
from asgi_metering.policies import ERROR_SHAPES, ESTIMATE, ErrorShape, UpstreamPolicy
from asgi_metering.usage import TokenUsage

__all__ = ["requires_upstream"]

MAX_REQUESTS = 1_000
"""Requests of one call to one provider: as many as `booking` reads the answers of."""


def requires_upstream(
    provider: str,
    *,
    tokens: int | TokenUsage | Callable[..., Any] | Literal["estimate"] | None = None,
    requests: int = 1,
    label: str | Callable[..., Any] | None = None,
    model: str | Sequence[str] | Callable[..., Any] | None = None,
    errors: ErrorShape = "problem",
    shadow: bool = False,
) -> Part:
    """
    Let nobody in whom a provider would refuse: 503 before the provider's own 429, with the provider's reset.

    Decided in process by the latest reading of ``metering.quotas``, without a round trip: a refusal asks no store and
    takes nothing anywhere. What was let in by this process and is in no reading yet counts as used. Without a reading,
    or once the reset that it told has passed, there is room.

    Args:
        provider: As `Metering.upstream_client` names it.
        tokens: What a call takes there: an int of both kinds together, a `TokenUsage`, ``"estimate"`` (of the
            request's own body, as holds are), or a callable of the endpoint's arguments that answers one of these or
            None. Without it limits of tokens count where nothing is left of them.
        requests: How many requests a call makes there.
        label: Which of several keys of the provider, as ``upstream_client(..., label=)`` names it; or a callable that
            answers a name or None.
        model: Which model a call asks for, or several; or a callable that answers one of these or None, such as
            ``lambda body: body.model``. Some quotas are of one model alone (Gemini's of a day): they refuse calls that
            name it, and calls that name none, which may be of it, but none that names another one. Names are compared
            without what stands before a slash, in small letters. Quotas in headers say no model: keep such models
            apart by clients with labels.
        errors: Shape of refusals where neither `billable` nor `rate_limited` says.
        shadow: Refuse nothing, and tell what it would have: see `asgi_metering.shadow` (S4.16).

    Raises:
        ConfigurationError: A name that is none, or another argument that cannot work.

    Source: DESIGN 4 "Admission" and 6; S1.45 (older readings never over newer ones).
    """
    if not isinstance(provider, str):
        raise ConfigurationError(
            f"provider={provider!r} is no name. Write @requires_upstream('openai'), with the provider in parentheses."
        )
    check_name(provider, "provider")
    if label is not None and not callable(label):
        check_name(label, "quota label")
    if type(requests) is not int or not 1 <= requests <= MAX_REQUESTS:
        raise ConfigurationError(f"requests={requests!r} is not an int from 1 to {MAX_REQUESTS}.")
    is_count = type(tokens) is int and tokens >= 0
    if not (tokens is None or tokens == ESTIMATE or is_count or isinstance(tokens, TokenUsage) or callable(tokens)):
        raise ConfigurationError(
            f"tokens={tokens!r} is not known. Use an int from 0 up, a TokenUsage, {ESTIMATE!r} or a function."
        )
    models = From(model, "upstream model") if callable(model) else check_models(model)
    if errors not in ERROR_SHAPES:
        raise ConfigurationError(f"errors={errors!r} is not a shape. Use one of {', '.join(ERROR_SHAPES)}.")
    check_flag(shadow=shadow)
    return Part(
        upstream=UpstreamPolicy(
            provider,
            From(tokens, "upstream tokens") if callable(tokens) else tokens,
            requests,
            From(label, "upstream label") if callable(label) else label,
            errors,
            shadow,
            models,
        )
    )
