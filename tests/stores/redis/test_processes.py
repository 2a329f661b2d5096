"""Processes that write to an account while another one decides on rows of it that it has read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from asgi_metering.rules.operations import Operation, PostGrant
from tests.harness.valkey import ValkeyServer
from tests.stores.places import store_at
from tests.stores.test_races import GRANTED, KEY, Course


def test_post_to_an_account_that_others_keep_changing(server: ValkeyServer, schema: str) -> None:
    """What is decided on rows that were read comes through on an account that is never the same for a millisecond."""
    course = Course(f"{server.url}?namespace={schema}")
    course.prepare()
    posted = [PostGrant(f"more{number}", "payer", "credits", 5) for number in range(20)]
    with course.processes("work", 10_000, 2, is_streaming=True) as workers:
        for worker in workers:
            worker.told.recv()
        receipts = asyncio.run(_one_by_one(course.url, posted))
    assert all(receipt.applied for receipt in receipts)
    assert course.everything().accounts[KEY].granted == GRANTED + 100


async def _one_by_one(url: str, operations: Sequence[Operation]) -> list[Any]:
    store = store_at(url)
    await store.open()
    answers = [answer for operation in operations for answer in await store.run([operation])]
    await store.close()
    return answers
