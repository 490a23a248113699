"""Keeps lowered programs on disk: the same graph is lowered once, whichever run or restart asks for it again.

A program is found by a hash of everything that lowering depends on: the traced graph with its constants, the shapes of
its arguments, the engine, the exporter's own source and the versions of the packages it lowers with. What comes from
the cache still passes the parity check.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, fx

from frostline.exporter.target import LoweredProgram, Target
from frostline.exporter.tiles import pick
from frostline.exporter.training_step import TracedProgram
from frostline.protocol.blobs import sha256_of, write_atomically

PACKAGES = ("torch", "executorch", "onnx", "onnxruntime")


class LoweringCache:
    """Lowered programs in a folder; damaged or incomplete files are ignored and written again.

    Parameters
    ----------
    folder : Path
        Made when missing; several processes may share it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def lower(
        self, target: Target, program: TracedProgram, tensors: Mapping[str, Tensor], results: Sequence[str]
    ) -> LoweredProgram:
        """`target.lower` of the same arguments, or what it returned earlier."""
        key = _key(target, program, tensors, results)
        known = self._read(key)
        if known is None:
            known = target.lower(program, tensors, results)
            self._write(key, known)
        return known

    def _read(self, key: str) -> LoweredProgram | None:
        try:
            content = (self._folder / f"{key}.program").read_bytes()
            entry = json.loads((self._folder / f"{key}.json").read_bytes())
            if entry["sha256"] != sha256_of(content):
                return None
            return LoweredProgram(
                content, tuple(entry["inputs"]), int(entry["arena_bytes"]), tuple(entry["written"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, key: str, program: LoweredProgram) -> None:
        entry = {
            "inputs": list(program.inputs),
            "arena_bytes": program.arena_bytes,
            "written": list(program.written),
            "sha256": sha256_of(program.content),
        }
        write_atomically(self._folder / f"{key}.program", program.content)
        write_atomically(self._folder / f"{key}.json", json.dumps(entry).encode())


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
    """The packages that lower, and the exporter's own source."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    root = Path(__file__).parent
    source = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return json.dumps([versions, source.hexdigest()])
