"""Running the demo: real servers, a real client, an embedded SQLite store in a folder of its own."""

from __future__ import annotations

import asyncio
import inspect
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2

from asgi_metering import Metering, UsageEvent
from asgi_metering.demo.gateway import KEYS, gateway, who
from asgi_metering.demo.servers import serving
from asgi_metering.demo.story import STEPS, Stage, StepFailed
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.testing import Provider

__all__ = ["demo"]


async def demo(*, serve: bool = False, port: int = 0) -> int:
    """
    Play the story and print it.

    Args:
        serve: Keep the gateway up afterwards, and print what to try.
        port: The gateway's; 0 takes a free one.

    Returns:
        0 if every step did what it says, else 1.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asgi-metering-demo-")))
        events: list[UsageEvent] = []
        metering = Metering(f"sqlite:///{folder}/metering.db", identify=who, sinks=[CallbackSink(events.extend)])
        provider = Provider()
        upstream = await stack.enter_async_context(serving(provider))
        url = await stack.enter_async_context(serving(gateway(metering, upstream), port))
        client = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=20))
        print(f"A gateway at {url}, a provider at {upstream}, a ledger in SQLite.\n")
        failed = await _play(Stage(metering, provider, client, events))
        if serve and not failed:
            await _stay(metering, url)
    return 1 if failed else 0


async def _play(stage: Stage) -> int:
    failed = 0
    for number, (title, step) in enumerate(STEPS, 1):
        print(f"{number:>2}. {title}")
        print(f"    {inspect.getdoc(step)}")
        try:
            shown = await step(stage)
        except StepFailed as failure:
            failed += 1
            print(f"    FAILED: {failure}\n")
        except Exception as failure:  # noqa: BLE001 -- it did not do what it says, and the others still may
            failed += 1
            print(f"    FAILED: {failure!r}\n")
        else:
            # At once, also into a pipe: a person reads along.
            print("".join(f"      {line}\n" for line in shown.splitlines()), flush=True)
    print(f"{len(STEPS) - failed} of {len(STEPS)} steps did what they say.")
    return failed


async def _stay(metering: Metering, url: str) -> None:
    for owner in KEYS.values():
        await metering.grant(owner, 100, id=f"serve-{owner}", actor="demo")
    print(
        f"""
The gateway stays up; Ctrl-C ends it. Try:

  curl -N {url}/v1/chat/completions -H 'authorization: Bearer key-ada' -H 'content-type: application/json' \\
       -d '{{"model": "echo:slow", "stream": true, "messages": [{{"role": "user", "content": "Hi"}}]}}'

  curl -i {url}/v1/messages -H 'x-api-key: key-bob' -H 'content-type: application/json' \\
       -d '{{"model": "claude-echo", "max_tokens": 50, "messages": [{{"role": "user", "content": "Hi"}}]}}'

  curl -i {url}/v1/chat/completions -H 'authorization: Bearer key-nobody' -d '{{}}'
""",
        flush=True,
    )
    await asyncio.Event().wait()
