"""
Standing: how a payer stands, for whoever shows it: what is left of allowances, what a call would cost and who pays.

Reads only, from the same declarations that the gate decides by (S4.2). Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Unpack, cast

from asgi_metering.admission import asked_of, foresee
from asgi_metering.amounts import Unit
from asgi_metering.caller import Caller
from asgi_metering.decisions import Reason, Refusal
from asgi_metering.errors import PayerError
from asgi_metering.holding import HoldSize
from asgi_metering.outside import planned, prepared
from asgi_metering.policies import ChargeOptions, Price
from asgi_metering.receipts import Balance
from asgi_metering.rules.admission import window_now
from asgi_metering.rules.decide import clamped
from asgi_metering.rules.operations import AllowanceSource
from asgi_metering.rules.state import BucketKey, State
from asgi_metering.stores.contract import AccountRows

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.metering import Metering
    from asgi_metering.policies import ChargePolicy
    from asgi_metering.sources import Payer, PaymentSource

__all__ = ["AllowanceStatus", "Previewed", "Standing", "allowance_statuses", "previewed"]


class AllowanceStatus(NamedTuple):
    """
    One allowance of one payer as it is now, in smallest parts of the unit (S0.13, S4.18).

    Attributes:
        name: The allowance's.
        payer, unit: The account.
        plan: By which the limit was chosen; None where nobody said one.
        used: Settled in the window.
        held: Set aside by calls that run; the gate counts these as well.
        limit: What the window allows to *plan*. Cut meanwhile, it may be below *used*, which is shown as it is.
        remaining: ``limit - used``, never negative.
        starts_at: When the window began, epoch seconds: its id. None where a rolling one begins with its next use.
        resets_at: When it ends.
    """

    name: str
    payer: str
    unit: str
    plan: str | None
    used: int
    held: int
    limit: int
    remaining: int
    starts_at: float | None
    resets_at: float | None


class Previewed(NamedTuple):
    """
    What a call would cost and who would pay, had it been asked for now (S0.37). Nothing was consumed.

    Attributes:
        admitted: Whether it would run.
        unit: What is counted.
        held: Smallest parts that it would set aside.
        available: What the paying source would have left then; None where nothing would be held.
        payer: Whose account would pay; the asked one where nothing would be held, or nobody can pay.
        paid_by: The `Payer` that would; None is the asked one itself.
        source: ``"wallet"``, or the allowance's name; None where nothing would be held.
        switched: Another payer than the first choice would pay: what a notice before the first paid call tells.
        joined: Another call of its charge key pays, or has paid in this window, so nothing more is held (S0.35).
        refusal: Why it would not run.
    """

    admitted: bool
    unit: str
    held: int
    available: int | None
    payer: str
    paid_by: Payer | None
    source: str | None
    switched: bool
    joined: bool
    refusal: Refusal | None


async def previewed(call: Call) -> Previewed:
    """
    What the gate would say to *call* now.

    Raises:
        StoreError: No answer came.
    """
    try:
        call.decision = decision = await foresee(call)
    except PayerError:
        return _refused(call, Refusal(Reason.PAYER, call.line))
    if decision.refusal is not None:
        return _refused(call, decision.refusal)
    if decision.replay is not None:
        return _refused(call, Refusal(Reason.REPLAYED, "idempotency"))
    return Previewed(
        True,
        call.unit.name,
        decision.held,
        decision.available,
        decision.payer or call.payer or "",
        call.paid_by,
        decision.source,
        call.payer_switched,
        decision.joined,
        None,
    )


def _refused(call: Call, refusal: Refusal) -> Previewed:
    return Previewed(False, call.unit.name, 0, None, call.payer or "", None, None, False, False, refusal)


async def allowance_statuses(call: Call, charge: ChargePolicy) -> list[AllowanceStatus]:
    """
    The allowances among the sources of *charge*, in their order, for the payer of *call*.

    Raises:
        PayerError: Whose they are could not be resolved.
        StoreUnavailableError: No answer came.

    One reading per account.
    """
    store = call.metering.store
    unit = call.metering.counted(charge.unit).name
    now, state = await store.read(AccountRows(call.payer or "", unit))
    states = {call.payer or "": state}
    plan = call.caller.plan if call.caller is not None else None
    found = []
    for index, source in enumerate(await _allowances(call, charge, now)):
        payer = source.payer or call.payer or ""
        if payer not in states:
            _, states[payer] = await store.read(AccountRows(payer, unit))
        # Of the time that the gate would see, which may be days ahead of a clock that was set back.
        seen = clamped(states[payer], (payer, unit), now)
        asked = source if seen == now else (await _allowances(call, charge, seen))[index]
        found.append(_status(states[payer], asked, (payer, unit, source.name), plan, seen))
    return found


async def _allowances(call: Call, charge: ChargePolicy, now: float) -> list[AllowanceSource]:
    return [source for source in await asked_of(call, charge, now) if isinstance(source, AllowanceSource)]


def _status(state: State, source: AllowanceSource, bucket: BucketKey, plan: str | None, now: float) -> AllowanceStatus:
    window = window_now(state, source, bucket, now)
    if window is None:
        raise AssertionError(f"the boundaries {source.boundaries} were made around {now} and miss it")
    payer, unit, name = bucket
    # A rolling window has not begun before its first use.
    has_begun = bool(source.boundaries) or (*bucket, window.start) in state.allowances
    return AllowanceStatus(
        name,
        payer,
        unit,
        plan,
        window.settled,
        window.held,
        source.limit,
        max(0, source.limit - window.settled),
        window.start if has_begun else None,
        window.end if has_begun else None,
    )


class Standing:
    """How payers stand. `Metering` is one that tells."""

    _units: dict[str, Unit]

    async def preview(
        self,
        payer: str,
        *,
        line: str,
        hold: HoldSize | None = None,
        price: Price | None = None,
        plan: str | None = None,
        caller: Caller | None = None,
        **options: Unpack[ChargeOptions],
    ) -> Previewed:
        """
        Ask what a call would cost and who would pay, without making it: nothing is held, counted or told (S0.37).

        Args:
            payer: Whose call it would be.
            line: The billing line.
            hold: As of `charge`.
            price: As of `charge`.
            options: As of `charge`, such as ``sources=``.
            plan: Of the payer, for allowances by plan.
            caller: Who would call, where a payer's account is computed from it; its own plan counts, if it has one.

        Raises:
            ConfigurationError: An argument that cannot work.
            AmountError: A price or hold that the unit cannot count.
            StoreUnavailableError: No answer came.

        One round trip. Others may take what is seen here before the call comes.
        """
        policy, call = prepared(_root(self), payer, planned(caller, payer, plan), line, hold, price, options)
        call.policy = policy
        await _root(self).start()
        return await previewed(call)

    async def allowances(
        self,
        payer: str,
        *,
        sources: Sequence[PaymentSource],
        unit: Unit | None = None,
        plan: str | None = None,
        caller: Caller | None = None,
    ) -> list[AllowanceStatus]:
        """
        How the allowances among *sources* stand: used, held, limit, remaining, and when they reset (S0.13, S4.18).

        Args:
            payer: Whose. An allowance that names a `Payer` is shown of its account.
            sources: The list that the routes have, so that limits come from one declaration (S4.2).
            unit: The metering's by default.
            plan: Of the payer; none gets the smallest limit, as at the gate.
            caller: As of `preview`.

        Raises:
            PayerError: Whose an allowance is could not be resolved.
            AmountError: A limit that the unit cannot count.
            StoreUnavailableError: No answer came.

        Changes nothing. One reading per account.
        """
        policy, call = prepared(
            _root(self), payer, planned(caller, payer, plan), "allowances", None, 0, {"sources": sources, "unit": unit}
        )
        if policy.charge is None:
            raise AssertionError("billable() makes a charge")
        await _root(self).start()
        return await allowance_statuses(call, policy.charge)

    async def balances(self, payer: str) -> dict[str, Balance]:
        """The `balance` of *payer* in each unit that is known here, by its name: those that routes and grants named."""
        return {unit.name: await _root(self).balance(payer, unit=unit) for unit in list(self._units.values())}


def _root(standing: Standing) -> Metering:
    """Whose payers they are: nothing else is one."""
    return cast("Metering", standing)
