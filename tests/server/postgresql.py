"""A PostgreSQL server of the tests' own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "frostline"


def find_programs() -> Path | None:
    """Where initdb and pg_ctl are: on PATH, or where Debian puts them."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = os.pathsep.join([os.environ["PATH"], *map(str, debian)])
    found = shutil.which("pg_ctl", path=path)
    return Path(found).parent if found and (Path(found).parent / "initdb").exists() else None


class PostgreSQL:
    """One cluster below a folder, reachable through a socket there."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        # The server refuses to run as root.
        self._owner = "postgres" if os.geteuid() == 0 else None
        if self._owner:
            shutil.chown(folder, self._owner)
        options = ["--auth", "trust", "--username", USER, "--encoding", "UTF8", "--pgdata", folder / "data"]
        self._call("initdb", *options)

    def url(self, database: str = "postgres") -> str:
        """What `ledger.url` would be."""
        return f"postgresql://{USER}@/{database}?host={self._folder}"

    def start(self) -> None:
        """Accept connections."""
        log = self._folder / "log"
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder}"
        self._call(
            "pg_ctl", "--pgdata", self._folder / "data", "--log", log, "-o", options, "--wait", "start"
        )

    def stop(self, mode: str = "fast") -> None:
        """Stop; "immediate" is a crash as far as the database is concerned."""
        self._call("pg_ctl", "--pgdata", self._folder / "data", "--mode", mode, "--wait", "stop")

    def _call(self, program: str, *arguments: str | Path) -> None:
        subprocess.run(
            [self._programs / program, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            user=self._owner,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )


@contextmanager
def running(programs: Path, folder: Path) -> Iterator[PostgreSQL]:
    """A server for the length of a block."""
    server = PostgreSQL(programs, folder)
    server.start()
    try:
        yield server
    finally:
        server.stop("immediate")
