"""
One HTTP exchange behind the middleware: what passes `send` and `receive`, and how the call ends.

All state of a request lives in its exchange; the middleware keeps none. Nothing is awaited for the ledger on the path:
the last message only marks, and the runtime ends the call (pitfalls 22 to 25).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asgi_metering.asgi.answers import DEFAULT_OPTIONS, AnswerOptions
from asgi_metering.asgi.body import RequestBody, has_key
from asgi_metering.asgi.cutting import Cutting, let_go, task_within
from asgi_metering.asgi.dressing import dressed, tap_of, told
from asgi_metering.asgi.endings import (
    announced,
    cause_of,
    is_bare_end,
    is_departure,
    is_last,
    is_refusal,
    is_whole,
    stops,
)
from asgi_metering.asgi.origin import HTTPOrigin
from asgi_metering.asgi.refusals import in_band_error, refusal_response
from asgi_metering.asgi.replay import keeper
from asgi_metering.asgi.types import ASGIApp, Message, Receive, Scope, Send
from asgi_metering.asgi.watch import ClientGone, Watch
from asgi_metering.call import Call, CallCut, CallRefused
from asgi_metering.growing import LEAST_ROOM
from asgi_metering.holding import Slices
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.overdue import Entry
from asgi_metering.rules.ending import Cause
from asgi_metering.runtime import BOOK_S, Runtime

if TYPE_CHECKING:
    from asgi_metering.metering import Metering

__all__ = ["FREE_METHODS", "Exchange", "ExchangeOptions", "booked", "run"]

log = logging.getLogger("asgi_metering")

FREE_METHODS = frozenset({"HEAD", "OPTIONS"})
"""Never metered: no body is wanted, and CORS preflights come by OPTIONS (X.4, pitfall 12)."""

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


_DEFAULTS = ExchangeOptions()

_OVER: Scope = {"method": "", "headers": ()}
"""The scope of a request that is over."""


async def run(app: ASGIApp, exchange: Exchange) -> None:
    """Run *app* for the request of *exchange*, and do what its call, if somebody asks for one, needs around it."""
    send = exchange.server_send

    def send_(message: Message) -> Awaitable[None]:
        passing = exchange.passing
        if passing is not None:
            return passing(message)
        if exchange.call is None:
            # Known to whoever asks for a call later.
            if message["type"] == "http.response.start":
                if exchange.before is not None:
                    message = told(exchange.before, message, exchange.options.answers)
                exchange.started, exchange.begun = True, message
            else:
                exchange.latest = message
            return send(message)
        return exchange.send(message)

    token = CURRENT.set(exchange)
    try:
        await app(exchange.scope, exchange.receive, send_)
        if exchange.call is not None:
            await exchange.returned(exchange.call)
    except BaseException as failure:
        call = exchange.call
        if call is None or not await exchange.answers(call, failure):
            raise
    finally:
        CURRENT.reset(token)
        exchange.closed = True
        try:
            if exchange.call is not None or exchange.watch is not None:
                await exchange.over()
        finally:
            exchange.let_go()


class Exchange(Opening):
    """
    One request and its response.

    Args:
        metering: Of the layer that opens it.
        features, free, unenforced: As of `Opening`.
        scope: The connection's.
        receive, send: The server's. To be made in the task of the request.
        options: What the layer lets it do.

    Attributes:
        server_send: The server's.
        passing: What chunks of the body pass to, once it is under way; None before, and where each is looked at.
    """

    # Defaults stand here and not in `__init__`: most requests need none of them, and none pays for what it has not.
    _origin: HTTPOrigin | None = None
    passing: Send | None = None
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
    grace: Entry | None = None  # in which the app may still turn out to have failed
    cutting: Cutting | None = None  # of a call whose hold grows
    room = CHECKPOINT_BYTES  # after so many bytes the loop gets a turn
    task: asyncio.Task[object] | None = None
    watch: Watch | None = None

    def __init__(
        self,
        metering: Metering,
        features: frozenset[str],
        scope: Scope,
        receive: Receive,
        send: Send,
        options: ExchangeOptions = _DEFAULTS,
        *,
        free: bool = False,
        unenforced: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(metering, features, free=free, unenforced=unenforced)
        self.scope = scope
        self.options = options
        self._receive, self.server_send = receive, send
        if Slices.in_use:
            # To ask for it costs as much as all else here, so only where some hold of this process may grow.
            self.task = asyncio.current_task()
        if options.stop_on_disconnect:
            self.watch = Watch(scope, receive, send)
            self._receive = self.watch.receive

    def stays_free(self, scope: Mapping[str, Any] | None = None) -> bool:
        """As of `Opening`: by its method, which a middleware further in may have changed; what is not free stays so."""
        # Of one that is over nothing is left to look at: it stays what it was, and lets nobody in.
        if not self.closed:
            self.free = self.free and (scope or self.scope)["method"] in FREE_METHODS
        return self.free

    @property
    def origin(self) -> HTTPOrigin:
        """Where the request came from."""
        if self._origin is None:
            self._origin = HTTPOrigin(self.scope)
        return self._origin

    # -- what the app reads --------------------------------------------------------------------------------

    def request_body(self) -> RequestBody:
        """The body of the request, of which nothing has been read but through this."""
        if self.incoming is None:
            self.incoming = RequestBody(self.scope, self._receive)
        return self.incoming

    async def receive(self) -> Message:
        """What the app calls."""
        if not self.looked:
            # Not before something of the body is read: most requests have none, and most routes no keys.
            self.looked = True
            if has_key(self.scope):
                self.request_body()
        message = await (self._receive() if self.incoming is None else self.incoming.receive())
        if message["type"] == "http.disconnect":
            self._gone()
        return message

    def _gone(self) -> None:
        if not self.finishing and self.call is not None:
            self.call.see(Cause.CLIENT_GONE)

    # -- what the app sends --------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """What the app calls once there is a call."""
        call = self.open_call() if self.call is None else self.call
        if self.swapped:
            self._let_through(call, message)
        if self.begun is not None and call.admitted:
            self._catch_up(call, self.begun)
        kind = message["type"]
        if kind == "http.response.body":
            await self._send_body(call, message)
        elif kind == "http.response.start" and not self.started:
            await self._send_start(call, message)
        elif kind in ("http.response.pathsend", "http.response.trailers", "http.response.zerocopysend"):
            await self._send_other(call, message, kind)
        else:
            await self.server_send(message)

    def _let_through(self, call: Call, message: Message) -> None:
        """Stop what the app sends beside our answer, unless the call of a cut is over by it."""
        if self.cutting is None or not self.cutting.pending:
            raise CallRefused(call, call.refusal, call.decision) if call.refusal else ClientGone("The answer is out.")
        if not self.cutting.lets(is_bare_end(message) if self.started else is_whole(message)):
            raise call.cut()
        self.swapped = False

    async def _send_start(self, call: Call, message: Message) -> None:
        if call.deferred:
            # A generator endpoint: it is asked for now, before its headers go out (pitfall 7). A refusal rises even if
            # its first step met it earlier, for this start says nothing of it (pitfall 15). It is answered when the
            # app has unwound: the framework may cancel the task that sends, and would tear the answer in two.
            await call.ensure()
        if call.is_refused:
            if (message["status"] >= 500 and not call.told_by_app) or call.is_repeat:
                # The framework made a 500 of it; a handler's own 402, or its degraded 200, stays (pitfall 15). A repeat
                # is no refusal: what was answered before stands, and nothing that takes it for one.
                await self._refuse(call)
                return
        elif call.admitted:
            message, tap = dressed(call, message, self.scope, self.options.answers)
            self.dressed, call.observer = message, tap
            self.keep = keeper(call, message, tap)
            call.status = message["status"]
            self.trailers = bool(message.get("trailers"))
            self._follow(call, message)
        else:
            if self.before is not None:
                message = told(self.before, message, self.options.answers)
            self.begun = message
        self.started = True
        await self._deliver(call, message)

    def _follow(self, call: Call, start: Message) -> None:
        """Look after the body that comes."""
        if call.growth is not None:
            self.cutting = self.cutting or Cutting(call)
            self.keep, self.room = self.cutting.follow(start, self.keep), LEAST_ROOM
        if self.watch is not None:
            self.watch.start(self._gone, asyncio.get_running_loop())

    def _catch_up(self, call: Call, start: Message) -> None:
        """The call was admitted after its response had begun: note now what the start said."""
        self.begun = None
        call.status = start["status"]
        self.trailers = bool(start.get("trailers"))
        tap = call.observer = tap_of(call, list(start.get("headers", ())), self.scope)
        self.keep = None if tap is None else tap.keep
        if self.latest is not None:
            call.first_byte = True
        self._follow(call, start)

    async def _send_body(self, call: Call, message: Message) -> None:
        if not call.admitted:
            await self._send_unadmitted(call, message)
            return
        body = message.get("body", b"")
        # What is sent to a client that was seen to leave reaches nobody: a framework's own 500, say.
        reaches = call.cause is None
        if not message.get("more_body", False) and not self.trailers:
            await self._send_last(call, message, body, reaches and bool(body))
            return
        handed_over = True
        try:
            await self._deliver(call, message)
        except OSError:
            handed_over = False
            raise
        finally:
            # Also when cancelled while the server's `send` waited for its buffer: the bytes are the server's then.
            if body and handed_over:
                call.first_byte = call.first_byte or reaches
                if self.keep is not None:
                    self.keep(body)
        self.unchecked += len(body)
        if self.unchecked >= self.room:
            await self._turn(call)
        if call.first_byte and not self.trailers and self.watch is None:
            # Nothing about its chunks is new from here on.
            self.passing = self._passing(call)

    def _passing(self, call: Call) -> Send:
        """
        What the chunks of an answer that is under way pass to.

        A closure, since attributes cost twice as much as cells, and one step, since each costs as much as all it does.
        """
        send, slowly, keep, room = self.server_send, self.send, self.keep, self.room
        unchecked, self.unchecked = self.unchecked, 0

        async def passing(message: Message) -> None:
            nonlocal unchecked, room
            body = message.get("body")
            if not body or not message.get("more_body") or self.swapped:
                self.unchecked, unchecked = self.unchecked + unchecked, 0
                await slowly(message)
                return
            try:
                await send(message)
            except OSError:
                call.see(Cause.CLIENT_GONE)
                raise
            except BaseException:
                # Cancelled while the server's `send` waited for its buffer: the bytes are the server's then.
                if keep is not None:
                    keep(body)
                raise
            if keep is not None:
                keep(body)
            unchecked += len(body)
            if unchecked >= room:
                self.unchecked, unchecked = self.unchecked + unchecked, 0
                room = await self._turn(call)

        return passing

    async def _turn(self, call: Call) -> int:
        """Give the loop a turn, and a hold that grows its time; how many bytes may pass now is returned."""
        passed, self.unchecked = self.unchecked, 0
        self.sent += passed
        await asyncio.sleep(0)
        if call.observer is not None:
            call.observer.passed(passed)
        if call.growth is not None:
            self.room = await call.growth.pace(passed)
        return self.room

    async def _send_unadmitted(self, call: Call, message: Message) -> None:
        """A body without an admission behind it; a stream that was refused midway ends with its error (pitfall 18)."""
        if call.is_refused:
            self.spoke = self.spoke or bool(message.get("body"))
            error = None
            if not self.spoke and is_last(message):
                error = in_band_error(call, self.options.answers, self.begun, self.latest)
            if error is not None:
                self.swapped = True
                message = {**message, "body": error}
        self.latest = message
        await self.server_send(message)

    async def _send_last(self, call: Call, message: Message, body: bytes, reaches: bool) -> None:
        """
        The last message: the runtime ends the call when the app returns, or when the grace after it is over.

        The grace begins when the server has taken the message: a slow client may hold that up for long, and what it
        reads is charged by what it says. A server that raises `OSError` from it says that the client is gone.
        """
        if self.finishing:
            await self._deliver(call, message)
            return
        self.finishing = True
        taken = True
        stuck: Entry | None = None
        runtime = call.runtime
        if runtime is not None:
            stuck = runtime.last_sends.expect(LAST_SEND_S, functools.partial(self._give_up, call, body, reaches))
        try:
            await self._deliver(call, message)
        except OSError:
            taken = False
            raise
        finally:
            if taken:
                self._took_last(call, body, reaches)
            if stuck is not None and runtime is not None:
                runtime.last_sends.over(stuck)
                self.grace = runtime.graces.expect(GRACE_S, functools.partial(self._close, call))

    def _took_last(self, call: Call, body: bytes, reaches: bool) -> None:
        self.whole = bool(body) and not self.sent and not self.unchecked
        self.unchecked += len(body)
        if not call.closed:
            call.first_byte = call.first_byte or reaches
            if self.keep is not None and body:
                self.keep(body)

    def _give_up(self, call: Call, body: bytes, reaches: bool) -> None:
        """The last `send` does not return: end the call as it is, by what the server was given."""
        self._took_last(call, body, reaches)
        self._close(call)

    async def _send_other(self, call: Call, message: Message, kind: str) -> None:
        """A file by path is one message and the end; trailers end a response that announced them (pitfall 36)."""
        last = (
            (kind == "http.response.trailers" and not message.get("more_trailers", False))
            or (kind == "http.response.pathsend" and not self.trailers)
            or (kind == "http.response.zerocopysend" and not message.get("more_body", False) and not self.trailers)
        )
        reaches = call.cause is None and kind != "http.response.trailers"
        if call.reply is not None and kind != "http.response.trailers":
            call.reply.lose()
        if last and call.admitted:
            await self._send_last(call, message, b"", reaches)
            self.whole = kind == "http.response.pathsend"
            return
        await self._deliver(call, message)
        if not call.admitted:
            self.latest = message
        else:
            call.first_byte = call.first_byte or reaches

    async def _deliver(self, call: Call, message: Message) -> None:
        watch = self.watch
        try:
            if watch is None:
                await self.server_send(message)
            elif watch.is_gone and not self.finishing:
                raise ClientGone("The client has left.")
            else:
                await watch.send(message)
        except OSError:
            call.see(Cause.CLIENT_GONE)
            raise

    # -- refusals and cuts ---------------------------------------------------------------------------------

    def cut(self) -> None:
        """What the call holds is used up: its next message is its last, unless it is over by then."""
        call = self.call
        if call is not None and call.cause is None and not self.finishing and not self.closed:
            self.cutting = self.cutting or Cutting(call)
            # The first slices of this process may have been made in this very request.
            self.cutting.begin(self.task or task_within(run, "exchange", self))
            self.swapped = True

    async def _refuse(self, call: Call) -> None:
        """Send the refusal instead of whatever the app would send."""
        self.started = self.swapped = True
        rendered = refusal_response(call, self.options.answers)
        await self.server_send({"type": "http.response.start", "status": rendered.status, "headers": rendered.headers})
        body = b"" if self.scope["method"] == "HEAD" else rendered.body
        await self.server_send({"type": "http.response.body", "body": body})

    async def _answer_refusal(self, call: Call) -> bool:
        """Answer a refusal that the app has left to us; False where no answer can be given any more."""
        if self.swapped:
            return True
        if not self.started:
            await self._refuse(call)
            return True
        over = self.latest is not None and is_last(self.latest)
        error = None if over or self.spoke else in_band_error(call, self.options.answers, self.begun, self.latest)
        if error is None:
            return False
        self.swapped = True
        await self.server_send({"type": "http.response.body", "body": error})
        return True

    async def _end_cut(self, cutting: Cutting, failure: BaseException | None) -> bool:
        """
        Settle a call that is cut, and tell its client. False where *failure* is to rise.

        Raises:
            CallCut: Only a broken connection tells that the answer is not whole.
        """
        call = cutting.call
        ours = failure is None or cutting.is_ours(failure) or is_departure(failure)
        if cutting.wanted_by_others() or (failure is not None and not ours and stops(failure)):
            return False
        self._close(call)
        if failure is not None:
            let_go(failure)
        if not self.started:
            await self._refuse(call)
        elif not await cutting.tell(self.server_send, self.options.answers):
            raise CallCut(call) from failure
        return ours

    # -- the end -------------------------------------------------------------------------------------------

    async def returned(self, call: Call) -> None:
        """The app has returned, and has a call."""
        if call.is_refused and not self.started:
            # Somebody caught the refusal and kept silent (pitfall 13).
            await self._refuse(call)
        cutting = self.cutting
        if cutting is not None and cutting.pending and not cutting.call.closed:
            # Somebody caught what should have stopped the app.
            cutting.call.cut()
            if cutting.call.cause is Cause.CUT:
                await self._end_cut(cutting, None)

    async def answers(self, call: Call, failure: BaseException) -> bool:
        """Whether what the app raised is answered, and need not rise; notes what it makes of the call."""
        cutting = self.cutting
        if cutting is not None and cutting.pending and call.cause is Cause.CUT and not call.closed:
            return await self._end_cut(cutting, failure)
        if call.is_refused:
            # Decided by what the call is and not by what arrives: frameworks translate and group (pitfall 13). And
            # wrapped ones raise the refusal again after they answered it (pitfall 14).
            return not stops(failure) and await self._answer_refusal(call) and is_refusal(failure)
        length = None if self.dressed is None else announced(self.dressed)
        is_complete = self.whole or (self.finishing and length == self.sent + self.unchecked)
        call.see(Cause.COMPLETED if is_complete else cause_of(failure, self.finishing))
        # We raised it to stop the app. To the server it is news of nothing, and would fill its log with errors.
        return self.watch is not None and self.watch.is_gone and is_departure(failure)

    async def over(self) -> None:
        """The request is over, however."""
        if self.watch is not None:
            self.watch.stop()
        if self.cutting is not None:
            self.cutting.close()
        call = self.call
        if call is None:
            return
        if self.begun is not None and call.admitted:
            # Admitted for work after the response, or at its very end.
            self._catch_up(call, self.begun)
            self.finishing = self.finishing or (self.latest is not None and is_last(self.latest))
        runtime = call.runtime
        if runtime is not None and self.grace is not None:
            runtime.graces.over(self.grace)
        if not self.finishing:
            # It returned without an end: the server cancelled, or a framework noticed that the client left.
            call.see(Cause.ABORTED)
        if runtime is not None:
            self._close(call)
            if not (runtime.managed or call.receipt is not None or not call.has_hold):
                await booked(call, runtime)

    def let_go(self) -> None:
        """Forget what refers to this exchange in turn, such as the scope that it stands in."""
        if not self.closed:
            return
        self.scope, self._origin, self.passing = _OVER, None, None
        # What the app of a refused call still sends goes nowhere, however late.
        if not self.swapped and self.call is not None and self.call.has_ended:
            super().let_go()

    def _close(self, call: Call) -> None:
        """Hand the call to the runtime; the first cause seen wins."""
        if self.finishing:
            call.see(Cause.COMPLETED)
        if call.runtime is not None:
            call.runtime.finish(call)


async def booked(call: Call, runtime: Runtime) -> None:
    """
    Where nobody will hold a shutdown for us, stay until the end of *call* is booked (pitfall 32).

    Bounded: a store that is down shall not keep the tasks of all requests.
    """
    await asyncio.wait((call.expects_ending(),), timeout=BOOK_S)
    if call.cause is Cause.ABORTED:
        # daphne stops when the first of the calls that it cancelled is over, and not when the last one is.
        await asyncio.shield(runtime.booked())
