"""Who calls, as the application authenticated it: a value that knows nothing of how it was found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from asgi_metering.attributes import Scalar, check_attributes
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_key

__all__ = ["Caller"]


@dataclass(frozen=True, slots=True)
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
    payer: str = ""
    plan: str | None = None
    type: str | None = None
    attributes: Mapping[str, Scalar | None] = field(default_factory=dict)
    exempt: bool = False

    def __post_init__(self) -> None:
        check_key(self.id, "caller id")
        if self.payer:
            check_key(self.payer, "payer")
        else:
            object.__setattr__(self, "payer", self.id)
        # One is made for every request: what nearly all leave out is asked in one step.
        if self.plan is not None or self.type is not None:
            self._check_names()
        if type(self.exempt) is not bool:
            # What looks like yes, a header's "false" for instance, must exempt nobody.
            raise ConfigurationError(f"exempt={self.exempt!r} of caller {self.id!r} is no bool. Pass True or False.")
        if self.attributes or type(self.attributes) is not dict:
            self._check_attributes()

    def _check_names(self) -> None:
        for what, name in (("type", self.type), ("plan", self.plan)):
            if name is not None and not isinstance(name, str):
                raise ConfigurationError(f"The {what} {name!r} of caller {self.id!r} is no str. Pass its name.")

    def _check_attributes(self) -> None:
        if not isinstance(self.attributes, Mapping):
            raise ConfigurationError(
                f"The attributes {self.attributes!r} of caller {self.id!r} are no mapping. Pass a dict of names to "
                f"values."
            )
        object.__setattr__(self, "attributes", check_attributes(self.attributes, f"caller {self.id!r}"))
