"""A run over three NATS nodes, each of which is killed and comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from frostline.emulator.broker import find_nats_server
from tests.end_to_end.conftest import write_config
from tests.end_to_end.test_processes import device, rounds_of, started, wait_until

pytestmark = pytest.mark.slow

CONFIGURATION = Path(__file__).parents[2] / "examples" / "brokers" / "nats-node.conf"
NODES = 3


class Cluster:
    """Three nodes on this machine, made of the configuration that is shipped."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self.ports = free_ports(3 * NODES)
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def url(self, first: int) -> str:
        """Every node, `first` before the others."""
        order = [(first + n) % NODES for n in range(NODES)]
        return "mqtt://" + ",".join(f"127.0.0.1:{self.ports[n]}" for n in order)

    def start(self, node: int) -> None:
        folder = self._folder / f"node-{node}"
        folder.mkdir(exist_ok=True)
        (folder / "node.conf").write_text(self._configuration(node))
        with (folder / "log").open("ab") as log:
            self._running[node] = subprocess.Popen(
                [self._program, "-c", "node.conf"], cwd=folder, stdout=log, stderr=log
            )

    def kill(self, node: int) -> None:
        self._running[node].send_signal(signal.SIGKILL)
        self._running[node].wait()

    def ready(self) -> bool:
        """Whether a leader was chosen and every node takes clients."""
        logs = [(self._folder / f"node-{n}" / "log").read_text() for n in self._running]
        return any("leader" in log for log in logs) and all(map(accepts, self.ports[:NODES]))

    def stop(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()

    def _configuration(self, node: int) -> str:
        text = CONFIGURATION.read_text()
        routes = [f"nats://127.0.0.1:{port}" for port in self.ports[NODES : 2 * NODES]]
        changes = {
            "server_name: node1": f"server_name: node{node}",
            "127.0.0.1:4222": f"127.0.0.1:{self.ports[2 * NODES + node]}",
            "0.0.0.0:1883": f"127.0.0.1:{self.ports[node]}",
            "0.0.0.0:6222": f"127.0.0.1:{self.ports[NODES + node]}",
            '["nats://node1:6222", "nats://node2:6222", "nats://node3:6222"]': json.dumps(routes),
        }
        for shipped, here in changes.items():
            assert shipped in text
            text = text.replace(shipped, here)
        return text


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    program = find_nats_server()
    assert program is not None
    os.environ.setdefault("GOMEMLIMIT", "256MiB")
    cluster = Cluster(program, tmp_path)
    try:
        for node in range(NODES):
            cluster.start(node)
        wait_until(cluster.ready, 30)
        yield cluster
    finally:
        cluster.stop()


def test_a_run_survives_the_death_of_every_node_in_turn(tmp_path: Path, cluster: Cluster) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path)
    serve = ["serve", "--config", config, "--out", out, "--broker", cluster.url(0), "--json"]
    with ExitStack() as stack:
        server = stack.enter_context(started(tmp_path, "server", *serve))
        for n in range(3):
            stack.enter_context(started(tmp_path, f"device-{n}", *device(tmp_path, n, cluster.url(n))))
        killed = 0
        for node in range(NODES):
            seen = rounds_of(out)
            wait_until(lambda seen=seen: rounds_of(out) > seen or server.poll() is not None, 120)
            if server.poll() is not None:
                break
            cluster.kill(node)
            killed += 1
            time.sleep(1)
            cluster.start(node)
        output, _ = server.communicate(timeout=240)
        assert server.returncode == 0, (tmp_path / "server.log").read_text()
    assert killed == NODES
    assert json.loads(output)["accuracy"] >= 0.9
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == list(range(len(records)))
    with closing(sqlite3.connect(out / "ledger.sqlite")) as ledger:
        updates = ledger.execute("SELECT round, device FROM updates").fetchall()
    assert len(updates) == len(set(updates)) == sum(record["devices_finished"] for record in records)
