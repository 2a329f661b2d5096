"""
Measuring: what a call has used, from the ranked sources of usage.

Judges each upstream exchange, or the body that passes to the client, by itself: what reported to its end counts as it
reported, what broke counts as it was observed. Asks no store, and never decides what is charged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from asgi_metering.prices import MeasuredPrice
from asgi_metering.rules.ending import Cause
from asgi_metering.tokens import DEFAULT_ENCODING, TokenCount, count_tokens_async, estimate_tokens, tokens_of
from asgi_metering.usage import TokenUsage, UsageReader, UsageReport

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["Metered", "TextCounts", "committed_usage", "failed_in_band", "metered_usage", "observed_usage"]


ERRORS = 400
"""From here on a status says that an answer is an error."""

NO_TOKENS = TokenCount(0, estimated=False, encoding=DEFAULT_ENCODING)


@dataclass(frozen=True, slots=True)
class Metered:
    """
    What is known of a call's usage, from the best source that said anything (DESIGN 6).

    Attributes:
        usage: The sum over the call's upstream calls, by that source; None if nobody reported.
        source: ``handler``, ``upstream``, ``body`` or ``tokenizer``.
        model, provider: As the source named them.
        complete: All of it is reported, and nothing is only what had been seen until a stream broke.
        estimated: Something in it was estimated rather than counted.
    """

    usage: TokenUsage | None = None
    source: str | None = None
    model: str | None = None
    provider: str | None = None
    complete: bool = False
    estimated: bool = False


class Part(NamedTuple):
    """One upstream exchange, or the body: who answered, what it reported, who reads it, whether its end was seen."""

    provider: str | None
    report: UsageReport | None
    reader: UsageReader | None
    ended: bool

    @property
    def usage(self) -> TokenUsage | None:
        """What it reported so far."""
        return self.report.usage if self.report is not None else None

    @property
    def final(self) -> bool:
        """
        Whether what it reported is all that it used.

        A reported zero is zero (S2.41), but only behind an end: before it, an output of zero is the placeholder that
        some gateways put into every chunk.
        """
        report = self.report
        if report is None or report.usage is None or report.partial:
            return False
        return report.complete or self.ended or bool(report.usage.output)

    @property
    def wrote(self) -> bool:
        """
        Whether it is an answer of a model that can be counted by its text although it reported nothing.

        Text of a known dialect, or a stream that broke; never whatever else passes through such a client, like a page
        or the JSON of a search.
        """
        if self.reader is None:
            return False
        heard = self.reader.heard()
        ended = self.ended or (self.report is not None and self.report.complete)
        written = bool(heard.text or heard.more_chars)
        return (self.reader.known and (written or not ended)) or (self.reader.streams and written and not ended)


def metered_usage(call: Call) -> Metered:
    """The highest source that reported anything, for all of the call's upstream calls (S2.42)."""
    if call.reports:
        last = call.reports[-1]
        return Metered(_recorded(call), "handler", last.model, last.provider, complete=True)
    return _from_upstream(call) or _from_body(call) or Metered()


def _recorded(call: Call) -> TokenUsage:
    return TokenUsage.sum(report.usage for report in call.reports)


def _exchanges(call: Call) -> list[Part]:
    return [
        Part(name, reader.report(), reader, reader.ended) for name, reader, status in call.exchanges if status < ERRORS
    ]


def _body(call: Call) -> Part | None:
    if call.observer is None:
        return None
    return Part(None, call.observer.report(), None, ended=call.cause is Cause.COMPLETED)


def _from_upstream(call: Call) -> Metered | None:
    usage: TokenUsage | None = None
    model = provider = None
    complete = True
    for part in _exchanges(call):
        if part.report is None or part.usage is None:
            complete = complete and not part.wrote
            continue
        usage = part.usage + usage
        model, provider = part.report.model or model, part.provider
        complete = complete and part.final
    return None if usage is None else Metered(usage, "upstream", model, provider, complete)


def _from_body(call: Call) -> Metered | None:
    part = _body(call)
    if part is None or part.report is None or part.usage is None:
        return None
    return Metered(part.usage, "body", part.report.model, part.report.dialect, complete=part.final)


def failed_in_band(call: Call) -> bool:
    """
    Whether an error came inside of an answer that began as a success, as providers send them behind a 200.

    Such a call has failed as if the handler had said so (DESIGN "End of call"), also where its stream counted tokens
    before or after the error: those are told on the event, and charged by choice. A handler that reports usage itself
    also says itself when it failed. The error of an upstream exchange counts unless another one answered; one in the
    body does where the call is charged by usage, whose reading it is.
    """
    if call.reports:
        return False
    body = _body(call) if call.charge is not None and call.charge.measured else None
    if body is not None and body.report is not None and body.report.error:
        return True
    parts = [part for part in _exchanges(call) if part.report is not None]
    last = parts[-1].report if parts else None
    return last is not None and last.error and not any(part.final for part in parts)


# -- what was observed -------------------------------------------------------------------------------------


def _parts(call: Call, known: Metered) -> list[Part]:
    """
    What the observation sums up: the upstream exchanges if any of them reported, or if nobody did and they wrote.

    The upstream client ranks above the body (DESIGN 6), which may be what the application made of its answers. Before
    the first byte only reports count (DESIGN "End of call"), and in the body of an error it is the same.
    """
    exchanges = _exchanges(call)
    if known.source != "body":
        counted = [part for part in exchanges if part.usage is not None or (_begun(call) and part.wrote)]
        if counted:
            return counted
    body = _body(call)
    if body is None or call.observer is None:
        return []
    if call.status is not None and call.status >= ERRORS:
        # The text of an error is no model's output, and nothing says that its prompt was read.
        return [] if body.usage is None else [body]
    return [body._replace(reader=call.observer.text_reader())]


def _input_side(usage: TokenUsage) -> TokenUsage:
    return TokenUsage(input=usage.input, cached=usage.cached, cache_write=usage.cache_write, audio=usage.audio)


def _given(call: Call, part: Part) -> tuple[TokenUsage, bool]:
    """
    The input of an answer that broke, and whether it is a guess.

    As far as it reported: cache reads and writes too, since Anthropic counts them in its first event. Else what the
    request asked for, once a byte went out: then the prompt was read.
    """
    seen = part.usage
    if seen is not None and seen.input:
        return _input_side(seen), False
    if call.asked is not None and _begun(call):
        return _input_side(call.asked), True
    return TokenUsage(input=0), True


def _observation(given: TokenUsage, output: int) -> TokenUsage:
    return TokenUsage(given.input, output, given.cached, given.cache_write, None, given.audio)


def _begun(call: Call) -> bool:
    """
    Whether what was written counts, and the prompt as read: once a byte went out (DESIGN "End of call").

    For a hold that grows from the beginning: what an upstream has written is money that is gone.
    """
    return call.first_byte or (call.growth is not None and call.cause in (None, Cause.CUT))


class TextCounts:
    """Tokens of texts that grow, for whoever looks at them now and again: of each text only what is new is counted."""

    def __init__(self) -> None:
        self._counted: dict[UsageReader, tuple[int, TokenCount]] = {}

    async def count(self, reader: UsageReader, text: str) -> TokenCount:
        """The tokens of *text*, which *reader* has read so far; one more, at most, for each time it was looked at."""
        chars, before = self._counted.get(reader, (0, NO_TOKENS))
        if len(text) < chars:
            # What was taken for text was none, once the dialect was known.
            chars, before = 0, NO_TOKENS
        more = await count_tokens_async(text[chars:])
        total = replace(more, tokens=before.tokens + more.tokens, estimated=before.estimated or more.estimated)
        self._counted[reader] = len(text), total
        return total


async def observed_usage(call: Call, known: Metered, counts: TextCounts | None = None) -> Metered:
    """
    What was delivered (DESIGN 4 "Observed"), each upstream exchange judged by itself and all of them added.

    Args:
        call: Whose.
        known: What was reported.
        counts: Remembers what was counted, for a call that runs; without it all is counted anew.

    An answer that reported to its end counts as it reported; of one that broke the input counts as far as it is
    known, and the output is counted from the text that passed. Whatever is not counted makes it an estimate.
    """
    if known.complete:
        return known
    usage: TokenUsage | None = None
    model, estimated = known.model, False
    for part in _parts(call, known):
        model = (part.report.model if part.report is not None else None) or model
        if part.usage is not None and (part.final or part.reader is None):
            usage = part.usage + usage
            continue
        given, guessed = _given(call, part)
        output = 0
        if part.reader is not None:
            heard = part.reader.heard()
            text = heard.text
            counted = await (count_tokens_async(text) if counts is None else counts.count(part.reader, text))
            output = counted.tokens + tokens_of(heard.more_chars)
            guessed = guessed or heard.estimated or counted.estimated
        usage = _observation(given, output) + usage
        estimated = estimated or guessed
    return Metered(usage or TokenUsage(input=0, output=0), "tokenizer", model, known.provider, estimated=estimated)


# -- what a handler may still spend ------------------------------------------------------------------------


def committed_usage(call: Call, price: MeasuredPrice, *, expected: bool) -> TokenUsage:
    """
    What a running call has used and, with *expected*, what its request will use of input, whichever costs more.

    Never waits: what running exchanges wrote is guessed from its length.

    Raises:
        UsageError: It adds up to more than can be counted.
    """
    spent = _recorded(call) if call.reports else _spent(_parts(call, metered_usage(call)))
    asked = call.asked
    if not expected or asked is None or price.cost(_input_side(asked)) <= price.cost(_input_side(spent)):
        return spent
    audio = max(asked.audio or 0, spent.audio or 0) or None
    return TokenUsage(asked.input, spent.output, asked.cached, asked.cache_write, spent.reasoning, audio)


def _spent(parts: Iterable[Part]) -> TokenUsage:
    total = TokenUsage()
    for part in parts:
        seen = part.usage or TokenUsage()
        if not part.final and part.reader is not None:
            heard = part.reader.heard()
            written = estimate_tokens(heard.text) + tokens_of(heard.more_chars)
            seen = _observation(_input_side(seen), max(written, seen.output or 0))
        total = total + seen
    return total
