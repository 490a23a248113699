"""What encoding an update lost, kept for the device's next update of the same stage.

Without it, what is rounded away or left out is lost for good, always the same; with it, it is only late (Seide et al.,
"1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019).
An update that the server does not count leaves things as they were before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from frostline.protocol.blobs import write_atomically
from frostline.protocol.errors import CorruptContent
from frostline.protocol.manifest import StageManifest
from frostline.protocol.tensors import Array, decode_tensors, encode_tensors

ERROR_FEEDBACK = "error_feedback"
"""The folder's name below a device's."""
_SETTLED, _HELD = ".safetensors", ".held"


class ErrorFeedback:
    """The losses of one device: those of counted updates, and of one that is under way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def carried(self, run: str, manifest: StageManifest) -> dict[str, Array] | None:
        """What updates of this stage have lost so far; None if there is nothing, or nothing that fits."""
        path = self._folder / f"{_key(run, manifest)}{_SETTLED}"
        try:
            return decode_tensors(path.read_bytes(), manifest.trained, str(path))
        except FileNotFoundError:
            return None
        except CorruptContent:
            path.unlink()
            return None

    def hold(self, lease: str, run: str, manifest: StageManifest, lost: Mapping[str, Array]) -> None:
        """Keep what a lease's update lost until it is settled; a device has one at a time."""
        for path in self._folder.glob(f"*{_HELD}"):
            path.unlink()
        write_atomically(self._folder / f"{lease}.{_key(run, manifest)}{_HELD}", encode_tensors(lost))

    def settle(self, lease: str, *, counted: bool) -> None:
        """Carry over what a lease's update lost, in place of all before, or forget it if it was not counted."""
        for held in self._folder.glob(f"{lease}.*{_HELD}"):
            if counted:
                key = held.name.removeprefix(f"{lease}.").removesuffix(_HELD)
                for path in self._folder.glob(f"*{_SETTLED}"):
                    path.unlink()
                held.rename(self._folder / f"{key}{_SETTLED}")
            else:
                held.unlink()


def _key(run: str, manifest: StageManifest) -> str:
    return hashlib.sha256(f"{run} {manifest.stage} {manifest.name}".encode()).hexdigest()[:32]
