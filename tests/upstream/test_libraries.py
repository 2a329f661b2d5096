"""Choosing between httpx2 and httpx."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import httpx
import httpx2
import pytest

from asgi_metering.errors import ConfigurationError, MissingExtraError
from asgi_metering.upstream import upstream_client, upstream_client_sync, upstream_transport, upstream_transport_sync
from asgi_metering.upstream.libraries import choose_library, library_of
from tests.upstream.provider import Recorder


def test_choose_prefers_httpx2_and_follows_the_transport() -> None:
    """Without a hint it is httpx2; the caller's transport, or a name, decides otherwise."""
    mock = httpx.MockTransport(lambda request: httpx.Response(200))
    assert choose_library(None) is httpx2
    assert choose_library(None, object()) is httpx2
    assert choose_library(None, mock) is httpx
    assert choose_library("httpx") is httpx
    assert isinstance(upstream_client("acme", Recorder(), mock), httpx.AsyncClient)
    assert isinstance(upstream_client_sync("acme", Recorder()), httpx2.Client)


def test_library_of_a_subclass_is_that_of_its_base() -> None:
    """A transport that derives from a library's class belongs to it; other objects belong to none."""

    class Mine(httpx.BaseTransport):
        pass

    assert library_of(Mine()) is httpx
    assert library_of(object()) is None


def test_library_of_a_class_that_an_sdk_has_renamed_is_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai and groq SDKs say of what they export that it is theirs, the base of all transports included."""
    for library in (httpx, httpx2):
        monkeypatch.setattr(library.BaseTransport, "__module__", "groq")

        class Mine(library.BaseTransport):  # type: ignore[name-defined, misc]
            pass

        assert library_of(Mine()) is library
        assert library_of(object()) is None


def test_choose_unknown_name_is_refused() -> None:
    """A library that is neither of the two is a configuration error."""
    with pytest.raises(ConfigurationError, match="'requests'"):
        choose_library("requests")


def test_choose_falls_back_to_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only httpx is installed, it serves."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    assert choose_library(None) is httpx
    with pytest.raises(MissingExtraError):
        choose_library("httpx2")


def test_name_the_package_of_a_library_that_no_extra_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who chooses httpx is told to install that, for the extra brings httpx2."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r"Run: pip install httpx$"):
        choose_library("httpx")


@pytest.mark.parametrize("make", [upstream_client, upstream_client_sync, upstream_transport, upstream_transport_sync])
def test_make_without_any_library_names_the_extra(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither is installed, the error says what to install."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r"asgi-metering\[upstream\]"):
        make("acme", Recorder())


def test_import_needs_no_library() -> None:
    """Importing quotas and upstream imports neither library nor an SDK."""
    code = (
        "import sys, asgi_metering.quotas, asgi_metering.upstream\n"
        "print(sorted({'httpx', 'httpx2', 'openai', 'anthropic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
