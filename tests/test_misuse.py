"""Arguments that cannot work are refused where they are written, with their value and the mend (DESIGN 2)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, get_args

import pytest

from asgi_metering import (
    CREDITS,
    Allowance,
    Caller,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    Unit,
    Wallet,
    billable,
    metered_app,
    policies,
    rate_limited,
    requires_upstream,
    up_to,
)
from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.errors import AmountError, ConfigurationError, MeteringError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_million_tokens, per_token
from asgi_metering.rules.ending import DRAIN, DRAINABLE, END_OF_CALL, Situation

PRICE = per_million_tokens(input=3)


async def endpoint(q: str = "") -> None:
    """An endpoint."""


async def run_sync(work: Callable[[], Any]) -> Any:
    """Runs what it is given."""
    return work()


async def new_id_later() -> str:
    """Answers an id that nobody awaits."""
    return "1"


def new_ids() -> Any:
    """Answers a generator, which is no id."""
    yield "1"


class SyncSink:
    """Delivers without being awaited."""

    name = "sync"

    def deliver(self, events: Any) -> None: ...


def middleware(**options: Any) -> Any:
    """The middleware with *options*."""
    return MeteringMiddleware(endpoint, Metering(sinks=()), **options)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "store-scheme": (
        lambda: Metering("mysql://host/db"),
        "The store URL 'mysql://host/db' has the scheme 'mysql'. Use one of: memory://, sqlite:///file.db, postgresql:",
    ),
    "store-password": (
        lambda: Metering("mysql://ann:hunter2@host/db"),
        "The store URL 'mysql://***@host/db' has the scheme 'mysql'.",
    ),
    "store-path": (
        lambda: Metering("metering.db"),
        "The store URL 'metering.db' has the scheme ''. Use one of: memory:",
    ),
    "store-none": (
        lambda: Metering(None),  # type: ignore[arg-type]
        "The store None is neither a Store nor a URL. Write 'sqlite:///metering.db'.",
    ),
    "answers": (lambda: middleware(answers="legacy"), "answers='legacy' is no AnswerOptions. Make one: "),
    "names": (lambda: AnswerOptions(names="x"), "names='x' are no HeaderNames. Make them, such as "),  # type: ignore[arg-type]
    "unit": (lambda: Metering(unit="credits"), "unit='credits' is no Unit. Declare one: Unit('credits', scale=6)."),  # type: ignore[arg-type]
    "identify": (
        lambda: Metering(identify=new_id_later),
        "new_id_later() takes no one argument. Pass a function of the",
    ),  # type: ignore[arg-type]
    "identify-two": (
        lambda: Metering(identify=lambda a, b: None),
        "takes no one argument. Pass a function of the conn",
    ),  # type: ignore[arg-type,misc]
    "hold-lost": (lambda: Metering(on_hold_lost=lambda: None), "takes no one argument. Pass a function of the call."),  # type: ignore[arg-type,misc]
    "new-id": (lambda: Metering(new_id="x"), "new_id='x' cannot be called. Pass a function that "),  # type: ignore[arg-type]
    "new-id-async": (lambda: Metering(new_id=new_id_later), "new_id= is tests.test_misuse.new_id_later, an async "),  # type: ignore[arg-type]
    "new-id-generator": (
        lambda: Metering(new_id=new_ids),
        "new_id= is tests.test_misuse.new_ids, an async function or",
    ),
    "run-sync": (lambda: Metering(run_sync=3), "run_sync=3 is no async function. Write one: async def "),  # type: ignore[arg-type]
    "run-sync-plain": (lambda: Metering(run_sync=lambda work: work()), "is no async function. Write one: async def "),
    "sinks": (lambda: Metering(sinks=3), "sinks=3 is no list of sinks. Pass a list;"),  # type: ignore[arg-type]
    "sinks-text": (lambda: Metering(sinks="otel"), "sinks='otel' is no list of sinks."),  # type: ignore[arg-type]
    "sink": (lambda: Metering(sinks=["x"]), "The sink 'x' is none. Pass an object with a name and an async "),  # type: ignore[list-item]
    "sink-class": (lambda: Metering(sinks=[CallbackSink]), "CallbackSink'> is none. Pass an object"),  # type: ignore[list-item]
    "sink-sync": (lambda: Metering(sinks=[SyncSink()]), "is none. Pass an object with a name and an async deliver("),  # type: ignore[list-item]
    "store-down": (lambda: Metering(on_store_down="allow"), "on_store_down='allow' is no mapping. Say it per layer"),  # type: ignore[arg-type]
    "store-nul": (lambda: Metering("sqlite:///%00.db"), "The store URL 'sqlite:///%00.db' has a NUL, %00, in the name"),
    "plan": (lambda: Caller("ann", plan=["x"]), "The plan ['x'] of caller 'ann' is no str. Pass its name."),  # type: ignore[arg-type]
    "attributes": (lambda: Caller("ann", attributes=[1]), "The attributes [1] of caller 'ann' are no mapping. Pass a "),  # type: ignore[arg-type]
    "sources": (lambda: billable(2, sources=Wallet()), "is no list of sources. Write [Wallet()], say."),  # type: ignore[arg-type]
    "sources-text": (lambda: billable(2, sources="wallet"), "sources='wallet' is no list of sources."),  # type: ignore[arg-type]
    "basis": (lambda: billable(2, on_disconnect=["none"]), "['none'] is no policy for a call that ends as "),  # type: ignore[arg-type]
    "basis-early": (lambda: billable(2, on_early_disconnect=["none"]), "['none'] is no policy for a call that ends"),  # type: ignore[arg-type]
    "hold-of-fixed": (lambda: billable(2, hold=2), "A fixed price holds itself. Leave out hold=, or use a measured"),
    "hold-of-computed": (lambda: billable(lambda q: 1, hold=2), "A price that a function computes holds itself. Leave"),
    "zone": (lambda: rate_limited("5/day", zone=None), "The time zone None is no name. Use an IANA name such as"),  # type: ignore[arg-type]
    "zone-empty": (lambda: rate_limited("5/day", zone=""), "The time zone '' is no name."),
    "zone-allowance": (lambda: Allowance(20, zone=None), "The time zone None is no name."),  # type: ignore[arg-type]
    "no-window": (lambda: rate_limited("60/0 minutes"), "The limit '60/0 minutes' has a window of no length. Write "),
    "no-window-per": (lambda: rate_limited("60 per 00 hour"), "has a window of no length. Write '60/minute', say."),
    "cost": (lambda: rate_limited("60/minute", cost=61), "cost=61 is above the limit '60/minute', so that every call "),
    "cost-of-second": (lambda: rate_limited("5000/day", "2/minute", cost=3), "cost=3 is above the limit '2/minute'"),
    "scope": (lambda: rate_limited("60/minute", scope=3), "The scope of the limits 3 is a int, not a str."),  # type: ignore[arg-type]
    "scope-line": (lambda: rate_limited("60/minute", scope="a\n"), "has characters that are not printable. Encode it"),
    "scope-long": (lambda: rate_limited("60/minute", scope="a" * 256), "has 256 characters; 1 to 255 are allowed."),
    "limits-list": (lambda: rate_limited(["60/minute"]), "The limit ['60/minute'] is neither a str nor an item of the"),  # type: ignore[arg-type]
    "bare-billable": (
        lambda: rate_limited("9/day")(billable(endpoint)),  # type: ignore[type-var]
        "A metering decorator is no endpoint. Write @billable(2), with its price in parentheses, and not @billable",
    ),
    "bare-limited": (
        lambda: billable(2)(rate_limited(endpoint)),  # type: ignore[arg-type]
        "A metering decorator is no endpoint. Write @rate_limited('60/minute'), with its limit in parentheses, and not",
    ),
    "bare-required": (
        lambda: requires_upstream(endpoint),  # type: ignore[arg-type]
        "is no name. Write @requires_upstream('openai'), with the provider in parentheses.",
    ),
    "app-second": (
        lambda: metered_app(billable(2), endpoint),  # type: ignore[arg-type]
        "metered_app() has a policy for its app. Write the app first: metered_app(app, billable(2)).",
    ),
    "option": (
        lambda: Metering("sqlite:///m.db?synchronus=FULL"),
        "has unknown options: synchronus. Use synchronous=FULL or synchronous=NORMAL.",
    ),
    "no-prices": (lambda: per_token(), "A price of tokens prices nothing. Name a kind: per_million_tokens(input=3, "),
    "flat-charge": (
        lambda: middleware(default_limits=[billable(1)]),
        "default_limits= has billable(...), which is no ",
    ),
    "pools": (
        lambda: rate_limited(concurrency=1)(rate_limited(concurrency=2)(endpoint)),
        "has two caller concurrency limits, 1 and 2, on the same slots. Remove one.",
    ),
    "pools-global": (
        lambda: rate_limited(global_concurrency=1)(rate_limited(global_concurrency=1, key="address")(endpoint)),
        "has two global concurrency limits, 1 and 1, on the same slots. Remove one.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_refuse_what_cannot_work(name: str) -> None:
    """DESIGN 2: misuse fails where it is written, never on the first paying request, and names value and mend."""
    make, sentence = MISTAKES[name]
    with pytest.raises(ConfigurationError) as refused:
        make()
    assert sentence in str(refused.value)


def test_refuse_a_constant_hold_that_is_finer_than_the_unit() -> None:
    """DESIGN "Amounts": a constant hold is an amount like any other, and refused where its unit cannot count it."""
    with pytest.raises(AmountError, match=r"The hold '0\.0000001' is finer than unit 'credits' counts"):
        billable(PRICE, hold="0.0000001", unit=CREDITS)
    with pytest.raises(AmountError, match="finer than unit 'messages' counts"):
        billable(PRICE, hold=up_to("0.5", at_least=1), unit=Unit("messages", scale=0))


def test_take_what_works() -> None:
    """DESIGN 2: the same arguments, written rightly, are taken."""
    Metering(
        run_sync=run_sync, new_id=lambda: "1", sinks=[CallbackSink(print, "told")], on_store_down={"rates": "deny"}
    )
    Caller("ann", plan="free", attributes={"team": 1})
    rate_limited("60/minute", "200000/minute of tokens", cost=60, scope="a b", zone="Europe/Berlin")
    rate_limited("0/minute", cost=1)
    rate_limited(concurrency=1)(rate_limited(concurrency=2, key="address")(endpoint))
    rate_limited(concurrency=1)(rate_limited(concurrency=2, scope="heavy")(endpoint))
    rate_limited(concurrency=1)(rate_limited(global_concurrency=2)(endpoint))


CHARGES: dict[str, tuple[dict[str, Any], str]] = {
    "caller": ({"hold": 1, "caller": "bob"}, "caller='bob' is no Caller. Make one: Caller('bob', payer='org_7')."),
    "up-to": ({"hold": up_to(at_least=1)}, "which says nothing of what is charged. Give a price= as well"),
    "usage": ({"hold": TokenUsage()}, "which says nothing of what is charged. Give a price= as well"),
    "nothing": ({}, "has neither a price nor a hold. Give one."),
    "unit": ({"hold": 1, "unit": "x"}, "unit='x' is no Unit. Declare one"),
    "scale": ({"hold": 1, "unit": Unit("credits", 3)}, "The unit 'credits' has scale 3 here, and is known to this"),
    "fine": ({"price": PRICE, "hold": "0.0000001"}, "The hold '0.0000001' is finer than unit 'credits' counts"),
}


@pytest.mark.parametrize("name", CHARGES)
def test_refuse_a_charge_that_cannot_work(name: str) -> None:
    """DESIGN 2: `charge` refuses before anything is held, also what only its own unit can judge."""
    given, sentence = CHARGES[name]

    async def scene() -> None:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 10, id="1")
            with pytest.raises(MeteringError) as refused:
                async with metering.charge(payer="ann", line="l", **given):
                    raise AssertionError("It runs.")
            assert sentence in str(refused.value)
            assert (await metering.balance("ann")).held == 0

    asyncio.run(scene())


@pytest.mark.parametrize("scale", [0, 12])
def test_refuse_a_unit_in_another_scale(scale: int) -> None:
    """X.7: whoever grants, reads or charges in one unit with two scales is off by powers of ten, and refused."""
    other = Unit("credits", scale)

    async def scene() -> None:
        async with Metering(sinks=()) as metering:
            with pytest.raises(ConfigurationError, match="is known to this Metering with scale 6"):
                await metering.grant("ann", 1, id="1", unit=other)
            with pytest.raises(ConfigurationError, match="is known to this Metering"):
                await metering.balance("ann", unit=other)
            with pytest.raises(ConfigurationError, match="is known to this Metering"):
                [line async for line in metering.statement("ann", unit=other)]
            with pytest.raises(ConfigurationError, match="is no Unit"):
                await metering.grant("ann", 1, id="1", unit="credits")  # type: ignore[arg-type]
            # Equal ones are the same unit.
            assert (await metering.grant("ann", 1, id="1", unit=Unit("credits"))).applied

    asyncio.run(scene())


CHOICES = {
    Situation.UNREPORTED: policies.OnMissingUsage,
    Situation.FAILED_EARLY: policies.OnError,
    Situation.FAILED_LATE: policies.OnLateError,
    Situation.GONE_EARLY: policies.OnEarlyDisconnect,
    Situation.GONE_LATE: policies.OnDisconnect,
    Situation.CUT: policies.OnCut,
    Situation.ABORTED: policies.OnAbort,
}


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: row.name)
def test_offer_types_of_the_choices_that_there_are(row: Situation) -> None:
    """DESIGN "End of call": what a type checker offers for a situation is what its row of the table offers."""
    drains = (DRAIN,) if row in DRAINABLE else ()
    assert get_args(CHOICES[row]) == (*[basis.value for basis in END_OF_CALL[row]], *drains)
