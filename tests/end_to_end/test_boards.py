"""Boards without PyTorch, and fleets whose devices have different engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from frostline.emulator.broker import EmbeddedBroker
from tests.end_to_end.conftest import command, write_config
from tests.end_to_end.test_processes import device, started, wait_until

ROOT = Path(__file__).parents[2]
TRAINING_PACKAGE = Path(
    os.environ.get("FROSTLINE_ONNXRUNTIME_TRAINING", ROOT / "build" / "onnxruntime-training")
)
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the base dependencies and nothing else."""
    folder = tmp_path_factory.mktemp("board") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--editable", str(ROOT)]
    subprocess.run(install, check=True)
    return folder


def resident(agent: psutil.Process) -> int:
    """Bytes of an agent and its worker; what they share counts twice."""
    with suppress(psutil.NoSuchProcess):  # The run may be over.
        return sum(process.memory_info().rss for process in [agent, *agent.children(recursive=True)])
    return 0


def test_a_board_trains_with_the_base_install(board: Path, tmp_path: Path, broker: EmbeddedBroker) -> None:
    for missing in ("torch", "executorch"):
        found = subprocess.run([str(board / "bin/python"), "-c", f"import {missing}"], capture_output=True)
        assert found.returncode == 1
    size = sum(path.lstat().st_size for path in board.rglob("*") if path.is_file())
    assert size < 250 * MEGABYTE
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("[training]", '[training]\nengines = ["onnxruntime"]'))
    out = tmp_path / "run"
    serve = ["serve", "--config", config, "--out", out, "--broker", broker.url, "--json"]
    with ExitStack() as stack:
        boards = []
        for number in range(3):
            arguments = [*device(tmp_path, number, broker.url), "--engine", "onnxruntime"]
            process = started(
                tmp_path, f"device-{number}", *arguments, frostline=[str(board / "bin/frostline")]
            )
            boards.append(psutil.Process(stack.enter_context(process).pid))
        logs = [tmp_path / f"device-{number}.log" for number in range(3)]
        wait_until(lambda: all("for training with onnxruntime" in log.read_text() for log in logs), 60)
        time.sleep(2)  # Connected, and waiting for a run.
        idle = max(process.memory_info().rss for process in boards)
        assert idle < 90 * MEGABYTE
        server = stack.enter_context(started(tmp_path, "server", *serve))
        training: list[int] = []

        def finished() -> bool:
            training.extend(map(resident, boards))
            return server.poll() is not None

        wait_until(finished, 480)
        output, _ = server.communicate()
        assert server.returncode == 0, (tmp_path / "server.log").read_text()
    sys.stdout.write(f"waiting {idle} bytes, training {max(training)} bytes\n")
    assert idle < max(training) < 250 * MEGABYTE
    assert json.loads(output)["accuracy"] >= 0.93
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {engine for record in records for engine in record["engines"]} == {"onnxruntime"}


@pytest.mark.skipif(
    not (TRAINING_PACKAGE / "onnxruntime").is_dir(),
    reason=f"no onnxruntime-training in {TRAINING_PACKAGE}: make onnxruntime-training",
)
def test_three_engines_train_one_model(tmp_path: Path) -> None:
    engines = '["executorch", "onnxruntime", "onnxruntime-training"]'
    config = write_config(tmp_path)
    text = config.read_text().replace("[training]", f"[training]\nengines = {engines}\nmomentum = 0.0")
    text = text.replace('memory = ["100%", "70%"]', f'memory = ["500MB"]\nengines = {engines}')
    config.write_text(text)
    paths = [str(TRAINING_PACKAGE.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    finished = subprocess.run(
        command("emulate", "--config", config, "--out", tmp_path / "run", "--json"),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["accuracy"] >= 0.93
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(
        record["engines"] == {"executorch": 1, "onnxruntime": 1, "onnxruntime-training": 1}
        for record in records
    )
