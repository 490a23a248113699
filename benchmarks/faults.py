"""Injects every class of fault into a run of real processes and compares its accounting with that of an undisturbed run.

A broker, a server and ten devices, each a process of its own, train a small CNN on handwritten digits in rounds in which every
device takes part; everything but who waits for whom follows from the seed. Then once more, over links that cut, stall,
lose after the PUBACK, repeat, reorder, truncate and flip bits, while server, broker and three devices at a time are killed with
SIGKILL at each state of the protocol, devices come back with clocks ten years off, and disks fill up.

* lost: updates the undisturbed run counted and this one did not, and updates acknowledged to a device and not in the ledger.
* double_counted: updates beyond one for each device and round, in the ledger or in what was folded in.
* finished: whether the run ended by itself, with the undisturbed run's model, bit for bit.

Accounting is identical if both are 0: round, device and the content's SHA-256 of every update are the same.

Bits are flipped in content only: MQTT leaves the integrity of a control message to TCP and TLS, and a flipped digit is still a
number. Full disks need root, for a small file system in memory.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import asyncio
import contextlib
import hashlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from frostline.datasets.folder import save_samples
from frostline.datasets.load import load_samples
from frostline.emulator.broker import EmbeddedBroker
from frostline.emulator.faulty_link import Fault, FaultyLink, Published
from frostline.emulator.partition import split_iid
from frostline.protocol.connection import BrokerAddress

DEVICES, KILLED_AT_ONCE, STAGES = 10, 3, 2
FLEET = "faults"
CONFIG = f"""
[run]
fleet = "{FLEET}"
seed = 3
[model]
name = "small_cnn"
blocks = {STAGES}
options = {{{{ width = 8 }}}}
[data]
train = "digits"
test = "digits"
[training]
batch = 16
epochs = 1
engines = ["onnxruntime"]
[rounds]
devices = {DEVICES}
minimum_updates = {DEVICES}
join_seconds = 300
deadline_seconds = 60
max_per_stage = {{rounds}}
[selection]
surplus = 1.0
deadline_factor = 0
[pace]
slope = 1e-9
level = 0
creep = 0
rollback = 1
[updates]
values = "int8"
[broker]
chunk_size = 2048
"""
FULL_DISK_SECONDS = 3.0
DISK_BYTES = 24 * 2**20
STATES = ("presence", "lease", "answer", "index", "content chunk", "offer", "update chunk", "receipt")
"""What is on its way when somebody is killed."""
MESSAGE_FAULT_CHANCE = 0.03


def state_of(message: Published) -> str:
    """Which state of the protocol a message belongs to."""
    levels = message.topic.split("/")[3:]
    match levels:
        case ["chunk", _]:
            return "content chunk"
        case ["from", _, "chunk", *_]:
            return "update chunk"
        case ["from" | "to", _, kind]:
            return kind
        case _:
            return levels[0]


class Process:
    """A `frostline` process that can be killed and started again."""

    def __init__(self, name: str, folder: Path, arguments: list[str]) -> None:
        self.name = name
        self.arguments = arguments
        self.output = folder / f"{name}.out"
        self._log = folder / f"{name}.log"
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, *more: str, years: int = 0) -> None:
        """Start it, with the wall clock so many years off."""
        clock = f"import time; now = time.time; time.time = lambda: now() + {years} * 31556952; "
        entry = [sys.executable, "-c", f"{clock if years else ''}from frostline.cli.main import main; main()"]
        with self.output.open("wb") as output, self._log.open("ab") as log:
            self._running = subprocess.Popen([*entry, *self.arguments, *more], stdout=output, stderr=log)

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._running is not None:
            self._running.send_signal(signal.SIGKILL)
            self._running.wait()

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._running.poll() if self._running is not None else None


class Faults:
    """Decides what goes wrong when, and counts it."""

    def __init__(self, seed: int, wanted: int) -> None:
        self._random = random.Random(seed)
        self._left = Counter(dict.fromkeys(Fault, wanted))
        self._kills = [(who, state) for who in ("server", "broker", "devices") for state in STATES]
        self._random.shuffle(self._kills)
        self.injected: Counter[str] = Counter()
        self.due: asyncio.Queue[str] = asyncio.Queue()
        self.quiet = asyncio.Event()
        self.acknowledged: set[str] = set()

    def choose(self, message: Published) -> Fault | None:
        """What happens to a message."""
        if self.quiet.is_set():
            self._trigger_kill(state_of(message))
        if self._random.random() >= MESSAGE_FAULT_CHANCE:
            return None
        content = state_of(message).endswith("chunk")
        fault = self._random.choice([f for f in Fault if f is not Fault.BIT_FLIPPED or content])
        if not self._left[fault]:
            return None
        self._left[fault] -= 1
        self.injected[fault.value] += 1
        return fault

    def note_receipts(self, message: Published) -> None:
        """Remember what devices are told is counted, whether they hear it or not."""
        if state_of(message) == "receipt" and not message.to_broker:
            with contextlib.suppress(ValueError):
                receipt = json.loads(message.payload)
                if receipt["state"] == "done":
                    self.acknowledged.add(receipt["update"])

    def _trigger_kill(self, state: str) -> None:
        for who, when in self._kills:
            if when == state:
                self._kills.remove((who, when))
                self.quiet.clear()
                self.due.put_nowait(who)
                return


class Trial:
    """One run; with faults or without."""

    def __init__(self, folder: Path, rounds: int, faults: Faults | None) -> None:
        self.folder = folder
        self._config = CONFIG.format(rounds=rounds)
        self.out = folder / "disk" / "run" if faults else folder / "run"
        self._faults = faults
        self._random = random.Random(0)
        self._broker = EmbeddedBroker()
        self._links: list[FaultyLink] = []
        self._gave_up = 0
        self._disks = ExitStack()

    async def play(self, limit_seconds: float) -> dict[str, Any]:
        """Run to the end, or until the limit; what the run counted."""
        started = time.monotonic()
        self._broker.__enter__()
        address = BrokerAddress.parse(self._broker.url)
        if self._faults:
            self._disks.enter_context(small_disk(self.folder / "disk"))
            self._disks.enter_context(small_disk(self.folder / "state-0"))
        ports = [await self._port(address) for _ in range(DEVICES + 1)]
        self._server = Process("server", self.folder, self._serve(ports[-1]))
        self._devices = [
            Process(f"device-{n}", self.folder, self._device(n, ports[n])) for n in range(DEVICES)
        ]
        self._server.start()
        for device in self._devices:
            device.start()
        tasks = [asyncio.create_task(self._kill_when_due()), asyncio.create_task(self._fill_disks())]
        try:
            async with asyncio.timeout(limit_seconds):
                finished = await self._until_over()
        except TimeoutError:
            finished = False
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for process in [self._server, *self._devices]:
                process.kill()
            for link in self._links:
                await link.close()
            self._broker.__exit__(None, None, None)
        try:
            ended = {"finished": finished, "seconds": time.monotonic() - started, "gave_up": self._gave_up}
            return self._accounting() | ended | {"tracebacks": self._tracebacks()}
        finally:
            self._disks.close()

    async def _until_over(self) -> bool:
        """Wait for the server; one that gave up, as on a full disk, is started again as its message says."""
        while self._server.code != 0:
            if (self._server.code or 0) > 0:
                if self._faults is None or not self._faults.injected["full_disk"]:
                    return False
                self._gave_up += 1
                await asyncio.sleep(FULL_DISK_SECONDS)
                if self._server.code is not None:
                    self._server.start("--resume")
            await asyncio.sleep(0.2)
        return True

    async def _port(self, address: BrokerAddress) -> int:
        if self._faults is None:
            return address.port
        faults = self._faults

        def choose(message: Published) -> Fault | None:
            faults.note_receipts(message)
            return faults.choose(message)

        link = FaultyLink(address.host, address.port, choose, seed=len(self._links))
        await link.open()
        self._links.append(link)
        return link.port

    def _serve(self, port: int) -> list[str]:
        config = self.folder / "run.toml"
        config.write_text(self._config)
        broker = f"mqtt://127.0.0.1:{port}"
        return ["serve", "--config", str(config), "--out", str(self.out), "--broker", broker, "--json"]

    def _device(self, number: int, port: int) -> list[str]:
        data = self.folder / f"data-{number}"
        data.mkdir()
        samples = load_samples("digits", "train")
        save_samples(
            samples.take(split_iid(samples.y, DEVICES, seed=0)[number]), data / "samples.safetensors"
        )
        names = {"--id": f"board-{number}", "--fleet": FLEET, "--data": str(data), "--memory": "20MB"}
        names |= {"--broker": f"mqtt://127.0.0.1:{port}", "--state": str(self.folder / f"state-{number}")}
        return ["device", *(part for pair in names.items() for part in pair), "--engine", "onnxruntime"]

    async def _kill_when_due(self) -> None:
        """Kill what the faults ask for, wait until it is back, and let the next one come."""
        if self._faults is None:
            return
        while not (self.out / "config.toml").exists():
            await asyncio.sleep(0.1)
        self._faults.quiet.set()
        while True:
            who = await self._faults.due.get()
            self._faults.injected[f"{who}_killed"] += 1
            if who == "server":
                self._server.kill()
                self._server.start("--resume")
            elif who == "broker":
                await self._restart_broker()
            else:
                for device in self._random.sample(self._devices, KILLED_AT_ONCE):
                    self._restart_device(device)
            await asyncio.sleep(4)
            self._faults.quiet.set()

    async def _restart_broker(self) -> None:
        port = BrokerAddress.parse(self._broker.url).port
        os.kill(self._broker.pid, signal.SIGKILL)
        await asyncio.to_thread(self._broker.__exit__, None, None, None)
        self._broker = EmbeddedBroker(port)
        self._broker.__enter__()

    def _restart_device(self, device: Process) -> None:
        assert self._faults is not None
        device.kill()
        years = self._random.choice([-10, 0, 10])
        self._faults.injected["wrong_clock"] += years != 0
        device.start(years=years)

    async def _fill_disks(self) -> None:
        """Fill the server's disk and a device's for some seconds, several times."""
        if self._faults is None:
            return
        for folder in [self.folder / "disk", self.folder / "state-0"] * 3:
            await asyncio.sleep(15)
            if os.path.ismount(folder):
                filler = folder / "filler"
                with contextlib.suppress(OSError), filler.open("wb") as file:
                    while True:
                        file.write(bytes(2**16))
                self._faults.injected["full_disk"] += 1
                await asyncio.sleep(FULL_DISK_SECONDS)
                filler.unlink(missing_ok=True)

    def _tracebacks(self) -> int:
        """How many errors nobody foresaw are in the logs."""
        return sum(log.read_text(errors="replace").count("Traceback") for log in self.folder.glob("*.log"))

    def _accounting(self) -> dict[str, Any]:
        """What the ledger and the round records say."""
        with contextlib.closing(sqlite3.connect(self.out / "ledger.sqlite")) as ledger:
            rows = ledger.execute("SELECT round, device, content, [update] FROM updates").fetchall()
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        folded = {record["round"]: record["devices_finished"] for record in map(json.loads, lines)}
        model = self.out / "model.safetensors"
        return {
            "updates": Counter(
                (round_, device, json.loads(content)["sha256"]) for round_, device, content, _ in rows
            ),
            "identifiers": {update for *_, update in rows},
            "folded": folded,
            "model": hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else "",
        }


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for `folder`, where we may; else an ordinary folder."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder], check=False, capture_output=True
    )
    try:
        yield
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


def compare(faults: Faults, calm: dict[str, Any], stormy: dict[str, Any]) -> dict[str, Any]:
    """The figures of a pair of runs."""
    missing = (calm["updates"] - stormy["updates"]).total()
    unrecorded = len(faults.acknowledged - stormy["identifiers"])
    places = Counter((round_, device) for round_, device, _ in stormy["updates"].elements())
    counted_again = sum(count - 1 for count in places.values())
    folded_again = sum(max(0, folded - DEVICES) for folded in stormy["folded"].values())
    return {
        "injected": faults.injected.total(),
        "lost": missing + unrecorded,
        "double_counted": counted_again + folded_again,
        "finished": stormy["finished"] and calm["finished"] and stormy["model"] == calm["model"],
        "updates": stormy["updates"].total(),
        "updates_undisturbed": calm["updates"].total(),
        "acknowledged": len(faults.acknowledged),
        "resumed_after_full_disk": stormy["gave_up"],
        "tracebacks": calm["tracebacks"] + stormy["tracebacks"],
        "seconds": stormy["seconds"],
        "seconds_undisturbed": calm["seconds"],
        "by_class": dict(sorted(faults.injected.items())),
    }


def main(
    seed: Annotated[int, typer.Option(help="Which messages are hit.")] = 0,
    each: Annotated[int, typer.Option(min=0, help="Injections of each fault of a message.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each of the two stages.")] = 8,
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which a run has not finished.")] = 600,
    keep: Annotated[Path | None, typer.Option(help="Keep the runs' folders and logs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run once in peace and once in a storm, and compare what was counted."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = keep or Path(temporary)
        (folder / "calm").mkdir(parents=True)
        (folder / "storm").mkdir()
        calm = asyncio.run(Trial(folder / "calm", rounds, None).play(limit))

        async def storm() -> tuple[Faults, dict[str, Any]]:
            faults = Faults(seed, each)
            return faults, await Trial(folder / "storm", rounds, faults).play(limit)

        faults, stormy = asyncio.run(storm())
        figures = compare(faults, calm, stormy)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        table = Table("figure", "value", title="a run in a storm, beside one in peace")
        for name, value in (figures | figures.pop("by_class")).items():
            table.add_row(name, f"{value:,.0f}" if isinstance(value, float) else str(value))
        Console().print(table)
    if figures["lost"] or figures["double_counted"] or not figures["finished"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
