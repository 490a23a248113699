"""The process that a server compiles in: what it returns, and that neither errors nor crashes of it reach the server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from frostline.exporter.artifact import ExportOptions
from frostline.exporter.lowering_cache import LoweringCache
from frostline.exporter.onnxruntime_target import ONNXRUNTIME
from frostline.exporter.optimizer import SGD
from frostline.protocol.errors import FrostlineError, RunError, UsageError
from frostline.server.compilation import LocalCompiler, RemoteCompiler, StageSource, build_stages
from frostline.server.compiler_process import CompilerProcess
from frostline.server.config import ModelTable

ENGINE = "onnxruntime"


def source(name: str = "small_cnn", blocks: int | list[str] = 2) -> StageSource:
    options = {"width": 4} if name == "small_cnn" else {}
    return StageSource(ModelTable(name=name, blocks=blocks, options=options), (1, 8, 8), 10, seed=3)


def local(of: StageSource, options: ExportOptions) -> LocalCompiler:
    parts = of.cut(of.build())
    return LocalCompiler(build_stages(parts, of.seed, of.model.output_module), options)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    # What ONNX Runtime takes is measured, and may be measured differently twice: the cache keeps the first figure.
    cache = LoweringCache(tmp_path_factory.mktemp("cache"))
    return ExportOptions(8, 10, SGD(momentum=0.9), ONNXRUNTIME, cache)


@pytest.fixture(scope="module")
def process() -> Iterator[CompilerProcess]:
    torch.set_num_threads(1)
    with CompilerProcess(ENGINE) as running:
        yield running


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_usage_error() -> None:
    raise UsageError("write it otherwise")


def leave_trace(path: str, seconds: float) -> int:
    time.sleep(seconds)
    Path(path).touch()
    return os.getpid()


def test_a_process_of_its_own_compiles_the_same(process: CompilerProcess, options: ExportOptions) -> None:
    here, there = local(source(), options), RemoteCompiler(process, source(), options)
    there.begin(0, ENGINE)
    for index in (0, 1):
        want, found = here.whole(index, ENGINE), there.whole(index, ENGINE)
        assert found.manifest == want.manifest
        assert found.files == want.files
        assert there.whole(index, ENGINE) is found
    budget = here.whole(0, ENGINE).manifest.planned.total - 1
    assert there.fastest(0, ENGINE, 1, []) is None
    within, expected = there.fastest(0, ENGINE, budget, []), here.fastest(0, ENGINE, budget, [])
    assert (within and within.manifest) == (expected and expected.manifest)
    assert there.smallest(0, ENGINE).manifest == here.smallest(0, ENGINE).manifest


def test_frozen_blocks_are_compiled_with_the_weights_given(
    process: CompilerProcess, options: ExportOptions
) -> None:
    there = RemoteCompiler(process, source(), options)
    stage = build_stages(source().cut(source().build()), 3, "convolutions")[0]
    state = {
        name: value.numpy() for name, value in stage.model.state_dict().items() if name.startswith("block.")
    }
    random = np.random.default_rng(0)
    other = {name: random.normal(size=value.shape).astype(np.float32) for name, value in state.items()}
    programs = {}
    for name, block in (("first", state), ("other", other)):
        program, content = there.frozen(0, ENGINE, block, None)
        assert content == local(source(), options).frozen(0, ENGINE, block, None)[1]
        programs[name] = content
        assert program.outputs[0].name == "features"
    assert programs["first"] != programs["other"]


def test_what_cannot_be_compiled_leaves_the_rest(process: CompilerProcess, options: ExportOptions) -> None:
    there = RemoteCompiler(process, source("tests.end_to_end.margins:digits", ["0", "1"]), options)
    for _ in range(2):
        with pytest.raises(RunError, match=r"stage '1' cannot be compiled: aten\.reflection_pad2d"):
            there.whole(1, ENGINE)
    assert there.whole(0, ENGINE).manifest.name == "0"


def test_a_model_that_cannot_be_built_there_is_an_error_here(
    process: CompilerProcess, options: ExportOptions
) -> None:
    with pytest.raises(UsageError, match="no_such_model"):
        RemoteCompiler(process, source("no_such_model"), options).whole(0, ENGINE)


def test_errors_for_people_pass_through_and_others_become_one(
    process: CompilerProcess, options: ExportOptions
) -> None:
    with pytest.raises(UsageError, match="write it otherwise"):
        process.call(raise_usage_error)
    there = RemoteCompiler(process, source(), options)
    with pytest.raises(RunError, match=r"the compiler failed: IndexError"):
        there.whole(99, ENGINE)


def test_a_crash_takes_only_that_with_it_which_caused_it(tmp_path: Path) -> None:
    with CompilerProcess(ENGINE) as process:
        before = process.call(os.getpid)
        waiting: list[object] = []

        def crash() -> None:
            with pytest.raises(RunError, match="process died") as raised:
                process.call(die)
            waiting.append(raised.value)

        thread = threading.Thread(target=crash)
        thread.start()
        after = process.call(leave_trace, str(tmp_path / "after"), 0.2)
        thread.join()
        assert len(waiting) == 1
        assert process.call(os.getpid) != before
        assert after and (tmp_path / "after").exists()


def test_what_was_begun_and_crashed_is_no_error_of_the_next(tmp_path: Path) -> None:
    with CompilerProcess(ENGINE) as process:
        process.call(os.getpid)
        process.begin(die)
        time.sleep(1.0)
        assert process.call(os.getpid)


def test_a_stage_that_crashes_the_compiler_is_not_tried_again(options: ExportOptions) -> None:
    with CompilerProcess(ENGINE) as process:
        there = RemoteCompiler(process, source("tests.server.crashing_model:build", ["0"]), options)
        with pytest.raises(RunError, match="process died"):
            there.whole(0, ENGINE)
        began = time.perf_counter()
        with pytest.raises(RunError, match="process died"):
            there.whole(0, ENGINE)
        assert time.perf_counter() - began < 0.1


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    process = CompilerProcess(ENGINE)
    pid = process.call(os.getpid)
    ended: list[FrostlineError] = []

    def call() -> None:
        with pytest.raises(RunError) as raised:
            process.call(leave_trace, str(tmp_path / "trace"), 60.0)
        ended.append(raised.value)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.3)
    process.close()
    thread.join(10)
    assert len(ended) == 1
    with pytest.raises(RunError, match="ended"):
        process.call(os.getpid)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "trace").exists()
