"""Streams whose hold cannot grow any more, behind real servers: what the client sees, and what the call costs."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import openai.types.chat
import pytest

from tests.harness.clients import HttpClient
from tests.harness.servers import SERVER_KINDS
from tests.servers.books import CREDIT
from tests.servers.house import House, house, key

CUT = ("cut", "cut", "observed")
GRANTED = 20


def read_whole(client: HttpClient) -> list[str]:
    """The rest of a stream of events that ends as it should."""
    events = client.read_rest().decode().split("\n\n")
    assert client.ended == "complete"
    assert events.pop() == ""
    return events


def cut(each: House, payer: str) -> int:
    """Whole credits that the one call of *payer* was charged when it was cut; its upstream was let go."""
    each.wait_for("closed", key=payer)
    (ended,) = each.books.ended(payer)
    assert (ended.outcome, ended.reason, ended.basis) == CUT
    return ended.amount // CREDIT


def test_cut_a_stream_of_events(each: House) -> None:
    """All words that were granted pass, then the error of the route's shape, and a clean end; what passed is paid."""
    payer = each.books.grant("cut-sse", GRANTED)
    *words, error = read_whole(each.open("/sliced?as=sse", payer))
    told = json.loads(error.removeprefix("data: "))["error"]
    assert (told["code"], told["metering"]["code"]) == ("insufficient_quota", "insufficient_credits")
    assert GRANTED <= len(words) < 2 * GRANTED
    assert cut(each, payer) == len(words)


@pytest.mark.parametrize("each", [kind for kind in SERVER_KINDS if kind != "daphne"], indirect=True, scope="package")
def test_break_the_connection_of_a_body_without_a_place_for_an_error(each: House) -> None:
    """Of a compressed body only a broken connection tells that it is not whole."""
    payer = each.books.grant("cut-gzip", GRANTED)
    client = each.open("/sliced?as=gzip", payer)
    client.read_rest()
    assert client.ended != "complete"
    assert GRANTED <= cut(each, payer) < 4 * GRANTED


def test_charge_what_daphne_does_not_break(tmp_path: Path) -> None:
    """Daphne breaks no connection for an application: the call ends and is charged, and its client goes on waiting."""
    with house("daphne", tmp_path) as own:
        payer = own.books.grant("cut-gzip", GRANTED)
        client = own.open("/sliced?as=gzip", payer)
        assert GRANTED <= cut(own, payer) < 4 * GRANTED
        assert client.ended is None


def test_cut_a_stream_whose_upstream_is_silent(each: House) -> None:
    """A generator that waits for a model when its hold is used up is cancelled after a while, and its client told."""
    payer = each.books.grant("cut-silent", 12)
    *words, error = read_whole(each.open("/sliced?as=silent", payer))
    assert len(words) == 12
    assert "insufficient_quota" in error
    assert cut(each, payer) == 12


@pytest.mark.parametrize("each", ["uvicorn-httptools"], indirect=True, scope="package")
def test_raise_the_error_of_the_sdk(each: House) -> None:
    """OpenAI's SDK raises its own error from a stream that is cut, behind every word that passed."""
    payer = each.books.grant("cut-sdk", GRANTED)
    words: list[object] = []
    with openai.OpenAI(api_key="-", base_url=each.server.url, max_retries=0, timeout=20) as client:
        stream = client.get(
            "/sliced?as=sse",
            cast_to=openai.types.chat.ChatCompletionChunk,
            options={"headers": dict(key(payer))},
            stream=True,
            stream_cls=openai.Stream[openai.types.chat.ChatCompletionChunk],
        )
        with pytest.raises(openai.APIError) as raised:
            words.extend(stream)
    assert raised.value.code == "insufficient_quota"
    assert cut(each, payer) == len(words)
