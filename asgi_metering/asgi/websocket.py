"""
One WebSocket behind the middleware: what passes `send` and `receive`, and how its call ends.

A session is one call. It is let in before it is accepted, and answered by the server's denial response where there is
one; its messages are let in one by one where the route says so; who ends it says what is charged. All state of a
connection lives in its session; the middleware keeps none.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from asgi_metering.asgi.answers import DEFAULT_OPTIONS, AnswerOptions
from asgi_metering.asgi.cutting import TELL_S, Cutting, let_go
from asgi_metering.asgi.denials import DENIAL, INTERNAL_ERROR, deny
from asgi_metering.asgi.endings import cause_of, cause_of_close, is_departure, is_refusal, stops
from asgi_metering.asgi.exchange import booked
from asgi_metering.asgi.origin import HTTPOrigin
from asgi_metering.asgi.problems import close_frame
from asgi_metering.asgi.refusals import answer_within, message_error, refusal_answer, refusal_within
from asgi_metering.asgi.types import ASGIApp, Message, Receive, Scope, Send
from asgi_metering.asgi.utterances import Utterances, utterances_of
from asgi_metering.asgi.watch import ClientGone, unread_end
from asgi_metering.asgi.within import refused_within
from asgi_metering.call import Call, CallCut, CallRefused
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.policies import OnExcess
from asgi_metering.rules.ending import Cause
from asgi_metering.sessions import SessionGrowth

if TYPE_CHECKING:
    from asgi_metering.metering import Metering

__all__ = ["Session", "attend"]

log = logging.getLogger("asgi_metering")

LAST = ("websocket.close", "websocket.http.response.start")
"""What ends a connection, before it is accepted or after."""

GOING_AWAY = 1001
"""What an application hears whose call has ended before its connection (RFC 6455, section 7.4.1)."""

FORBIDDEN = 403
"""What servers make of a close before the accept (ASGI, "Close")."""

_OVER: Scope = {"type": "websocket", "headers": ()}
"""The scope of a connection that is over."""


class _Verdict(NamedTuple):
    """What becomes of one message that came in; *refusal* says why it is not let in."""

    refusal: Refusal | None = None
    decision: Decision | None = None
    on_excess: OnExcess = "close"


_LET_IN = _Verdict()


async def attend(app: ASGIApp, session: Session) -> None:
    """Run *app* for the connection of *session*, and do what its call, if somebody asks for one, needs around it."""
    send, receive = session.server_send, session.server_receive

    async def receive_() -> Message:
        if session.call is not None:
            return await session.receive(session.call)
        session.heard = True
        session.reading += 1
        try:
            message = await receive()
        finally:
            session.reading -= 1
        session.departed = message["type"] == "websocket.disconnect"
        # The call may have been asked for while this waited, by another task.
        return message if session.call is None else await session.took(session.call, message)

    async def send_(message: Message) -> None:
        if session.call is not None:
            await session.send(session.call, message)
            return
        await send(message)
        session.passed(message["type"])

    token = CURRENT.set(session)
    try:
        await app(session.scope, receive_, send_)
        if session.call is not None:
            await session.returned(session.call)
    except BaseException as failure:
        call = session.call
        is_answered = call is not None and await session.answers(call, failure)
        if not (is_answered or await session.answers_within(failure)):
            raise
    finally:
        CURRENT.reset(token)
        session.closed = True
        try:
            if session.call is not None:
                await session.over(session.call)
        finally:
            session.let_go()


class Session(Opening, HTTPOrigin):
    """
    One WebSocket, from its handshake to its end, and where it came from.

    Args:
        metering, features, unenforced: As of `Opening`.
        scope: The connection's.
        receive, send: The server's. To be made in the task of the connection.
        options: How refusals look.

    Attributes:
        server_receive, server_send: The server's.
        heard: The application has asked for a message, so that the server's ``websocket.connect`` is read.
        reading: How many of its reads the server has not answered, that were begun before there was a call.
        departed: The server has told of the disconnect, though maybe not the application yet.
        accepted: The application has accepted the connection.
        ended: The application, or we, have closed or denied it.

    Who ended it says what the call is charged by:

    ==============================================  ================================================================
    the end                                         the row of the policy
    ==============================================  ================================================================
    the client closes (1000, 1001, 3000 and up)     completed
    the handler closes, or returns                  completed
    it leaves without a word (1005, 1006), or       client gone, before or after the accept
    ``send`` raises
    the handler raises, or closes with 1011         error, before or after the accept; a session's default after
                                                    it is ``observed``
    the handler denies, or never accepts            answered >= 400
    nothing more can be held, a limit closes it     cut
    the server stops (1012), the task is cancelled  aborted
    ==============================================  ================================================================
    """

    is_session = True
    heard = False
    departed = False
    reading = 0
    ended = False
    swapped = False  # ours instead of the application's: what it still sends goes nowhere
    gone: Message | None = None  # how the connection ended, as the application is told
    _kept: tuple[Message, ...] = ()  # came in, and are not let in yet
    _judging: asyncio.Task[_Verdict] | None = None
    _reader: asyncio.Task[Message] | None = None  # reads ahead, by one message
    _woken: asyncio.Future[None] | None = None  # whoever waits for a message need not
    _telling: asyncio.Task[None] | None = None
    _verdict: _Verdict | None = None  # by which we close it
    cutting: Cutting | None = None
    utterances: Utterances | None = None  # what the application says, where its usage matters

    def __init__(
        self,
        metering: Metering,
        features: frozenset[str],
        scope: Scope,
        receive: Receive,
        send: Send,
        options: AnswerOptions = DEFAULT_OPTIONS,
        *,
        unenforced: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(metering, features, unenforced=unenforced)
        self.scope = scope
        self.options = options
        self.server_receive, self.server_send = receive, send
        self._task = asyncio.current_task()
        self._turn = asyncio.Lock()

    @property
    def origin(self) -> HTTPOrigin:
        """Where the connection came from."""
        return self

    # -- what the application reads ------------------------------------------------------------------------

    async def receive(self, call: Call) -> Message:
        """What the application calls once there is a call: one message at a time, in order."""
        async with self._turn:
            while True:
                self._catch_up(call)
                if self.gone is not None:
                    return self._heard_of_it(self.gone)
                if has_ended(call):
                    # The process stops, and its calls have ended.
                    return self._goodbye(GOING_AWAY, "")
                message = self._kept[0] if self._kept else await self._next(call)
                if message["type"] != "websocket.receive":
                    self._left(call, message)
                    return message
                if not call.admitted:
                    self._kept = self._kept[1:]
                    return message
                self._kept = self._kept or (message,)
                if has_ended(call):
                    # While it was waited for.
                    continue
                verdict = await self._judged(call)
                self._kept = self._kept[1:]
                if verdict.refusal is None:
                    self._spend(call)
                    return message
                await self._not_let_in(call, verdict)

    async def took(self, call: Call, message: Message) -> Message:
        """The same for a *message* that was asked for before there was a call."""
        if message["type"] != "websocket.receive":
            self._left(call, message)
            return message
        async with self._turn:
            # Behind what a reader that gave up has left.
            self._kept = (*self._kept, message)
        return await self.receive(call)

    async def _next(self, call: Call) -> Message:
        """
        The next message of the server; or how we closed the connection, if that comes first.

        Where that may come at any time a task of its own reads: no server need tell that the connection is closed.
        """
        self.heard = True
        if not self._may_be_cut(call):
            return await self._read()
        reader, woken = self._read_ahead(), self._waits()
        await asyncio.wait((reader, woken), return_when=asyncio.FIRST_COMPLETED)
        if self.gone is not None:
            return self._heard_of_it(self.gone)
        self._reader = None
        return reader.result()

    def _heard_of_it(self, gone: Message) -> Message:
        """The application knows that we closed: it may clean up for as long as after any other disconnect."""
        if self.cutting is not None:
            self.cutting.pending = False
        return gone

    def _may_be_cut(self, call: Call) -> bool:
        growth = call.growth
        return growth is not None and not (isinstance(growth, SessionGrowth) and not growth.counts_time)

    def _read_ahead(self) -> asyncio.Task[Message]:
        if self._reader is None:
            self._reader = asyncio.ensure_future(self._read())
            self._reader.add_done_callback(self._saw)
        return self._reader

    async def _read(self) -> Message:
        message = await self.server_receive()
        self.departed = message["type"] == "websocket.disconnect"
        return message

    def _saw(self, reader: asyncio.Task[Message]) -> None:
        """A disconnect counts from when it came, and not from when the application asks for it."""
        if reader.cancelled() or reader.exception() is not None or self.call is None:
            return
        message = reader.result()
        if message["type"] == "websocket.disconnect":
            self._left(self.call, message)

    def _waits(self) -> asyncio.Future[None]:
        if self._woken is None:
            self._woken = asyncio.get_running_loop().create_future()
        return self._woken

    def _left(self, call: Call, message: Message) -> None:
        """Note how the connection ended; a call that was not let in, or closed by us, has its end already."""
        if message["type"] != "websocket.disconnect":
            return
        self._end(call, cause_of_close(message, self.scope))

    def _end(self, call: Call, cause: Cause) -> None:
        if call.admitted:
            call.see(cause)
            if isinstance(call.growth, SessionGrowth):
                call.growth.stop()

    # -- whether a message is let in -----------------------------------------------------------------------

    async def _judged(self, call: Call) -> _Verdict:
        """
        Whether the message that came in is let in.

        Whoever is cancelled while the store is asked for it finds the answer when it asks for the message again.
        """
        verdict = self._judged_now(call) if self._judging is None else None
        if verdict is not None:
            return verdict
        if self._judging is None:
            self._judging = asyncio.ensure_future(self._judge(call))
        judging = self._judging
        await asyncio.wait((judging,))
        self._judging = None
        return judging.result()

    def _judged_now(self, call: Call) -> _Verdict | None:
        """The verdict where nothing has to be waited for, or else None and nothing was asked."""
        growth, limits = call.growth, call.message_limits
        if isinstance(growth, SessionGrowth) and not growth.counts_time and not growth.has_next:
            return None
        if limits is None:
            return _LET_IN
        decision = limits.decided_now()
        return None if decision is None else self._by_limits(call, decision)

    async def _judge(self, call: Call) -> _Verdict:
        growth, limits = call.growth, call.message_limits
        if limits is not None:
            verdict = self._by_limits(call, await limits.decided())
            if verdict.refusal is not None:
                return verdict
        if isinstance(growth, SessionGrowth) and not growth.counts_time and not await growth.cover_next():
            return _Verdict(growth.refusal)
        return _LET_IN

    def _by_limits(self, call: Call, decision: Decision) -> _Verdict:
        refusal, limits = decision.refusal, call.message_limits
        if refusal is None or limits is None:
            return _LET_IN
        over = refusal.reason in (Reason.RATE_LIMIT, Reason.EXCEEDS_LIMIT)
        return _Verdict(refusal, decision, limits.on_excess(refusal.name) if over else "close")

    def _spend(self, call: Call) -> None:
        if isinstance(call.growth, SessionGrowth):
            call.growth.spend()
            self._look_out(call.growth)

    async def _not_let_in(self, call: Call, verdict: _Verdict) -> None:
        refusal = verdict.refusal
        assert refusal is not None  # noqa: S101 -- asked before
        call.metering.refused(call, refusal)
        if verdict.on_excess == "close":
            growth = call.growth
            if isinstance(growth, SessionGrowth) and growth.refusal is refusal:
                growth.give_up()
            self._close(call, verdict)
        elif verdict.on_excess == "answer" and not self.ended:
            told = message_error(call, self.options, refusal, verdict.decision)
            # Who reads hears of a client that left by its disconnect, which comes next.
            with suppress(OSError):
                await self._deliver(call, {"type": "websocket.send", "text": told})
        # Where neither the store nor the server waits for anything a flood that is dropped would stop the loop.
        await asyncio.sleep(0)

    # -- what the application sends ------------------------------------------------------------------------

    async def send(self, call: Call, message: Message) -> None:
        """What the application calls once there is a call."""
        if self.swapped:
            raise self._stopped(call)
        self._catch_up(call)
        kind = message["type"]
        if call.is_refused and self._gives_way(message, kind):
            await self._refuse(call)
            return
        if kind in LAST:
            # Not when the server has taken it, which may be long after: nobody sends another close meanwhile.
            self.ended = True
        await self._deliver(call, message)
        self.passed(kind)
        if kind == "websocket.send" and self.utterances is not None and not call.closed:
            await self.utterances.sent(message)
        elif kind == "websocket.accept":
            self._catch_up(call)
        elif kind in LAST:
            self._ended_by_app(call, message)

    def _gives_way(self, message: Message, kind: str) -> bool:
        """
        Whether a framework says *message* of the refusal: as of HTTP its 500 does, and a handler's own 402 not.

        Before the accept no client sees the code of a close, so that any gives way; after it what frameworks say of an
        error, 1011 or 4000 plus its status.
        """
        if kind == "websocket.close":
            code = message.get("code", 1000)
            return not self.accepted or code == INTERNAL_ERROR or 4500 <= code < 4600
        return kind == "websocket.http.response.start" and int(message["status"]) >= 500

    def passed(self, kind: str) -> None:
        """The server took a message of this *kind*."""
        if kind == "websocket.accept":
            self.accepted = True
        elif kind in LAST:
            self.ended = True

    def _catch_up(self, call: Call) -> None:
        """The connection is open, and the call was let in: whichever comes last begins the charge."""
        if self.accepted and call.admitted and not call.first_byte and not self.swapped:
            call.first_byte = True
            call.observer = self.utterances = utterances_of(call)
            if isinstance(call.growth, SessionGrowth):
                call.growth.begin()
                self._look_out(call.growth)

    def _look_out(self, growth: SessionGrowth) -> None:
        """A client that left is not to be charged for as long as nobody asks."""
        if growth.counts_time and not self.reading:
            self._read_ahead()

    def _ended_by_app(self, call: Call, message: Message) -> None:
        """By a close, or a denial: behind the accept that is what frameworks make of errors, and no server sends it."""
        status = message.get("status")
        if not self.accepted:
            call.status = FORBIDDEN if status is None else status
        is_failure = status is not None or message.get("code", 1000) == INTERNAL_ERROR
        if self.accepted or status is None:
            self._end(call, Cause.ERROR if is_failure else Cause.COMPLETED)

    async def _deliver(self, call: Call, message: Message) -> None:
        if self.departed and self._reader is not None:
            # Only we have heard it. Some servers take what is sent from then on as a mistake of the application.
            if message["type"] == "websocket.close":
                return
            raise ClientGone("The client has left.")
        try:
            await self.server_send(message)
        except OSError:
            self._end(call, Cause.CLIENT_GONE)
            raise

    def _stopped(self, call: Call) -> OSError | CallRefused:
        if self.cutting is not None:
            self.cutting.pending = False
        if call.refusal is not None:
            return CallRefused(call, call.refusal, call.decision)
        return CallCut(call) if self._verdict is None else ClientGone("The connection was closed: a limit was reached.")

    # -- refusals and cuts ---------------------------------------------------------------------------------

    async def _refuse(self, call: Call) -> None:
        """Answer the refusal instead of whatever the application would say."""
        self.swapped = self.ended = True
        code, reason = close_frame(refusal_answer(call, self.options))
        self._goodbye(code, reason)
        await self._tell(call, code, reason)

    def cut(self) -> None:
        """What the call holds is used up, and nothing more can be held: close the connection."""
        if self.call is not None:
            self._close(self.call, None)

    def _close(self, call: Call, verdict: _Verdict | None) -> None:
        """Close the connection by *verdict*, or because the call is cut; the application hears of a disconnect."""
        if self.swapped or self.ended or self.closed or call.closed or call.cause is not None:
            return
        self.swapped = self.ended = True
        if verdict is not None and verdict.refusal is not call.lack:
            self._verdict = verdict
        refusal, decision = (verdict.refusal, verdict.decision) if verdict is not None else (None, None)
        code, reason = close_frame(refusal_answer(call, self.options, refusal, decision))
        call.cut()
        self._end(call, Cause.CUT)
        self._goodbye(code, reason)
        self.cutting = Cutting(call)
        self.cutting.begin(self._task)
        self._telling = asyncio.ensure_future(self._tell_in_time(call, code, reason))
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def _goodbye(self, code: int, reason: str) -> Message:
        """How the connection ended, as the application hears of it."""
        self.gone = {"type": "websocket.disconnect", "code": code, "reason": reason}
        return self.gone

    async def _tell_in_time(self, call: Call, code: int, reason: str) -> None:
        """The same, bounded: a client that does not read what was sent before is left without it."""
        try:
            async with asyncio.timeout(TELL_S):
                await self._tell(call, code, reason)
        except TimeoutError:
            log.debug("The client of call %s does not read, and is not told why.", call.id)
        except Exception:
            # The server's own, or of what customises answers: nobody waits for this task, who would hear of it.
            log.exception("The client of call %s could not be told why its session was closed.", call.id)

    async def _tell(self, call: Call, code: int, reason: str) -> None:
        """Tell the client: by a whole response where nothing was accepted and the server can, else by a close."""
        if self.departed:
            return
        try:
            if not self.heard and not self.accepted:
                # As the protocol of servers has it: nothing is said before the client's handshake was read.
                self.heard = True
                if (await self.server_receive())["type"] == "websocket.disconnect":
                    return
            if self.accepted or DENIAL not in (self.scope.get("extensions") or ()):
                await self.server_send({"type": "websocket.close", "code": code, "reason": reason})
            else:
                rendered = refusal_within(call, self.call, self.options)
                await deny(self.server_send, rendered.status, rendered.headers, rendered.body)
        except OSError:
            log.debug("The client of call %s left before it could be told why.", call.id)

    # -- the end -------------------------------------------------------------------------------------------

    async def returned(self, call: Call) -> None:
        """The application has returned, and has a call."""
        if call.is_refused and not self.ended:
            # Somebody caught the refusal and kept silent (pitfall 13).
            await self._refuse(call)

    async def answers(self, call: Call, failure: BaseException) -> bool:
        """Whether what the application raised is answered, and need not rise; notes what it makes of the call."""
        cutting = self.cutting
        if cutting is not None:
            ours = cutting.is_ours(failure) or is_departure(failure)
            if cutting.wanted_by_others() or not ours:
                return False
            let_go(failure)
            return True
        if call.is_refused:
            # Decided by what the call is and not by what arrives (pitfall 13).
            if stops(failure):
                return False
            if not self.ended:
                await self._refuse(call)
            return is_refusal(failure)
        left = unread_end(self.server_receive) if stops(failure) and not (self.departed or self._reader) else None
        self._end(call, cause_of(failure, finishing=False) if left is None else cause_of_close(left, self.scope))
        # Raised by us to stop a handler whose client has left meanwhile: news of nothing.
        return isinstance(failure, CallCut)

    async def answers_within(self, failure: BaseException) -> bool:
        """Whether *failure*, which the application raised, is the refusal of a charge inside of it, which closes it."""
        inner = None if self.ended else refused_within(self, failure)
        if inner is None:
            return False
        self.swapped = self.ended = True
        code, reason = close_frame(answer_within(inner, self.call, self.options))
        await self._tell(inner, code, reason)
        return True

    async def over(self, call: Call) -> None:
        """The connection is over, however."""
        self._catch_up(call)
        # An application that returned without a word has closed it; one that never accepted has failed.
        self._end(call, Cause.COMPLETED if self.accepted else Cause.ERROR)
        if self.cutting is not None:
            self.cutting.close()
        for task in (self._reader, self._judging):
            if task is not None:
                task.cancel()
        runtime = call.runtime
        if runtime is not None:
            runtime.finish(call)
        if self._telling is not None:
            # The server would close it by a code of its own otherwise.
            await asyncio.wait((self._telling,), timeout=TELL_S)
        if runtime is not None and not (runtime.managed or call.receipt is not None or not call.has_hold):
            await booked(call, runtime)

    def let_go(self) -> None:
        """Forget what refers to this connection in turn, such as the scope that it stands in."""
        if not self.closed:
            return
        self.scope, self._connection = _OVER, None
        if not self.swapped and self.call is not None and self.call.has_ended:
            super().let_go()


def has_ended(call: Call) -> bool:
    """Whether *call* is over for the ledger: nothing that comes from now on is charged."""
    return call.closed
