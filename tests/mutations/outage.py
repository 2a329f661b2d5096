"""Mutations of what is done while the store is down: each handling switched off in turn."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

BREAKER = "asgi_metering.stores.breaker"
DELIVERY = "asgi_metering.delivery"
OUTAGE = "asgi_metering.outage"
PUMP = "asgi_metering.stores.pump"
RUNTIME = "asgi_metering.runtime"


def _test(name: str, module: str = "delivery") -> tuple[str, ...]:
    return (f"tests/outage/test_{module}.py::{name}",)


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        0,
        "breaker never opens",
        BREAKER,
        "            if is_news and self._failures < FAILURES:\n",
        "            if is_news:\n",
        _test("test_spare_everybody_the_deadline_of_a_dead_store"),
    ),
    Mutation(
        0,
        "everybody probes",
        BREAKER,
        "                self._until = now + PROBE_S\n",
        "                self._until = now\n",
        _test("test_recover_with_one_probe"),
    ),
    Mutation(
        0,
        "journal forgets",
        DELIVERY,
        "                await journal.keep(kept, due_in_s=due_in_s)\n",
        "                await journal.keep({}, due_in_s=due_in_s)\n",
        _test("test_keep_ends_in_the_journal_until_the_store_is_back", "journalled"),
    ),
    Mutation(
        0,
        "queued admission is free",
        RUNTIME,
        "            return call.queued, end\n",
        "            return ()\n",
        _test("test_charge_later_what_was_let_in", "charged_later"),
    ),
    Mutation(
        0,
        "debt is admitted under another id",
        DELIVERY,
        "        owing = _on_debt(ask)\n",
        '        owing = _on_debt(ask._replace(id=f"{ask.id}:owed"))\n',
        _test("test_owe_what_nobody_can_pay_under_the_call_s_own_id", "queued"),
    ),
    Mutation(
        0,
        "queued charge is undone",
        PUMP,
        "            if not waiting.is_repeated:\n",
        "            if True:\n",
        _test("test_charge_a_queued_call_that_is_admitted_late_again", "charged_later"),
    ),
    Mutation(
        0,
        "deadline ignored",
        PUMP,
        "            self._deadlines.watch(future, deadline_s)\n",
        "            pass\n",
        _test("test_give_up_on_a_store_that_says_nothing[True]"),
    ),
    Mutation(
        0,
        "late admission under the queued id",
        OUTAGE,
        "    was, call.id = call.id, call.metering.new_id()\n",
        "    was = call.id\n",
        _test("test_charge_a_queued_call_whose_first_admission_was_late", "charged_later"),
    ),
)
