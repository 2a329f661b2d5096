"""
LiteLLM: what its completions use, cost and leave of quotas, booked to the metered call that they were begun in.

    import litellm
    from asgi_metering.integrations.litellm import litellm_callback

    litellm.callbacks.append(litellm_callback(metering))

LiteLLM tells its callbacks of an answer in the background, on other threads and tasks, when the endpoint may have
returned long ago. So a call is looked up when a request is about to be sent (`log_pre_api_call`, which runs in the
context of whoever asks, also where LiteLLM changes to a thread for it) and is found again by LiteLLM's own
``litellm_call_id``; and the end of such a call waits, off the path of its response, until LiteLLM has told of what it
began, at most `witnesses.WAIT_S`.

In the terms of DESIGN 6 this source, ``litellm``, ranks below the handler and the upstream client, which saw the bytes,
and above OpenTelemetry's spans (LiteLLM writes such spans too), the body and the tokenizer. Knows LiteLLM by the names
of its callbacks and their arguments; LiteLLM is imported when a callback is made.
"""

from __future__ import annotations

import importlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name
from asgi_metering.usage.reader import UsageReader
from asgi_metering.witnesses import LITELLM, Told, Watched, Witness

if TYPE_CHECKING:
    from asgi_metering.clients import UpstreamClients

__all__ = ["MAX_COMPLETIONS", "litellm_callback"]

MAX_COMPLETIONS = 10_000
"""Completions that are remembered: LiteLLM never tells of a stream that was left early, and of some others twice."""

_PREFIX = "llm_provider-"
"""Before the names of the provider's own header fields, among those that LiteLLM adds to an answer."""

log = logging.getLogger("asgi_metering.upstream")


def litellm_callback(metering: UpstreamClients, *, label: str | None = None) -> Any:
    """
    Return a LiteLLM ``CustomLogger`` for ``litellm.callbacks``; one for each metering.

    Each completion's usage goes to the call in whose context it was begun, with its model, its cost as LiteLLM tells it
    (``response_cost``, on the usage event as ``metering.cost.usd_micros``: S3.20), and whether a limit cut it. Its
    provider's quotas go to ``metering.quotas`` under LiteLLM's name of the provider, those of refused and failed
    completions too (S1.44). Begun in no call, usage is ignored and counted (S3.26); told when its call has ended, it is
    refused and counted. Where LiteLLM counted the tokens of a stream itself, the usage event says ``estimated``: ask
    for ``stream_options={"include_usage": True}``.

    Args:
        metering: Whose quotas and tallies.
        label: Names the key of the providers, where several have quotas of their own; see `upstream_client`.

    Raises:
        ConfigurationError: LiteLLM is not installed, or the label is no name.

    Safe for several threads and event loops. What LiteLLM answers out of its own cache has used nothing.
    """
    if label is not None:
        check_name(label, "quota label")
    callback: Any = _callback_class()()
    callback.completions = _Completions(metering, label)
    return callback


@dataclass(slots=True)
class _Begun:
    """A completion that was begun: since when, and who watches it; nobody once it has ended, and it may come again."""

    watched: Watched | None
    started_at: float
    failed: bool = False


class _Completions:
    """LiteLLM's completions, by its ids, from the request until it tells what came of them."""

    def __init__(self, metering: UpstreamClients, label: str | None) -> None:
        self._metering = metering
        self._label = label
        self._witness = Witness(metering.meters, LITELLM)
        self._lock = threading.Lock()
        self._begun: OrderedDict[str, _Begun] = OrderedDict()

    def begin(self, told: Mapping[str, Any]) -> None:
        """Note the call that the request of a completion is sent in; a retry has the id of the first try."""
        name = told.get("litellm_call_id")
        if not isinstance(name, str):
            return
        with self._lock:
            known = self._begun.get(name)
            if known is not None and known.watched is not None:
                return
            is_retry = known is not None and known.failed
            watched = self._witness.begin(is_retry=is_retry, is_awaited=True)
            self._begun[name] = _Begun(watched, time.time(), failed=is_retry)
            while len(self._begun) > MAX_COMPLETIONS:
                _, oldest = self._begun.popitem(last=False)
                if oldest.watched is not None:
                    oldest.watched.drop(lacks=True)

    def succeed(self, told: Mapping[str, Any], answer: Any) -> None:
        """Take what came of a completion; what is told a second time is passed over."""
        begun = self._taken(told, failed=False)
        if begun.watched is None:
            return
        hidden = _as_mapping(getattr(answer, "_hidden_params", None), {})
        found = None if told.get("cache_hit") else self._told(told, answer, hidden)
        if found is None:
            begun.watched.drop(lacks=not told.get("cache_hit"))
        else:
            begun.watched.tell(found)
        self._read_quotas(told, _provider_fields(hidden.get("additional_headers")), 200, begun.started_at)

    def fail(self, told: Mapping[str, Any]) -> None:
        """Take what a completion that failed says of quotas: a refused try is a reading and no usage (S1.44)."""
        begun = self._taken(told, failed=True)
        if begun.watched is None:
            return
        begun.watched.drop()
        failure = told.get("exception")
        status = getattr(failure, "status_code", None)
        fields = getattr(failure, "litellm_response_headers", None)
        if isinstance(status, int) and fields is not None:
            self._read_quotas(told, _pairs(fields), status, begun.started_at)

    def _taken(self, told: Mapping[str, Any], *, failed: bool) -> _Begun:
        name = told.get("litellm_call_id")
        with self._lock:
            known = self._begun.get(name) if isinstance(name, str) else None
            if known is None:
                # Some providers' requests are not announced: then LiteLLM's own copy of the context has to do.
                watched = self._witness.begin()
                started = told.get("start_time")
                at = started.timestamp() if isinstance(started, datetime) else time.time()
                known = _Begun(watched, at)
            if isinstance(name, str):
                self._begun[name] = _Begun(None, known.started_at, failed=failed)
                self._begun.move_to_end(name)
        return known

    def _told(self, told: Mapping[str, Any], answer: Any, hidden: Mapping[str, Any]) -> Told | None:
        counted = _as_mapping(getattr(answer, "usage", None))
        if counted is None:
            return None
        report = _read(counted, _as_mapping(answer) or {})
        # LiteLLM's own count has no details; with them, the provider's does.
        counted_here = bool(told.get("stream")) and not counted.get("prompt_tokens_details")
        if report is None or report.usage is None or (counted_here and not report.usage.total):
            # Later versions put zeros where the provider reported nothing: no report of zero (S2.41).
            return None
        logged = _as_mapping(told.get("standard_logging_object"), {})
        cost = self._cost(told.get("response_cost"), hidden.get("response_cost"), logged.get("response_cost"))
        if cost is None and told.get("response_cost") is None and told.get("stream"):
            # LiteLLM tells of a stream's last chunks on threads of their own, and each of them takes away the cost
            # that the others have noted.
            cost = self._cost(_cost_of(answer, told))
        return Told(
            usage=report.usage,
            model=report.model or _text(told.get("model")),
            provider=_text(told.get("custom_llm_provider")),
            cost=cost,
            estimated=counted_here,
            truncated=report.truncated(),
        )

    def _cost(self, *offered: object) -> Decimal | None:
        """The first of them that is positive, in USD (S3.20); what is none is refused with an alarm (S3.21)."""
        found: Decimal | None = None
        for value in offered:
            if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
                continue
            cost = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
            if not cost.is_finite() or not 0 <= cost <= MAX_AMOUNT // 1_000_000:
                self._metering.meters.count("usage_rejected")
                log.error("LiteLLM says that a completion costs %s USD, which is not believed.", value)
            elif not found:
                found = cost
        return found

    def _read_quotas(
        self, told: Mapping[str, Any], fields: Iterable[tuple[bytes, bytes]], status: int, started_at: float
    ) -> None:
        provider = _text(told.get("custom_llm_provider"))
        if provider is not None:
            self._metering.quotas.record(
                provider, list(fields), status=status, started_at=started_at, label=self._label
            )


def _read(counted: Mapping[str, Any], answer: Mapping[str, Any]) -> Any:
    """Normalise a usage object as that of a chat answer, which is the shape that LiteLLM gives to all of them."""
    choices = [{"finish_reason": _as_mapping(each, {}).get("finish_reason")} for each in answer.get("choices") or ()]
    document = {
        "object": "chat.completion",
        "model": _text(answer.get("model")),
        "choices": choices,
        "usage": counted,
    }
    reader = UsageReader("application/json", None, "openai-chat")
    reader.feed(json.dumps(document, default=str).encode())
    reader.end()
    return reader.report()


def _cost_of(answer: Any, told: Mapping[str, Any]) -> float | None:
    """What LiteLLM's price list says that an answer costs, in USD; None where it does not say, or others hold."""
    if any("cost_per" in str(name) for name, value in _as_mapping(told.get("litellm_params"), {}).items() if value):
        return None
    try:
        cost: float = importlib.import_module("litellm").completion_cost(
            completion_response=answer,
            model=_text(told.get("model")),
            custom_llm_provider=_text(told.get("custom_llm_provider")),
        )
    except Exception as unknown:  # noqa: BLE001  # Of many kinds; a price that is not known is no fault.
        log.debug("LiteLLM knows no cost of an answer of %s: %s", told.get("model"), unknown)
        return None
    return cost


def _as_mapping(value: Any, otherwise: Any = None) -> Any:
    """A mapping, or what a pydantic object holds; *otherwise* for anything else."""
    if isinstance(value, Mapping):
        return value
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else otherwise


def _provider_fields(added: Any) -> Iterable[tuple[bytes, bytes]]:
    """The provider's own header fields, out of those that LiteLLM adds; it writes some of them a second time."""
    return _pairs(
        (str(name).removeprefix(_PREFIX), value)
        for name, value in _as_mapping(added, {}).items()
        if str(name).startswith(_PREFIX)
    )


def _pairs(fields: Any) -> Iterable[tuple[bytes, bytes]]:
    items = fields.items() if hasattr(fields, "items") else fields
    return [(str(name).encode("utf-8", "replace"), str(value).encode("utf-8", "replace")) for name, value in items]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


@cache
def _callback_class() -> Any:
    try:
        base: Any = importlib.import_module("litellm.integrations.custom_logger").CustomLogger
    except ImportError as failure:
        raise ConfigurationError("The LiteLLM callback needs LiteLLM. Run: pip install litellm") from failure

    class MeteringCallback(base):  # type: ignore[misc]  # LiteLLM is not imported before it is used.
        """Tells a metering of each of LiteLLM's completions; see `litellm_callback`."""

        completions: _Completions

        def log_pre_api_call(self, model: Any, messages: Any, kwargs: Mapping[str, Any]) -> None:
            """Note who asks."""
            self.completions.begin(kwargs)

        def log_success_event(
            self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Book an answer, on one of LiteLLM's threads."""
            self.completions.succeed(kwargs, response_obj)

        async def async_log_success_event(
            self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Book an answer, in one of LiteLLM's tasks."""
            self.completions.succeed(kwargs, response_obj)

        def log_failure_event(
            self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Note a failure."""
            self.completions.fail(kwargs)

        async def async_log_failure_event(
            self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Note a failure."""
            self.completions.fail(kwargs)

    return MeteringCallback
