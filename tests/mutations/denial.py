"""How each handling of a refusal on its way out is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

EXCHANGE = "asgi_metering.asgi.exchange"
ENDINGS = "asgi_metering.asgi.endings"
HEARING = "asgi_metering.asgi.hearing"
NATIVE = "asgi_metering.asgi.native"
REFUSALS = "asgi_metering.asgi.refusals"
NATIVE_TESTS = "tests/pitfalls/test_native.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/pitfalls/test_denial.py::{name}" for name in names)


ANSWERS = (
    Mutation(
        13,
        "only a plain refusal is answered",
        EXCHANGE,
        "        if call.is_refused:\n            # Decided",
        "        if isinstance(failure, CallRefused):\n            # Decided",
        _tests(
            "test_answer_whatever_the_refusal_became[group]",
            "test_answer_whatever_the_refusal_became[base-group]",
            "test_answer_whatever_the_refusal_became[exception]",
            "test_answer_whatever_the_refusal_became[base-exception]",
        ),
    ),
    Mutation(
        13,
        "groups are raised again",
        ENDINGS,
        "            return found[0] if all(found) else None\n",
        "            return None\n",
        _tests("test_answer_whatever_the_refusal_became[group]"),
    ),
    Mutation(
        13,
        "translations are raised again",
        ENDINGS,
        "        failure = failure.__cause__\n",
        "        failure = None\n",
        _tests("test_answer_whatever_the_refusal_became[exception]"),
    ),
    Mutation(
        13,
        "a swallowed refusal is not answered",
        EXCHANGE,
        "call.is_refused and not self.started:\n",
        "call.is_refused and False:\n",
        _tests("test_answer_a_refusal_that_somebody_kept_silent_of"),
    ),
    Mutation(
        13,
        "a refusal hides every bug",
        EXCHANGE,
        "await self._answer_refusal(call) and is_refusal(failure)\n",
        "await self._answer_refusal(call)\n",
        _tests(
            "test_answer_and_still_raise_what_has_nothing_to_do_with_it",
            "test_still_raise_what_else_broke_a_refused_stream",
        ),
    ),
    Mutation(
        13,
        "a refusal holds up who wants to stop",
        EXCHANGE,
        "            return not stops(failure) and await self._answer_refusal(call)",
        "            return await self._answer_refusal(call)",
        _tests(
            "test_let_through_who_wants_to_stop[CancelledError]",
            "test_let_through_who_wants_to_stop[KeyboardInterrupt]",
        ),
    ),
    Mutation(
        14,
        "the refusal is raised again after its answer",
        EXCHANGE,
        "        if self.swapped:\n            return True\n",
        "        if self.swapped:\n            return False\n",
        _tests(
            "test_answer_instead_of_a_frameworks_500[bare-wrapped]",
            "test_answer_for_a_mounted_sub_application[added]",
        ),
    ),
    Mutation(
        15,
        "a 500 stays",
        EXCHANGE,
        '            if (self.options.replaces(message["status"]) and not call.told_by_app) or call.is_repeat:\n',
        "            if False:\n",
        _tests(
            "test_answer_instead_of_a_frameworks_500[bare-wrapped]",
            "test_answer_instead_of_a_frameworks_500[debug-wrapped]",
            "test_answer_instead_of_a_frameworks_500[catch-all-wrapped]",
            "test_replace_an_own_handlers_500[added]",
        ),
    ),
    Mutation(
        15,
        "an own answer stands for a repeat",
        EXCHANGE,
        '            if (self.options.replaces(message["status"]) and not call.told_by_app) or call.is_repeat:\n',
        '            if self.options.replaces(message["status"]) and not call.told_by_app:\n',
        (
            "tests/test_idempotency.py::test_answer_a_repeat_although_refusals_have_an_own_handler[handler]",
            "tests/test_idempotency.py::test_answer_a_repeat_although_refusals_have_an_own_handler[dependency]",
        ),
    ),
    Mutation(
        15,
        "an own answer does not stay",
        EXCHANGE,
        '            if (self.options.replaces(message["status"]) and not call.told_by_app) or call.is_repeat:\n',
        "            if True:\n",
        _tests(
            "test_keep_the_answer_of_an_own_handler[402-added]",
            "test_keep_the_answer_of_an_own_handler[200-wrapped]",
            "test_keep_what_an_endpoint_makes_of_its_explicit_gate",
            "test_keep_an_http_exception_made_of_a_refusal",
        ),
    ),
    Mutation(
        16,
        "messages pass after the swap",
        EXCHANGE,
        "        if self.swapped:\n            self._let_through(call, message)\n",
        "        if False:\n            self._let_through(call, message)\n",
        _tests(
            "test_raise_from_every_send_after_the_swap[http.response.start]",
            "test_raise_from_every_send_after_the_swap[http.response.body0]",
            "test_raise_from_every_send_after_the_swap[http.response.pathsend]",
            "test_raise_from_every_send_after_the_swap[http.response.zerocopysend]",
            "test_raise_from_every_send_after_the_swap[http.response.trailers]",
            "test_skip_the_background_of_a_replaced_answer",
        ),
    ),
    Mutation(
        21,
        "a HEAD has a body",
        EXCHANGE,
        '        body = b"" if self.scope["method"] == "HEAD" else rendered.body\n',
        "        body = rendered.body\n",
        _tests("test_send_no_body_with_a_refused_head[HEAD]"),
    ),
    Mutation(
        0,
        "the hook misses who is unknown",
        REFUSALS,
        "policy.charge.customise if policy.charge is not None else None",
        "call.charge.customise if call.charge is not None else None",
        _tests("test_let_an_own_hook_rewrite_every_refusal"),
    ),
)

STREAMS = (
    Mutation(
        18,
        "a begun response is answered anew",
        EXCHANGE,
        "        if not self.started:\n            await self._refuse(call)\n            return True\n",
        "        await self._refuse(call)\n        return True\n",
        _tests(
            "test_break_a_body_that_has_no_place_for_an_error[text]",
            "test_end_an_event_stream_with_its_own_error[between]",
        ),
    ),
    Mutation(
        18,
        "a stream just breaks",
        EXCHANGE,
        "        if error is None:\n            return False\n",
        "        return False\n",
        _tests(
            "test_end_an_event_stream_with_its_own_error[nothing-yet]",
            "test_end_lines_of_json_with_their_own_error[application/jsonl-between]",
        ),
    ),
    Mutation(
        18,
        "a fabricated end is taken for the end",
        EXCHANGE,
        "            if not self.spoke and is_last(message):\n                error = in_band_error(",
        "            if False:\n                error = in_band_error(",
        _tests("test_end_a_frameworks_stream_with_its_own_error[added-base-http-2.3]"),
    ),
    Mutation(
        18,
        "a stream's own words are not heard",
        EXCHANGE,
        '            self.spoke = self.spoke or bool(message.get("body"))\n',
        "",
        _tests(
            "test_keep_what_a_stream_says_of_its_refusal[return]",
            "test_keep_what_a_stream_says_of_its_refusal[raise]",
        ),
    ),
    Mutation(
        18,
        "an ended stream gets more",
        EXCHANGE,
        "        error = None if over or self.spoke else in_band_error(",
        "        error = None if self.spoke else in_band_error(",
        _tests("test_raise_a_refusal_after_the_end"),
    ),
    Mutation(
        18,
        "plain text is written into compressed and sized bodies",
        REFUSALS,
        '    if b"content-length" in given or',
        "    if False and",
        _tests(
            "test_break_a_body_that_has_no_place_for_an_error[compressed]",
            "test_break_a_body_that_has_no_place_for_an_error[sized]",
        ),
    ),
    Mutation(
        18,
        "promised trailers never come",
        REFUSALS,
        '    if start is None or start.get("trailers"):\n',
        "    if start is None:\n",
        _tests("test_break_a_stream_that_promised_trailers"),
    ),
    Mutation(
        18,
        "a half event swallows the error",
        REFUSALS,
        "        mid_event = sent is not None and not sent.endswith(EVENT_ENDS)\n",
        "        mid_event = False\n",
        _tests("test_end_an_event_stream_with_its_own_error[inside]"),
    ),
    Mutation(
        18,
        "a late admission sees nothing of its response",
        EXCHANGE,
        "            self._catch_up(call, self.begun)\n        kind",
        "            pass\n        kind",
        _tests("test_charge_what_was_admitted_after_the_start"),
    ),
    Mutation(
        18,
        "work after the response is aborted",
        EXCHANGE,
        "            self.finishing = self.finishing or (self.latest is not None and is_last(self.latest))\n",
        "",
        _tests("test_charge_what_was_admitted_after_the_end"),
    ),
)

NATIVES = (
    Mutation(
        15,
        "another application's 403 is taken for Django's",
        HEARING,
        "(status == FORBIDDEN and self.framework == DJANGO)",
        "status == FORBIDDEN",
        (f"{NATIVE_TESTS}test_keep_a_403_of_others_beside_django",),
    ),
    Mutation(
        17,
        "no framework knows the refusal",
        NATIVE,
        "    if not (kinds or tools):\n",
        "    if True:\n",
        (
            f"{NATIVE_TESTS}test_rise_as_what_a_loaded_framework_knows[falcon-HTTPError]",
            f"{NATIVE_TESTS}test_prefer_the_kind_of_the_applications_own_framework",
            f"{NATIVE_TESTS}test_replace_djangos_403",
        ),
    ),
    Mutation(
        17,
        "a compiled framework finds no status",
        NATIVE,
        "            place.__set__(self, self.status)\n",
        "            pass\n",
        (f"{NATIVE_TESTS}test_set_the_status_where_a_compiled_framework_looks_for_it",),
    ),
    Mutation(
        20,
        "a tool does not say why",
        NATIVE,
        "        known.told = told()\n",
        "        pass\n",
        (f"{NATIVE_TESTS}test_tell_the_client_of_a_tool_why[mcp.server.mcpserver.exceptions]",),
    ),
    Mutation(
        34,
        "the first request finds out that there is no loop",
        "asgi_metering.asgi.middleware",
        "                    self.metering.runtime()\n",
        "",
        (f"{NATIVE_TESTS}test_serve_nothing_on_an_event_loop_of_others[/free]",),
    ),
)

MUTATIONS = (*ANSWERS, *STREAMS, *NATIVES)
