"""Who calls, as the application authenticated it: a value that knows nothing of how it was found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from asgi_metering.attributes import Scalar, check_attributes
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_key

__all__ = ["Caller"]

_NONE: Final[Mapping[str, Scalar | None]] = MappingProxyType({})
"""The attributes of whoever has none."""

_write: Final = object.__setattr__


@dataclass(frozen=True, slots=True, init=False)
class Caller:
    """
    Who calls, as the application authenticated it.

    Args:
        id: The caller: a key's id or a user's; never a credential. 1 to 255 printable characters.
        payer: Whose balance pays; the caller itself by default (S3.37: they often differ).
        plan: Chooses allowances by plan.
        type: What kind of caller: it goes on the usage event, and a route may charge some kinds alone:
            ``billable(2, callers=["agent"])`` tells of no others, ``skip_if=lambda call: call.caller.type != "agent"``
            tells of them as free work. None is an ordinary caller.
        exempt: Is charged nothing, and not counted by limits and slots per caller or payer; those per address, by a
            computed key or of everybody count it (S0.18). Its calls are audited as free work. Only for who you know to
            be one of you: an identity of development, a probe.
        attributes: Go on the usage event: str, int, finite float or bool; None is left out. No secrets.

    Raises:
        InvalidKeyError: An id or payer that cannot be a key.
        ConfigurationError: A type or plan that is no str, an exempt that is no bool, or an attribute that no event can
            carry. Raised inside `identify` it is a failure of `identify`: 503, logged.
    """

    id: str
    payer: str
    plan: str | None
    type: str | None
    attributes: Mapping[str, Scalar | None]
    exempt: bool

    # Not generated: one is made for every request, and to check what was written already takes half as long again.
    def __init__(
        self,
        id: str,  # noqa: A002 -- the field's word, as is the other
        payer: str = "",
        plan: str | None = None,
        type: str | None = None,  # noqa: A002
        attributes: Mapping[str, Scalar | None] = _NONE,
        exempt: bool = False,
    ) -> None:
        check_key(id, "caller id")
        if payer:
            check_key(payer, "payer")
        # What nearly all leave out is asked in one step.
        if plan is not None or type is not None:
            _check_names(id, plan=plan, type=type)
        if not isinstance(exempt, bool):
            # What looks like yes, a header's "false" for instance, must exempt nobody.
            raise ConfigurationError(f"exempt={exempt!r} of caller {id!r} is no bool. Pass True or False.")
        _write(self, "id", id)
        _write(self, "payer", payer or id)
        _write(self, "plan", plan)
        _write(self, "type", type)
        _write(self, "attributes", {} if attributes is _NONE else _checked(attributes, id))
        _write(self, "exempt", exempt)


def _check_names(caller: str, **names: object) -> None:
    for what, name in names.items():
        if name is not None and not isinstance(name, str):
            raise ConfigurationError(f"The {what} {name!r} of caller {caller!r} is no str. Pass its name.")


def _checked(attributes: object, caller: str) -> dict[str, Scalar]:
    if not isinstance(attributes, Mapping):
        raise ConfigurationError(
            f"The attributes {attributes!r} of caller {caller!r} are no mapping. Pass a dict of names to values."
        )
    return check_attributes(attributes, f"caller {caller!r}")
