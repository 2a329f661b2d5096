"""
Measuring: what a call has used, from the ranked sources of usage.

Judges each upstream exchange, or the body that passes to the client, by itself: what reported to its end counts as it
reported, what broke counts as it was observed. Asks no store, and never decides what is charged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from asgi_metering.exchanges import Exchanges, Sum
from asgi_metering.itemised import ERRORS, answers_in, as_asked, calls_of, counted_call, model_call
from asgi_metering.prices import Costing, MeasuredPrice, ModelCall
from asgi_metering.prices.costing import WEB_SEARCHES
from asgi_metering.rules.ending import Cause
from asgi_metering.tokens import DEFAULT_ENCODING, TokenCount, count_tokens_async, estimate_tokens, tokens_of
from asgi_metering.usage import TokenUsage, UsageReader, UsageReport
from asgi_metering.witnesses import WITNESSES, Told

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = [
    "Metered",
    "Part",
    "TextCounts",
    "answers_sent",
    "committed_usage",
    "failed_in_band",
    "given_input",
    "metered_usage",
    "observation",
    "observed_usage",
    "parts_in",
    "parts_of",
    "problems_of",
    "read_session",
    "searches_made",
    "upstream_calls",
]


MANY_TEXTS = 100
"""Texts that are counted as they grow, after which those are forgotten that grow no more."""

NO_TOKENS = TokenCount(0, estimated=False, encoding=DEFAULT_ENCODING)


@dataclass(frozen=True, slots=True)
class Metered:
    """
    What is known of a call's usage, from the best source that said anything (DESIGN 6).

    Attributes:
        usage: The sum over the call's upstream calls, by that source; None if nobody reported.
        source: ``handler``, ``upstream``, ``litellm``, ``telemetry``, ``body`` or ``tokenizer``, in their order.
        model, provider: As the source named them.
        complete: All of it is reported, and nothing is only what had been seen until a stream broke.
        estimated: Something in it was estimated rather than counted.
        cost: What the providers say that it costs, in USD, as far as they say it; never what the call is charged.
        calls: Each call of a model by itself, where some of it was observed rather than reported.
        costing: What it costs, once that was asked.
    """

    usage: TokenUsage | None = None
    source: str | None = None
    model: str | None = None
    provider: str | None = None
    complete: bool = False
    estimated: bool = False
    cost: Decimal | None = None
    calls: tuple[ModelCall, ...] = ()
    costing: Costing | None = None


class Part(NamedTuple):
    """One upstream exchange, or the body: who answered, what it reported, who reads it, whether its end was seen."""

    provider: str | None
    report: UsageReport | None
    reader: UsageReader | Sum | None
    ended: bool

    @property
    def usage(self) -> TokenUsage | None:
        """What it reported so far."""
        return self.report.usage if self.report is not None else None

    @property
    def reported(self) -> bool:
        """Whether it reported any, rather than that some was counted of it."""
        return self.usage is not None and not (isinstance(self.reader, Sum) and self.reader.unreported)

    @property
    def told_output(self) -> int:
        """How many output tokens it reported so far; 0 for a seed, which is no count."""
        report = self.report
        return 0 if report is None or report.usage is None or report.partial else report.usage.output or 0

    @property
    def final(self) -> bool:
        """
        Whether what it reported is all that it used.

        A reported zero is zero (S2.41), but only behind an end: before it, an output of zero is the placeholder that
        some gateways put into every chunk, and any other one the sum so far, as Gemini tells it, unless the model had
        finished. A side that was not reported is missing, and never zero.
        """
        report = self.report
        if report is None or report.usage is None or report.partial:
            return False
        if report.usage.input is None or report.usage.output is None:
            return False
        return report.complete or self.ended or (bool(report.usage.output) and report.finish_reason is not None)

    @property
    def written(self) -> int | None:
        """The output that it reported to its end; None where its text has to be counted."""
        report = self.report
        if report is None or report.usage is None or report.partial or not (report.complete or self.ended):
            return None
        return report.usage.output

    @property
    def wrote(self) -> bool:
        """
        Whether it is an answer of a model that can be counted by its text although it reported nothing.

        Text of a known dialect, or a stream that broke; never whatever else passes through such a client, like a page
        or the JSON of a search.
        """
        if self.reader is None:
            return False
        if self.report is not None and self.report.refused:
            return True
        heard = self.reader.heard()
        ended = self.ended or (self.report is not None and self.report.complete)
        written = bool(heard.text or heard.more_chars)
        return (self.reader.known and (written or not ended)) or (self.reader.streams and written and not ended)


def metered_usage(call: Call) -> Metered:
    """The highest source that reported anything, for all of the call's upstream calls (S2.42)."""
    if call.reports:
        last = call.reports[-1]
        return Metered(_recorded(call), "handler", last.model, last.provider, complete=True)
    return _from_upstream(call) or _from_witnesses(call) or _from_body(call) or Metered()


def _recorded(call: Call) -> TokenUsage:
    return TokenUsage.sum(report.usage for report in call.reports)


def parts_of(call: Call) -> list[Part]:
    """The call's upstream exchanges, those that are no errors."""
    return parts_in(call.exchanges)


def parts_in(exchanges: Exchanges) -> list[Part]:
    """The same of any *exchanges*."""
    return [Part(name, report, reader, reader.ended) for name, reader, report in answers_in(exchanges)]


def answers_sent(call: Call) -> list[Part] | None:
    """The answers of models in the messages of a session; None of any other call."""
    answers = None if call.observer is None else call.observer.answers
    if answers is None:
        return None
    over = call.cause is Cause.COMPLETED
    # What shows no model is one answer, as a body is: it ends with its session.
    return [part if part.provider else part._replace(ended=over) for part in parts_in(answers)]


async def read_session(call: Call) -> None:
    """
    Read what waits of the messages of a session, and let others have their turns meanwhile.

    Who asks without this reads it at once: one message may hold what takes long.
    """
    if call.opening.is_session and call.observer is not None:
        await call.observer.read_on()


def _body(call: Call) -> Part | None:
    if call.observer is None or call.observer.answers is not None:
        return None
    return Part(None, call.observer.report(), None, ended=call.drained or call.cause is Cause.COMPLETED)


def _from_upstream(call: Call) -> Metered | None:
    return _summed(parts_of(call), "upstream")


def _summed(parts: Iterable[Part], source: str) -> Metered | None:
    usage: TokenUsage | None = None
    cost: Decimal | None = None
    model = provider = None
    complete = True
    for part in parts:
        if part.report is None or part.usage is None or not part.reported:
            complete = complete and not part.wrote
            continue
        usage = part.usage + usage
        cost = _plus(cost, part.report.cost)
        model, provider = part.report.model or model, part.provider or part.report.dialect
        complete = complete and part.final
    return None if usage is None else Metered(usage, source, model, provider, complete, cost=cost)


def _from_witnesses(call: Call) -> Metered | None:
    """The highest of the libraries that watch the call's upstream calls and told of any."""
    if call.witnesses is None:
        return None
    for source in WITNESSES:
        told = call.witnesses.told(source)
        if told:
            usage = TokenUsage.sum(each.usage for each in told)
            estimated = any(each.estimated for each in told)
            complete = call.witnesses.is_whole(source)
            cost: Decimal | None = None
            for each in told:
                cost = _plus(cost, each.cost)
            return Metered(usage, source, told[-1].model, told[-1].provider, complete, estimated, cost)
    return None


def _plus(total: Decimal | None, cost: Decimal | None) -> Decimal | None:
    return total if cost is None else cost + (total or 0)


def upstream_calls(call: Call, source: str | None) -> Iterator[Told]:
    """What *source* says of each of the call's upstream calls, as far as it tells them apart."""
    if source == "handler":
        yield from (Told(each.usage, each.model, each.provider, each.cost) for each in call.reports)
    elif source in WITNESSES and call.witnesses is not None:
        yield from call.witnesses.told(source)
    else:
        parts = parts_of(call)
        sent = answers_sent(call)
        if sent is not None and not any(part.reported for part in parts):
            parts = sent
        for part in parts:
            if part.report is not None and part.usage is not None and part.reported:
                report, reader = part.report, part.reader
                count = reader.call.count if isinstance(reader, Sum) else 1
                cut = reader.truncated if isinstance(reader, Sum) else report.truncated()
                yield Told(part.usage, report.model, part.provider, report.cost, truncated=cut, count=count)


def asked_upstream(call: Call, source: str | None) -> tuple[int, str | None, str | None]:
    """
    How many answers a call's upstream clients have had, and whose the last one was: (count, model, provider).

    Also of those that told no usage. Nothing where *source* is somebody else, who tells of the same calls.
    """
    if source == "handler" or source in WITNESSES:
        return 0, None, None
    parts = parts_of(call)
    if not parts:
        return 0, None, None
    count = sum(part.reader.call.count if isinstance(part.reader, Sum) else 1 for part in parts)
    models = [part.report.model for part in parts if part.report is not None and part.report.model is not None]
    return count, models[-1] if models else None, parts[-1].provider


def _from_body(call: Call) -> Metered | None:
    sent = answers_sent(call)
    if sent is not None:
        return _summed(sent, "body")
    part = _body(call)
    if part is None or part.report is None or part.usage is None:
        return None
    return Metered(part.usage, "body", part.report.model, part.report.dialect, complete=part.final)


def problems_of(call: Call) -> tuple[str, ...]:
    """What was odd in the reports that *call* is charged by (`UsageReport.problems`), each once, in order."""
    if call.reports:
        return ()
    parts = parts_of(call)
    if not any(part.usage is not None for part in parts):
        body = _body(call)
        parts += answers_sent(call) or ([] if body is None else [body])
    return tuple(dict.fromkeys(problem for part in parts if part.report for problem in part.report.problems))


def failed_in_band(call: Call) -> bool:
    """
    Whether an error came inside of an answer that began as a success, as providers send them behind a 200.

    Such a call has failed as if the handler had said so (DESIGN "End of call"), also where its stream counted tokens
    before or after the error: those are told on the event, and charged by choice. A handler that reports usage itself
    also says itself when it failed. The error of an upstream exchange counts unless another one answered. One in the
    body does where the call is charged by usage, whose reading it is, and no source above it told of an answer: what
    the application made of that may be the model's own words, and so its client's, who would be free by asking for
    ``{"error": true}``. An error among the messages of a session ends nothing, and most are a client's own mistakes.
    """
    if call.reports:
        return False
    parts = [part for part in parts_of(call) if part.report is not None]
    body = _body(call) if call.charge is not None and call.charge.measured else None
    if body is not None and body.report is not None and body.report.error and not _answered(call, parts):
        return True
    last = parts[-1].report if parts else None
    return last is not None and last.error and not any(part.final for part in parts)


def _answered(call: Call, parts: Sequence[Part]) -> bool:
    """Whether a source above the body told of a whole answer without an error: of several exchanges the last one."""
    if parts:
        last = parts[-1]
        failed = call.exchanges[-1][2] >= ERRORS or (last.report is not None and last.report.error)
        return last.final and not failed
    witnesses = call.witnesses
    return witnesses is not None and any(witnesses.told(source) and witnesses.is_whole(source) for source in WITNESSES)


# -- what was observed -------------------------------------------------------------------------------------


def _parts(call: Call, known: Metered) -> list[Part]:
    """
    What the observation sums up: the upstream exchanges if any of them reported, or if nobody did and they wrote.

    The upstream client ranks above the body (DESIGN 6), which may be what the application made of its answers. Before
    the first byte only reports count (DESIGN "End of call"), and in the body of an error it is the same.
    """
    answered = _counted_answers(call, known)
    return _counted_body(call) if answered is None else answered


def _counted_answers(call: Call, known: Metered) -> list[Part] | None:
    """None where it is the body that tells."""
    if known.source != "body":
        counted = [part for part in parts_of(call) if part.reported or (_begun(call) and part.wrote)]
        if counted:
            return counted
    sent = answers_sent(call)
    return None if sent is None else [part for part in sent if part.reported or (_begun(call) and _spoke(part))]


def _spoke(part: Part) -> bool:
    """
    The same as `Part.wrote` of one of a session's answers.

    Where nothing shows a model, words count also behind a good end: nobody else tells of them, and a client that says
    goodbye is no better off than one that vanishes.
    """
    if part.wrote or part.provider or part.reader is None or not part.reader.streams:
        return part.wrote
    heard = part.reader.heard()
    return bool(heard.text or heard.more_chars)


def _counted_body(call: Call) -> list[Part]:
    body = _body(call)
    if body is None or call.observer is None:
        return []
    if _is_refusal(call):
        # The text of an error is no model's output, and nothing says that its prompt was read.
        return [] if body.usage is None else [body]
    return [body._replace(reader=call.observer.text_reader())]


def _is_refusal(call: Call) -> bool:
    return call.status is not None and call.status >= ERRORS


def _input_side(usage: TokenUsage) -> TokenUsage:
    spoken = None if usage.audio_output is None else 0
    return replace(usage, output=None, reasoning=None, audio=_heard(usage), audio_output=spoken, image_output=None)


def _heard(usage: TokenUsage) -> int | None:
    """Audio tokens of the input, as far as they are told apart."""
    return None if usage.audio is None else max(0, usage.audio - (usage.audio_output or 0))


def given_input(call: Call, part: Part, *, begun: bool) -> tuple[TokenUsage, bool]:
    """
    The input of an answer that broke, and whether it is a guess.

    As far as it reported: cache reads and writes too, since Anthropic counts them in its first event. Else what the
    request asked for, once the work has *begun*: then the prompt was read.
    """
    seen = part.usage
    if seen is not None and seen.input:
        return _input_side(seen), False
    if call.asked is not None and begun:
        asked = _input_side(call.asked)
        # Whether a cache was written nobody told, unless the route's own estimate did.
        return (asked if call.asked is call.estimate else replace(asked, cache_write=None, cache_write_1h=None)), True
    return TokenUsage(input=0), True


def observation(given: TokenUsage, output: int) -> TokenUsage:
    """An answer whose output was counted: text, as far as that can be told."""
    return replace(given, output=output)


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
        if len(self._counted) >= MANY_TEXTS:
            self._counted = {each: told for each, told in self._counted.items() if not each.over}
        self._counted[reader] = len(text), total
        return total


async def observed_usage(
    call: Call, known: Metered, counts: TextCounts | None = None, *, guesses: bool = True
) -> Metered:
    """
    What was delivered (DESIGN 4 "Observed"), each upstream exchange judged by itself and all of them added.

    Args:
        call: Whose.
        known: What was reported.
        counts: Remembers what was counted, for a call that runs; without it all is counted anew.
        guesses: Text counts also where nothing shows that a model wrote it.

    An answer that reported to its end counts as it reported; of one that broke the input counts as far as it is
    known, and the output is counted from the text that passed. Whatever is not counted makes it an estimate.
    """
    if known.complete:
        return known
    if known.source in WITNESSES:
        # What it still watches has told nothing, and the text that passes may be of those that told.
        return replace(known, estimated=True)
    usage: TokenUsage | None = None
    model, estimated = known.model, False
    calls: list[ModelCall] = []
    parts = _counted_answers(call, known)
    if parts is None:
        if call.observer is not None and not _is_refusal(call):
            await call.observer.read_on()
        parts = _counted_body(call)
    # What a session asked for is the input of all of its answers, so that it says nothing of the one that broke.
    begun = _begun(call) and not (call.opening.is_session and any(part.reported for part in parts))
    for part in parts:
        if not guesses and part.reader is not None and not part.reader.known:
            continue
        model = (part.report.model if part.report is not None else None) or model
        if part.usage is not None and (part.final or part.reader is None or isinstance(part.reader, Sum)):
            usage = part.usage + usage
            estimated = estimated or (isinstance(part.reader, Sum) and part.reader.counted)
            if part.report is not None:
                one = model_call(part.report, part.provider or known.provider, part.reader)
                calls.append(one if part.final or isinstance(part.reader, Sum) else as_asked(call, one))
            continue
        given, guessed = given_input(call, part, begun=begun)
        begun = begun and not call.opening.is_session
        # What it had counted itself: thoughts are in there, and not in the text.
        output = part.told_output
        if part.written is None and isinstance(part.reader, UsageReader):
            heard = part.reader.heard()
            text = heard.text
            counted = await (count_tokens_async(text) if counts is None else counts.count(part.reader, text))
            output = max(output, counted.tokens + tokens_of(heard.more_chars))
            guessed = guessed or heard.estimated or counted.estimated
        seen = observation(given, output)
        named = None if part.report is None else part.report.model
        calls.append(as_asked(call, counted_call(seen, named, part.provider or known.provider, part.report)))
        usage = seen + usage
        estimated = estimated or guessed
    usage = usage or TokenUsage(input=0, output=0)
    cost = known.cost
    return Metered(usage, "tokenizer", model, known.provider, estimated=estimated, cost=cost, calls=tuple(calls))


# -- what a handler may still spend ------------------------------------------------------------------------


def committed_usage(call: Call, price: MeasuredPrice, *, expected: bool) -> TokenUsage:
    """
    What a running call has used and, with *expected*, what its request will use of input, whichever costs more.

    Never waits: what running exchanges wrote is guessed from its length.

    Raises:
        UsageError: It adds up to more than can be counted.
    """
    spent = _told(call)
    asked = call.asked
    if not expected or asked is None or price.cost(_input_side(asked)) <= price.cost(_input_side(spent)):
        return spent
    spoken = spent.audio_output
    audio = max(_heard(asked) or 0, _heard(spent) or 0) + (spoken or 0) or None
    given = replace(_input_side(asked), audio=audio, audio_output=spoken)
    return replace(given, output=spent.output, reasoning=spent.reasoning, image_output=spent.image_output)


def searches_made(call: Call) -> Decimal:
    """Searches of the web that a running call has told of, by the source that counts."""
    known = metered_usage(call)
    made = Decimal(0)
    for each in calls_of(call, known):
        made += each.units.get(WEB_SEARCHES, 0)
    return made


def _told(call: Call) -> TokenUsage:
    known = metered_usage(call)
    if known.usage is not None and (call.reports or known.source in WITNESSES):
        return known.usage
    return _spent(_parts(call, known))


def _spent(parts: Iterable[Part]) -> TokenUsage:
    total = TokenUsage()
    for part in parts:
        seen = part.usage or TokenUsage()
        if not part.final and part.reader is not None:
            heard = part.reader.heard()
            written = estimate_tokens(heard.text) + tokens_of(heard.more_chars)
            seen = observation(_input_side(seen), max(written, seen.output or 0))
        total = total + seen
    return total
