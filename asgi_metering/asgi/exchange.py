"""
One HTTP exchange behind the middleware: what passes `send` and `receive`, and how the call ends.

All state of a request lives in the closures of `run`; the middleware keeps none. Nothing is awaited for the ledger
on the path: the last message only marks, and the runtime ends the call (pitfalls 22 to 25).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from asgi_metering.asgi.answers import DEFAULT_OPTIONS, AnswerOptions
from asgi_metering.asgi.body import RequestBody, has_key
from asgi_metering.asgi.cutting import Cutting, let_go, task_within
from asgi_metering.asgi.fields import limit_fields
from asgi_metering.asgi.refusals import in_band_error, refusal_response
from asgi_metering.asgi.replay import keeper
from asgi_metering.asgi.tap import Tap
from asgi_metering.asgi.types import ASGIApp, Headers, Message, Receive, Scope, Send
from asgi_metering.asgi.watch import ClientGone, Watch
from asgi_metering.call import Call, CallCut, CallRefused
from asgi_metering.growing import LEAST_ROOM
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.policies import ChargePolicy, Slices
from asgi_metering.quotas import is_quota_header, read_quota
from asgi_metering.quotas.dialects import UNKNOWN
from asgi_metering.rules.ending import Cause
from asgi_metering.runtime import BOOK_S

__all__ = ["ExchangeOptions", "run"]

log = logging.getLogger("asgi_metering")

GRACE_S = 0.05
"""
How long after the server took its last body message an app may still turn out to have failed.

`BaseHTTPMiddleware` fabricates a clean last message when the app behind it raises; the exception follows within
microseconds. Background tasks that run longer do not delay the end (pitfall 24).
"""

LAST_SEND_S = 10.0
"""
How long the server may take over the last message before the call is ended without its answer.

A client that reads slowly holds it up as long as the buffers are full, and hypercorn's HTTP/2 for ever if the client
has left (pitfall 27). What is ended so has completed: the bytes were the server's, and nobody was seen to leave.
"""

CUSTOMARY = frozenset((b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"))
"""
What applications say of limits of their own, by custom. Providers that use these names, too, send others with them; of
one that does not, a route says that it passes the answers on by naming their dialect.
"""

CHECKPOINT_BYTES = 262_144
"""
After so many bytes the loop gets a turn, so that a burst that never waits still notices a client that left
(pitfall 26: 125 MiB were "sent" to nobody without it, 4 to 10 with it).
"""


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """
    What a layer lets its exchanges do.

    Attributes:
        answers: How refusals look.
        stop_on_disconnect: Watch for a client that left and raise `OSError` from ``send`` (pitfalls 27, 28). The
            server does not hear of it.
    """

    answers: AnswerOptions = DEFAULT_OPTIONS
    stop_on_disconnect: bool = False


async def run(
    app: ASGIApp, opening: Opening, scope: Scope, receive: Receive, send: Send, options: ExchangeOptions
) -> None:
    """Run *app* for one request that *opening* stands for."""
    # Closures and not an object: a streamed chunk passes here, and attributes cost twice as much as cells.
    started = False  # the app's response, or ours instead of it, has begun
    swapped = False  # ours instead of the app's: what the app still sends goes nowhere
    finishing = False  # the last message was handed over
    trailers = False
    sent = unchecked = 0  # bytes of the body that the server took: before the loop last had a turn, and since
    whole = False  # the server took the whole body in one message
    dressed: Message | None = None  # the start of an admitted response, as it went out
    begun: Message | None = None  # the start of the app's response, if it passed before an admission
    latest: Message | None = None  # what passed after it, the last of them, before an admission
    spoke = False  # the app has sent something since its call was refused
    keep: Callable[[bytes], None] | None = None  # sees every chunk that the server took
    incoming: RequestBody | None = None  # of a request with an idempotency key
    looked = False  # for that key
    grace: asyncio.TimerHandle | None = None
    cutting: Cutting | None = None  # of a call whose hold grows
    room = CHECKPOINT_BYTES  # after so many bytes the loop gets a turn
    # To ask for it costs as much as all closures here, so only where some hold of this process may grow.
    task = asyncio.current_task() if Slices.in_use else None
    watch = Watch(scope, receive, send) if options.stop_on_disconnect else None
    inner_receive = watch.receive if watch is not None else receive

    def gone() -> None:
        if not finishing and opening.call is not None:
            opening.call.see(Cause.CLIENT_GONE)

    def request_body() -> RequestBody:
        nonlocal incoming
        if incoming is None:
            incoming = RequestBody(scope, inner_receive)
        return incoming

    async def receive_() -> Message:
        nonlocal looked
        if not looked:
            # Not before something of the body is read: most requests have none, and most routes no keys.
            looked = True
            if has_key(scope):
                request_body()
        message = await (inner_receive() if incoming is None else incoming.receive())
        if message["type"] == "http.disconnect":
            gone()
        return message

    def send_(message: Message) -> Awaitable[None]:
        nonlocal started, begun, latest
        if opening.call is None:
            if message["type"] == "http.response.start":
                started, begun = True, message
            else:
                latest = message
            return send(message)
        return metered_send(opening.call, message)

    async def metered_send(call: Call, message: Message) -> None:
        nonlocal swapped
        if swapped:
            if cutting is None or not cutting.pending:
                raise (
                    CallRefused(call, call.refusal, call.decision) if call.refusal else ClientGone("The answer is out.")
                )
            if not cutting.lets(_is_bare_end(message) if started else _is_whole(message)):
                raise call.cut()
            swapped = False
        if begun is not None and call.admitted:
            catch_up(call, begun)
        kind = message["type"]
        if kind == "http.response.body":
            await send_body(call, message)
        elif kind == "http.response.start" and not started:
            await send_start(call, message)
        elif kind in ("http.response.pathsend", "http.response.trailers", "http.response.zerocopysend"):
            await send_other(call, message, kind)
        else:
            await send(message)

    def cut() -> None:
        """What the call holds is used up: its next message is its last, unless it is over by then."""
        nonlocal swapped, cutting
        call = opening.call
        if call is not None and call.cause is None and not finishing and not opening.closed:
            cutting = cutting or Cutting(call)
            # The first slices of this process may have been made in this very request.
            cutting.begin(task or task_within(run, "opening", opening))
            swapped = True

    async def send_start(call: Call, message: Message) -> None:
        nonlocal started, begun, trailers, keep, dressed, cutting, room
        if call.deferred:
            # A generator endpoint: it is asked for now, before its headers go out (pitfall 7). A refusal rises even if
            # its first step met it earlier, for this start says nothing of it (pitfall 15). It is answered when the
            # app has unwound: the framework may cancel the task that sends, and would tear the answer in two.
            await call.ensure()
        if call.is_refused:
            if message["status"] >= 500 or call.is_repeat:
                # The framework made a 500 of it; a handler's own 402, or its degraded 200, stays (pitfall 15). A repeat
                # is no refusal: what was answered before stands, and nothing that takes it for one.
                await refuse(call)
                return
        elif call.admitted:
            dressed, call.observer = dress(call, message, scope, options)
            keep = keeper(call, message, call.observer)
            message = dressed
            call.status = message["status"]
            trailers = bool(message.get("trailers"))
            if call.growth is not None:
                cutting = cutting or Cutting(call)
                keep, room = cutting.follow(message, keep), LEAST_ROOM
            if watch is not None:
                watch.start(gone, asyncio.get_running_loop())
        else:
            begun = message
        started = True
        await deliver(call, message)

    async def send_unadmitted(call: Call, message: Message) -> None:
        """A body without an admission behind it; a stream that was refused midway ends with its error (pitfall 18)."""
        nonlocal latest, spoke, swapped
        if call.is_refused:
            spoke = spoke or bool(message.get("body"))
            error = None if spoke or not _is_last(message) else in_band_error(call, options.answers, begun, latest)
            if error is not None:
                swapped = True
                message = {**message, "body": error}
        latest = message
        await send(message)

    def catch_up(call: Call, start: Message) -> None:
        """The call was admitted after its response had begun: note now what the start said."""
        nonlocal begun, trailers, keep, cutting, room
        begun = None
        call.status = start["status"]
        trailers = bool(start.get("trailers"))
        tap = call.observer = _tap(call, list(start.get("headers", ())), scope)
        keep = None if tap is None else tap.keep
        if call.growth is not None:
            cutting = cutting or Cutting(call)
            keep, room = cutting.follow(start, keep), LEAST_ROOM
        if latest is not None:
            call.first_byte = True
        if watch is not None:
            watch.start(gone, asyncio.get_running_loop())

    async def send_body(call: Call, message: Message) -> None:
        nonlocal sent, unchecked, room
        if not call.admitted:
            await send_unadmitted(call, message)
            return
        body = message.get("body", b"")
        # What is sent to a client that was seen to leave reaches nobody: a framework's own 500, say.
        reaches = call.cause is None
        if not message.get("more_body", False) and not trailers:
            await send_last(call, message, body, reaches and bool(body))
            return
        handed_over = True
        try:
            await deliver(call, message)
        except OSError:
            handed_over = False
            raise
        finally:
            # Also when cancelled while the server's `send` waited for its buffer: the bytes are the server's then.
            if body and handed_over:
                call.first_byte = call.first_byte or reaches
                if keep is not None:
                    keep(body)
        unchecked += len(body)
        if unchecked >= room:
            passed, unchecked = unchecked, 0
            sent += passed
            await asyncio.sleep(0)
            if call.growth is not None:
                room = await call.growth.pace(passed)

    async def send_last(call: Call, message: Message, body: bytes, reaches: bool) -> None:
        """
        The last message: the runtime ends the call when the app returns, or when the grace after it is over.

        The grace begins when the server has taken the message: a slow client may hold that up for long, and what it
        reads is charged by what it says. A server that raises `OSError` from it says that the client is gone.
        """
        nonlocal finishing, grace
        if finishing:
            await deliver(call, message)
            return
        finishing = True
        taken = True
        if call.needs_end:
            grace = asyncio.get_running_loop().call_later(LAST_SEND_S, give_up, call, body, reaches)
        try:
            await deliver(call, message)
        except OSError:
            taken = False
            raise
        finally:
            if taken:
                took_last(call, body, reaches)
            if grace is not None:
                grace.cancel()
                grace = asyncio.get_running_loop().call_later(GRACE_S, close, call)

    def took_last(call: Call, body: bytes, reaches: bool) -> None:
        nonlocal unchecked, whole
        whole = bool(body) and not sent and not unchecked
        unchecked += len(body)
        if not call.closed:
            call.first_byte = call.first_byte or reaches
            if keep is not None and body:
                keep(body)

    def give_up(call: Call, body: bytes, reaches: bool) -> None:
        """The last `send` does not return: end the call as it is, by what the server was given."""
        took_last(call, body, reaches)
        close(call)

    async def send_other(call: Call, message: Message, kind: str) -> None:
        """A file by path is one message and the end; trailers end a response that announced them (pitfall 36)."""
        nonlocal latest, whole
        last = (
            (kind == "http.response.trailers" and not message.get("more_trailers", False))
            or (kind == "http.response.pathsend" and not trailers)
            or (kind == "http.response.zerocopysend" and not message.get("more_body", False) and not trailers)
        )
        reaches = call.cause is None and kind != "http.response.trailers"
        if call.reply is not None and kind != "http.response.trailers":
            call.reply.lose()
        if last and call.admitted:
            await send_last(call, message, b"", reaches)
            whole = kind == "http.response.pathsend"
            return
        await deliver(call, message)
        if not call.admitted:
            latest = message
        else:
            call.first_byte = call.first_byte or reaches

    async def deliver(call: Call, message: Message) -> None:
        try:
            if watch is None:
                await send(message)
            elif watch.is_gone and not finishing:
                raise ClientGone("The client has left.")
            else:
                await watch.send(message)
        except OSError:
            call.see(Cause.CLIENT_GONE)
            raise

    def close(call: Call) -> None:
        """Hand the call to the runtime; the first cause seen wins."""
        if finishing:
            call.see(Cause.COMPLETED)
        if call.admitted and call.needs_end:
            opening.metering.runtime().finish(call)

    async def refuse(call: Call) -> None:
        """Send the refusal instead of whatever the app would send."""
        nonlocal started, swapped
        started = swapped = True
        rendered = refusal_response(call, options.answers)
        await send({"type": "http.response.start", "status": rendered.status, "headers": rendered.headers})
        body = b"" if scope["method"] == "HEAD" else rendered.body
        await send({"type": "http.response.body", "body": body})

    async def answer_refusal(call: Call) -> bool:
        """Answer a refusal that the app has left to us; False where no answer can be given any more."""
        nonlocal swapped
        if swapped:
            return True
        if not started:
            await refuse(call)
            return True
        over = latest is not None and _is_last(latest)
        error = None if over or spoke else in_band_error(call, options.answers, begun, latest)
        if error is None:
            return False
        swapped = True
        await send({"type": "http.response.body", "body": error})
        return True

    opening.request_body, opening.cut = request_body, cut
    token = CURRENT.set(opening)
    try:
        await app(scope, receive_, send_)
        if opening.call is not None and opening.call.is_refused and not started:
            # Somebody caught the refusal and kept silent (pitfall 13).
            await refuse(opening.call)
        if cutting is not None and cutting.pending and not cutting.call.closed:
            # Somebody caught what should have stopped the app.
            cutting.call.cut()
            if cutting.call.cause is Cause.CUT:
                await _end_cut(cutting, None, close, refuse if not started else None, send, options)
    except BaseException as failure:
        call = opening.call
        if call is None:
            raise
        if cutting is not None and cutting.pending and call.cause is Cause.CUT and not call.closed:
            if await _end_cut(cutting, failure, close, refuse if not started else None, send, options):
                return
            raise
        if call.is_refused:
            # Decided by what the call is and not by what arrives: frameworks translate and group (pitfall 13). And
            # wrapped ones raise the refusal again after they answered it (pitfall 14).
            if not _stops(failure) and await answer_refusal(call) and _is_refusal(failure):
                return
            raise
        is_whole = whole or (finishing and dressed is not None and _announced(dressed) == sent + unchecked)
        call.see(Cause.COMPLETED if is_whole else _cause_of(failure, finishing))
        if watch is not None and watch.is_gone and _is_departure(failure):
            # We raised it to stop the app. To the server it is news of nothing, and would fill its log with errors.
            return
        raise
    finally:
        CURRENT.reset(token)
        opening.closed = True
        # They refer to the opening and the server: circles for each request would be work for the collector of garbage.
        opening.cut = opening.request_body = None
        if watch is not None:
            watch.stop()
        if cutting is not None:
            cutting.close()
        call = opening.call
        if call is not None:
            if begun is not None and call.admitted:
                # Admitted for work after the response, or at its very end.
                catch_up(call, begun)
                finishing = finishing or (latest is not None and _is_last(latest))
            if grace is not None:
                grace.cancel()
            if not finishing:
                # It returned without an end: the server cancelled, or a framework noticed that the client left.
                call.see(Cause.ABORTED)
            await _close_inline(call, close, opening)


async def _end_cut(
    cutting: Cutting,
    failure: BaseException | None,
    close: Callable[[Call], None],
    refuse: Callable[[Call], Awaitable[None]] | None,
    send: Send,
    options: ExchangeOptions,
) -> bool:
    """
    Settle a call that is cut, and tell its client: by *refuse* if nothing was sent. False where *failure* is to rise.

    Raises:
        CallCut: Only a broken connection tells that the answer is not whole.
    """
    call = cutting.call
    ours = failure is None or cutting.is_ours(failure) or _is_departure(failure)
    if cutting.wanted_by_others() or (failure is not None and not ours and _stops(failure)):
        return False
    close(call)
    if failure is not None:
        let_go(failure)
    if refuse is not None:
        await refuse(call)
    elif not await cutting.tell(send, options.answers):
        raise CallCut(call) from failure
    return ours


async def _close_inline(call: Call, close: Callable[[Call], None], opening: Opening) -> None:
    if not call.admitted or not call.needs_end:
        return
    close(call)
    runtime = opening.metering.runtime()
    if not runtime.managed and call.receipt is None and call.has_hold:
        # Nobody will hold a shutdown for us, so this task stays until the end is booked (pitfall 32). Bounded: a store
        # that is down shall not keep the tasks of all requests.
        await asyncio.wait((call.expects_ending(),), timeout=BOOK_S)
        if call.cause is Cause.ABORTED:
            # daphne stops when the first of the calls that it cancelled is over, and not when the last one is.
            await asyncio.shield(runtime.booked())


def _announced(start: Message) -> int | None:
    """How many bytes a response says it has; None where it does not."""
    for name, value in start["headers"]:
        if name.lower() == b"content-length":
            return int(value) if value.isdigit() else None
    return None


def _cause_of(failure: BaseException, finishing: bool) -> Cause:
    """
    What an exception of the app makes of a call that nothing else has ended.

    After the last message it is an error still, if it comes within the grace: `BaseHTTPMiddleware` fabricates that
    message, an empty one, for an app that broke (pitfall 24). Not asked for here are responses that nobody fabricates:
    a body in one message, a file by path, and as many bytes as ``Content-Length`` said. They are whole, and charged,
    whatever raises behind them, such as a background task.
    """
    if isinstance(failure, Exception) or not isinstance(failure, asyncio.CancelledError | GeneratorExit):
        return Cause.ERROR
    return Cause.COMPLETED if finishing else Cause.ABORTED


def _is_refusal(failure: BaseException | None) -> bool:
    """Whether *failure* is a refusal, was raised from one, or is a group of nothing else (pitfall 13)."""
    while failure is not None:
        if isinstance(failure, BaseExceptionGroup):
            return all(_is_refusal(inner) for inner in failure.exceptions)
        if isinstance(failure, CallRefused):
            return True
        failure = failure.__cause__
    return False


def _is_departure(failure: BaseException) -> bool:
    """Whether *failure* says only that nobody reads any more: our words for it, Starlette's, or a group of these."""
    if isinstance(failure, BaseExceptionGroup):
        return all(_is_departure(inner) for inner in failure.exceptions)
    # Not imported before they are needed: naming the middleware imports no framework.
    from anyio import BrokenResourceError, ClosedResourceError
    from starlette.requests import ClientDisconnect

    # The last two are what the makers of a stream hear when its sender has stopped.
    return isinstance(failure, ClientGone | CallCut | ClientDisconnect | BrokenResourceError | ClosedResourceError)


def _stops(failure: BaseException) -> bool:
    """Whether somebody wants the task or the process to end, which no answer may hold up."""
    if isinstance(failure, BaseExceptionGroup):
        return any(_stops(inner) for inner in failure.exceptions)
    return isinstance(failure, asyncio.CancelledError | GeneratorExit | KeyboardInterrupt | SystemExit)


def _is_last(message: Message) -> bool:
    """Whether a response without trailers ends with *message*."""
    kind = message["type"]
    return kind == "http.response.pathsend" or (kind == "http.response.body" and not message.get("more_body", False))


def _is_bare_end(message: Message) -> bool:
    """Whether *message* only says that the answer is over."""
    return message["type"] == "http.response.body" and _is_last(message) and not message.get("body")


def _is_whole(message: Message) -> bool:
    """Whether *message* begins an answer that is there as a whole, and no framework's answer to an exception."""
    begins = message["type"] == "http.response.start" and message["status"] < 500
    return begins and _announced({"headers": (), **message}) is not None


def dress(call: Call, message: Message, scope: Scope, options: ExchangeOptions) -> tuple[Message, Tap | None]:
    """
    The start of an admitted call's response: a provider's quota fields captured and removed, ours added.

    Always a new list: frameworks may reuse a response object, whose own list must not grow.
    """
    given: Headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
    if call.policy is not None and "quotas" in call.opening.features:
        given = _capture(call, call.policy.charge, given, message["status"])
    fields = (
        limit_fields(
            call.decision,
            call.unit,
            options.answers.names,
            warn_below=call.warning_level,
            overdraft=call.overdraft,
        )
        if call.decision is not None
        else []
    )
    if fields:
        ours = {name for name, _ in fields}
        given = [field for field in given if field[0].lower() not in ours]
    return {**message, "headers": [*given, *fields]}, _tap(call, given, scope)


def _capture(call: Call, charge: ChargePolicy | None, given: Headers, status: int) -> Headers:
    quotas = [field for field in given if is_quota_header(field[0])]
    if not quotas:
        return given
    if (charge is None or charge.dialect is None) and all(name.lower() in CUSTOMARY for name, _ in quotas):
        return given
    provider = (charge.dialect if charge is not None else None) or _provider_of(quotas, status)
    call.metering.quotas.record(provider, given, status=status, started_at=call.started_at)
    if charge is not None and charge.forward_quota_headers:
        return given
    return [field for field in given if not is_quota_header(field[0])]


def _provider_of(quotas: Headers, status: int) -> str:
    """Nobody named the provider, so it is called by the dialect of its header fields."""
    reading = read_quota(quotas, provider=None, status=status, now=time.time())
    return UNKNOWN if reading is None else reading.dialect


def _tap(call: Call, given: Headers, scope: Scope) -> Tap | None:
    """Only calls whose price or limits depend on usage have their bodies watched."""
    charge = call.charge
    if not call.counts_usage or scope["method"] == "HEAD":
        return None
    found = {name.lower(): value for name, value in given if name.lower() in (b"content-type", b"content-encoding")}
    content_type, encoding = found.get(b"content-type"), found.get(b"content-encoding")
    return Tap(
        None if content_type is None else content_type.decode("latin-1"),
        None if encoding is None else encoding.decode("latin-1"),
        None if charge is None else charge.dialect,
    )
