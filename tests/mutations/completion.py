"""How each handling of a call's end is switched off, and which test of it must turn red."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

PITFALLS = Path(__file__).parents[1] / "pitfalls"
EXCHANGE = "asgi_metering.asgi.exchange"
HEARING = "asgi_metering.asgi.hearing"
DRESSING = "asgi_metering.asgi.dressing"
RUNTIME = "asgi_metering.runtime"
HEARTBEATS = "asgi_metering.heartbeats"
PLAIN = "tests/test_plain_ends.py::"


@cache
def _sources() -> dict[str, str]:
    return {file.name: file.read_text() for file in PITFALLS.glob("test_*.py")}


def _test(name: str) -> tuple[str, ...]:
    """The test of that name, wherever among the tests of pitfalls it stands."""
    wanted = f"\ndef {name.partition('[')[0]}("
    (file,) = [file for file, text in _sources().items() if wanted in text]
    return (f"tests/pitfalls/{file}::{name}",)


MUTATIONS = (
    Mutation(
        22,
        "await the end in send",
        EXCHANGE,
        "        self.sending = (body, reaches)\n",
        "        self.sending = (body, reaches)\n        self._close(call)\n        await call.expects_ending()\n",
        _test("test_never_awaits_the_ledger_in_send"),
    ),
    Mutation(
        23,
        "the last cause wins",
        "asgi_metering.call_state",
        "        if self.cause is None:\n            self.cause = cause\n",
        "        self.cause = cause\n",
        _test("test_disconnect_before_the_end_beats_a_completion"),
    ),
    Mutation(
        23,
        "a disconnect after the end counts",
        HEARING,
        "        if call is None or self.finishing:\n            return\n",
        "        if call is None:\n            return\n        call.cause = None\n",
        _test("test_settles_a_stream_that_starlette_cancels_behind_its_last_message"),
    ),
    Mutation(
        24,
        "no grace after the last message",
        EXCHANGE,
        "            self.grace = runtime.graces.expect(GRACE_S, self._look)\n        try:\n",
        "            self._close(call)\n        try:\n",
        _test("test_error_that_base_http_middleware_hides_behind_a_clean_end_is_an_error"),
    ),
    Mutation(
        24,
        "wait for the background task",
        EXCHANGE,
        "            self.grace = runtime.graces.expect(GRACE_S, self._look)\n        try:\n",
        "            pass\n        try:\n",
        _test("test_background_task_does_not_delay_the_end"),
    ),
    Mutation(
        24,
        "the grace begins before the last message is taken",
        EXCHANGE,
        "            self.stuck = call.runtime.last_sends.expect(LAST_SEND_S, self._give_up)\n",
        "            self._close(call)\n",
        _test("test_grace_begins_when_the_server_has_the_last_message[False]")
        + _test("test_grace_begins_when_the_server_has_the_last_message[True]"),
    ),
    Mutation(
        24,
        "what breaks behind a whole answer makes it free",
        EXCHANGE,
        "        cause = _COMPLETED if is_complete else cause_of(failure, self.finishing)\n",
        "        cause = cause_of(failure, self.finishing)\n",
        _test("test_whole_response_is_charged_whatever_breaks_behind_it[sized]")
        + _test("test_whole_response_is_charged_whatever_breaks_behind_it[one-message]")
        + _test("test_whole_response_is_charged_whatever_breaks_behind_it[file]")
        + _test("test_failing_background_task_takes_nothing_back[layers1]"),
    ),
    Mutation(
        24,
        "every end is whole",
        EXCHANGE,
        "        is_complete = self.whole or (self.finishing and ",
        "        is_complete = self.whole or (self.finishing or ",
        _test("test_whole_response_is_charged_whatever_breaks_behind_it[short]")
        + _test("test_error_that_base_http_middleware_hides_behind_a_clean_end_is_an_error"),
    ),
    Mutation(
        25,
        "returning is success",
        EXCHANGE,
        "            call.see(_ABORTED)\n",
        "            call.see(_COMPLETED)\n",
        _test("test_return_without_an_end_is_no_success[False]"),
    ),
    Mutation(
        26,
        "no turn of the loop in a burst",
        EXCHANGE,
        "        self.sent += passed\n        await asyncio.sleep(0)\n",
        "        self.sent += passed\n",
        _test("test_burst_that_never_waits_lets_others_notice_the_client_that_left"),
    ),
    Mutation(
        27,
        "no maximum age",
        HEARTBEATS,
        "        if age > self._metering.max_call_s and not call.opening.is_session:\n",
        "        if False:\n",
        _test("test_send_that_never_returns_is_ended_by_its_age"),
    ),
    Mutation(
        27,
        "a last send that hangs is never read",
        EXCHANGE,
        "            self._took_last(call, *self.sending)\n            self._close(call)\n",
        "            self._close(call)\n",
        _test("test_last_send_that_never_returns_is_ended_by_what_was_sent"),
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
        "            elif watch.is_gone and not self.finishing:\n",
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
        _test("test_looks_at_a_call_do_not_inherit_its_variables"),
    ),
    Mutation(
        30,
        "a cancelled request is not ended",
        EXCHANGE,
        "        self._close(call)\n        return None if runtime.managed",
        "        call.cause is Cause.ABORTED or self._close(call)\n        return None if runtime.managed",
        _test("test_ends_survive_the_cancellation_of_their_request"),
    ),
    Mutation(
        31,
        "the shutdown is not held",
        "asgi_metering.asgi.lifespan",
        "                # Before the app hears of it: its own resources are still open for calls in flight.\n"
        "                await self._drain()\n",
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
        "    await asyncio.wait((call.expects_ending(),), timeout=BOOK_S)\n",
        "    pass\n",
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
        HEARTBEATS,
        "        elif call.beats and not call.hold_lost and now - call.last_beat >= call.ttl_s / BEATS_PER_LIFE:\n",
        "        elif False:\n",
        _test("test_heartbeats_keep_the_hold_of_a_long_stream"),
    ),
    Mutation(
        35,
        "compressed bodies are not unpacked",
        DRESSING,
        '        None if encoding is None else encoding.decode("latin-1"),\n',
        "        None,\n",
        _test("test_reads_usage_from_a_compressed_body[gzip]"),
    ),
    Mutation(
        36,
        "a file by path is no end",
        EXCHANGE,
        '            or (kind == "http.response.pathsend" and not self.trailers)\n',
        "",
        _test("test_file_by_path_is_the_end_and_counts_as_sent"),
    ),
    Mutation(
        36,
        "the last body ends a response with trailers",
        EXCHANGE,
        '        if not self.trailers and not message.get("more_body", False):\n',
        '        if not message.get("more_body", False):\n',
        _test("test_trailers_end_the_response_that_announced_them"),
    ),
    Mutation(
        36,
        "HEAD is metered",
        HEARING,
        'FREE_METHODS = frozenset({"HEAD", "OPTIONS"})\n',
        "FREE_METHODS = frozenset()\n",
        _test("test_head_is_free_and_counts_no_bytes"),
    ),
    Mutation(
        38,
        "the return of the app ends nothing",
        EXCHANGE,
        "        self._close(call)\n        return None if runtime.managed",
        "        return None if runtime.managed",
        _test("test_settles_although_the_generators_finally_never_ran"),
    ),
    Mutation(
        0,
        "a hold of nothing is no hold",
        "asgi_metering.admission",
        "    if leaves_hold(asked):\n",
        "    if decision.held or asked.leases:\n",
        _test("test_usage_of_a_call_that_held_nothing_posts_in_full[zero]")
        + _test("test_usage_of_a_call_that_held_nothing_posts_in_full[up-to]")
        + _test("test_usage_of_a_call_that_held_nothing_posts_in_full[rounds-to-zero]"),
    ),
    Mutation(
        0,
        "what is measured may ask for nothing",
        "asgi_metering.admission",
        "    holds = charge is not None and (amount or _is_measured(call))\n",
        "    holds = charge is not None and amount\n",
        _test("test_usage_of_a_call_that_held_nothing_posts_in_full[zero]")
        + _test("test_usage_of_a_call_that_held_nothing_posts_in_full[rounds-to-zero]"),
    ),
    Mutation(
        1,
        "who was admitted after the request keeps it",
        "asgi_metering.admission",
        "            call.metering.runtime().give_back(asked, decided.now)\n",
        "            pass\n",
        ("tests/pitfalls/test_calls.py::test_give_back_what_is_admitted_after_the_request[store]",),
    ),
    Mutation(
        1,
        "nobody looks whether the request is over by now",
        "asgi_metering.admission",
        "    # Whoever asks may outlive its request: a task of the endpoint, a thread.\n    call.opening.check()\n",
        "",
        ("tests/pitfalls/test_calls.py::test_give_back_what_is_admitted_after_the_request[identify]",),
    ),
    Mutation(
        29,
        "what is given back still counts",
        "asgi_metering.stores.pump",
        "            release = self._enqueue(Undo(operation, answer.now))\n",
        "            release = self._enqueue(Undo(operation._replace(limits=()), answer.now))\n",
        (
            "tests/stores/test_pump_leaving.py::test_cancel_takes_back_what_limits_counted[tokens]",
            "tests/stores/test_pump_leaving.py::test_cancel_takes_back_what_limits_counted[requests]",
        ),
    ),
    Mutation(
        38,
        "the block of a charge ends by its token",
        "asgi_metering.outside",
        "    opening.closed = True\n    if CURRENT.get() is opening:\n        CURRENT.set(outer)\n",
        "    opening.closed = True\n    if CURRENT.get() is not opening:\n        raise ValueError(opening)\n"
        "    CURRENT.set(outer)\n",
        ("tests/test_charge.py::test_end_a_block_that_is_stepped_in_other_tasks",),
    ),
    Mutation(
        0,
        "a release that fails replaces what the body raised",
        "asgi_metering.work",
        '                log.warning("Call %s of line %s failed, and its hold i'
        's not released yet.", call.id, call.line)\n',
        "                raise SettlementError(call.id) from None\n",
        (
            "tests/test_charge.py::test_raise_the_bodys_exception_while_the_store_is_down",
            "tests/test_charge.py::test_raise_a_cancellation_while_the_store_is_down",
        ),
    ),
    Mutation(
        0,
        "an end that no account can count is given up",
        RUNTIME,
        "            except AmountError as failure:\n",
        "            except ZeroDivisionError as failure:\n",
        (
            "tests/test_measuring.py::test_charge_beyond_what_is_counted_falls_back_to_the_policy[none-None-0-memory://]",
        ),
    ),
    Mutation(
        0,
        "no receipt is as good as one",
        "asgi_metering.work",
        "        return receipt is not None or not call.has_hold\n",
        "        return True\n",
        ("tests/test_charge.py::test_tell_a_body_that_succeeded_of_an_end_that_cannot_be_booked",),
    ),
    Mutation(
        0,
        "the first loop to stop closes the store",
        "asgi_metering.stores.use",
        "        if self._is_used():\n            return\n",
        "",
        ("tests/test_runtime.py::test_stop_in_one_loop_leaves_the_store_to_the_others",),
    ),
    Mutation(
        0,
        "one bad end ends the worker",
        RUNTIME,
        '        except Exception as failure:\n            self._metering.meters.count("ends_lost"',
        '        except StoreUnavailableError as failure:\n            self._metering.meters.count("ends_lost"',
        ("tests/test_runtime.py::test_end_others_although_one_end_breaks",),
    ),
    Mutation(
        0,
        "an event that cannot be written is tried for ever",
        "asgi_metering.delivery",
        "            if isinstance(failure, StoreError) and not isinstance(failure, UnwritableError):\n",
        "            if isinstance(failure, StoreError):\n",
        ("tests/test_charge.py::test_keep_a_charge_whose_event_cannot_be_written",),
    ),
    Mutation(
        0,
        "attributes go to the store as they are",
        RUNTIME,
        "            self._make_plain(call)\n",
        "",
        (
            "tests/test_runtime.py::test_charge_a_call_whose_attributes_no_event_can_carry[True-memory]",
            "tests/test_runtime.py::test_charge_a_call_whose_attributes_no_event_can_carry[False-sqlite]",
        ),
    ),
    Mutation(
        33,
        "one call's trouble ends all heartbeats",
        HEARTBEATS,
        "                except Exception as failure:  # noqa: BLE001 -- the he"
        "artbeats of all other calls hang on this task\n",
        "                except StoreError as failure:\n",
        ("tests/test_runtime.py::test_beat_although_what_was_used_cannot_be_told",),
    ),
    Mutation(
        0,
        "threads may come between the steps of the memory store",
        "asgi_metering.stores.memory",
        "        self._lock = threading.Lock()\n",
        "        self._lock = threading.Semaphore(1_000)\n",
        ("tests/stores/test_memory.py::test_run_from_several_threads_at_once",),
    ),
    Mutation(
        0,
        "who is unknown by a failure is counted by the address",
        "asgi_metering.admission",
        "        if not charged and not any(map(by_identity, rates)):\n",
        "        if not charged:\n",
        (
            "tests/pitfalls/test_frameworks.py::test_answer_503_when_nobody_can_say_who_calls[down]",
            "tests/pitfalls/test_frameworks.py::test_answer_503_when_nobody_can_say_who_calls[wrong]",
        ),
    ),
    Mutation(
        0,
        "bodies are read for prices alone",
        "asgi_metering.call_state",
        '        return self.policy is not None and "rates" in self.opening.features and self.policy.weighs\n',
        "        return False\n",
        _test("test_limits_count_what_the_body_reports[fixed price]")
        + _test("test_limits_count_what_the_body_reports[no price]")
        + _test("test_limits_count_what_was_seen_of_a_stream_that_broke"),
    ),
    Mutation(
        0,
        "limits count what a stream began with",
        "asgi_metering.billing",
        "        return await observed_usage(call, known)\n    except UsageError:\n",
        "        return known\n    except UsageError:\n",
        _test("test_limits_count_what_was_seen_of_a_stream_that_broke"),
    ),
    Mutation(
        0,
        "an error in the body of a fixed price is free",
        "asgi_metering.measuring",
        "    body = _body(call) if call.charge is not None and call.charge.measured else None\n",
        "    body = _body(call)\n",
        _test("test_fixed_prices_are_charged_whatever_the_body_says"),
    ),
    Mutation(
        31,
        "one application's shutdown ends the calls of another one",
        "asgi_metering.asgi.lifespan",
        "        if self._metering.runtime().lifespans <= 1:\n",
        "        if True:\n",
        _test("test_other_users_of_a_metering_leave_the_calls_of_an_application_alone[application]"),
    ),
    Mutation(
        31,
        "a block stops what an application uses",
        "asgi_metering.metering",
        "        if not (runtime.blocks or runtime.lifespans):\n",
        "        if True:\n",
        _test("test_other_users_of_a_metering_leave_the_calls_of_an_application_alone[block]")
        + _test("test_the_last_block_of_a_metering_stops_it"),
    ),
    Mutation(
        31,
        "an application that was cancelled uses it for ever",
        "asgi_metering.asgi.lifespan",
        "            # Also where the server cancels it: for others this one is over.\n            self._leave()\n",
        "            pass\n",
        _test("test_other_users_of_a_metering_leave_the_calls_of_an_application_alone[application that broke]"),
    ),
    Mutation(
        0,
        "the short way to an end takes answers that are errors",
        "asgi_metering.billing",
        "        if (status is None or status < 400) and not",
        "        if not",
        (f"{PLAIN}test_end_a_plain_call_as_any_other[price-told]",),
    ),
    Mutation(
        0,
        "the short way to an end takes calls that failed",
        "asgi_metering.billing",
        "not (call.failure is not None or call.attributes or call.drained)",
        "not (call.attributes or call.drained)",
        (f"{PLAIN}test_end_a_plain_call_as_any_other[price-told]",),
    ),
    Mutation(
        0,
        "the short way to an end takes any cause",
        "asgi_metering.billing",
        "    if call.is_plain and call.cause is _COMPLETED and",
        "    if call.is_plain and",
        (f"{PLAIN}test_end_a_plain_call_as_any_other[price-told]",),
    ),
)
