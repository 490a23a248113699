"""Errors that end a command with one line instead of a traceback.

A message says what was wrong, where (file, field, device) and what to do. The exit code tells a script whether the
invocation was wrong (2) or the run failed (1).
"""

from __future__ import annotations


class FrostlineError(Exception):
    """Base of every error meant for a person to read."""

    exit_code = 1


class UsageError(FrostlineError):
    """The invocation, a configuration or an input named by the user is wrong; nothing was started."""

    exit_code = 2


class RunError(FrostlineError):
    """A run could not start or could not go on, for a reason outside the invocation."""


class BrokerUnreachable(RunError):
    """No MQTT connection could be made to the broker."""


class CorruptContent(RunError):
    """Content does not match its hash, its schema or its declared size."""


class IncompleteContent(CorruptContent):
    """Chunks of content are missing or were damaged on disk; the good ones are kept."""


class StorageExceeded(RunError):
    """Content does not fit what a device gives for storage."""


class ProtocolViolation(FrostlineError):
    """A message from the network is malformed or not allowed; it is dropped, never acted on."""


def first_line(error: Exception) -> str:
    """Return what an error says, cut to its first line.

    Parameters
    ----------
    error
        Any error, including those whose message is empty or spans lines.

    Returns
    -------
    str
        The first line, or the error's type where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
