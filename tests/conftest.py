"""What holds for every test: the same examples in every run, others where they are asked for."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import pkgutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A run that met other examples each time would now and then fail for what nobody has just changed.
# METERING_TEST_RANDOM=1 looks for what is not known yet.
# How long an example takes says how busy the machine is, and nothing else.
timeless = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("the same", timeless, derandomize=True)
settings.register_profile("random", timeless, print_blob=True)
settings.load_profile("random" if os.environ.get("METERING_TEST_RANDOM") else "the same")

# Tests speak TLS with nobody, and each client of a provider reads the certificates of the whole world: 50 ms of a core
# with OpenSSL 3.0, for hundreds of clients. This one is of an authority whose key nobody has.
os.environ["SSL_CERT_FILE"] = os.fspath(Path(__file__).parent / "harness" / "authority.pem")

# Before anything imports it: what a scenario of it found is shown in the failures of every store.
pytest.register_assert_rewrite("asgi_metering.testing.conformance")

HERE = Path(__file__).parent

COUNTED = frozenset({"estimates", "prices", "quotas", "rules", "usage"})
"""
The rooms whose tests, with those beside this file, run every branch of what decides about money (pyproject.toml says
which modules these are). Whatever else runs them, servers, stores and frameworks among it, runs them at full speed.
"""

EYES: pytest.StashKey[tuple[Any, Any]] = pytest.StashKey()
"""Those of coverage, in this thread and in others, on a test that is counted."""

LONG_S = 600.0
"""What is given so much time, and more, is long."""


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Have coverage see no line of the process that only hands out tests: it runs none, and took half as long again."""
    plugins = session.config.pluginmanager
    coverage = getattr(plugins.getplugin("_cov"), "cov_controller", None)
    if coverage is not None and plugins.hasplugin("dsession"):
        coverage.pause()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    """
    Collect no garbage while tests are collected, and none of what they are made of afterwards.

    That is half a million objects, which stay until the end: to walk over them again and again took a fifth of a run.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        _forget()
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()


@pytest.hookimpl(wrapper=True, specname="pytest_collection")
def pytest_collection_uncounted(session: pytest.Session) -> Iterator[None]:
    """Have coverage see the package imported, and not the tests collected: that takes it half as long again."""
    plugins = session.config.pluginmanager
    coverage = getattr(plugins.getplugin("_cov"), "cov_controller", None)
    if coverage is None or not coverage.started or plugins.hasplugin("dsession"):
        return (yield)
    package = importlib.import_module("asgi_metering")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    coverage.pause()
    try:
        with _untraced():
            return (yield)
    finally:
        coverage.resume()


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """
    Trace nothing, in this thread and in those that it starts.

    In a worker of pytest-xdist pytest-cov begins twice (7.1): what it pauses is the second, and the first goes on.
    """
    here, further = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        yield
    finally:
        threading.settrace(further)
        sys.settrace(here)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Have coverage see what it counts (`COUNTED`), and nothing else: a line takes twice as long under its eyes."""
    if _is_counted(item):
        item.stash[EYES] = (sys.gettrace(), threading.gettrace())
    with _untraced():
        result = yield
    if nextitem is not None and _is_counted(nextitem) and not _is_counted(item):
        _forget()
    return result


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Innermost: what pytest does around each test has more lines than most tests have."""
    with _traced(item):
        return (yield)


pytest_runtest_call = pytest_runtest_teardown = pytest_runtest_setup


@contextlib.contextmanager
def _traced(item: pytest.Item) -> Iterator[None]:
    """Trace what was traced before the test, if it is counted."""
    here, further = item.stash.get(EYES, (None, None))
    threading.settrace(further)
    sys.settrace(here)
    try:
        yield
    finally:
        sys.settrace(None)
        threading.settrace(None)


def _forget() -> None:
    """
    Empty what the rooms that are counted remember of earlier calls.

    What a test that is not counted has left there would spare the next one that is from running the lines behind it.
    """
    rooms = tuple(f"asgi_metering.{room}." for room in COUNTED)
    for name, module in list(sys.modules.items()):
        if name.startswith(rooms):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def _is_counted(item: pytest.Item) -> bool:
    room, *further = item.path.relative_to(HERE).parts
    return (not further or room in COUNTED) and item.get_closest_marker("uncounted") is None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, which is what may run long: last, it would leave one core alone with it."""
    items.sort(key=lambda item: all(mark.args[0] < LONG_S for mark in item.iter_markers("timeout")))


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Send no keywords along: they are a third of what other processes write and the first one reads for each test."""
    if isinstance(report, pytest.TestReport):
        report.keywords = {}
