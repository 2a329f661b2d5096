"""
One HTTP exchange behind the middleware: what passes `send`, and how the call ends.

All state of a request lives in its exchange; the middleware keeps none. Nothing is awaited for the ledger on the path:
the last message only marks, and the runtime ends the call (pitfalls 22 to 25).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

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
from asgi_metering.asgi.refusals import in_band_error, refusal_response
from asgi_metering.asgi.replay import keeper
from asgi_metering.asgi.types import ASGIApp, Message, Scope, Send
from asgi_metering.asgi.watch import ClientGone
from asgi_metering.asgi.within import Within
from asgi_metering.call import Call, CallCut, CallRefused
from asgi_metering.growing import LEAST_ROOM
from asgi_metering.opening import CURRENT
from asgi_metering.overdue import Entry
from asgi_metering.rules.ending import Cause
from asgi_metering.runtime import BOOK_S, Runtime

__all__ = ["Exchange", "booked", "run"]

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

CHECKPOINT_BYTES = 262_144
"""
After so many bytes the loop gets a turn, so that a burst that never waits still notices a client that left
(pitfall 26: 125 MiB were "sent" to nobody without it, 4 to 10 with it).
"""


# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_COMPLETED, _ABORTED = Cause.COMPLETED, Cause.ABORTED

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
        call = exchange.call
        if call is not None and (call.refusal is not None or exchange.cutting is not None):
            await exchange.returned(call)
    except BaseException as failure:
        call = exchange.call
        is_answered = call is not None and await exchange.answers(call, failure)
        if not (is_answered or await exchange.answers_within(failure)):
            raise
    finally:
        CURRENT.reset(token)
        exchange.closed = True
        if exchange.call is None and exchange.watch is None:
            # As `let_go` does, of a request that nobody asked for a call.
            exchange.scope, exchange._connection = _OVER, None
        else:
            try:
                waiting = exchange.over()
                if waiting is not None:
                    await waiting
            finally:
                if exchange.scope is not _OVER:
                    exchange.let_go()


class Exchange(Within):
    """One request and its response; arguments and attributes as of `Hearing`."""

    # Defaults stand here and not in `__init__`: most requests need none of them, and none pays for what it has not.
    trailers = False
    sent = unchecked = 0  # bytes of the body that the server took: before the loop last had a turn, and since
    whole = False  # the server took the whole body in one message of another kind
    last = b""  # the last of them, behind these, once the server took it
    sending: tuple[bytes, bool] | None = None  # the last body, and whether it reaches anybody, until then
    stuck: Entry | None = None  # in which the server should have taken it
    waited = False  # for an app that goes on behind it
    dressed: Message | None = None  # the start of an admitted response, as it went out
    latest: Message | None = None  # what passed after it, the last of them, before an admission
    spoke = False  # the app has sent something since its call was refused
    keep: Callable[[bytes], None] | None = None  # sees every chunk that the server took
    grace: Entry | None = None  # in which the app may still turn out to have failed
    cutting: Cutting | None = None  # of a call whose hold grows
    room = CHECKPOINT_BYTES  # after so many bytes the loop gets a turn

    # -- what the app sends --------------------------------------------------------------------------------

    def send(self, message: Message) -> Awaitable[None]:
        """What the app calls once there is a call."""
        call = self.call or self.open_call()
        if self.swapped:
            self._let_through(call, message)
        if self.begun is not None and call.admitted:
            self._catch_up(call, self.begun)
        kind = message["type"]
        if kind == "http.response.body":
            if call.is_plain and not self.trailers and not message.get("more_body", False):
                # As `_send_body` does with it, but for a step: most answers have one chunk, which is the last.
                return self._send_last(call, message, message.get("body", b""))
            return self._send_body(call, message)
        if kind == "http.response.start" and not self.started:
            return self._send_start(call, message)
        if kind in ("http.response.pathsend", "http.response.trailers", "http.response.zerocopysend"):
            return self._send_other(call, message, kind)
        return self.server_send(message)

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
        if call.refusal is not None:
            if (self.options.replaces(message["status"]) and not call.told_by_app) or call.is_repeat:
                # The framework made a 500 of it; a handler's own 402, or its degraded 200, stays (pitfall 15). A repeat
                # is no refusal: what was answered before stands, and nothing that takes it for one.
                await self._refuse(call)
                return
        elif call.decision is not None:
            self.dressed = message = dressed(call, call.decision, message, self.options.answers)
            call.status = message["status"]
            if "trailers" in message:
                self.trailers = bool(message["trailers"])
            if not call.is_plain or self.watch is not None:
                self._follow(call, message)
        else:
            if self.before is not None:
                message = told(self.before, message, self.options.answers)
            self.begun = message
        self.started = True
        if self.watch is not None:
            await self._deliver(call, message)
            return
        # As `_deliver` does: a step more would cost as much as all that it does.
        try:
            await self.server_send(message)
        except OSError:
            if not self._lost(call):
                raise

    def _follow(self, call: Call, start: Message) -> None:
        """Look after the body that comes."""
        tap = tap_of(call, start.get("headers", ()), self.scope)
        if tap is not None or call.once is not None:
            call.observer, self.keep = tap, keeper(call, start, tap)
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
        self._follow(call, start)
        if call.reply is not None:
            # Nobody looked at what has passed.
            call.reply.lose()
        if self.latest is not None:
            call.first_byte = True

    async def _send_body(self, call: Call, message: Message) -> None:
        if call.decision is None or call.refusal is not None:
            await self._send_unadmitted(call, message)
            return
        body = message.get("body", b"")
        if not self.trailers and not message.get("more_body", False):
            await self._send_last(call, message, body)
            return
        # What is sent to a client that was seen to leave reaches nobody: a framework's own 500, say.
        reaches = call.cause is None
        handed_over = True
        try:
            await self._deliver(call, message)
        except OSError:
            handed_over = False
            raise
        finally:
            # Also when cancelled while the server's `send` waited for its buffer: the bytes are the server's then.
            if body and handed_over:
                call.first_byte = call.first_byte or (reaches and not self.lost)
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
        if keep is None and call.growth is None:
            return self._passing_unseen(call)
        left, self.unchecked = room - self.unchecked, 0
        # Looked at for each of them: found at once in the instance, and slowly in its class.
        self.swapped = self.swapped

        async def passing(message: Message) -> None:
            nonlocal left, room
            try:
                body = message["body"] if message["more_body"] and not self.swapped else None
            except KeyError:
                body = None
            if not body:
                self.unchecked, left = self.unchecked + room - left, room
                await slowly(message)
                return
            try:
                await send(message)
            except OSError:
                if not self._lost(call):
                    raise
            except BaseException:
                # Cancelled while the server's `send` waited for its buffer: the bytes are the server's then.
                if keep is not None:
                    keep(body)
                left -= len(body)
                raise
            if keep is not None:
                keep(body)
            left -= len(body)
            if left <= 0:
                # Counted before the turn: others may send meanwhile, and whoever waits here may be cancelled.
                self.unchecked, left = self.unchecked + room - left, room
                fresh = await self._turn(call)
                left, room = left + fresh - room, fresh

        return passing

    def _passing_unseen(self, call: Call) -> Send:
        """The same where nobody looks at the chunks and nothing can cut the call: they are counted, and no more."""
        send, slowly, room = self.server_send, self.send, self.room
        left, self.unchecked = room - self.unchecked, 0

        async def passing(message: Message) -> None:
            nonlocal left
            try:
                size = len(message["body"]) if message["more_body"] else None
            except (KeyError, TypeError):
                size = None
            if size is None:
                self.unchecked, left = self.unchecked + room - left, room
                await slowly(message)
                return
            try:
                await send(message)
            except OSError:
                if not self._lost(call):
                    raise
            except BaseException:
                # As above.
                left -= size
                raise
            left -= size
            if left <= 0:
                # As above.
                self.unchecked, left = self.unchecked + room - left, room
                await self._turn(call)

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

    async def _send_last(self, call: Call, message: Message, body: bytes, *, is_file: bool = False) -> None:
        """
        The last message: the runtime ends the call when the app returns, or when the grace after it is over.

        What it shows of the answer, by a body or by a file, reaches the client, unless that was seen to leave.

        The grace begins when the server has taken the message: a slow client may hold that up for long, and what it
        reads is charged by what it says. A server that raises `OSError` from it says that the client is gone.
        """
        if self.finishing:
            await self._deliver(call, message)
            return
        self.finishing = True
        reaches = call.cause is None if body or is_file else False
        self.sending = (body, reaches)
        runtime = call.runtime
        if runtime is not None:
            self.grace = runtime.graces.expect(GRACE_S, self._look)
        try:
            if self.watch is None:
                await self.server_send(message)
            else:
                await self._deliver(call, message)
        except OSError:
            if not self._lost(call):
                self.sending = None
                raise
        finally:
            if self.sending is not None:
                self._took_last(call, body, reaches)
            if self.stuck is not None and runtime is not None:
                runtime.last_sends.over(self.stuck)
                self.waited, self.grace = True, runtime.graces.expect(GRACE_S, self._look)

    def _look(self) -> None:
        """A grace is over: of an app that goes on behind its last message, unless that is still on its way."""
        call = self.call
        if call is None or call.runtime is None:
            return
        if self.sending is not None:
            self.stuck = call.runtime.last_sends.expect(LAST_SEND_S, self._give_up)
        elif not self.waited:
            # The server may have taken the message only now.
            self.waited, self.grace = True, call.runtime.graces.expect(GRACE_S, self._look)
        else:
            self._close(call)

    def _took_last(self, call: Call, body: bytes, reaches: bool) -> None:
        self.sending = None
        self.last = body
        if self.draining is not None:
            self.draining.finished()
        if not call.closed:
            if reaches and not self.lost:
                call.first_byte = True
            if self.keep is not None and body:
                self.keep(body)

    def _give_up(self) -> None:
        """The last `send` does not return: end the call as it is, by what the server was given."""
        call = self.call
        if call is not None and self.sending is not None:
            self._took_last(call, *self.sending)
            self._close(call)

    async def _send_other(self, call: Call, message: Message, kind: str) -> None:
        """A file by path is one message and the end; trailers end a response that announced them (pitfall 36)."""
        last = (
            (kind == "http.response.trailers" and not message.get("more_trailers", False))
            or (kind == "http.response.pathsend" and not self.trailers)
            or (kind == "http.response.zerocopysend" and not message.get("more_body", False) and not self.trailers)
        )
        is_body = kind != "http.response.trailers"
        reaches = call.cause is None and is_body
        if call.reply is not None and is_body:
            call.reply.lose()
        if last and call.admitted:
            await self._send_last(call, message, b"", is_file=is_body)
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
            if not self._lost(call):
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
        last = len(self.last)
        passed = self.sent + self.unchecked + last
        # In one message, or as long as was announced.
        is_complete = self.whole or (self.finishing and (length == passed or 0 < last == passed))
        if self.draining is not None and not is_complete:
            self.draining.failed()
        cause = _COMPLETED if is_complete else cause_of(failure, self.finishing)
        call.see(Cause.CLIENT_GONE if cause is _ABORTED and self.has_left_unread() else cause)
        # We raised it to stop the app. To the server it is news of nothing, and would fill its log with errors.
        is_ours = self.draining is not None or (self.watch is not None and self.watch.is_gone)
        return is_ours and is_departure(failure)

    def over(self) -> Awaitable[None] | None:
        """The request is over, however; answers what it has to wait for, if anything."""
        if self.watch is not None:
            self.watch.stop()
        if self.cutting is not None:
            self.cutting.close()
        call = self.call
        if call is None:
            return None
        if self.begun is not None and call.admitted:
            # Admitted for work after the response, or at its very end.
            self._catch_up(call, self.begun)
            self.finishing = self.finishing or (self.latest is not None and is_last(self.latest))
        if not self.finishing:
            # It returned without an end: the server cancelled, or a framework noticed that the client left.
            call.see(_ABORTED)
        runtime = call.runtime
        if runtime is None:
            return None
        if self.grace is not None:
            runtime.graces.over(self.grace)
        self._close(call)
        return None if runtime.managed or call.receipt is not None or not call.has_hold else booked(call, runtime)

    def let_go(self) -> None:
        """Forget what refers to this exchange in turn, such as the scope that it stands in."""
        if self.closed:
            self.scope, self._connection, self.passing = _OVER, None, None
            call = self.call
            # What the app of a refused call still sends goes nowhere, however late.
            if call is not None and not self.swapped and call.has_ended:
                self.call = None

    def _close(self, call: Call) -> None:
        """Hand the call to the runtime; the first cause seen wins."""
        if self.finishing:
            call.see(_COMPLETED)
        if self.draining is not None:
            call.drained = call.drained if call.closed else self.finishing and self.draining.is_within
            self.draining.stop()
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
