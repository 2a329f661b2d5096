"""
Header fields: what a response says of the limits it was counted against, and of what the payer has left.

Knows Structured Fields (RFC 9651), the RateLimit draft and the X-RateLimit custom, and how text becomes safe to stand
in a header. Never knows why a call was refused, who called, or how messages are sent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, isfinite
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from asgi_metering.amounts import Unit
from asgi_metering.decisions import Decision, WindowState
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import is_field_name
from asgi_metering.quotas.dialects import DIALECTS

__all__ = [
    "DEFAULT_NAMES",
    "MAX_SF_INTEGER",
    "Fields",
    "HeaderNames",
    "field_name",
    "field_value",
    "limit_fields",
    "retry_after_field",
    "safe_name",
    "sf_string",
    "whole_seconds",
]

Fields: TypeAlias = list[tuple[bytes, bytes]]
"""Header fields as ASGI wants them: names in lower case. Always a new list, so that nobody's list grows."""

MAX_SF_INTEGER = 999_999_999_999_999
"""The largest Integer that a structured field can carry (RFC 9651 section 3.3.1)."""

MAX_NAME = 64
"""Characters of a name that are shown: as many as our names may have."""

_CLOCK_NOISE_S = 5e-7
"""
What epoch seconds lose as floats (half a microsecond is two of their steps): a window of 60 s that has just begun has
60.0000002 s left by subtraction, and must not answer 61.
"""

_UNSAFE = re.compile(r"[^\x20-\x7e]")

FRAMING = frozenset(
    {
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Fields that say how a message is read. Neither limits nor hooks may write them."""


@dataclass(frozen=True, slots=True)
class HeaderNames:
    """
    What the fields are called on the wire; None leaves one out.

    Args:
        policy: The draft's list of policies (``q``, ``w``, ``qu``).
        state: The draft's list of what is left (``r``, ``t``).
        limit, remaining, reset: The X-RateLimit custom, off by default; see `with_legacy`.
        retry_after: Whole seconds until a retry may pass.
        available: What the paying source has left after this call's hold.
        payer: Which of the payers that the route names pays.

    Attributes:
        initials: What they begin with, or the fields that tell a provider's quota do, in either case: a field that
            does not is none of these.

    Raises:
        ConfigurationError: A name that is no header name, that frames the message, or that stands for two fields.

    Source: draft-ietf-httpapi-ratelimit-headers-10 and -11 (a draft, hence names to change), RFC 9110 sections 5.1
    and 10.2.3, S2.33.
    """

    policy: str | None = "RateLimit-Policy"
    state: str | None = "RateLimit"
    limit: str | None = None
    remaining: str | None = None
    reset: str | None = None
    retry_after: str | None = "Retry-After"
    available: str | None = "Metering-Available"
    payer: str | None = "Metering-Payer"
    _wire: tuple[bytes | None, ...] = field(init=False, repr=False, compare=False)
    _has_custom: bool = field(init=False, repr=False, compare=False)
    initials: frozenset[bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rates = (self.policy, self.state, self.limit, self.remaining, self.reset, self.retry_after)
        names = (*rates, self.available, self.payer)
        seen: set[str] = set()
        for name in names:
            if name is None:
                continue
            if not is_field_name(name, MAX_NAME) or name.lower() in FRAMING:
                raise ConfigurationError(
                    f"The header name {name!r} cannot carry a limit. Use another, or None for off."
                )
            if name.lower() in seen:
                raise ConfigurationError(f"The header name {name!r} stands for two fields. Give each its own.")
            seen.add(name.lower())
        wire = tuple([None if name is None else name.lower().encode("ascii") for name in names])
        object.__setattr__(self, "_wire", wire)
        initials = {letter for name in wire if name is not None for letter in (name[:1], name[:1].upper())}
        object.__setattr__(self, "initials", frozenset(initials) | DIALECTS.private_initials)
        object.__setattr__(self, "_has_custom", wire[2:5] != (None, None, None))

    @classmethod
    def with_legacy(cls) -> HeaderNames:
        """The default names, and ``X-RateLimit-Limit``, ``-Remaining`` and ``-Reset`` for clients that know these."""
        return cls(limit="X-RateLimit-Limit", remaining="X-RateLimit-Remaining", reset="X-RateLimit-Reset")

    @property
    def exposed(self) -> tuple[str, ...]:
        """The names in use, for ``Access-Control-Expose-Headers``: without it a browser's script reads none."""
        return tuple([name.decode("ascii") for name in self._wire if name is not None])


DEFAULT_NAMES = HeaderNames()


def limit_fields(
    decision: Decision,
    unit: Unit,
    names: HeaderNames = DEFAULT_NAMES,
    *,
    failing: str | None = None,
    warn_below: int | None = None,
    overdraft: int = 0,
) -> Fields:
    """
    Return the fields of one decision: one set, every window once, in policy order.

    ``RateLimit-Policy`` and ``RateLimit`` list all windows. Seconds are rounded up; a time that cannot be told is
    left out. A unit other than requests is said in ``qu`` by its own name, also one that the draft's registry does
    not have (``"tokens"``): left out it would claim requests. No partition keys: they would tell what calls are
    counted by.

    ``X-RateLimit-*`` has room for one window: the one that refused, else the one with the least left (on a tie, the
    one that takes longest) among those that count requests, else among all. Its reset is epoch seconds, a whole
    number rounded up, as GitHub sends it.

    ``Metering-Available: "12.5";unit="credits"`` is an Item, String: the exact amount in whole units, spelled as in
    bodies. A structured Decimal ends at three digits after the point where credits have six, and a structured Integer
    at fifteen digits where amounts have sixteen. ``source`` names an allowance that pays (absent: the wallet);
    ``status`` is ``warning`` or ``blocked`` (absent: fine).

    Args:
        decision: The store's answer, admitted or refused.
        unit: The unit of the decision's amounts.
        names: What the fields are called.
        failing: Name of the window that refused, if one did.
        warn_below: Smallest parts below which what is left is worth a warning; None never warns.
        overdraft: Smallest parts that the paying source may owe: with these left it is not at its end.

    Source: draft-ietf-httpapi-ratelimit-headers-10, RFC 9651, S2.33, S3.6.
    """
    fields: Fields = []
    policy, state, limit, remaining, reset, _, available, _ = names._wire
    windows = decision.windows
    if windows:
        spelled = _spelled(*map(_WRITTEN, windows))
        if not spelled.is_distinct:
            windows = _distinct(windows, spelled.quoted)
            spelled = _spelled(*map(_WRITTEN, windows))
        if policy is not None and state is not None:
            # As nearly everywhere.
            fields = [(policy, spelled.policies), (state, _states(windows, spelled))]
        elif policy is not None:
            fields.append((policy, spelled.policies))
        elif state is not None:
            fields.append((state, _states(windows, spelled)))
        if names._has_custom:
            _add_legacy(fields, _shown_window(windows, failing), decision.now, (limit, remaining, reset))
    if available is not None and decision.available is not None:
        fields.append((available, _available(decision.available, unit, decision.source, warn_below, overdraft)))
    return fields


_WRITTEN = itemgetter(*map(WindowState._fields.index, ("name", "limit", "window_s", "meter")))
"""What of a window does not change from call to call."""


class _Spelled(NamedTuple):
    """
    What of some windows' fields is the same on every response.

    Attributes:
        policies: The line of policies.
        quoted: Their names as they stand in it.
        states: The line of states, to be filled with what is left of each, and the seconds until there is more.
        is_distinct: Whether no two have one name.
    """

    policies: bytes
    quoted: tuple[str, ...]
    states: bytes
    is_distinct: bool


# Policies are few and the same on every response; limits by plan or by month make a few more.
@lru_cache(maxsize=1024)
def _spelled(*written: tuple[Any, ...]) -> _Spelled:
    quoted = []
    items = []
    for name, limit, window_s, meter in written:
        unit = meter.replace("_", "-")
        counted = "" if unit == "requests" else f";qu={sf_string(unit)}"
        # The draft counts whole seconds only, and not zero: a longer window promises less, never more.
        seconds = whole_seconds(window_s)
        window = f";w={seconds}" if seconds else ""
        quoted.append(sf_string(name))
        items.append(f"{quoted[-1]};q={_bounded(limit)}{counted}{window}")
    # A percent sign in a name is itself.
    states = ", ".join(name.replace("%", "%%") + ";r=%d;t=%d" for name in quoted)
    is_distinct = len(set(quoted)) == len(quoted)
    return _Spelled(", ".join(items).encode("ascii"), tuple(quoted), states.encode("ascii"), is_distinct)


def _states(windows: Sequence[WindowState], spelled: _Spelled) -> bytes:
    numbers: list[int] = []
    # By their places: names cost more, and every response tells it of each window.
    for _, _, left, seconds, _, _ in windows:
        if not (0 <= left <= MAX_SF_INTEGER and 0.0 <= seconds <= MAX_SF_INTEGER):
            return _odd_states(windows, spelled.quoted)
        numbers += left, ceil(seconds - _CLOCK_NOISE_S)
    return spelled.states % (*numbers,)


def _odd_states(windows: Sequence[WindowState], quoted: Sequence[str]) -> bytes:
    """The same where a number does not fit, or a time cannot be told."""
    items = []
    for name, window in zip(quoted, windows, strict=True):
        left = _bounded(window.remaining)
        wait = whole_seconds(window.reset_after_s)
        items.append(f"{name};r={left}" if wait is None else f"{name};r={left};t={wait}")
    return ", ".join(items).encode("ascii")


def _distinct(windows: Sequence[WindowState], quoted: Sequence[str]) -> tuple[WindowState, ...]:
    """Of windows that share a name, the one that refuses first: two items of one name say nothing."""
    kept: dict[str, WindowState] = {}
    for name, window in zip(quoted, windows, strict=True):
        if name not in kept or _tightness(window) < _tightness(kept[name]):
            kept[name] = window
    return tuple(kept.values())


def _tightness(window: WindowState) -> tuple[int, float]:
    return window.remaining, -window.reset_after_s


def _shown_window(windows: Sequence[WindowState], failing: str | None) -> WindowState:
    for window in windows:
        if window.name == failing:
            return window
    requests = [window for window in windows if window.meter == "requests"]
    return min(requests or windows, key=_tightness)


def _add_legacy(fields: Fields, window: WindowState, now: float, names: tuple[bytes | None, ...]) -> None:
    reset_at = whole_seconds(now + window.reset_after_s)
    for name, value in zip(names, (_bounded(window.limit), _bounded(window.remaining), reset_at), strict=True):
        if name is not None and value is not None:
            fields.append((name, b"%d" % value))


def _available(parts: int, unit: Unit, source: str | None, warn_below: int | None, overdraft: int) -> bytes:
    text = f'"{unit.text(parts)}"{_account(unit.name, source)}'
    if parts + overdraft <= 0:
        text += ";status=blocked"
    elif warn_below is not None and parts < warn_below:
        text += ";status=warning"
    return text.encode("ascii")


@lru_cache(maxsize=256)
def _account(unit: str, source: str | None) -> str:
    text = f";unit={sf_string(unit)}"
    return text if source is None or source == "wallet" else f"{text};source={sf_string(source)}"


def payer_field(name: str, names: HeaderNames = DEFAULT_NAMES, *, switched: bool = False) -> Fields:
    """
    Return ``Metering-Payer``: an Item, the String *name*, or the Token ``caller`` for the call's own payer (S0.38).

    ``switched`` says that this is another one than the first choice of the route.
    """
    wire = names._wire[7]
    if wire is None:
        return []
    text = sf_string(name) if name else "caller"
    return [(wire, f"{text}{';switched' if switched else ''}".encode("ascii"))]


def retry_after_field(seconds: int, names: HeaderNames = DEFAULT_NAMES) -> Fields:
    """Return ``Retry-After`` as delay-seconds (RFC 9110 section 10.2.3), or nothing if it is switched off."""
    name = names._wire[5]
    return [] if name is None else [(name, b"%d" % _bounded(seconds))]


def whole_seconds(seconds: float) -> int | None:
    """
    Round *seconds* up to what ``Retry-After``, ``t`` and ``w`` can carry, from 0; None where no time can be told.

    Never earlier than *seconds*, except for the half microsecond that clocks lose as floats.
    """
    if 0.0 < seconds < MAX_SF_INTEGER:
        return ceil(seconds - _CLOCK_NOISE_S)
    return _bounded(ceil(seconds)) if isfinite(seconds) else None


def _bounded(value: int) -> int:
    return value if 0 <= value <= MAX_SF_INTEGER else max(0, min(value, MAX_SF_INTEGER))


def safe_name(text: str) -> str:
    """Return *text* as it may be shown: at most 64 characters of printable ASCII, ``?`` for every other."""
    return _UNSAFE.sub("?", text[:MAX_NAME])


def sf_string(text: str) -> str:
    r"""
    Write *text* as a structured String: quoted, with ``\"`` and ``\\``; shortened and cleaned as by `safe_name`.

    Source: RFC 9651 section 4.1.6.
    """
    escaped = safe_name(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def field_value(text: str) -> bytes | None:
    """Return *text* as the value of a header field, without outer spaces; None unless it is printable ASCII."""
    value = text.strip(" \t")
    return None if _UNSAFE.search(value) else value.encode("ascii")


def field_name(text: str) -> bytes | None:
    """Return *text* in lower case as the name of a header field; None unless it is one and frames nothing."""
    name = text.lower()
    return name.encode("ascii") if is_field_name(name, MAX_NAME) and name not in FRAMING else None
