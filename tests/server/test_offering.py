"""Which forms of a stage are compiled and put on offer."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np

from frostline.protocol.blobs import reference_to
from frostline.protocol.messages import BlobReference, Presence
from frostline.server.config import TrainingTable
from frostline.server.notices import Notices
from frostline.server.offering import StageOffers
from frostline.server.schedule import PreparedStage
from tests.server.builders import online, program, stage_manifest


class Forms:
    """Stands in for a schedule: what each form takes, fastest first, by name; `@0.5` is its width."""

    def __init__(self, **forms: int) -> None:
        self.forms = forms

    def name(self, index: int) -> str:
        return "block"

    def prepare(self, index: int, engine: str) -> PreparedStage:
        return self._prepared(next(iter(self.forms)), engine)

    def prepare_within(self, index: int, engine: str, budget: int) -> PreparedStage | None:
        return next((self._prepared(n, engine) for n, memory in self.forms.items() if memory <= budget), None)

    def smallest(self, index: int, engine: str) -> PreparedStage:
        return self._prepared(min(self.forms, key=self.forms.__getitem__), engine)

    def narrower(self, index: int, engine: str) -> list[PreparedStage]:
        return [self._prepared(name, engine) for name in self.forms if "@" in name]

    def _prepared(self, name: str, engine: str) -> PreparedStage:
        content = f"{name} for {engine}".encode()
        variant, _, width = name.partition("@")
        manifest = stage_manifest(
            self.forms[name], engine=engine, variant=variant, training=program(content), classes=len(name)
        )
        return PreparedStage(manifest, {"file": content}, {"w": np.zeros(1, np.float32)}, float(width or 1))


class Content:
    def __init__(self) -> None:
        self.on_offer: set[str] = set()

    def offer(self, content: bytes) -> BlobReference:
        reference = reference_to(content)
        self.on_offer.add(reference.sha256)
        return reference

    def withdraw(self, reference: BlobReference) -> None:
        self.on_offer.discard(reference.sha256)


class Stage:
    def __init__(self, forms: Forms, limit: int | None = None, **training: Any) -> None:
        self.content = Content()
        self.notes: list[str] = []
        table = TrainingTable.model_validate(training)
        self.offers = StageOffers(0, forms, table, self.content, limit, Notices(self.notes.append))

        async def begin() -> None:
            self.offers.begin()
            await self.offers.settle()

        asyncio.run(begin())

    def widen(self, *presences: Presence) -> None:
        async def widen() -> None:
            self.offers.widen(presences)
            await self.offers.settle()

        asyncio.run(widen())

    def withdraw(self) -> None:
        asyncio.run(self.offers.withdraw())

    @property
    def offered(self) -> list[tuple[str, str, float]]:
        return [(o.manifest.engine, o.manifest.variant, o.width) for o in self.offers.offers]


FORMS = Forms(whole=1000, micro2=600, micro4=300)


def test_smaller_forms_are_offered_once_a_device_needs_them() -> None:
    stage = Stage(FORMS)
    assert stage.offered == [("executorch", "whole", 1.0)]
    stage.widen(online(memory_bytes=1000))
    assert len(stage.offered) == 1
    stage.widen(online(memory_bytes=310), online(memory_bytes=700), online(memory_bytes=320))
    assert [variant for _, variant, _ in stage.offered] == ["whole", "micro2", "micro4"]
    assert [note.rpartition("takes ")[2] for note in stage.notes] == ["600 B", "300 B"]
    stage.widen(online(memory_bytes=310), online(memory_bytes=10))
    assert len(stage.offered) == 3
    for offer in stage.offers.offers:
        assert {offer.reference.sha256, offer.manifest.training.file.sha256} <= stage.content.on_offer
    stage.withdraw()
    assert stage.content.on_offer == set()


def test_a_limit_caps_what_is_offered_even_to_devices_that_would_give_more() -> None:
    stage = Stage(FORMS, limit=700)
    assert [variant for _, variant, _ in stage.offered] == ["micro2"]
    assert stage.offers.manifest.planned.total == 600
    stage.widen(online(memory_bytes=5000), online(memory_bytes=700), online(memory_bytes=300))
    assert [variant for _, variant, _ in stage.offered] == ["micro2", "micro4"]
    assert stage.notes == ["block: offering micro4, which takes 300 B"]


def test_where_no_form_is_within_the_limit_the_smallest_is_offered() -> None:
    stage = Stage(FORMS, limit=299)
    stage.widen(online(memory_bytes=5000), online(memory_bytes=299))
    assert [variant for _, variant, _ in stage.offered] == ["micro4"]
    assert len(stage.notes) == 1
    assert "training.memory_limit, which is 299 B; the smallest takes 300 B" in stage.notes[0]


def test_the_stage_is_compiled_for_engines_as_devices_bring_them() -> None:
    stage = Stage(FORMS, engines=["executorch", "onnxruntime"])
    stage.widen(online(engines=["onnxruntime-training"]), online(engines=["onnxruntime"], memory_bytes=600))
    assert stage.offered == [
        ("executorch", "whole", 1.0),
        ("onnxruntime", "whole", 1.0),
        ("onnxruntime", "micro2", 1.0),
    ]
    stage.widen(online(memory_bytes=600))
    assert [each[:2] for each in stage.offered][:2] == [("executorch", "whole"), ("executorch", "micro2")]
    assert stage.offers.manifest.engine == "executorch"


def test_whole_variants_alone_may_be_asked_for() -> None:
    stage = Stage(FORMS, variants="whole")
    stage.widen(online(memory_bytes=300))
    assert [variant for _, variant, _ in stage.offered] == ["whole"]


def test_every_width_is_offered_from_the_start() -> None:
    # A server that was killed may hold updates of a width whose devices are not back yet.
    stage = Stage(Forms(whole=1000, **{"whole@0.5": 400, "whole@0.25": 150}))
    assert [width for _, _, width in stage.offered] == [1.0, 0.5, 0.25]
    stage.widen(online(memory_bytes=450))
    assert len(stage.offered) == 3


def test_a_form_that_is_known_to_be_the_fastest_within_a_budget_is_not_asked_for_again() -> None:
    asked: list[int] = []

    class Counting(Forms):
        def prepare_within(self, index: int, engine: str, budget: int) -> PreparedStage | None:
            asked.append(budget)
            return super().prepare_within(index, engine, budget)

    stage = Stage(Counting(whole=1000, micro2=600, micro4=300))
    stage.widen(*(online(memory_bytes=memory) for memory in range(250, 1000, 10)))
    assert asked == [990, 590, 290]
    assert [variant for _, variant, _ in stage.offered] == ["whole", "micro2", "micro4"]
    stage.widen(online(memory_bytes=995), online(memory_bytes=601), online(memory_bytes=299))
    assert asked == [990, 590, 290, 995, 299]


def test_what_is_being_compiled_when_a_stage_ends_is_not_offered_any_more() -> None:
    begun, release = threading.Event(), threading.Event()

    class Slow(Forms):
        def prepare(self, index: int, engine: str) -> PreparedStage:
            if engine == "onnxruntime":
                begun.set()
                assert release.wait(30)
            return super().prepare(index, engine)

    stage = Stage(Slow(whole=1000))

    async def leave() -> None:
        stage.offers.widen([online(engines=["onnxruntime"])])
        while not begun.is_set():
            await asyncio.sleep(0.01)
        assert stage.offers.compiling
        await stage.offers.withdraw()
        assert not stage.offers.compiling
        release.set()

    asyncio.run(leave())
    assert stage.offered == [("executorch", "whole", 1.0)]
    assert stage.content.on_offer == set()
