"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder that compiled programs are kept in. Default: run.cache, else the user's cache.",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Compile everything anew, and keep none of it.")]
