"""Of how many processes of a server this is one; with real servers see `tests.servers.test_one_process`."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import hypercorn.config
import pytest
import uvicorn

from asgi_metering.asgi.workers import check_workers, count_workers
from asgi_metering.errors import ConfigurationError
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore


def calls(module: str, server: object, work: Callable[[], Any] = count_workers) -> Any:
    """Do *work* below a function of *module* whose ``self`` is *server*."""
    space: dict[str, Any] = {"__name__": module}
    exec("def calls(self, work):\n    return work()\n", space)
    return space["calls"](server, work)


def count_for(config: object) -> int:
    """What a user's own process with a server's configuration among its arguments counts."""
    assert config is not None
    return count_workers()


def test_count_one_in_a_process_of_its_own() -> None:
    """A process that nobody started as a worker is one."""
    assert count_workers() == 1


@pytest.mark.parametrize("variable", ["WEB_CONCURRENCY", "GRANIAN_WORKERS"])
def test_count_one_whatever_the_environment_says(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that this server may not heed refuses nothing."""
    monkeypatch.setenv(variable, "4")
    assert count_workers() == 1


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.parametrize("config", [uvicorn.Config("app:app", workers=4), hypercorn.config.Config()])
def test_count_one_in_processes_that_are_no_servers(start: str, config: Any) -> None:
    """A process that somebody starts with whatever arguments is one: only servers' own targets tell."""
    config.workers = 4
    context = multiprocessing.get_context(start)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(count_for, config).result() == 1


def test_count_what_the_arbiter_of_gunicorn_forked() -> None:
    """A fork of gunicorn finds the arbiter's number below itself, however it was configured."""
    assert calls("gunicorn.arbiter", SimpleNamespace(num_workers=3)) == 3
    assert calls("gunicorn.arbiter", SimpleNamespace(num_workers=1)) == 1
    assert calls("gunicorn.arbiter", SimpleNamespace()) == 1
    assert calls("my.arbiter", SimpleNamespace(num_workers=3)) == 1


def test_count_one_where_workers_are_threads() -> None:
    """Threads of granian share the process, and with it the store's memory."""
    assert calls("granian.server.mt", SimpleNamespace(workers=3)) == 1


def test_refuse_a_store_of_one_process_among_several() -> None:
    """The sentence names the store, the number and both ways out; a store that processes share is never refused."""
    check_workers(MemoryStore())
    arbiter = SimpleNamespace(num_workers=3)
    with pytest.raises(ConfigurationError) as refused:
        calls("gunicorn.arbiter", arbiter, lambda: check_workers(MemoryStore()))
    assert str(refused.value) == (
        "The memory store keeps its state in one process, and this server runs 3 workers, each of which would count "
        "for itself. Use a store that processes share, such as 'sqlite:///metering.db', or run one worker."
    )
    calls("gunicorn.arbiter", arbiter, lambda: check_workers(SQLiteStore("metering.db")))
