"""
Policy arguments that are computed: from the endpoint's own arguments, by a function of the application.

Knows what such a function asks for and how it is called. Never knows what its answer is used for.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from asgi_metering.errors import ConfigurationError

__all__ = ["ATTRIBUTE", "CALL", "KEYS", "NAMED", "From", "NamedKey"]

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
