"""The decorators: one policy and one wrapper per endpoint, in any order, and sentences for every misuse."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import weakref
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from limits import RateLimitItemPerDay
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_metering import Allowance, MeteringMiddleware, Unit, Wallet, billable, metered_app, rate_limited, up_to
from asgi_metering.decorators import gather
from asgi_metering.errors import AmountError, ConfigurationError, MeteringError
from asgi_metering.guards import decorated, guard_of
from asgi_metering.policies import EndpointPolicy
from asgi_metering.prices import FixedPrice, per_token
from asgi_metering.receipts import Basis
from asgi_metering.rules.ending import Situation
from asgi_metering.testing import unmetered
from asgi_metering.usage import TokenUsage
from tests.harness.drive import status
from tests.pitfalls.scene import Scene, Visit, visit

pytestmark = pytest.mark.uncounted

Decorator = Callable[[Any], Any]


async def endpoint(n: int = 1, *, name: str = "x") -> int:
    """An endpoint with two arguments."""
    return n


def policy_of(function: Any) -> EndpointPolicy:
    """What the decorators wrote down."""
    guard = guard_of(function)
    assert guard is not None
    return guard.policy


def wraps(function: Any) -> Any:
    """A decorator as most are: it keeps what `functools.wraps` keeps."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


# -- any order ---------------------------------------------------------------------------------------------

BILL = billable(2, line="l", errors="openai")
RATE = rate_limited("60/minute", "5000/day", scope="s")
POOL = rate_limited(concurrency=4, scope="pool")

ORDERS: dict[str, list[Decorator]] = {
    "bill-rate": [BILL, RATE],
    "rate-bill": [RATE, BILL],
    "bill-other-rate": [BILL, wraps, RATE],
    "rate-other-bill": [RATE, wraps, BILL],
    "other-bill-other-rate-other": [wraps, BILL, wraps, RATE, wraps],
}


def decorated_by(decorators: list[Decorator], function: Any = endpoint) -> Any:
    """Apply *decorators* as they would be written, the first one on top."""
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


@pytest.mark.parametrize("order", ORDERS)
def test_write_one_policy_in_any_order(order: str) -> None:
    """DESIGN 2: both decorators in any order, with others between, make one policy on one endpoint."""
    policy = policy_of(decorated_by(ORDERS[order]))
    assert policy.charge is not None
    assert (policy.charge.line, policy.charge.price) == ("l", FixedPrice(Decimal(2)))
    assert [limit.name for rates in policy.rates for limit in rates.limits] == ["60-per-minute", "5000-per-day"]
    assert policy.errors == "openai"


@pytest.mark.parametrize("order", ORDERS)
def test_run_and_charge_once_in_any_order(order: str) -> None:
    """DESIGN 2: whatever the order, the endpoint runs once, is counted once and charged once, then refused."""
    scene, ran = Scene(), []

    async def work(request: Request) -> PlainTextResponse:
        ran.append("work")
        return PlainTextResponse("ok")

    limited = [rate_limited("1/day") if each is RATE else each for each in ORDERS[order]]
    app = Starlette(routes=[Route("/", decorated_by(limited, work))])
    app.add_middleware(MeteringMiddleware, metering=scene.metering)
    ended = visit(app, Visit(), Visit())
    assert [status(each.log) for each in ended] == [200, 429]
    assert ran == ["work"]
    assert scene.settled() == 2
    assert len(scene.books.admissions[0].limits) == 1


def test_keep_limits_in_the_order_of_the_decorators() -> None:
    """DESIGN 2: several rate_limited() add up, the outermost first."""
    policy = policy_of(decorated_by([RATE, POOL, BILL]))
    assert [rates.scope for rates in policy.rates] == ["s", "pool"]
    assert policy.rates[1].concurrency[0].limit == 4


def test_wrap_once_however_many_decorators_there_are() -> None:
    """DESIGN 2: a second decorator writes to the first one's policy and answers the same function."""
    once = BILL(endpoint)
    assert RATE(once) is once
    assert inspect.unwrap(once) is endpoint


def test_keep_what_functools_keeps() -> None:
    """Pitfall 6: name, module, docstring, signature and the way to the original are the endpoint's own."""
    wrapper = BILL(endpoint)
    assert (wrapper.__name__, wrapper.__module__, wrapper.__doc__) == ("endpoint", __name__, endpoint.__doc__)
    assert inspect.iscoroutinefunction(wrapper)
    assert list(inspect.signature(wrapper).parameters) == ["n", "name"]


# -- lines, scopes and names -------------------------------------------------------------------------------


def test_name_line_and_scope_after_the_endpoint() -> None:
    """Pitfall 39: without names of their own the line is the function's name, and the scope its qualified one."""
    policy = policy_of(rate_limited("1/day")(billable(1)(endpoint)))
    assert policy.charge is not None
    assert policy.charge.line == "endpoint"
    assert policy.rates[0].scope == policy.name
    assert policy.name.startswith(f"{__name__}.endpoint")


def test_name_a_lambda_and_a_partial() -> None:
    """Pitfall 39: what has no plain name gets a line that metrics can carry."""
    nameless, partial = billable(1)(lambda: None), billable(1)(functools.partial(endpoint, 3))
    assert (policy_of(nameless).charge.line, policy_of(partial).charge.line) == ("lambda", "endpoint")


def test_gate_a_partial_and_a_bound_method() -> None:
    """Pitfall 5: a partial of an async function and a bound method are endpoints as well."""

    class Service:
        def __init__(self) -> None:
            self.ran = 0

        async def work(self) -> int:
            self.ran += 1
            return self.ran

    service = Service()

    async def story() -> list[int]:
        return [await billable(1)(functools.partial(endpoint, 3))(), await billable(1)(service.work)()]

    with unmetered():
        assert asyncio.run(story()) == [3, 1]


def test_let_go_of_endpoints_that_are_gone() -> None:
    """A decorated function that nobody keeps is collected with its guard, and so is the object of a bound method."""

    class Service:
        async def work(self) -> None: ...

    async def temporary() -> None: ...

    service = Service()
    gone = [weakref.ref(service), weakref.ref(temporary)]
    billable(1)(service.work)
    billable(1)(temporary)
    named = {guard.policy.name for guard in decorated()}
    assert any(name.endswith("test_let_go_of_endpoints_that_are_gone.temporary") for name in named)
    del service, temporary
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert not any("test_let_go_of_endpoints_that_are_gone" in guard.policy.name for guard in decorated())


# -- misuse: the endpoint ----------------------------------------------------------------------------------


class Whole:
    """A class, which is no endpoint."""

    @staticmethod
    def static() -> None: ...

    def __call__(self) -> None: ...


@pytest.mark.parametrize("decorator", [billable(1), rate_limited("1/day")], ids=["billable", "rate_limited"])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (Whole, "is a class. Decorate its methods, or wrap the whole application with metered_app()."),
        (functools.partial(Whole), "is a class."),
        (staticmethod(endpoint), "is no plain function yet. Put the decorator below @staticmethod."),
        (classmethod(lambda cls: None), "is no plain function yet. Put the decorator below @classmethod."),
        (property(lambda self: None), "is no function."),
        (Whole(), "is no function. Decorate a function or method, or wrap an ASGI app with metered_app()."),
        (functools.partial(Whole()), "is no function."),
        ("name", "'name' is no function."),
        (None, "None is no function."),
    ],
    ids=["class", "partial-class", "static", "classmethod", "property", "object", "partial-object", "str", "none"],
)
def test_refuse_what_is_no_function(wrong: Any, sentence: str, decorator: Decorator) -> None:
    """Pitfall 5: classes, static methods and objects are refused at import, with what to decorate instead."""
    with pytest.raises(ConfigurationError) as caught:
        decorator(wrong)
    assert sentence in str(caught.value)


def test_take_a_static_method_from_below() -> None:
    """Pitfall 5: the order that the sentence recommends works."""

    class Service:
        @staticmethod
        @billable(1)
        async def work() -> int:
            return 5

    with unmetered():
        assert asyncio.run(Service.work()) == 5


# -- misuse: two decorators --------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [[], [wraps]], ids=["adjacent", "between"])
def test_refuse_to_charge_twice(between: list[Decorator]) -> None:
    """DESIGN 2, S2.26: two prices on one endpoint are an import error that names both lines."""
    with pytest.raises(ConfigurationError) as caught:
        decorated_by([billable(1, line="one"), *between, billable(2, line="two")])
    assert "is billable twice, as 'one' and as 'two'." in str(caught.value)
    assert "put the price into one billable()" in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (rate_limited("1/day"), rate_limited("1/day")),
        (rate_limited("1/day", key="payer"), rate_limited("1 per day", key="payer")),
        (rate_limited("1/day", scope="s"), rate_limited("2/hour", "1/day", scope="s")),
        (rate_limited("5/day", "5/day"), BILL),
        (rate_limited("1/day"), rate_limited("1/day", strategy="sliding")),
        (rate_limited("1/day", strategy="calendar"), rate_limited("1/day", strategy="calendar", zone="Asia/Kolkata")),
    ],
    ids=["same", "spelled-otherwise", "scope", "one-decorator", "strategy", "zone"],
)
def test_refuse_one_limit_twice(first: Decorator, second: Decorator) -> None:
    """DESIGN 2: the same limit twice is an import error, whichever way it is spelled."""
    with pytest.raises(ConfigurationError, match=r"has the limit '\d-per-day' twice\. Remove one\."):
        decorated_by([first, second])


def test_take_one_limit_for_two_keys() -> None:
    """S0.42: the same number per caller and per address are two limits."""
    policy = policy_of(decorated_by([rate_limited("1/day"), rate_limited("1/day", key="address")]))
    assert [rates.key for rates in policy.rates] == ["caller", "address"]


# -- misuse: prices and holds ------------------------------------------------------------------------------

AMOUNTS: dict[str, tuple[Any, str]] = {
    "float": (0.25, "is a float. Write it as a str or a Decimal"),
    "bool": (True, "is a bool. Use int, Decimal or str."),
    "negative": (-1, "is negative. Amounts start at 0."),
    "nan": (Decimal("NaN"), "is not finite."),
    "nan-text": ("nan", "is not finite."),
    "infinite": ("Infinity", "is not finite."),
    "word": ("two", "is not a number. Write whole units"),
    "large": (10**30, "no unit counts that far."),
    "none": (None, "is a NoneType. Use int, Decimal or str."),
}


@pytest.mark.parametrize("wrong", AMOUNTS)
def test_refuse_prices_that_are_no_amount(wrong: str) -> None:
    """DESIGN "Amounts": a price that is inexact, negative, endless or no number fails where it is written."""
    amount, sentence = AMOUNTS[wrong]
    with pytest.raises(AmountError) as caught:
        billable(amount)
    assert str(caught.value).startswith("The price")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("wrong", [name for name in AMOUNTS if name != "none"])
def test_refuse_holds_that_are_no_amount(wrong: str) -> None:
    """DESIGN "A hold's size": the same of holds, of `at_least`, and of measured prices."""
    amount, sentence = AMOUNTS[wrong]
    for mistake in (
        lambda: billable(per_token(input=1), hold=amount),
        lambda: up_to(at_least=amount),
        lambda: per_token(input=amount),
    ):
        with pytest.raises(AmountError) as caught:
            mistake()
        assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("mistake", "what", "shown"),
    [
        (lambda: up_to(TokenUsage(input=9), at_least=0.01), "least hold", "0.01"),
        (lambda: billable(per_token(input=1), hold=up_to(0.5, at_least="0.01")), "hold estimate", "0.5"),
        (lambda: billable(per_token(input=1), hold=0.2), "hold", "0.2"),
    ],
    ids=["at_least", "estimate", "hold"],
)
def test_tell_how_to_write_a_float(mistake: Callable[[], Any], what: str, shown: str) -> None:
    """DESIGN "Amounts": a float is refused with its value and its mend where it is written, in `up_to` as well."""
    with pytest.raises(AmountError) as caught:
        mistake()
    assert str(caught.value) == (f"The {what} {shown} is a float. Write it as a str or a Decimal, so that it is exact.")
    assert up_to(at_least="0.01").at_least == "0.01"
    assert up_to(at_least=Decimal("0.01")).at_least == Decimal("0.01")


@pytest.mark.parametrize("scale", [0, 2])
def test_refuse_prices_finer_than_their_unit(scale: int) -> None:
    """DESIGN 2: a price that its route's own unit cannot count fails at import, not on the first paying request."""
    with pytest.raises(AmountError, match="finer than unit 'cents' counts"):
        billable("0.001", unit=Unit("cents", scale=scale))


def test_refuse_prices_too_large_for_their_unit() -> None:
    """DESIGN "Amounts": more than 2^53 - 1 smallest parts is refused where it is written, if the unit is known."""
    with pytest.raises(AmountError, match="more than unit 'fine' can count"):
        billable(10_000, unit=Unit("fine", scale=12))


def a_positional(n: int, /) -> int:
    """Takes its argument by position."""
    return n


def all_positional(*values: int) -> int:
    """Takes all of them so."""
    return 0


class NoSignature:
    """A callable that nobody can look into."""

    __signature__ = 7

    def __call__(self) -> int:
        return 1


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "price": lambda function: billable(function),
    "hold estimate": lambda function: billable(per_token(input=1), hold=function),
    "payer": lambda function: billable(1, payer=function),
    "key": lambda function: rate_limited("1/day", key=function),
    "cost": lambda function: rate_limited("1/day", cost=function),
}


@pytest.mark.parametrize("what", COMPUTED)
def test_refuse_callables_that_ask_for_what_is_not_there(what: str) -> None:
    """DESIGN 2: a callable that names an argument which the endpoint lacks fails at import, with what there is."""
    with pytest.raises(ConfigurationError) as caught:
        COMPUTED[what](lambda m: 1)(endpoint)
    assert f"The {what} of {__name__}.endpoint" in str(caught.value)
    assert "asks for 'm', which the endpoint does not have. It can have 'n', 'name', 'call'." in str(caught.value)


@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.parametrize("function", [a_positional, all_positional], ids=["one", "all"])
def test_refuse_callables_that_take_by_position(what: str, function: Any) -> None:
    """DESIGN 2: arguments are matched by name, so a callable that takes them by position is refused at once."""
    with pytest.raises(ConfigurationError, match=f"The {what} .* takes 'n|values' by position"):
        COMPUTED[what](function)


@pytest.mark.parametrize("what", COMPUTED)
def test_refuse_callables_without_a_signature(what: str) -> None:
    """DESIGN 2: a callable that cannot be looked into is refused where it is written, with the way out."""
    with pytest.raises(ConfigurationError, match=r"has no signature to read\. Wrap it in a function"):
        COMPUTED[what](NoSignature())


@pytest.mark.parametrize("function", [lambda: 1, lambda n: 1, lambda call, name: 1, lambda m=3: 1, lambda **all: 1])
@pytest.mark.parametrize("what", COMPUTED)
def test_take_callables_that_ask_for_what_is_there(what: str, function: Any) -> None:
    """DESIGN 2: arguments of the endpoint, the call, a default, and everything can be asked for."""
    assert len(policy_of(COMPUTED[what](function)(endpoint)).callables()) == 1


def a_generator() -> Any:
    """Answers nothing but a generator."""
    yield 1


async def an_async_generator() -> Any:
    """The same, async."""
    yield 1


@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.parametrize("function", [a_generator, an_async_generator, functools.partial(a_generator)])
def test_refuse_callables_that_answer_nothing(what: str, function: Any) -> None:
    """DESIGN 2: a generator is never iterated for a value, so it fails at import."""
    with pytest.raises(ConfigurationError) as caught:
        COMPUTED[what](function)(endpoint)
    assert f"The {what} of {__name__}.endpoint" in str(caught.value)
    assert "generator, which answers no value. Return it instead of yielding it." in str(caught.value)


async def an_async_function(*_: Any, **__: Any) -> Any:
    """Answers when it is awaited."""


class AsyncCall:
    """An object that is called like an async function."""

    async def __call__(self, members: Any) -> Any: ...


class AsyncPrice:
    """A measured price one of whose methods is async."""

    def __init__(self, method: str) -> None:
        setattr(self, method, an_async_function)

    def cost(self, usage: Any) -> Decimal:
        return Decimal(0)

    def affordable(self, kind: str, units: Decimal, used: Any) -> int:
        return 0


NEVER_AWAITED: dict[str, tuple[Callable[[], Any], str]] = {
    "customise": (lambda: billable(1, customise=an_async_function), "customise= is tests.test_decorators.an_async_f"),
    "partial": (lambda: billable(1, customise=functools.partial(an_async_function, 1)), "customise= is tests."),
    "object": (lambda: billable(1, customise=AsyncCall()), "customise= is tests.test_decorators.AsyncCall, an async"),
    "method": (lambda: billable(1, customise=AsyncCall().__call__), "customise= is tests.test_decorators.AsyncCall."),
    "generator": (lambda: billable(1, customise=a_generator), "customise= is tests.test_decorators.a_generator, an"),
    "cost": (lambda: billable(AsyncPrice("cost")), "The price's cost() is tests.test_decorators.an_async_function"),
    "affordable": (lambda: billable(AsyncPrice("affordable")), "The price's affordable() is tests.test_decorators.an"),
}


@pytest.mark.parametrize("misuse", NEVER_AWAITED)
def test_refuse_async_functions_that_nobody_awaits(misuse: str) -> None:
    """DESIGN 2: what would make a coroutine that is never awaited fails at import, with the mend."""
    mistake, sentence = NEVER_AWAITED[misuse]
    with pytest.raises(ConfigurationError) as caught:
        mistake()
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).endswith(
        ", an async function or generator, and nobody awaits what it answers. Pass a plain function that returns its "
        "answer."
    )


@pytest.mark.parametrize("hook", [lambda: None, lambda one, two: None, lambda *, members: None])
def test_refuse_a_hook_that_cannot_be_called(hook: Any) -> None:
    """DESIGN 2: a hook that does not take the refusal's members would fail on the first refusal; it does at import."""
    with pytest.raises(ConfigurationError, match="Pass a function of the refusal's members"):
        billable(1, customise=hook)


@pytest.mark.parametrize("hook", [lambda members: (members, {}), lambda *members: members, dict])
def test_take_a_hook_that_can_be_called(hook: Any) -> None:
    """DESIGN "Admission": plain functions of one argument are hooks, also those that Python cannot look into."""
    charge = policy_of(billable(1, customise=hook)(endpoint)).charge
    assert charge is not None
    assert charge.customise is hook


def test_refuse_a_price_that_was_not_made() -> None:
    """DESIGN 2: the class of a measured price looks like one, and would fail on the first paying request."""
    with pytest.raises(ConfigurationError, match=r"AsyncPrice'> is a class\. Make one: AsyncPrice\(\.\.\.\)\."):
        billable(AsyncPrice)


# -- misuse: words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["60", "60/fortnight", "", "a/minute", "60/minute & 5/day", "-1/minute", "60/minute of", "sixty per minute"]
)
def test_refuse_limits_that_are_not_in_the_grammar(text: str) -> None:
    """DESIGN "Rate limits": a limit that cannot be read fails at import, with three that can."""
    with pytest.raises(ConfigurationError) as caught:
        rate_limited(text)
    assert f"The limit {text!r} is not in the grammar. Write one limit as '60/minute'" in str(caught.value)


RATE_MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: rate_limited(), "rate_limited() limits nothing. Give it '60/minute', say, or concurrency=4."),
    "meter": (lambda: rate_limited("60/minute of bananas"), "counts 'bananas'. Use one of requests, tokens"),
    "not-text": (lambda: rate_limited(60), "neither a str nor an item of the limits package"),
    "moving-chosen": (
        lambda: rate_limited(lambda q: "5/day", strategy="moving", cost=2),
        "cost=2 beside moving limits that are looked up for each call",
    ),
    "moving-by-plan": (
        lambda: rate_limited({"free": RateLimitItemPerDay(5)}, strategy="moving", cost=2),
        "cost=2 beside moving limits such as '5 per 1 day'",
    ),
    "moving-configured": (
        lambda: rate_limited(configured="search", strategy="moving", cost=2),
        "cost=2 beside moving limits that are looked up for each call",
    ),
    "moving-cost": (
        lambda: rate_limited("9/day burst 9", "5/day", strategy="moving", cost=2),
        "cost=2 beside moving limits such as '5/day', and a moving window counts calls, one by one.",
    ),
    "moving-computed-cost": (
        lambda: rate_limited("5/day", strategy="moving", cost=lambda n: n),
        "counts calls, one by one.",
    ),
    "bucket-cost": (lambda: rate_limited("60/second burst 5", cost=6), "cost=6 is above the limit '60/second burst 5'"),
    "second": (lambda: rate_limited("1/day; often"), "The limit 'often' is not in the grammar."),
    "strategy": (lambda: rate_limited("1/day", strategy="rolling"), "The strategy 'rolling' is not known."),
    "calendar": (lambda: rate_limited("1/second", strategy="calendar"), "cannot follow the calendar."),
    "key": (lambda: rate_limited("1/day", key="user"), "key='user' is not known. Use one of caller, payer, address"),
    "cost": (lambda: rate_limited("1/day", cost=-1), "cost=-1 is not an int from 0 up."),
    "cost-float": (lambda: rate_limited("1/day", cost=1.5), "cost=1.5 is not an int from 0 up."),
    "cost-bool": (lambda: rate_limited("1/day", cost=True), "cost=True is not an int from 0 up."),
    "errors": (lambda: rate_limited("1/day", errors="xml"), "errors='xml' is not a shape. Use one of problem, openai"),
    "concurrency": (lambda: rate_limited(concurrency=-1), "The concurrency -1 is not an int from 0 up."),
    "concurrency-float": (lambda: rate_limited(concurrency=1.5), "The concurrency 1.5 is not an int from 0 up."),
    "global": (lambda: rate_limited(global_concurrency="4"), "The concurrency '4' is not an int from 0 up."),
    "zone": (lambda: rate_limited("1/day", strategy="calendar", zone="Mars/Olympus"), "'Mars/Olympus'"),
}


@pytest.mark.parametrize("misuse", RATE_MISUSE)
def test_refuse_rate_limits_that_cannot_work(misuse: str) -> None:
    """DESIGN 2: every argument of rate_limited() that cannot work fails at import, with the value and the mend."""
    mistake, sentence = RATE_MISUSE[misuse]
    with pytest.raises(ConfigurationError) as caught:
        mistake()
    assert sentence in str(caught.value)


BILL_MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "fixed-hold": (
        lambda: billable(1, hold=1),
        "A fixed price holds itself. Leave out hold=, or use a measured price.",
    ),
    "errors": (
        lambda: billable(1, errors="xml"),
        "errors='xml' is not a shape. Use one of problem, openai, anthropic.",
    ),
    "sources": (lambda: billable(1, sources=[]), "sources=[] leaves nothing to pay with."),
    "source": (lambda: billable(1, sources=["wallet"]), "'wallet' is no source. Use Wallet() or Allowance("),
    "line": (lambda: billable(1, line="a b"), "The billing line 'a b' is not 1 to 64 characters"),
    "line-empty": (lambda: billable(1, line=""), "The billing line '' is not 1 to 64 characters"),
    "line-long": (lambda: billable(1, line="l" * 65), "is not 1 to 64 characters"),
    "ttl": (lambda: billable(1, ttl_s=0), "ttl_s=0 is not a number of seconds above 0, up to 86400."),
    "ttl-bool": (lambda: billable(1, ttl_s=True), "ttl_s=True is not a number of seconds"),
    "ttl-long": (lambda: billable(1, ttl_s=10**9), "is not a number of seconds above 0"),
    "grace": (lambda: billable(1, grace_s=float("nan")), "grace_s=nan is not a number of seconds"),
    "payer": (lambda: billable(1, payer="org"), "payer='org' cannot be called. Pass a function."),
    "unit": (lambda: billable(1, unit="credits"), "unit='credits' is no Unit. Declare one"),
    "usage": (lambda: billable(1, usage="opnai"), "There is no usage dialect 'opnai'. Choose "),
    "allowance-zone": (lambda: billable(1, sources=[Allowance(1, zone="Mars")]), "The time zone 'Mars' is not known"),
    "customise": (lambda: billable(1, customise={}), "customise={} cannot be called. Pass a function"),
}


@pytest.mark.parametrize("misuse", BILL_MISUSE)
def test_refuse_bills_that_cannot_work(misuse: str) -> None:
    """DESIGN 2: every argument of billable() that cannot work fails at import, with the value and the mend."""
    mistake, sentence = BILL_MISUSE[misuse]
    with pytest.raises(ConfigurationError) as caught:
        mistake()
    assert sentence in str(caught.value)


ENDS = {
    "on_missing_usage": "usage missing",
    "on_error": "answered >= 400",
    "on_late_error": "error after the first byte",
    "on_disconnect": "client gone after",
    "on_early_disconnect": "client gone before",
    "on_cut": "cut",
    "on_abort": "aborted",
}


@pytest.mark.parametrize("option", ENDS)
def test_refuse_ends_that_are_no_policy(option: str) -> None:
    """DESIGN "End of call": a word that is no basis fails at import, with the row and what it offers."""
    with pytest.raises(ConfigurationError) as caught:
        billable(1, **{option: "free"})
    assert "'free' is no policy for a call that ends as" in str(caught.value)
    assert ENDS[option] in str(caught.value)
    assert "Choose one of '" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "basis"), [("on_cut", "none"), ("on_late_error", "estimate"), ("on_abort", "usage")]
)
def test_refuse_ends_that_their_row_does_not_offer(option: str, basis: str) -> None:
    """DESIGN "End of call": a basis of another row fails at import as well."""
    with pytest.raises(ConfigurationError, match=f"'{basis}' is no policy for a call that ends as"):
        billable(1, **{option: basis})


def test_take_a_disconnect_for_both_rows() -> None:
    """DESIGN "End of call": on_disconnect is meant for a client that leaves early as well, where that is a choice."""
    end = policy_of(billable(per_token(input=1), hold=TokenUsage(input=9), on_disconnect="hold")(endpoint)).charge.end
    assert (end.basis(Situation.GONE_EARLY), end.basis(Situation.GONE_LATE)) == (Basis.HOLD, Basis.HOLD)
    late_only = policy_of(billable(1, on_disconnect="usage")(endpoint)).charge.end
    assert late_only.basis(Situation.GONE_EARLY) is Basis.OBSERVED
    apart = policy_of(billable(1, on_disconnect="hold", on_early_disconnect="none")(endpoint)).charge.end
    assert (apart.basis(Situation.GONE_EARLY), apart.basis(Situation.GONE_LATE)) == (Basis.NONE, Basis.HOLD)


def test_take_the_sources_as_they_are() -> None:
    """DESIGN "Sources": named sources are kept in order; without any it is the payer's wallet."""
    named = policy_of(billable(1, sources=[Allowance(10, name="free"), Wallet()])(endpoint)).charge
    assert [type(source) for source in named.sources] == [Allowance, Wallet]
    assert policy_of(billable(1)(endpoint)).charge.sources == (Wallet(),)


# -- what is no function -----------------------------------------------------------------------------------


async def some_app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app."""


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ((), "got no policy. Give it billable(...) or rate_limited(...)."),
        ((billable(1), billable(2, line="two")), "is billable twice"),
        ((1, 2), "is billable twice"),
        ((rate_limited("1/day"), rate_limited("1/day")), "has the limit '1-per-day' twice"),
        ((billable(lambda request: 1),), "asks for 'request', which the endpoint does not have. It can have 'scope'"),
    ],
    ids=["none", "twice", "amounts", "limit", "asks"],
)
def test_refuse_whole_apps_with_policies_that_cannot_work(parts: tuple[Any, ...], sentence: str) -> None:
    """DESIGN 2: `metered_app` refuses what the decorators refuse, when it is made."""
    with pytest.raises(ConfigurationError) as caught:
        metered_app(some_app, *parts)
    assert sentence in str(caught.value)


def test_refuse_what_is_no_app() -> None:
    """DESIGN 2: `metered_app` around what cannot be called fails when it is made."""
    with pytest.raises(ConfigurationError, match=r"'app' is no ASGI app\. Pass a callable"):
        metered_app("app", billable(1))


def test_take_a_bare_amount_as_a_price() -> None:
    """DESIGN 2: for an app or an explicit gate a bare amount is a fixed price; a float is still refused."""
    policy = gather((3,), "here", ())
    assert policy.charge is not None
    assert (policy.charge.price, policy.charge.line) == (FixedPrice(Decimal(3)), "here")
    with pytest.raises(AmountError):
        gather((0.5,), "here", ())


def test_raise_errors_of_the_package_alone() -> None:
    """STYLE "Errors": whatever is wrong with a decorator is a `MeteringError` and a `ValueError`."""
    for mistake, _ in (*RATE_MISUSE.values(), *BILL_MISUSE.values()):
        with pytest.raises(MeteringError) as caught:
            mistake()
        assert isinstance(caught.value, ValueError)
