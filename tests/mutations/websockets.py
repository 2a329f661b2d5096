"""How each handling of WebSockets is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

ENDING = "asgi_metering.rules.ending"
GUARDS = "asgi_metering.guards"
HEARTBEATS = "asgi_metering.heartbeats"
MEASURING = "asgi_metering.measuring"
METERING = "asgi_metering.metering"
SESSION = "asgi_metering.usage.session"
UTTERANCES = "asgi_metering.asgi.utterances"
WEBSOCKET = "asgi_metering.asgi.websocket"


def _session(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/asgi/test_websocket.py::{name}" for name in names)


def _charge(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/asgi/test_websocket_charges.py::{name}" for name in names)


def _end(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/asgi/test_websocket_ends.py::{name}" for name in names)


def _usage(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/asgi/test_websocket_usage.py::{name}" for name in names)


def _told(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/usage/test_session.py::{name}" for name in names)


MUTATIONS = (
    Mutation(
        19,
        "messages are let in unpaid",
        WEBSOCKET,
        "not growth.counts_time and not growth.has_next:\n",
        "False:\n",
        _charge("test_let_in_no_message_that_cannot_be_paid[None]"),
    ),
    Mutation(
        19,
        "messages are not counted",
        WEBSOCKET,
        "            call.growth.spend()\n",
        "            pass\n",
        _charge("test_charge_each_message_that_is_let_in"),
    ),
    Mutation(
        19,
        "a message is lost with its reader",
        WEBSOCKET,
        "message = self._kept[0] if self._kept else await self._next(call)\n",
        "message = await self._next(call)\n",
        ("tests/asgi/test_websocket_limits.py::test_keep_a_message_whose_reader_gave_up",),
    ),
    Mutation(
        19,
        "a refusal is never a response",
        WEBSOCKET,
        "            if self.accepted or DENIAL not in",
        "            if True or DENIAL not in",
        _session("test_refuse_before_the_accept[starlette-denial]"),
    ),
    Mutation(
        19,
        "a disconnect counts when it is asked for",
        WEBSOCKET,
        "            self._reader.add_done_callback(self._saw)\n",
        "",
        _charge("test_count_no_second_after_the_client_left[0]"),
    ),
    Mutation(
        19,
        "whoever makes a handler fail has its session for nothing",
        ENDING,
        "        return self.chosen.get(row) or SESSION_DEFAULTS.get(row) or self.basis(row)\n",
        "        return self.basis(row)\n",
        _end("test_end_a_session[handler_raises-call]", "test_end_a_session[handler_raises-message]"),
    ),
    Mutation(
        27,
        "sessions are ended by their age",
        HEARTBEATS,
        " and not call.opening.is_session:\n",
        ":\n",
        ("tests/asgi/test_websocket_lasting.py::test_keep_a_session_alive_for_hours",),
    ),
    Mutation(
        0,
        "requests are charged per message",
        METERING,
        "        if policy.needs and ",
        "        if False and ",
        ("tests/pitfalls/test_websockets.py::test_refuse_a_price_per_message_at_the_gate_of_a_request",),
    ),
    Mutation(
        3,
        "a WebSocket takes the call that the context shows",
        GUARDS,
        '                if scope.get("type") == "websocket" and not _is_free(CURRENT.get()):\n',
        "                if False:\n",
        ("tests/pitfalls/test_websockets.py::test_let_nobody_in_without_a_middleware[starlette-request]",),
    ),
    Mutation(
        19,
        "messages are counted before the server has taken them",
        WEBSOCKET,
        "            self.ended = True\n        await self._deliver(call, message)\n",
        "            self.ended = True\n"
        "        if self.utterances is not None:\n            await self.utterances.sent(message)\n"
        "        await self._deliver(call, message)\n",
        _usage("test_count_no_message_that_the_server_did_not_take"),
    ),
    Mutation(
        19,
        "messages are read on their path",
        UTTERANCES,
        "        if self._size > MAX_WAITING:\n",
        "        if True:\n",
        _usage("test_read_nothing_on_the_path_of_messages"),
    ),
    Mutation(
        19,
        "a session outruns its hold",
        UTTERANCES,
        "            if self._unpaced >= self._room:\n",
        "            if False:\n",
        _usage("test_cut_a_session_that_its_messages_have_used_up"),
    ),
    Mutation(
        19,
        "a session keeps all of its answers",
        UTTERANCES,
        "(dialect, reader, _ANSWERED)) and call is not None:\n",
        "(dialect, reader, _ANSWERED)) and False:\n",
        _usage("test_keep_little_of_a_session_of_hours"),
    ),
    Mutation(
        19,
        "the input of a session is charged for each answer that broke",
        MEASURING,
        "        begun = begun and not call.opening.is_session\n",
        "",
        _usage("test_charge_the_input_of_a_session_once"),
    ),
    Mutation(
        19,
        "what is told again is charged again",
        SESSION,
        "        elif key in self._shown and (",
        "        elif False and (",
        _told("test_count_a_response_that_is_told_again_once"),
    ),
    Mutation(
        19,
        "running totals of ids that change are added",
        SESSION,
        "            return latest.ended or told is None or known is None\n",
        "            return True\n",
        _told("test_add_no_running_totals_of_ids_that_change"),
    ),
)
