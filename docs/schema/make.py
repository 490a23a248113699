"""Write the JSON Schema of every message and of the stage manifest, from the models that validate them.

Run `python docs/schema/make.py` after changing a model; a test compares the files with the models.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from frostline.protocol.manifest import StageManifest
from frostline.protocol.messages import (
    Answer,
    BlobIndex,
    ContentRequest,
    Lease,
    Presence,
    Receipt,
    RunAnnouncement,
    UpdateOffer,
)

FOLDER = Path(__file__).parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"

MODELS: tuple[type[BaseModel], ...] = (
    Answer,
    BlobIndex,
    ContentRequest,
    Lease,
    Presence,
    Receipt,
    RunAnnouncement,
    StageManifest,
    UpdateOffer,
)


def schema_files() -> dict[str, bytes]:
    """Return the content of every schema file by its name."""
    return {f"{model.__name__}.json": _schema(model) for model in MODELS}


def _schema(model: type[BaseModel]) -> bytes:
    schema = {"$schema": DIALECT, **model.model_json_schema(mode="validation")}
    return (json.dumps(schema, indent=2) + "\n").encode()


def main() -> None:
    """Replace the schema files."""
    for name, content in schema_files().items():
        (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    main()
