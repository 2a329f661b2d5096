"""
One metered call: what handlers see of it, and its gate, which admits it once.

Knows no HTTP: the edge opens a call, tells it what it sees, and hands it to the runtime when it is over. What is kept
about it meanwhile is in `call_state`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Coroutine, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asgi_metering.amounts import exact_amount
from asgi_metering.asking import limit_allowed
from asgi_metering.call_state import CallState, Reported
from asgi_metering.caller import Caller
from asgi_metering.decisions import Decision, Refusal
from asgi_metering.errors import CallClosedError, ConfigurationError, IdentityError, PayerError, UsageError
from asgi_metering.policies import ALL_FEATURES, EndpointPolicy
from asgi_metering.prices import MAX_AFFORDABLE, FixedPrice, MeasuredPrice, UsagePrice
from asgi_metering.prices.costing import read_units
from asgi_metering.prices.values import EXACT, FLOOR
from asgi_metering.refusing import CallCut, CallRefused
from asgi_metering.rules.ending import Cause
from asgi_metering.sources import Allowance, Wallet
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.amounts import Amount
    from asgi_metering.guards import Part
    from asgi_metering.sources import Payer, PaymentSource

__all__ = ["BalanceStatus", "Call", "CallCut", "CallRefused"]

BalanceStatus: TypeAlias = Literal["ok", "warning", "blocked"]
"""How what is left of a balance is to be taken."""


NO_TOKENS = TokenUsage()

Affordable: TypeAlias = Literal["input", "output", "reasoning", "seconds", "images", "characters"]
"""What a call can be asked about: tokens by their kind, and units by names that prices usually have."""


class Call(CallState):
    """
    One call. Made by the middleware or by `Metering.charge`; handlers get it from `current_call`.

    Attributes:
        id: Unique; also the id of its hold, its receipt and its usage event.
        caller: Who calls; None until the gate asked, or where nobody is known.
        payer: Whose account pays; None until admitted.
        held: Smallest parts set aside.
        unit: What is counted.
        line: The billing line; empty on routes that are not billable.
        decision: What the store answered to its admission; None until then, and where nothing was asked of it.
        receipt: What the end did; None until the ledger answered.
        hold_lost: Its heartbeats did not come through for so long that its policy has ended its hold while it runs.
        attributes: What else the usage event says, for the handler to set: str, int, finite float or bool. What is none
            of these is told as text, with an alarm; None is left out.
    """

    _identified = False
    _inherited: Payer | None = None
    # Whether somebody waits for its admission; who came second waits for that.
    _asking = False
    _decided: asyncio.Future[None] | None = None
    # What `identify` answered by waiting, or why it answered nothing.
    _asked_who: Awaitable[object] | IdentityError | None = None

    # -- what handlers use ---------------------------------------------------------------------------------

    @property
    def admitted(self) -> bool:
        """Whether the call was let in and has not been refused."""
        return self.decision is not None and self.refusal is None

    @property
    def would_deny(self) -> Refusal | None:
        """
        Why the shadow parts of the route would have refused this call; None where they would not (S4.16).

        Also None as long as the store has not said, which nobody waits for: where it is reached over a network, this
        is known some milliseconds after the call has begun. What became of a call at last is on its usage event.
        """
        return None if self.beside is None else self.beside.would_deny

    @property
    def joined(self) -> bool:
        """
        Whether another call of its charge key pays for this one, or has paid; False for the one that pays.

        Source: S0.35 (whether what the key stands for was counted already).
        """
        return self.admitted and self.decision is not None and self.decision.joined

    def record(
        self,
        usage: TokenUsage = NO_TOKENS,
        *,
        model: str | None = None,
        provider: str | None = None,
        cost: Amount | None = None,
        units: Mapping[str, Amount] | None = None,
    ) -> None:
        """
        Report usage; several reports of one call add up. It outranks everything that was seen by itself.

        A report of zero is a report (S2.41); do not call this when nothing is known.

        Args:
            usage: Tokens of one call of a model, or of several.
            model: Which, for prices by name.
            provider: Whose.
            cost: What the provider says that it charges, in USD, for `model_prices`: LiteLLM's, ``cost=str(cost)``.
            units: What was used besides tokens, for prices such as `per_minute`: ``units={"seconds": "93.5"}``.

        Raises:
            AmountError: A cost or a number of units that is a float, negative, NaN, or no number.
            UsageError: *usage* is not a `TokenUsage`; the class itself refuses negative or absurd numbers.
            CallClosedError: The call has ended; the report is counted as late and not charged.
            CallCut: Nothing more can be held for it, by ``hold=slices(...)``. The report counts. Outside HTTP this is
                what ends the work; let it rise.
        """
        if not isinstance(usage, TokenUsage):
            raise UsageError(f"The usage {usage!r} is not a TokenUsage. Build one: TokenUsage(input=900, output=120).")
        if self.closed:
            self.metering.meters.count("usage_late", line=self.line)
            raise CallClosedError(f"Call {self.id!r} has ended, so its usage can no longer be reported.")
        # Names of an enum, say: no store could write them, nor tell them from their text.
        answered, whose = [None if name is None else str(name) for name in (model, provider)]
        told = None if cost is None else exact_amount(cost, "cost in USD")
        self.reports.append(Reported(usage, answered, whose, told, read_units(units) if units else {}))
        if self.growth is not None:
            self.growth.nudge()
            if self.growth.is_cut:
                raise self.cut()

    def fail(self, reason: str) -> None:
        """
        Say that the call failed although the response looks well: it is charged as a late error (S4.10).

        Args:
            reason: A short stable word for the usage event, such as ``"provider_overloaded"``.

        Raises:
            CallClosedError: The call has ended.
        """
        if self.closed:
            raise CallClosedError(f"Call {self.id!r} has ended, so it can no longer fail.")
        if self.failure is None:
            self.failure = str(reason)[:200]

    def affordable(self, kind: Affordable = "output") -> int:
        """
        How many tokens of *kind* this call's own hold still pays for: clamp ``max_tokens`` to it (`estimates.clamp`).

        ``"output"``, ``"input"`` or ``"reasoning"``; of a price for other units one of their names, such as
        ``"seconds"``.

        No round trip. What was used already counts: what the handler reported, else what upstream exchanges told, or
        showed while they run. For output the input of the request counts as used before it is: as the hold was
        estimated, or as the request shows where the hold is an amount, with its cache reads and writes, unless what
        was used costs more; all at the price of the service tier that the request asks for, if that is dearer, and
        behind the searches of the web that it allows, or that were made if these cost more. So that
        usage and as many tokens cost no more than the hold (DESIGN "A hold's size"). Where nothing is held because
        nothing is charged, or the price is not per token, the answer is a number without effect. A hold that grows pays
        for as many now, and may pay for more later; so it does for searches that are still to come.

        Raises:
            ConfigurationError: *kind* cannot be afforded one by one.
        """
        from asgi_metering.measuring import committed_usage

        price = self.price
        if price is None or isinstance(price, FixedPrice | UsagePrice) or self.exempt or not self.admitted:
            return MAX_AFFORDABLE
        try:
            used = committed_usage(self, price, expected=kind != "input")
            made = self._searching(price)
        except UsageError:
            # More than can be counted is more than any hold pays.
            return 0
        searching = made if self.growth is not None else max(made, self.searching)
        held = max(Decimal(0), EXACT.subtract(self.unit.whole(self.held), searching))
        return price.affordable(kind, FLOOR.divide(held, self.dearer), used)

    def _searching(self, price: MeasuredPrice) -> Decimal:
        """Whole units that the searches of the web cost which were made so far."""
        from asgi_metering.measuring import searches_made

        cost = getattr(price, "searching", None)
        made = Decimal(0) if cost is None else searches_made(self)
        return cost(made) if cost is not None and made else Decimal(0)

    @property
    def remaining(self) -> Decimal:
        """
        Whole units of this call's own hold that what it used so far leaves, never below 0; all of a fixed price's.

        No round trip; what counts as used is as of `affordable`, without the input that is still to come.
        """
        from asgi_metering.measuring import committed_usage

        held, price = self.unit.whole(self.held), self.price
        if price is None or isinstance(price, FixedPrice | UsagePrice) or self.exempt or not self.admitted:
            return held
        try:
            cost = EXACT.multiply(price.cost(committed_usage(self, price, expected=False)), self.dearer)
            return max(Decimal(0), held - cost - self._searching(price))
        except UsageError:
            return Decimal(0)

    def admit(self, *policies: Part | Amount, **arguments: Any) -> Coroutine[Any, Any, None]:
        """
        Ask for admission at an exact point of the handler: the explicit gate (S4.6). Await it there.

        Where the policies do not say, the line and what limits are counted by are those of the function that asks.

        Args:
            policies: What the decorators take: ``billable(2)``, ``rate_limited("60/minute")``; a bare amount is a
                fixed price.
            arguments: What callables of these policies may ask for, by name.

        Raises:
            CallRefused: Let it rise; the middleware answers it.
            CallClosedError: The call has ended.
            ConfigurationError: The call was admitted before.
        """
        from asgi_metering.decorators import gather

        # As if that function had been decorated: handlers that ask for themselves share no counts.
        asking = sys._getframe(1)
        short, module = asking.f_code.co_name, asking.f_globals.get("__name__", "")
        name = f"{module}.{asking.f_code.co_qualname.replace('<locals>.', '')}"
        return self.gate(gather(policies, name, arguments, line=short), arguments)

    @property
    def paid_by(self) -> Payer | None:
        """
        The `Payer` that pays, with its credential and header fields; None is the call's own payer.

        A call inside of another one has the same, unless it names its own (S0.27). Where nothing is held because
        nothing is charged, it is the first choice of the route (S0.26). None until admitted.

        Raises:
            PayerError: A call of another route with other payers pays, by a shared charge key.
        """
        decision = self.decision if self.admitted else None
        if decision is None:
            return None
        sources = self.charge.sources if self.charge is not None else ()
        if not decision.payer and sources:
            return sources[0].payer or self._inherited
        if not decision.group:
            return self._inherited
        for source in sources:
            if source.payer is not None and source.payer.name == decision.group:
                return source.payer
        raise PayerError(
            f"Call {self.id!r} is paid by the payer {decision.group!r}, which is none of its own route's. Name the "
            f"same payers wherever a charge key is shared."
        )

    @property
    def bequeathed(self) -> Payer | None:
        """The `Payer` of live charges inside of it: a price that is in the shadow says of none of them who pays it."""
        return self._inherited if self.is_shadow else self.paid_by

    @property
    def payer_switched(self) -> bool:
        """Whether another payer than the first choice of the route pays, since that one could not (S0.38)."""
        if not self.admitted or self.charge is None or self.decision is None or not self.decision.payer:
            return False
        return not self._pays(self.charge.sources[0])

    def counts_at_home(self, payer: Payer) -> bool:
        """Whether what *payer* allows is counted for the call's own payer: see ``each`` of `Allowance`."""
        sources = self.charge.sources if self.charge is not None else ()
        return any(source.each and source.payer is payer for source in sources)

    @property
    def payer_name(self) -> str | None:
        """By what name its route knows who pays; empty for the call's own payer, None where it names no `Payer`."""
        charge, decision = self.charge, self.decision
        if charge is None or not charge.has_payers or decision is None or not self.admitted or self.is_shadow:
            return None
        if decision.payer:
            return decision.group
        first = charge.sources[0].payer
        return "" if first is None else first.name

    async def credential(self) -> Any:
        """
        Ask for the credential of whoever pays this call: what its work is done with, along with `paid_by.headers`.

        Asked anew each time, and kept nowhere.

        Raises:
            PayerError: There is none, or its function failed. Let it rise: no other credential may stand in for it
                (S0.24, S0.25). Also where the call's own payer pays, for that one has no `Payer` object.
        """
        payer = self.paid_by
        if payer is None:
            raise PayerError(
                f"Call {self.id!r} has no payer with a credential. Name one in its sources: "
                f"Wallet(payer=Payer('own', credential=function))."
            )
        return await payer.credential_of(self, self.pending or {})

    @property
    def warning_level(self) -> int | None:
        """Smallest parts of the paying source below which what is left is worth a warning; None: never (S3.6)."""
        source = self._paying_source
        if isinstance(source, Allowance):
            return source.warning_level_of(self.unit, limit_allowed(self, source))
        return None if source is None else source.warning_level(self.unit)

    @property
    def _paying_source(self) -> PaymentSource | None:
        decision, charge = self.decision, self.charge
        if decision is None or charge is None or decision.source is None:
            return None
        for source in charge.sources:
            if source.name == decision.source and self._pays(source):
                return source
        return None

    def _pays(self, source: PaymentSource) -> bool:
        """Whether *source* belongs to the payer that pays."""
        return self.decision is not None and self.decision.group == ("" if source.payer is None else source.payer.name)

    @property
    def balance_status(self) -> BalanceStatus:
        """
        How the paying source stands after this call's hold: ``ok``, ``warning`` or ``blocked``.

        ``blocked``: nothing is left for another call, although this one was let in. ``ok`` where nothing was held.
        Responses say the same in ``Metering-Available``. Source: S3.6.
        """
        available = self.decision.available if self.decision is not None else None
        if available is None:
            return "ok"
        level = self.warning_level
        left = available + self.overdraft
        return "blocked" if left <= 0 else "warning" if level is not None and available < level else "ok"

    @property
    def overdraft(self) -> int:
        """Smallest parts that the paying wallet may owe: with these left it is not at its end."""
        source = self._paying_source
        if not isinstance(source, Wallet) or not source.overdraft:
            return 0
        return self.unit.parts(source.overdraft, "overdraft")

    # -- the gate ------------------------------------------------------------------------------------------

    def preset(self, caller: Caller, payer: str, inherited: Payer | None = None) -> None:
        """
        Say who calls and who pays, where no connection can be asked.

        Args:
            caller: Who calls.
            payer: Whose account pays.
            inherited: The `Payer` of the call around this one.
        """
        self.caller, self.payer, self._inherited = caller, payer, inherited
        self._identified = True

    def known(self, caller: Caller | None) -> None:
        """Take who calls from whoever asked before, where anybody is known; else it may be known by now."""
        if caller is not None:
            self.caller, self._identified = caller, True

    def known_as_nobody(self) -> None:
        """Have nobody asked who calls, where nothing depends on it."""
        self._identified = True

    def identify_now(self) -> bool:
        """Ask who calls, once; False where the answer is to be waited for, or none."""
        if self._identified or self._asked_who is not None:
            return self._identified
        try:
            answer = self.metering.who(self.opening.origin)
        except IdentityError as failure:
            self._asked_who = failure
            return False
        if answer is None or isinstance(answer, Caller):
            self.caller, self._identified = answer, True
            return True
        self._asked_who = answer
        return False

    async def identify(self) -> Caller | None:
        """Who calls, asked once per call (DESIGN 2). Raises `IdentityError`."""
        if not self.identify_now():
            # Whoever is cancelled here, or refused by it, may ask again.
            asked, self._asked_who = self._asked_who, None
            if isinstance(asked, IdentityError):
                raise asked
            if asked is not None:
                self.caller = await self.metering.identified(asked)
            self._identified = True
        return self.caller

    async def gate(self, policy: EndpointPolicy, arguments: Mapping[str, Any]) -> None:
        """
        Admit the call under *policy*, or raise.

        Reaching the gate twice with one policy is one admission (pitfall 8); with another it is a mistake: a call is
        charged once, and work inside it that has a price of its own is a `metering.charge()`.

        Raises:
            CallRefused: It may not run; nothing was consumed.
            CallClosedError: It has ended, also while it waited for its admission, which is then given back.
            ConfigurationError: It is admitted under another policy already.

        In a free request (HEAD, OPTIONS) everything passes and nothing is asked, the explicit gate included.
        """
        if not self.passes(policy, arguments):
            await self.ensure()

    def passes(self, policy: EndpointPolicy, arguments: Mapping[str, Any]) -> bool:
        """
        Bind *policy* and admit the call, where nothing has to wait; else False, and `ensure` does the rest.

        Apart from `gate`, which says what it raises, for the wrappers: nearly every call passes here, and a coroutine
        for each would cost as much as several of its steps.
        """
        opening = self.opening
        if opening.free and opening.stays_free():
            opening.check()
            return True
        # Whoever came second finds by `ensure` how far the first one is.
        return self._bind(policy, arguments) and self.metering.admit_now(self, policy, opening.features)

    def expect(self, policy: EndpointPolicy, arguments: Mapping[str, Any]) -> None:
        """
        Bind *policy* to the call without asking yet: generator endpoints are asked for at their first byte.

        Whatever start of a response comes then is the generator's, and gives way to a refusal (pitfalls 7, 15).
        """
        self._bind(policy, arguments)
        self.deferred = True

    def _bind(self, policy: EndpointPolicy, arguments: Mapping[str, Any]) -> bool:
        """Bind *policy*; False where it was bound before."""
        if self.closed or self.opening.closed:
            raise CallClosedError(f"Call {self.id!r} has ended; it can admit nothing more.")
        if self.policy is not None:
            if self.policy is not policy or self.pending is None:
                raise ConfigurationError(
                    f"Endpoint {policy.name!r} was called inside a call that is metered as {self.policy.name!r} "
                    f"already. Use metering.charge() for work inside a call that has a price of its own."
                )
            return False
        if policy.needs or self.opening.features is not ALL_FEATURES:
            self.metering.check_features(policy, self.opening)
        self.policy = policy
        self.pending = arguments
        return True

    async def ensure(self) -> None:
        """
        Await the one admission of this call; whoever comes second waits for the first (pitfall 8).

        No task and no shield: if the caller is cancelled while the store decides, the pump gives back by id what the
        store decided (pitfall 29).
        """
        if self._asking:
            if self._decided is None:
                self._decided = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._decided)
            await self.ensure()
        elif self.refusal is not None:
            raise self._refusal(self.refusal)
        elif self.decision is None and self.pending is not None:
            self._asking = True
            try:
                await self.metering.admit(self, self.pending)
            finally:
                # Also when it failed or was cancelled: who waits then asks again, or meets the closed call.
                self._asking = False
                if self.decision is None and self.refusal is None:
                    # What was asked is given back under the old id, perhaps only later: not to be mixed with.
                    self.id = self.metering.new_id()
                waiting, self._decided = self._decided, None
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)

    def refused(self, refusal: Refusal, decision: Decision | None = None) -> CallRefused:
        """Mark the call as refused and answer the exception to raise."""
        self.refusal = refusal
        self.decision = decision
        self.metering.refused(self, refusal)
        return self._refusal(refusal)

    def _refusal(self, refusal: Refusal) -> CallRefused:
        """What rises: of limits that somebody else says, whatever that one knows its own refusals by."""
        for rate in self.policy.rates if self.policy is not None else ():
            told = None if rate.asker is None else rate.asker.refused(self, refusal, self.decision)
            if told is not None:
                return told
        return self.opening.refusal_of(self, refusal)

    def cut(self) -> CallCut:
        """End the call here, unless it has ended otherwise; answers what stops its work."""
        if self.cause is None:
            self.see(Cause.CUT)
            self.metering.meters.count("cuts", line=self.line)
        return CallCut(self)
