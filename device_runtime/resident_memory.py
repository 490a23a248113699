"""What a process really takes of a machine's memory, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""proc(5): writing this resets the peak resident set size to the present one."""


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory grew at most while `work` ran.

    Raises
    ------
    OSError
        Where there is no /proc as Linux has it.
    """
    _CLEAR.write_text(_RESET_PEAK)
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
