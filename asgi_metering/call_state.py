"""
What metering keeps about one call while it runs: what was decided, what was seen of it, and who waits for its end.

The gate, the edge and the runtime write it; handlers see a `Call`. Decides nothing and asks nobody: which cause counts
and that an end comes once are all the rules it has. Nothing here is kept between calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.attributes import Scalar
from asgi_metering.decisions import Decision, Refusal
from asgi_metering.exchanges import Exchanges
from asgi_metering.policies import ChargePolicy, EndpointPolicy
from asgi_metering.prices import FixedPrice, MeasuredPrice
from asgi_metering.receipts import Receipt
from asgi_metering.rules.ending import Cause
from asgi_metering.rules.operations import Admit, IdempotencyAsk
from asgi_metering.usage import TokenUsage, UsageReader, UsageReport

if TYPE_CHECKING:
    from asgi_metering.amounts import Amount
    from asgi_metering.beside import Beside
    from asgi_metering.caller import Caller
    from asgi_metering.growing import Growth
    from asgi_metering.messages import MessageLimits
    from asgi_metering.opening import Opening
    from asgi_metering.runtime import Runtime
    from asgi_metering.tally import Tally
    from asgi_metering.witnesses import Witnesses

__all__ = ["CallState", "Observer", "Reply", "Reported"]


class Reply(Protocol):
    """The answer of a call as it passes to the client."""

    def told(self) -> Mapping[str, Any] | None:
        """The answer, JSON-safe, for repeats of the request; None where it was not kept whole."""

    def lose(self) -> None:
        """Say that some of it passed unseen."""


class Observer(Protocol):
    """Watches the body that passes to the client, off its path; or the messages of a session."""

    @property
    def answers(self) -> Exchanges | None:
        """Of a session each answer of a model in its messages so far; None for a body, which is one."""

    def passed(self, count: int) -> None:
        """Note that *count* more bytes have passed since the last time; called now and then."""

    def digest(self) -> bool:
        """Read some of what was kept, if that is much; whether it still is. Called now and then."""

    def report(self) -> UsageReport | None:
        """What the body has reported so far; None if nothing."""

    async def read_on(self) -> None:
        """Read most of what was kept for its text, and let others have their turns meanwhile."""

    def text_reader(self) -> UsageReader:
        """The reader that has seen everything that passed and keeps its text."""


@dataclass(frozen=True, slots=True)
class Reported:
    """Usage as the handler reported it."""

    usage: TokenUsage
    model: str | None = None
    provider: str | None = None
    cost: Decimal | None = None
    units: Mapping[str, Decimal] = field(default_factory=dict)


class CallState:
    """
    The state of one call, from its first use to what the ledger answered to its end.

    What a handler may read of it is told at `Call`.

    Attributes:
        metering: The metering that this call belongs to.
        runtime: The background that looks after it, of its event loop; None until it is admitted.
    """

    # Apart from what it may get: Python makes a dict for each object that has more than 30 attributes besides these.
    __slots__ = ("__dict__", "attributes", "exchanges", "id", "metering", "opening", "reports", "started_at")

    # On the class: what a call never has costs it nothing, and most have little of this.
    runtime: Runtime | None = None
    caller: Caller | None = None
    payer: str | None = None
    # Accounts of the payers that the sources name, by their names.
    accounts: Mapping[str, str] = MappingProxyType({})
    # What allowances allow that ask a function, by their ids: the same for all of one decision.
    allowed: Mapping[int, Amount] = MappingProxyType({})
    policy: EndpointPolicy | None = None
    charge: ChargePolicy | None = None
    price: FixedPrice | MeasuredPrice | None = None
    unit: Unit = CREDITS
    line = ""
    held = 0
    # How long its hold lives without a heartbeat.
    ttl_s = 0.0
    estimate: TokenUsage | Decimal | None = None
    # What the request asks for in tokens, also where the hold is an amount; None for a fixed price.
    asked: TokenUsage | None = None
    # By what its tokens are multiplied in the service tier that the request asks for, if that is dearer.
    dearer = Decimal(1)
    # That tier; None where it is no dearer.
    asked_service: str | None = None
    # Whole units that the searches of the web may cost which the request allows.
    searching = Decimal(0)
    decision: Decision | None = None
    refusal: Refusal | None = None
    # Whether its refusal is answered by the application, with any status.
    told_by_app = False
    pending: Mapping[str, Any] | None = None
    deferred = False
    cause: Cause | None = None
    # What has kept its end from being booked so far.
    unbooked: Exception | None = None
    status: int | None = None
    first_byte = False
    failure: str | None = None
    # Its client left, and its handler finished all the same.
    drained = False
    closed = False
    exempt = False
    observer: Observer | None = None
    # What libraries that watch its upstream calls tell of them; None until one does.
    witnesses: Witnesses | None = None
    observed_parts = 0
    receipt: Receipt | None = None
    # In seconds of its event loop, as is its last beat; 0 until it is looked after.
    watched_since = 0.0
    last_beat = 0.0
    is_beating = False
    trace: Mapping[str, str] = MappingProxyType({})
    facts: Mapping[str, Any] = MappingProxyType({})
    # How the session stands that it continues, of which it is not charged: whose it is.
    continues: Decision | None = None
    has_hold = False
    hold_lost = False
    # Admitted at once by a plain plan (`plans`): its price is fixed, if it has one, and each call is charged by itself;
    # nothing about it is measured, weighed, shared, kept for repeats or in the shadow, and its hold does not grow.
    is_plain = False
    # Without the store: its charge that waits in the journal, and the id of its local limits.
    queued: Admit | None = None
    local = ""
    # How its hold grows while it runs; None for one that never does.
    growth: Growth | None = None
    # What a session has used that is charged per message or second; what each of its messages is counted by.
    tally: Tally | None = None
    message_limits: MessageLimits | None = None
    # What goes on beside it: shadow parts, and what it takes of providers; None for most.
    beside: Beside | None = None
    # What makes it run once, and its answer for repeats; the hashed key of the calls that it is charged with.
    once: IdempotencyAsk | None = None
    reply: Reply | None = None
    shared: str | None = None
    # Who waits for its end; None once the ledger has answered.
    _endings: tuple[asyncio.Future[Receipt | None], ...] | None = ()

    def __init__(self, opening: Opening) -> None:
        metering = self.metering = opening.metering
        self.opening = opening
        self.id = metering.new_id()
        self.started_at = time.time()
        self.reports: list[Reported] = []
        self.exchanges = Exchanges()
        self.attributes: dict[str, Scalar] = {}

    @property
    def needs_end(self) -> bool:
        """Whether its end has to be told to the ledger, to the audit of free work, or to what goes on beside it."""
        return self.has_hold or self.charge is not None or bool(self.local) or self.beside is not None

    @property
    def beats(self) -> bool:
        """Whether somebody has to hear what it uses while it runs: the store, or the journal that it waits in."""
        return self.has_hold or self.queued is not None

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for the end."""
        return bool(self._endings)

    @property
    def counts_usage(self) -> bool:
        """Whether what it uses matters: to its price, or to a limit that it is counted by."""
        if self.charge is not None and self.charge.measured:
            return True
        return self.policy is not None and "rates" in self.opening.features and self.policy.weighs

    @property
    def is_shadow(self) -> bool:
        """Whether its price is in the shadow: nothing of it is charged."""
        return self.beside is not None and self.beside.charge is not None

    @property
    def is_refused(self) -> bool:
        """Whether the gate said no."""
        return self.refusal is not None

    @property
    def is_repeat(self) -> bool:
        """Whether the gate said no because the same request ran before, whose answer this one gets."""
        return self.refusal is not None and self.decision is not None and self.decision.replay is not None

    def see(self, cause: Cause) -> None:
        """Note why the call ends; only the first cause counts (DESIGN "End of call")."""
        if self.cause is None:
            self.cause = cause

    @property
    def lack(self) -> Refusal | None:
        """Why the call may not run, or not run on; None where it may."""
        return self.refusal if self.growth is None or not self.growth.is_cut else self.growth.refusal

    def expects_ending(self) -> asyncio.Future[Receipt | None]:
        """A future of the receipt, for who has to wait for the end; None where the end could not be booked."""
        future: asyncio.Future[Receipt | None] = asyncio.get_running_loop().create_future()
        if self._endings is None:
            future.set_result(self.receipt)
        else:
            self._endings = (*self._endings, future)
        return future

    def waits_for(self, failure: Exception) -> None:
        """Note what keeps its end from being booked so far."""
        self.unbooked = failure

    def ended(self, receipt: Receipt | None) -> None:
        """The ledger has answered."""
        self.receipt = receipt
        endings, self._endings = self._endings, None
        if endings:
            for future in endings:
                if not future.done():
                    future.set_result(receipt)
        self.opening.let_go()

    @property
    def has_ended(self) -> bool:
        """Whether the ledger has answered to its end, or it was never told of one."""
        return self._endings is None or not self.needs_end
