"""How each bound of the fast path, and each of its sums, is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

ADMISSION = "asgi_metering.rules.fast_admission"
END = "asgi_metering.rules.fast_end"


def _test(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/rules/test_fast_path.py::test_{name}" for name in names)


MUTATIONS = (
    Mutation(
        0,
        "the fast path sees nothing overdue",
        ADMISSION,
        " and account is not None and not account[-1] <= now < account[-2]:\n",
        " and False:\n",
        _test(
            "leave_a_call_whose_own_account_is_not_plain[-1]",
            "leave_a_call_whose_own_account_is_not_plain[60]",
        ),
    ),
    Mutation(
        0,
        "the fast path sees no grant lapse",
        ADMISSION,
        "            if available < 0 or overdraft < 0 or now >= changes_at or",
        "            if available < 0 or overdraft < 0 or",
        _test("leave_a_call_of_an_account_that_is_not_plain[grant lapses]"),
    ),
    Mutation(
        0,
        "the fast path knows no full window",
        ADMISSION,
        "            if used > most:\n",
        "            if False:\n",
        _test("leave_a_call_that_is_not_plain[window without room]"),
    ),
    Mutation(
        0,
        "the fast path knows no full pool",
        ADMISSION,
        "        if slots <= (0 if taken is None else len(taken)):\n",
        "        if False:\n",
        _test(
            "leave_a_call_that_is_not_plain[pool without room]",
            "leave_a_call_that_is_not_plain[pool of nobody]",
        ),
    ),
    Mutation(
        0,
        "the fast path admits keys",
        ADMISSION,
        "    if charge_key is not None or idempotency is not None or call in state.holds:\n",
        "    if call in state.holds:\n",
        _test(
            "leave_a_call_that_is_not_plain[charge key]",
            "leave_a_call_that_is_not_plain[idempotency key]",
        ),
    ),
    Mutation(
        0,
        "the fast path holds for nobody",
        ADMISSION,
        "settled, held + amount, expired",
        "settled, held, expired",
        _test("take_a_plain_call[units]"),
    ),
    Mutation(
        0,
        "the fast path knows no used up allowance",
        ADMISSION,
        "    if available < 0 or not available + amount:\n",
        "    if False:\n",
        _test(
            "leave_a_call_that_is_not_plain[allowance that has too little]",
            "leave_a_call_that_is_not_plain[allowance that is used up]",
        ),
    ),
    Mutation(
        0,
        "the fast path asks no other payer",
        ADMISSION,
        " and not any(source.payer for source in others)",
        "",
        _test("leave_a_call_that_is_not_plain[another payer behind]"),
    ),
    Mutation(
        0,
        "the fast path charges above the hold",
        END,
        "    if amount > size or debt or",
        "    if debt or",
        _test("leave_an_end_that_is_not_plain[more than held]"),
    ),
    Mutation(
        0,
        "the fast path returns to lapsed grants",
        END,
        "    if expires_at <= now or spent",
        "    if spent",
        _test("leave_an_end_of_what_is_not_plain[grant has lapsed]"),
    ),
    Mutation(
        0,
        "the fast path leaves spent grants open",
        END,
        " or spent + lapsed + taken_back >= given:",
        ":",
        _test("leave_an_end_of_what_is_not_plain[grant is spent]"),
    ),
    Mutation(
        0,
        "the fast path writes two rows of one counter as one",
        ADMISSION,
        "    if len(counters) < len(windows):\n",
        "    if False:\n",
        _test("leave_a_call_that_is_not_plain[two limits of one key]"),
    ),
    Mutation(
        0,
        "the fast path ends where the clock has stepped back",
        END,
        " or now >= changes_at or now < seen_at:\n        return None\n    wallet",
        " or now >= changes_at:\n        return None\n    wallet",
        _test("leave_an_end_of_what_is_not_plain[clock stepped back]"),
    ),
    Mutation(
        0,
        "the fast path ends no lease",
        END,
        "            taken.pop(call, None)\n",
        "            pass\n",
        _test("take_a_plain_end[of a slot]"),
    ),
)
