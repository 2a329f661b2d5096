"""Idempotency keys end to end: a request runs once, and its repeats are answered from what it did."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from asgi_metering import CallRefused, Idempotency, Metering, MeteringMiddleware, billable
from asgi_metering.asgi.body import MAX_AHEAD
from asgi_metering.rules.operations import Sweep
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.harness.drive import Drive, body, drive, headers, http_scope, status
from tests.harness.servers import serve_in_thread
from tests.keyed import ANN, PRICE, Desk, asked, at_desk, identify, keyed_app, store_of

pytestmark = pytest.mark.uncounted

KINDS = ("memory", "sqlite")
ENDPOINTS = ("/json", "/sync", "/sse", "/sse-sync", "/stream", "/low/later", "/low/whole/")


def field(ended: Drive, name: str) -> str | None:
    """The first header field *name* of a response."""
    found = [value for key, value in headers(ended.log) if key == name]
    return found[0] if found else None


def is_replay(ended: Drive) -> bool:
    """Whether a response says that it repeats another one."""
    return field(ended, "idempotency-replayed") == "true"


def problem(ended: Drive) -> dict[str, Any]:
    """The problem details of a refusal."""
    assert field(ended, "content-type") == "application/problem+json"
    return dict(json.loads(body(ended.log)))


def receipts_only(desk: Desk) -> ASGIApp:
    """The application without bodies that are kept."""
    return keyed_app(desk, store_body=None)


# -- repeats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ENDPOINTS)
def test_answer_a_repeat_with_the_first_answer(path: str, kind: str, tmp_path: Path) -> None:
    """S3.15: the same request again runs nothing, costs nothing, and gets the same status and body, streams whole."""

    async def story(desk: Desk) -> None:
        first = await desk.ask(path)
        again = await desk.ask(path)
        assert (status(again.log), body(again.log)) == (status(first.log), body(first.log))
        assert field(again, "content-type") == field(first, "content-type")
        assert field(again, "content-length") == str(len(body(first.log)))
        assert is_replay(again)
        assert not is_replay(first)
        assert len(desk.ran) == 1
        assert await desk.spent() == PRICE

    at_desk(keyed_app, story, store_of(kind, tmp_path))


def test_keep_no_cookie_for_a_repeat() -> None:
    """DESIGN 10: of the first answer's fields a repeat gets those that describe it, and never its cookie."""

    async def story(desk: Desk) -> None:
        first, again = await desk.ask(), await desk.ask()
        assert status(again.log) == 201
        assert field(first, "set-cookie") == "session=secret"
        assert [name for name, _ in headers(again.log)] == ["content-type", "content-length", "idempotency-replayed"]
        kept = (await desk.store.read(EverythingKept())).state.idempotency_keys
        assert "secret" not in repr(kept)

    at_desk(keyed_app, story, MemoryStore())


@pytest.mark.parametrize("how", ["handler", "dependency"])
def test_answer_a_repeat_although_refusals_have_an_own_handler(how: str) -> None:
    """S3.15: an application that answers refusals itself does so for a twin that runs, and never for a repeat."""

    def own_answers(desk: Desk) -> ASGIApp:
        api = FastAPI()

        async def refused(_request: Any, refusal: Exception) -> JSONResponse:
            return JSONResponse({"own": type(refusal).__name__}, 403)

        async def translated() -> AsyncIterator[None]:
            try:
                yield
            except CallRefused as refusal:
                raise HTTPException(403, "no") from refusal

        if how == "handler":
            api.add_exception_handler(CallRefused, refused)

        @api.post("/", dependencies=[Depends(translated)] if how == "dependency" else [])
        @billable(PRICE, idempotency=Idempotency(store_body=100))
        async def endpoint(body: dict[str, Any]) -> dict[str, Any]:
            desk.ran.append(body)
            return {"run": len(desk.ran)}

        return api

    async def story(desk: Desk) -> None:
        first, again, other = await desk.ask("/"), await desk.ask("/"), await desk.ask("/", body=b'{"a": 1}')
        assert (status(again.log), body(again.log)) == (status(first.log), body(first.log)) == (200, b'{"run":1}')
        assert is_replay(again)
        assert again.exception is None
        assert status(other.log) == 403
        assert len(desk.ran) == 1

    at_desk(own_answers, story, MemoryStore())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/json", "/sse", "/low/whole/"])
def test_answer_a_repeat_with_the_receipt(path: str, kind: str, tmp_path: Path) -> None:
    """Where no body is kept, a repeat gets 200 and the receipt of what was charged, and nothing of its sources."""

    async def story(desk: Desk) -> None:
        await desk.ask(path)
        again = await desk.ask(path)
        assert status(again.log) == 200
        assert is_replay(again)
        assert field(again, "content-type") == "application/json"
        assert field(again, "cache-control") == "no-store"
        told = json.loads(body(again.log))
        assert (told["amount"], told["unit"], told["basis"], told["ended_by"]) == ("2", "credits", "usage", "call")
        assert set(told) == {"id", "line", "unit", "amount", "basis", "estimated", "ended_by", "ended_at"}
        assert len(desk.ran) == 1

    at_desk(receipts_only, story, store_of(kind, tmp_path))


@pytest.mark.parametrize("path", ["/json", "/stream"])
def test_keep_no_body_above_the_bound(path: str) -> None:
    """An answer of more bytes than store_body is stood for by its receipt."""

    async def story(desk: Desk) -> None:
        await desk.ask(path, body=b'{"a": 1}')
        again = await desk.ask(path, body=b'{"a": 1}')
        assert json.loads(body(again.log))["amount"] == "2"

    at_desk(functools.partial(keyed_app, store_body=11), story, MemoryStore())


def test_keep_a_body_as_large_as_the_bound() -> None:
    """The bound itself still fits."""

    async def story(desk: Desk) -> None:
        await desk.ask("/stream")
        assert body((await desk.ask("/stream")).log) == b"1.0;1.1;1.2;"

    at_desk(functools.partial(keyed_app, store_body=12), story, MemoryStore())


def test_replay_an_answer_without_a_body() -> None:
    """A 204 is repeated as one, without a length."""

    async def story(desk: Desk) -> None:
        await desk.ask("/low/empty")
        again = await desk.ask("/low/empty")
        assert status(again.log) == 204
        assert field(again, "content-length") is None
        assert is_replay(again)

    at_desk(keyed_app, story, MemoryStore())


def test_stand_for_a_file_by_path_with_its_receipt() -> None:
    """Pitfall 36: what the server reads from a path passes nobody, so that a repeat gets the receipt."""

    async def story(desk: Desk) -> None:
        options: dict[str, Any] = {"extensions": {"http.response.pathsend": {}}}
        first = await desk.ask("/low/file", **options)
        assert [message["type"] for message in first.log][-1] == "http.response.pathsend"
        again = await desk.ask("/low/file", **options)
        assert json.loads(body(again.log))["amount"] == "2"

    at_desk(keyed_app, story, MemoryStore())


@pytest.mark.parametrize("path", ["/low/later", "/low/whole/"])
@pytest.mark.parametrize("parts", [[b"a", b"bc"], [b"", b"abc", b""], [b"ab", b"", b"c"]], ids=len)
def test_take_a_body_for_the_same_however_it_is_split(path: str, parts: list[bytes]) -> None:
    """The fingerprint is of the bytes, and an app behind a gate that read them ahead gets them whole."""

    async def story(desk: Desk) -> None:
        assert body((await desk.ask(path, body=b"abc")).log) == b"abc"
        again = await desk.ask(path, body=parts)
        assert is_replay(again)
        other = await desk.ask(path, body=parts, key="k-2")
        assert body(other.log) == b"abc"
        assert desk.ran == [b"abc", b"abc"]

    at_desk(keyed_app, story, MemoryStore())


def test_hand_over_what_was_read_ahead_as_it_came() -> None:
    """An app gets the very messages that were read ahead for it, each once and in order."""

    async def story(desk: Desk) -> None:
        ended = await desk.ask("/low/whole/", body=[b"one", b"two", b"three"])
        assert desk.ran == [b"onetwothree"]
        assert [message["body"] for message in ended.received] == [b"one", b"two", b"three"]

    at_desk(keyed_app, story, MemoryStore())


# -- other requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/json", {"body": b'{"a": 1}'}),
        ("/json", {"query": "a=1"}),
        ("/json", {"headers": [("x-payer", ANN)], "caller": "bob"}),
        ("/low/whole/", {"method": "PUT"}),
        ("/low/whole/other", {}),
    ],
    ids=["body", "query", "caller", "method", "path"],
)
def test_refuse_a_key_that_came_with_another_request(path: str, options: dict[str, Any]) -> None:
    """Another body, query, method, path or caller under the same key is a mistake: 422, and nothing runs."""

    async def story(desk: Desk) -> None:
        await desk.ask(path if path == "/json" else "/low/whole/")
        other = await desk.ask(path, **options)
        assert status(other.log) == 422
        assert problem(other)["code"] == "fingerprint_mismatch"
        assert len(desk.ran) == 1

    at_desk(keyed_app, story, MemoryStore())


def test_keep_keys_of_payers_and_routes_apart() -> None:
    """A key is scoped to payer and route: another payer's, or another endpoint's, is another key."""

    async def story(desk: Desk) -> None:
        await desk.metering.grant("eve", 10, id="e")
        answers = [await desk.ask(), await desk.ask(caller="eve"), await desk.ask("/sync")]
        assert [status(each.log) for each in answers] == [201, 201, 200]
        assert len(desk.ran) == 3

    at_desk(keyed_app, story, MemoryStore())


def test_store_no_key_as_it_was_sent() -> None:
    """DESIGN 10: what clients make keys of is theirs, so that the store has a hash of it."""

    async def story(desk: Desk) -> None:
        await desk.ask(key="order-of-mrs-smith")
        assert "smith" not in repr((await desk.store.read(EverythingKept())).state)

    at_desk(keyed_app, story, MemoryStore())


def test_run_requests_without_a_key_each_time() -> None:
    """A route that takes keys does not ask for them."""

    async def story(desk: Desk) -> None:
        await desk.ask(key=None)
        await desk.ask(key=None)
        assert len(desk.ran) == 2

    at_desk(keyed_app, story, MemoryStore())


def test_read_nothing_into_keys_of_other_routes() -> None:
    """S2.27: where no policy asks for it, the field changes no byte of the answer, and is charged as ever."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError("No lifespan here.")
        seen = [await receive()]
        while seen[-1].get("more_body"):
            seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": repr(seen).encode()})

    async def play() -> None:
        app: Any = MeteringMiddleware(echo, metering=Metering("memory://", sinks=()))
        with_key = await drive(app, asked("/"), body=[b"a", b"b"])
        bare = await drive(echo, asked("/"), body=[b"a", b"b"])
        assert with_key.log == bare.log

    asyncio.run(play())


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([""], "idempotency_key_invalid"),
        (['""'], "idempotency_key_invalid"),
        (["x" * 256], "idempotency_key_invalid"),
        (["a", "b"], "idempotency_key_invalid"),
        (["caf\xe9"], "idempotency_key_invalid"),
        ([], "idempotency_key_missing"),
    ],
    ids=["empty", "empty-string", "long", "twice", "not-ascii", "none"],
)
def test_refuse_a_key_that_is_none(lines: list[str], code: str) -> None:
    """A key that cannot be read, or that is required and missing: 400 with the mend, and nothing runs."""

    async def story(desk: Desk) -> None:
        ended = await desk.ask(key=None, headers=[("idempotency-key", line) for line in lines])
        assert status(ended.log) == 400
        assert problem(ended)["code"] == code
        assert desk.ran == []

    at_desk(functools.partial(keyed_app, required=True), story, MemoryStore())


def test_ask_for_who_is_calling_before_the_key() -> None:
    """DESIGN 10: who is not known hears nothing of keys."""

    async def story(desk: Desk) -> None:
        ended = await desk.ask(caller=None, key="")
        assert status(ended.log) == 401

    at_desk(keyed_app, story, MemoryStore())


# -- bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "streamed"])
def test_refuse_to_read_a_large_body_ahead(announced: bool) -> None:
    """More than 1 MiB that the app has not asked for is not read: 413 with the mend, and nothing is claimed."""

    async def story(desk: Desk) -> None:
        large = [b"x" * 65_536] * (MAX_AHEAD // 65_536 + 4)
        length = [("content-length", str(sum(map(len, large))))] if announced else []
        ended = await desk.ask("/low/whole/", body=large, headers=length)
        assert status(ended.log) == 413
        assert problem(ended)["code"] == "body_not_fingerprinted"
        assert "fingerprint=" in problem(ended)["remedy"]
        assert len(ended.received) == (0 if announced else MAX_AHEAD // 65_536 + 1)
        assert (await desk.store.read(EverythingKept())).state.idempotency_keys == {}
        assert desk.ran == []

    at_desk(keyed_app, story, MemoryStore())


def test_fingerprint_a_large_body_that_the_framework_has_read() -> None:
    """What FastAPI has parsed already is fingerprinted whatever its size."""

    async def story(desk: Desk) -> None:
        large = json.dumps({"text": "x" * (MAX_AHEAD + 1)}).encode()
        await desk.ask("/sync", body=[large[:70_000], large[70_000:]])
        assert is_replay(await desk.ask("/sync", body=large))

    at_desk(keyed_app, story, MemoryStore())


def test_take_the_fingerprint_that_the_route_computes() -> None:
    """With fingerprint= bodies of any size pass unread, and what the callable answers tells requests apart."""

    def number(scope: Any) -> str:
        return str(dict(scope["headers"]).get(b"x-number", b"").decode())

    def make(desk: Desk) -> ASGIApp:
        from asgi_metering import billable, metered_app

        async def app(scope: Any, receive: Any, send: Any) -> None:
            desk.ran.append(await receive())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})

        return metered_app(app, billable(PRICE, idempotency=Idempotency(fingerprint=number)), name="computed")

    async def story() -> None:
        desk = Desk(MemoryStore())
        desk.app = MeteringMiddleware(make(desk), metering=desk.metering)
        await desk.metering.grant(ANN, 100, id="g")
        large = [b"x" * MAX_AHEAD] * 3
        first = await desk.ask("/", body=large, headers=[("x-number", "7")])
        assert status(first.log) == 200
        assert is_replay(await desk.ask("/", body=b"other", headers=[("x-number", "7")]))
        assert status((await desk.ask("/", body=large, headers=[("x-number", "8")])).log) == 422
        assert len(desk.ran) == 1
        await desk.metering.stop()

    asyncio.run(story())


def test_claim_nothing_for_a_client_that_left_amid_its_body() -> None:
    """A body that never came whole has no fingerprint: nothing is claimed, and nothing runs."""

    async def story(desk: Desk) -> None:
        script: list[Any] = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"}]
        await drive(desk.app, asked("/low/whole/"), messages=script)
        assert (await desk.store.read(EverythingKept())).state.idempotency_keys == {}
        assert desk.ran == []
        assert status((await desk.ask("/low/whole/", body=b"ab")).log) == 200

    at_desk(keyed_app, story, MemoryStore())


# -- while it runs, and after it failed ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_refuse_a_twin_while_the_first_runs(kind: str, tmp_path: Path) -> None:
    """A running twin: 409 with a short Retry-After; when it is done, its answer."""

    async def story(desk: Desk) -> None:
        first = asyncio.create_task(desk.ask("/held"))
        await desk.entered.wait()
        twin = await drive(desk.app, asked("/held"), body=b"{}")
        assert status(twin.log) == 409
        assert problem(twin)["code"] == "in_flight"
        assert 1 <= int(field(twin, "retry-after") or 0) <= 5
        desk.gate.set()
        await first
        assert is_replay(await desk.ask("/held"))
        assert len(desk.ran) == 1

    at_desk(keyed_app, story, store_of(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/held", "/sse", "/low/whole/"])
def test_run_once_among_many_at_the_same_time(path: str, kind: str, tmp_path: Path) -> None:
    """Of 20 equal requests at once one runs and is charged; the others are told that it runs, or what it did."""

    async def story(desk: Desk) -> None:
        desk.gate.set()
        ended = await asyncio.gather(*(drive(desk.app, asked(path), body=b"{}") for _ in range(20)))
        await desk.booked()
        assert len(desk.ran) == 1
        fresh = [each for each in ended if status(each.log) == 200 and not is_replay(each)]
        assert len(fresh) == 1
        assert {status(each.log) for each in ended} <= {200, 409}
        assert await desk.spent() == PRICE

    at_desk(keyed_app, story, store_of(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/broken", "/failing"])
def test_run_again_what_failed_free(path: str, kind: str, tmp_path: Path) -> None:
    """A call that was charged nothing because it failed frees its key: a repeat is a new attempt."""

    async def story(desk: Desk) -> None:
        await desk.ask(path)
        again = await desk.ask(path)
        assert not is_replay(again)
        assert len(desk.ran) == 2

    at_desk(keyed_app, story, store_of(kind, tmp_path))


def test_replay_a_failure_that_was_charged() -> None:
    """A failure that the route charges for has done something: its repeats get the same status."""

    async def story(desk: Desk) -> None:
        await desk.ask("/charged-failure")
        again = await desk.ask("/charged-failure")
        assert status(again.log) == 502
        assert is_replay(again)
        assert len(desk.ran) == 1
        assert await desk.spent() == PRICE

    at_desk(keyed_app, story, MemoryStore())


@pytest.mark.parametrize("kind", KINDS)
def test_run_free_work_once(kind: str, tmp_path: Path) -> None:
    """Work at a price of 0 runs once as well: it succeeded, although it was charged nothing."""

    async def story(desk: Desk) -> None:
        await desk.ask("/free")
        assert is_replay(await desk.ask("/free"))
        assert len(desk.ran) == 1

    at_desk(keyed_app, story, store_of(kind, tmp_path))


def test_claim_nothing_where_the_money_is_missing() -> None:
    """A refusal leaves the key free: with money the same request runs."""

    async def story(desk: Desk) -> None:
        assert status((await desk.ask(caller="eve")).log) == 402
        await desk.metering.grant("eve", 10, id="e")
        assert status((await desk.ask(caller="eve")).log) == 201

    at_desk(keyed_app, story, MemoryStore())


@pytest.mark.parametrize("at", [2, 3])
def test_keep_no_half_answer(at: int) -> None:
    """A stream that its client left is charged, and its repeat gets the receipt: half an answer is none."""

    async def story(desk: Desk) -> None:
        await desk.ask("/stream", faults={"disconnect_at": at}, spec_version="2.4")
        again = await desk.ask("/stream")
        assert is_replay(again)
        assert json.loads(body(again.log))["basis"] == "observed"
        assert len(desk.ran) == 1

    at_desk(keyed_app, story, MemoryStore())


def test_free_the_key_of_a_client_that_left_before_the_first_byte() -> None:
    """Nothing went out and nothing was charged: the next attempt runs."""

    async def story(desk: Desk) -> None:
        await desk.ask("/stream", faults={"disconnect_at": 1}, spec_version="2.4")
        assert not is_replay(await desk.ask("/stream"))
        assert len(desk.ran) == 2

    at_desk(keyed_app, story, MemoryStore())


@pytest.mark.parametrize("waiting", ["decided", "undecided"])
def test_free_the_key_of_a_request_that_was_cancelled_at_the_gate(waiting: str) -> None:
    """Pitfall 29: what was admitted for nobody is undone, its key included."""

    class Slow(MemoryStore):
        immediate = False
        door: asyncio.Event
        reached: asyncio.Event

        async def run(self, operations: Any) -> Any:
            answers = await super().run(operations) if waiting == "decided" else None
            self.reached.set()
            await self.door.wait()
            return await super().run(operations) if answers is None else answers

    async def story() -> None:
        store = Slow()
        store.door, store.reached = asyncio.Event(), asyncio.Event()
        store.door.set()
        desk = Desk(store)
        desk.app = MeteringMiddleware(keyed_app(desk), metering=desk.metering)
        await desk.metering.grant(ANN, 100, id="g")
        store.door.clear()
        store.reached.clear()
        first = asyncio.create_task(desk.ask())
        await store.reached.wait()
        first.cancel()
        await asyncio.wait([first])
        store.door.set()
        async with asyncio.timeout(10):
            while (await store.read(EverythingKept())).state.idempotency_keys:
                await asyncio.sleep(0.001)
        assert status((await desk.ask()).log) == 201
        await desk.metering.stop()

    asyncio.run(story())


# -- in doubt ------------------------------------------------------------------------------------------------


def test_keep_the_key_of_a_call_in_doubt() -> None:
    """A call whose heartbeats stopped keeps its key (409); when its policy has ended it, repeats get the receipt."""
    clock = FakeClock()

    async def story(desk: Desk) -> None:
        first = asyncio.create_task(desk.ask("/doubtful"))
        await desk.entered.wait()
        clock.advance(0.3)
        assert status((await drive(desk.app, asked("/doubtful"), body=b"{}")).log) == 409
        clock.advance(0.3)
        again = await drive(desk.app, asked("/doubtful"), body=b"{}")
        assert is_replay(again)
        told = json.loads(body(again.log))
        assert (told["basis"], told["ended_by"], told["amount"]) == ("hold", "policy", "2")
        desk.gate.set()
        await first
        assert len(desk.ran) == 1
        assert await desk.spent() == PRICE

    at_desk(keyed_app, story, MemoryStore(clock))


@pytest.mark.parametrize("make", [keyed_app, receipts_only])
def test_answer_what_a_request_did_that_was_given_up(make: Callable[[Desk], ASGIApp]) -> None:
    """A stalled request is given up and charged late after all: its repeat is answered, and not charged (S3.15)."""
    clock = FakeClock()

    async def story(desk: Desk) -> None:
        first = asyncio.create_task(desk.ask("/held"))
        await desk.entered.wait()
        clock.advance(1_000)
        await desk.store.run([Sweep()])
        assert await desk.spent() == 0
        desk.gate.set()
        await first
        again = await desk.ask("/held")
        assert is_replay(again)
        told = json.loads(body(again.log))
        assert told == {"run": 1} if make is keyed_app else (told["amount"], told["ended_by"]) == ("2", "policy")
        assert len(desk.ran) == 1
        assert await desk.spent() == PRICE

    at_desk(make, story, MemoryStore(clock))


CRASH = """
import asyncio, sys
from pathlib import Path
from tests.keyed import at_desk, keyed_app, store_of
async def story(desk):
    await desk.ask("/doubtful")
at_desk(keyed_app, story, store_of("sqlite", Path(sys.argv[1])))
"""


def test_answer_the_receipt_of_a_killed_worker(tmp_path: Path) -> None:
    """A worker is killed in its handler: another process answers 409 while in doubt, then the receipt, never a run."""
    killed = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "KEYED_CRASH": "1"},
        timeout=60,
        check=False,
    )
    assert killed.returncode == -9

    async def story(desk: Desk) -> None:
        seen: list[int] = []
        async with asyncio.timeout(20):
            while not seen or seen[-1] == 409:
                ended = await drive(desk.app, asked("/doubtful"), body=b"{}")
                seen.append(status(ended.log))
                await asyncio.sleep(0.02)
        assert seen[-1] == 200
        assert is_replay(ended)
        assert json.loads(body(ended.log))["ended_by"] == "policy"
        assert desk.ran == []

    at_desk(keyed_app, story, store_of("sqlite", tmp_path))


def test_forget_a_key_after_its_time() -> None:
    """After ttl_s the same request is a new one."""
    clock = FakeClock()

    async def story(desk: Desk) -> None:
        await desk.ask()
        clock.advance(59)
        assert is_replay(await desk.ask())
        clock.advance(1)
        assert not is_replay(await desk.ask())

    at_desk(functools.partial(keyed_app, ttl_s=60), story, MemoryStore(clock))


# -- a real server -------------------------------------------------------------------------------------------


def test_run_once_behind_a_real_server(tmp_path: Path) -> None:
    """Behind uvicorn, by httpx: chunked uploads, a stream, and equal requests from several connections at once."""
    desk = Desk(store_of("sqlite", tmp_path))
    desk.gate.set()
    app: Any = MeteringMiddleware(keyed_app(desk), metering=desk.metering)

    async def story(port: int) -> None:
        fields = {"x-api-key": ANN, "idempotency-key": '"one"'}

        async def chunks() -> Any:
            for part in (b"{", b"}"):
                yield part

        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=fields) as client:
            first = await client.post("/low/later", content=chunks())
            again = await client.post("/low/later", content=b"{}")
            while again.status_code == 409:
                again = await client.post("/low/later", content=b"{}")
            assert (first.status_code, first.text) == (again.status_code, again.text) == (200, "{}")
            assert again.headers["idempotency-replayed"] == "true"
            streamed = await client.post("/sse", json={})
            repeated = await client.post("/sse", json={})
            while repeated.status_code == 409:
                repeated = await client.post("/sse", json={})
            assert repeated.text == streamed.text
            assert repeated.headers["content-type"] == streamed.headers["content-type"]
            many = await asyncio.gather(*(client.post("/json", json={}) for _ in range(10)))
            assert {each.status_code for each in many} <= {201, 409}
        assert len(desk.ran) == 3

    async def granted() -> None:
        other = Metering(store_of("sqlite", tmp_path), identify=identify, sinks=(), store_timeout_s=30.0)
        async with other:
            await other.grant(ANN, 100, id="g")

    asyncio.run(granted())
    with serve_in_thread(app) as server:
        asyncio.run(story(server.port))


def test_cost_other_requests_nothing() -> None:
    """A request without the field is passed the server's own receive: nothing of it is read ahead or hashed."""

    async def story(desk: Desk) -> None:
        ended = await drive(
            desk.app, http_scope("/low/whole/", "POST", headers=[("x-api-key", ANN)]), body=[b"a", b"b"]
        )
        assert [message["body"] for message in ended.received] == [b"a", b"b"]
        assert desk.ran == [b"ab"]

    at_desk(keyed_app, story, MemoryStore())
