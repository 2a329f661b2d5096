"""What is written in rate_limited(): the policies that it means, and what is refused at import."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request

from asgi_metering import Metering, rate_limited
from asgi_metering.arguments import NamedKey
from asgi_metering.chosen import LimitByPlan
from asgi_metering.errors import ConfigurationError
from asgi_metering.policies import ConcurrencyLimit, RatePolicy


async def endpoint(request: Request) -> None:
    """Something to decorate."""


def rates(*decorators: Any) -> tuple[RatePolicy, ...]:
    """The policies that *decorators* write, outermost first."""
    found: Any = endpoint
    for decorator in reversed(decorators):
        found = decorator(found)
    return found.__asgi_metering__.policy.rates  # type: ignore[no-any-return]


def test_read_levels_in_their_order() -> None:
    """S0.42: levels= writes one policy for each key, named by it, after the limits of key= itself."""
    found = rates(
        rate_limited("1/day", key="address", levels={"payer": ["2/day", "3/hour"], "named:org": {"a": "4/day"}})
    )
    assert [(str(rate.key), rate.level) for rate in found] == [
        ("address", "address"),
        ("payer", "payer"),
        ("named:org", "org"),
    ]
    assert [[limit.name for limit in rate.limits] for rate in found] == [
        ["address-1-per-day"],
        ["payer-2-per-day", "payer-3-per-hour"],
        [],
    ]
    assert isinstance(found[2].key, NamedKey)
    assert [isinstance(each, LimitByPlan) for each in found[2].chosen] == [True]


def test_read_slots_by_key() -> None:
    """S0.42: concurrency= may be a mapping, which adds to the levels of its keys, and global ones stand beside."""
    found = rates(rate_limited(levels={"payer": "2/day"}, concurrency={"payer": 5, "caller": 2}, global_concurrency=9))
    assert [(str(rate.key), rate.level, rate.concurrency) for rate in found] == [
        ("caller", "", (ConcurrencyLimit(9, "global"),)),
        ("payer", "payer", (ConcurrencyLimit(5),)),
        ("caller", "caller", (ConcurrencyLimit(2),)),
    ]


def test_leave_names_alone_without_levels() -> None:
    """S2.29: one key has no level to name, and its limits keep their names."""
    (only,) = rates(rate_limited("60/minute", concurrency=4))
    assert (only.level, only.limits[0].name, only.shares) == ("", "60-per-minute", False)


def test_name_a_key_by_its_level() -> None:
    """S0.42: level= names the key of a function, and its limits."""
    (only,) = rates(rate_limited("60/minute", key=lambda request: request, level="team", scope="s"))
    assert (only.level, only.limits[0].name, only.shares) == ("team", "team-60-per-minute", True)


WRONG: dict[str, tuple[Any, str]] = {
    "key": (lambda: rate_limited("1/day", key="ip"), "key='ip' is not known. Use one of caller, payer, address, route"),
    "key-attribute": (lambda: rate_limited("1/day", key="attribute:"), "key='attribute:' is not known."),
    "key-name": (lambda: rate_limited("1/day", key="named:a b"), "The name of the key 'a b' is not 1 to 64 characters"),
    "key-type": (lambda: rate_limited("1/day", key=7), "key=7 is not known."),  # type: ignore[arg-type]
    "levels": (lambda: rate_limited(levels="1/day"), "levels='1/day' is no mapping of keys to limits."),
    "levels-list": (lambda: rate_limited(levels=["1/day"]), "levels=['1/day'] is no mapping of keys to limits."),  # type: ignore[arg-type]
    "levels-empty": (lambda: rate_limited("1/day", levels={}), "levels={} is no mapping of keys to limits."),
    "levels-nothing": (lambda: rate_limited(levels={"payer": []}), "levels={'payer': []} limits nothing."),
    "levels-key": (lambda: rate_limited(levels={"org": "1/day"}), "key='org' is not known."),
    "levels-function": (lambda: rate_limited(levels={len: "1/day"}), "which is no name. Use one such as 'payer'"),  # type: ignore[dict-item]
    "levels-alike": (
        lambda: rate_limited(levels={"attribute:user": "1/day", "named:user": "2/hour"}),
        "The keys 'attribute:user' and 'named:user' are both the level 'user'. Write one of them as",
    ),
    "levels-alike-own": (
        lambda: rate_limited("1/day", key="named:user", levels={"attribute:user": "2/hour"}),
        "The keys 'named:user' and 'attribute:user' are both the level 'user'.",
    ),
    "levels-twice": (
        lambda: rate_limited("1/day", levels={"caller": "2/day"}),
        "which is the key of the other limits as",
    ),
    "levels-beside-function": (
        lambda: rate_limited("1/day", key=lambda: 1, levels={"caller": "2/day"}),
        "have no name beside others. Give one: level='user'.",
    ),
    "level-of-nothing": (
        lambda: rate_limited(levels={"payer": "1/day"}, level="x"),
        "level='x' names limits that are not",
    ),
    "level": (lambda: rate_limited("1/day", level="a b"), "The level 'a b' is not 1 to 64 characters"),
    "level-long": (lambda: rate_limited("1/day", level="a" * 33), "has more than 32 characters."),
    "level-global": (lambda: rate_limited("1/day", level="global"), "level='global' is that of key='global'"),
    "concurrency": (lambda: rate_limited(concurrency={}), "concurrency={} limits nothing."),
    "concurrency-amount": (
        lambda: rate_limited(concurrency={"payer": "4"}),
        "The concurrency '4' is not an int from 0",
    ),  # type: ignore[dict-item]
    "plans": (lambda: rate_limited({}), "are no mapping of plans to limits. Write {'free': '20/minute'"),
    "plans-none": (lambda: rate_limited({None: "1/day"}), "are no mapping of plans to limits."),  # type: ignore[dict-item]
    "plans-text": (lambda: rate_limited({"free": ["1/day"]}), "The limit ['1/day'] is not a str."),  # type: ignore[dict-item]
    "plans-grammar": (lambda: rate_limited({"free": "fast"}), "The limit 'fast' is not in the grammar."),
    "plans-meters": (lambda: rate_limited({"free": "1/day", "pro": "9/day of tokens"}), "count different things"),
    "plans-cost": (lambda: rate_limited({"free": "1/day"}, cost=2), "cost=2 is above the limit '1/day'"),
    "levels-cost": (lambda: rate_limited(levels={"payer": "1/day"}, cost=2), "cost=2 is above the limit '1/day'"),
    "function": (lambda: rate_limited(lambda a, /: "1/day"), "The limit "),
    "function-argument": (lambda: rates(rate_limited(lambda q: "1/day")), "The limit of tests.test_limiting.endpoint"),
    "generator": (lambda: rates(rate_limited("1/day", exempt_when=generator)), "a generator, which answers no value."),
    "exempt": (lambda: rate_limited("1/day", exempt_when=True), "exempt_when=True cannot be called."),  # type: ignore[arg-type]
    "exempt-argument": (lambda: rates(rate_limited("1/day", exempt_when=lambda q: True)), "asks for 'q'"),
    "configured": (lambda: rate_limited(configured="a b"), "The name of configured limits 'a b' is not 1 to 64"),
    "methods": (lambda: rate_limited("1/day", methods="POST"), "methods='POST' is no list of HTTP methods."),
    "methods-empty": (lambda: rate_limited("1/day", methods=[]), "methods=[] counts nothing."),
    "methods-free": (lambda: rate_limited("1/day", methods=["GET", "head"]), "has 'head', which cannot be counted."),
    "methods-odd": (lambda: rate_limited("1/day", methods=["GE T"]), "has 'GE T', which cannot be counted."),
    "per-method": (lambda: rate_limited("1/day", per_method="no"), "per_method='no' is no bool."),  # type: ignore[arg-type]
    "override": (lambda: rate_limited("1/day", override_defaults=None), "override_defaults=None is no bool."),  # type: ignore[arg-type]
    "shared-twice": (
        lambda: rates(rate_limited("1/day", "2/day", scope="s")),
        "has the limits '1-per-day' and '2-per-day' in the scope 's', where both would be one count.",
    ),
    "plans-twice": (lambda: rates(rate_limited({"a": "1/day"}, {"b": "2/day"})), "where both would be one count."),
    "functions-alike": (
        lambda: rates(rate_limited("1/day", key=lambda: 1), rate_limited("1/day", key=lambda: 2)),
        "Tell them apart by names: level='team' and level='user'.",
    ),
    "keys": (lambda: Metering(keys=[len]), "keys=[<built-in function len>] is no mapping of names to functions."),  # type: ignore[arg-type]
    "keys-name": (lambda: Metering(keys={"a b": len}), "The name of the key 'a b' is not 1 to 64"),
    "keys-function": (lambda: Metering(keys={"a": 1}), "The key 'a' is 1, which cannot be called."),  # type: ignore[dict-item]
    "keys-generator": (lambda: Metering(keys={"a": generator}), "a generator, which answers no value."),
    "limits": (lambda: Metering(limits=["1/day"]), "limits=['1/day'] is no mapping of names to limits."),  # type: ignore[arg-type]
    "limits-name": (lambda: Metering(limits={"a b": "1/day"}), "The name of configured limits 'a b' is not"),
    "limits-empty": (lambda: Metering(limits={"a": []}), "The configured limits 'a' limit nothing."),
    "limits-type": (lambda: Metering(limits={"a": 60}), "have 60, which is no limit of requests."),
    "limits-tokens": (lambda: Metering(limits={"a": "1/day of tokens"}), "which is no limit of requests."),
    "limits-grammar": (lambda: Metering(limits={"a": "fast"}), "The limit 'fast' is not in the grammar."),
    "limits-plans": (lambda: Metering(limits={"a": {}}), "have no plan. Write {'free': '60/minute'}, say."),
    "limits-plan": (lambda: Metering(limits={"a": {1: "1/day"}}), "have no plan."),
}


def generator() -> Any:
    """Answers no value."""
    yield "a"


@pytest.mark.parametrize("case", WRONG)
def test_refuse_what_cannot_work(case: str) -> None:
    """DESIGN 2: every argument that cannot work fails where it is written, with the value and the mend."""
    wrong, told = WRONG[case]
    with pytest.raises(ConfigurationError) as caught:
        wrong()
    assert told in str(caught.value)


def test_take_what_looks_alike_and_is_not() -> None:
    """S0.42, S4.11: other keys, scopes, methods, levels or windows are other counts."""
    rates(rate_limited("1/day", key=lambda: 1, level="a"), rate_limited("1/day", key=lambda: 2, level="b"))
    rates(rate_limited("1/day", key="named:a"), rate_limited("1/day", key="named:b"))
    rates(rate_limited("1/day", "2/hour", scope="s"), rate_limited("2/day", scope="t"))
    rates(rate_limited("1/day", methods=["GET"], scope="s"), rate_limited("2/day", methods=["POST"], scope="s"))
    rates(rate_limited("1/day", {"a": "1/hour"}), rate_limited("1/hour"))
    rates(rate_limited("1/day", scope="s"), rate_limited("1/day", strategy="sliding", scope="s"))
    rates(rate_limited("9/day", key="global", level="global"))


def test_say_the_smallest_plan() -> None:
    """S4.17: of limits of several windows the smallest is the one that allows least in a time."""
    assert LimitByPlan({"a": "100/minute", "b": "1000/hour", "c": "20/second"}).limit_for("x").text == "1000/hour"
    assert LimitByPlan({"a": "60/minute", "b": "1/second"}).text_for(None) == "1/second"
