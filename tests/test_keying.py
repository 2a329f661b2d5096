"""How idempotency keys are read, how their options and those of charge keys are refused, and what policies compute."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asgi_metering import Idempotency, TokenUsage, billable
from asgi_metering.asgi.body import RequestBody, has_key
from asgi_metering.asgi.replay import MAX_FIELD, Reply
from asgi_metering.errors import ConfigurationError
from asgi_metering.keying import BodyError, read_key
from asgi_metering.policies import MAX_REMEMBERED_S, MAX_STORED_BODY
from asgi_metering.prices import per_token


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('"8e03978e-40d5-43e8-bc93-6894a57f9324"', "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        ("8e03978e-40d5-43e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        ('  "a b"\t', "a b"),
        (r'"a\"b\\c"', 'a"b\\c'),
        ('"abc";v=1', "abc"),
        ("stainless-python-retry-1:2/3=", "stainless-python-retry-1:2/3="),
        ("x" * 255, "x" * 255),
        ('"' + '\\"' * 255 + '"', '"' * 255),
    ],
    ids=["string", "bare", "spaces", "escapes", "parameters", "punctuation", "longest", "longest-escaped"],
)
def test_read_a_key_as_the_draft_and_as_clients_spell_it(line: str, key: str) -> None:
    """A structured String and a bare word are the same key (draft-ietf-httpapi-idempotency-key-header section 2.1)."""
    assert read_key([line]) == key


@pytest.mark.parametrize(
    "line",
    [
        "",
        '""',
        "a b",
        "a,b",
        "a;b",
        'a"b',
        '"a',
        'a"',
        r'"a\b"',
        "a\tb",
        "\x7f",
        "caf\xe9",
        "x" * 256,
        f'"{"x" * 256}"',
    ],
)
def test_refuse_a_line_that_is_no_key(line: str) -> None:
    """What is empty, longer than 255, not printable ASCII or half quoted is no key."""
    with pytest.raises(ValueError, match="The Idempotency-Key"):
        read_key([line])


def test_read_no_key_where_there_is_none() -> None:
    """A request without the field has no key; one with two lines of it has none that can be told."""
    assert read_key([]) is None
    with pytest.raises(ValueError, match="2 times"):
        read_key(["a", "a"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"idempotency": 1}, "idempotency=1 is not known"),
        ({"idempotency": "yes"}, "idempotency='yes' is not known"),
        ({"charge_per": "week"}, "Give one as well"),
        ({"charge_zone": "Europe/Berlin"}, "Give one as well"),
        ({"charge_key": 3}, "neither a function nor the name"),
        ({"charge_key": "no header"}, "neither a function nor the name"),
        ({"charge_key": "x-session", "charge_per": "year"}, "charge_per='year' is no window"),
        ({"charge_key": "x-session", "charge_per": 0}, "charge_per=0 is no window"),
        ({"charge_key": "x-session", "charge_per": True}, "charge_per=True is no window"),
        ({"charge_key": "x-session", "charge_per": float("nan")}, "charge_per=nan is no window"),
        ({"charge_key": "x-session", "charge_per": 1e9}, "is no window"),
        ({"charge_key": "x-session", "charge_per": 60, "charge_zone": "Europe/Berlin"}, "means nothing"),
        ({"charge_key": "x-session", "charge_zone": "Mars/Base"}, "Mars/Base"),
        ({"skip_if": True}, "skip_if=True cannot be called"),
    ],
)
def test_refuse_options_that_mean_nothing(options: dict[str, Any], told: str) -> None:
    """Misuse fails at import, with the value and the mend (DESIGN 2)."""
    with pytest.raises(ConfigurationError, match=told):
        billable(2, **options)


@pytest.mark.parametrize("price", [per_token(output=1)])
def test_refuse_a_charge_key_for_what_is_measured(price: Any) -> None:
    """S0.3: calls that count once cost one price, so that a measured one is refused at import."""
    with pytest.raises(ConfigurationError, match="Use a fixed price"):
        billable(price, hold=TokenUsage(output=3), charge_key="x-session")


@pytest.mark.parametrize(
    "options",
    [
        {"ttl_s": 0},
        {"ttl_s": MAX_REMEMBERED_S + 1},
        {"ttl_s": True},
        {"ttl_s": "1 day"},
        {"store_body": 0},
        {"store_body": MAX_STORED_BODY + 1},
        {"store_body": True},
        {"store_body": 1.5},
        {"required": 1},
        {"fingerprint": "body"},
    ],
)
def test_refuse_an_idempotency_that_cannot_work(options: dict[str, Any]) -> None:
    """Bounds and types are checked where they are written."""
    with pytest.raises(ConfigurationError):
        Idempotency(**options)


@pytest.mark.parametrize("option", ["charge_key", "skip_if", "fingerprint"])
def test_check_what_the_endpoint_can_give(option: str) -> None:
    """A callable that asks for what the endpoint does not have is refused at import, by name."""

    def asks(nothing: str) -> str:
        return nothing

    once: dict[str, Any] = {option: asks}
    part = billable(2, idempotency=Idempotency(**once)) if option == "fingerprint" else billable(2, **once)
    with pytest.raises(ConfigurationError, match="'nothing'"):

        @part
        async def endpoint(body: str) -> None: ...


# -- the body of a request -----------------------------------------------------------------------------------


class Wire:
    """A server's `receive`: messages as the test puts them, one reader at a time."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.readers = 0

    async def receive(self) -> Any:
        assert self.readers == 0, "Two readers at once."
        self.readers += 1
        try:
            return await self.queue.get()
        finally:
            self.readers -= 1

    def put(self, body: bytes, more: bool) -> None:
        self.queue.put_nowait({"type": "http.request", "body": body, "more_body": more})


def test_read_in_turn_with_the_app() -> None:
    """Pitfall 27: a listener of the app and the gate never read at once, and the app gets all, in order."""

    async def story() -> None:
        wire = Wire()
        whole = RequestBody({"headers": []}, wire.receive)
        got: list[Any] = []

        async def listen() -> None:
            while not got or got[-1]["type"] != "http.disconnect":
                got.append(await whole.receive())

        listener = asyncio.create_task(listen())
        await asyncio.sleep(0)
        gate = asyncio.create_task(whole.digest())
        for number in range(4):
            wire.put(b"%d" % number, number < 3)
            await asyncio.sleep(0)
        digest = await gate
        wire.queue.put_nowait({"type": "http.disconnect"})
        await listener
        assert [message.get("body") for message in got] == [b"0", b"1", b"2", b"3", None]
        other = Wire()
        other.put(b"0123", False)
        assert digest == await RequestBody({"headers": []}, other.receive).digest()

    asyncio.run(story())


def test_tell_no_digest_of_half_a_body() -> None:
    """A client that left before the end has sent nothing to be told by; asked again, nothing more is read."""

    async def story() -> None:
        wire = Wire()
        wire.put(b"a", True)
        wire.queue.put_nowait({"type": "http.disconnect"})
        half = RequestBody({"headers": []}, wire.receive)
        for _ in range(2):
            with pytest.raises(BodyError, match="left before the end"):
                await half.digest()
        assert [(await half.receive())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]

    asyncio.run(story())


def test_see_the_field_in_any_place() -> None:
    """The field is found by its name alone."""
    assert has_key({"headers": [(b"host", b"x"), (b"idempotency-key", b"k")]})
    assert not has_key({"headers": [(b"x-idempotency-key", b"k")]})


# -- answers that are kept -----------------------------------------------------------------------------------


def test_keep_an_answer_up_to_its_bound() -> None:
    """Chunks are kept while they fit; one byte more, or a part that passed unseen, and nothing is."""
    start = {
        "status": 200,
        "headers": [(b"Content-Type", b"a/b"), (b"Set-Cookie", b"c"), (b"ETag", b"x" * 2 * MAX_FIELD)],
    }
    kept, over, lost = Reply(start, 4), Reply(start, 4), Reply(start, 4)
    for reply in (kept, over, lost):
        reply.keep(b"ab")
        reply.keep(b"cd")
    over.keep(b"e")
    over.keep(b"")
    lost.lose()
    assert kept.told() == {"status": 200, "headers": [["content-type", "a/b"]], "body": "YWJjZA=="}
    assert over.told() is None
    assert lost.told() is None
