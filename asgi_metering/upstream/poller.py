"""
The poller: asks providers what is left of the credits that they sell, and writes it into the catalogue.

Knows HTTP, keys and time. What answers mean is known by `quotas.balances`; keys go into requests and nowhere else, not
into an error either. Nothing that happens here reaches the application (S1.32).
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

from asgi_metering.errors import BalanceError, ConfigurationError
from asgi_metering.quotas.balances import ENDPOINTS, Endpoint, Found, read_with
from asgi_metering.quotas.packages import Package
from asgi_metering.upstream.catalogue import write_usage
from asgi_metering.upstream.libraries import choose_library, library_of
from asgi_metering.upstream.tracker import QuotaTracker
from asgi_metering.upstream.turns import Turn
from asgi_metering.usage.inflate import Inflate

if TYPE_CHECKING:
    from httpx2 import AsyncClient

__all__ = ["FAST_LANE_DAYS", "FAST_LANE_INTERVAL_S", "INTERVAL_S", "Polled", "QuotaPoller"]

log = logging.getLogger("asgi_metering.quotas")

INTERVAL_S: Final = 3_600.0
"""Between polls of a package (S1.22)."""

FAST_LANE_INTERVAL_S: Final = 900.0
"""Of one that expires within `FAST_LANE_DAYS` (S1.22, S1.23)."""

FAST_LANE_DAYS: Final = 14

AT_ONCE: Final = 4
"""Polls that are under way together (S1.31)."""

CONNECT_S: Final = 5.0
READ_S: Final = 10.0
"""To connect, and for each read of an answer (S1.31)."""

WHOLE_S: Final = 30.0
"""For one package, all of its addresses together: an answer may trickle."""

MAX_ANSWER: Final = 1 << 20
"""Bytes of an answer: known ones have a few hundred."""

MIN_PAUSE_S: Final = 1.0
"""Between looks at what is due, whatever the intervals are."""

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Polled(NamedTuple):
    """
    What came of polling one package.

    Attributes:
        package_id: Of the package.
        is_ok: Whether the provider told.
        total: What there is, and
        used: what is used of it, as it is known now.
        error: Why the provider did not tell; None where it did, or where nobody asked.
        is_skipped: Nobody asked: there is no key (S1.27).
    """

    package_id: str
    is_ok: bool
    total: float
    used: float
    error: str | None = None
    is_skipped: bool = False


class QuotaPoller:
    """
    Asks for the balances of the packages of type ``credits`` with ``source: api_poll`` (S1.21).

    ``async with poller:`` polls in the background while the block runs, such as that of an application's lifespan, if
    it is *enabled*. Of several workers with one catalogue file one polls, and the others read what it wrote.

    Args:
        tracker: Whose packages.
        enabled: Nothing is asked in the background unless this is said (S1.22).
        on_startup: Poll at once, and not only after the first interval.
        interval_s: Between polls of a package.
        fast_lane_interval_s: Between those of one that expires within 14 days (S1.23).
        keys: Keys by kind or package id, for those that the environment does not have (S1.27).
        endpoints: Kinds of one's own by name, looked for before the known ones: addresses, a parser of their JSON, the
            variable of the key (S1.21). ``{"acme": Endpoint(("https://acme.example/balance",), parse, "ACME_KEY")}``.
        environ: Where keys are looked for first.
        library: ``"httpx2"`` or ``"httpx"``; the first one installed by default.
        clock: Steady seconds.
        sleep: Awaits seconds.
        client_options: Any option of the library's ``AsyncClient`` besides timeouts and redirects, such as ``proxy``.

    Raises:
        ConfigurationError: An interval is none, or an endpoint; or packages of a catalogue in TOML are polled, which
            has no writer.
    """

    def __init__(
        self,
        tracker: QuotaTracker,
        *,
        enabled: bool = False,
        on_startup: bool = True,
        interval_s: float = INTERVAL_S,
        fast_lane_interval_s: float = FAST_LANE_INTERVAL_S,
        keys: Mapping[str, str] | None = None,
        endpoints: Mapping[str, Endpoint] | None = None,
        environ: Mapping[str, str] = os.environ,
        library: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        **client_options: Any,
    ) -> None:
        for name, seconds in (("interval_s", interval_s), ("fast_lane_interval_s", fast_lane_interval_s)):
            if not seconds >= MIN_PAUSE_S:
                raise ConfigurationError(f"{name}={seconds!r} is no number of seconds from {MIN_PAUSE_S:g} up.")
        self.tracker = tracker
        self.enabled = enabled
        self._on_startup = on_startup
        self._interval_s = interval_s
        self._fast_lane_interval_s = fast_lane_interval_s
        self._keys = dict(keys or {})
        self._endpoints = {**ENDPOINTS, **_checked(endpoints)}
        self._environ = environ
        self._client_options = client_options
        self._library = library
        self._clock = clock
        self._sleep = sleep
        self._asked_at: dict[str, float] = {}
        self._warned: set[str] = set()
        self._turn = None if tracker.file is None else Turn(tracker.file.path)
        self._task: asyncio.Task[None] | None = None
        asked = [each.package_id for each in self.pollable()]
        if asked and tracker.file is not None and tracker.file.path.suffix == ".toml":
            raise ConfigurationError(
                f"{tracker.file.path.name} is TOML, which polls cannot be written into, and {asked[0]!r} is polled. "
                f"Keep it as JSON, which begins with: asgi-metering init quotas.json"
            )

    # -- once ----------------------------------------------------------------------------------------------

    def pollable(self) -> list[Package]:
        """The packages that are polled (S1.21)."""
        packages = self.tracker.packages().values()
        return [each for each in packages if each.source == "api_poll" and each.package_type == "credits"]

    async def poll(self, packages: Sequence[Package] | None = None) -> list[Polled]:
        """
        Ask for *packages* now, by default for all that are polled, and write what was told into the file.

        A package whose provider did not tell keeps its numbers, with low confidence (S1.28). The file is written once,
        and only if somebody told something (S1.30). Results are in the order of the packages.

        Raises:
            MissingExtraError: No HTTP library is installed.
            ConfigurationError: The file could not be written. What was told is known to the tracker all the same.
        """
        asked = self.pollable() if packages is None else list(packages)
        if not asked:
            return []
        library = choose_library(self._library)
        # Keys must not follow a redirect.
        fixed = {"timeout": library.Timeout(READ_S, connect=CONNECT_S), "follow_redirects": False}
        places = asyncio.Semaphore(AT_ONCE)
        async with library.AsyncClient(**{**self._client_options, **fixed}) as client:
            results = await asyncio.gather(*(self._poll(client, places, package) for package in asked))
        if self.tracker.file is not None and any(result.is_ok for result in results):
            known = self.tracker.packages()
            changes = {each.package_id: known[each.package_id] for each in results if each.package_id in known}
            for result in results:
                if result.is_skipped:
                    changes.pop(result.package_id, None)
            await asyncio.to_thread(write_usage, self.tracker.file.path, changes)
        return results

    async def _poll(self, client: AsyncClient, places: asyncio.Semaphore, package: Package) -> Polled:
        endpoint = self._endpoints.get(_kind(package))
        if endpoint is not None and self._key(package, endpoint) is None:
            if package.package_id not in self._warned:
                self._warned.add(package.package_id)
                name = package.api_key_env or endpoint.key_env
                log.warning(
                    "The package %r is not polled: there is no %s in the environment.", package.package_id, name
                )
            return Polled(package.package_id, False, package.total, package.used, is_skipped=True)
        async with places:
            try:
                async with asyncio.timeout(WHOLE_S):
                    found = await self._found(client, package, endpoint)
                total, used = found.over(package.total)
            except (BalanceError, TimeoutError) as failure:
                return self._failed(package, str(failure) or f"There was no answer within {WHOLE_S:g} s.")
        self.tracker.update(package.package_id, total=total, used=used, source="api_poll", confidence="high")
        return Polled(package.package_id, True, total, used)

    def _failed(self, package: Package, error: str) -> Polled:
        log.warning("The balance of the package %r is not known: %s", package.package_id, error)
        self.tracker.update(package.package_id, confidence="low", is_told_now=False)
        return Polled(package.package_id, False, package.total, package.used, error)

    async def _found(self, client: AsyncClient, package: Package, endpoint: Endpoint | None) -> Found:
        """The first of the addresses that tells; else the failure of the last (S1.25)."""
        if endpoint is None:
            raise BalanceError(
                f"{_kind(package)!r} is no kind of balance endpoint. Set poll to one of {', '.join(self._endpoints)}."
            )
        urls = (package.url,) if package.url else endpoint.urls
        failure = BalanceError(f"The kind {_kind(package)!r} has no address of its own. Set the package's url.")
        key = f"{endpoint.prefix}{self._key(package, endpoint)}"
        fields = {endpoint.header: key, "accept": "application/json", "accept-encoding": "gzip"}
        for url in urls:
            try:
                return read_with(endpoint, await _answer(client, url, fields))
            except BalanceError as wrong:
                failure = wrong
        raise failure

    def _key(self, package: Package, endpoint: Endpoint) -> str | None:
        """The environment's key, else the configured one (S1.27); an empty one is none."""
        named = self._environ.get(package.api_key_env or endpoint.key_env)
        key = named or self._keys.get(package.package_id) or self._keys.get(_kind(package))
        return key.strip() or None if key else None

    # -- again and again -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Poll what is due, until cancelled. What fails is logged, and the next round comes (S1.32)."""
        began = self._clock()
        if not self._on_startup:
            self._asked_at = {**dict.fromkeys((each.package_id for each in self.pollable()), began), **self._asked_at}
        while True:
            try:
                pause = await self._round()
            except Exception:
                log.exception("A round of polls failed; the next one comes.")
                pause = self._fast_lane_interval_s
            await self._sleep(max(MIN_PAUSE_S, pause))

    async def _round(self) -> float:
        """Poll what is due, if it is our turn; returns the seconds until something is due again."""
        if self._turn is None or self._turn.take():
            due = [package for package in self.pollable() if self._due_in(package) <= 0]
            self._asked_at.update(dict.fromkeys((package.package_id for package in due), self._clock()))
            await self.poll(due)
            waits = [self._due_in(package) for package in self.pollable()]
            return min(waits, default=self._fast_lane_interval_s)
        return self._fast_lane_interval_s

    def _due_in(self, package: Package) -> float:
        asked_at = self._asked_at.get(package.package_id)
        return 0.0 if asked_at is None else asked_at + self.interval_of(package) - self._clock()

    def interval_of(self, package: Package) -> float:
        """Seconds between polls of *package*: its own, whatever others need (S1.23)."""
        status = self.tracker.status(package.package_id)
        days = None if status is None else status.days_until_expiry
        is_fast = days is not None and 0 <= days <= FAST_LANE_DAYS
        return self._fast_lane_interval_s if is_fast else self._interval_s

    async def __aenter__(self) -> Self:
        if self.enabled and self._task is None:
            # In an empty context: it must not keep whatever is current where it is started.
            self._task = asyncio.get_running_loop().create_task(
                self.run(), name="asgi_metering polls", context=contextvars.Context()
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._turn is not None:
            self._turn.give_back()


def _checked(endpoints: Mapping[str, Endpoint] | None) -> Mapping[str, Endpoint]:
    known = {} if endpoints is None else endpoints
    if not isinstance(known, Mapping) or any(
        not isinstance(kind, str) or not isinstance(each, Endpoint) or not callable(each.parse)
        for kind, each in known.items()
    ):
        raise ConfigurationError(
            f"endpoints={endpoints!r} are no kinds of balance endpoints. Write endpoints={{'acme': Endpoint(...)}}."
        )
    return known


def _kind(package: Package) -> str:
    return package.poll or package.provider_id


def _failures(client: AsyncClient) -> tuple[type[Exception], ...]:
    """What a request may raise: the library's own errors, and what its headers and sockets say."""
    library = library_of(client)
    own = () if library is None else (library.HTTPError, library.InvalidURL)
    return (*own, UnicodeError, OSError)


async def _answer(client: AsyncClient, url: str, fields: Mapping[str, str]) -> Any:
    """The JSON that *url* answers, of at most `MAX_ANSWER` bytes, numbers as they are written; else `BalanceError`."""
    try:
        parts = urlsplit(url)
    except ValueError as wrong:
        raise BalanceError(f"{url!r} is no address. Mend the package's url.") from wrong
    place = f"{parts.hostname}{parts.path}"
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise BalanceError(f"{place} is no https address, and a key does not travel in the clear. Write https://.")
    body = bytearray()
    try:
        async with client.stream("GET", url, headers=dict(fields)) as response:
            if not response.is_success:
                raise BalanceError(f"{place} answered {response.status_code}. Look at the key, and at the kind.")
            # Undone here, piece by piece: some libraries expand a whole chunk before anybody sees how much it is.
            plain = Inflate(response.headers.get("content-encoding"))
            async for chunk in response.aiter_raw():
                for piece in plain.feed(chunk):
                    body += piece
                    if len(body) > MAX_ANSWER:
                        raise BalanceError(f"{place} answered more than {MAX_ANSWER} bytes. It is no balance.")
            if plain.failed:
                raise BalanceError(f"{place} answered what cannot be decoded. Look at the address.")
    except _failures(client) as failure:
        # Without its own words, which may repeat a header's value: that is the key.
        raise BalanceError(f"{place} was not reached: {type(failure).__name__}. Look at the network.") from None
    try:
        return json.loads(bytes(body), parse_float=Decimal)
    except (ValueError, RecursionError) as wrong:
        raise BalanceError(f"{place} answered what is no JSON. Look at the address.") from wrong
