"""
The demo's story: what is done, what is shown, and what has to be true for it to count.

Each step asserts what it says; one that does not hold makes the demo fail.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from asgi_metering import Metering, UsageEvent
from asgi_metering.demo.gateway import PRICE
from asgi_metering.receipts import Basis, Entry, EntryKind
from asgi_metering.testing import Provider
from asgi_metering.usage import TokenUsage

__all__ = ["STEPS", "Stage", "StepFailed"]


class StepFailed(Exception):  # noqa: N818 -- it is the demo's word
    """A step did not do what it says."""


class Stage:
    """
    What the steps play on.

    Args:
        metering: The gateway's.
        provider: The provider behind the gateway.
        client: A real HTTP client with the gateway as its base URL.
        events: Usage events, as they are delivered.
    """

    def __init__(self, metering: Metering, provider: Provider, client: Any, events: list[UsageEvent]) -> None:
        self.metering = metering
        self.provider = provider
        self.client = client
        self.events = events
        self.charged: list[int] = []

    async def entries(self, payer: str) -> list[Entry]:
        """The payer's statement."""
        return [entry async for entry in self.metering.statement(payer)]

    async def next_charge(self, payer: str, known: int) -> Entry:
        """The charge that follows *known* lines of a statement, once it is booked."""
        for _ in range(400):
            entries = await self.entries(payer)
            if len(entries) > known:
                return entries[known]
            await asyncio.sleep(0.01)
        raise StepFailed(f"No new line appeared on the statement of {payer} within 4 seconds.")

    async def settled(self) -> None:
        """Wait until nothing is in flight."""
        for _ in range(400):
            if not await self.metering.holds():
                return
            await asyncio.sleep(0.01)
        raise StepFailed("Holds are still live after 4 seconds.")

    def credits(self, parts: int) -> str:
        """An amount for people."""
        return f"{self.metering.unit.text(parts)} credits"


def must(holds: bool, sentence: str) -> None:
    """Fail the step with *sentence* unless it holds."""
    if not holds:
        raise StepFailed(sentence)


def asking(model: str, *, words: int = 40, stream: bool = True) -> dict[str, Any]:
    """A chat request."""
    return {
        "model": model,
        "stream": stream,
        "max_tokens": words,
        "messages": [{"role": "user", "content": "Tell me about metering."}],
    }


def key(name: str) -> dict[str, str]:
    """The header of a caller."""
    return {"authorization": f"Bearer key-{name}"}


async def refused_without_credits(stage: Stage) -> str:
    """A stream that nobody can pay for answers 402 before its first byte, and the provider hears nothing."""
    before = len(stage.provider.requests)
    answer = await stage.client.post("/v1/chat/completions", json=asking("echo"), headers=key("ada"))
    must(answer.status_code == 402, f"The status is {answer.status_code}, not 402.")
    must(len(stage.provider.requests) == before, "The provider was called.")
    error = answer.json()["error"]
    return f"402 {error['code']}: {error['message']}"


async def granted(stage: Stage) -> str:
    """A payment arrives: ada gets 20 credits, once, however often its webhook comes."""
    first = await stage.metering.grant("ada", 20, id="payment-1", actor="demo")
    again = await stage.metering.grant("ada", 20, id="payment-1", actor="demo")
    must(first.applied and not again.applied, "The same payment was granted twice.")
    return f"granted once, repeated without effect; {stage.credits(again.available)} available"


async def openai_stream(stage: Stage) -> str:
    """A stream is charged by the tokens that its last chunk reports."""
    known = len(await stage.entries("ada"))
    text = ""
    async with stage.client.stream("POST", "/v1/chat/completions", json=asking("echo"), headers=key("ada")) as answer:
        left = answer.headers["metering-available"]
        foreign = [name for name in answer.headers if name.startswith("x-ratelimit-")]
        usage: dict[str, Any] = {}
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if line.startswith("data: {"):
                chunk = json.loads(data)
                usage = chunk.get("usage") or usage
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    charge = await stage.next_charge("ada", known)
    cost = PRICE.cost(TokenUsage(input=usage["prompt_tokens"], output=usage["completion_tokens"]))
    must(charge.amount == stage.metering.unit.round(cost), f"Charged {charge.amount}, but the usage costs {cost}.")
    must(charge.basis is Basis.USAGE, f"The basis is {charge.basis}.")
    must(not foreign, f"The provider's own limits reached the client: {foreign}.")
    return (
        f"{text[:48]}...\n{usage['prompt_tokens']} + {usage['completion_tokens']} tokens = "
        f"{stage.credits(charge.amount)}, where the response began with Metering-Available: {left}"
    )


async def anthropic_stream(stage: Stage) -> str:
    """The same for Anthropic's format, whose input is counted another way."""
    known = len(await stage.entries("ada"))
    usage: dict[str, int] = {}
    async with stage.client.stream(
        "POST", "/v1/messages", json=asking("claude-echo:cached-3"), headers={"x-api-key": "key-ada"}
    ) as answer:
        must(answer.status_code == 200, f"The status is {answer.status_code}.")
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                usage |= event.get("message", {}).get("usage") or event.get("usage") or {}
    charge = await stage.next_charge("ada", known)
    read = usage["cache_read_input_tokens"]
    cost = PRICE.cost(TokenUsage(input=usage["input_tokens"] + read, cached=read, output=usage["output_tokens"]))
    must(charge.amount == stage.metering.unit.round(cost), f"Charged {charge.amount}, but the usage costs {cost}.")
    return (
        f"{usage['input_tokens']} new + {read} cached + {usage['output_tokens']} output tokens = "
        f"{stage.credits(charge.amount)}"
    )


async def rate_limited_answer(stage: Stage) -> str:
    """The seventh call of a minute answers 429, says when to come back, and costs nothing."""
    await stage.metering.grant("carol", 100, id="payment-3", actor="demo")
    statuses = []
    for _ in range(7):
        answer = await stage.client.post(
            "/v1/chat/completions", json=asking("echo", words=2, stream=False), headers=key("carol")
        )
        statuses.append(answer.status_code)
    await stage.settled()
    charges = [entry for entry in await stage.entries("carol") if entry.kind is EntryKind.SETTLE]
    must(statuses == [200] * 6 + [429], f"The statuses are {statuses}.")
    must(len(charges) == 6, f"{len(charges)} calls were charged instead of 6.")
    return f"429, Retry-After: {answer.headers['retry-after']}, RateLimit: {answer.headers['ratelimit']}"


async def client_hangs_up(stage: Stage) -> str:
    """A client that leaves in the middle of a stream pays for what it got."""
    await stage.metering.grant("bob", 20, id="payment-2", actor="demo")
    known = len(await stage.entries("bob"))
    got = 0
    request = asking("echo:endless:slow-5", words=4_000)
    async with stage.client.stream("POST", "/v1/chat/completions", json=request, headers=key("bob")) as answer:
        async for line in answer.aiter_lines():
            got += line.startswith("data: {")
            if got == 12:
                break
    charge = await stage.next_charge("bob", known)
    full = stage.metering.unit.round(PRICE.cost(TokenUsage(input=0, output=4_000)))
    must(charge.basis is Basis.OBSERVED, f"The basis is {charge.basis}.")
    must(0 < charge.amount < full, f"Charged {charge.amount}.")
    charged = stage.credits(charge.amount)
    return f"left after {got} chunks; charged {charged} for what had passed, not {stage.credits(full)}"


async def upstream_fails(stage: Stage) -> str:
    """A provider that fails costs the caller nothing."""
    before = (await stage.metering.balance("bob")).settled
    answer = await stage.client.post(
        "/v1/chat/completions", json=asking("echo:error-500", stream=False), headers=key("bob")
    )
    await stage.settled()
    balance = await stage.metering.balance("bob")
    must(answer.status_code == 500, f"The status is {answer.status_code}.")
    must(balance.settled == before and balance.held == 0, "The failure was charged.")
    return f"{answer.status_code} passed on; still {stage.credits(balance.available)} available, nothing held"


async def upstream_quota(stage: Stage) -> str:
    """What the providers still allow is known, from the headers that came back anyway."""
    lines = []
    for name in ("openai", "anthropic"):
        reading = stage.metering.quotas.latest(name)
        must(reading is not None and reading.useful, f"No quota of {name} was captured.")
        if reading is not None:
            shown = (f"{limit.resource} {limit.remaining} of {limit.limit}" for limit in reading.limits)
            lines.append(f"{name}: {', '.join(shown)}")
    return "\n".join(lines)


async def usage_events(stage: Stage) -> str:
    """Every admitted call was reported once, charged or not."""
    entries = [entry for payer in ("ada", "bob", "carol") for entry in await stage.entries(payer)]
    charges = {entry.ref: entry.amount for entry in entries if entry.kind is EntryKind.SETTLE}
    wanted = len(charges) + 1  # the failed call
    for _ in range(400):
        if len(stage.events) >= wanted:
            break
        await asyncio.sleep(0.01)
    reported = {event.id: event.amount for event in stage.events}
    must(len(stage.events) == len(reported) == wanted, f"{len(stage.events)} events for {wanted} calls.")
    must(all(reported[ref] == amount for ref, amount in charges.items()), "An event differs from its charge.")
    kinds: dict[str, int] = {}
    for event in stage.events:
        kinds[event.outcome] = kinds.get(event.outcome, 0) + 1
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(kinds.items()))


async def statement(stage: Stage) -> str:
    """The statements of ada and bob show every charge and what it was based on."""
    lines = []
    for payer in ("ada", "bob"):
        for entry in await stage.entries(payer):
            basis = "" if entry.basis is None else entry.basis.value
            amount = stage.metering.unit.text(entry.amount)
            left = stage.metering.unit.text(entry.available)
            lines.append(f"{payer:<4} {entry.number:>2}  {entry.kind.value:<7} {amount:>9}  {basis:<9} left {left}")
    must(len(lines) >= 5, "The statement lacks lines.")
    return "\n".join(lines)


async def books_balance(stage: Stage) -> str:
    """The books balance: granted - settled - expired - held = available, proven from the rows."""
    wrong = await stage.metering.check()
    must(not wrong, " ".join(wrong))
    shown = []
    for payer in ("ada", "bob", "carol"):
        balance = await stage.metering.balance(payer)
        proof = balance.granted - balance.settled - balance.expired - balance.held
        must(proof == balance.available, f"{payer}: {proof} is not {balance.available}.")
        numbers = (balance.granted, balance.settled, balance.expired, balance.held, balance.available)
        shown.append("{:<5} {} - {} - {} - {} = {}".format(payer, *map(stage.metering.unit.text, numbers)))
    return "\n".join(shown)


Step = Callable[[Stage], Awaitable[str]]

STEPS: tuple[tuple[str, Step], ...] = (
    ("402 before the first byte", refused_without_credits),
    ("A payment", granted),
    ("An OpenAI stream, charged by its tokens", openai_stream),
    ("An Anthropic stream, charged by its tokens", anthropic_stream),
    ("429 after six calls a minute", rate_limited_answer),
    ("A client that hangs up", client_hangs_up),
    ("A provider that fails", upstream_fails),
    ("What the providers still allow", upstream_quota),
    ("Usage events", usage_events),
    ("The statement", statement),
    ("The books", books_balance),
)
"""Title and step, in order; the step's docstring says what it shows."""
