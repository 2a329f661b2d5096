"""The registry: a dialect of one's own, by public names alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.usage import Dialect, TokenUsage, UsageReader, dialect_of_fields, dialects, register_dialect
from asgi_metering.usage.notes import Json, Notes
from asgi_metering.usage.skim import Marks, find_mark
from tests.usage import vectors
from tests.usage.test_openai import sse
from tests.usage.vectors import read

ACME = dialect_of_fields(
    "acme",
    shows="acme_job",
    usage="result.stats",
    input="read",
    output="written",
    cached="warm",
    reasoning="thought",
    total="all",
    text="result.words",
    model="engine.name",
    finish="result.reason",
)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """What a test registers is nobody else's."""
    before = dict(dialects.DIALECTS)
    yield
    dialects.DIALECTS.clear()
    dialects.DIALECTS.update(before)
    dialects._SIEVES[:] = [dialects.Sieves(before)]


def event(**result: object) -> dict[str, object]:
    """One event of Acme's."""
    return {"acme_job": 7, "engine": {"name": "a-1"}, "result": result}


STREAM = sse(
    event(words="Hel"),
    event(words="lo", stats=None),
    event(words={"call": 1}),
    event(stats={"read": 9, "written": 4, "warm": 3, "thought": 1, "all": 13}, reason="stop"),
)


def test_read_a_dialect_that_was_registered() -> None:
    """A few names are all that a provider of one's own takes: it is then found by its shape, however it is cut."""
    assert read([STREAM], "text/event-stream").report() is None
    register_dialect(ACME)
    assert read([b'{"usage":{"read":9,"written":4}}'], None).report() is None
    for size in (1, 7, len(STREAM)):
        pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
        reader = read(pieces, "text/event-stream", keep_text=True)
        report = reader.report()
        assert report is not None
        assert report.usage == TokenUsage(9, 4, cached=3, reasoning=1)
        assert (report.dialect, report.model, report.finish_reason) == ("acme", "a-1", "stop")
        assert report.complete
        assert reader.text() == 'Hello{"call":1}'
        assert read(pieces, "text/event-stream").report() == report


@pytest.mark.parametrize(
    ("stats", "problem"),
    [
        ({"read": 9, "written": -4}, "invalid_count"),
        ({"read": 9, "written": 4, "warm": 10}, "part_exceeds_whole"),
        ({"read": 9, "written": 4, "thought": 5}, "part_exceeds_whole"),
        ({"read": 9, "written": 4, "all": 12}, "total_below_parts"),
    ],
)
def test_refuse_nonsense_of_a_registered_dialect(stats: dict[str, int], problem: str) -> None:
    """What refuses the reports of known providers refuses those of others (S3.21)."""
    register_dialect(ACME)
    report = read([sse(event(stats=stats))], None).report()
    assert report is not None
    assert (report.usage, report.problems) == (None, (problem,))


def test_read_a_small_dialect() -> None:
    """Only what is named is looked for."""
    small = dialect_of_fields("small", shows="small_id", usage="used", input="in", output="out")
    register_dialect(small)
    reader = read([json.dumps({"small_id": 1, "used": {"in": 1, "out": 2}}).encode()], None, keep_text=True)
    report = reader.report()
    assert report is not None
    assert (report.usage, reader.text()) == (TokenUsage(1, 2), "")
    empty = read([b'{"small_id": 1, "used": {"other": 1}}'], None).report()
    assert empty is None or empty.usage is None
    torn = UsageReader("text/event-stream", dialect="small")
    torn.gap()
    torn.feed(b'x,"used":{"in":5,"out":6}}\n\n')
    found = torn.report()
    assert found is not None
    assert (found.usage, found.problems) == (TokenUsage(5, 6), ("clipped",))


def test_register_a_dialect_by_hand() -> None:
    """A dialect whose fields no names describe is a few functions, and is asked before those of the package."""
    mine = Dialect(
        name="mine",
        claims=lambda payload: "mine" in payload,
        claims_usage=lambda usage: "mine_tokens" in usage,
        note=lambda notes, payload: notes.take(TokenUsage(len(payload["mine"]), 0)),
        note_usage=lambda notes, usage: False,
        text=lambda payload: iter(()),
        telling=Marks(["mine"]),
        texty=re.compile(b'"mine"'),
        shows=("mine",),
    )
    register_dialect(mine)
    register_dialect(mine)
    report = read([b'{"mine": [1, 2, 3], "object": "chat.completion"}'], None).report()
    assert report is not None
    assert report.usage == TokenUsage(3, 0)


def test_believe_nothing_of_a_body_that_a_dialect_fails_on(caplog: pytest.LogCaptureFixture) -> None:
    """What a dialect raises, of a whole body or of a piece of one, refuses its counts, and is logged (S1.39, S3.21)."""

    def fail(notes: Notes, found: Json) -> bool:
        raise TypeError("unhashable")

    register_dialect(replace(ACME, name="broken", note=fail, note_usage=fail, claims_usage=lambda usage: True))
    torn = b'{"acme_job": 1, "pad": "' + b"x" * 3_000_000 + b'", "stats": {"read": 5, "written": 6}}'
    for body in (b'{"acme_job": 1, "result": {"stats": {"read": 5}}}', torn):
        report = UsageReader("application/json", None, "broken")
        report.feed(body)
        found = report.report()
        assert found is not None
        assert (found.usage, found.problems) == (None, ("unreadable",))
    assert {record.getMessage() for record in caplog.records} == {"An answer is not fully observed: its reader failed."}


@pytest.mark.parametrize(
    "marks",
    [
        Marks(["ab"]),
        Marks([], {"x" * 41: "1"}),
        Marks(["zähler"]),
        Marks(['object":"mine']),
        Marks(["a\\b.c"]),
        Marks(["two\nlines"]),
    ],
    ids=["short", "long", "letters", "marks", "escapes", "lines"],
)
def test_refuse_a_dialect_that_nothing_can_search_for(marks: Marks) -> None:
    """A mark that bytes are not searched for is told when its dialect is registered, which changes nothing."""
    with pytest.raises(ConfigurationError, match="cannot be searched for"):
        register_dialect(replace(ACME, telling=marks))
    assert "acme" not in dialects.DIALECTS


@pytest.mark.parametrize("value", ["null", "false"])
def test_find_a_field_whose_value_says_nothing_elsewhere(value: str) -> None:
    """A field that matters with a value like null or false is found with it, whatever stands around it."""
    register_dialect(replace(ACME, name="mine", telling=Marks([], {"still_going": "[fn]", "spent": r"\{"})))
    register_dialect(replace(ACME, name="other", telling=Marks([], {"still_going": r"\{"})))
    data = b'data: {"acme_job":1,"still_going":' + value.encode() + b"}\n\n"
    assert find_mark(data, 0, dialects.sieves().named["mine"]) == data.index(b'"still')
    assert find_mark(data, 0, dialects.sieves().any) == data.index(b'"still')


def test_look_for_one_of_several_values_behind_their_field() -> None:
    """Values that a bar parts are all those of their field: alone they are no mark."""
    marks = Marks([], {"state": "1|2"})
    assert marks.pattern.search(b'{"state": 2}')
    assert not marks.pattern.search(b'{"words": 2}')


@pytest.mark.parametrize("reason", [False, ""])
def test_end_with_no_reason_that_says_nothing(reason: object) -> None:
    """A field that is false or empty until the answer ends is no reason for its end, in one chunk as in many."""
    register_dialect(ACME)
    for pieces in ([sse(event(words="Hel", reason=reason))] * 9, [sse(event(words="Hel", reason=reason)) * 9]):
        report = read(pieces, "text/event-stream").report()
        assert report is not None
        assert (report.complete, report.finish_reason) == (False, None)
    ended = read([sse(event(words="Hel", reason=reason), event(reason=True))], "text/event-stream").report()
    assert ended is not None
    assert ended.complete


def test_find_every_known_name() -> None:
    """The dialects of the package keep to the same bounds."""
    for dialect in list(dialects.DIALECTS.values()):
        register_dialect(dialect)
    assert {vectors.dialect(name) for name in vectors.NAMES} == set(dialects.DIALECTS)


def test_refuse_a_name_that_is_taken() -> None:
    """Another dialect of the same name is told when it is registered, and changes nothing."""
    taken = dialect_of_fields("gemini", shows="mine", usage="usage", input="in", output="out")
    with pytest.raises(ConfigurationError, match="There is a usage dialect 'gemini' already"):
        register_dialect(taken)
    assert dialects.named("gemini") is not taken


@pytest.mark.parametrize(
    "names",
    [
        {"shows": "id", "usage": "usage"},
        {"shows": "mine", "usage": "a.usage"},
        {"shows": "mine", "usage": ""},
        {"shows": "mine", "usage": "usage", "text": "the..text"},
        {"shows": "m" * 41, "usage": "usage"},
        {"shows": "mine", "usage": "größe"},
        {"shows": 'mine":"', "usage": "usage"},
    ],
)
def test_refuse_names_that_nothing_can_search_for(names: dict[str, str]) -> None:
    """Names that stand everywhere, or nowhere, are told when the dialect is made."""
    with pytest.raises(ConfigurationError, match="cannot be searched for"):
        dialect_of_fields("x", input="in", output="out", **names)


@pytest.mark.uncounted
@pytest.mark.parametrize("name", vectors.NAMES)
def test_read_samples_beside_a_registered_dialect(name: str) -> None:
    """A dialect of one's own changes nothing for those of the package."""
    register_dialect(ACME)
    vectors.check(name, vectors.read([vectors.body(name)], vectors.content_type(name)).report())


def test_tell_every_dialect_in_the_readme() -> None:
    """The README's table names each dialect that comes with the package, and no other."""
    section = (Path(__file__).parents[2] / "README.md").read_text().partition("## Usage of any provider")[2]
    rows = re.findall(r"^\| (`.*?`) \|", section.partition("\n## ")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(.*?)`", row)]
    assert sorted(names) == sorted(dialects.DIALECTS)
