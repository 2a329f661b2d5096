"""How each handling of idempotency keys and charge keys is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

ADMISSION = "asgi_metering.admission"
BILLING = "asgi_metering.billing"
BODY = "asgi_metering.asgi.body"
EXCHANGE = "asgi_metering.asgi.exchange"
HEARING = "asgi_metering.asgi.hearing"
KEYING = "asgi_metering.keying"
REPLAY = "asgi_metering.asgi.replay"
SETTLEMENT = "asgi_metering.rules.settlement"


def _once(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_idempotency.py::{name}" for name in names)


def _shared(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_charge_keys.py::{name}" for name in names)


MUTATIONS = (
    Mutation(
        0,
        "a repeat runs",
        ADMISSION,
        "    if decision.replay is not None:\n",
        "    if False:\n",
        _once("test_answer_a_repeat_with_the_first_answer[/json-memory]"),
    ),
    Mutation(
        0,
        "free work leaves its key claimed",
        ADMISSION,
        "        or asked.idempotency is not None\n",
        "",
        _once("test_run_free_work_once[memory]"),
    ),
    Mutation(
        0,
        "limits that are not asked ask nothing of keys",
        ADMISSION,
        " and not leases and call.once is None:\n",
        " and not leases:\n",
        _once("test_run_free_work_once[memory]"),
    ),
    Mutation(
        0,
        "a late end leaves its key free",
        "asgi_metering.rules.keys",
        "    if row is None or row.call not in (hold.id, GIVEN_BACK):\n        return []\n",
        "    if row is None or row.call != hold.id:\n        return []\n",
        _once("test_answer_what_a_request_did_that_was_given_up[keyed_app]"),
    ),
    Mutation(
        0,
        "failures keep their key",
        BILLING,
        "        row not in DONE, reply,\n",
        "        False, reply,\n",
        _once("test_run_again_what_failed_free[/broken-memory]", "test_run_again_what_failed_free[/failing-memory]"),
    ),
    Mutation(
        0,
        "half an answer is kept",
        BILLING,
        "    return reply.told() if seen.cause is _COMPLETED else None\n",
        "    return reply.told()\n",
        _once("test_keep_no_half_answer[3]"),
    ),
    Mutation(
        0,
        "a member beats with what it holds",
        BILLING,
        "        return _due(call) if call.first_byte else 0\n",
        "        return call.held if call.first_byte else 0\n",
        _shared("test_charge_what_a_member_in_doubt_had_delivered"),
    ),
    Mutation(
        0,
        "what the app reads is not seen",
        HEARING,
        "            if has_key(self.scope):\n                self.request_body()\n",
        "            pass\n",
        _once("test_refuse_a_key_that_came_with_another_request[body]"),
    ),
    Mutation(
        36,
        "a file by its path has an empty body",
        EXCHANGE,
        "        if call.reply is not None and is_body:\n            call.reply.lose()\n",
        "",
        _once("test_stand_for_a_file_by_path_with_its_receipt"),
    ),
    Mutation(
        27,
        "the gate reads beside the app",
        BODY,
        "            async with self._turn:\n                if not self._whole:\n",
        "            if True:\n                if not self._whole:\n",
        ("tests/test_keying.py::test_read_in_turn_with_the_app",),
    ),
    Mutation(
        0,
        "what was read ahead is lost to the app",
        BODY,
        "            self._kept.append(message)\n",
        "",
        _once("test_hand_over_what_was_read_ahead_as_it_came"),
    ),
    Mutation(
        0,
        "any body is read ahead",
        BODY,
        "        if self._ahead > MAX_AHEAD:\n",
        "        if False:\n",
        _once("test_refuse_to_read_a_large_body_ahead[streamed]"),
    ),
    Mutation(
        0,
        "what is announced is read",
        BODY,
        "        if not self._whole and self._announced > MAX_AHEAD:\n",
        "        if False:\n",
        _once("test_refuse_to_read_a_large_body_ahead[announced]"),
    ),
    Mutation(
        0,
        "half a body is fingerprinted",
        BODY,
        "            self._cut = True\n",
        "            self._whole = True\n",
        _once("test_claim_nothing_for_a_client_that_left_amid_its_body"),
    ),
    Mutation(
        0,
        "callers of one payer get each others answers",
        KEYING,
        "    fingerprint = _sha256(*target, _bytes(caller), body)\n",
        "    fingerprint = _sha256(*target, body)\n",
        _once("test_refuse_a_key_that_came_with_another_request[caller]"),
    ),
    Mutation(
        0,
        "payers share keys",
        KEYING,
        '    scope = (owner := call.payer or "", call.unit.name, call.line, route, key)\n',
        '    scope = (owner := "", call.unit.name, call.line, route, key)\n',
        _once("test_keep_keys_of_payers_and_routes_apart"),
    ),
    Mutation(
        0,
        "the order of endpoints is a part of the key",
        KEYING,
        '    route = call.policy.name.partition("#")[0]\n',
        "    route = f'{call.policy.name}{id(call.policy)}'\n",
        _once("test_answer_the_receipt_of_a_killed_worker"),
    ),
    Mutation(
        0,
        "sessions of all payers are one",
        KEYING,
        '    payer = call.payer or ""\n',
        '    payer = ""\n',
        _shared("test_count_a_session_over_the_routes_of_a_line"),
    ),
    Mutation(
        0,
        "cookies are kept",
        REPLAY,
        "            if bytes(name).lower() in KEPT_FIELDS and len(value) <= MAX_FIELD\n",
        "            if len(value) <= MAX_FIELD\n",
        _once("test_keep_no_cookie_for_a_repeat"),
    ),
    Mutation(
        0,
        "answers of any size are kept",
        REPLAY,
        "            if self._left < 0:\n                self._chunks.clear()\n",
        "            self._left = max(0, self._left)\n",
        _once("test_keep_no_body_above_the_bound[/json]", "test_keep_no_body_above_the_bound[/stream]"),
    ),
    Mutation(
        29,
        "what is undone leaves its key answered",
        SETTLEMENT,
        "End(hold.id, None, failed=True)",
        "End(hold.id, None)",
        _once("test_free_the_key_of_a_request_that_was_cancelled_at_the_gate[decided]"),
    ),
    Mutation(
        0,
        "continuations are charged",
        "asgi_metering.pricing",
        "        call.price, call.estimate = FREE, FREE.amount\n        return\n",
        "        pass\n",
        _shared("test_charge_nothing_for_a_continuation[ann]", "test_charge_nothing_for_a_continuation[poor]"),
    ),
)
