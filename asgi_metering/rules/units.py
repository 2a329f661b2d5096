"""
Units: which ones a store counts in, and with how many digits. A scale is fixed by its first use.

Amounts are integers of the smallest part: another scale under the same name would move every amount by powers of ten.
"""

from __future__ import annotations

from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.operations import Declare
from asgi_metering.rules.state import Change, DeclaredUnit, State, Table

__all__ = ["declare"]


def declare(state: State, ask: Declare, _: float) -> tuple[int, list[Change]]:
    """
    Note the units of *ask* that are new; returns how many.

    Raises:
        ConfigurationError: One is counted with another scale already; none is noted then.
    """
    new: dict[str, int] = {}
    for name, scale in ask.units:
        known = state.units.get(name)
        counted = new.get(name) if known is None else known.scale
        if counted is not None and counted != scale:
            raise ConfigurationError(
                f"The unit {name!r} is counted with {counted} digits after the point here, and was given with {scale}. "
                f"Declare it as Unit({name!r}, scale={counted}), or give the new one another name."
            )
        if known is None:
            new[name] = scale
    return len(new), [(Table.UNIT, name, DeclaredUnit(name, scale)) for name, scale in new.items()]
