"""
Aliases: by what other names a model's price may be known.

Knows how names of models are made: with the provider before a slash, with a date behind. Knows no model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from asgi_metering.errors import ConfigurationError

__all__ = ["Aliases", "candidates"]

log = logging.getLogger("asgi_metering")

DATED: Final = re.compile(r"(?:[-@]20\d{2}-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])|-latest)$")
"""What providers put behind a name: ``-2025-08-07``, ``-20250807``, ``@20250807``, ``-latest``."""


@lru_cache(maxsize=4_096)
def candidates(model: str) -> tuple[str, ...]:
    """
    *model*, and by what else it may be known: without its providers, without its date, in small letters.

    The exact name first, then whatever is nearest to it. What stands behind a colon stays, for it may be another
    price: ``:free``, ``:batch``.
    """
    undated = DATED.sub("", model)
    names = [model]
    for name in dict.fromkeys((model, undated)):
        names += [name]
        while "/" in name:
            name = name.partition("/")[2]
            names += [name]
    names += [name.lower() for name in names]
    return tuple(name for name in dict.fromkeys(names) if name)


@dataclass(frozen=True, slots=True)
class Aliases:
    """
    Other names of models.

    Attributes:
        given: What the user wrote: a mapping, or a function of the model's name and its provider's.
        bare: By names without their provider, those that have a price with it.
    """

    given: Mapping[str, str] | Callable[[str, str | None], str | None]
    bare: Mapping[str, str]

    @classmethod
    def of_names(cls, names: Iterable[str], given: Any) -> Aliases:
        """
        The aliases of models with prices of these *names*.

        A bare name that several of them end in stands for none.

        Raises:
            ConfigurationError: *given* is neither a mapping nor a function.
        """
        if given is not None and not isinstance(given, Mapping) and not callable(given):
            raise ConfigurationError(f"aliases={given!r} are no names. Pass a mapping, or a function of a name.")
        ends: dict[str, list[str]] = {}
        for name in names:
            bare = name
            while "/" in bare:
                bare = bare.partition("/")[2]
                ends.setdefault(bare, []).append(name)
        single = {end: whose[0] for end, whose in ends.items() if len(whose) == 1}
        return cls({} if given is None else given, MappingProxyType(single))

    def of(self, model: str, provider: str | None) -> str | None:
        """The alias of *model*; None where it has none, or the function fails, which the log tells."""
        if isinstance(self.given, Mapping):
            return self.given.get(model)
        try:
            answer = self.given(model, provider)
        except Exception as failure:
            log.error("The alias of model %r cannot be told: %r", model, failure, exc_info=failure)
            return None
        return answer if isinstance(answer, str) else None
