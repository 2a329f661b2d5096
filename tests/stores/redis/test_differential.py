"""
The Redis store beside the memory store: the same operations, the same answers, the same whole state.

The scripts mirror the rules, and what they do not run is decided on rows that were loaded. A rule that a script tells
otherwise, a row that was not loaded or was written wrongly, makes it differ from the store that runs the rules. Two
stores on one namespace work in turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from asgi_metering.rules.operations import PostGrant
from asgi_metering.stores.redis import RedisStore
from tests.harness.valkey import ValkeyServer
from tests.stores import test_differential
from tests.stores.beside import Pair, run_any_sequences, run_as_a_service
from tests.stores.places import PATIENT_S

_numbers = count()

Maker = Callable[..., RedisStore]


def beside(make_store: Maker, server: ValkeyServer) -> Pair:
    """Both stores, on a namespace of their own; whole states are read by looking at all keys, so they go at the end."""
    namespace = f"pair{next(_numbers)}"
    return Pair(
        lambda clock: make_store(namespace=namespace, clock=clock, timeout_s=PATIENT_S),
        after=lambda: server.ask("FLUSHALL"),
    )


@pytest.mark.timeout(900)  # Making a failure small takes minutes; passing takes seconds.
def test_run_any_sequences_beside_memory(make_store: Maker, server: ValkeyServer) -> None:
    """Whatever is run, Redis answers as memory does and keeps what memory keeps."""
    run_any_sequences(lambda: beside(make_store, server))


@pytest.mark.timeout(1_800)  # For more steps than usual.
def test_serve_beside_memory(make_store: Maker, server: ValkeyServer) -> None:
    """Many thousand steps of a service are answered and kept as in memory, with a clock that also steps back."""
    run_as_a_service(lambda: beside(make_store, server))


@pytest.fixture
def pair(make_store: Maker, server: ValkeyServer) -> Iterator[Pair]:
    """Both stores, with one account of 1,000 units."""
    pair = beside(make_store, server)
    pair.run(PostGrant("g", "p", "credits", 1_000))
    yield pair
    pair.close()


# What is too rare to be met by chance is told once, for every store.
globals().update(
    {
        name: test
        for name, test in vars(test_differential).items()
        if name.startswith("test_") and "pair" in inspect.signature(test).parameters
    }
)
