"""How each handling of a call's end is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

TESTS = "tests/pitfalls/test_completion.py::"
EXCHANGE = "asgi_metering.asgi.exchange"
RUNTIME = "asgi_metering.runtime"


def _test(name: str) -> tuple[str, ...]:
    return (TESTS + name,)


MUTATIONS = (
    Mutation(
        22,
        "await the end in send",
        EXCHANGE,
        "        if last:\n            finish(call)\n        # What is sent",
        "        if last:\n            finish(call)\n            close(call)\n            await call.expects_ending()\n"
        "        # What is sent",
        _test("test_never_awaits_the_ledger_in_send"),
    ),
    Mutation(
        23,
        "the last cause wins",
        "asgi_metering.call",
        "        if self.cause is None:\n            self.cause = cause\n",
        "        self.cause = cause\n",
        _test("test_disconnect_before_the_end_beats_a_completion"),
    ),
    Mutation(
        23,
        "a disconnect after the end counts",
        EXCHANGE,
        "        if not finishing and opening.call is not None:\n            opening.call.see(Cause.CLIENT_GONE)\n",
        "        if opening.call is not None:\n            opening.call.cause = Cause.CLIENT_GONE\n",
        _test("test_settles_a_stream_that_starlette_cancels_behind_its_last_message"),
    ),
    Mutation(
        24,
        "no grace after the last message",
        EXCHANGE,
        "                grace = asyncio.get_running_loop().call_later(GRACE_S, close, call)\n",
        "                close(call)\n",
        _test("test_error_that_base_http_middleware_hides_behind_a_clean_end_is_an_error"),
    ),
    Mutation(
        24,
        "wait for the background task",
        EXCHANGE,
        "                grace = asyncio.get_running_loop().call_later(GRACE_S, close, call)\n",
        "                pass\n",
        _test("test_background_task_does_not_delay_the_end"),
    ),
    Mutation(
        25,
        "returning is success",
        EXCHANGE,
        "                call.see(Cause.ABORTED)\n",
        "                call.see(Cause.COMPLETED)\n",
        _test("test_return_without_an_end_is_no_success[False]"),
    ),
    Mutation(
        26,
        "no turn of the loop in a burst",
        EXCHANGE,
        "            unchecked = 0\n            await asyncio.sleep(0)\n",
        "            unchecked = 0\n",
        _test("test_burst_that_never_waits_lets_others_notice_the_client_that_left"),
    ),
    Mutation(
        27,
        "no maximum age",
        RUNTIME,
        "        if age > self._metering.max_call_s:\n",
        "        if False:\n",
        _test("test_send_that_never_returns_is_ended_by_its_age"),
    ),
    Mutation(
        27,
        "nobody watches",
        "asgi_metering.asgi.watch",
        "        if self._on_gone is None or self._ahead is not None or self._reading or not self._may_look:\n",
        "        if True:\n",
        _test("test_watch_sees_the_client_leave_an_app_that_never_looks"),
    ),
    Mutation(
        27,
        "the watch takes messages",
        "asgi_metering.asgi.watch",
        "            self._kept.append(message)\n            self._see(message)\n",
        "            self._see(message)\n",
        _test("test_watch_gives_the_app_every_message_in_order"),
    ),
    Mutation(
        28,
        "send never raises",
        EXCHANGE,
        "            elif watch.is_gone and not finishing:\n",
        "            elif False:\n",
        _test("test_endless_stream_is_stopped_once_the_client_has_left"),
    ),
    Mutation(
        29,
        "an abandoned admission keeps its hold",
        "asgi_metering.stores.pump",
        "        if isinstance(operation, Admit) and isinstance(answer, Decision) and answer.admitted",
        "        if False and isinstance(answer, Decision) and answer.admitted",
        _test("test_admission_whose_caller_was_cancelled_is_given_back"),
    ),
    Mutation(
        30,
        "workers inherit the request",
        RUNTIME,
        '        task = self.loop.create_task(work, name=f"asgi_metering {what}", context=contextvars.Context())\n',
        '        task = self.loop.create_task(work, name=f"asgi_metering {what}")\n',
        _test("test_background_tasks_do_not_inherit_a_requests_variables"),
    ),
    Mutation(
        30,
        "a cancelled request is not ended",
        EXCHANGE,
        "            await _close_inline(call, close, opening)\n",
        "            if call.cause is not Cause.ABORTED:\n                await _close_inline(call, close, opening)\n",
        _test("test_ends_survive_the_cancellation_of_their_request"),
    ),
    Mutation(
        31,
        "the shutdown is not held",
        "asgi_metering.asgi.lifespan",
        "                # Before the app hears of it: its own resources are still open for calls in flight.\n"
        "                await self._metering.drain()\n",
        "                pass\n",
        _test("test_shutdown_waits_for_a_stream_in_flight"),
    ),
    Mutation(
        31,
        "what does not end is left",
        RUNTIME,
        "            call.see(Cause.ABORTED)\n            self.finish(call)\n        left",
        "            pass\n        left",
        _test("test_shutdown_ends_what_does_not_end_by_itself"),
    ),
    Mutation(
        32,
        "nobody ends inline",
        EXCHANGE,
        "        await asyncio.shield(call.expects_ending())\n",
        "        pass\n",
        _test("test_without_a_lifespan_the_request_waits_for_its_own_end"),
    ),
    Mutation(
        33,
        "admission leaves overdue holds",
        "asgi_metering.rules.decide",
        "    if account.next_due_at <= now:\n",
        "    if False:\n",
        _test("test_killed_process_leaves_a_hold_that_expires_and_is_ended_by_its_policy"),
    ),
    Mutation(
        33,
        "no heartbeats",
        RUNTIME,
        "        elif call.has_hold and now - call.last_beat >= call.ttl_s / BEATS_PER_LIFE:\n",
        "        elif False:\n",
        _test("test_heartbeats_keep_the_hold_of_a_long_stream"),
    ),
    Mutation(
        35,
        "compressed bodies are not unpacked",
        EXCHANGE,
        '        None if encoding is None else encoding.decode("latin-1"),\n',
        "        None,\n",
        _test("test_reads_usage_from_a_compressed_body[gzip]"),
    ),
    Mutation(
        36,
        "a file by path is no end",
        EXCHANGE,
        '            or (kind == "http.response.pathsend" and not trailers)\n',
        "",
        _test("test_file_by_path_is_the_end_and_counts_as_sent"),
    ),
    Mutation(
        36,
        "the last body ends a response with trailers",
        EXCHANGE,
        '        last = not message.get("more_body", False) and not trailers\n',
        '        last = not message.get("more_body", False)\n',
        _test("test_trailers_end_the_response_that_announced_them"),
    ),
    Mutation(
        36,
        "HEAD is metered",
        "asgi_metering.asgi.middleware",
        'FREE_METHODS = frozenset({"HEAD", "OPTIONS"})\n',
        "FREE_METHODS = frozenset()\n",
        _test("test_head_is_free_and_counts_no_bytes"),
    ),
    Mutation(
        38,
        "the return of the app ends nothing",
        EXCHANGE,
        "            await _close_inline(call, close, opening)\n",
        "            pass\n",
        _test("test_settles_although_the_generators_finally_never_ran"),
    ),
)
