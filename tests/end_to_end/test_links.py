"""A run between two hosts whose link is slow, drops packets, falls silent, and comes back under another address.

The hosts are two network namespaces, which takes root and iproute2; `emulator/faulty_link.py` is for where these are not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from frostline.emulator.broker import find_mosquitto
from tests.end_to_end.conftest import write_config
from tests.end_to_end.test_processes import device, rounds_of, started, wait_until

pytestmark = pytest.mark.slow

SITE, FIELD, MOVED = "10.77.0.1", "10.77.0.2", "10.77.0.3"
SHAPE = "tbf rate 4mbit burst 8kb latency 20ms"
KEEPALIVE_SECONDS = 4
# As `frostline`, with a keepalive that a test can wait for.
IMPATIENT = f"""
import frostline.protocol.connection as connection
connection.KEEPALIVE_SECONDS = {KEEPALIVE_SECONDS}
connection.KEEPALIVE_CHECK_SECONDS = 1
from frostline.cli.main import main
main()
"""


class Link:
    """Two hosts, `site` and `field`, and a shaped link between them."""

    def __init__(self) -> None:
        self.site, self.field = (f"frostline-{os.getpid()}-{host}" for host in ("site", "field"))
        self._ends = {self.site: f"fl{os.getpid()}s", self.field: f"fl{os.getpid()}f"}

    def open(self) -> None:
        for host in self._ends:
            run("ip", "netns", "add", host)
        site_end, field_end = self._ends.values()
        run("ip", "-n", self.site, "link", "add", site_end, "type", "veth", "peer", "name", field_end)
        run("ip", "-n", self.site, "link", "set", field_end, "netns", self.field)
        for (host, end), address in zip(self._ends.items(), (SITE, FIELD), strict=True):
            run("ip", "-n", host, "address", "add", f"{address}/24", "dev", end)
            run("ip", "-n", host, "link", "set", "lo", "up")
            run("ip", "-n", host, "link", "set", end, "up")
            run("tc", "-n", host, "qdisc", "add", "dev", end, "root", *SHAPE.split())

    def close(self) -> None:
        for host in self._ends:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)

    def at(self, host: str, *command: str) -> list[str]:
        """A command that runs there."""
        return ["ip", "netns", "exec", host, *command]

    def silence(self, seconds: float) -> None:
        """Lose every packet, and tell nobody."""
        end = self._ends[self.site]
        run("ip", "-n", self.site, "link", "set", end, "down")
        time.sleep(seconds)
        run("ip", "-n", self.site, "link", "set", end, "up")

    def move(self) -> None:
        """Give the field another address, as a phone gets when it changes networks."""
        end = self._ends[self.field]
        run("ip", "-n", self.field, "address", "add", f"{MOVED}/24", "dev", end)
        run("ip", "-n", self.field, "address", "delete", f"{FIELD}/24", "dev", end)
        # The second address of a network goes with the first, unless it is there alone.
        run("ip", "-n", self.field, "address", "replace", f"{MOVED}/24", "dev", end)

    def dropped(self) -> int:
        """Packets that the shaping dropped."""
        found = [run("tc", "-n", host, "-s", "qdisc", "show", "dev", end) for host, end in self._ends.items()]
        return sum(int(count) for text in found for count in re.findall(r"dropped (\d+)", text))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def link() -> Iterator[Link]:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root and iproute2")
    link = Link()
    try:
        try:
            link.open()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        yield link
    finally:
        link.close()


@pytest.fixture
def url(link: Link, tmp_path: Path) -> Iterator[str]:
    """The address of a broker at the site."""
    mosquitto = find_mosquitto()
    if mosquitto is None:
        pytest.skip("mosquitto is not installed")
    configuration = tmp_path / "mosquitto.conf"
    configuration.write_text(f"listener 1883 {SITE}\nallow_anonymous true\nset_tcp_nodelay true\nuser root\n")
    broker = subprocess.Popen(
        link.at(link.site, str(mosquitto), "-c", str(configuration)), stderr=subprocess.DEVNULL
    )
    try:
        yield f"mqtt://{SITE}:1883"
    finally:
        broker.kill()
        broker.wait()


def test_a_run_over_a_bad_link_counts_everything_once(tmp_path: Path, link: Link, url: str) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("max_per_stage = 40", "max_per_stage = 5"))
    serve = ["serve", "--config", config, "--out", out, "--broker", url, "--json"]
    there, here = (link.at(host, sys.executable, "-c", IMPATIENT) for host in (link.field, link.site))
    with ExitStack() as stack:
        server = stack.enter_context(started(tmp_path, "server", *serve, frostline=here))
        for n in range(3):
            stack.enter_context(started(tmp_path, f"device-{n}", *device(tmp_path, n, url), frostline=there))
        for disturb in (lambda: link.silence(2 * KEEPALIVE_SECONDS), link.move):
            seen = rounds_of(out)
            wait_until(lambda seen=seen: rounds_of(out) > seen or server.poll() is not None, 120)
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            disturb()
        output, _ = server.communicate(timeout=240)
        assert server.returncode == 0, (tmp_path / "server.log").read_text()
        dropped = link.dropped()
    assert dropped > 0
    assert json.loads(output)["accuracy"] >= 0.8
    for n in range(3):
        log = (tmp_path / f"device-{n}.log").read_text()
        assert log.count("connected") >= 3, log
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    with closing(sqlite3.connect(out / "ledger.sqlite")) as ledger:
        updates = ledger.execute("SELECT round, device FROM updates").fetchall()
    assert len(updates) == len(set(updates)) == sum(record["devices_finished"] for record in records)
