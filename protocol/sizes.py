"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from frostline.protocol.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str, what: str) -> int:
    """Bytes of "64 MB", "1.5GiB" or "4096".

    Raises
    ------
    UsageError
        Naming `what` if `text` is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).lower() not in _UNITS:
        raise UsageError(f"{what} {text!r}: not a size; write it as 64MB, 1.5GiB or 4096")
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def parse_share(text: str, whole: int, what: str) -> int:
    """Bytes of a size, or of a percentage of `whole` such as "60%".

    Raises
    ------
    UsageError
        Naming `what` if `text` is neither.
    """
    percent = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*%\s*", text)
    return int(whole * float(percent.group(1)) / 100) if percent else parse_size(text, what)


def format_size(count: int) -> str:
    """Return a number of bytes in decimal units, such as "3.4 MB".

    Parameters
    ----------
    count : int
        Bytes.

    Returns
    -------
    str
        The size with its unit: B, kB, MB, GB or TB.
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        # 999.5 and more would be printed with four digits.
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"
