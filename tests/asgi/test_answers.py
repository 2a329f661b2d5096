"""The table of refusals: status, wait, type, words and numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.asgi.answers import QUOTA_EXCEEDED, REDUCED_CAPACITY, Answer, AnswerOptions, answer
from asgi_metering.asgi.fields import HeaderNames
from asgi_metering.decisions import Decision, Reason, Refusal, WindowState
from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.admission import admit
from asgi_metering.rules.operations import Admit, AllowanceSource, LeaseAsk, LimitAsk, WalletSource, WindowKind
from asgi_metering.rules.state import AllowanceWindow, Counter, Lease, State
from tests.asgi.structured import parse_list

NOW = 1_795_219_200.0
"""2026-11-21T00:00:00Z."""

TOMORROW = NOW + 86_400.0


def lowest(first: int, _: int) -> int:
    """Draw the least wait."""
    return first


def highest(_: int, last: int) -> int:
    """Draw the longest wait."""
    return last


def ask(refusal: Refusal, decision: Decision | None = None, **options: Any) -> Answer:
    """Answer *refusal*, of a route that charges credits; the least wait is drawn."""
    return answer(refusal, decision, **{"unit": CREDITS, "jitter": lowest, **options})


def header(answered: Answer, name: bytes) -> bytes | None:
    """The value of a field, which is there at most once."""
    found = [value for given, value in answered.headers if given == name]
    assert len(found) <= 1
    return found[0] if found else None


def credits_short(transient: bool = False, resets_at: float | None = None) -> Refusal:
    """Five credits asked, two there and one held."""
    return Refusal(Reason.CREDITS, "credits", 5_000_000, 2_000_000, 1_000_000, transient=transient, resets_at=resets_at)


def allowance_spent(limit: int = 10_000_000, required: int = 1_000_000) -> Refusal:
    """An allowance of ten credits a day of which nothing is left."""
    return Refusal(Reason.ALLOWANCE, "daily", required, 0, 0, limit, retry_after_s=TOMORROW - NOW, resets_at=TOMORROW)


SPENT = WindowState("per-minute", 60, 0, 29.4, 60.0, "requests")
RATE = Refusal(Reason.RATE_LIMIT, "per-minute", 1, 0, 0, 60, retry_after_s=29.4)
TOO_LARGE = Refusal(Reason.EXCEEDS_LIMIT, "tokens-per-minute", 300_000, 200_000, 0, 200_000)
POOL = Refusal(Reason.CONCURRENCY, "chat", 1, 0, 4, 4, transient=True, level="caller")

TABLE = [
    (Refusal(Reason.UNAUTHENTICATED, "caller"), 401, None, None),
    (Refusal(Reason.IDENTITY_DOWN, "caller"), 503, 3, 7),
    (Refusal(Reason.PAYER, "payer"), 503, None, None),
    (Refusal(Reason.KEY_MISSING, "idempotency-key"), 400, None, None),
    (Refusal(Reason.KEY_INVALID, "idempotency-key"), 400, None, None),
    (Refusal(Reason.BODY, "idempotency-key"), 413, None, None),
    (Refusal(Reason.REPLAYED, "idempotency"), 409, None, None),
    (Refusal(Reason.IN_FLIGHT, "key"), 409, 1, 5),
    (Refusal(Reason.FINGERPRINT, "key"), 422, None, None),
    (Refusal(Reason.POLICY, "regions"), 403, None, None),
    (Refusal(Reason.UPSTREAM, "openai", retry_after_s=12.01), 503, 13, 13),
    (POOL, 429, 1, 5),
    (POOL._replace(level="global"), 503, 1, 5),
    (TOO_LARGE, 429, None, None),
    (RATE, 429, 30, 30),
    (allowance_spent(), 429, 86_400, 86_400),
    (credits_short(transient=True), 402, 1, 5),
    (credits_short(), 402, None, None),
    (Refusal(Reason.STORE_DOWN, "store"), 503, 3, 7),
    (Refusal(Reason.ENDED, "call"), 409, None, None),
]


@pytest.mark.parametrize(("refusal", "status", "least", "most"), TABLE)
def test_answer_as_the_table_says(refusal: Refusal, status: int, least: int | None, most: int | None) -> None:
    """Status and Retry-After are those of the design's table, with jitter where it asks for it."""
    for draw, wait_s in ((lowest, least), (highest, most)):
        answered = ask(refusal, jitter=draw)
        assert answered.status == status
        assert answered.retry_after_s == wait_s
        assert header(answered, b"retry-after") == (None if wait_s is None else b"%d" % wait_s)


def test_answer_every_reason() -> None:
    """No reason is missing from the table, each has words, and its value is the code."""
    assert {refusal.reason for refusal, *_ in TABLE} == set(Reason)
    for refusal, *_ in TABLE:
        answered = ask(refusal)
        assert answered.code == refusal.reason.value
        assert answered.detail.endswith(".")
        assert answered.remedy.endswith(".")
        assert "None" not in answered.detail + answered.remedy


@pytest.mark.parametrize("reason", list(Reason))
def test_answer_a_reason_that_comes_without_any_number(reason: Reason) -> None:
    """A refusal that says nothing but its reason is still answered in whole sentences."""
    answered = ask(Refusal(reason, "somewhere"))
    assert "None" not in answered.detail + answered.remedy
    assert answered.detail
    assert answered.remedy


def test_never_let_a_refusal_be_stored() -> None:
    """Every refusal says no-store, 402 and 429 among them."""
    assert {header(ask(refusal), b"cache-control") for refusal, *_ in TABLE} == {b"no-store"}


def test_draw_the_jitter_from_what_is_injected() -> None:
    """Waits come from the injected generator, so that equal seeds wait equally."""
    drawn = [ask(credits_short(transient=True), jitter=random.Random(7).randint).retry_after_s for _ in range(3)]
    assert drawn == [random.Random(7).randint(1, 5)] * 3


def test_draw_a_wait_without_being_told_how() -> None:
    """Left alone, the wait is one of one to five seconds."""
    waits = {answer(credits_short(transient=True), None, unit=CREDITS).retry_after_s for _ in range(200)}
    assert waits <= {1, 2, 3, 4, 5}
    assert len(waits) > 1


def test_challenge_only_a_401() -> None:
    """A 401 names the scheme to use, as RFC 9110 demands, and no other refusal does."""
    for refusal, status, *_ in TABLE:
        assert header(ask(refusal), b"www-authenticate") == (b"Bearer" if status == 401 else None)


def test_challenge_as_configured() -> None:
    """The challenge is the application's, or is left to it."""
    nobody = Refusal(Reason.UNAUTHENTICATED, "caller")
    own = AnswerOptions(challenge=' ApiKey realm="api" ')
    assert header(ask(nobody, options=own), b"www-authenticate") == b'ApiKey realm="api"'
    assert header(ask(nobody, options=AnswerOptions(challenge=None)), b"www-authenticate") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"challenge": "Bearer\r\nx: y"},
        {"challenge": " "},
        {"caller_status": 402},
        {"global_status": 500},
        {"type_base": "urn:a b:"},
        {"type_base": ""},
        {"type_base": "https://ex\u00e4mple/"},
    ],
)
def test_refuse_options_that_cannot_be_sent(wrong: dict[str, Any]) -> None:
    """Options that would break a response are refused when they are configured."""
    with pytest.raises(ConfigurationError):
        AnswerOptions(**wrong)


def test_choose_the_status_of_a_full_pool() -> None:
    """The status of either level of concurrency is the application's choice, and the type follows it (S0.42)."""
    swapped = AnswerOptions(caller_status=503, global_status=429)
    caller, everybody = ask(POOL, options=swapped), ask(POOL._replace(level="global"), options=swapped)
    assert (caller.status, caller.type) == (503, REDUCED_CAPACITY)
    assert (everybody.status, everybody.type) == (429, QUOTA_EXCEEDED)


def test_answer_402_for_an_allowance_by_choice() -> None:
    """A spent allowance that answers 402 keeps its wait for the reset, and is no quota of the draft."""
    answered = ask(allowance_spent(), allowance_status=402)
    assert (answered.status, answered.retry_after_s) == (402, 86_400)
    assert answered.type == "urn:asgi-metering:problem:allowance"
    assert answered.title == "Allowance spent"


@pytest.mark.parametrize(
    ("refusal", "problem_type", "violated"),
    [
        (RATE, QUOTA_EXCEEDED, ("per-minute",)),
        (TOO_LARGE, QUOTA_EXCEEDED, ("tokens-per-minute",)),
        (POOL, QUOTA_EXCEEDED, ("chat",)),
        (allowance_spent(), QUOTA_EXCEEDED, ("daily",)),
        (POOL._replace(level="global"), REDUCED_CAPACITY, ("chat",)),
        (Refusal(Reason.UPSTREAM, "openai"), REDUCED_CAPACITY, ()),
        (credits_short(), "urn:asgi-metering:problem:insufficient-credits", ()),
        (Refusal(Reason.STORE_DOWN, "store"), "urn:asgi-metering:problem:store-unavailable", ()),
    ],
)
def test_use_the_drafts_types_where_they_fit(refusal: Refusal, problem_type: str, violated: tuple[str, ...]) -> None:
    """A quota is the draft's type with the policy's name, full capacity the other, all else a type of our own."""
    answered = ask(refusal)
    assert (answered.type, answered.violated) == (problem_type, violated)


def test_keep_one_title_for_one_type() -> None:
    """The title of a type is the same at every occurrence (RFC 9457 section 3.1.3)."""
    titles: dict[str, set[str]] = {}
    for refusal, *_ in TABLE:
        answered = ask(refusal)
        titles.setdefault(answered.type, set()).add(answered.title)
    assert all(len(found) == 1 for found in titles.values())


def test_put_own_types_where_the_application_documents_them() -> None:
    """The beginning of our types can be an address of the application's."""
    answered = ask(credits_short(), options=AnswerOptions(type_base="https://example.com/problems/"))
    assert answered.type == "https://example.com/problems/insufficient-credits"


def test_show_money_as_decimal_text_in_whole_units() -> None:
    """Amounts of money are exact text in whole units."""
    facts = ask(credits_short(), line="chat").facts
    assert (facts.unit, facts.required, facts.available, facts.held, facts.limit) == ("credits", "5", "2", "1", None)
    assert ask(credits_short()._replace(available=-1)).facts.available == "-0.000001"


def test_show_counts_as_numbers_of_what_is_counted() -> None:
    """Limits are whole numbers of their own meter, a pool's of concurrent requests."""
    tokens = WindowState("tokens-per-minute", 200_000, 200_000, 0.0, 60.0, "tokens")
    facts = ask(TOO_LARGE, Decision("c", NOW, TOO_LARGE, windows=(tokens,))).facts
    assert (facts.unit, facts.required, facts.available, facts.held, facts.limit) == (
        "tokens",
        300_000,
        200_000,
        None,
        200_000,
    )
    pool = ask(POOL).facts
    assert (pool.unit, pool.required, pool.available, pool.held, pool.limit) == ("concurrent-requests", 1, 0, 4, 4)
    assert pool.level == "caller"
    assert ask(RATE).facts.unit == "requests"


def test_show_nothing_of_what_others_use() -> None:
    """A pool of everybody's shows neither its size nor its use, and outages show no detail (X.9, DESIGN 10)."""
    facts = ask(POOL._replace(level="global", detail="379 of 200 run")).facts
    assert facts._replace(name="", wait_s=None, hopeless=False) == facts.__class__(
        Reason.CONCURRENCY, "", level="global"
    )
    secret = "postgresql://app:hunter2@10.0.0.7/billing"
    for reason in (Reason.STORE_DOWN, Reason.IDENTITY_DOWN, Reason.PAYER, Reason.UPSTREAM, Reason.IN_FLIGHT):
        answered = ask(Refusal(reason, secret, 379, 0, 379, 200, detail=secret))
        assert secret not in repr((answered.detail, answered.remedy, answered.violated, answered.headers))
        assert answered.facts.limit is None
    assert "379" not in ask(POOL._replace(level="global", detail="379 of 200 run")).detail


def test_say_what_the_rule_has_to_say() -> None:
    """A detail that comes from the rule about the caller's own call is what a person reads."""
    assert (
        ask(Refusal(Reason.POLICY, "plan", detail="Plan 'free' has no images.")).detail == "Plan 'free' has no images."
    )


@pytest.mark.parametrize(
    ("refusal", "detail", "remedy"),
    [
        (
            credits_short(),
            "This call needs 5 credits; 2 available, and 1 held by calls in progress.",
            "Add credits, then retry.",
        ),
        (
            credits_short(transient=True),
            "This call needs 5 credits; 2 available, and 1 held by calls in progress.",
            "Retry in 1 second, when calls in progress may have ended, or add credits.",
        ),
        (
            credits_short(resets_at=TOMORROW)._replace(held=0),
            "This call needs 5 credits; 2 available.",
            "Add credits, or retry after 2026-11-22T00:00:00Z, when an allowance begins anew.",
        ),
        (
            RATE,
            "The limit 'per-minute' allows 60 requests per window; this call takes 1 and 0 are left.",
            "Retry in 30 seconds.",
        ),
        (
            allowance_spent(),
            "This call needs 1 credits; 0 left of the allowance 'daily' of 10.",
            "Retry after 2026-11-22T00:00:00Z, when an allowance begins anew.",
        ),
        (
            POOL,
            "4 calls are running; 4 may run at once.",
            "Let a running call end, then retry, in 1 second or so.",
        ),
        (POOL._replace(level="global"), "The service runs as many calls as it can.", "Retry in 1 second."),
    ],
)
def test_say_the_fact_and_the_mend(refusal: Refusal, detail: str, remedy: str) -> None:
    """Each refusal is one sentence of fact with its values and one of what to do next."""
    answered = ask(refusal)
    assert (answered.detail, answered.remedy) == (detail, remedy)


def test_report_what_was_used_above_a_limit_that_was_cut() -> None:
    """Used is reported as it is, also above the limit, while what is left is never below zero (S4.3, S4.4)."""
    cut = Refusal(Reason.ALLOWANCE, "monthly", 1, -31, 1, 10, resets_at=TOMORROW, retry_after_s=86_400.0)
    facts = ask(cut, unit=Unit("messages", 0)).facts
    assert (facts.used, facts.held, facts.limit, facts.available) == ("40", "1", "10", "0")


@pytest.mark.parametrize(("limit", "required"), [(0, 1_000_000), (10_000_000, 10_000_001)])
def test_promise_no_wait_for_an_allowance_that_never_pays(limit: int, required: int) -> None:
    """An allowance smaller than the call, zero included, sends nobody to wait for its reset (S4.1)."""
    answered = ask(allowance_spent(limit, required))
    assert (answered.retry_after_s, answered.facts.reset) == (None, None)
    assert answered.remedy.startswith("Ask for a larger allowance")


def test_promise_the_reset_to_a_call_that_takes_all_of_an_allowance() -> None:
    """A call as large as the whole allowance passes once it begins anew."""
    assert ask(allowance_spent(10_000_000, 10_000_000)).retry_after_s == 86_400


@pytest.mark.parametrize("required", [1, None])
def test_promise_no_wait_for_a_pool_of_nothing(required: int | None) -> None:
    """A pool of zero slots admits nobody, so that no wait helps."""
    answered = ask(POOL._replace(required=required, limit=0, held=0, transient=False))
    assert answered.retry_after_s is None
    assert answered.remedy.startswith("Ask the operator")


def test_promise_no_wait_that_never_ends() -> None:
    """A wait without end is no wait."""
    assert ask(RATE._replace(retry_after_s=inf)).retry_after_s is None
    assert ask(Refusal(Reason.UPSTREAM, "openai")).retry_after_s is None


@pytest.mark.parametrize("resets_at", [inf, 1e300, float("nan")])
def test_tell_no_reset_that_no_calendar_has(resets_at: float) -> None:
    """A reset beyond the calendar is left out."""
    assert ask(credits_short(resets_at=resets_at)).facts.reset is None


def test_wait_for_the_reset_where_only_that_is_known() -> None:
    """Without a wait of its own, a refusal waits from the store's time to its reset."""
    refusal = allowance_spent()._replace(retry_after_s=None)
    assert ask(refusal, Decision("c", NOW + 0.5, refusal)).retry_after_s == 86_400
    assert ask(refusal).retry_after_s is None


def test_wait_at_least_a_second() -> None:
    """A refused call is never told to come back at once."""
    assert ask(RATE._replace(retry_after_s=0.0)).retry_after_s == 1


def test_wait_no_shorter_than_the_limits_own_field_says() -> None:
    """Retry-After is not earlier than the t of the limit that refused, but owes nothing to other limits (trap 8)."""
    other = WindowState("daily", 5000, 4000, 80_000.0, 86_400.0, "requests")
    refusal = RATE._replace(retry_after_s=12.0)
    answered = ask(refusal, Decision("c", NOW, refusal, windows=(other, SPENT)))
    assert answered.retry_after_s == 30


@pytest.mark.parametrize("last", [True, False])
def test_wait_for_the_limit_that_refused_and_for_no_namesake(last: bool) -> None:
    """DESIGN 4: Retry-After is exact also where limits of two keys have one name, and the other's window ends later."""
    roomy, day = SPENT._replace(remaining=3, reset_after_s=59.0), SPENT._replace(remaining=1, reset_after_s=58.0)
    windows = (roomy, day, SPENT) if last else (SPENT, roomy, day)
    assert ask(RATE, Decision("c", NOW, RATE, windows=windows)).retry_after_s == 30


def test_carry_the_limits_on_a_refusal() -> None:
    """A refusal carries the fields of all windows, those of the refusing one in the legacy names, and the plan."""
    other = WindowState("daily", 5000, 0, 80_000.0, 86_400.0, "requests")
    options = AnswerOptions(names=HeaderNames(limit="X-RateLimit-Limit", retry_after="Wait"))
    answered = ask(RATE, Decision("c", NOW, RATE, windows=(SPENT, other)), options=options, plan="free", line="chat")
    assert answered.headers == (
        (b"ratelimit-policy", b'"per-minute";q=60;w=60, "daily";q=5000;w=86400'),
        (b"ratelimit", b'"per-minute";r=0;t=30, "daily";r=0;t=80000'),
        (b"x-ratelimit-limit", b"60"),
        (b"wait", b"30"),
        (b"cache-control", b"no-store"),
    )
    assert (answered.plan, answered.line) == ("free", "chat")


@given(
    st.builds(
        Refusal,
        reason=st.sampled_from(Reason),
        name=st.text(max_size=70),
        required=st.none() | st.integers(-(2**60), 2**60),
        available=st.none() | st.integers(-(2**60), 2**60),
        held=st.none() | st.integers(0, 2**60),
        limit=st.none() | st.integers(0, 2**60),
        retry_after_s=st.none() | st.floats(),
        resets_at=st.none() | st.floats(),
        transient=st.booleans(),
        level=st.sampled_from([None, "caller", "global"]),
        detail=st.none() | st.text(max_size=20),
    ),
    st.floats(),
    st.integers(0, 10),
)
def test_answer_whatever_comes(refusal: Refusal, reset_after_s: float, remaining: int) -> None:
    """Whatever a refusal holds, the answer is a status of the table, safe fields and whole seconds from 1."""
    window = WindowState(refusal.name, 10, remaining, reset_after_s, 60.0, "requests")
    answered = ask(refusal, Decision("c", NOW, refusal, windows=(window,)))
    assert answered.status in {400, 401, 402, 403, 409, 413, 422, 429, 503}
    assert answered.retry_after_s is None or answered.retry_after_s >= 1
    for name, value in answered.headers:
        assert name == name.lower()
        assert all(0x20 <= byte < 0x7F for byte in value)
    (state,) = parse_list(header(answered, b"ratelimit") or b"")
    if refusal.reason is Reason.RATE_LIMIT and answered.retry_after_s is not None:
        assert answered.retry_after_s >= state.parameters.get("t", 0)


KINDS = st.sampled_from([WindowKind.FIXED, WindowKind.SLIDING])


@given(
    st.lists(
        st.tuples(
            KINDS, st.integers(1, 20), st.sampled_from([1.0, 60.0, 3600.0]), st.integers(0, 25), st.integers(0, 25)
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(min_value=0.0, max_value=10_000.0),
    st.integers(1, 20),
)
def test_wait_until_the_rule_would_admit(
    limits: list[tuple[WindowKind, int, float, int, int]], offset: float, cost: int
) -> None:
    """What the rules refuse by rate passes after Retry-After, which is not before the t of the limit that refused."""
    now = NOW + offset
    state = State()
    asks = []
    for number, (kind, limit, window_s, used, previous) in enumerate(limits):
        key = f"limit-{number}"
        asks.append(LimitAsk(key, key, kind, limit, window_s, cost))
        start = now // window_s * window_s if kind is WindowKind.SLIDING else now - window_s / 3
        state.counters[key] = Counter(key, start, start + window_s, used, previous)
    request = Admit("call-1", "payer", "credits", 0, 0, limits=tuple(asks))
    decision, _ = admit(state, request, now)
    if decision.refusal is None or decision.refusal.reason is not Reason.RATE_LIMIT:
        return
    answered = ask(decision.refusal, decision)
    assert answered.retry_after_s is not None
    fields = {item.value: item.parameters for item in parse_list(header(answered, b"ratelimit") or b"")}
    assert answered.retry_after_s >= fields[decision.refusal.name]["t"]
    again, _ = admit(state, request, now + answered.retry_after_s + 1e-6)
    assert again.admitted


def build_full_pool() -> tuple[State, Admit]:
    """A caller with both slots taken."""
    state = State()
    state.leases["pool"] = {name: Lease("pool", name, NOW + 60) for name in ("a", "b")}
    return state, Admit("call-1", "payer", "credits", 0, 0, leases=(LeaseAsk("chat", "pool", 2),))


def build_dry_wallet() -> tuple[State, Admit]:
    """A payer whom nobody ever granted anything."""
    return State(), Admit("call-1", "payer", "credits", 2_500_000, 2_500_000, (WalletSource(),))


def build_spent_allowance() -> tuple[State, Admit]:
    """A payer whose ten credits of the day are spent."""
    state = State()
    state.allowances["payer", "credits", "daily", NOW] = AllowanceWindow(
        "payer", "credits", "daily", NOW, TOMORROW, settled=10_000_000
    )
    edges = (NOW - 86_400.0, NOW, TOMORROW, TOMORROW + 86_400.0)
    source = AllowanceSource("daily", 10_000_000, edges)
    return state, Admit("call-1", "payer", "credits", 1_000_000, 1_000_000, (source,))


@pytest.mark.parametrize(
    ("build", "status", "wait_s", "detail"),
    [
        (build_full_pool, 429, 1, "2 calls are running; 2 may run at once."),
        (build_dry_wallet, 402, None, "This call needs 2.5 credits; 0 available."),
        (build_spent_allowance, 429, 86_390, "This call needs 1 credits; 0 left of the allowance 'daily' of 10."),
    ],
)
def test_answer_what_the_rules_really_refuse(
    build: Callable[[], tuple[State, Admit]], status: int, wait_s: int | None, detail: str
) -> None:
    """Refusals as admission makes them, an unknown account's zeros among them, are answered in the table's way."""
    state, request = build()
    decision, changes = admit(state, request, NOW + 10)
    assert changes == []
    assert decision.refusal is not None
    answered = ask(decision.refusal, decision)
    assert (answered.status, answered.retry_after_s, answered.detail) == (status, wait_s, detail)
