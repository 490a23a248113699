"""What a run tells a person: each thing once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

NAMED_DEVICES = 3
"""Devices that a line names before it counts the rest."""


class Notices:
    """Lines for a person; one that was told for a reason is not told for the same reason again.

    Parameters
    ----------
    notify : callable
        Shows a line.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._told: set[tuple[str, ...]] = set()

    def tell(self, text: str) -> None:
        """Show a line."""
        self._notify(text)

    def tell_once(self, text: str, *reason: str) -> None:
        """Show a line, unless one was shown for this reason."""
        if reason not in self._told:
            self._told.add(reason)
            self._notify(text)


def named(devices: Iterable[str]) -> str:
    """A few devices by name, such as "a, b and 3 more"."""
    ordered = sorted(devices)
    if len(ordered) <= NAMED_DEVICES:
        return " and ".join(filter(None, [", ".join(ordered[:-1]), *ordered[-1:]]))
    return f"{', '.join(ordered[:NAMED_DEVICES])} and {len(ordered) - NAMED_DEVICES} more"
