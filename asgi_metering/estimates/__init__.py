"""
Estimates: how much a request may use, read from the request itself; and the cap that it is clamped to.

`openai_chat` and its siblings are holds for `billable`, of one dialect each; without any, a hold is estimated from
whatever looks like a request to a model. `clamp` writes what is affordable into the request.
"""

from __future__ import annotations

from asgi_metering.estimates.bodies import (
    DEFAULT_OUTPUT_TOKENS,
    asked_model,
    estimate_arguments,
    estimate_body,
)
from asgi_metering.estimates.clamping import clamp
from asgi_metering.estimates.ready import (
    anthropic_messages,
    by_line,
    embeddings,
    flat,
    flat_tokens,
    gemini,
    openai_chat,
    openai_responses,
)

__all__ = [
    "DEFAULT_OUTPUT_TOKENS",
    "anthropic_messages",
    "asked_model",
    "by_line",
    "clamp",
    "embeddings",
    "estimate_arguments",
    "estimate_body",
    "flat",
    "flat_tokens",
    "gemini",
    "openai_chat",
    "openai_responses",
]
