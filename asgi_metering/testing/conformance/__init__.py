"""
The store conformance suite: every rule that a store must keep, as sentences that any test runner can play.

    class TestMyStore(StoreConformance):
        async def make_store(self, clock):
            store = MyStore("my://server", clock=clock)
            await store.open()
            return store

Each test opens a fresh store, plays one scene on it, proves that its books balance, and closes it. pytest shows the
values behind a failed assertion if ``pytest.register_assert_rewrite("asgi_metering.testing.conformance")`` was called
first. Knows the contract of stores and the rules, and no store.
"""

from __future__ import annotations

from asgi_metering.testing.conformance.admitting import Admitting, Paying, Sourcing
from asgi_metering.testing.conformance.bounding import Bounding
from asgi_metering.testing.conformance.correcting import Correcting, Folding
from asgi_metering.testing.conformance.ending import Doubting, Ending
from asgi_metering.testing.conformance.granting import Granting, Passing
from asgi_metering.testing.conformance.growing import Growing, Undoing
from asgi_metering.testing.conformance.keying import Repeating, Together
from asgi_metering.testing.conformance.limiting import Limiting
from asgi_metering.testing.conformance.moving import Moving
from asgi_metering.testing.conformance.ordering import Ordering
from asgi_metering.testing.conformance.outbox import Delivering, Reading, Sharing
from asgi_metering.testing.conformance.scene import tables
from asgi_metering.testing.conformance.sharing import SharingReadings

__all__ = ["StoreConformance", "tables"]


class StoreConformance(
    Admitting,
    Paying,
    Sourcing,
    Ordering,
    Limiting,
    Growing,
    Undoing,
    Repeating,
    Together,
    Ending,
    Doubting,
    Granting,
    Correcting,
    Folding,
    Bounding,
    Passing,
    Delivering,
    Sharing,
    SharingReadings,
    Reading,
    Moving,
):
    """
    What every store must do. Subclass it, and write `make_store`.

    A test is a method ``test_...`` without arguments; its docstring is the rule that it plays. Tests are independent
    of each other, and each makes one store (two where a store is compared with itself).
    """
