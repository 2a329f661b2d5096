"""Who is counted together: keys, hierarchies, shared buckets, plans and exemptions, as requests meet them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from asgi_metering import Metering, billable, metered_app, rate_limited
from asgi_metering.asking import counted_as, network_of
from asgi_metering.errors import ConfigurationError
from asgi_metering.policies import EndpointPolicy, RatePolicy
from asgi_metering.rates import parse_limit
from tests.counting import Hall, answer, caller_of, names_of, problem_of
from tests.harness.drive import drive, headers, http_scope, lifespan, status

ANN, BOB, CEM = ({"key": key} for key in ("ann", "bob", "cem"))


def endpoint(*policies: Any) -> Any:
    """A fresh endpoint under *policies*, outermost first."""

    async def plain(request: Request) -> JSONResponse:
        return await answer(request)

    found: Any = plain
    for policy in reversed(policies):
        found = policy(found)
    return found


def play(scene: Callable[[Hall], Awaitable[None]], *policies: Any, **hall: Any) -> Hall:
    """Play *scene* in a hall with one endpoint, or with the routes that it is given."""

    async def run() -> Hall:
        made = Hall(**({"routes": {"/": endpoint(*policies)}} | hall))
        async with made.metering:
            await scene(made)
        return made

    return asyncio.run(run())


def answers(expected: list[int], *who: Mapping[str, Any]) -> Callable[[Hall], Awaitable[None]]:
    """A scene of requests, one after the other, and what each is answered."""

    async def scene(hall: Hall) -> None:
        assert await hall.each(*who) == expected

    return scene


# -- keys --------------------------------------------------------------------------------------------------

V6, NEIGHBOUR, OTHER = "2001:db8:1:2::5", "2001:db8:1:2:ffff::9", "2001:db8:1:3::5"

COUNTED: dict[str, tuple[Any, list[Mapping[str, Any]], list[int]]] = {
    "caller": ("caller", [ANN, BOB, ANN], [200, 200, 429]),
    "caller-unknown": ("caller", [{"client": "192.0.2.1"}, {"client": "192.0.2.2"}, {}], [200, 200, 429]),
    "payer": ("payer", [{"key": "ann", "payer": "o"}, {"key": "bob", "payer": "o"}, CEM], [200, 429, 200]),
    "address": ("address", [ANN, BOB, {"key": "ann", "client": "192.0.2.7"}], [200, 429, 200]),
    "address-network": ("address", [{"client": V6}, {"client": NEIGHBOUR}, {"client": OTHER}], [200, 429, 200]),
    "route": ("route", [ANN, BOB], [200, 429]),
    "global": ("global", [ANN, {"key": "bob", "payer": "o"}], [200, 429]),
    "attribute": (
        "attribute:team",
        [{"key": "ann", "team": "red"}, {"key": "bob", "team": "red"}, {"key": "bob", "team": "blue"}],
        [200, 429, 200],
    ),
    "attribute-of-payers": (
        "attribute:team",
        [{"key": "ann", "payer": "o", "team": "red"}, {"key": "bob", "payer": "p", "team": "red"}],
        [200, 429],
    ),
    "attribute-absent": ("attribute:team", [ANN, BOB, ANN], [200, 200, 429]),
    "function": (
        lambda request: request.headers["x-team"],
        [{"team": "a"}, {"team": "b"}, {"team": "a"}],
        [200, 200, 429],
    ),
    "function-of-call": (lambda call: call.caller.id, [ANN, BOB, ANN], [200, 200, 429]),
}


@pytest.mark.parametrize("case", COUNTED)
def test_count_together_what_the_key_says(case: str) -> None:
    """DESIGN 2: a limit counts by caller, payer, address, attribute, function, or everybody, and by nothing else."""
    key, who, expected = COUNTED[case]
    play(answers(expected, *who), rate_limited("1/minute", key=key))


def test_count_by_an_async_function() -> None:
    """DESIGN 2: every policy argument may be an async callable."""

    async def team(request: Request) -> str:
        await asyncio.sleep(0)
        return request.headers["x-team"]

    play(answers([200, 429, 200], {"team": "a"}, {"team": "a"}, {"team": "b"}), rate_limited("1/minute", key=team))


@pytest.mark.parametrize("key", ["address", "caller"])
def test_believe_no_forwarded_address(key: Any) -> None:
    """DESIGN 10: what a client says of its own address changes no key, however often it changes it."""
    fields = ({"forwarded_for": f"198.51.100.{at}", "real_ip": f"198.51.100.{at}"} for at in range(3))
    play(answers([200, 429, 429], *fields), rate_limited("1/minute", key=key))


def test_believe_a_declared_proxy() -> None:
    """DESIGN 10: the server that trusts its proxy says whose address counts, and that of others is what it sees."""

    async def scene(hall: Hall) -> None:
        async def ask(peer: str, said: str) -> int:
            scope = http_scope("/", headers=[("x-forwarded-for", said)], client=(peer, 1))
            return status((await drive(served, scope)).log)

        served: Any = ProxyHeadersMiddleware(hall.app, trusted_hosts="10.0.0.1")
        assert [await ask("10.0.0.1", said) for said in ("192.0.2.1", "192.0.2.2", "192.0.2.1")] == [200, 200, 429]
        assert [await ask("10.0.0.2", said) for said in ("192.0.2.8", "192.0.2.9")] == [200, 429]
        # What the client wrote itself stands before what its proxy added.
        assert [await ask("10.0.0.1", f"192.0.2.{at}, 192.0.2.50") for at in (3, 4)] == [200, 429]

    play(scene, rate_limited("1/minute", key="address"))


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("192.0.2.1:4711", "192.0.2.1"),
        ("192.0.2.1:_obscure", "192.0.2.1"),
        ("[2001:db8::1]", "2001:db8::/64"),
        ("[2001:db8::1]:4711", "2001:db8::/64"),
        ('"[2001:db8::1]:4711"', "2001:db8::/64"),
        ('"[2001:db8::1]"', "2001:db8::/64"),
        ("[::ffff:192.0.2.1]:4711", "192.0.2.1"),
        ("[unknown", "[unknown"),
        ("unix:socket", "unix:socket"),
    ],
)
def test_count_a_network_as_one_address(address: str, counted: str) -> None:
    """
    RFC 6177: a client has all addresses of its /64 to choose from; IPv4 is itself on either kind of socket.

    RFC 7239: some proxies tell its port as well, and some servers hand that on; a new connection is no new client.
    """
    assert network_of(address) == counted


def test_answer_nobody_elses_address() -> None:
    """DESIGN 10: who may choose what a function answers does not spend the limit of an address, or of a team."""
    for other, victim in (
        (rate_limited("1/minute", key="address"), {"client": "192.0.2.9"}),
        (rate_limited("1/minute", key="attribute:team"), {"key": "ann", "team": "red"}),
    ):
        said = "192.0.2.9" if "client" in victim else "attribute:team:red"
        chosen = rate_limited("1/minute", key=lambda request: request.headers.get("x-session", "none"))
        attacks = {"client": "192.0.2.1", "key": "eve", "team": "blue", "session": said}
        play(answers([200, 200], attacks, victim), other, chosen)


# -- keys by name ------------------------------------------------------------------------------------------


def test_replace_a_key_while_it_runs() -> None:
    """S2.32: the key function can be replaced after routes are declared, and counts from the next call on."""

    async def scene(hall: Hall) -> None:
        assert await hall.each({"team": "a"}, {"team": "b"}) == [200, 429]
        hall.metering.keys["tenant"] = lambda request: request.headers["x-team"]
        assert await hall.each({"team": "a"}, {"team": "b"}, {"team": "b"}) == [200, 200, 429]

    play(scene, rate_limited("1/minute", key="named:tenant"), metering={"keys": {"tenant": lambda: "everybody"}})


def test_count_a_named_key_apart_from_others() -> None:
    """S2.32: what two named keys answer alike, an organisation's number and a user's, is counted apart."""
    keys = {"org": lambda: 7, "user": lambda call: call.caller.id}
    limits = rate_limited(levels={"named:org": "3/minute", "named:user": "1/minute"}, scope="s")
    play(answers([200, 200, 429], ANN, {"key": "7"}, {"key": "7"}), limits, metering={"keys": keys})


@pytest.mark.parametrize("text", ["9/minute", "9/minute burst 9"])
@pytest.mark.parametrize("strategy", ["fixed", "calendar", "sliding"])
def test_refuse_a_cost_that_nothing_counts(text: str, strategy: Any) -> None:
    """DESIGN 4, 10: a cost of any number of digits is above every limit; a client's numbers let nobody in uncounted."""

    async def scene(hall: Hall) -> None:
        for digits in (17, 400, 5_000):
            driven = await hall.ask(team=str(digits))
            assert (status(driven.log), problem_of(driven)["code"]) == (429, "exceeds_limit")
        assert await hall.each({"team": "0"}, {"team": "0"}) == [200, 200]

    def cost(request: Request) -> int:
        return 10 ** int(request.headers["x-team"])  # type: ignore[no-any-return]

    play(scene, rate_limited(text, key="global", strategy=strategy, cost=cost))


def test_refuse_a_call_whose_named_key_answers_nothing() -> None:
    """DESIGN 2: an empty key would put everybody together, so the endpoint does not run and nothing is counted."""

    async def scene(hall: Hall) -> None:
        assert (await hall.ask()).outcome == "raised"
        hall.metering.keys["tenant"] = lambda: "a"
        assert await hall.each(ANN) == [200]

    play(scene, rate_limited("1/minute", key="named:tenant"), metering={"keys": {"tenant": lambda: ""}})


# -- hierarchies -------------------------------------------------------------------------------------------

LEVELS = {"payer": "5/minute", "attribute:team": ["3/minute", "100/day"], "caller": "2/minute"}


def who(key: str, team: str = "red", payer: str = "org") -> dict[str, str]:
    """A request of one key in a team of an organisation."""
    return {"key": key, "team": team, "payer": payer}


def test_decide_all_levels_at_once() -> None:
    """S0.42: a request that one level refuses is counted by none of them, and the refusal names the level."""

    async def scene(hall: Hall) -> None:
        assert await hall.each(who("a"), who("a"), who("a"), who("b")) == [200, 200, 429, 200]
        refused = await hall.ask(**who("c"))
        assert (status(refused.log), problem_of(refused)["level"]) == (429, "team")
        assert problem_of(refused)["violated-policies"] == ["team-3-per-minute"]
        # Three were counted by the organisation, and not the two that were refused.
        assert await hall.each(who("d", "blue"), who("e", "blue"), who("f", "blue")) == [200, 200, 429]
        assert problem_of(await hall.ask(**who("f", "blue")))["level"] == "payer"
        assert await hall.each(who("a", payer="other")) == [429]

    play(scene, rate_limited(levels=LEVELS))


def test_tell_every_window_of_a_hierarchy() -> None:
    """S0.42, S2.33: one set of fields tells all levels, each under its own name."""

    async def scene(hall: Hall) -> None:
        names = names_of(await hall.ask(**who("a")))
        assert names == ["payer-5-per-minute", "team-3-per-minute", "team-100-per-day", "caller-2-per-minute"]

    play(scene, rate_limited(levels=LEVELS))


def test_wait_for_the_last_of_the_failing_levels() -> None:
    """DESIGN 4: Retry-After is exact, the latest of the failing windows, whatever its level."""

    async def scene(hall: Hall) -> None:
        assert await hall.each(ANN) == [200]
        hall.clock.advance(10)
        refused = await hall.ask(**ANN)
        assert dict(headers(refused.log))["retry-after"] == str(3_590)
        assert problem_of(refused)["level"] == "payer"

    play(scene, rate_limited(levels={"caller": "1/minute", "payer": "1/hour", "address": "1/minute"}))


def test_ask_the_store_once_for_all_levels() -> None:
    """DESIGN 5: a hierarchy by what identify answers is one operation, worked out once for a caller."""

    async def scene(hall: Hall) -> None:
        asked: list[Any] = []
        run_now = hall.metering.store.run_now
        hall.metering.store.run_now = lambda ask: asked.append(ask) or run_now(ask)  # type: ignore[method-assign,func-returns-value]
        assert await hall.each(who("a"), who("a")) == [200, 200]
        assert [len(ask.limits) for ask in asked] == [4, 4]
        assert asked[0].limits is asked[1].limits
        changed = asked[0].limits
        await hall.ask(**who("a", "blue"))
        assert asked[2].limits[0] == changed[0]
        assert asked[2].limits[1].key != changed[1].key

    play(scene, rate_limited(levels=LEVELS))


def test_stack_decorators_of_several_keys() -> None:
    """S0.42: several rate_limited() with names for their keys are one hierarchy, as levels= is."""

    async def scene(hall: Hall) -> None:
        assert await hall.each({"key": "a", "team": "x"}, {"key": "b", "team": "x"}) == [200, 429]
        assert problem_of(await hall.ask(key="b", team="x"))["level"] == "team"

    team = rate_limited("1/minute", key=lambda request: request.headers["x-team"], level="team")
    play(scene, team, rate_limited("1/minute", key=lambda call: call.caller.id, level="user"))


def test_tell_two_functions_apart_by_their_levels() -> None:
    """S0.42: a team and a user of one number are two, where their limits are the same."""
    team = rate_limited("3/minute", key=lambda: 7, level="team", scope="s")
    user = rate_limited("1/minute", key=lambda call: call.caller.id, level="user", scope="s")
    play(answers([200, 200, 429], ANN, {"key": "7"}, {"key": "7"}), team, user)


def test_limit_calls_at_once_by_several_keys() -> None:
    """S0.42: concurrency per key and at several levels; the refusal names the full one, and says when to come back."""
    gate, entered = asyncio.Event(), []

    async def slow(request: Request) -> JSONResponse:
        entered.append(request.headers["x-key"])
        await gate.wait()
        return await answer(request)

    async def scene(hall: Hall) -> None:
        first = [asyncio.create_task(hall.ask(**who(key))) for key in "ab"]
        while len(entered) < 2:
            await asyncio.sleep(0)
        for key, payer, level in (("c", "org", "payer"), ("a", "other", "caller")):
            refused = await hall.ask(**who(key, payer=payer))
            told = problem_of(refused)
            assert (status(refused.log), told["code"], told["level"]) == (429, "concurrency", level)
            assert 1 <= int(dict(headers(refused.log))["retry-after"]) <= 5
        gate.set()
        assert [status((await task).log) for task in first] == [200, 200]

    limited = rate_limited(concurrency={"payer": 2, "attribute:team": 9, "caller": 1})(slow)
    # The same key for another payer is another caller's; the store keeps callers beside their payers.
    play(
        scene,
        routes={"/": rate_limited(concurrency=1, key=lambda call: call.caller.id, scope="k", level="caller")(limited)},
    )


# -- shared buckets ----------------------------------------------------------------------------------------


def test_share_one_count_between_two_routes() -> None:
    """S4.11: two routes share one counter, each up to its own limit; others are untouched."""

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/small", "/small", "/large", "/large", "/small", "/large", key="a") == [
            *(200, 200, 200, 200),
            *(429, 429),
        ]
        assert await hall.statuses("/other", key="a") == [200]
        assert await hall.statuses("/small", "/small", "/small", key="b") == [200, 200, 429]

    play(
        scene,
        routes={
            "/small": endpoint(rate_limited("2/minute", scope="llm")),
            "/large": endpoint(rate_limited("4/minute", scope="llm")),
            "/other": endpoint(rate_limited("1/minute")),
        },
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            rate_limited("2/day", strategy="calendar", zone="UTC", scope="llm"),
            rate_limited("2/day", strategy="calendar", zone="Asia/Kolkata", scope="llm"),
        ),
        (rate_limited("2 per 1000001 seconds", scope="llm"), rate_limited("9 per 1000002 seconds", scope="llm")),
    ],
    ids=["zone", "length"],
)
def test_share_no_count_between_windows_that_differ(one: Any, other: Any) -> None:
    """S4.11: windows of another zone or length are other counts, so that none begins at nothing by the other's."""

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/one", "/other", "/one", "/other", "/one", key="a") == [200, 200, 200, 200, 429]

    play(scene, routes={"/one": endpoint(one), "/other": endpoint(other)})


def test_count_apart_what_moves_otherwise() -> None:
    """
    S4.11: own limits of one name are other counts once strategy or zone change, as in a deploy beside old processes.

    The keys of fixed windows and buckets are what they always were.
    """
    policy = RatePolicy((), "s")
    limits = [
        parse_limit("2/day"),
        parse_limit("2/day", "sliding"),
        parse_limit("2/day", "moving"),
        parse_limit("2/day", "calendar"),
        parse_limit("2/day", "calendar", "Asia/Kolkata"),
        parse_limit("2/day burst 3", "sliding"),
    ]
    assert [counted_as(policy, limit) for limit in limits] == [
        "2-per-day",
        "sliding:2-per-day",
        "moving:2-per-day",
        "calendar:2-per-day:UTC",
        "calendar:2-per-day:Asia/Kolkata",
        "2-per-day-burst-3",
    ]


def test_count_shared_windows_by_all_of_their_length() -> None:
    """S4.11: what six digits do not tell of a window's length is told all the same, and nothing else is longer."""
    policy = RatePolicy((), "s", shares=True)
    told = [counted_as(policy, parse_limit(f"2 per {length} seconds")) for length in (60, 1000001, 1000002, 3000000)]
    assert told == [f"fixed:requests/{length}" for length in ("60", "1000001.0", "1000002.0", "3e+06")]


def test_share_a_route_key_by_route() -> None:
    """S4.11: key='route' tells the routes of one scope apart, and key='global' puts them together."""

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/a", "/b", "/a", key="x") == [200, 200, 429]
        assert await hall.statuses("/c", "/d", key="x") == [200, 429]

    routes = {path: endpoint(rate_limited("1/minute", key="route", scope="r")) for path in ("/a", "/b")}
    routes |= {path: endpoint(rate_limited("1/minute", key="global", scope="g")) for path in ("/c", "/d")}
    play(scene, routes=routes)


# -- plans -------------------------------------------------------------------------------------------------

PLANS = {"pro": "3/minute", "free": "1/minute"}


def test_limit_by_plan() -> None:
    """S4.17: the plan of the caller chooses the limit at each call; an unknown plan, or none, gets the smallest."""

    async def scene(hall: Hall) -> None:
        assert await hall.each(*[{"key": "a", "plan": "pro"}] * 4) == [200, 200, 200, 429]
        for said in ({"plan": "free"}, {"plan": "gold"}, {}):
            assert await hall.each(*[{"key": f"b{said}", **said}] * 2) == [200, 429]

    play(scene, rate_limited(PLANS))


def test_count_on_when_the_plan_changes() -> None:
    """S4.17: another plan is another limit of one count, so that changing to and fro gains nothing."""
    plans = [{"key": "a", "plan": plan} for plan in ("pro", "pro", "free", "pro", "pro")]
    play(answers([200, 200, 429, 200, 429], *plans), rate_limited(PLANS))


def test_change_the_limits_of_plans_while_it_runs() -> None:
    """S4.17: resolved at each decision: whoever declared the mapping may change it."""
    plans = dict(PLANS)

    async def scene(hall: Hall) -> None:
        assert await hall.each(ANN, ANN) == [200, 429]
        plans["free"] = "2/minute"
        assert await hall.each(ANN, ANN) == [200, 429]

    play(scene, rate_limited(plans))


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [("9/minute", "5/minute of tokens", "tokens"), ("90000/minute of tokens", "1/minute", "requests")],
    ids=["to tokens", "to requests"],
)
def test_fail_one_plan_whose_limit_has_come_to_count_another(before: str, after: str, counts: str) -> None:
    """S4.17: a plan whose limit counts another thing than it did fails loudly, alone, and is not the smallest."""
    plans = {"free": before, "pro": before}

    async def scene(hall: Hall) -> None:
        pro, other = {"key": "a", "plan": "pro"}, {"key": "b", "plan": "other"}
        assert await hall.each(pro) == [200]
        plans["pro"] = after
        driven = await hall.ask(**pro)
        assert isinstance(driven.exception, ConfigurationError)
        assert f"which counts {counts}, where they counted" in str(driven.exception)
        assert await hall.each(other, other) == [200, 200]
        plans["pro"] = before
        assert await hall.each(pro) == [200]

    play(scene, rate_limited(plans))


def test_change_configured_plans_as_a_whole() -> None:
    """S2.30: what is configured cannot be changed inside, where nobody would look at it."""
    metering = Metering(limits={"search": ["9/minute", {"free": "5/minute"}]}, sinks=())
    plans: Any = metering.limits["search"][1]
    with pytest.raises(TypeError):
        plans["free"] = "5/minute of tokens"
    metering.limits["search"] = [{**plans, "pro": "6/minute"}]
    assert metering.limits["search"] == ({"free": "5/minute", "pro": "6/minute"},)


@pytest.mark.parametrize("wrong", ["nonsense", "", ["9/minute"], None])
def test_fail_one_plan_whose_limit_is_none(wrong: Any) -> None:
    """S4.17: what was changed into no limit fails the calls of its own plan, and of nobody else."""
    plans: dict[str, Any] = {"pro": "3/minute", "team": "2/minute", "free": "1/minute"}

    async def scene(hall: Hall) -> None:
        assert await hall.each(ANN) == [200]
        plans["free"] = wrong
        assert isinstance((await hall.ask(key="a", plan="free")).exception, ConfigurationError)
        assert await hall.each({"key": "b", "plan": "pro"}, *[{"key": "c", "plan": "new"}] * 3) == [200, 200, 200, 429]
        plans.clear()
        driven = await hall.ask(key="c", plan="new")
        assert isinstance(driven.exception, ConfigurationError)
        assert "The limits by plan {} have no limit left. Write" in str(driven.exception)

    play(scene, rate_limited(plans))


@pytest.mark.parametrize("answered", ["2/minute", ["5/minute", "2/hour"]], ids=["one", "several"])
def test_limit_by_a_function(answered: Any) -> None:
    """S4.17: a limit may be a callable of the endpoint's arguments and the call, sync or async, with one or several."""

    async def limit(call: Any) -> Any:
        return answered if call.caller.id == "ann" else "1/minute"

    play(answers([200, 200, 429, 200, 429], ANN, ANN, ANN, BOB, BOB), rate_limited(limit))


@pytest.mark.parametrize("key", ["caller", "address"])
def test_count_once_what_two_limits_count_alike(key: Any) -> None:
    """S4.17: where the limit of a plan is that of the window beside it, a call is counted once, by the smaller one."""

    async def scene(hall: Hall) -> None:
        store, asked = hall.metering.store, []
        run_now = store.run_now
        store.run_now = lambda ask: asked.append(ask) or run_now(ask)  # type: ignore[method-assign]
        assert await hall.each(ANN, ANN, ANN) == [200, 200, 429]
        assert [len(ask.limits) for ask in asked] == [1] * 3

    limits = rate_limited("9/minute", configured="c", key=key, scope="s")
    play(scene, limits, metering={"limits": {"c": "2/minute"}})


@pytest.mark.parametrize("answered", [None, "", 60, [], ["1/minute", None], "5/minute of tokens", "a/minute"])
def test_refuse_a_function_that_answers_no_limit(answered: Any) -> None:
    """DESIGN 2: no limit at all must be said by exempt_when; what is forgotten lets nobody in."""
    ran = []

    async def watched(request: Request) -> JSONResponse:
        ran.append(request)
        return await answer(request)

    async def scene(hall: Hall) -> None:
        driven = await hall.ask(**ANN)
        assert isinstance(driven.exception, ConfigurationError)
        assert ran == []

    play(scene, routes={"/": rate_limited(lambda: answered)(watched)})


def test_change_configured_limits_while_it_runs() -> None:
    """S2.30: limits that are configured by name are looked up for each call, with what was counted before."""

    async def scene(hall: Hall) -> None:
        assert await hall.each(ANN, ANN) == [200, 429]
        hall.metering.limits["search"] = [{"free": "2/minute", "pro": "9/minute"}, "100/day"]
        assert await hall.each(ANN, ANN) == [200, 429]
        assert names_of(await hall.ask(key="b", plan="pro")) == ["9-per-minute", "100-per-day"]

    play(scene, rate_limited(configured="search"), metering={"limits": {"search": "1/minute"}})


@pytest.mark.parametrize("audited", [True, False])
@pytest.mark.parametrize(
    ("strategy", "wrong", "told"),
    [("moving", "6000/minute", "is above 5000"), ("calendar", {"free": "5/second"}, "cannot follow the calendar")],
)
def test_refuse_a_change_that_an_endpoint_cannot_count(strategy: Any, wrong: Any, told: str, audited: bool) -> None:
    """S2.30: whoever changes limits hears that an endpoint cannot count them, and its calls go on as before."""

    async def scene(hall: Hall) -> None:
        if audited:
            async with lifespan(hall.app):
                pass
        else:
            assert await hall.each(BOB) == [200]
        with pytest.raises(ConfigurationError, match=told):
            hall.metering.limits["search"] = ["9/hour", wrong]
        assert hall.metering.limits["search"] == ("1/minute",)
        hall.metering.limits["search"] = "2/minute"
        assert await hall.each(ANN, ANN, ANN) == [200, 200, 429]

    limited = rate_limited(configured="search", strategy=strategy)
    play(scene, limited, metering={"limits": {"search": "1/minute"}})


def test_measure_by_a_plan_what_calls_use() -> None:
    """S4.17: a limit by plan may count tokens, and is known to weigh before anybody calls."""
    limit = rate_limited({"free": "10/minute of tokens", "pro": "20/minute of tokens"})
    guarded = limit(endpoint())
    policy = guarded.__asgi_metering__.policy
    assert isinstance(policy, EndpointPolicy)
    assert policy.weighs


# -- exemptions and methods --------------------------------------------------------------------------------


def test_exempt_what_the_application_says() -> None:
    """S0.18: a call that exempt_when tells is not counted, and takes no slot; others are."""

    async def is_probe(request: Request) -> bool:
        return "x-probe" in request.headers

    who_asks = [ANN, {"key": "ann", "probe": "1"}, ANN, {"key": "ann", "probe": "1"}]
    play(answers([200, 200, 429, 200], *who_asks), rate_limited("1/minute", concurrency=1, exempt_when=is_probe))


def test_exempt_by_nothing_but_true() -> None:
    """S0.18: what is merely true, the text 'false' for one, exempts nobody."""

    async def scene(hall: Hall) -> None:
        assert isinstance((await hall.ask(**ANN)).exception, ConfigurationError)

    play(scene, rate_limited("1/minute", exempt_when=lambda: "false"))


def test_exempt_a_caller_of_levels() -> None:
    """S0.18: an exempt caller is not counted by who it is, and is by its address and with everybody."""
    dev = {"key": "dev", "exempt": "1", "team": "red"}
    play(
        answers([200, 200, 200], dev, dev, dev),
        rate_limited(levels=dict.fromkeys(("caller", "payer", "attribute:team"), "1/minute")),
    )
    for key in ("address", "route", "global", "named:x"):
        play(answers([200, 429], dev, dev), rate_limited("1/minute", key=key), metering={"keys": {"x": lambda: 1}})


async def ask_methods(hall: Hall, *methods: str) -> list[int]:
    """What requests by *methods* are answered, one after the other."""
    return [status((await hall.ask(method=method, key="a")).log) for method in methods]


def test_count_some_methods_alone() -> None:
    """S2.29: reads and writes are limited apart: methods= counts these, and leaves the others to other limits."""

    async def scene(hall: Hall) -> None:
        assert await ask_methods(hall, "POST", "GET", "POST", "PUT", "GET", "GET") == [200, 200, 429, 429, 200, 429]

    play(scene, rate_limited("1/minute", methods=["post", "PUT"]), rate_limited("2/minute", methods=("GET",)))


@pytest.mark.parametrize("said", [{"methods": ["POST"]}, {"per_method": True}], ids=["named", "apart"])
def test_count_a_method_however_it_is_written(said: Any) -> None:
    """S2.29: frameworks that take ``post`` for POST, as Django and Quart do, do not take it past a limit of POST."""

    async def scene(hall: Hall) -> None:
        assert await ask_methods(hall, "POST", "post", "pOsT", "GET") == [200, 429, 429, 200]

    play(scene, app=metered_app(PlainTextResponse("ok"), rate_limited("1/minute", **said)))


@pytest.mark.parametrize(("apart", "expected"), [(False, 429), (True, 200)], ids=["together", "apart"])
def test_count_a_method_of_ones_own(apart: bool, expected: int) -> None:
    """S2.29: what methods= names is counted, also where HTTP itself does not know it, and each apart if so asked."""

    async def scene(hall: Hall) -> None:
        answered = await ask_methods(hall, "LOCK", "LOCK", "PURGE", "PURGE", "MOVE", "MOVE")
        assert answered == [200, 429, expected, 429, 200, 200]

    limits = rate_limited("1/minute", methods=["LOCK", "PURGE"], per_method=apart)
    play(scene, app=metered_app(PlainTextResponse("ok"), limits))


def test_count_each_method_apart() -> None:
    """S2.29: per_method= gives each HTTP method counts of its own."""

    async def scene(hall: Hall) -> None:
        assert await ask_methods(hall, "POST", "GET", "POST", "PUT", "GET") == [200, 200, 429, 200, 429]

    play(scene, rate_limited("1/minute", per_method=True))


def test_count_charges_and_selective_limits_together() -> None:
    """DESIGN 4: who cannot pay is refused with 402, and nothing is counted by the limits beside the price."""

    async def scene(hall: Hall) -> None:
        assert await ask_methods(hall, "POST") == [402]
        await hall.metering.grant("a", 5, id="g")
        assert await ask_methods(hall, "POST", "POST", "GET") == [200, 429, 200]

    play(scene, billable(1), rate_limited("1/minute", methods=["POST"]))


def test_identify_once_for_all_keys() -> None:
    """DESIGN 2: identify runs once per call, however many levels ask who it is."""
    hall = play(answers([200], who("a")), rate_limited(levels=LEVELS))
    assert hall.asked == 1


def test_keep_named_things() -> None:
    """S2.32: names can be looked at and replaced, and not taken away from the limits that are counted by them."""
    metering = Metering(sinks=(), keys={"a": caller_of}, limits={"b": "1/minute"})
    assert (list(metering.keys), list(metering.limits), len(metering.keys), len(metering.limits)) == (
        ["a"],
        ["b"],
        1,
        1,
    )
    assert (metering.keys["a"], metering.limits["b"]) == (caller_of, ("1/minute",))
    for named, name in ((metering.keys, "a"), (metering.limits, "b")):
        with pytest.raises(ConfigurationError, match="cannot be taken away"):
            del named[name]  # type: ignore[attr-defined]
