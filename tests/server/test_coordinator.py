"""Whole runs of a scripted fleet over stages that nobody compiles: whom the server serves, and what it says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frostline.emulator.virtual_time import run_in_virtual_time
from frostline.protocol.blobs import BlobStore, index_of, reference_to
from frostline.protocol.errors import FrostlineError, RunError, UsageError
from frostline.protocol.manifest import PlannedMemory, StageManifest, TensorSpec, decode_manifest
from frostline.protocol.messages import (
    Answer,
    BlobReference,
    Engine,
    Lease,
    Presence,
    RunAnnouncement,
    TrainingMetrics,
    UpdateOffer,
)
from frostline.protocol.tensors import Array, encode_tensors
from frostline.server import coordinator as coordinator_module
from frostline.server.config import parse_config
from frostline.server.coordinator import Coordinator, RunObserver
from frostline.server.divergence import divergence
from frostline.server.fleet import DeviceRecord, RoundListener
from frostline.server.ledger import open_ledger
from frostline.server.records import RunSummary
from frostline.server.run_folder import RunFolder
from frostline.server.schedule import PreparedStage
from tests.server.builders import online, planned, program, stage_manifest

TENSOR = "block.w"
CLASSES = 10
CONFIG = """
[model]
name = "m"
blocks = {stages}
[rounds]
devices = 2
join_seconds = 20
max_per_stage = {rounds}
[training]
engines = {engines}
variants = {variants!r}
"""

Outcome = int | FrostlineError
"""The bytes that a form takes, or why it cannot be compiled."""


class Stages:
    """Stands in for a schedule: what each engine's forms take, by stage; a dict gives the smaller ones by budget."""

    def __init__(
        self,
        *stages: Mapping[str, Outcome],
        smaller: Mapping[str, Outcome] | None = None,
        whole_model: Outcome = 4000,
        wait_for: Mapping[str, threading.Event] | None = None,
    ) -> None:
        self.stages = stages
        self.smaller = smaller or {}
        self.whole_model = whole_model
        self.wait_for = wait_for or {}
        self.compiled: list[tuple[int, str]] = []
        self.closed = False

    def __len__(self) -> int:
        return len(self.stages)

    def name(self, index: int) -> str:
        return f"layer{index + 1}"

    def weights(self, index: int) -> dict[str, Array]:
        return {TENSOR: np.ones(2, np.float32)}

    def begin(self, index: int, engine: Engine) -> None:
        pass

    def plan(self, index: int, engine: Engine) -> PlannedMemory:
        return self.prepare(index, engine).manifest.planned

    def estimate_whole_model(self) -> PlannedMemory:
        return planned(_or_raise(self.whole_model))

    def prepare(self, index: int, engine: Engine) -> PreparedStage:
        if engine in self.wait_for:
            assert self.wait_for[engine].wait(30)
        self.compiled.append((index, engine))
        return self._prepared(index, engine, "whole", self.stages[index][engine])

    def prepare_within(self, index: int, engine: Engine, budget: int) -> PreparedStage | None:
        if engine not in self.smaller:
            return None
        prepared = self._prepared(index, engine, "micro2", self.smaller[engine])
        return prepared if prepared.manifest.planned.total <= budget else None

    def smallest(self, index: int, engine: Engine) -> PreparedStage:
        return self.prepare(index, engine)

    def narrower(self, index: int, engine: Engine) -> list[PreparedStage]:
        return []

    def last_layer(self, index: int) -> list[str]:
        return [TENSOR]

    def accuracy(self, index: int, weights: Mapping[str, Array]) -> float | None:
        return 0.5

    def freeze(self, index: int, weights: Mapping[str, Array]) -> float | None:
        return None

    def reopen(self, index: int) -> None:
        pass

    def trained_model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def example(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1)

    def close(self) -> None:
        self.closed = True

    def _prepared(self, index: int, engine: Engine, variant: str, outcome: Outcome) -> PreparedStage:
        content = f"{index} {engine} {variant}".encode()
        manifest = stage_manifest(
            _or_raise(outcome),
            stage=index,
            stages=len(self),
            name=self.name(index),
            engine=engine,
            variant=variant,
            classes=CLASSES,
            parameters=[TensorSpec(name=TENSOR, shape=(2,))],
            training=program(content),
        )
        return PreparedStage(manifest, {"program": content}, self.weights(index))


def _or_raise(outcome: Outcome) -> int:
    if isinstance(outcome, FrostlineError):
        raise outcome
    return outcome


class Content:
    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def offer(self, content: bytes) -> BlobReference:
        reference = reference_to(content)
        self.held[reference.sha256] = content
        return reference

    def withdraw(self, reference: BlobReference) -> None:
        self.held.pop(reference.sha256, None)

    def withdraw_all(self) -> None:
        self.held.clear()


Trained = tuple[float, Array]
"""The loss and the update that a device reports."""


def learn(device: str, round_number: int) -> Trained:
    return 1.0, np.full(2, 0.5**round_number, np.float32)


class Devices:
    """Stands in for the broker and the fleet behind it.

    Parameters
    ----------
    train : callable
        What a device makes of a round; a string is why it gives up.
    """

    def __init__(self, train: Callable[[str, int], Trained | str] = learn) -> None:
        self.content = Content()
        self.devices: dict[str, DeviceRecord] = {}
        self.joining: list[tuple[Presence, tuple[str, ...]]] = []
        self.changed = asyncio.Event()
        self.train = train
        self.updates: BlobStore | None = None
        self.listener: RoundListener | None = None
        self.leases: list[tuple[int, str, str]] = []
        self.on_lease: Callable[[int], None] = lambda round_number: None

    def join(
        self, device: str, engines: Sequence[str], memory: int = 1000, unknown: Sequence[str] = ()
    ) -> None:
        self.joining.append((online(device, engines=list(engines), memory_bytes=memory), tuple(unknown)))

    async def open(self, *, patient: bool) -> bool:
        return True

    async def close(self) -> None:
        pass

    def announce(self, announcement: RunAnnouncement) -> None:
        for presence, unknown in self.joining:
            self.devices[presence.device] = DeviceRecord(presence, None, unknown)
        self.changed.set()

    def remind(self) -> None:
        pass

    def listen(self, listener: RoundListener | None) -> None:
        self.listener = listener

    def send_lease(self, device: str, lease: Lease) -> None:
        manifest = decode_manifest(self.content.held[lease.manifest.sha256], "manifest")
        self.leases.append((manifest.stage, device, f"{manifest.engine} {manifest.variant}"))
        self.on_lease(lease.round)
        asyncio.get_running_loop().call_later(0.01, self._answer, device, lease, manifest)

    def _answer(self, device: str, lease: Lease, manifest: StageManifest) -> None:
        listener = self.listener
        if listener is None:
            return
        trained = self.train(device, lease.round)
        if isinstance(trained, str):
            listener.on_answer(device, Answer(lease=lease.lease, answer="failed", reason=trained))
        else:
            loss, update = trained
            content = encode_tensors({TENSOR: update})
            metrics = TrainingMetrics(samples=10, steps=1, loss=loss, seconds=0.1)
            index = index_of(content, 65536)
            offer = UpdateOffer(update=lease.lease[::-1], lease=lease.lease, content=index, metrics=metrics)
            listener.on_answer(device, Answer(lease=lease.lease, answer="accepted"))
            if not listener.objection(device, offer):
                assert self.updates is not None
                self.updates.put(content)
                listener.count(device, offer, content)
        self.changed.set()


class Notes(RunObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.losses: list[float] = []

    def on_note(self, text: str) -> None:
        self.lines.append(text)

    def on_round(self, record: Any) -> None:
        self.losses.append(record.loss)

    def about(self, *words: str) -> list[str]:
        return [line for line in self.lines if all(word in line for word in words)]


class Server:
    """A run that is ready to start."""

    def __init__(
        self,
        folder: Path,
        stages: Stages,
        devices: Devices,
        engines: str = '["executorch", "onnxruntime"]',
        rounds: int = 2,
        variants: str = "auto",
        more: str = "",
    ) -> None:
        text = CONFIG.format(stages=len(stages), rounds=rounds, engines=engines, variants=variants) + more
        self.stages, self.devices, self.notes = stages, devices, Notes()
        self.folder = RunFolder.create(folder / "run")
        devices.updates = BlobStore(self.folder.updates_dir)
        self.config = parse_config(text, "run.toml")

    def run(self, run: Callable[[Any], RunSummary] = run_in_virtual_time) -> RunSummary:
        async def main() -> RunSummary:
            ledger = open_ledger("", self.folder.ledger_path)
            arguments = self.config, "", self.folder, ledger, self.stages, self.devices, self.notes
            return await Coordinator(*arguments).run()

        return run(main())

    @property
    def served(self) -> set[tuple[int, str, str]]:
        return set(self.devices.leases)


@pytest.fixture(autouse=True)
def without_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "write_final_model", lambda *arguments: None)
    monkeypatch.setattr(coordinator_module, "write_report", lambda *arguments: None)


@pytest.fixture
def fleet(tmp_path: Path) -> Devices:
    devices = Devices()
    devices.join("phone", ["executorch"])
    devices.join("board", ["onnxruntime"])
    return devices


NO_OPERATOR = (
    "aten.erfinv of shape [8, 4] in module 'act': ONNX has no operator for it; use another layer there"
)


def cannot(index: int, reason: str = NO_OPERATOR) -> RunError:
    return RunError(f"stage 'layer{index + 1}' cannot be compiled: {reason}")


def test_an_engine_that_cannot_be_compiled_for_is_left_out_once(tmp_path: Path, fleet: Devices) -> None:
    refused = {"executorch": 100, "onnxruntime": cannot(0)}
    server = Server(tmp_path, Stages(refused, {**refused, "onnxruntime": cannot(1)}), fleet)
    summary = server.run()
    assert summary.rounds == 4
    assert {device for _, device, _ in server.served} == {"phone"}
    (note,) = server.notes.about("cannot be compiled")
    for word in ("layer1", "onnxruntime", "board", "aten.erfinv", "module 'act'", "training.engines"):
        assert word in note
    assert server.stages.closed
    choices = server.folder.selection(3)
    assert choices is not None
    (choice,) = [each for each in choices.devices if each.device == "board"]
    assert choice.place is None
    assert choice.reason == f"the stage cannot be compiled for onnxruntime: {NO_OPERATOR}"


def test_other_reasons_of_other_stages_are_told_too(tmp_path: Path, fleet: Devices) -> None:
    first = {"executorch": 100, "onnxruntime": cannot(0)}
    second = {"executorch": 100, "onnxruntime": cannot(1, "aten.fmod: ONNX has no operator for it")}
    server = Server(tmp_path, Stages(first, second), fleet)
    server.run()
    assert [line.partition(":")[0] for line in server.notes.about("cannot be compiled")] == [
        "layer1",
        "layer2",
    ]


def test_a_board_is_served_again_in_a_stage_that_can_be_compiled(tmp_path: Path, fleet: Devices) -> None:
    stages = Stages({"executorch": 100, "onnxruntime": cannot(0)}, {"executorch": 100, "onnxruntime": 100})
    server = Server(tmp_path, stages, fleet)
    server.run()
    assert server.served == {
        (0, "phone", "executorch whole"),
        (1, "phone", "executorch whole"),
        (1, "board", "onnxruntime whole"),
    }


def test_the_first_engine_may_be_the_one_that_fails(tmp_path: Path, fleet: Devices) -> None:
    server = Server(tmp_path, Stages({"executorch": cannot(0), "onnxruntime": 100}), fleet)
    summary = server.run()
    assert {device for _, device, _ in server.served} == {"board"}
    assert summary.stages[0].planned_bytes == 100
    assert len(server.notes.about("cannot be compiled for executorch")) == 1


def test_a_device_with_two_engines_trains_with_the_other(tmp_path: Path) -> None:
    devices = Devices()
    devices.join("laptop", ["executorch", "onnxruntime"])
    server = Server(tmp_path, Stages({"executorch": cannot(0), "onnxruntime": 100}), devices)
    server.run()
    assert server.served == {(0, "laptop", "onnxruntime whole")}


def test_where_nobody_can_be_served_the_run_ends_with_one_error(tmp_path: Path, fleet: Devices) -> None:
    server = Server(tmp_path, Stages({"executorch": cannot(0, "no kernel"), "onnxruntime": cannot(0)}), fleet)
    with pytest.raises(RunError) as raised:
        server.run()
    for word in ("'layer1'", "for executorch: no kernel", "for onnxruntime: aten.erfinv"):
        assert word in str(raised.value)
    assert server.stages.closed
    assert not fleet.leases


def test_a_later_stage_that_nobody_can_train_ends_the_run_before_it_trained_for_nothing(
    tmp_path: Path,
) -> None:
    devices = Devices()
    devices.join("phone", ["executorch"])
    stages = Stages({"executorch": 100}, {"executorch": 100}, {"executorch": cannot(2, "no kernel")})
    server = Server(tmp_path, stages, devices, rounds=20)
    with pytest.raises(RunError, match=r"'layer3' cannot be compiled.*for executorch: no kernel"):
        server.run()
    assert len(server.notes.losses) <= 1


def test_a_single_engine_that_fails_does_not_wait_for_devices(tmp_path: Path) -> None:
    devices = Devices()
    server = Server(tmp_path, Stages({"executorch": cannot(0)}), devices, engines='["executorch"]')
    with pytest.raises(RunError, match=r"for executorch: aten.erfinv"):
        server.run()


def test_a_smaller_form_that_cannot_be_compiled_leaves_the_others(tmp_path: Path) -> None:
    devices = Devices()
    devices.join("large", ["executorch"], memory=1000)
    devices.join("small", ["executorch"], memory=60)
    failure = UsageError("stage 'layer1': Expected more than 1 value per channel when training")
    server = Server(tmp_path, Stages({"executorch": 100}, smaller={"executorch": failure}), devices)
    server.run()
    assert server.served == {(0, "large", "executorch whole")}
    (note,) = server.notes.about("Expected more than 1 value")
    assert "left out of this stage: small, since a form small enough for executorch" in note
    assert "large" not in note
    assert server.notes.about("left out") == [note]


def test_devices_that_hold_no_form_are_named_once_a_stage(tmp_path: Path) -> None:
    devices = Devices()
    devices.join("phone", ["executorch"])
    for number in range(5):
        devices.join(f"watch-{number}", ["executorch"], memory=10 + number)
    server = Server(tmp_path, Stages({"executorch": 100}, {"executorch": 100}), devices)
    server.run()
    notes = server.notes.about("left out of this stage")
    assert [note.partition(":")[0] for note in notes] == ["layer1", "layer2"]
    assert "watch-0, watch-1, watch-2 and 2 more" in notes[0]
    assert "at most 14 B" in notes[0]
    assert "takes 100 B" in notes[0]


@pytest.mark.parametrize(
    ("engines", "unknown", "words"),
    [
        (["onnxruntime"], [], ["board", "onnxruntime only", "['executorch']"]),
        ([], ["tflite"], ["board", "tflite only"]),
        ([], [], ["board", "have no engine"]),
    ],
)
def test_engines_that_the_run_does_not_serve_are_named_once(
    tmp_path: Path, engines: list[str], unknown: list[str], words: list[str]
) -> None:
    devices = Devices()
    devices.join("phone", ["executorch"])
    devices.join("board", engines, unknown=unknown)
    server = Server(
        tmp_path, Stages({"executorch": 100}, {"executorch": 100}), devices, engines='["executorch"]'
    )
    server.run()
    (note,) = server.notes.about("left out of this run")
    assert all(word in note for word in words)
    assert {device for _, device, _ in server.served} == {"phone"}


def test_rounds_go_on_while_another_engine_is_compiled_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "GRACE_SECONDS", 0.01)
    compiled = threading.Event()
    devices = Devices()
    devices.join("phone", ["executorch"])
    devices.join("tablet", ["executorch"])
    stages = Stages({"executorch": 100, "onnxruntime": 100}, wait_for={"onnxruntime": compiled})

    def join_then_release(round_number: int) -> None:
        if round_number == 1:
            devices.devices["board"] = DeviceRecord(online("board", engines=["onnxruntime"]), None)
        if round_number == 4:
            compiled.set()

    devices.on_lease = join_then_release
    server = Server(tmp_path, stages, devices, rounds=9, more="\n[selection]\nseparation = 0\n")
    server.run(asyncio.run)
    assert len(server.notes.losses) == 9
    asked = [device for _, device, _ in devices.leases]
    # Two devices a round: four rounds passed before there was anything for it, and it took part as soon as there was.
    assert "board" in asked
    assert asked.index("board") >= 8


def test_all_devices_that_are_there_take_part_from_a_stages_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fleet: Devices
) -> None:
    compiled = threading.Event()
    threading.Timer(0.3, compiled.set).start()
    stages = Stages({"executorch": 100, "onnxruntime": 100}, wait_for={"onnxruntime": compiled})
    server = Server(tmp_path, stages, fleet, rounds=1)
    server.run(asyncio.run)
    assert {device for _, device, _ in server.served} == {"phone", "board"}


def test_stages_to_come_are_compiled_while_the_first_is_trained(tmp_path: Path, fleet: Devices) -> None:
    stage = {"executorch": 100, "onnxruntime": 100}
    stages = Stages(stage, stage, stage)
    before: list[tuple[int, str]] = []

    def note(round_number: int) -> None:
        before.extend(stages.compiled if round_number == 0 and not before else [])

    fleet.on_lease = note
    Server(tmp_path, stages, fleet).run()
    assert set(before) >= {(0, "executorch"), (0, "onnxruntime")}
    later = [(index, engine) for index in (1, 2) for engine in ("executorch", "onnxruntime")]
    assert list(dict.fromkeys(each for each in stages.compiled if each[0])) == later


@pytest.mark.parametrize(
    ("trained", "sign"),
    [
        ((4.9e16, np.ones(2, np.float32)), "its loss is 4.9e+16, where a guess among 10 classes has 2.30"),
        ((1.0, np.full(2, 3e38, np.float32)), "tensor 'block.w' is not finite"),
        ("the loss is not finite after 3 steps; lower the run's learning rate", "not finite after 3 steps"),
    ],
)
def test_a_run_that_diverges_ends_with_an_error_and_a_readable_folder(
    tmp_path: Path, trained: Trained | str, sign: str
) -> None:
    def train(device: str, round_number: int) -> Trained | str:
        return learn(device, round_number) if round_number < 2 else trained

    devices = Devices(train)
    devices.join("phone", ["executorch"])
    server = Server(tmp_path, Stages({"executorch": 100}), devices, rounds=5)
    weights = server.stages.weights(0)[TENSOR]
    if sign.startswith("tensor"):
        # Finite updates whose sum is not.
        monkey = {TENSOR: np.full_like(weights, 3e38)}
        server.stages.weights = lambda index: dict(monkey)  # type: ignore[method-assign]
    with pytest.raises(RunError) as raised:
        server.run()
    message = str(raised.value)
    for word in ("'layer1'", "round 3", sign, "training.learning_rate (now 0.05)", "clip_norm"):
        assert word in message
    assert "\n" not in message
    records = RunFolder.open(server.folder.path).records()
    assert len(records) == (2 if isinstance(trained, str) else 3)
    assert open_ledger("", server.folder.ledger_path).rounds() == 2


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_a_sign_of_divergence(loss: float) -> None:
    assert divergence(loss, {}, CLASSES) == f"its loss is {loss}"


def test_a_bad_first_round_is_no_divergence(tmp_path: Path) -> None:
    devices = Devices(lambda device, number: (80.0, np.ones(2, np.float32)))
    devices.join("phone", ["executorch"])
    assert Server(tmp_path, Stages({"executorch": 100}), devices).run().rounds == 2


def test_a_stage_that_does_not_move_is_told_once(tmp_path: Path) -> None:
    devices = Devices(lambda device, number: (1.0, np.zeros(2, np.float32)))
    devices.join("phone", ["executorch"])
    server = Server(tmp_path, Stages({"executorch": 100}, {"executorch": 100}), devices, rounds=3)
    server.run()
    notes = server.notes.about("moved none of its tensors")
    assert [note.partition(":")[0] for note in notes] == ["layer1", "layer2"]
    moving = Server(tmp_path / "other", Stages({"executorch": 100}), Devices())
    moving.devices.join("phone", ["executorch"])
    moving.run()
    assert not moving.notes.about("moved none")


def test_the_last_reason_is_part_of_the_error_when_too_few_come_back(tmp_path: Path) -> None:
    devices = Devices(lambda device, number: "no space left on device")
    devices.join("phone", ["executorch"])
    with pytest.raises(RunError, match=r"0 of at least 1 updates came back.*no space left on device"):
        Server(tmp_path, Stages({"executorch": 100}), devices).run()


def test_the_whole_model_is_estimated_for_limits_and_comparisons(tmp_path: Path, fleet: Devices) -> None:
    limit = 'memory_limit = "2%"\n'
    stages = Stages({"executorch": 100, "onnxruntime": 100}, smaller={"executorch": 70, "onnxruntime": 75})
    server = Server(tmp_path, stages, fleet, more=limit)
    assert server.run().full_model_planned_bytes == 4000
    assert {form for _, _, form in server.served} == {"executorch micro2", "onnxruntime micro2"}


def test_a_whole_model_that_cannot_be_estimated_matters_to_shares_of_it_only(
    tmp_path: Path, fleet: Devices
) -> None:
    stages = Stages({"executorch": 100, "onnxruntime": 100}, whole_model=RunError("cannot be traced"))
    assert Server(tmp_path, stages, fleet).run().full_model_planned_bytes == 0
    share = Server(tmp_path / "share", stages, fleet, more='memory_limit = "50%"\n')
    with pytest.raises(RunError, match=r"cannot be traced"):
        share.run()


def test_a_model_that_executorch_cannot_express_is_trained_all_the_same(
    tmp_path: Path, fleet: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RunError("ExecuTorch cannot express the model (X: y)")

    monkeypatch.setattr(coordinator_module, "write_final_model", fail)
    server = Server(tmp_path, Stages({"executorch": 100, "onnxruntime": 100}), fleet)
    assert server.run().rounds == 2
    assert len(server.notes.about("model.pte was not written", "cannot express")) == 1
