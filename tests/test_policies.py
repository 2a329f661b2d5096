"""Policies: callables by name, holds and prices as they are written, and what an endpoint's policy answers."""

from __future__ import annotations

import asyncio
import inspect
from decimal import Decimal
from typing import Any

import pytest

from asgi_metering import TokenUsage, up_to
from asgi_metering.arguments import From
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.holding import HoldPolicy, read_hold
from asgi_metering.policies import (
    ChargePolicy,
    ConcurrencyLimit,
    EndpointPolicy,
    Idempotency,
    RatePolicy,
    check_line,
    misplaced,
    read_price,
)
from asgi_metering.prices import FixedPrice, per_token
from asgi_metering.rates import parse_limit
from asgi_metering.rules.ending import Drain, EndPolicy, Situation

ARGUMENTS = {"body": "B", "user": "U"}


def compute(function: Any, arguments: dict[str, Any] = ARGUMENTS) -> Any:
    """What *function* comes to, for a call named CALL."""
    return asyncio.run(From(function, "price").compute("CALL", arguments))


async def late(user: str) -> str:
    """An async policy function."""
    await asyncio.sleep(0)
    return user


def everything(**given: Any) -> dict[str, Any]:
    """Takes all of the endpoint's arguments."""
    return given


def everything_and_call(call: Any, **given: Any) -> Any:
    """Takes the call as well."""
    return call, given


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (lambda: 1, 1),
        (lambda body: body, "B"),
        (lambda user, call: (user, call), ("U", "CALL")),
        (lambda body, absent="A": body + absent, "BA"),
        (late, "U"),
        (everything, ARGUMENTS),
        (everything_and_call, ("CALL", ARGUMENTS)),
    ],
)
def test_callable_gets_what_it_names(function: Any, answer: Any) -> None:
    """A policy function names the endpoint's arguments that it needs, and the call; async ones are awaited."""
    assert compute(function) == answer


@pytest.mark.parametrize("function", [lambda *args: 1, eval("lambda body, /: 1")])
def test_callable_by_position_is_refused(function: Any) -> None:
    """Positions mean nothing here, so a function that takes them is refused at import."""
    with pytest.raises(ConfigurationError, match="by position"):
        From(function, "price")


def test_callable_without_a_signature_is_refused() -> None:
    """What cannot be inspected cannot be matched by name."""
    with pytest.raises(ConfigurationError, match="has no signature to read"):
        From(_Unreadable(), "price")


class _Unreadable:
    """A callable that tells nothing of itself."""

    __signature__ = "none"

    def __call__(self) -> int:
        return 1


def test_callable_that_asks_for_the_unknown_is_refused_with_what_can_be_had() -> None:
    """The sentence at import names the endpoint's own parameters."""

    def endpoint(body: str) -> None:
        """An endpoint."""

    parameters = inspect.signature(endpoint).parameters
    From(lambda body, call: 1, "price").check("endpoint", parameters)
    From(lambda model="m": 1, "price").check("endpoint", parameters)
    with pytest.raises(ConfigurationError, match="It can have 'body', 'call'"):
        From(lambda model: 1, "price").check("endpoint", parameters)


def test_endpoint_that_takes_anything_can_give_anything() -> None:
    """With ``**kwargs`` on the endpoint every name may come."""

    def endpoint(**anything: Any) -> None:
        """An endpoint."""

    From(lambda model: 1, "price").check("endpoint", inspect.signature(endpoint).parameters)


def test_hold_is_read_as_written() -> None:
    """A hold is an amount, a usage, a function or `up_to`; each comes out as a policy."""
    usage = TokenUsage(input=1)
    assert read_hold(None) == HoldPolicy()
    assert read_hold("0.5") == HoldPolicy("0.5")
    assert read_hold(usage) == HoldPolicy(usage)
    assert read_hold(up_to(5, at_least=1)) == HoldPolicy(5, 1)
    assert isinstance(read_hold(late).estimate, From)
    assert read_hold(late).callables() == (read_hold(late).estimate,)
    assert up_to(at_least="0.01").callables() == ()


@pytest.mark.parametrize("hold", [0.5, -1, "NaN", True])
def test_hold_that_is_no_amount_is_refused(hold: Any) -> None:
    """Floats, negatives and NaN are refused at import."""
    with pytest.raises(AmountError):
        read_hold(hold)
    with pytest.raises(AmountError):
        up_to(at_least=hold)


def test_price_is_read_as_written() -> None:
    """A price is an amount, a measured price or a function."""
    measured = per_token(input=1)
    assert read_price("0.5") == FixedPrice(Decimal("0.5"))
    assert read_price(measured) is measured
    assert isinstance(read_price(late), From)


def test_charge_policy_knows_what_it_measures_and_computes() -> None:
    """A measured price depends on usage; price, payer and hold are computed where they are functions."""
    price, payer, hold = From(late, "price"), From(late, "payer"), From(late, "hold")
    computed = ChargePolicy(price, "l", None, hold=HoldPolicy(hold), payer=payer)
    assert computed.callables() == (price, payer, hold)
    assert not computed.measured
    assert ChargePolicy(per_token(input=1), "l", None).measured
    assert not ChargePolicy(FixedPrice.of(1), "l", None).measured


@pytest.mark.parametrize("limit", [-1, 1.5, True, "4"])
def test_concurrency_is_a_count(limit: Any) -> None:
    """Slots are an int from 0 up; 0 admits nobody."""
    assert ConcurrencyLimit(0).limit == 0
    with pytest.raises(ConfigurationError, match="not an int from 0 up"):
        ConcurrencyLimit(limit)


def test_endpoint_policy_answers_for_its_parts() -> None:
    """The charge's shape of errors wins over the rates'; everything that is computed is known."""
    key, cost = From(late, "key"), From(late, "cost")
    rates = RatePolicy((parse_limit("1/minute"),), "s", key=key, cost=cost, errors="openai")
    charge = ChargePolicy(From(late, "price"), "l", None, errors="anthropic")
    both = EndpointPolicy("e", charge, (rates,))
    assert EndpointPolicy("e").errors == "problem"
    assert EndpointPolicy("e", rates=(rates,)).errors == "openai"
    assert both.errors == "anthropic"
    assert both.callables() == (charge.price, key, cost)


def test_line_is_a_name() -> None:
    """A billing line goes into metrics and header fields, so it is a name."""
    assert check_line("chat.v1") == "chat.v1"
    with pytest.raises(ConfigurationError, match="billing line"):
        check_line("two words")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (EndpointPolicy("e", ChargePolicy(FixedPrice.of(1), "l", None, per="message")), "only WebSockets are"),
        (
            EndpointPolicy("e", ChargePolicy(FixedPrice.of(1), "l", EndPolicy({}, {Situation.GONE_LATE: Drain()}))),
            "nothing goes on over a WebSocket that is closed",
        ),
        (
            EndpointPolicy("e", ChargePolicy(FixedPrice.of(1), "l", None, idempotency=Idempotency())),
            "has neither a body nor an answer that could be repeated",
        ),
    ],
)
def test_say_why_a_policy_means_nothing_there(policy: EndpointPolicy, reason: str) -> None:
    """A policy that one kind of connection cannot keep says which, and what to write instead."""
    assert reason in misplaced(policy)
