"""The published JSON Schemas are those of the models, and accept and refuse what the models do."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from frostline.protocol import messages
from frostline.protocol.manifest import StageManifest
from frostline.protocol.messages import Message

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
GOLDEN = Path(__file__).parents[1] / "golden"
GENERATED: dict[str, bytes] = runpy.run_path(str(SCHEMAS / "make.py"))["schema_files"]()
VECTORS = [*sorted((GOLDEN / "messages").glob("*.json")), GOLDEN / "manifest.json"]
NESTED = {"BlobReference", "TrainingMetrics", "UpdateEncoding"}


def schema_name(vector: Path) -> str:
    return StageManifest.__name__ if vector.name == "manifest.json" else vector.name.split(".")[0]


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_bytes()))


def refused_documents() -> list[tuple[str, Any]]:
    documents = []
    for entry in json.loads((GOLDEN / "refused.json").read_bytes()):
        try:
            document = json.loads(entry["payload"], parse_constant=lambda literal: None)
        except ValueError:
            continue
        if entry["kind"] not in NESTED:
            documents.append((entry["kind"], document))
    return documents


def test_every_message_and_the_manifest_have_a_schema() -> None:
    kinds = {
        name
        for name, value in vars(messages).items()
        if isinstance(value, type) and issubclass(value, Message) and value is not Message
    }
    names = (kinds - NESTED) | {"StageManifest"}
    assert {path.name for path in SCHEMAS.glob("*.json")} == {f"{name}.json" for name in names}
    assert set(GENERATED) == {f"{name}.json" for name in names}


@pytest.mark.parametrize("name", GENERATED)
def test_schemas_are_current_and_valid(name: str) -> None:
    content = (SCHEMAS / name).read_bytes()
    assert content == GENERATED[name], "run docs/schema/make.py after changing a model"
    Draft202012Validator.check_schema(json.loads(content))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda path: path.name)
def test_golden_vectors_fit_their_schema(vector: Path) -> None:
    document = json.loads(vector.read_bytes())
    checker = validator(schema_name(vector))
    checker.validate(document)
    assert isinstance(checker.schema, dict)
    for field in checker.schema["required"]:
        with pytest.raises(ValidationError, match=f"'{field}' is a required property"):
            checker.validate({name: value for name, value in document.items() if name != field})


@pytest.mark.parametrize(("kind", "document"), refused_documents(), ids=str)
def test_refused_payloads_do_not_fit_their_schema(kind: str, document: Any) -> None:
    with pytest.raises(ValidationError):
        validator(kind).validate(document)
