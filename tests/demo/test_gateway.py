"""What the demo's gateway passes on of a provider's response."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2

from asgi_metering import Metering
from asgi_metering.demo.gateway import gateway, passing, who
from asgi_metering.demo.servers import serving
from asgi_metering.testing import Provider


def test_pass_on_what_is_for_the_client() -> None:
    """RFC 9110 section 7.6.1: fields of the provider's connection and server stay here, whatever their case."""
    given = [
        ("Date", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ("Server", "provider"),
        ("Content-Type", "text/event-stream"),
        ("Content-Encoding", "gzip"),
        ("Connection", "close, X-Hop"),
        ("X-Hop", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authenticate", "Basic"),
        ("Trailer", "x"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "h2c"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
    ]
    assert passing(given) == [
        ("content-type", "text/event-stream"),
        ("content-encoding", "gzip"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
    ]


def test_send_every_field_once(tmp_path: Path) -> None:
    """Behind a real server, streamed or not, no field of the answer stands there twice, and the body is whole."""

    async def story() -> None:
        metering = Metering(
            f"sqlite:///{tmp_path}/metering.db?synchronous=OFF", identify=who, sinks=(), store_timeout_s=10.0
        )
        async with serving(Provider()) as upstream, serving(gateway(metering, upstream)) as url:
            await metering.grant("ada", 100, id="g")
            async with httpx2.AsyncClient(base_url=url, timeout=20) as client:
                for stream in (False, True):
                    ask = {"model": "echo", "stream": stream, "messages": [{"role": "user", "content": "Hi"}]}
                    headers = {"authorization": "Bearer key-ada"}
                    answer = await client.post("/v1/chat/completions", json=ask, headers=headers)
                    names = [name.lower() for name, _ in answer.headers.multi_items()]
                    assert answer.status_code == 200
                    assert sorted(names) == sorted(set(names))
                    assert {"date", "server", "content-type"} <= set(names)
                    assert answer.text.startswith("data: ") == stream

    asyncio.run(story())
