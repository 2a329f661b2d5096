"""
The PostgreSQL store beside the memory store: the same operations, the same answers, the same whole state.

PostgreSQL decides on the rows that it loaded. A row that it did not load, or wrote wrongly, makes it differ from the
store that decides on everything. Two stores on one schema work in turn, one with prepared statements, one without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import count, cycle

import pytest

from asgi_metering.rules.operations import PostGrant
from asgi_metering.stores.postgres import PostgresStore
from tests.harness.postgres import PostgresServer
from tests.stores import test_differential
from tests.stores.beside import Pair, run_any_sequences, run_as_a_service

_numbers = count(1)


def beside(server: PostgresServer) -> Pair:
    """Both stores, on a schema that goes with them."""
    schema = f"pair_{next(_numbers)}"
    prepares = cycle((True, False))
    return Pair(
        lambda clock: PostgresStore(server.url(), namespace=schema, clock=clock, migrate=True, prepare=next(prepares)),
        after=lambda: server.execute(f'DROP SCHEMA "{schema}" CASCADE'),
    )


@pytest.mark.timeout(900)  # Making a failure small takes minutes; passing takes seconds.
def test_run_any_sequences_beside_memory(postgres: PostgresServer) -> None:
    """Whatever is run, PostgreSQL answers as memory does and keeps what memory keeps."""
    run_any_sequences(lambda: beside(postgres))


@pytest.mark.timeout(1_800)  # For more steps than usual.
def test_serve_beside_memory(postgres: PostgresServer) -> None:
    """Many thousand steps of a service are answered and kept as in memory, with a clock that also steps back."""
    run_as_a_service(lambda: beside(postgres))


@pytest.fixture
def pair(postgres: PostgresServer) -> Iterator[Pair]:
    """Both stores, with one account of 1,000 units."""
    pair = beside(postgres)
    pair.run(PostGrant("g", "p", "credits", 1_000))
    yield pair
    pair.close()


# What is too rare to be met by chance is told once, for every store that loads rows.
globals().update(
    {
        name: test
        for name, test in vars(test_differential).items()
        if name.startswith("test_") and "pair" in inspect.signature(test).parameters
    }
)
