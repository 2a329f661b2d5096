"""Payers: whose account and credential a call runs on, when it switches, and what calls inside it inherit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import Allowance, Caller, Metering, MeteringMiddleware, TokenUsage, Wallet, billable, current_call
from asgi_metering.call import Call, CallRefused
from asgi_metering.decisions import Decision, Reason
from asgi_metering.errors import ConfigurationError, PayerError, StoreUnavailableError
from asgi_metering.prices import per_token
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Operation
from asgi_metering.sources import Payer
from asgi_metering.stores.memory import MemoryStore
from tests.harness.drive import body, drive, http_scope, lifespan, status

CREDIT = 1_000_000
PLATFORM = Payer("platform", account="acme", credential=lambda: "platform-key", headers={"x-bill-to": "acme"})
OWN = Payer("own", credential=lambda call: f"key of {call.caller.id}")
SOURCES = [Allowance(2, payer=PLATFORM), Wallet(payer=OWN)]


def play(scene: Callable[[Metering], Awaitable[None]], **options: Any) -> None:
    """Play *scene* on a metering where ann and acme have a hundred credits each; the books are proven after it."""

    async def run() -> None:
        async with Metering(**{"store": "memory://", "sinks": (), **options}) as metering:
            for payer in ("ann", "acme"):
                await metering.grant(payer, 100, id="g")
            await scene(metering)
            assert await metering.check() == []

    asyncio.run(run())


def charging(metering: Metering, price: Any = 2, **options: Any) -> Any:
    """A call of ann's, of two credits unless said otherwise."""
    return metering.charge(**{"payer": "ann", "line": "job", "price": price, **options})


async def spent(metering: Metering) -> tuple[int, int]:
    """What ann and acme have spent, in whole credits."""
    ann, acme = [(await metering.balance(payer)).settled // CREDIT for payer in ("ann", "acme")]
    return ann, acme


# -- who pays ----------------------------------------------------------------------------------------------


def test_switch_the_payer_as_a_whole() -> None:
    """Past the allowance account, credential and header fields are all the next payer's (S0.19, S0.23, S0.24)."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, sources=SOURCES) as first:
            assert (first.payer, first.paid_by, first.payer_switched) == ("acme", PLATFORM, False)
            assert await first.credential() == "platform-key"
            assert first.paid_by.headers == {"x-bill-to": "acme"}
        async with charging(metering, sources=SOURCES) as second:
            assert (second.payer, second.paid_by, second.payer_switched) == ("ann", OWN, True)
            assert await second.credential() == "key of ann"
            assert second.paid_by.headers == {}
        assert (first.receipt.payer, second.receipt.payer) == ("acme", "ann")
        assert await spent(metering) == (2, 0)

    play(scene)


def test_own_payer_has_no_payer_object() -> None:
    """Without payers the call's own account pays, nothing has switched, and there is no credential to hand out."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, sources=[Allowance(1), Wallet()]) as call:
            assert (call.payer, call.paid_by, call.payer_switched) == ("ann", None, False)
            with pytest.raises(PayerError, match="has no payer with a credential"):
                await call.credential()

    play(scene)


@pytest.mark.parametrize("free", ["price", "store"])
def test_free_work_runs_on_the_first_choice(free: str) -> None:
    """Where nothing is held the route's first payer stays (S0.26): at a price of 0, or let in without a store."""

    class Down(MemoryStore):
        """A store without answers to admissions."""

        def run_now(self, operation: Operation) -> Answer:
            if isinstance(operation, Admit):
                raise StoreUnavailableError("down")
            return super().run_now(operation)

    async def scene(metering: Metering) -> None:
        async with charging(metering, 0 if free == "price" else 2, sources=SOURCES) as call:
            assert (call.paid_by, call.payer_switched) == (PLATFORM, False)
            assert await call.credential() == "platform-key"

    if free == "price":
        play(scene)
    else:
        play(scene, store=Down(), on_store_down={"credits": "allow"})


def test_split_a_call_over_one_payer() -> None:
    """With split the sources of one payer pay together, in their order, and never with another payer's."""

    async def scene(metering: Metering) -> None:
        sources = [Allowance(2, payer=PLATFORM, split=True), Wallet(payer=PLATFORM), Wallet()]
        async with charging(metering, 5, sources=sources) as call:
            assert call.payer == "acme"
        assert [part.amount // CREDIT for part in call.receipt.parts] == [2, 3]
        async with charging(metering, 98, sources=sources) as call:
            assert (call.payer, call.payer_switched) == ("ann", True)
        assert await spent(metering) == (98, 3)

    play(scene)


def test_without_split_one_source_pays_the_whole() -> None:
    """What an allowance cannot pay alone is the next source's, whole."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, 5, sources=[Allowance(2), Wallet()]) as call:
            assert call.decision.source == "wallet"
        assert await spent(metering) == (5, 0)

    play(scene)


def test_overdraw_a_wallet_so_far() -> None:
    """An overdraft lets a wallet hold beyond what is there, up to its amount and not a part more."""

    async def scene(metering: Metering) -> None:
        with pytest.raises(CallRefused):
            async with charging(metering, "105.000001", sources=[Wallet(overdraft="5")]):
                raise AssertionError("It ran.")
        async with charging(metering, 103, sources=[Wallet(overdraft="5")]) as call:
            assert call.balance_status == "ok"
        async with charging(metering, 2, sources=[Wallet(overdraft="5")]) as call:
            assert call.balance_status == "blocked"
        assert (await metering.balance("ann")).debt == 5 * CREDIT

    play(scene)


def test_overdraft_too_fine_for_the_unit() -> None:
    """An overdraft that the unit cannot count is refused before the call."""

    async def scene(metering: Metering) -> None:
        with pytest.raises(Exception, match="overdraft"):
            async with charging(metering, sources=[Wallet(overdraft="0.0000001")]):
                raise AssertionError("It ran.")

    play(scene)


def test_refuse_two_payers_of_one_name() -> None:
    """They could not be told apart afterwards."""

    async def scene(metering: Metering) -> None:
        with pytest.raises(ConfigurationError, match="Two payers are called 'own'"):
            async with charging(metering, sources=[Wallet(payer=OWN), Wallet(payer=Payer("own"))]):
                raise AssertionError("It ran.")

    play(scene)


def test_refuse_two_windows_of_one_name() -> None:
    """A day and a month of one name would be one count where they begin together; of two payers they are two."""
    for other in (Allowance(9, per="month"), Allowance(9, zone="Europe/Berlin"), Allowance(9, days=30)):
        with pytest.raises(
            ConfigurationError, match=r"Two allowances of one payer are called 'allowance' .* Name them"
        ):
            billable(1, sources=[Allowance(1), other])
    month = Allowance(9, per="month")
    for sources in ([Allowance(1, payer=PLATFORM), month], [Allowance(1, name="daily"), month], [month, month]):
        billable(1, sources=sources)


def test_warn_by_the_source_that_pays() -> None:
    """The warning level is that of the paying payer's wallet, not of the first one with that name (S3.6)."""

    async def scene(metering: Metering) -> None:
        poor = Payer("poor", account="nobody")
        sources = [Wallet(warn_below=1_000, payer=poor), Wallet(warn_below=50)]
        async with charging(metering, sources=sources) as call:
            assert (call.warning_level, call.balance_status) == (50 * CREDIT, "ok")

    play(scene)


# -- who cannot be found -----------------------------------------------------------------------------------


def _raises() -> str:
    raise LookupError("workspace gone")


@pytest.mark.parametrize("account", [_raises, lambda: None, lambda: ""], ids=["raises", "none", "empty"])
def test_unresolved_payer_starts_nothing(account: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where an account cannot be resolved nobody else pays, also not the source before it (S0.25, S3.38)."""

    async def scene(metering: Metering) -> None:
        with pytest.raises(CallRefused) as refused:
            async with charging(metering, sources=[Wallet(), Wallet(payer=Payer("lost", account=account))]):
                raise AssertionError("It ran.")
        assert refused.value.refusal.reason is Reason.PAYER
        assert isinstance(refused.value.__cause__, PayerError)
        assert await metering.holds() == []
        assert await spent(metering) == (0, 0)

    play(scene)
    assert "The payer of job could not be resolved." in caplog.text


def test_payers_over_http() -> None:
    """Accounts may follow the caller; one that cannot be resolved is a 503, and no line runs (S0.25, S3.37)."""

    async def owner(call: Call) -> Any:
        assert call.caller is not None
        return call.caller.attributes["owner"]

    @billable(1, line="chat", sources=[Wallet(payer=Payer("owner", account=owner, credential=lambda call: call.payer))])
    async def chat(request: Request) -> JSONResponse:
        call = current_call()
        return JSONResponse({"payer": call.payer, "credential": await call.credential()})

    def identify(connection: Any) -> Caller:
        owner = connection.headers.get("x-owner")
        return Caller("ann", attributes={"owner": owner} if owner else {})

    metering = Metering("memory://", identify=identify, sinks=())
    app = MeteringMiddleware(Starlette(routes=[Route("/chat", chat, methods=["POST"])]), metering=metering)

    async def scene() -> None:
        async with lifespan(app):
            await metering.grant("acme", 100, id="g")
            paid = await drive(app, http_scope("/chat", "POST", headers=[("x-owner", "acme")]))
            assert json.loads(body(paid.log)) == {"payer": "acme", "credential": "acme"}
            lost = await drive(app, http_scope("/chat", "POST"))
            assert (status(lost.log), json.loads(body(lost.log))["code"]) == (503, "payer_unresolved")
            await metering.drain()
            assert await spent(metering) == (0, 1)

    asyncio.run(scene())


# -- what is inherited -------------------------------------------------------------------------------------


def test_inherit_the_payer_of_the_call_outside() -> None:
    """A call inside another is paid by the same account, with the same credential and header fields (S0.27)."""

    async def scene(metering: Metering) -> None:
        caller = Caller("bob", plan="pro")
        async with charging(metering, caller=caller, sources=SOURCES) as outer:
            async with charging(metering, 3, payer=None, line="sub") as inner:
                assert (inner.payer, inner.paid_by, inner.payer_switched) == ("acme", PLATFORM, False)
                assert await inner.credential() == "platform-key"
                assert (inner.caller.id, inner.caller.plan) == ("bob", "pro")
                async with charging(metering, 4, payer=None, line="subsub") as innermost:
                    assert (innermost.payer, innermost.paid_by) == ("acme", PLATFORM)
            assert outer.caller.id == "bob"
        assert await spent(metering) == (0, 7)

    play(scene)


def test_inherit_the_payer_that_was_switched_to() -> None:
    """Past the allowance the work inside is the user's as well, on the user's credential (S0.27, S0.28)."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, sources=SOURCES):
            pass
        async with charging(metering, sources=SOURCES), charging(metering, 3, payer=None) as inner:
            assert (inner.payer, inner.paid_by) == ("ann", OWN)
        assert await spent(metering) == (5, 0)

    play(scene)


@pytest.mark.parametrize("first", [PLATFORM, OWN])
def test_inherit_the_account_of_the_first_choice(first: Payer) -> None:
    """Work inside a free call is paid by the payer that it runs on: with its credential, from its balance (S0.26)."""

    async def scene(metering: Metering) -> None:
        sources = [Wallet(payer=first)]
        async with (
            charging(metering, 0, sources=sources),
            charging(metering, 0, payer=None, line="sub"),
            charging(metering, 3, payer=None, line="subsub") as inner,
        ):
            assert (inner.payer, inner.paid_by) == ("acme" if first is PLATFORM else "ann", first)
        assert await spent(metering) == ((0, 3) if first is PLATFORM else (3, 0))

    play(scene)


@pytest.mark.parametrize("account", ["acme", None, lambda: "acme"], ids=["named", "own", "computed"])
def test_charge_who_acts_inside_of_an_exempt_call_by_its_payer(account: Any) -> None:
    """What somebody else does in an exempt caller's call is paid from the account of its credential, or by nobody."""

    async def scene(metering: Metering) -> None:
        sources = [Wallet(payer=Payer("platform", account=account, credential=lambda: "key"))]
        async with charging(metering, caller=Caller("dev", exempt=True), sources=sources):
            async with charging(metering, 3, payer=None, line="free"):
                pass
            inside = charging(metering, 3, payer=None, line="sub", caller=Caller("eve"))
            if callable(account):
                with pytest.raises(PayerError, match="Say who pays"):
                    async with inside:
                        pass
            else:
                async with inside as inner:
                    assert (inner.payer, await inner.credential()) == (account or "ann", "key")
        assert await spent(metering) == {"acme": (0, 3), None: (3, 0)}.get(account, (0, 0))

    play(scene)


def test_change_the_payer_explicitly() -> None:
    """A call inside names its payer, or sources of a payer, and then nothing of the outer one's is mixed in (S0.24)."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, sources=SOURCES):
            async with charging(metering, 3, payer="ann") as named:
                assert (named.payer, named.paid_by) == ("ann", None)
                with pytest.raises(PayerError):
                    await named.credential()
            async with charging(metering, 3, payer=None, sources=[Wallet(payer=OWN)]) as chosen:
                assert (chosen.payer, chosen.paid_by) == ("acme", OWN)

    play(scene)


def test_inherit_nothing_but_who_pays_and_who_calls() -> None:
    """What a call holds, costs, says and reports is its own: nothing of the outer call's goes into it (S0.29)."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, per_token(output=1), hold=9) as outer:
            outer.attributes["effort"] = "max"
            outer.record(TokenUsage(output=5))
            async with charging(metering, per_token(output=1), hold=3, payer=None, line="sub") as inner:
                assert inner.held == 3 * CREDIT
                assert (inner.line, inner.attributes, inner.reports) == ("sub", {}, [])
                inner.record(TokenUsage(output=2))
        assert inner.receipt is not None
        assert outer.receipt is not None
        assert (inner.receipt.amount, outer.receipt.amount) == (2 * CREDIT, 5 * CREDIT)

    play(scene)


@pytest.mark.parametrize("where", ["nowhere", "in another metering", "after the call"])
def test_refuse_a_call_that_nobody_pays(where: str) -> None:
    """Without a payer and without an admitted call around it a charge is refused: nobody is guessed (S0.25)."""

    async def scene(metering: Metering) -> None:
        async def alone() -> None:
            with pytest.raises(PayerError, match="Say who pays"):
                async with charging(metering, payer=None):
                    raise AssertionError("It ran.")

        if where == "nowhere":
            await alone()
        elif where == "after the call":
            left = asyncio.Event()

            async def later() -> None:
                await left.wait()
                await alone()

            async with charging(metering):
                task = asyncio.create_task(later())
            left.set()
            await task
        else:
            async with Metering("memory://", sinks=()) as other:
                await other.grant("ann", 5, id="g")
                async with charging(other):
                    await alone()

    play(scene)


def test_payer_outranks_the_callers_own() -> None:
    """Who acts does not pay where a payer is named."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, caller=Caller("bob", payer="acme")) as call:
            assert (call.payer, call.caller.id) == ("ann", "bob")
        assert await spent(metering) == (2, 0)

    play(scene)


def test_payer_of_another_route_is_no_ones() -> None:
    """A call that shares a key with a route of other payers does not know that payer: no credential is guessed."""

    async def scene(metering: Metering) -> None:
        async with charging(metering, sources=SOURCES) as call:
            call.decision = Decision(call.id, 0.0, payer="acme", group="elsewhere", joined=True)
            with pytest.raises(PayerError, match="is paid by the payer 'elsewhere'"):
                await call.credential()

    play(scene)


def test_nobody_pays_before_admission() -> None:
    """A call that was not let in is paid by nobody."""

    async def scene(metering: Metering) -> None:
        block = charging(metering, 500, sources=SOURCES)
        with pytest.raises(CallRefused) as refused:
            await block.__aenter__()
        call = refused.value.call
        assert (call.paid_by, call.payer_switched) == (None, False)

    play(scene)
