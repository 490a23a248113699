from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Awaitable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from frostline.datasets.folder import save_samples
from frostline.datasets.samples import Samples
from frostline.device_runtime.training import TrainingTask
from frostline.device_runtime.worker import Workers
from frostline.protocol import errors
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import CorruptContent, RunError
from frostline.protocol.messages import BlobReference
from tests.device_runtime.leases import lease_of, leased

MISSING = BlobReference(sha256="0" * 64, size=1)


@pytest.fixture
def task(tmp_path: Path) -> TrainingTask:
    """A task whose content was never fetched."""
    return TrainingTask(
        data=str(tmp_path / "data"),
        state_folder=tmp_path / "state",
        update_path=tmp_path / "update.safetensors",
        lease=lease_of(MISSING, MISSING),
    )


def make_endless(task: TrainingTask) -> Path:
    """Make training of `task` wait for ever: its manifest becomes a pipe that nobody writes to."""
    pipe = BlobStore(task.state_folder / "blobs").path(task.lease.manifest)
    os.mkfifo(pipe)
    return pipe


async def reading(pipe: Path) -> int:
    """Wait until a worker reads from `pipe`; its other end, which keeps the worker waiting while it is open."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            await asyncio.sleep(0.02)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main

    asyncio.run(bounded())


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)],
    ids=lambda kind: kind.__name__,
)
def test_errors_travel_between_processes(kind: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what was wrong")))
    assert (type(copy), str(copy)) == (kind, "what was wrong")


def test_a_killed_worker_is_an_error_and_the_next_task_is_trained_quietly(
    task: TrainingTask, artifacts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = BlobStore(task.state_folder / "blobs")
    artifact = artifacts / "stage-1"
    for path in (artifact / "files").iterdir():
        if path.is_file():
            store.put(path.read_bytes())
    trainable = leased(
        task,
        manifest=store.put((artifact / "manifest.json").read_bytes()),
        weights=store.put((artifact / "weights.safetensors").read_bytes()),
    )
    Path(task.data).mkdir()
    samples = Samples(x=np.ones((5, 1, 8, 8), np.float32), y=np.zeros(5, np.int64), classes=3)
    save_samples(samples, Path(task.data) / "samples.safetensors")
    pipe = make_endless(task)

    async def main() -> None:
        with Workers() as workers:
            training = asyncio.create_task(workers.train(task))
            held = await reading(pipe)
            (worker,) = workers_of(psutil.Process())
            worker.send_signal(signal.SIGKILL)
            with pytest.raises(RunError, match="the training process died"):
                await training
            os.close(held)
            metrics = await workers.train(trainable)
            assert (metrics.samples, metrics.steps) == (5, 1)
            assert workers_of(psutil.Process()) != [worker]
        assert trainable.update_path.is_file()
        assert capfd.readouterr().err == ""

    run(main())


def test_errors_of_training_arrive_as_themselves(task: TrainingTask) -> None:
    async def main() -> None:
        with Workers() as workers:
            with pytest.raises(CorruptContent, match=f"{MISSING.sha256}: missing; fetch or export it again"):
                await workers.train(task)
            # The same process goes on.
            before = workers_of(psutil.Process())
            with pytest.raises(IsADirectoryError):
                BlobStore(task.state_folder / "blobs").path(MISSING).mkdir()
                await workers.train(task)
            assert workers_of(psutil.Process()) == before != []

    run(main())


def test_leaving_ends_a_worker_that_trains(task: TrainingTask) -> None:
    pipe = make_endless(task)

    async def main() -> None:
        with Workers() as workers:
            training = asyncio.create_task(workers.train(task))
            held = await reading(pipe)
            (worker,) = workers_of(psutil.Process())
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
        _, alive = await asyncio.to_thread(psutil.wait_procs, [worker], 10)
        assert alive == []
        os.close(held)

    run(main())


AGENT = """
import asyncio, pickle, sys
from frostline.device_runtime.worker import Workers

if __name__ == "__main__":
    with Workers() as workers:
        asyncio.run(workers.train(pickle.load(sys.stdin.buffer)))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_worker_leaves_with_its_agent(task: TrainingTask, tmp_path: Path, end: signal.Signals) -> None:
    pipe = make_endless(task)
    program = tmp_path / "agent.py"
    program.write_text(AGENT)

    async def main() -> None:
        # In a group of its own, since a terminal interrupts whole groups.
        agent = await asyncio.create_subprocess_exec(
            sys.executable,
            str(program),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # A shell that starts the tests in the background has interrupts ignored, also by all their children.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        assert agent.stdin is not None
        assert agent.stderr is not None
        try:
            agent.stdin.write(pickle.dumps(task))
            agent.stdin.close()
            held = await reading(pipe)
            (worker,) = workers_of(psutil.Process(agent.pid))
            if end == signal.SIGINT:
                os.killpg(agent.pid, signal.SIGINT)
            else:
                agent.kill()
            await agent.wait()
            _, alive = await asyncio.to_thread(psutil.wait_procs, [worker], 10)
            assert alive == []
            os.close(held)
            # The agent's own end is its command's business; a worker has nothing to say.
            assert b"SpawnProcess" not in await agent.stderr.read()
        finally:
            if agent.returncode is None:
                agent.kill()

    run(main())
