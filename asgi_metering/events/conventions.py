"""
Names: every instrument, attribute and event that leaves through OpenTelemetry, in one place.

Knows the OpenTelemetry conventions for GenAI and this package's own ``metering.`` namespace. Imports no
OpenTelemetry, and knows nothing of how a value is measured or sent.

Sources: semantic conventions 1.41.0 (the last release that published ``gen_ai.*``), and the repository
``open-telemetry/semantic-conventions-genai`` that they moved to, whose names are still in development.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

__all__ = [
    "ARGUMENTS",
    "OTHER",
    "OVERFLOW",
    "SCOPE",
    "TALLIES",
    "USAGE_EVENT",
    "GenAI",
    "Instrument",
    "Kind",
    "provider_name",
    "schema_url",
]

SCOPE: Final = "asgi_metering"
"""Name of the instrumentation scope."""

USAGE_EVENT: Final = "asgi_metering.usage"
"""Name of the event (a log record with ``event_name``) that says what one call consumed."""

OTHER: Final = "_OTHER"
"""Stands for a value that is missing, or beyond the number of values that one attribute may have."""

OVERFLOW: Final = "otel.metric.overflow"
"""The one attribute of what is beyond the number of attribute sets, as the SDK itself names it."""


class GenAI(StrEnum):
    """
    Which generation of the GenAI names to use.

    ``STABLE_SET`` is what backends know today (1.41.0); ``LATEST`` is the set that replaces it; ``BOTH`` serves a
    migration. `from_environment` follows ``OTEL_SEMCONV_STABILITY_OPT_IN``.
    """

    STABLE_SET = "1.41"
    LATEST = "latest"
    BOTH = "both"

    @classmethod
    def from_environment(cls) -> GenAI:
        """Follow ``OTEL_SEMCONV_STABILITY_OPT_IN``: ``gen_ai_latest_experimental`` in it is ``LATEST``."""
        chosen = os.environ.get("OTEL_SEMCONV_STABILITY_OPT_IN", "").split(",")
        return cls.LATEST if "gen_ai_latest_experimental" in map(str.strip, chosen) else cls.STABLE_SET


def schema_url(names: GenAI) -> str:
    """Return the schema that the names of *names* belong to."""
    if names is GenAI.LATEST:
        return "https://opentelemetry.io/schemas/gen-ai/1.42.0"
    return "https://opentelemetry.io/schemas/1.41.0"


# -- attributes --------------------------------------------------------------------------------------------

LINE: Final = "metering.line"
OUTCOME: Final = "metering.outcome"
BASIS: Final = "metering.basis"
UNIT: Final = "metering.unit"
AMOUNT: Final = "metering.amount"
"""Charged, in whole units; a float, for eyes and dashboards."""
AMOUNT_PARTS: Final = "metering.amount_parts"
"""Charged, in the unit's smallest parts; an exact int, for bills."""
HELD: Final = "metering.held"
HELD_PARTS: Final = "metering.held_parts"
ESTIMATED: Final = "metering.estimated"
ADMITTED: Final = "metering.admitted"
REFUSAL_REASON: Final = "metering.refusal.reason"
REASON: Final = "metering.reason"
CALL_ID: Final = "metering.call.id"
CORRECTS: Final = "metering.corrects"
"""Id of the call whose charge this event corrects."""
PAYER: Final = "metering.payer"
CALLER: Final = "metering.caller"
CALLER_TYPE: Final = "metering.caller_type"
USAGE_SOURCE: Final = "metering.usage.source"
AUDIO_TOKENS: Final = "metering.usage.audio_tokens"
"""Audio tokens of both directions; the conventions name each direction apart, which providers do not always tell."""
REQUEST_ID: Final = "metering.request.id"
SESSION_ID: Final = "metering.session.id"
DURATION: Final = "metering.call.duration_s"
EXTRA: Final = "metering.attributes."
"""Before the names of the application's own attributes of an event."""
NAMESPACES: Final = ("metering.", "gen_ai.")
"""Attributes of an event that begin so keep their names."""
SINK: Final = "metering.sink"
CAUSE: Final = "metering.cause"
STORE: Final = "metering.store"
ANSWER: Final = "metering.store.answer"
PROBLEM: Final = "metering.problem"

STATUS: Final = "http.response.status_code"
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 -- tokens of a model
MODALITY: Final = "gen_ai.token.modality"
UNKNOWN_MODALITY: Final = "unknown"

INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
CACHE_CREATION_TOKENS: Final = "gen_ai.usage.cache_creation.input_tokens"
"""Name in 1.41."""
CACHE_WRITE_TOKENS: Final = "gen_ai.usage.cache_write.input_tokens"
"""Name in the set that follows it."""
REASONING_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"

_PROVIDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "az.ai.inference": "azure.ai.inference",
        "az.ai.openai": "azure.ai.openai",
        "azure": "azure.ai.openai",
        "azure_ai": "azure.ai.inference",
        "azure_openai": "azure.ai.openai",
        "bedrock": "aws.bedrock",
        "gemini": "gcp.gemini",
        "google": "gcp.gemini",
        "mistral": "mistral_ai",
        "moonshot": "moonshot_ai",
        "vertex": "gcp.vertex_ai",
        "vertex_ai": "gcp.vertex_ai",
        "watsonx": "ibm.watsonx.ai",
        "xai": "x_ai",
    }
)


def provider_name(provider: str | None) -> str:
    """Return the convention's name of *provider*; a name that it does not know stays, as it allows."""
    return _PROVIDERS.get(provider, provider) if provider else OTHER


# -- instruments -------------------------------------------------------------------------------------------


class Kind(StrEnum):
    """How an instrument is written."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Instrument(NamedTuple):
    """
    One instrument.

    Attributes:
        name, unit, description: As OpenTelemetry has them.
        kind: How it is written.
        buckets: Advisory bucket boundaries of a histogram.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    buckets: tuple[float, ...] = ()


TOKEN_BUCKETS: Final = tuple(4.0**power for power in range(14))
"""Of ``gen_ai.client.token.usage``: 1, 4, 16, ... 67108864."""

DURATION_BUCKETS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""Seconds, those of ``gen_ai.client.operation.duration``: a metered call lasts as long as its model."""

CALLS: Final = Instrument("metering.calls", Kind.COUNTER, "{call}", "Metered calls that ended.")
CHARGED: Final = Instrument(
    "metering.amount", Kind.COUNTER, "", "Charged, in whole units; the instrument's unit names the unit."
)
RETURNED: Final = Instrument(
    "metering.amount_returned", Kind.COUNTER, "", "Given back by later corrections, in whole units."
)
CHARGED_PARTS: Final = Instrument(
    "metering.amount_parts", Kind.COUNTER, "{part}", "Charged in units of unknown scale, in their smallest parts."
)
CALL_DURATION: Final = Instrument(
    "metering.call.duration", Kind.HISTOGRAM, "s", "From admission to end of a call.", DURATION_BUCKETS
)
HOLD_BUCKETS: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 5.0)
"""Shares of a hold, closest where estimates are good."""

HOLD_USED: Final = Instrument(
    "metering.hold.used", Kind.HISTOGRAM, "1", "What a measured call was charged, of what it held.", HOLD_BUCKETS
)
TOKEN_USAGE: Final = Instrument(
    "gen_ai.client.token.usage",
    Kind.HISTOGRAM,
    "{token}",
    "Number of input and output tokens used.",
    TOKEN_BUCKETS,
)
USED_INPUT: Final = Instrument(
    "gen_ai.client.inference.usage.input_tokens", Kind.COUNTER, "{token}", "Input tokens, cached ones included."
)
USED_OUTPUT: Final = Instrument(
    "gen_ai.client.inference.usage.output_tokens", Kind.COUNTER, "{token}", "Output tokens, reasoning included."
)
USED_CACHE_READ: Final = Instrument(
    "gen_ai.client.inference.usage.cache_read.input_tokens",
    Kind.COUNTER,
    "{token}",
    "Input tokens read from a cache.",
)
USED_CACHE_WRITE: Final = Instrument(
    "gen_ai.client.inference.usage.cache_write.input_tokens",
    Kind.COUNTER,
    "{token}",
    "Input tokens written to a cache.",
)
USED_REASONING: Final = Instrument(
    "gen_ai.client.inference.usage.reasoning.output_tokens",
    Kind.COUNTER,
    "{token}",
    "Output tokens spent on reasoning.",
)
INPUT_PER_OPERATION: Final = Instrument(
    "gen_ai.client.inference.operation.input_tokens",
    Kind.HISTOGRAM,
    "{token}",
    "Input tokens of one operation.",
    TOKEN_BUCKETS,
)
OUTPUT_PER_OPERATION: Final = Instrument(
    "gen_ai.client.inference.operation.output_tokens",
    Kind.HISTOGRAM,
    "{token}",
    "Output tokens of one operation.",
    TOKEN_BUCKETS,
)

# -- tallies: what is counted besides usage events ---------------------------------------------------------


def _counter(name: str, unit: str, description: str) -> Instrument:
    return Instrument(f"metering.{name}", Kind.COUNTER, unit, description)


TALLIES: Final[Mapping[str, Instrument]] = MappingProxyType(
    {
        "refusals": _counter("refusals", "{refusal}", "Calls that were not admitted."),
        "shadow_admitted": _counter("shadow.admitted", "{call}", "Calls that shadow parts would have admitted."),
        "shadow_denied": _counter("shadow.denied", "{call}", "Calls that shadow parts would have refused."),
        "shadow_lost": _counter("shadow.lost", "{call}", "Calls of which it is not known what shadow parts would do."),
        "cuts": _counter("cuts", "{cut}", "Calls that were cut, since nothing more could be held for them."),
        "store_failures": _counter("store.failures", "{failure}", "Operations that the store did not answer."),
        "ends_queued": _counter("ends.queued", "{end}", "Ends of calls that had to wait for the store."),
        "ends_retried": _counter("ends.retried", "{end}", "Repeated attempts to book an end."),
        "ends_lost": _counter("ends.lost", "{end}", "Ends that were given up; the hold's expiry ends the call."),
        "holds_lost": _counter("holds.lost", "{hold}", "Holds that their policy ended while their call went on."),
        "ends_late": _counter("ends.late", "{end}", "Ends that came after the policy had ended the call."),
        "usage_late": _counter("usage.late", "{report}", "Reports of usage after the call had ended."),
        "costs_doubtful": _counter("costs.doubtful", "{call}", "Calls whose cost could not be told, or not believed."),
        "usage_unscoped": _counter("usage.unscoped", "{report}", "Reports of usage that no call was running for."),
        "drains_refused": _counter(
            "drains.refused", "{call}", "Handlers that were stopped with their client, since too many others go on."
        ),
        "usage_rejected": _counter("usage.rejected", "{report}", "Reports of usage that could not be believed."),
        "events_delivered": _counter("events.delivered", "{event}", "Usage events that a sink took."),
        "events_dropped": _counter("events.dropped", "{event}", "Usage events that were given up."),
        "deliveries_failed": _counter("deliveries.failed", "{delivery}", "Batches that a sink did not take."),
        "outbox_backlog": Instrument(
            "metering.outbox.backlog", Kind.GAUGE, "{event}", "Usage events that wait in the outbox."
        ),
        "outbox_lag": Instrument(
            "metering.outbox.lag", Kind.GAUGE, "s", "Age of the oldest usage event in the outbox."
        ),
        "store_outages": _counter("store.outages", "{outage}", "Times that the store was found to be down."),
        "store_up": Instrument("metering.store.up", Kind.GAUGE, "{store}", "1 while the store is asked, 0 while down."),
        "journal_backlog": Instrument(
            "metering.journal.backlog", Kind.GAUGE, "{entry}", "Entries of the journal that wait for the store."
        ),
        "journal_set_aside": Instrument(
            "metering.journal.set_aside", Kind.GAUGE, "{entry}", "Entries of the journal that a person has to look at."
        ),
        "holds": Instrument("metering.holds", Kind.GAUGE, "{hold}", "Holds that have not ended."),
    }
)
"""What `Meters` counts and gauges, by the names that the code uses."""

ARGUMENTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "line": LINE,
        "reason": REFUSAL_REASON,
        "sink": SINK,
        "cause": CAUSE,
        "store": STORE,
        "answer": ANSWER,
        "problem": PROBLEM,
    }
)
"""What tallies may be told apart by. No payer and no caller is among them, so that none can become an attribute."""
