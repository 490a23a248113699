"""Who may train a stage, in which form, and why not."""

from __future__ import annotations

import pytest

from frostline.server.admission import admits, fastest_admitted, refusal
from tests.server.builders import offered, online, planned, stage_manifest

NEEDED = 654_321
MANIFEST = stage_manifest(
    planned=planned(1, parameters=20, statistics=300, optimizer_state=4000, batch=50_000, program=600_000)
)
FITTING = online(memory_bytes=NEEDED, samples=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"memory_bytes": NEEDED + 1}, ""),
        ({"memory_bytes": 600_000}, "654 kB are needed, its budget is 600 kB"),
        ({"memory_bytes": NEEDED - 1}, "are needed"),
        ({"state": "offline"}, "offline"),
        ({"samples": 0}, "it has no samples"),
        ({"engines": []}, "it has none of the engines executorch"),
        ({"engines": ["onnxruntime", "executorch"]}, ""),
        ({"engines": ["onnxruntime"]}, "it has none of the engines executorch"),
    ],
)
def test_every_condition_counts_alone_and_is_named(changes: dict[str, object], said: str) -> None:
    presence = FITTING.model_copy(update=changes)
    assert admits(presence, MANIFEST) is (not said)
    assert said in refusal(presence, [MANIFEST])
    assert bool(refusal(presence, [MANIFEST])) is bool(said)
    assert (fastest_admitted(presence, [offered(MANIFEST)]) is None) is bool(said)


def test_the_least_of_the_forms_a_device_has_an_engine_for_is_named() -> None:
    forms = [stage_manifest(900), stage_manifest(500), stage_manifest(10, engine="onnxruntime")]
    assert refusal(online(memory_bytes=499), forms) == "500 B are needed, its budget is 499 B"
    assert refusal(online(memory_bytes=500), forms) == ""
    missing = refusal(online(engines=["onnxruntime-training"]), forms)
    assert missing == "it has none of the engines executorch, onnxruntime"
    assert "\n" not in missing


def test_the_first_form_that_fits_is_served() -> None:
    whole, small = (offered(stage_manifest(memory)) for memory in (900, 500))
    assert fastest_admitted(online(memory_bytes=900), [whole, small]) is whole
    assert fastest_admitted(online(memory_bytes=899), [whole, small]) is small
    assert fastest_admitted(online(memory_bytes=499), [whole, small]) is None


def test_a_device_with_several_engines_gets_the_one_it_names_first() -> None:
    first, second = (offered(stage_manifest(500, engine=e)) for e in ("executorch", "onnxruntime"))
    both = [first, second]
    assert fastest_admitted(online(engines=["onnxruntime", "executorch"]), both) is second
    assert fastest_admitted(online(engines=["executorch", "onnxruntime"]), both) is first
    assert fastest_admitted(online(engines=["onnxruntime"]), both) is second
