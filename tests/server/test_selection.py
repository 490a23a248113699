"""Who may train a stage, and in which order devices are asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.protocol.blobs import reference_to
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec
from frostline.protocol.messages import Presence
from frostline.server.selection import UniformSelector, admits

PROGRAM = Program(
    file=reference_to(b"program"), inputs=[TensorSpec(name="x", shape=(4, 2))], outputs=[], arena_bytes=0
)
MANIFEST = StageManifest(
    stage=0,
    stages=1,
    name="block",
    engine="executorch",
    variant="whole",
    batch=4,
    micro_batches=1,
    classes=2,
    parameters=[],
    statistics=[],
    optimizer_state=[],
    received=[],
    training=PROGRAM,
    update=None,
    evaluation=PROGRAM,
    prefix=[],
    planned=PlannedMemory(
        arena=1,
        parameters=20,
        statistics=300,
        optimizer_state=4000,
        received=0,
        batch=50_000,
        program=600_000,
    ),
)
NEEDED = 654_321

FITTING = Presence(
    device="phone",
    session="0" * 32,
    state="online",
    memory_bytes=NEEDED,
    engines=["executorch"],
    samples=1,
)


@pytest.mark.parametrize(
    ("changes", "admitted"),
    [
        ({}, True),
        ({"memory_bytes": NEEDED + 1}, True),
        ({"memory_bytes": NEEDED - 1}, False),
        ({"state": "offline"}, False),
        ({"samples": 0}, False),
        ({"engines": []}, False),
        ({"engines": ["another", "executorch"]}, True),
        ({"engines": ["another"]}, False),
    ],
)
def test_every_condition_counts_alone(changes: dict[str, object], admitted: bool) -> None:
    assert admits(FITTING.model_copy(update=changes), MANIFEST) is admitted


names = st.lists(st.text("abcdef", min_size=1, max_size=4), unique=True, max_size=30)


@given(names, st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_order_is_a_permutation_that_only_the_seed_and_round_decide(
    eligible: list[str], seed: int, number: int
) -> None:
    order = UniformSelector(seed).order(eligible, number)
    assert sorted(order) == sorted(eligible)
    assert UniformSelector(seed).order(list(reversed(eligible)), number) == order


DEVICES = [f"device-{i}" for i in range(12)]


def test_order_changes_with_the_round_and_the_seed() -> None:
    selector = UniformSelector(3)
    orders = {tuple(selector.order(DEVICES, number)) for number in range(20)}
    assert len(orders) == 20
    assert selector.order(DEVICES, 0) != UniformSelector(4).order(DEVICES, 0)


def test_every_device_comes_first_about_equally_often() -> None:
    selector = UniformSelector(0)
    firsts = [selector.order(DEVICES, number)[0] for number in range(1200)]
    counts = [firsts.count(device) for device in DEVICES]
    # 100 expected, standard deviation 9.6.
    assert min(counts) > 60
    assert max(counts) < 140
