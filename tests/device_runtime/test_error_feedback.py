from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from frostline.device_runtime.error_feedback import ErrorFeedback
from frostline.protocol.manifest import StageManifest, TensorSpec
from frostline.protocol.messages import UpdateEncoding
from frostline.protocol.tensors import Array
from frostline.protocol.update_encoding import decode_update, encode_update
from tests.server.builders import stage_manifest

RUN, LEASE, OTHER = "1" * 32, "2" * 32, "3" * 32
STAGE = stage_manifest(parameters=[TensorSpec(name="w", shape=(3,))])
LOST = {"w": np.array([1.0, -2.0, 3.0], np.float32)}


@pytest.fixture
def feedback(tmp_path: Path) -> ErrorFeedback:
    return ErrorFeedback(tmp_path / "feedback")


def carried(feedback: ErrorFeedback, manifest: StageManifest = STAGE, run: str = RUN) -> list[float] | None:
    found = feedback.carried(run, manifest)
    return None if found is None else found["w"].tolist()


def test_only_what_was_counted_is_carried_over(feedback: ErrorFeedback) -> None:
    assert carried(feedback) is None
    feedback.hold(LEASE, RUN, STAGE, LOST)
    assert carried(feedback) is None
    feedback.settle(LEASE, counted=True)
    assert carried(feedback) == [1.0, -2.0, 3.0]
    feedback.hold(OTHER, RUN, STAGE, {"w": np.zeros(3, np.float32)})
    feedback.settle(OTHER, counted=False)
    assert carried(feedback) == [1.0, -2.0, 3.0]


def test_an_update_that_was_never_settled_is_forgotten(feedback: ErrorFeedback) -> None:
    feedback.hold(LEASE, RUN, STAGE, LOST)
    feedback.hold(OTHER, RUN, STAGE, {"w": np.zeros(3, np.float32)})
    feedback.settle(LEASE, counted=True)
    assert carried(feedback) is None
    feedback.settle(OTHER, counted=True)
    assert carried(feedback) == [0.0, 0.0, 0.0]


def test_other_stages_and_runs_begin_anew(feedback: ErrorFeedback, tmp_path: Path) -> None:
    feedback.hold(LEASE, RUN, STAGE, LOST)
    feedback.settle(LEASE, counted=True)
    later = STAGE.model_copy(update={"stage": 1})
    narrower = stage_manifest(parameters=[TensorSpec(name="w", shape=(2,))])
    assert carried(feedback, later) is carried(feedback, run="4" * 32) is None
    feedback.hold(OTHER, RUN, later, LOST)
    feedback.settle(OTHER, counted=True)
    assert carried(feedback) is None and carried(feedback, later) == [1.0, -2.0, 3.0]
    assert len(list((tmp_path / "feedback").iterdir())) == 1
    # The same stage in another width: what was lost has no place in it.
    assert carried(feedback, narrower.model_copy(update={"stage": 1})) is None


@pytest.mark.parametrize(
    "encoding", [{"values": "int8"}, {"share": 0.1}, {"values": "float16", "share": 0.4}]
)
def test_nothing_is_lost_for_good(feedback: ErrorFeedback, encoding: Mapping[str, object]) -> None:
    stage = stage_manifest(parameters=[TensorSpec(name="w", shape=(40,))])
    chosen = UpdateEncoding.model_validate(encoding)
    random, wanted, sent = np.random.default_rng(0), np.zeros(40), np.zeros(40)
    for number in range(30):
        update: dict[str, Array] = {"w": random.normal(size=40).astype(np.float32)}
        wanted += update["w"]
        before = feedback.carried(RUN, stage)
        update = {"w": update["w"] + before["w"]} if before else update
        arrived = decode_update(encode_update(update, stage, chosen), stage, chosen, "phone")
        feedback.hold(LEASE, RUN, stage, {"w": update["w"] - arrived["w"]})
        # Every third is not counted: its work is lost, and nothing but that.
        if number % 3 == 2:
            feedback.settle(LEASE, counted=False)
            wanted -= update["w"] - (before["w"] if before else 0)
        else:
            feedback.settle(LEASE, counted=True)
            sent += arrived["w"]
    left = feedback.carried(RUN, stage)
    assert left is not None
    np.testing.assert_allclose(sent + left["w"], wanted, atol=1e-4)
