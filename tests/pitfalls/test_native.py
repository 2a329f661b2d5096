"""
Refusals as frameworks know them (pitfalls 17, 20), and event loops that are not asyncio's (34).

What stands in for a framework here does as it does with its own exceptions; `tests/frameworks` has the real ones.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Coroutine
from types import ModuleType
from typing import Any

import pytest

from asgi_metering import CallRefused, MeteringMiddleware, billable
from asgi_metering.asgi import native
from asgi_metering.asgi.native import framework_of
from asgi_metering.errors import MeteringError
from tests.harness.drive import body, status
from tests.pitfalls.apps import PRICE
from tests.pitfalls.scene import POOR, Scene, Visit, http_only, problem, visit

REFUSED = Visit(caller=POOR)


class HTTPError(Exception):
    """As falcon's: it wants a status, and has a place for that."""

    __slots__ = ("status",)

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class HTTPException(Exception):  # noqa: N818 -- its name there
    """As that of Werkzeug and BlackSheep."""


class ToolError(Exception):
    """As that of MCP."""


class PermissionDenied(Exception):  # noqa: N818 -- its name there
    """As Django's."""


class Handler:
    """An application that answers exceptions of its *kind* as a framework does, and logs all others as errors."""

    def __init__(self, kind: type[Exception], code: int) -> None:
        self.kind = kind
        self.code = code
        self.raised: Exception | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the endpoint of a request."""
        if scope["type"] != "http":
            raise RuntimeError("This application has no lifespan.")
        code, said = self.code, b"handled"
        try:
            await paid()
        except self.kind as failure:
            self.raised, said = failure, str(failure).encode()
        except Exception as failure:
            self.raised, code = failure, 500
            logging.getLogger("framework").exception("crash")
        await send({"type": "http.response.start", "status": code, "headers": []})
        await send({"type": "http.response.body", "body": said})


class DjangoHandler(Handler):
    """As Django's, by where it is defined."""

    __module__ = "django.core.handlers.asgi"


@billable(PRICE)
async def paid() -> None:
    """Something that costs."""


@pytest.fixture
def scene() -> Scene:
    """Books with ann's money."""
    return Scene()


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No framework that another test has loaded."""
    for module in native._MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)


def load(monkeypatch: pytest.MonkeyPatch, module: str, kind: Any) -> None:
    """Have *kind* loaded in *module*, under its own name."""
    fake = ModuleType(module)
    setattr(fake, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.mark.parametrize(
    ("module", "kind"),
    [("falcon", HTTPError), ("werkzeug.exceptions", HTTPException), ("blacksheep.exceptions", HTTPException)],
)
def test_rise_as_what_a_loaded_framework_knows(
    module: str, kind: type[Exception], scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pitfall 17: a framework takes the refusal for its own exception, of status 500, and its answer is replaced."""
    load(monkeypatch, module, kind)
    app = Handler(kind, 500)
    (ended,) = visit(MeteringMiddleware(app, metering=scene.metering), REFUSED)
    assert status(ended.log) == problem(ended)["status"] == 402
    assert [record.name for record in caplog.records if record.name == "framework"] == []
    assert isinstance(app.raised, CallRefused)
    assert app.raised.status == 500  # type: ignore[attr-defined]
    assert "insufficient_credits" in str(app.raised)
    # Another process, of whoever runs jobs, has joined nothing.
    assert type(pickle.loads(pickle.dumps(app.raised))) is CallRefused


def test_set_the_status_where_a_compiled_framework_looks_for_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 17: what reads the framework's own place, and no attribute, finds the status as well (BlackSheep)."""
    load(monkeypatch, "falcon", HTTPError)
    app = Handler(HTTPError, 500)
    visit(MeteringMiddleware(app, metering=scene.metering), REFUSED)
    assert HTTPError.status.__get__(app.raised) == 500  # type: ignore[attr-defined]


def test_rise_plainly_where_no_framework_is_loaded(scene: Scene) -> None:
    """Where nobody knows anything else the exception is `CallRefused` itself."""
    app = Handler(CallRefused, 500)
    visit(MeteringMiddleware(app, metering=scene.metering), REFUSED)
    assert type(app.raised) is CallRefused


def test_prefer_the_kind_of_the_applications_own_framework(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 17: of kinds that cannot be one class the framework counts that the application is of."""

    class HTTPException(Exception):  # noqa: N818 -- its name there
        __slots__ = ("status",)

    load(monkeypatch, "falcon", HTTPError)
    load(monkeypatch, "blacksheep.exceptions", HTTPException)
    blacksheep = type("Application", (Handler,), {"__module__": "blacksheep.server.application"})
    for app, kind in ((Handler(HTTPError, 500), HTTPError), (blacksheep(HTTPException, 500), HTTPException)):
        (ended,) = visit(MeteringMiddleware(app, metering=scene.metering), REFUSED)
        assert status(ended.log) == 402
        assert isinstance(app.raised, kind)


@pytest.mark.parametrize("kind", [None, "HTTPError", BaseException])
def test_pass_over_what_is_no_exception(kind: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a framework's name that is none changes nothing for the client."""
    fake = ModuleType("falcon")
    fake.HTTPError = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "falcon", fake)
    (ended,) = visit(MeteringMiddleware(Handler(CallRefused, 500), metering=scene.metering), REFUSED)
    assert status(ended.log) == 402


def test_replace_djangos_403(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfalls 15, 17: Django takes the refusal for a lack of permission; its 403 becomes the refusal's own answer."""
    load(monkeypatch, "django.core.exceptions", PermissionDenied)
    app = DjangoHandler(PermissionDenied, 403)
    (ended,) = visit(MeteringMiddleware(app, metering=scene.metering), REFUSED)
    assert status(ended.log) == 402
    assert isinstance(app.raised, PermissionDenied)


def test_keep_a_403_of_others_beside_django(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 15: where Django is only loaded, refusals are no lack of permission, and an application's 403 stays."""
    load(monkeypatch, "django.core.exceptions", PermissionDenied)
    app = Handler(CallRefused, 403)
    (ended,) = visit(MeteringMiddleware(app, metering=scene.metering), REFUSED)
    assert status(ended.log) == 403
    assert not isinstance(app.raised, PermissionDenied)


@pytest.mark.parametrize("module", ["mcp.server.mcpserver.exceptions", "mcp.server.fastmcp.exceptions"])
def test_tell_the_client_of_a_tool_why(module: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 20: the text of a refused tool's error is the problem, in the answer that the server makes of it."""
    load(monkeypatch, module, ToolError)
    (ended,) = visit(MeteringMiddleware(Handler(ToolError, 200), metering=scene.metering), REFUSED)
    assert status(ended.log) == 200
    assert json.loads(body(ended.log))["code"] == "insufficient_credits"


# -- pitfall 34: other event loops -------------------------------------------------------------------------


def by_hand(work: Coroutine[Any, Any, None]) -> None:
    """Run what waits for nothing, as a library of other event loops would."""
    with pytest.raises(StopIteration):
        work.send(None)


@pytest.mark.parametrize("path", ["/", "/free"])
def test_serve_nothing_on_an_event_loop_of_others(path: str, scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Pitfall 34: on another loop than asyncio's nothing is served, from the first request on, and the log says why."""
    sent: list[Any] = []

    async def take(message: Any) -> None:
        sent.append(message)

    async def never() -> Any:
        raise AssertionError

    by_hand(MeteringMiddleware(Handler(CallRefused, 500), metering=scene.metering)(Visit(path).scope(), never, take))
    assert (sent[0]["status"], json.loads(sent[1]["body"])["code"]) == (500, "misconfigured")
    assert "not of trio" in caplog.text


def test_refuse_to_start_on_an_event_loop_of_others(scene: Scene) -> None:
    """Pitfall 34: the startup fails with the mend."""
    sent: list[Any] = []

    async def start() -> Any:
        return {"type": "lifespan.startup"}

    async def take(message: Any) -> None:
        sent.append(message)

    app = MeteringMiddleware(http_only(Handler(CallRefused, 500)), metering=scene.metering)
    with pytest.raises(MeteringError, match="asyncio or uvloop, not of trio"):
        app({"type": "lifespan", "asgi": {"version": "3.0"}}, start, take).send(None)  # type: ignore[attr-defined]
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]


# -- where the framework is --------------------------------------------------------------------------------


def test_find_the_framework_behind_what_wraps_it() -> None:
    """The application is found through middleware, as a method, and as a subclass; nothing is searched for ever."""

    class Own(DjangoHandler):
        __module__ = "shop.asgi"

        async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
            """Its application, as Quart has one."""

    class Around:
        def __init__(self, app: Any) -> None:
            self.app = app

    own = Own(PermissionDenied, 403)
    endless = Around(None)
    endless.app = endless
    assert framework_of(own) == framework_of(Around(Around(own))) == framework_of(Around(own.asgi_app)) == "django"
    assert framework_of(http_only(own)) is framework_of(endless) is framework_of(None) is None
