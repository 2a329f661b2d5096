"""
OpenTelemetry: token usage out of the GenAI spans of instrumented SDKs, booked to the metered call that they ran in.

    from opentelemetry.sdk.trace import TracerProvider
    from asgi_metering.integrations.otel_genai import GenAIUsageProcessor

    tracer_provider.add_span_processor(GenAIUsageProcessor(metering))

For applications whose SDKs are instrumented already and take no client of ours. In the terms of DESIGN 6 this source,
``telemetry``, ranks below the handler, the upstream client and LiteLLM, and above the body and the tokenizer. Only
spans that are recorded tell anything: where a sampler drops them their usage is not seen, so use the upstream client
where money depends on it.

Sources: the GenAI conventions, with the names of 1.41 and those of ``semantic-conventions-genai`` after it; older
instrumentations still write ``prompt_tokens``, ``completion_tokens`` and their own names of cached ones.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from asgi_metering.errors import MissingExtraError, UsageError
from asgi_metering.events import conventions as names
from asgi_metering.opening import Opening
from asgi_metering.usage import TokenUsage, UsageReport
from asgi_metering.usage.values import read_count
from asgi_metering.witnesses import TELEMETRY, Told, Watched, Witness, current_opening

try:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import StatusCode
except ImportError as failure:
    raise MissingExtraError("The OpenTelemetry span processor", "otlp") from failure

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span
    from opentelemetry.trace import SpanContext

    from asgi_metering.metering import Metering

__all__ = ["INFERENCE", "MAX_SPANS", "GenAIUsageProcessor"]

MAX_SPANS: Final = 10_000
"""Spans of calls that are remembered until they end: of more the oldest are forgotten, for some never end."""

INFERENCE: Final = frozenset({"chat", "generate_content", "text_completion", "embeddings"})
"""Operations that ask a model: while one of them runs, what a call has used is not whole."""

_REPEATS: Final = frozenset({"fetch_response"})
"""Operations that show the usage of an answer that was counted before."""

_COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "input": (names.INPUT_TOKENS, "gen_ai.usage.prompt_tokens"),
    "output": (names.OUTPUT_TOKENS, "gen_ai.usage.completion_tokens"),
    "cached": (names.CACHE_READ_TOKENS, "gen_ai.usage.cache_read_input_tokens"),
    "cache_write": (
        names.CACHE_WRITE_TOKENS,
        names.CACHE_CREATION_TOKENS,
        "gen_ai.usage.cache_creation_input_tokens",
    ),
    "reasoning": (names.REASONING_TOKENS, "gen_ai.usage.reasoning_tokens"),
}
"""Under which names a span counts, the newest first."""

_FINISH: Final = "gen_ai.response.finish_reasons"
_ANSWER: Final = "gen_ai.response.id"
_SYSTEM: Final = "gen_ai.system"  # Since renamed to gen_ai.provider.name.

log = logging.getLogger("asgi_metering.upstream")


@dataclass(slots=True)
class _Running:
    """A span of a call: where it began, under which span, who watches it, and whether a span below it has told."""

    opening: Opening
    parent: int | None
    watched: Watched | None
    told_below: bool = False


class GenAIUsageProcessor(SpanProcessor):
    """
    A span processor that books ``gen_ai.usage.*`` of finished spans to the metered call that they ran in.

    That is the call in whose context the span was started, else that of a span above it, the server's included, where
    OpenTelemetry's context goes to places that Python's does not. Of spans inside each other, such as an agent's around
    its model's, the innermost that tell count, and no other. Of spans beside each other that tell of one answer, by its
    id and the same counts, one does: a framework and the SDK below it may both be instrumented. What ends behind
    the end of its call is refused and counted, what belongs to no call is ignored and counted (S3.26). A recorded span
    without usage leaves the usage of its call incomplete, unless it failed.

    Args:
        metering: Whose calls and tallies.

    Raises:
        MissingExtraError: When this module is imported: the OpenTelemetry SDK is not installed.

    Never raises into the application, never blocks, keeps no span. Safe for several threads.
    """

    def __init__(self, metering: Metering) -> None:
        self._metering = metering
        self._witness = Witness(metering.meters, TELEMETRY)
        self._lock = threading.Lock()
        self._running: OrderedDict[int, _Running] = OrderedDict()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Note which call the span runs in."""
        context = span.get_span_context()
        attributes = span.attributes or {}
        is_genai = any(name.startswith("gen_ai.") for name in attributes)
        opening = current_opening() or self._opening_above(span.parent, is_genai=is_genai)
        if opening is None or context is None:
            return
        asks = is_genai and attributes.get(names.OPERATION) in INFERENCE
        watched = self._witness.begin_in(opening) if asks else None
        parent = None if span.parent is None else span.parent.span_id
        with self._lock:
            self._running[context.span_id] = _Running(opening, parent, watched)
            forgotten = self._running.popitem(last=False)[1] if len(self._running) > MAX_SPANS else None
        if forgotten is not None and forgotten.watched is not None:
            forgotten.watched.drop(lacks=True)

    def on_end(self, span: ReadableSpan) -> None:
        """Book what the span has used."""
        context = span.get_span_context()
        attributes = span.attributes or {}
        with self._lock:
            running = None if context is None else self._running.pop(context.span_id, None)
        usage = self._usage(attributes) if attributes.get(names.OPERATION) not in _REPEATS else None
        if running is not None and running.told_below:
            usage = None
        if usage is None:
            if running is not None and running.watched is not None:
                failed = span.status.status_code is StatusCode.ERROR
                running.watched.drop(lacks=not (failed or running.told_below))
            return
        if running is not None:
            self._mark_above(running)
        opening = None if running is None else running.opening
        watched = None if running is None else running.watched
        (watched or self._witness.begin_in(opening)).tell(_told(usage, attributes))

    def _opening_above(self, parent: SpanContext | None, *, is_genai: bool) -> Opening | None:
        """Where the span above runs; where nothing is known of that, the call whose own trace it is."""
        if parent is None:
            return None
        with self._lock:
            above = self._running.get(parent.span_id)
        if above is not None:
            return above.opening
        if not is_genai:
            return None
        ours = {"trace_id": f"{parent.trace_id:032x}", "span_id": f"{parent.span_id:016x}"}
        for call in self._metering.calls_in_flight():
            # A charge inside of a request runs in the same trace: what cannot be told apart is the request's.
            if ours.items() <= call.trace.items() and call.opening.around is None:
                return call.opening
        return None

    def _mark_above(self, running: _Running) -> None:
        with self._lock:
            above = running.parent
            while above is not None and (found := self._running.get(above)) is not None and not found.told_below:
                found.told_below = True
                above = found.parent

    def _usage(self, attributes: Mapping[str, Any]) -> TokenUsage | None:
        """What the span counts; None if nothing, or nothing that can be believed, with an alarm."""
        try:
            counts = {
                axis: read_count(next((attributes[name] for name in known if name in attributes), None))
                for axis, known in _COUNTS.items()
            }
        except UsageError as failure:
            self._metering.meters.count("usage_rejected")
            log.error("A span counts tokens that are not believed: %s", failure)
            return None
        if counts["input"] is None and counts["output"] is None:
            return None
        return TokenUsage(**counts)


def _told(usage: TokenUsage, attributes: Mapping[str, Any]) -> Told:
    model = attributes.get(names.RESPONSE_MODEL) or attributes.get(names.REQUEST_MODEL)
    provider = attributes.get(names.PROVIDER) or attributes.get(_SYSTEM)
    reasons = attributes.get(_FINISH) or ()
    answer = attributes.get(_ANSWER)
    return Told(
        usage=usage,
        model=None if model is None else str(model),
        provider=None if provider is None else str(provider),
        truncated=any(UsageReport(finish_reason=str(reason)).truncated() for reason in reasons),
        answer=None if not answer else str(answer),
    )
