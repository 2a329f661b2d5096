"""
Packages: what somebody has bought of a provider, or is allowed by its plan, as a catalogue tells it.

Knows the fields of an entry, and says in one sentence what is wrong with one. Never knows a file or a clock, and holds
no credential: only the name of the variable that has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args
from zoneinfo import ZoneInfo

from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name
from asgi_metering.quotas.dialects import UNKNOWN

__all__ = [
    "MAX_PACKAGES",
    "SCHEMA_VERSION",
    "Catalogue",
    "Confidence",
    "Package",
    "PackageSource",
    "PackageType",
    "read_catalogue",
    "read_package",
    "register_package_type",
    "total_key",
]

PackageType: TypeAlias = Literal["credits", "rolling_window", "daily"]
"""The types that are known here; `register_package_type` adds others."""

PackageSource: TypeAlias = Literal["api_poll", "header_capture", "local_count", "manual"]
Confidence: TypeAlias = Literal["high", "medium", "low", "estimated"]

SCHEMA_VERSION: Final = "1.1"
"""Of the catalogues that are written; those of any 1.x are read, with whatever they hold besides."""

MAX_PACKAGES: Final = 1_000
"""Entries of one catalogue: a person keeps it."""

MAX_TEXT: Final = 2_000
"""Characters of a note."""

DEFAULT_WINDOW_HOURS: Final = 5.0

_SECRET: Final = re.compile("key|secret|token|passw|pwd|credential|auth(?!ors?$)|bearer|cookie", re.IGNORECASE)

MAX_DEPTH: Final = 10
"""Of what else an entry holds: nobody writes deeper, and it is shown as JSON."""

_VARIABLE: Final = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """
    One package of a catalogue.

    Attributes:
        package_id: Its name; ``"PROVIDER-TYPE"`` where none is told (S1.5).
        provider_id: Whose it is, as `Metering.upstream_client` names the provider.
        extra_provider_ids: Other names that use it too; counts are summed (S1.20).
        package_type: ``credits`` are spent once, a ``rolling_window`` and a ``daily`` package come back; or the name of
            a registered type, which comes back as its function says (S1.2).
        total: Credits, or calls in a window or a day, in whatever unit the provider sells.
        used: Of it, as last told.
        source: Who tells what is used.
        confidence: How far that is to be believed.
        last_updated: When it was told, in ISO 8601.
        window_hours: Of a rolling window.
        zone: Whose midnight begins a day.
        expiry_date: The last day of credits, ``YYYY-MM-DD``.
        model_weights: How many calls one call of a model counts as; 1 where it is not named (S1.11). A name without a
            date behind it is that of all dates.
        resource, label: Which limit of which readings a package with ``source: header_capture`` shows.
        poll: Which kind of balance endpoint to ask; the provider's own by default.
        url: Where, instead of the kind's own address.
        api_key_env: The environment variable with the key to ask with, instead of the kind's own.
        notes: For people.
        extras: Whatever else the entry holds, but what is named like a credential: extras are shown.

    Raises:
        ConfigurationError: A field has a value that it cannot have; the sentence begins with its name.
    """

    package_id: str
    provider_id: str = UNKNOWN
    extra_provider_ids: tuple[str, ...] = ()
    package_type: str = "credits"
    total: float = 0.0
    used: float = 0.0
    source: PackageSource = "manual"
    confidence: Confidence = "medium"
    last_updated: str | None = None
    window_hours: float = DEFAULT_WINDOW_HOURS
    zone: str = "UTC"
    expiry_date: str | None = None
    model_weights: Mapping[str, float] = field(default_factory=dict)
    resource: str = "requests"
    label: str | None = None
    poll: str | None = None
    url: str | None = None
    api_key_env: str | None = None
    notes: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.package_id:
            raise ConfigurationError("package_id is empty. Write a name.")
        for name, (field_name, read) in _FIELDS.items():
            value = getattr(self, field_name)
            if value is not None:
                object.__setattr__(self, field_name, read(name, value))
        object.__setattr__(self, "extras", _showable(self.extras))

    @property
    def providers(self) -> tuple[str, ...]:
        """Every name that uses it."""
        return (self.provider_id, *self.extra_provider_ids)

    def window(self, now: float) -> tuple[float, float] | None:
        """When its window at *now* began, and when it ends; None where it rolls, and of credits."""
        told = WINDOWS.get(self.package_type)
        return None if told is None else told(self, now)

    def window_start(self, now: float) -> float:
        """Epoch seconds from which calls count at *now*: midnight of its zone, or so many hours ago (S1.11, S1.13)."""
        window = self.window(now)
        return now - self.window_hours * 3600 if window is None else window[0]


class Catalogue(NamedTuple):
    """
    What a catalogue holds.

    Attributes:
        packages: By id, in its order, without the entries that are broken.
        problems: A sentence for each of those (S1.17).
    """

    packages: Mapping[str, Package]
    problems: tuple[str, ...] = ()


def midnight(now: float, zone: str, days: int = 0) -> float:
    """Epoch seconds of the midnight of *zone* that began the day of *now*, or so many days later."""
    today = datetime.fromtimestamp(now, UTC).astimezone(ZoneInfo(zone)).date().toordinal()
    return datetime.fromordinal(today + days).replace(tzinfo=ZoneInfo(zone)).timestamp()


Window: TypeAlias = Callable[[Package, float], tuple[float, float]]
"""Answers when the window of a package that a moment lies in began, and when it ends: epoch seconds, all three."""

WINDOWS: Final[dict[str, Window]] = {
    "daily": lambda package, now: (midnight(now, package.zone), midnight(now, package.zone, 1))
}
"""Types whose windows a calendar says."""


def register_package_type(name: str, window: Window) -> None:
    """
    Make *name* a type of packages, whose units come back when a window ends: a month of a calendar, say (S1.2).

    Args:
        name: As catalogues write it in ``package_type``; ``limit_per_window`` is its total.
        window: Answers for a package and epoch seconds when the window of that moment began, and when it ends.

    Everything else is as of a day: what is counted, captured headers, alerts, pace and points. A function that raises
    costs its own packages their status, and no other. Register before a catalogue is read.

    Raises:
        ConfigurationError: The name is known for something else, or is none; the function is none.
    """
    check_name(name, "package type")
    if not callable(window):
        raise ConfigurationError(f"window={window!r} cannot be called. Pass a function of a package and a moment.")
    if name in get_args(PackageType) or WINDOWS.get(name, window) is not window:
        raise ConfigurationError(f"The package type {name!r} is known already. Choose another name.")
    WINDOWS[name] = window


def _types() -> tuple[str, ...]:
    return tuple(dict.fromkeys((*get_args(PackageType), *WINDOWS)))


def read_catalogue(payload: object, name: str) -> Catalogue:
    """
    Read a catalogue that was parsed from JSON or TOML; entries that are broken are told of and left out (S1.17).

    Args:
        payload: A mapping with ``packages``, a mapping of ids to entries; everything beside it is the keeper's own.
        name: Of the file, for the sentences.

    Raises:
        ConfigurationError: It is no catalogue, or one of a later format.

    Source: S1.18. ``schema_version`` 1.0 and files without one are read alike.
    """
    if not isinstance(payload, Mapping):
        raise ConfigurationError(f"{name} holds no object. Write {{'packages': {{...}}}}.")
    version = str(payload.get("schema_version", SCHEMA_VERSION))
    if version.partition(".")[0] != "1":
        raise ConfigurationError(f"{name}: schema_version {version!r} is not 1.x. Update asgi-metering to read it.")
    entries = payload.get("packages", {})
    if not isinstance(entries, Mapping) or len(entries) > MAX_PACKAGES:
        raise ConfigurationError(f"{name}: packages is no mapping of at most {MAX_PACKAGES} entries. Write id: entry.")
    packages: dict[str, Package] = {}
    problems = []
    for key, entry in entries.items():
        try:
            package = read_package(entry, str(key))
            packages[package.package_id] = package
        except ConfigurationError as wrong:
            problems.append(
                f"{name}: packages.{key}.{wrong}" if str(wrong)[:1] != " " else f"{name}: packages.{key}{wrong}"
            )
    return Catalogue(packages, tuple(problems))


def read_package(entry: object, package_id: str = "") -> Package:
    """
    Read one entry of a catalogue.

    Args:
        entry: Its fields, as `Package` names them; ``total_credits``, ``used_credits``, ``limit_per_window`` and
            ``limit_per_day`` stand for *total* and *used* (S1.18). Fields that are not known go into *extras*.
        package_id: The key it stands under; a ``package_id`` of its own wins.

    Raises:
        ConfigurationError: A field has a value that it cannot have; the sentence begins with the field's name.
    """
    if not isinstance(entry, Mapping):
        raise ConfigurationError(f" is {entry!r}, and no object. Write its fields by name.")
    fields: dict[str, Any] = {}
    for key, (name, read) in _FIELDS.items():
        value = entry.get(key)
        if value is not None and value != "":
            # Read here, whose sentences name the entry's own fields.
            fields[name] = read(key, value)
    kind = fields.setdefault("package_type", "credits")
    for key, name in ((total_key(kind), "total"), ("used_credits", "used")):
        if entry.get(key) is not None:
            fields[name] = _number(key, entry[key])
    fields.setdefault("provider_id", UNKNOWN)
    fields["package_id"] = fields.get("package_id") or package_id or f"{fields['provider_id']}-{kind}"
    fields["extras"] = _showable({key: value for key, value in entry.items() if key not in _KNOWN})
    return Package(**fields)


def total_key(package_type: str) -> str:
    """What catalogues call the total of such a package."""
    return {"credits": "total_credits", "daily": "limit_per_day"}.get(package_type, "limit_per_window")


def _showable(value: Any, depth: int = 0) -> Any:
    """*value* as JSON can say it, without what is named like a credential, wherever in it that is."""
    if isinstance(value, Mapping | list | tuple) and depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            named = {str(key): each for key, each in value.items()}
            return {key: _showable(each, depth + 1) for key, each in named.items() if not _SECRET.search(key)}
        return [_showable(each, depth + 1) for each in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    # TOML has dates, and both formats numbers that JSON cannot say.
    return "..." if isinstance(value, Mapping | list | tuple) else str(value)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ConfigurationError(f"{key} is {_shown(value)}, and no text of at most {MAX_TEXT} characters. Write one.")
    return value


def _number(key: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigurationError(f"{key} is {_shown(value)}, and no number from 0 up. Write one such as 25.")
    return number


def _hours(key: str, value: object) -> float:
    hours = _number(key, value)
    if not hours:
        raise ConfigurationError(f"{key} is 0, and no window is that short. Write {DEFAULT_WINDOW_HOURS:g}, say.")
    return hours


def _variable(key: str, value: object) -> str:
    if not isinstance(value, str) or not _VARIABLE.fullmatch(value):
        # Not shown: it may be the key itself.
        raise ConfigurationError(f"{key} is no name of a variable. Write the one that has the key, not the key.")
    return value


def _date(key: str, value: object) -> str:
    # TOML has dates of its own.
    return _text(key, value.isoformat() if hasattr(value, "isoformat") else value)


def _texts(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"{key} is {_shown(value)}, and no list. Write one of names.")
    return tuple(_text(key, each) for each in value)


def _weights(key: str, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{key} is {_shown(value)}, and no object of models and numbers. Write one.")
    return {str(model): _number(f"{key}.{model}", weight) for model, weight in value.items()}


def _zone(key: str, value: object) -> str:
    name = _text(key, value)
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as unknown:
        raise ConfigurationError(f"{key} is {name!r}, and no zone. Write 'UTC' or 'Europe/Berlin', say.") from unknown
    return name


def _one_of(choices: Callable[[], tuple[str, ...]]) -> Callable[[str, object], str]:
    def read(key: str, value: object) -> str:
        if value not in choices():
            raise ConfigurationError(f"{key} is {_shown(value)}. Use one of {', '.join(choices())}.")
        return str(value)

    return read


def _shown(value: object) -> str:
    return repr(value)[:80]


_FIELDS: Final[Mapping[str, tuple[str, Callable[[str, object], Any]]]] = {
    "package_id": ("package_id", _text),
    "provider_id": ("provider_id", _text),
    "extra_provider_ids": ("extra_provider_ids", _texts),
    "package_type": ("package_type", _one_of(_types)),
    "total": ("total", _number),
    "used": ("used", _number),
    "source": ("source", _one_of(partial(get_args, PackageSource))),
    "confidence": ("confidence", _one_of(partial(get_args, Confidence))),
    "last_updated": ("last_updated", _date),
    "window_hours": ("window_hours", _hours),
    "zone": ("zone", _zone),
    "expiry_date": ("expiry_date", _date),
    "model_weights": ("model_weights", _weights),
    "resource": ("resource", _text),
    "label": ("label", _text),
    "poll": ("poll", _text),
    "url": ("url", _text),
    "api_key_env": ("api_key_env", _variable),
    "notes": ("notes", _text),
}
_KNOWN: Final = frozenset({*_FIELDS, "total_credits", "used_credits", "limit_per_window", "limit_per_day"})
