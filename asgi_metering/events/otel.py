"""
The OpenTelemetry sink: metrics and log records by the GenAI conventions and this package's own names.

Knows the OpenTelemetry API, never an SDK, and installs no provider: without one of the application nothing happens.
Metrics are written in batches, one ``add`` for each attribute set, because one costs more than a whole admission.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from asgi_metering._version import __version__
from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.events import conventions as names
from asgi_metering.events.conventions import SCOPE, GenAI, Instrument, provider_name, schema_url
from asgi_metering.events.metrics import Attributes, Bounds, Value, create_instrument, get_meter
from asgi_metering.events.records import KnownUnits, Records, Traces, whole_units
from asgi_metering.usage.event import UsageEvent
from asgi_metering.usage.values import TokenUsage

if TYPE_CHECKING:
    from opentelemetry._logs import Logger, LoggerProvider
    from opentelemetry.metrics import MeterProvider

__all__ = ["OTelSink"]

log = logging.getLogger("asgi_metering.events")

CHUNK: Final = 32
"""Events between two breaths of the event loop: records and histograms of so many take about a millisecond."""

FLUSH_AFTER: Final = 1_024
"""Log records handed over before waiting until they left: the SDK's queue keeps 2,048 and drops what is beyond."""

MAX_BEGUN: Final = 10_000
"""Events remembered as written although their batch was not taken as a whole."""

_COUNTED_BY_TOKENIZER: Final = "tokenizer"


class OTelSink:
    """
    Writes usage events to the application's OpenTelemetry providers.

    Metrics, none with a payer or a caller, each attribute with a bounded number of values:

    - ``metering.calls`` {call}, by line, outcome, basis and unit;
    - ``metering.amount``, charged by the same, **in whole units**; the instrument's unit is the unit's name in braces,
      and each unit has a scope of its own, ``asgi_metering.<unit>``, since sums over units mean nothing. What later
      corrections gave back is ``metering.amount_returned``. Units of unknown scale: ``metering.amount_parts``;
    - ``metering.call.duration`` s, by line, outcome and HTTP status;
    - ``gen_ai.client.token.usage`` {token}, or the counters that follow it, by provider, model and operation. Counts of
      the tokenizer are left out, as the convention wants, unless *counted_tokens*.

    Histograms are recorded in the call's own trace, so that exemplars lead to it where it was sampled.

    And one log record for each event, named ``asgi_metering.usage``, in the call's own trace, with the payer and exact
    amounts (``metering.amount_parts``).

    An event counts as delivered when the providers have it; from there on the SDK's rules hold, and an SDK drops log
    records that its exporter could not send. When the process ends both are flushed. Where each record must arrive, use
    `otlp.OTLPLogSink` and ``logs=False``.

    Args:
        meter_provider: The application's by default, also if it is installed later.
        logger_provider: The application's by default, also if it is installed later.
        generation: Which GenAI names; by default `GenAI.from_environment`.
        units: Units whose scale is known; the sink of a `Metering` that is given none knows all of its units.
        operation: ``gen_ai.operation.name`` of events that do not say theirs in ``attributes``.
        counted_tokens: Report also tokens that were counted offline.
        logs: Write log records.
        name: The sink's name.
    """

    def __init__(
        self,
        meter_provider: MeterProvider | None = None,
        logger_provider: LoggerProvider | None = None,
        *,
        generation: GenAI | None = None,
        units: Iterable[Unit] = (CREDITS,),
        operation: str = "chat",
        counted_tokens: bool = False,
        logs: bool = True,
        name: str = "opentelemetry",
    ) -> None:
        self.name = name
        self._generation = GenAI.from_environment() if generation is None else generation
        self._units = KnownUnits(units)
        self._meter_provider = meter_provider
        self._logger_provider = logger_provider
        self._operation = operation
        self._counted_tokens = counted_tokens
        self._logs = logs
        self._metrics: _Metrics | None = None
        self._records: Records | None = None
        self._logger: Logger | None = None
        self._begun: set[str] = set()
        self._unflushed = 0

    @property
    def enabled(self) -> bool:
        """Whether there is a provider to write to, other than the API's own no-op (S2.4)."""
        if self._meter_provider is not None or self._logger_provider is not None:
            return True
        from opentelemetry.metrics import get_meter_provider

        # The API's own providers are private classes of its own modules; whatever else is installed is somebody's.
        if not type(get_meter_provider()).__module__.startswith("opentelemetry.metrics"):
            return True
        logs = _logger_provider() if self._logs else None
        return logs is not None and not type(logs).__module__.startswith("opentelemetry._logs")

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """
        See `Sink.deliver`. Each event is written once, also if an earlier delivery of it was cut short.

        Counters are added when the whole batch is through; records and histograms in chunks, letting others run.
        """
        metrics = self._open()
        new = [event for event in events if event.id not in self._begun]
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            self._emit(chunk)
            for event in chunk:
                metrics.record(event)
                if len(self._begun) < MAX_BEGUN:
                    self._begun.add(event.id)
            await asyncio.sleep(0)
        await self._pace()
        metrics.add(events)
        self._begun.difference_update(event.id for event in events)

    async def flush(self) -> None:
        """
        Have the providers export what they hold. Servers that a signal ends (uvicorn) leave them no other chance.

        In threads of its own, which hold up nobody: an exporter whose collector is away takes its time.
        """
        from opentelemetry.metrics import get_meter_provider

        providers = (
            self._meter_provider or get_meter_provider(),
            (self._logger_provider or _logger_provider()) if self._logs else None,
        )
        flushes = [getattr(provider, "force_flush", None) for provider in providers]
        await asyncio.gather(*(_aside(flush) for flush in flushes if flush is not None))

    def _open(self) -> _Metrics:
        """Import the API at the first delivery, and create each instrument once."""
        if self._metrics is None:
            self._metrics = _Metrics(
                self._meter_provider, self._generation, self._units, self._operation, self._counted_tokens
            )
            if self._logs:
                self._open_logger()
        return self._metrics

    def _open_logger(self) -> None:
        try:
            from opentelemetry import _logs

            self._records = Records(self._generation, self._units)
            url = schema_url(self._generation)
            self._logger = _logs.get_logger(SCOPE, __version__, self._logger_provider, url)
        except ImportError as error:
            # The logs API is still behind an underscore, so a release may move it; metrics go on.
            log.warning(
                "This OpenTelemetry has no logs API that is known here (%s): no log records are written.", error
            )

    def _emit(self, events: Sequence[UsageEvent]) -> None:
        logger, records = self._logger, self._records
        if logger is None or records is None or not logger.enabled(event_name=names.USAGE_EVENT):
            return
        for event in events:
            logger.emit(**records.fields(event))
        self._unflushed += len(events)

    async def _pace(self) -> None:
        """Wait for the SDK before its queue overflows. A provider that cannot flush, as the API's own, is not asked."""
        if self._unflushed < FLUSH_AFTER:
            return
        flush = getattr(self._logger_provider or _logger_provider(), "force_flush", None)
        if flush is not None:
            await asyncio.to_thread(flush)
        self._unflushed = 0


def _aside(work: Callable[[], object]) -> asyncio.Future[None]:
    """Run *work* in a thread that the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell(failure: Exception | None) -> None:
        if ended.done():
            return
        if failure is None:
            ended.set_result(None)
        else:
            ended.set_exception(failure)

    def run() -> None:
        failure = None
        try:
            work()
        except Exception as raised:  # noqa: BLE001 -- the SDK's, told to whoever waits
            failure = raised
        # Nobody waits any more where the loop is closed.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, failure)

    threading.Thread(target=run, name="asgi_metering flush", daemon=True).start()
    return ended


def _logger_provider() -> LoggerProvider | None:
    """The application's provider. None where the logs API, still behind an underscore, has moved: metrics go on."""
    try:
        from opentelemetry._logs import get_logger_provider
    except ImportError:
        return None
    return get_logger_provider()


class _Metrics:
    """The instruments, and what of an event goes where."""

    def __init__(
        self,
        provider: MeterProvider | None,
        generation: GenAI,
        units: KnownUnits,
        operation: str,
        counted_tokens: bool,
    ) -> None:
        self._provider = provider
        self._generation = generation
        self._units = units
        self._operation = operation
        self._counted_tokens = counted_tokens
        self._bounds = Bounds()
        self._traces = Traces()
        self._meter = get_meter(provider, generation)
        self._instruments: dict[tuple[Instrument, str | None], Any] = {}

    def record(self, event: UsageEvent) -> None:
        """Record what has no bulk form: each value of a histogram, in its call's trace, to which exemplars lead."""
        trace = self._traces.of(event)
        if names.CORRECTS not in event.attributes:
            place: dict[str, Value | None] = {names.LINE: event.line, names.OUTCOME: event.outcome}
            if event.status is not None:
                place[names.STATUS] = event.status
            self._get(names.CALL_DURATION).record(event.duration_s, dict(self._bounds.attributes(place)), trace)
            if event.usage is not None and event.held > 0:
                line = self._bounds.attributes({names.LINE: event.line})
                self._get(names.HOLD_USED).record(event.amount / event.held, dict(line), trace)
        usage = self._tokens(event)
        if usage is None:
            return
        model = self._model(event)
        for side, per_operation, count in (
            ("input", names.INPUT_PER_OPERATION, usage.input),
            ("output", names.OUTPUT_PER_OPERATION, usage.output),
        ):
            if count is None:
                continue
            if self._generation is not GenAI.LATEST:
                attributes = self._bounds.attributes({**model, names.TOKEN_TYPE: side})
                self._get(names.TOKEN_USAGE).record(count, dict(attributes), trace)
            if self._generation is not GenAI.STABLE_SET:
                self._get(per_operation).record(count, dict(self._bounds.attributes(model)), trace)

    def add(self, events: Sequence[UsageEvent]) -> None:
        """Add up *events* by attribute set, then call each counter once for each set."""
        tally: dict[tuple[Instrument, str | None, Attributes], int] = defaultdict(int)
        for event in events:
            for key, amount in self._counts(event):
                tally[key] += amount
        for (instrument, unit, attributes), amount in tally.items():
            known = None if unit is None else self._units.get(unit)
            value = amount if known is None else whole_units(amount, known)
            self._get(instrument, unit).add(value, dict(attributes))

    def _counts(self, event: UsageEvent) -> Iterator[tuple[tuple[Instrument, str | None, Attributes], int]]:
        place = self._bounds.attributes(
            {
                names.LINE: event.line,
                names.OUTCOME: event.outcome,
                names.BASIS: event.basis,
                names.UNIT: event.unit,
            }
        )
        if names.CORRECTS not in event.attributes:
            yield (names.CALLS, None, place), 1
        if self._units.get(event.unit) is None:
            yield (names.CHARGED_PARTS, None, place), max(event.amount, 0)
        elif event.amount >= 0:
            yield (names.CHARGED, event.unit, place), event.amount
        else:
            yield (names.RETURNED, event.unit, place), -event.amount
        usage = self._tokens(event)
        if usage is None or self._generation is GenAI.STABLE_SET:
            return
        model = self._bounds.attributes({**self._model(event), names.MODALITY: names.UNKNOWN_MODALITY})
        for instrument, count in (
            (names.USED_INPUT, usage.input),
            (names.USED_OUTPUT, usage.output),
            (names.USED_CACHE_READ, usage.cached),
            (names.USED_CACHE_WRITE, usage.cache_write),
            (names.USED_REASONING, usage.reasoning),
        ):
            if count is not None:
                yield (instrument, None, model), count

    def _tokens(self, event: UsageEvent) -> TokenUsage | None:
        counted = event.usage_source == _COUNTED_BY_TOKENIZER
        return None if counted and not self._counted_tokens else event.usage

    def _model(self, event: UsageEvent) -> dict[str, Value | None]:
        model: dict[str, Value | None] = {
            names.OPERATION: event.attributes.get(names.OPERATION, self._operation),
            names.PROVIDER: provider_name(event.provider),
        }
        if event.model is not None:
            model[names.REQUEST_MODEL] = event.attributes.get(names.REQUEST_MODEL, event.model)
            model[names.RESPONSE_MODEL] = event.model
        return model

    def _get(self, instrument: Instrument, unit: str | None = None) -> Any:
        made = self._instruments.get((instrument, unit))
        if made is None:
            if unit is None:
                made = create_instrument(self._meter, instrument)
            else:
                meter = get_meter(self._provider, self._generation, f"{SCOPE}.{unit}")
                made = create_instrument(meter, instrument._replace(unit=f"{{{unit}}}"))
            self._instruments[instrument, unit] = made
        return made
