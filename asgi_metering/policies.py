"""
Policies: what the decorators write down for one endpoint.

Immutable once an endpoint is decorated. Every policy argument is a value, a callable or an async callable of the
endpoint's own arguments; a callable names the ones it wants, and `call` for the call itself. Knows nothing of how a
policy is carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, TypedDict

from asgi_metering.amounts import Amount, Unit
from asgi_metering.arguments import From
from asgi_metering.chosen import ConfiguredLimits, LimitByPlan, LimitReading
from asgi_metering.errors import ConfigurationError
from asgi_metering.holding import HoldPolicy
from asgi_metering.names import check_name
from asgi_metering.prices import FixedPrice, MeasuredPrice
from asgi_metering.rates import RateLimit
from asgi_metering.sources import PaymentSource, Wallet
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call, CallRefused
    from asgi_metering.caller import Caller
    from asgi_metering.decisions import Decision, Refusal
    from asgi_metering.guards import Part
    from asgi_metering.rules.operations import LimitAsk

__all__ = [
    "ESTIMATE",
    "ChargeKey",
    "ChargeOptions",
    "ChargePolicy",
    "ComputedLimit",
    "ConcurrencyLimit",
    "CreditsDown",
    "EndpointPolicy",
    "ErrorShape",
    "Idempotency",
    "LimitAsker",
    "OnExcess",
    "Per",
    "Price",
    "RatePolicy",
    "RatesDown",
    "UpstreamPolicy",
    "read_price",
]

ErrorShape: TypeAlias = Literal["problem", "openai", "anthropic"]
"""The shape of refusals and in-band errors of a route."""

ERROR_SHAPES: tuple[ErrorShape, ...] = ("problem", "openai", "anthropic")

Per: TypeAlias = Literal["call", "message", "second"]
"""What is charged or counted: the call as a whole or, of a WebSocket, each message that comes in, or each second."""

OnExcess: TypeAlias = Literal["close", "drop", "answer"]
"""What becomes of a message over its limit: the WebSocket is closed, or it goes on without it, told or untold."""


MAX_REMEMBERED_S = 30 * 86_400
"""A month: who repeats a request later has made another one."""

MAX_STORED_BODY = 1_048_576
"""Bytes of an answer that may be kept for its repeats: a store is no file server."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """
    Run a request once per ``Idempotency-Key``, and answer its repeats from what it did.

    Args:
        ttl_s: Seconds that a key is remembered, from its first request on.
        store_body: Bytes up to which the body of an answer, streamed or not, is kept and sent again. A larger one, or
            any where this is None, is stood for by the receipt, as JSON.
        required: Answer 400 to a request without a key.
        fingerprint: Computes from the endpoint's arguments what tells this request from another one of its method,
            path, query and caller: a str, bytes or int. By default it is the body as received.

    Raises:
        ConfigurationError: Seconds or bytes out of bounds, or what is no function.

    Source: draft-ietf-httpapi-idempotency-key-header, S3.15.
    """

    ttl_s: float = 86_400.0
    store_body: int | None = None
    required: bool = False
    fingerprint: Callable[..., Any] | From | None = None

    def __post_init__(self) -> None:
        seconds, most = self.ttl_s, self.store_body
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_REMEMBERED_S:
            raise ConfigurationError(
                f"A key cannot be remembered for ttl_s={seconds!r}. Use seconds above 0, up to {MAX_REMEMBERED_S}."
            )
        if most is not None and (type(most) is not int or not 0 < most <= MAX_STORED_BODY):
            raise ConfigurationError(
                f"store_body={most!r} is no size of a body. Use an int from 1 to {MAX_STORED_BODY}, or None."
            )
        if type(self.required) is not bool:
            raise ConfigurationError(f"required={self.required!r} is no bool. Use True or False.")
        if self.fingerprint is not None and not isinstance(self.fingerprint, From):
            if not callable(self.fingerprint):
                raise ConfigurationError(f"fingerprint={self.fingerprint!r} cannot be called. Pass a function.")
            object.__setattr__(self, "fingerprint", From(self.fingerprint, "fingerprint"))


ChargePer: TypeAlias = Literal["day", "week", "month"]
"""A calendar window in which a charge key is charged once."""


@dataclass(frozen=True, slots=True)
class ChargeKey:
    """
    What makes several requests one charge.

    Attributes:
        key: Computes the key, or names the request's header field that has it. Without a key a call pays for itself.
        per: The window: a calendar's, or as many seconds from the first call on.
        zone: Whose calendar counts.
    """

    key: From | str
    per: ChargePer | float = "day"
    zone: str = "UTC"


Price: TypeAlias = Amount | FixedPrice | MeasuredPrice | Callable[..., Any]
"""What a user may write as a price."""


OnMissingUsage: TypeAlias = Literal["estimate", "observed", "hold", "none"]
OnError: TypeAlias = Literal["none", "usage", "observed", "estimate", "hold"]
OnLateError: TypeAlias = Literal["none", "observed", "hold"]
OnDisconnect: TypeAlias = Literal["observed", "none", "usage", "estimate", "hold", "drain"]
OnEarlyDisconnect: TypeAlias = Literal["observed", "none", "estimate", "hold", "drain"]
OnCut: TypeAlias = Literal["observed", "hold"]
OnAbort: TypeAlias = Literal["observed", "none", "hold"]
CreditsDown: TypeAlias = Literal["deny", "queue", "allow"]
RatesDown: TypeAlias = Literal["deny", "local", "allow"]
# What a user may write per row of `rules.ending.END_OF_CALL`, which a test compares with these.


class ChargeOptions(TypedDict, total=False):
    """
    What `billable` takes and means something outside HTTP too.

    Keys and ids are these themselves here, 1 to 255 printable characters: ``charge_key`` counts the calls of payer and
    line that bring it once per window, requests included; work with an ``idempotency_key`` is done once in 24 hours per
    payer and line, as `Idempotency` says. ``requires`` is what `requires_upstream` answers, one or several;
    ``limits`` what `rate_limited` answers, whose slots are taken for as long as the work lasts.
    """

    unit: Unit | None
    sources: Sequence[PaymentSource] | None
    on_missing_usage: OnMissingUsage | None
    on_error: OnError | None
    on_late_error: OnLateError | None
    on_disconnect: Literal["observed", "none", "usage", "estimate", "hold"] | None
    on_cut: OnCut | None
    on_abort: OnAbort | None
    usage: str | None
    ttl_s: float
    grace_s: float
    charge_key: str | None
    charge_per: ChargePer | float
    charge_zone: str
    idempotency_key: str | None
    request_id: str | None
    session_id: str | None
    on_store_down: CreditsDown | None
    shadow: bool
    requires: Part | Sequence[Part] | None
    limits: Part | Sequence[Part] | None


def read_price(price: Any) -> FixedPrice | MeasuredPrice | From:
    """
    Read what a user wrote as a price: an amount, a measured price, or a callable of the endpoint's arguments.

    Raises:
        AmountError: An amount that is not usable.
        ConfigurationError: A callable that takes parameters by position.
    """
    if isinstance(price, FixedPrice | MeasuredPrice):
        return price
    if callable(price):
        return From(price, "price")
    return FixedPrice.of(price)


@dataclass(frozen=True, slots=True)
class ChargePolicy:
    """
    What one endpoint charges, and how.

    Attributes:
        price: Fixed, measured, or computed from the endpoint's arguments.
        line: The billing line; the endpoint's own name by default.
        unit: None is the metering's unit.
        hold: How much a measured price sets aside.
        sources: Where the units come from, in order.
        payer: Who pays, from the endpoint's arguments; None is the caller's payer.
        end: What is charged however the call ends: an `EndPolicy`, kept opaque here.
        errors: The shape of refusals.
        customise: Rewrites the body of a refusal, for clients that expect other fields.
        dialect: Names the usage dialect where the shape alone would mislead; None detects it.
        forward_quota_headers: Let the provider's own quota fields pass to the client.
        ttl_s: Seconds that a hold lives without a heartbeat.
        grace_s: Seconds in doubt before the policy ends it.
        idempotency: Run once per ``Idempotency-Key``; None ignores the field.
        once: The idempotency key of work outside HTTP, which has no field.
        key: Charge once for all calls of a key; None charges each.
        skip_if: Tells the calls that are not charged.
        on_store_down: What happens without an answer of the store; None is what the metering says.
        per: What the price is for; other than ``"call"`` a WebSocket alone can be charged by.
        shadow: Whether it only tells what it would have charged, or refused.
        callers: Types of callers that are charged; None is every caller.
        count: Says how much of each unit was used, from what the endpoint returned as well.
        request_id, session_id: What tells the application's own ids: computed, or the name of a header field.
        has_payers: Whether any source names a `Payer`.
        has_levels: Whether any source warns of its end, or lets its payer go beyond it.
    """

    price: FixedPrice | MeasuredPrice | From
    line: str
    end: Any
    unit: Unit | None = None
    hold: HoldPolicy = HoldPolicy()
    sources: tuple[PaymentSource, ...] = (Wallet(),)
    payer: From | None = None
    errors: ErrorShape = "problem"
    customise: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, str]]] | None = None
    dialect: str | None = None
    forward_quota_headers: bool = False
    ttl_s: float = 60.0
    grace_s: float = 30.0
    idempotency: Idempotency | None = None
    once: str | None = None
    key: ChargeKey | None = None
    skip_if: From | None = None
    on_store_down: CreditsDown | None = None
    per: Per = "call"
    shadow: bool = False
    callers: frozenset[str] | None = None
    count: From | None = None
    request_id: From | str | None = None
    session_id: From | str | None = None
    has_levels: bool = field(init=False, repr=False, compare=False)
    has_payers: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_levels", any(source.has_level for source in self.sources))
        object.__setattr__(self, "has_payers", any(source.payer is not None for source in self.sources))

    @property
    def drains(self) -> bool:
        """Whether its handler may go on for a client that left."""
        return bool(getattr(self.end, "drains", ()))

    @property
    def correlates(self) -> bool:
        """Whether it finds ids of the application's own."""
        return self.request_id is not None or self.session_id is not None

    def names(self, caller: Caller | None) -> bool:
        """Whether *caller* is one of those whom it charges."""
        return self.callers is None or (caller is not None and caller.type in self.callers)

    @property
    def measured(self) -> bool:
        """Whether the price depends on usage."""
        # Not isinstance(..., MeasuredPrice): checking a protocol costs more than an admission.
        return not isinstance(self.price, FixedPrice | From)

    def callables(self) -> tuple[From, ...]:
        """Everything that is computed from the endpoint's arguments."""
        fingerprint = self.idempotency.fingerprint if self.idempotency is not None else None
        key = self.key.key if self.key is not None else None
        asked = (self.price, self.payer, self.skip_if, key, fingerprint, self.request_id, self.session_id)
        payers = [source.payer for source in self.sources if source.payer is not None]
        computed = [part for payer in payers for part in payer.callables()]
        return (*(value for value in asked if isinstance(value, From)), *self.hold.callables(), *computed)


@dataclass(frozen=True, slots=True)
class ConcurrencyLimit:
    """At most *limit* calls at once: per caller, or of everybody together (level ``"global"``)."""

    limit: int
    level: Literal["caller", "global"] = "caller"

    def __post_init__(self) -> None:
        if type(self.limit) is not int or self.limit < 0:
            raise ConfigurationError(f"The concurrency {self.limit!r} is not an int from 0 up.")


class LimitAsker(Protocol):
    """Says of each call what limits it is counted by, in the words of the store: another package's rules, say."""

    async def asks(self, call: Call, arguments: Mapping[str, Any], now: float) -> Sequence[LimitAsk]:
        """
        What to ask for *call*, of an endpoint with these *arguments*, around *now*.

        Every key begins with the scope of the policy, and ``|``.
        """

    def locally(self, call: Call) -> Sequence[LimitAsk]:
        """What it is counted by in this process alone, where the store has no answer to what was asked."""

    def refused(self, call: Call, refusal: Refusal, decision: Decision | None) -> CallRefused | None:
        """What rises where *call* is refused by a limit of its own; None where it was another one."""

    def texts(self) -> Sequence[tuple[str, str]]:
        """Its limits as they may be listed, each with its strategy."""


@dataclass(frozen=True, slots=True)
class ComputedLimit:
    """A limit that is computed for each call: its text, or several (S4.17)."""

    function: From
    reading: LimitReading = LimitReading()


@dataclass(frozen=True, slots=True)
class RatePolicy:
    """
    Rate and concurrency limits that share one key.

    Attributes:
        limits: In the order written.
        concurrency: Slots per key, or for everybody.
        key: One of `KEYS`, ``"attribute:..."``, or computed from the endpoint's arguments.
        scope: Limits of equal scope and window share their counts; an endpoint's own name by default.
        cost: What one call takes of each request limit; a number, or computed.
        errors: The shape of refusals where no charge policy says.
        on_store_down: As of `ChargePolicy`.
        chosen: Limits that are looked up for each call, besides *limits*.
        level: Names the key in refusals and limits; empty where nobody gave it a name.
        shares: Whether the scope was given, so that other endpoints may count in it, each by its own limit.
        methods: HTTP methods that are counted; empty for all.
        per_method: Whether each of them is counted apart.
        exempt_when: Tells the calls that are not counted.
        overrides: Whether default limits of a middleware give way to it.
        per: What is counted: ``"call"``, or each ``"message"`` of a WebSocket.
        on_excess: What becomes of a message too many.
        asker: Says the limits of each call, instead of all of these; None where they say all.
        shadow: Whether it only tells what it would have refused.
    """

    limits: tuple[RateLimit, ...]
    scope: str
    concurrency: tuple[ConcurrencyLimit, ...] = ()
    key: str | From = "caller"
    cost: int | From = 1
    errors: ErrorShape = "problem"
    on_store_down: RatesDown | None = None
    chosen: tuple[LimitByPlan | ConfiguredLimits | ComputedLimit, ...] = ()
    level: str = ""
    shares: bool = False
    methods: frozenset[str] = frozenset()
    per_method: bool = False
    exempt_when: From | None = None
    overrides: bool = True
    asker: LimitAsker | None = None
    shadow: bool = False

    @property
    def is_selective(self) -> bool:
        """Whether there are calls of its endpoint that it does not count, or counts apart by method."""
        return bool(self.methods) or self.per_method or self.exempt_when is not None

    per: Per = "call"
    on_excess: OnExcess = "close"

    def callables(self) -> tuple[From, ...]:
        """Everything that is computed from the endpoint's arguments."""
        limits = (each.function for each in self.chosen if isinstance(each, ComputedLimit))
        return tuple(value for value in (self.key, self.cost, self.exempt_when, *limits) if isinstance(value, From))


ALL_FEATURES: Final = frozenset({"events", "quotas", "rates", "credits"})
"""What layers may enable; the whole stack enables all."""

ESTIMATE: Final = "estimate"
"""The tokens that the request itself asks for."""


@dataclass(frozen=True, slots=True)
class UpstreamPolicy:
    """
    What a provider must have left for us before a call of the endpoint is let in.

    Attributes:
        provider: As `Metering.upstream_client` names it.
        tokens: What the call takes: of both kinds together, or apart in a `TokenUsage`; `ESTIMATE`, or computed. None
            is unknown.
        requests: How many requests it makes there.
        label: Which of several keys of the provider, by name, or computed.
        models: That the call asks for there, by name; or computed, a text, several or None. None are any.
        errors: The shape of refusals where neither a charge nor a limit says.
        shadow: Whether it only tells what it would have refused.
    """

    provider: str
    tokens: int | TokenUsage | From | Literal["estimate"] | None = None
    requests: int = 1
    label: str | From | None = None
    errors: ErrorShape = "problem"
    shadow: bool = False
    models: tuple[str, ...] | From = ()

    def callables(self) -> tuple[From, ...]:
        """Everything that is computed from the endpoint's arguments."""
        return tuple(value for value in (self.tokens, self.label, self.models) if isinstance(value, From))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class EndpointPolicy:
    """
    Everything that the decorators said of one endpoint.

    Attributes:
        name: How the endpoint is called in answers, metrics and audits; never a path (pitfall 39).
        charge: None if it is not billable.
        rates: In the order of the decorators, outermost first.
        upstreams: What providers must have left, likewise.
        weighs: Whether a limit takes what the call uses, such as tokens.
        is_selective: Whether there are calls that some of its limits do not count.
        gated: Those of the rates that the call is let in by.
        messages: Those that each message of a WebSocket is let in by.
        needs: ``"websocket"`` or ``"http"``, where it means nothing to the other one; else empty.
        has_beside: Whether anything goes on beside its calls: shadow parts, or a provider's headroom.
        errors: The shape of refusals: the charge's, else that of the first limits, or of what a provider must have
            left.
    """

    name: str
    charge: ChargePolicy | None = None
    rates: tuple[RatePolicy, ...] = ()
    upstreams: tuple[UpstreamPolicy, ...] = ()
    weighs: bool = field(init=False, repr=False, compare=False)
    is_selective: bool = field(init=False, repr=False, compare=False)
    gated: tuple[RatePolicy, ...] = field(init=False, repr=False, compare=False)
    messages: tuple[RatePolicy, ...] = field(init=False, repr=False, compare=False)
    needs: str = field(init=False, repr=False, compare=False)
    has_beside: bool = field(init=False, repr=False, compare=False)
    errors: ErrorShape = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fixed = [limit.meter for rates in self.rates for limit in rates.limits]
        by_plan = [each.meter for rates in self.rates for each in rates.chosen if isinstance(each, LimitByPlan)]
        object.__setattr__(self, "weighs", any(meter != "requests" for meter in (*fixed, *by_plan)))
        object.__setattr__(self, "is_selective", any(rates.is_selective for rates in self.rates))
        messages = tuple([rates for rates in self.rates if rates.per != "call"]) if self.rates else ()
        gated = tuple([rates for rates in self.rates if rates.per == "call"]) if messages else self.rates
        object.__setattr__(self, "gated", gated)
        object.__setattr__(self, "messages", messages)
        charge, needs = self.charge, ""
        if messages or (charge is not None and charge.per != "call"):
            needs = "websocket"
        elif charge is not None and (charge.drains or (charge.idempotency is not None and charge.once is None)):
            needs = "http"
        object.__setattr__(self, "needs", needs)
        shadows = (self.charge is not None and self.charge.shadow) or any(rates.shadow for rates in self.rates)
        object.__setattr__(self, "has_beside", shadows or bool(self.upstreams))
        parts = [part for part in (self.charge, *self.rates, *self.upstreams) if part is not None]
        object.__setattr__(self, "errors", parts[0].errors if parts else "problem")

    def callables(self) -> tuple[From, ...]:
        """Everything that is computed from the endpoint's arguments."""
        charge = self.charge.callables() if self.charge is not None else ()
        rates = (value for rates in self.rates for value in rates.callables())
        return (*charge, *rates, *(value for upstream in self.upstreams for value in upstream.callables()))


def misplaced(policy: EndpointPolicy) -> str:
    """Why *policy* means nothing to the kind of connection that it does not need, and the mend, without its name."""
    if policy.needs == "websocket":
        return (
            'is charged or limited per="message" or per="second", which only WebSockets are. Leave per= out: an HTTP '
            "request is one call."
        )
    if policy.charge is not None and policy.charge.drains:
        return (
            'has on_disconnect="drain", and nothing goes on over a WebSocket that is closed. Leave it out; what was '
            "used until then is observed."
        )
    return (
        "has idempotency=, and a WebSocket has neither a body nor an answer that could be repeated. Leave it out; "
        "charge_key= counts several connections once."
    )


def check_line(line: str) -> str:
    """Return *line* if it may name a billing line; raises `ConfigurationError`."""
    return check_name(line, "billing line")
