"""What tests of the bundled provider start with: requests in process, and clients of the real SDKs."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
import openai

from asgi_metering.testing.provider import Provider, SeenRequest
from asgi_metering.tokens import count_tokens
from tests.harness.drive import drive, http_scope
from tests.harness.waiting import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.harness.drive import Drive

__all__ = [
    "ANTHROPIC",
    "CHAT",
    "ENVELOPES",
    "KEYS",
    "MESSAGES",
    "NOW",
    "PROMPT",
    "PROMPT_TOKENS",
    "RESPONSES",
    "Live",
    "ask",
    "events",
    "payload",
    "streamed",
]

NOW = 1_795_000_000.0


PROMPT = "Tell me what the river is called <|endoftext|>."


MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]


PROMPT_TOKENS = count_tokens(f"Be brief.\n{PROMPT}").tokens


KEYS = {"authorization": "Bearer sk-any", "x-api-key": "sk-any", "anthropic-version": "2023-06-01"}


CHAT = "/v1/chat/completions"


RESPONSES = "/v1/responses"


ANTHROPIC = "/v1/messages"


class Live:
    """The provider behind a real server, and clients for it."""

    def __init__(self, provider: Provider, url: str) -> None:
        self.provider = provider
        self.url = url

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        """A client of the real SDK that does not retry unless told to."""
        http = openai.DefaultAsyncHttpxClient(verify=False)  # reads no certificates: the server is on loopback
        defaults: dict[str, Any] = {
            "base_url": f"{self.url}/v1",
            "api_key": "sk-any",
            "max_retries": 0,
            "http_client": http,
        }
        return openai.AsyncOpenAI(**(defaults | options))

    def anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        """A client of the real SDK that does not retry unless told to."""
        http = anthropic.DefaultAsyncHttpxClient(verify=False)
        defaults: dict[str, Any] = {"base_url": self.url, "api_key": "sk-any", "max_retries": 0, "http_client": http}
        return anthropic.AsyncAnthropic(**(defaults | options))

    def last(self) -> SeenRequest:
        """The last request, when the provider is done with it."""
        seen = self.provider.requests[-1]
        assert seen.ended.wait(DEFAULT_TIMEOUT_S)
        return seen


def ask(
    provider: Provider,
    path: str,
    payload: Mapping[str, Any] | bytes,
    *,
    headers: Mapping[str, str] = KEYS,
    method: str = "POST",
) -> httpx2.Response:
    """Send one request in process."""
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()

    async def run() -> httpx2.Response:
        transport = httpx2.ASGITransport(provider)
        async with httpx2.AsyncClient(transport=transport, base_url="http://provider") as client:
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(run())


def payload(path: str, model: str, **rest: Any) -> dict[str, Any]:
    """A request for *model* in the shape of *path*."""
    if path == RESPONSES:
        return {"model": model, "instructions": "Be brief.", "input": PROMPT, **rest}
    if path == ANTHROPIC:
        return {"model": model, "system": "Be brief.", "messages": MESSAGES[1:], "max_tokens": 1_000, **rest}
    return {"model": model, "messages": MESSAGES, **rest}


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """The JSON data of every event of a whole stream; ``[DONE]`` and comments left out."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# The OpenAI SDK


def streamed(path: str, model: str, **options: Any) -> Drive:
    """A stream message by message, in process."""
    scope = http_scope(path, "POST", headers=KEYS.items(), spec_version=options.pop("spec_version", "2.3"))
    provider = options.pop("provider", None) or Provider(clock=lambda: NOW)
    content = json.dumps(payload(path, model, stream=True)).encode()
    return asyncio.run(drive(provider, scope, body=content, **options))


ENVELOPES = [
    (CHAT, lambda answer: (answer["error"]["type"], answer["error"]["code"], answer["error"]["param"])),
    (ANTHROPIC, lambda answer: (answer["type"], answer["error"]["type"], answer["request_id"])),
]
