"""
Places: where the server is, and how a connection to it is made. A place is asked again after every lost connection.

One server; the master that sentinels name; the nodes of a Cluster. Does not know what is said.
"""

from __future__ import annotations

import abc
import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from asgi_metering.errors import ConfigurationError, MissingExtraError, StoreUnavailableError

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = ["Address", "ClusterPlace", "NodePlace", "Place", "SentinelPlace", "ServerPlace", "driver"]

Address = tuple[str, int]

MOVE_PAUSE_S = 0.05
"""While a slot moves, or a new master is chosen, asking at once again finds the same."""


_WRAPPED = re.compile(r"^ERR Error running script .*: -(?=[A-Z]+ )", re.DOTALL)
"""What Redis 6.2 puts before what a command said within a script: that it is full, or no master any more."""


class Driver(NamedTuple):
    """What is used of redis-py."""

    exceptions: Any
    pack: Callable[[Any], bytes]
    reader: Callable[[Any], Any]
    connection: Any
    sentinel: Any
    retry: Callable[[], Any]
    slot: Callable[[bytes], int]


@cache
def driver() -> Driver:
    """
    The driver, imported when it is first needed.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import hiredis
        import redis.asyncio.connection
        import redis.asyncio.sentinel
        import redis.backoff
        import redis.crc
        import redis.exceptions
        from redis.asyncio.retry import Retry
    except ImportError:
        raise MissingExtraError("The Redis store", "redis") from None
    return Driver(
        redis.exceptions,
        lambda command: hiredis.pack_command(tuple(command)),
        lambda connection: hiredis.Reader(
            protocolError=redis.exceptions.InvalidResponse,
            replyError=lambda said: connection._parser.parse_error(_WRAPPED.sub("", said)),
        ),
        redis.asyncio.connection,
        redis.asyncio.sentinel,
        lambda: Retry(redis.backoff.NoBackoff(), 0),
        redis.crc.key_slot,
    )


class Place(abc.ABC):
    """
    Where one server is.

    Args:
        options: Of the driver's connection, without an address: user, password, database, TLS.
        timeout_s: Seconds to wait for a connection.
    """

    may_move = True
    """Whether it is asked again when a server says that it is not the one."""

    def __init__(self, options: Mapping[str, Any], timeout_s: float) -> None:
        self.options = dict(options)
        self.timeout_s = timeout_s

    @abc.abstractmethod
    def __str__(self) -> str:
        """Where it is, for people; no credentials."""

    @abc.abstractmethod
    async def address(self) -> Address | None:
        """Where the server is now; None if the options say it themselves."""

    async def moved(self, _: Exception) -> None:
        """The server says that it is not the one: wait a moment before the place is asked again."""
        await asyncio.sleep(MOVE_PAUSE_S)

    async def connect(self, address: Address | None = None) -> AbstractConnection:
        """
        Connect, and say who we are.

        Raises:
            StoreUnavailableError: It cannot be reached now.
            ConfigurationError: It does not accept our credentials, or the options are none of a connection.
        """
        errors = driver().exceptions
        address = address or await self.address()
        options = dict(self.options)
        kind = options.pop("connection_class", driver().connection.Connection)
        if address is not None:
            options["host"], options["port"] = address
        where = str(self) if address is None else f"{address[0]}:{address[1]}"
        try:
            connection: AbstractConnection = kind(
                **options,
                protocol=2,
                socket_timeout=None,
                socket_connect_timeout=self.timeout_s,
                retry=driver().retry(),
            )
        except TypeError as error:
            raise ConfigurationError(_unknown(error)) from error
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except (errors.AuthenticationError, errors.NoPermissionError) as error:
            raise ConfigurationError(
                f"The Redis server at {where} does not accept our credentials: {error}. Check user and password."
            ) from error
        except (errors.ConnectionError, errors.TimeoutError, errors.ResponseError, OSError) as error:
            await connection.disconnect(nowait=True)
            told = str(error).removesuffix(".")
            raise StoreUnavailableError(
                f"The Redis server at {where} cannot be reached: {told}. Check its address, and that it runs."
            ) from error
        return connection


class ServerPlace(Place):
    """One server, at the address of its URL."""

    def __str__(self) -> str:
        path = self.options.get("path")
        return path or f"{self.options.get('host', 'localhost')}:{self.options.get('port', 6379)}"

    async def address(self) -> Address | None:
        """The options have it."""
        return None


class SentinelPlace(Place):
    """
    The master that sentinels name.

    Args:
        sentinels: Where they are.
        master: Its name there.
        options, timeout_s: As of `Place`.
    """

    def __init__(self, sentinels: Sequence[Address], master: str, options: Mapping[str, Any], timeout_s: float) -> None:
        super().__init__(options, timeout_s)
        self.sentinels = tuple(sentinels)
        self.master = master

    def __str__(self) -> str:
        return f"{self.master!r} of the sentinels {_shown(self.sentinels)}"

    async def address(self) -> Address:
        """Ask the sentinels in turn."""
        kit, errors = driver().sentinel, driver().exceptions
        # Asked once each: the driver's own repeats would cost seconds for each sentinel that is gone.
        once = {
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
            "retry": driver().retry(),
        }
        asked = kit.Sentinel(list(self.sentinels), sentinel_kwargs=once)
        try:
            host, port = await asked.discover_master(self.master)
        except (errors.ConnectionError, errors.TimeoutError, errors.ResponseError, OSError) as error:
            # The driver shows its clients with all of their settings.
            told, _, _ = str(error).partition(" : <")
            raise StoreUnavailableError(
                f"No sentinel names a master {self.master!r} now: {told}. Check the addresses of the sentinels, and "
                f"the name of the master."
            ) from error
        finally:
            for client in asked.sentinels:
                await client.aclose()
        return str(host), int(port)


class NodePlace(Place):
    """
    One node of a Cluster.

    Args:
        node: Where it is.
        options, timeout_s: As of `Place`.
    """

    may_move = False

    def __init__(self, node: Address, options: Mapping[str, Any], timeout_s: float) -> None:
        super().__init__(options, timeout_s)
        self.node = node

    def __str__(self) -> str:
        return _shown([self.node])

    async def address(self) -> Address:
        """Always the same."""
        return self.node


class ClusterPlace:
    """
    The nodes of a Cluster.

    Args:
        seeds: Nodes to ask first.
        options, timeout_s: As of `Place`, for each node.
    """

    def __init__(self, seeds: Sequence[Address], options: Mapping[str, Any], timeout_s: float) -> None:
        self.seeds = tuple(seeds)
        self._options = dict(options)
        self._timeout_s = timeout_s
        self._nodes: list[Address] = list(seeds)

    def __str__(self) -> str:
        return f"the Cluster of {_shown(self.seeds)}"

    def node(self, address: Address) -> NodePlace:
        """The node at *address*."""
        return NodePlace(address, self._options, self._timeout_s)

    async def owners(self) -> dict[tuple[int, int], Address]:
        """
        Who owns which slots, by first and last slot: as the first node says that answers.

        Raises:
            StoreUnavailableError: None does.
            ConfigurationError: As of `Place.connect`.
        """
        failure: Exception | None = None
        for node in self._nodes:
            try:
                return await self._asked(node)
            except StoreUnavailableError as error:
                failure = error
        raise StoreUnavailableError(f"No node of {self} answers: {failure}") from failure

    async def _asked(self, node: Address) -> dict[tuple[int, int], Address]:
        errors = driver().exceptions
        connection = await self.node(node).connect()
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.send_command("CLUSTER", "SLOTS")
                ranges = await connection.read_response(disable_decoding=True)
        except (errors.RedisError, OSError) as error:
            raise StoreUnavailableError(f"The node {_shown([node])} tells no slots: {error}") from error
        finally:
            await connection.disconnect(nowait=True)
        masters = {(first, last): (master[0].decode() or node[0], int(master[1])) for first, last, master, *_ in ranges}
        self._nodes = list(dict.fromkeys([*masters.values(), *self.seeds]))
        return masters


def _unknown(error: TypeError) -> str:
    """What the driver's signature said of an option: all that are not ours go there."""
    named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    told = "an option" if named is None else f"the option {named[1]!r}"
    return (
        f"The Redis URL has {told}, which redis-py does not know. Look at its spelling; ours are namespace=, timeout=, "
        f"connect_timeout=, tls= and partitions=."
    )


def _shown(addresses: Sequence[Address]) -> str:
    return ", ".join(f"{host}:{port}" for host, port in addresses)
