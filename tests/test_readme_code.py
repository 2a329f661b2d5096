"""The README's Python is code: every block compiles, what it imports is there, and the story of its gate runs."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from asgi_metering import TokenUsage
from asgi_metering.cli import main
from asgi_metering.prices import per_million_tokens
from asgi_metering.usage import dialects
from tests.harness.drive import Drive, body, drive, headers, http_scope, lifespan, status

pytestmark = pytest.mark.uncounted

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STORY = README.partition("## From nothing to a working gate")[2].partition("\n## ")[0]


def compiled(block: str) -> CodeType:
    """A block as the `asyncio` REPL takes it: ``await`` may stand at its top."""
    code = compile(block, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    assert isinstance(code, CodeType)
    return code


@pytest.mark.parametrize("block", PYTHON.findall(README), ids=lambda block: block.strip().splitlines()[0])
def test_compiles_and_imports_what_there_is(block: str) -> None:
    """Each block compiles, and every name that it imports from the package exists."""
    compiled(block)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "asgi_metering":
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_finds_the_blocks() -> None:
    """Each of the story's seven steps has a block, one has two, and none goes unread for the way it is fenced."""
    steps = re.split(r"^\*\*\d\. ", STORY, flags=re.MULTILINE)[1:]
    assert [len(PYTHON.findall(step)) for step in steps] == [1, 1, 1, 2, 1, 1, 1]
    assert README.count("```python") == len(PYTHON.findall(README))


# -- the story ---------------------------------------------------------------------------------------------


USERS = {
    "key-ann": SimpleNamespace(id="ann", organisation="org_7", plan="pro"),
    "key-bob": SimpleNamespace(id="bob", organisation="org_8", plan="free"),
}


async def by_api_key(key: str | None) -> Any:
    """The user with this key, or None; one of the two has an organisation that pays."""
    return USERS.get(key or "")


class Ask(BaseModel):
    """Stands for the reader's request bodies."""

    text: str = ""
    max_tokens: int = 100


async def search_view(request: Any) -> None:
    """What Django makes of a class of views."""


def stand_ins() -> dict[str, Any]:
    """What the reader has: users, a payment, settings, request bodies, a price; and the imports of the line above."""
    return {
        "__name__": "readme",
        "users": SimpleNamespace(by_api_key=by_api_key),
        "payment": SimpleNamespace(id="pay_1"),
        "settings": SimpleNamespace(shared_key="shared"),
        "keys": SimpleNamespace(of=lambda user: f"key of {user}"),
        "AsyncOpenAI": functools.partial(openai.AsyncOpenAI, api_key="none"),
        "TokenUsage": TokenUsage,
        "PRICE": per_million_tokens(input=3, output=15),
        **dict.fromkeys(("ChatRequest", "ChatMessage", "ImageRequest", "Message", "Turn"), Ask),
        # Of the sections behind the story.
        "is_staff": lambda request: True,
        "session": SimpleNamespace(id="s-1"),
        "dispute": SimpleNamespace(id="dispute_1"),
        "done": datetime(2026, 11, 1, tzinfo=UTC),
        # Django's, which the frameworks' own tests run.
        "path": lambda place, view: (place, view),
        "Search": SimpleNamespace(as_view=lambda: search_view),
    }


async def run_story(names: dict[str, Any]) -> None:
    """Run the blocks in their order in one namespace, as a reader who types them one after the other."""
    for block in PYTHON.findall(STORY):
        running = eval(compiled(block), names)
        if inspect.isawaitable(running):
            await running


# Its SDKs take a quarter of a minute to import; the suites of the integrations run each line of it.
ONLY_COMPILED = {"What your SDKs use"}

SECTIONS = {
    part.partition("\n")[0]: PYTHON.findall(part)
    for part in README.partition(STORY)[2].split("\n## ")
    if PYTHON.search(part)
}
"""What follows the story: the blocks of each section that has some."""


async def run_section(blocks: list[str], names: dict[str, Any]) -> None:
    """Run the blocks of one section in a namespace of their own, behind the story's, and close what they opened."""
    for block in blocks:
        running = eval(compiled(block), names)
        if inspect.isawaitable(running):
            await running
    for made in names.values():
        if isinstance(made, openai.AsyncOpenAI):
            await made.close()
    if "tracker" in names:
        names["tracker"].log.close()


async def asked(app: Any, path: str, key: str | None = None, **said: Any) -> Drive:
    """One POST, with a user's key unless there is none."""
    fields = [("content-type", "application/json")] + ([("x-api-key", key)] if key else [])
    scope = http_scope(path, "POST", headers=fields, query=said.pop("query", ""))
    return await drive(app, scope, body=json.dumps(said).encode())


def test_runs_from_nothing_to_a_working_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks run as they stand, and the gate answers 200, 401 and 402 and charges what the text says."""
    monkeypatch.chdir(tmp_path)

    async def play() -> None:
        names = stand_ins()
        await run_story(names)
        app, metering = names["app"], names["metering"]

        async def left(**options: Any) -> str:
            unit = options.get("unit", metering.unit)
            return str(unit.text((await metering.balance("org_7", **options)).available))

        async with lifespan(app):
            podcast = await left()
            search = [await asked(app, "/search", key, query="q=x") for key in ("key-ann", None, "key-bob")]
            told = [await left(), dict(headers(search[0].log))["metering-available"]]
            assert [status(each.log) for each in search] == [200, 401, 402]
            assert json.loads(body(search[2].log))["code"] == "insufficient_credits"
            assert (podcast, told) == ("999.8173", ["997.8173", '"997.8173";unit="credits"'])

            chat = [await asked(app, "/chat", key, text="Hi") for key in ("key-ann", "key-bob")]
            assert [status(each.log) for each in chat] == [200, 402]
            assert (await metering.balance("org_7")).held == 0
            assert float(await left()) < 997.8173

            assert status((await asked(app, "/messages", "key-ann")).log) == 200
            assert await left(unit=names["MESSAGES"]) == "50"
            assert [allowance.remaining for allowance in names["left"]] == [1_000_000]
            assert (names["notice"].paid_by, names["notice"].switched) == (names["PLATFORM"], False)
            await metering.grant("acme", 1, id="top-up")
            assert status((await asked(app, "/agent", "key-ann")).log) == 200
            assert (await metering.balance("acme")).settled == 200_000
            assert await metering.check() == []
        await names["openai"].close()

    asyncio.run(play())
    assert capsys.readouterr().out == "1000\n"


@pytest.fixture
def registry() -> Iterator[None]:
    """The dialects as they are, whatever is registered meanwhile."""
    before = dict(dialects.DIALECTS)
    yield
    dialects.DIALECTS.clear()
    dialects.DIALECTS.update(before)
    dialects._SIEVES[:] = [dialects.Sieves(before)]


@pytest.mark.usefixtures("registry")
def test_runs_what_follows_the_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each section's blocks run as they stand, by what the story has imported, and the books balance behind them."""
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0

    async def play() -> None:
        story = stand_ins()
        await run_story(story)
        metering = story["metering"]
        async with metering.charge(payer="org_7", line="search", price=5) as call:
            story["call_id"] = call.id
        for title, blocks in SECTIONS.items():
            if title not in ONLY_COMPILED:
                await metering.grant("org_7", 1_000, id=title)
                await run_section(blocks, dict(story))
        assert await metering.check() == []
        await metering.stop()

    asyncio.run(play())
    assert "deepseek-credits 20" in capsys.readouterr().out
