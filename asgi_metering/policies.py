"""
Policies: what the decorators write down for one endpoint.

Immutable once an endpoint is decorated. Every policy argument is a value, a callable or an async callable of the
endpoint's own arguments; a callable names the ones it wants, and `call` for the call itself. Knows nothing of how a
policy is carried out.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, TypeAlias, TypedDict

from asgi_metering.amounts import Amount, Unit, exact_amount
from asgi_metering.chosen import ConfiguredLimits, LimitByPlan, LimitReading
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name
from asgi_metering.prices import FixedPrice, MeasuredPrice
from asgi_metering.rates import RateLimit
from asgi_metering.sources import PaymentSource, Wallet
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call, CallRefused
    from asgi_metering.decisions import Decision, Refusal
    from asgi_metering.guards import Part
    from asgi_metering.rules.operations import LimitAsk

__all__ = [
    "ATTRIBUTE",
    "ESTIMATE",
    "KEYS",
    "NAMED",
    "ChargeKey",
    "ChargeOptions",
    "ChargePolicy",
    "ComputedLimit",
    "ConcurrencyLimit",
    "CreditsDown",
    "EndpointPolicy",
    "ErrorShape",
    "From",
    "HoldPolicy",
    "HoldSize",
    "Idempotency",
    "LimitAsker",
    "NamedKey",
    "OnExcess",
    "Per",
    "Price",
    "RatePolicy",
    "RatesDown",
    "Slices",
    "UpstreamPolicy",
    "read_price",
    "slices",
    "up_to",
]

ErrorShape: TypeAlias = Literal["problem", "openai", "anthropic"]
"""The shape of refusals and in-band errors of a route."""

ERROR_SHAPES: tuple[ErrorShape, ...] = ("problem", "openai", "anthropic")

Per: TypeAlias = Literal["call", "message", "second"]
"""What is charged or counted: the call as a whole or, of a WebSocket, each message that comes in, or each second."""

OnExcess: TypeAlias = Literal["close", "drop", "answer"]
"""What becomes of a message over its limit: the WebSocket is closed, or it goes on without it, told or untold."""

CALL = "call"
"""The parameter name by which a policy's callable asks for the call."""


@dataclass(frozen=True, slots=True)
class From:
    """
    A policy argument that is computed from the endpoint's arguments.

    Args:
        function: Sync or async.
        what: What it computes, for error sentences.

    Its parameters are matched by name: those of the endpoint, and ``call``. A parameter with a default may be absent.
    """

    function: Callable[..., Any]
    what: str
    wants: tuple[str, ...] = field(init=False)
    takes_all: bool = field(init=False)

    def __post_init__(self) -> None:
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"The {self.what} {self.function!r} has no signature to read. "
                f"Wrap it in a function with named parameters."
            ) from None
        wants = []
        takes_all = False
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_ONLY or parameter.kind is parameter.VAR_POSITIONAL:
                raise ConfigurationError(
                    f"The {self.what} {self.function!r} takes {parameter.name!r} by position. "
                    f"Name the endpoint's parameters that it needs instead."
                )
            if parameter.kind is parameter.VAR_KEYWORD:
                takes_all = True
            else:
                wants.append(parameter.name)
        object.__setattr__(self, "wants", tuple(wants))
        object.__setattr__(self, "takes_all", takes_all)

    def check(self, endpoint: str, offered: Mapping[str, inspect.Parameter]) -> None:
        """
        Refuse a parameter that the endpoint cannot give.

        Raises:
            ConfigurationError: At import, with the names that can be had.
        """
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in offered.values()):
            return
        defaults = inspect.signature(self.function).parameters
        for name in self.wants:
            if name != CALL and name not in offered and defaults[name].default is inspect.Parameter.empty:
                names = ", ".join(repr(known) for known in (*offered, CALL))
                raise ConfigurationError(
                    f"The {self.what} of {endpoint} asks for {name!r}, which the endpoint does not have. "
                    f"It can have {names}."
                )

    async def compute(self, call: object, arguments: Mapping[str, Any]) -> Any:
        """Call the function with what it asked for; a result that can be awaited is awaited."""
        if self.takes_all:
            given = {**arguments, CALL: call} if CALL in self.wants else dict(arguments)
        else:
            given = {name: arguments[name] for name in self.wants if name in arguments}
            if CALL in self.wants:
                given[CALL] = call
        result = self.function(**given)
        return await result if isinstance(result, Awaitable) else result


KEYS = ("caller", "payer", "address", "route", "global")
"""Keys of limits that mean the same everywhere."""

ATTRIBUTE, NAMED = "attribute:", "named:"
"""Beginnings of keys that go on with a name: of a caller's attribute, or of what `Metering.keys` registers."""


@dataclass(frozen=True, slots=True)
class NamedKey(From):
    """
    A key that is computed by whatever function `Metering.keys` has under its name at that moment (S2.32).

    Args:
        function: Nothing of its own; see `of`.
        what: As of `From`.
        name: Under which it is registered.
        endpoint: The policy's name, once it is bound to one.
    """

    name: str = ""
    endpoint: str = ""

    @classmethod
    def of(cls, name: str, endpoint: str = "") -> NamedKey:
        """The key that is registered as *name*."""
        return cls(_unbound, "key", name, endpoint)

    def __str__(self) -> str:
        return f"{NAMED}{self.name}"

    def check(self, endpoint: str, offered: Mapping[str, inspect.Parameter]) -> None:
        """Nothing: its function may be registered later, and is asked about at startup."""

    async def compute(self, call: Any, arguments: Mapping[str, Any]) -> Any:
        """Call what is registered now; raises as the computed keys of decorators."""
        return await call.metering.keys.bound(self.name, self.endpoint).compute(call, arguments)


def _unbound() -> None:
    """Stands for the function of a `NamedKey`, which is looked up for each call."""


@dataclass(frozen=True, slots=True)
class Slices:
    """
    How a hold grows while its call runs.

    Attributes:
        step: By how much: whole units or a `TokenUsage`. None: by the first slice.
        low_water: Once no more than this of the hold is left, in the same words. None: half a step.
        debt: Whole units that the payer may owe for it.
        in_use: Whether any were ever made in this process: what prepares for a cut is left out before.
    """

    in_use: ClassVar[bool] = False

    step: Amount | TokenUsage | None = None
    low_water: Amount | TokenUsage | None = None
    debt: Amount = 0

    def __post_init__(self) -> None:
        Slices.in_use = True


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """
    How much a measured price holds.

    Attributes:
        estimate: Whole units, a `TokenUsage`, or `From` one; None estimates from the request's own body.
        at_least: With ``up_to``: admit from here on, holding what there is. None: all or nothing.
        slices: With ``slices``: how it grows from *estimate* on. None: it never does.
    """

    estimate: Any = None
    at_least: Amount | None = None
    slices: Slices | None = None

    @property
    def reads_request(self) -> bool:
        """Whether something of it, or of what a hang-up pays for its input, is estimated from the request itself."""
        estimate = self.estimate
        return not isinstance(estimate, TokenUsage) or (self.slices is not None and estimate.input is None)

    def callables(self) -> tuple[From, ...]:
        """The arguments that are computed."""
        return (self.estimate,) if isinstance(self.estimate, From) else ()


def up_to(estimate: Amount | TokenUsage | Callable[..., Any] | None = None, *, at_least: Amount) -> HoldPolicy:
    """
    Hold the smaller of *estimate* and what is available, and refuse only below *at_least*.

    Args:
        estimate: Whole units, a `TokenUsage`, or a callable of the endpoint's arguments that answers one; None
            estimates from the request's own body.
        at_least: Whole units without which the call is refused.

    Raises:
        AmountError: *at_least* is not a usable amount (a float, say).
        ConfigurationError: A callable takes parameters by position.
    """
    exact_amount(at_least, "least hold")
    return HoldPolicy(_computed(estimate, "hold estimate"), at_least)


def slices(
    first: Amount | TokenUsage | Callable[..., Any],
    *,
    step: Amount | TokenUsage | None = None,
    low_water: Amount | TokenUsage | None = None,
    debt: Amount = 0,
) -> HoldPolicy:
    """
    Hold little at first, and more while the call runs: ``hold=slices(TokenUsage(output=500))``.

    Args:
        first: What the call is admitted by: whole units, a `TokenUsage`, or a callable of the endpoint's arguments that
            answers one. The input of a `TokenUsage` that names none is estimated from the request's own body.
        step: By how much the hold grows each time: whole units, or a `TokenUsage`. *first* by default, without an
            input that was estimated.
        low_water: It grows once no more than this of it is left, in the same words; half a step by default.
        debt: Whole units that the payer may owe once nothing is left, so that a call that runs may come to its end.
            The bound is of the payer's wallet, not of the call: several calls owe no more together. 0, the default,
            is no debt beyond the ``overdraft`` of the wallet itself.

    What was used so far is counted off the byte path, a few times a second and when usage is recorded; the store is
    asked for more at the low-water mark, once at a time, and from the payer object that admitted the call. When it has
    nothing more the call runs on as long as its hold lasts. Then it is cut: the application's next ``send`` raises
    `CallCut`, and so does `Call.record`; a handler that is silent for a second is cancelled, one in a thread as soon as
    the thread is done. The client gets the error of its protocol inside the stream, or a 402 if nothing was sent yet; a
    body that has no place for it, as a compressed one, ends by a broken connection. An answer that is whole by then is
    sent. What was observed is charged (``on_cut``), also where it is more than was held. Outside HTTP nothing but
    `Call.record` stops the work.

    A store that gives no answer cuts nobody: the call runs on, and is charged in full at its end. So does a call that
    was let in without the store (``on_store_down="queue"``): what it would hold grows all the same, and it is not cut.

    Raises:
        AmountError: An amount that is not usable (a float, say).
        ConfigurationError: A slice of nothing, a mark that a slice does not reach, or a callable that takes parameters
            by position.

    Source: DESIGN 4 "A hold's size".
    """
    if first is None:
        raise ConfigurationError("slices(None) says nothing of the first slice. Write slices('0.01'), say.")
    if not callable(first) and not isinstance(first, TokenUsage):
        exact_amount(first, "first slice")
    for size, what in ((step, "step"), (low_water, "low-water mark"), (debt, "debt")):
        if size is not None and not isinstance(size, TokenUsage):
            exact_amount(size, what)
    return HoldPolicy(_computed(first, "hold estimate"), slices=Slices(step, low_water, debt))


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

HoldSize: TypeAlias = Amount | TokenUsage | HoldPolicy | Callable[..., Any]
"""What a user may write as a hold."""

OnMissingUsage: TypeAlias = Literal["estimate", "observed", "hold", "none"]
OnError: TypeAlias = Literal["none", "usage", "observed", "estimate", "hold"]
OnLateError: TypeAlias = Literal["none", "observed", "hold"]
OnDisconnect: TypeAlias = Literal["observed", "none", "usage", "estimate", "hold"]
OnEarlyDisconnect: TypeAlias = Literal["observed", "none", "estimate", "hold"]
OnCut: TypeAlias = Literal["observed", "hold"]
OnAbort: TypeAlias = Literal["observed", "none", "hold"]
CreditsDown: TypeAlias = Literal["deny", "queue", "allow"]
RatesDown: TypeAlias = Literal["deny", "local", "allow"]
# What a user may write per row of `rules.ending.END_OF_CALL`, which a test compares with these.


class ChargeOptions(TypedDict, total=False):
    """
    What `billable` takes and means something outside HTTP too.

    Keys are the keys themselves here, 1 to 255 printable characters: ``charge_key`` counts the calls of payer and line
    that bring it once per window, requests included; work with an ``idempotency_key`` is done once in 24 hours per
    payer and line, as `Idempotency` says. ``requires`` is what `requires_upstream` answers, one or several.
    """

    unit: Unit | None
    sources: Sequence[PaymentSource] | None
    on_missing_usage: OnMissingUsage | None
    on_error: OnError | None
    on_late_error: OnLateError | None
    on_cut: OnCut | None
    on_abort: OnAbort | None
    usage: str | None
    ttl_s: float
    grace_s: float
    charge_key: str | None
    charge_per: ChargePer | float
    charge_zone: str
    idempotency_key: str | None
    on_store_down: CreditsDown | None
    shadow: bool
    requires: Part | Sequence[Part] | None


def _computed(value: Any, what: str) -> Any:
    return From(value, what) if callable(value) else value


def read_hold(hold: Any) -> HoldPolicy:
    """Read what a user wrote as ``hold=``; raises as `up_to`."""
    if isinstance(hold, HoldPolicy):
        return hold
    if hold is not None and not callable(hold) and not isinstance(hold, TokenUsage):
        exact_amount(hold, "hold")
    return HoldPolicy(_computed(hold, "hold estimate"))


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

    @property
    def measured(self) -> bool:
        """Whether the price depends on usage."""
        # Not isinstance(..., MeasuredPrice): checking a protocol costs more than an admission.
        return not isinstance(self.price, FixedPrice | From)

    def callables(self) -> tuple[From, ...]:
        """Everything that is computed from the endpoint's arguments."""
        fingerprint = self.idempotency.fingerprint if self.idempotency is not None else None
        key = self.key.key if self.key is not None else None
        asked = (self.price, self.payer, self.skip_if, key, fingerprint)
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
        errors: The shape of refusals where neither a charge nor a limit says.
        shadow: Whether it only tells what it would have refused.
    """

    provider: str
    tokens: int | TokenUsage | From | Literal["estimate"] | None = None
    requests: int = 1
    label: str | From | None = None
    errors: ErrorShape = "problem"
    shadow: bool = False

    def callables(self) -> tuple[From, ...]:
        """Everything that is computed from the endpoint's arguments."""
        return tuple(value for value in (self.tokens, self.label) if isinstance(value, From))


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
        elif charge is not None and charge.idempotency is not None and charge.once is None:
            needs = "http"
        object.__setattr__(self, "needs", needs)
        shadows = (self.charge is not None and self.charge.shadow) or any(rates.shadow for rates in self.rates)
        object.__setattr__(self, "has_beside", shadows or bool(self.upstreams))

    @property
    def errors(self) -> ErrorShape:
        """The shape of refusals: the charge's, else that of the first limits, or of what a provider must have left."""
        if self.charge is not None:
            return self.charge.errors
        parts: tuple[RatePolicy | UpstreamPolicy, ...] = (*self.rates, *self.upstreams)
        return parts[0].errors if parts else "problem"

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
    return (
        "has idempotency=, and a WebSocket has neither a body nor an answer that could be repeated. Leave it out; "
        "charge_key= counts several connections once."
    )


def check_line(line: str) -> str:
    """Return *line* if it may name a billing line; raises `ConfigurationError`."""
    return check_name(line, "billing line")
