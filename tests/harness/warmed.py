"""Imported by the server of `multiprocessing` alone, last: what each of its processes would otherwise do anew."""

from __future__ import annotations

import asyncio
import gc

from asgi_metering.tokens import warm_up

__all__: list[str] = []

asyncio.run(warm_up())
# A collection in a process that was forked would copy every page of what was imported before.
gc.collect()
gc.freeze()
