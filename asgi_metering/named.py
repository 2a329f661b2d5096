"""
Named keys and limits: what decorators refer to by name, and a `Metering` says, also while the application runs.

Knows functions and texts by their names. Never counts anything, and does not know who refers to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from asgi_metering.arguments import From
from asgi_metering.chosen import ConfiguredLimits, LimitByPlan, LimitReading
from asgi_metering.computed import Computed, check_answers
from asgi_metering.errors import ConfigurationError
from asgi_metering.limiting import Limit
from asgi_metering.names import check_name
from asgi_metering.rates import RateLimit, is_item

__all__ = ["NamedKeys", "NamedLimits"]

_READING = LimitReading()


class NamedKeys(MutableMapping[str, Callable[..., Any]]):
    """
    Functions that compute what is counted together, by name: ``metering.keys["tenant"] = function`` (S2.32).

    Each is asked like a key of `rate_limited`: with the endpoint's arguments, and ``call``, by the names of its
    parameters; sync or async. One that is replaced counts from the next call on.

    Raises:
        ConfigurationError: A name that is none, or what is no function that can answer a key.
    """

    def __init__(self, given: Mapping[str, Callable[..., Any]] | None = None) -> None:
        self._known: dict[str, From] = {}
        self._bound: dict[tuple[str, str], Computed] = {}
        if given is not None and not isinstance(given, Mapping):
            raise ConfigurationError(
                f"keys={given!r} is no mapping of names to functions. Write keys={{'tenant': function}}."
            )
        self.update(given or {})

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._known[name].function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        check_name(name, "name of the key")
        if not callable(function):
            raise ConfigurationError(f"The key {name!r} is {function!r}, which cannot be called. Pass a function.")
        asked = From(function, "key")
        check_answers([asked], f"the metering's {name!r}")
        self._known[name] = asked
        # A new one, so that whoever is just looking for the old function does not put it back.
        self._bound = {}

    def __delitem__(self, name: str) -> None:
        raise ConfigurationError(
            f"The key {name!r} cannot be taken away, since limits may be counted by it. Replace its function instead."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def bound(self, name: str, endpoint: str) -> Computed:
        """
        What is registered as *name* now, for the policy *endpoint*.

        Raises:
            ConfigurationError: Nothing is.
        """
        bound, place = self._bound, (name, endpoint)
        found = bound.get(place)
        if found is None:
            asked = self._known.get(name)
            if asked is None:
                raise ConfigurationError(
                    f"The limits of {endpoint} are counted by 'named:{name}', which this Metering does not know. Pass "
                    f"Metering(keys={{{name!r}: function}})."
                )
            found = bound[place] = Computed(asked.function, asked.what, endpoint)
        return found


class NamedLimits(MutableMapping[str, tuple[str | Mapping[str, Any], ...]]):
    """
    Limits of requests by name: ``metering.limits["search"] = ["60/minute", {"free": "100/day", "pro": "5000/day"}]``.

    What is replaced counts from the next call on; the windows that run go on, with what was counted in them.

    Raises:
        ConfigurationError: A name that is none, no limit at all, a text that is not in the grammar, or one that an
            endpoint which uses the name cannot count, by its strategy say.

    Source: S2.30.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self._known: dict[str, tuple[str | LimitByPlan, ...]] = {}
        self._readings: dict[str, set[LimitReading]] = {}
        if given is not None and not isinstance(given, Mapping):
            raise ConfigurationError(
                f"limits={given!r} is no mapping of names to limits. Write limits={{'search': '60/minute'}}."
            )
        self.update(given or {})

    def __getitem__(self, name: str) -> tuple[str | Mapping[str, Any], ...]:
        # To be replaced as a whole, which is checked then.
        known = self._known[name]
        return tuple([MappingProxyType(each.texts) if isinstance(each, LimitByPlan) else each for each in known])

    def __setitem__(self, name: str, limits: Limit | list[Limit] | tuple[Limit, ...]) -> None:
        check_name(name, "name of configured limits")
        several = list(limits) if isinstance(limits, list | tuple) else [limits]
        if not several:
            raise ConfigurationError(f"The configured limits {name!r} limit nothing. Write '60/minute', say.")
        known = tuple([_checked(name, limit) for limit in several])
        # Here, where whoever changes them hears of it, and not with the next call.
        for reading in self._readings.get(name, ()):
            _read_so(known, reading)
        self._known[name] = known

    def __delitem__(self, name: str) -> None:
        raise ConfigurationError(
            f"The configured limits {name!r} cannot be taken away, since endpoints may be counted by them. Replace "
            f"them instead."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def texts_for(self, name: str, plan: str | None) -> tuple[str, ...]:
        """
        What is allowed to *plan* under *name* now.

        Raises:
            ConfigurationError: Nothing has this name.
        """
        known = self._known.get(name)
        if known is None:
            raise ConfigurationError(
                f"The limits configured={name!r} are not known to this Metering. Pass "
                f"Metering(limits={{{name!r}: '60/minute'}})."
            )
        return tuple([each.text_for(plan) if isinstance(each, LimitByPlan) else each for each in known])

    def used_by(self, limits: ConfiguredLimits) -> None:
        """
        Remember how an endpoint reads what has the name of *limits*, for all that is put there later.

        Raises:
            ConfigurationError: Nothing has this name, or what has it cannot be read so.
        """
        if limits.reading in self._readings.get(limits.name, ()):
            return
        self.texts_for(limits.name, None)
        _read_so(self._known[limits.name], limits.reading)
        self._readings.setdefault(limits.name, set()).add(limits.reading)


def _read_so(known: Iterable[str | LimitByPlan], reading: LimitReading) -> None:
    """Read all of *known*, for whichever plan; raises as `parse_limits`."""
    for each in known:
        for text in each.texts.values() if isinstance(each, LimitByPlan) else (each,):
            reading.read_all(str(text))


def _checked(name: str, limit: Limit) -> str | LimitByPlan:
    by_plan = LimitByPlan(dict(limit)) if isinstance(limit, Mapping) else None
    texts = [limit] if by_plan is None else list(by_plan.texts.values())
    if not texts or (by_plan is not None and not all(isinstance(plan, str) for plan in by_plan.texts)):
        raise ConfigurationError(f"The configured limits {name!r} have no plan. Write {{'free': '60/minute'}}, say.")
    for text in texts:
        is_limit = isinstance(text, str) or is_item(text)
        if not is_limit or any(limit.meter != "requests" for limit in _read(text, by_plan)):
            raise ConfigurationError(
                f"The configured limits {name!r} have {text!r}, which is no limit of requests. Write '60/minute', say; "
                f"limits of tokens stand in rate_limited() itself."
            )
    return by_plan or str(limit)


def _read(text: Any, by_plan: LimitByPlan | None) -> tuple[RateLimit, ...]:
    """What *text* says: one limit for a plan, or several for everybody."""
    return _READING.read_all(text) if by_plan is None else (_READING.read(text),)
