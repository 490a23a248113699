"""One server and three devices, each a process of its own, as in the field; some of them are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from frostline.datasets.folder import save_samples
from frostline.datasets.load import load_samples
from frostline.emulator.broker import EmbeddedBroker
from frostline.emulator.partition import split_iid
from tests.end_to_end.conftest import command, write_config


@contextmanager
def started(
    folder: Path, name: str, *arguments: str | Path, frostline: Sequence[str] = command()
) -> Iterator[subprocess.Popen[str]]:
    """A `frostline` process that does not outlive the block; its stderr is kept in a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            [*frostline, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def device(folder: Path, number: int, url: str) -> list[str | Path]:
    """Arguments of one device with a third of the digits."""
    data = folder / f"data-{number}"
    if not data.exists():
        data.mkdir()
        samples = load_samples("digits", "train")
        save_samples(samples.take(split_iid(samples.y, 3, seed=0)[number]), data / "samples.safetensors")
    state = folder / f"state-{number}"
    settings = ["--memory", "8MB", "--fleet", "test", "--leave-when-finished"]
    return ["device", "--broker", url, "--data", data, "--id", f"board-{number}", "--state", state, *settings]


def rounds_of(out: Path) -> int:
    """Rounds closed so far."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Poll for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def test_a_server_and_three_devices_reach_the_emulators_accuracy(
    tmp_path: Path, broker: EmbeddedBroker
) -> None:
    out = tmp_path / "run"
    serve = ["serve", "--config", write_config(tmp_path), "--out", out, "--broker", broker.url, "--json"]
    with ExitStack() as stack:
        server = stack.enter_context(started(tmp_path, "server", *serve))
        devices = [
            stack.enter_context(started(tmp_path, f"device-{n}", *device(tmp_path, n, broker.url)))
            for n in range(3)
        ]
        output, _ = server.communicate(timeout=300)
        assert server.returncode == 0, (tmp_path / "server.log").read_text()
        assert [process.wait(timeout=30) for process in devices] == [0, 0, 0]
    summary = json.loads(output)
    assert summary["blocks_frozen"] == 2
    assert summary["accuracy"] >= 0.93


def test_a_killed_server_resumes_and_a_killed_device_is_replaced(
    tmp_path: Path, broker: EmbeddedBroker
) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path, deadline=40)
    # What a resumed server refolds, and what a resumed device sends, is encoded.
    with config.open("a") as file:
        file.write('[updates]\nvalues = "int8"\nshare = 0.5\ncompression = "zstd"\n')
    serve = ["serve", "--config", config, "--out", out, "--broker", broker.url, "--json"]
    with ExitStack() as stack:
        for n in range(2):
            stack.enter_context(started(tmp_path, f"device-{n}", *device(tmp_path, n, broker.url)))
        with (
            started(tmp_path, "doomed-device", *device(tmp_path, 2, broker.url)) as doomed,
            started(tmp_path, "server", *serve) as server,
        ):
            wait_until(lambda: rounds_of(out) >= 2, 180)
            doomed.send_signal(signal.SIGKILL)
            server.send_signal(signal.SIGKILL)
        before = rounds_of(out)
        server = stack.enter_context(started(tmp_path, "resumed", *serve, "--resume"))
        output, _ = server.communicate(timeout=300)
        assert server.returncode == 0, (tmp_path / "resumed.log").read_text()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == list(range(len(records)))
    assert len(records) > before
    assert json.loads(output)["accuracy"] >= 0.9
