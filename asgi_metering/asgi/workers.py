"""
Workers: of how many processes of one server this one is, as far as the server tells.

Reads what servers leave in the processes that they start, and never starts, stops or imports one. Environment variables
such as ``WEB_CONCURRENCY`` are not asked: which server heeds which one is that server's own affair, and a wrong guess
would refuse an application that runs well. Processes that somebody starts beside each other are not found.

Sources: uvicorn 0.54 ``_subprocess.get_subprocess``, hypercorn 0.18 ``run._populate``, granian 2.8
``server.mp.MPServer._spawn_worker``, gunicorn 27 ``arbiter.Arbiter.spawn_worker``.
"""

from __future__ import annotations

import multiprocessing
import sys
from types import FrameType
from typing import Any

from asgi_metering.errors import ConfigurationError
from asgi_metering.stores.contract import Store

__all__ = ["check_workers", "count_workers"]


def check_workers(store: Store) -> None:
    """
    Refuse a store that processes cannot share where a server runs several (DESIGN "Deployment").

    Raises:
        ConfigurationError: Each worker would count for itself: a limit would be several, and a balance too.
    """
    if store.shared:
        return
    workers = count_workers()
    if workers > 1:
        raise ConfigurationError(
            f"The {store.name} store keeps its state in one process, and this server runs {workers} workers, each of "
            f"which would count for itself. Use a store that processes share, such as 'sqlite:///metering.db', or run "
            f"one worker."
        )


def count_workers() -> int:
    """Of how many worker processes of one server this is one; 1 where nothing tells of more."""
    return max(1, _told_by_spawned(multiprocessing.current_process()), _told_by_forked(sys._getframe()))


def _told_by_spawned(process: Any) -> int:
    """What a server gave to the process that it started: uvicorn and hypercorn a configuration, granian a number."""
    # Another process's target of the same shape is somebody else's business: only servers' own are looked at.
    target = getattr(process, "_target", None)
    server = str(getattr(target, "__module__", "")).partition(".")[0]
    if server in ("uvicorn", "hypercorn"):
        config = process._kwargs.get("config")
        if server == "uvicorn" and config.reload:
            # The reloader runs one, whatever else is asked for.
            return 1
        return _number(config.workers)
    if server == "granian":
        # Its number within the server: the second worker knows that there are two, and its failure ends the server.
        return _number(process._args[0])
    return 1


def _told_by_forked(frame: FrameType | None) -> int:
    """
    What the server's main process was doing when it forked: its frames are still below ours.

    gunicorn's arbiter has the number, however it was configured; to its workers it tells less, as granian's does.
    """
    most = 1
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "gunicorn.arbiter":
            most = max(most, _number(getattr(frame.f_locals.get("self"), "num_workers", 1)))
        elif module.startswith("granian.server.") and multiprocessing.parent_process() is not None:
            most = max(most, _number(getattr(frame.f_locals.get("self"), "workers", 1)))
        frame = frame.f_back
    return most


def _number(value: object) -> int:
    return value if isinstance(value, int) else 1
