"""
Limiting: what a user wrote in `rate_limited()`, read into the policies that it means, one for each key.

Knows how keys, levels and limits are spelled, and refuses at import what cannot work. Never counts anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asgi_metering.arguments import ATTRIBUTE, KEYS, NAMED, From, NamedKey
from asgi_metering.chosen import ConfiguredLimits, LimitByPlan, LimitReading
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name, is_field_name
from asgi_metering.policies import ComputedLimit, ConcurrencyLimit, RatePolicy
from asgi_metering.rates import RateLimit, is_item

if TYPE_CHECKING:
    from limits import RateLimitItem

__all__ = ["FREE_METHODS", "Key", "Levels", "Limit", "check_level", "read_key", "read_levels", "read_methods"]

Limit: TypeAlias = "str | RateLimitItem | Mapping[str, str | RateLimitItem] | Callable[..., Any]"
"""What a user may write as a limit: a text or an item, one for each plan, or a function that answers one."""

Key: TypeAlias = "Literal['caller', 'payer', 'address', 'route', 'global'] | str | Callable[..., Any]"
"""What a user may write as a key."""

Levels: TypeAlias = "Mapping[str, Limit | Sequence[Limit]]"
"""Limits by key."""

MAX_LEVEL = 32
"""Characters of a level's name: it stands in the names of its limits, which have 64."""

FREE_METHODS = ("HEAD", "OPTIONS")
"""What no limit counts (X.4)."""

Chosen: TypeAlias = "LimitByPlan | ConfiguredLimits | ComputedLimit"


def read_key(key: Any) -> str | From:
    """
    Read what a user wrote as ``key=``.

    Raises:
        ConfigurationError: It is neither a key that is known nor a function.
    """
    if callable(key):
        return From(key, "key")
    if isinstance(key, str):
        prefix, colon, name = key.partition(":")
        if f"{prefix}{colon}" == NAMED:
            return NamedKey.of(check_name(name, "name of the key"))
        if (f"{prefix}{colon}" == ATTRIBUTE and name) or key in KEYS:
            return key
    raise ConfigurationError(
        f"key={key!r} is not known. Use one of {', '.join(KEYS)}, 'attribute:team' for an attribute of the caller, "
        f"'named:tenant' for one of Metering(keys=...), or a function."
    )


def read_methods(methods: Sequence[str] | None) -> frozenset[str]:
    """
    Read what a user wrote as ``methods=``.

    Raises:
        ConfigurationError: It is no list of HTTP methods, or has one that is never counted.
    """
    if methods is None:
        return frozenset()
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise ConfigurationError(f"methods={methods!r} is no list of HTTP methods. Write methods=['POST'], say.")
    given = list(methods)
    for method in given:
        if not is_field_name(method) or method.upper() in FREE_METHODS:
            free = " and ".join(FREE_METHODS)
            raise ConfigurationError(
                f"methods={methods!r} has {method!r}, which cannot be counted. Name methods such as 'POST'; {free} are "
                f"always free."
            )
    if not given:
        raise ConfigurationError("methods=[] counts nothing. Leave it out for all methods.")
    return frozenset(method.upper() for method in given)


def read_levels(
    base: RatePolicy,
    limits: Sequence[Limit],
    *,
    levels: Levels | None,
    configured: str | None,
    concurrency: int | Mapping[str, int] | None,
    global_concurrency: int | None,
    reading: LimitReading,
) -> tuple[RatePolicy, ...]:
    """
    One policy for each key that has something to limit, its own first.

    Args:
        base: What all of them have in common, with the key and level of *limits*.
        limits: Of that key.
        levels: As of `rate_limited`.
        configured: As of `rate_limited`.
        concurrency: As of `rate_limited`.
        global_concurrency: As of `rate_limited`.
        reading: How texts are read.

    Raises:
        ConfigurationError: As of `rate_limited`.
    """
    by_key = _limits_by_key(levels)
    slots = _slots_by_key(concurrency)
    own_slots = slots.pop("", [])
    is_keyed = bool(limits or configured is not None or own_slots)
    if global_concurrency is not None:
        own_slots.append(ConcurrencyLimit(global_concurrency, "global"))
    found = []
    if is_keyed and str(base.key) in {*by_key, *slots}:
        raise ConfigurationError(
            f"levels= or concurrency= has {str(base.key)!r}, which is the key of the other limits as well. Write all "
            f"of its limits in one of the two places."
        )
    if is_keyed or own_slots:
        level = base.level or (_own_level(base.key) if is_keyed and (by_key or slots) else "")
        found.append(_policy(base, base.key, level, limits, configured, own_slots, reading))
    elif base.level:
        raise ConfigurationError(f"level={base.level!r} names limits that are not there. Give it '60/minute', say.")
    _check_levels(dict.fromkeys((*by_key, *slots)), found)
    for key in dict.fromkeys((*by_key, *slots)):
        read = read_key(key)
        found.append(_policy(base, read, _level_of(key), by_key.get(key, ()), None, slots.get(key, []), reading))
    return tuple(found)


def _check_levels(keys: Iterable[str], own: Sequence[RatePolicy]) -> None:
    """Refusals and the names of limits tell levels by name, so that no two may have one."""
    known = {rate.level: str(rate.key) for rate in own if rate.level}
    for key in keys:
        level = _level_of(key)
        other = known.setdefault(level, key)
        if other != key:
            raise ConfigurationError(
                f"The keys {other!r} and {key!r} are both the level {level!r}. Write one of them as a rate_limited() "
                f"of its own, with level='other-{level}', say."
            )


def _limits_by_key(levels: Levels | None) -> dict[str, Sequence[Limit]]:
    if levels is None:
        return {}
    if not isinstance(levels, Mapping) or not levels:
        raise ConfigurationError(
            f"levels={levels!r} is no mapping of keys to limits. Write levels={{'payer': '1000/minute', 'caller': "
            f"'20/minute'}}, say."
        )
    found: dict[str, Sequence[Limit]] = {}
    for key, limits in levels.items():
        several: list[Any] = list(limits) if isinstance(limits, list | tuple) else [limits]
        if not several:
            raise ConfigurationError(f"levels={{{key!r}: {limits!r}}} limits nothing. Give it '60/minute', say.")
        found[_checked_key(key, "levels")] = several
    return found


def _slots_by_key(concurrency: int | Mapping[str, int] | None) -> dict[str, list[ConcurrencyLimit]]:
    """Slots by key; those of the own one under an empty name."""
    if concurrency is None:
        return {}
    if not isinstance(concurrency, Mapping):
        return {"": [ConcurrencyLimit(concurrency)]}
    if not concurrency:
        raise ConfigurationError("concurrency={} limits nothing. Write concurrency={'payer': 50}, say.")
    return {_checked_key(key, "concurrency"): [ConcurrencyLimit(slots)] for key, slots in concurrency.items()}


def _checked_key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ConfigurationError(
            f"{where}= has the key {key!r}, which is no name. Use one such as 'payer' or 'attribute:team'; limits by a "
            f"function are a rate_limited(key=function, level='team') of their own."
        )
    read_key(key)
    return key


def _own_level(key: str | From) -> str:
    if isinstance(key, From) and not isinstance(key, NamedKey):
        raise ConfigurationError(
            "The limits of a key that a function computes have no name beside others. Give one: level='user'."
        )
    return _level_of(str(key))


def _level_of(key: str) -> str:
    """What a key is called in refusals, and in the names of limits."""
    return check_level(key.rpartition(":")[2])


def check_level(level: Any) -> str:
    """Return *level* if it may name a level; raises `ConfigurationError`."""
    if isinstance(level, str) and len(level) > MAX_LEVEL:
        raise ConfigurationError(f"The level {level!r} has more than {MAX_LEVEL} characters. Choose a shorter name.")
    return check_name(level, "level")


def _policy(
    base: RatePolicy,
    key: str | From,
    level: str,
    limits: Sequence[Limit],
    configured: str | None,
    slots: Sequence[ConcurrencyLimit],
    reading: LimitReading,
) -> RatePolicy:
    reading = replace(reading, level=level)
    read: list[RateLimit] = []
    chosen: list[Chosen] = []
    for limit in limits:
        if isinstance(limit, Mapping):
            chosen.append(_by_plan(limit, reading, base.cost))
        elif callable(limit):
            chosen.append(ComputedLimit(From(limit, "limit"), reading))
        else:
            read += reading.read_all(limit) if isinstance(limit, str) or is_item(limit) else [reading.read(limit)]
    _check_cost(read, base.cost)
    if reading.strategy == "moving" and (configured is not None or any(map(callable, limits))):
        _check_single(base.cost, "that are looked up for each call")
    if configured is not None:
        chosen.append(ConfiguredLimits(check_name(configured, "name of configured limits"), reading))
    return replace(base, limits=tuple(read), concurrency=tuple(slots), chosen=tuple(chosen), key=key, level=level)


def _by_plan(texts: Mapping[str, str | RateLimitItem], reading: LimitReading, cost: Any) -> LimitByPlan:
    if not texts or not all(isinstance(plan, str) for plan in texts):
        raise ConfigurationError(
            f"The limits by plan {dict(texts)!r} are no mapping of plans to limits. Write {{'free': '20/minute', "
            f"'pro': '200/minute'}}, say."
        )
    read = [reading.read(_text(text)) for text in texts.values()]
    if len({limit.meter for limit in read}) > 1:
        raise ConfigurationError(
            f"The limits by plan {dict(texts)!r} count different things, so that no smallest one can be told. Write "
            f"one mapping for each."
        )
    _check_cost(read, cost)
    return LimitByPlan(texts, reading, read[0].meter)


def _text(text: Any) -> str | RateLimitItem:
    if not isinstance(text, str) and not is_item(text):
        raise ConfigurationError(
            f"The limit {text!r} is not a str. Write it as '60/minute', and several for a plan as several mappings."
        )
    checked: str | RateLimitItem = text
    return checked


def _check_single(cost: Any, limits: str) -> None:
    if type(cost) is not int or cost != 1:
        raise ConfigurationError(
            f"cost={cost!r} beside moving limits {limits}, and a moving window counts calls, one by one. Use the "
            f"strategy 'sliding', or a bucket: '60/minute burst 60', say."
        )


def _check_cost(limits: Sequence[RateLimit], cost: Any) -> None:
    for limit in limits:
        if limit.strategy == "moving":
            _check_single(cost, f"such as {limit.text!r}")
        # A limit of 0 is meant: it closes the endpoint.
        if limit.meter == "requests" and type(cost) is int and 0 < (limit.burst or limit.amount) < cost:
            raise ConfigurationError(
                f"cost={cost} is above the limit {limit.text!r}, so that every call would be refused. Raise the limit, "
                f"or lower the cost."
            )
