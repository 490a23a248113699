"""Keeps lowered programs on disk: the same graph is lowered once, whichever run or restart asks for it again.

A program is found by a hash of everything that lowering depends on: the traced graph with its constants, the shapes of
its arguments, the engine, the exporter's own source, the processor's architecture and the versions of Python and of the
packages it lowers with. What comes from the cache still passes the parity check, which costs a few steps where lowering
costs seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, fx

from frostline.exporter.target import LoweredProgram, Target
from frostline.exporter.tiles import pick
from frostline.exporter.training_step import TracedProgram
from frostline.protocol.blobs import sha256_of, write_atomically
from frostline.protocol.errors import UsageError

PACKAGES = ("torch", "executorch", "onnx", "onnxruntime")

LIMIT_BYTES = 1_000_000_000
"""What a cache keeps unless told otherwise; a stage's programs take 0.2 to 4 MB."""

SUFFIX = ".program"

ABANDONED_SECONDS = 3600.0
"""How old a half-written file is that a killed process left behind."""


def default_folder() -> Path:
    """The cache of this user: below `$XDG_CACHE_HOME`, or else below `~/.cache`."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    base = Path(named) if named and Path(named).is_absolute() else Path.home() / ".cache"
    return base / "frostline" / "programs"


class LoweringCache:
    """Lowered programs in a folder, a file each; damaged or incomplete files are ignored and written again.

    Parameters
    ----------
    folder : Path
        Made when missing; several processes may share it.
    limit_bytes : int
        Beyond this the files go that were used longest ago.

    Raises
    ------
    UsageError
        If the folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"the cache of compiled programs {folder} cannot be made ({error.strerror}); name another folder by "
                "--cache, or do without by --no-cache"
            ) from error

    def lower(
        self, target: Target, program: TracedProgram, tensors: Mapping[str, Tensor], results: Sequence[str]
    ) -> LoweredProgram:
        """`target.lower` of the same arguments, or what it returned earlier."""
        path = self._folder / (_key(target, program, tensors, results) + SUFFIX)
        known = _read(path)
        if known is None:
            known = target.lower(program, tensors, results)
            # A full disk or a folder that became read-only costs time, not the run.
            with contextlib.suppress(OSError):
                write_atomically(path, _encode(known))
                self._prune()
        return known

    def _prune(self) -> None:
        """Remove what was used longest ago until the rest is within the limit; other processes may do so too."""
        files = []
        total = 0
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == SUFFIX:
                    files.append((status.st_mtime_ns, status.st_size, path))
                    total += status.st_size
                elif time.time() - status.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        for _, size, path in sorted(files):
            if total <= self._limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _read(path: Path) -> LoweredProgram | None:
    """The program in a file, which counts as used now; None if it is missing or damaged."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
        if digest.decode() != sha256_of(body):
            return None
        header, _, content = body.partition(b"\n")
        entry = json.loads(header)
        program = LoweredProgram(
            content, tuple(entry["inputs"]), int(entry["arena_bytes"]), tuple(entry["written"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return program


def _encode(program: LoweredProgram) -> bytes:
    """A line with the hash of the rest, a line of JSON, then the program."""
    entry = {
        "inputs": list(program.inputs),
        "arena_bytes": program.arena_bytes,
        "written": list(program.written),
    }
    body = json.dumps(entry).encode() + b"\n" + program.content
    return sha256_of(body).encode() + b"\n" + body


def _key(
    target: Target, program: TracedProgram, tensors: Mapping[str, Tensor], results: Sequence[str]
) -> str:
    digest = hashlib.sha256(_versions().encode())
    taken = {name: pick(tensors, name) for name in program.inputs}
    shapes = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in taken.items()}
    for part in (target.engine, shapes, list(program.written), list(results)):
        digest.update(json.dumps(part).encode())
    for name, module in program.graph_module.named_modules():
        code = module.code if isinstance(module, fx.GraphModule) else repr(module)
        digest.update(f"{name}\n{code}".encode())
    for name, constant in _constants(program.graph_module):
        values = constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {constant.dtype} {list(constant.shape)}".encode() + values.tobytes())
    return digest.hexdigest()


def _constants(module: fx.GraphModule) -> list[tuple[str, Tensor]]:
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target), None)
        if isinstance(value, Tensor):
            found[str(node.target)] = value
    return sorted(found.items())


@cache
def _versions() -> str:
    """What lowers: the packages, the exporter's own source, and what they run on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    root = Path(__file__).parent
    source = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return json.dumps([versions, source.hexdigest()])
