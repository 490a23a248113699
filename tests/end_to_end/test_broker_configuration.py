"""The broker configurations that are shipped do what docs/brokers.md says."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from frostline.emulator.broker import find_mosquitto, find_nats_server
from frostline.protocol.connection import BrokerAddress, Connection
from frostline.protocol.errors import BrokerUnreachable
from frostline.protocol.topics import Topics
from tests.end_to_end.test_nats_cluster import accepts, free_ports
from tests.end_to_end.test_processes import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples" / "brokers"
TOPICS = Topics("test")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def certify(folder: Path, name: str) -> None:
    """A key and a certificate of the folder's authority."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl(folder, "req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    authority = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", *authority, "-out", f"{name}.crt")


class Site:
    """mosquitto with the configuration that is shipped, and certificates for those who may enter."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port

    def connection(self, name: str) -> Connection:
        files = (self._folder / f"{name}.{kind}" for kind in ("crt", "key"))
        url = f"mqtts://127.0.0.1:{self._port}"
        return Connection(BrokerAddress.parse(url, self._folder / "ca.crt", *files), name)

    def stranger(self) -> Connection:
        return Connection(
            BrokerAddress.parse(f"mqtts://127.0.0.1:{self._port}", self._folder / "ca.crt"), "stranger"
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    mosquitto = find_mosquitto()
    if mosquitto is None or shutil.which("openssl") is None:
        pytest.skip("mosquitto or openssl is not installed")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    openssl(tmp_path, "req", "-x509", *key, "-subj", "/CN=site", "-keyout", "ca.key", "-out", "ca.crt")
    for name in ("broker", "server", "board-1", "board-2"):
        certify(tmp_path, name)
    (port,) = free_ports(1)
    shutil.copy(EXAMPLES / "mosquitto.acl", tmp_path / "frostline.acl")
    text = (EXAMPLES / "mosquitto.conf").read_text().replace("listener 8883", f"listener {port} 127.0.0.1")
    text = text.replace("/etc/mosquitto/certs", str(tmp_path)).replace("/etc/mosquitto", str(tmp_path))
    # Started as root it becomes another user, who may not read this folder.
    (tmp_path / "mosquitto.conf").write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    process = subprocess.Popen([mosquitto, "-c", tmp_path / "mosquitto.conf"], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: accepts(port), 20)
        yield Site(tmp_path, port)
    finally:
        process.kill()
        process.wait()


def test_a_device_reaches_its_own_topics_and_no_others(site: Site) -> None:
    async def main() -> None:
        server, first, second = (site.connection(name) for name in ("server", "board-1", "board-2"))
        heard: dict[str, list[tuple[str, bytes]]] = {"server": [], "board-1": [], "board-2": []}
        for name, connection in zip(heard, (server, first, second), strict=True):
            connection.on_message = lambda topic, payload, name=name: heard[name].append((topic, payload))
        for topic in TOPICS.server_filters:
            server.subscribe(topic)
        for connection in (first, second):
            connection.subscribe(TOPICS.lease("board-1"))
            connection.subscribe(TOPICS.run)
            await connection.open()
        await server.open()
        async with asyncio.timeout(10):
            # The broker may not have made the server's subscriptions yet.
            while not heard["server"]:
                second.publish(TOPICS.answer("board-1"), b"forged")
                first.publish(TOPICS.answer("board-1"), b"mine")
                await asyncio.sleep(0.1)
        second.publish(TOPICS.run, b"forged", retain=True)
        server.publish(TOPICS.lease("board-1"), b"work")
        await asyncio.sleep(0.5)
        server.publish(TOPICS.run, b"over", retain=True)
        async with asyncio.timeout(10):
            while not (heard["board-2"] and len(heard["board-1"]) == 2 and heard["server"]):
                await asyncio.sleep(0.02)
        assert heard["board-1"] == [(TOPICS.lease("board-1"), b"work"), (TOPICS.run, b"over")]
        assert heard["board-2"] == [(TOPICS.run, b"over")]
        assert set(heard["server"]) == {(TOPICS.answer("board-1"), b"mine")}
        await asyncio.gather(*(connection.close() for connection in (server, first, second)))

    asyncio.run(main())


def test_a_client_without_a_certificate_is_refused(site: Site) -> None:
    async def main() -> None:
        with pytest.raises(BrokerUnreachable):
            await site.stranger().open()

    asyncio.run(main())


def test_the_node_of_a_cluster_is_configured_well(tmp_path: Path) -> None:
    program = find_nats_server()
    assert program is not None
    checked = subprocess.run(
        [program, "-t", "-c", EXAMPLES / "nats-node.conf"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
