"""The folder a run leaves behind: configuration, ledger, metrics, model and report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, ValidationError

from frostline.protocol.errors import CorruptContent, RunError, UsageError
from frostline.server.records import RoundRecord, SelectionRecord

_METRICS_NAME = "metrics.jsonl"


class RunFolder:
    """A run's folder. Use :meth:`create` for a new run and :meth:`open` for an earlier one.

    It is a context manager: leaving it closes the TensorBoard file. Metrics need no closing, every round is on its
    way to the disk when :meth:`record` returns.

    Parameters
    ----------
    path : Path or str
        The folder. Nothing is read or written until a method is called.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._scalars: _Scalars | None = None
        self._lock: BaseFileLock | None = None

    @classmethod
    def create(cls, path: Path | str) -> Self:
        """Make a folder for a new run.

        Parameters
        ----------
        path : Path or str
            A folder that does not exist yet, or an empty one.

        Returns
        -------
        RunFolder
            The new folder.

        Raises
        ------
        UsageError
            The folder holds something already, is a file, or cannot be made.
        """
        folder = cls(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            occupied = any(folder.path.iterdir())
            if not occupied:
                folder.weights_dir.mkdir()
                folder.updates_dir.mkdir()
                folder.metrics_path.touch()
        except OSError as error:
            raise UsageError(
                f"Run folder {folder.path} cannot be made ({error.strerror}): choose another path."
            ) from error
        if occupied:
            raise UsageError(
                f"Run folder {folder.path} is not empty: choose a new path, or resume the run that is there."
            )
        return folder

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the folder of an earlier run.

        Parameters
        ----------
        path : Path or str
            A folder that :meth:`create` made.

        Returns
        -------
        RunFolder
            The folder.

        Raises
        ------
        UsageError
            There is no such folder, or it is not a run's.
        """
        folder = cls(path)
        if not folder.path.is_dir():
            raise UsageError(f"Run folder {folder.path} does not exist: check the path.")
        if not folder.metrics_path.is_file():
            raise UsageError(
                f"{folder.path} is not a run folder (it has no {_METRICS_NAME}): "
                "name the folder that a run was started with."
            )
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def lock(self) -> None:
        """Keep other servers out until `close`; a killed process keeps nobody out.

        Raises
        ------
        UsageError
            If a server is at work here.
        """
        self._lock = FileLock(self.path / "lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            self._lock = None
            raise UsageError(
                f"Run folder {self.path} is in use: another server is training this run; wait for it, or stop it."
            ) from None

    @property
    def config_path(self) -> Path:
        """The configuration the run was started with, TOML."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """The rounds, one JSON object a line."""
        return self.path / _METRICS_NAME

    @property
    def tensorboard_dir(self) -> Path:
        """The rounds as TensorBoard scalars."""
        return self.path / "tensorboard"

    @property
    def ledger_path(self) -> Path:
        """The server's journal, an SQLite database."""
        return self.path / "ledger.sqlite"

    @property
    def weights_dir(self) -> Path:
        """Aggregated weights between rounds."""
        return self.path / "weights"

    @property
    def updates_dir(self) -> Path:
        """Updates of devices that are not aggregated yet."""
        return self.path / "updates"

    @property
    def model_path(self) -> Path:
        """The final model's tensors."""
        return self.path / "model.safetensors"

    @property
    def eval_program_path(self) -> Path:
        """The final model as an inference program for devices."""
        return self.path / "model.pte"

    @property
    def report_path(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def summary_path(self) -> Path:
        """The report's headline numbers for programs, a JSON object."""
        return self.path / "summary.json"

    def write_config(self, text: str) -> None:
        """Keep the configuration the run was started with.

        Parameters
        ----------
        text : str
            The configuration file's text.

        Raises
        ------
        RunError
            The file cannot be written.
        """
        try:
            self.config_path.write_text(text, encoding="utf-8", newline="")
        except OSError as error:
            raise _cannot_write(self.config_path, error) from error

    def record(self, event: RoundRecord) -> None:
        """Append one round to the metrics and to TensorBoard.

        Parameters
        ----------
        event : RoundRecord
            The round that ended.

        Raises
        ------
        RunError
            A file cannot be written, or TensorBoard is not installed.
        """
        try:
            self._append(self.metrics_path, event.model_dump_json().encode() + b"\n")
            if self._scalars is None:
                self._scalars = _Scalars(self.tensorboard_dir)
            self._scalars.add(event)
        except OSError as error:
            raise _cannot_write(self.metrics_path, error) from error

    def records(self) -> list[RoundRecord]:
        """Read back every round that was recorded completely.

        Returns
        -------
        list of RoundRecord
            The rounds, in the order they were recorded. A last line cut short by a crash is left out.

        Raises
        ------
        CorruptContent
            Another line is not a round's record.
        RunError
            The file cannot be read.
        """
        try:
            content = self.metrics_path.read_bytes()
        except OSError as error:
            raise RunError(
                f"{self.metrics_path} cannot be read ({error.strerror}): check the run folder."
            ) from error
        return list(self._parse(content))

    @property
    def selection_path(self) -> Path:
        """How each round's devices were chosen, one JSON object a line."""
        return self.path / "selection.jsonl"

    def record_selection(self, selection: SelectionRecord) -> None:
        """Append how a round's devices were chosen.

        Raises
        ------
        RunError
            The file cannot be written.
        """
        try:
            self._append(self.selection_path, selection.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise _cannot_write(self.selection_path, error) from error

    def selection(self, number: int) -> SelectionRecord | None:
        """How a round's devices were chosen the last time it was planned; None if it never was.

        Raises
        ------
        CorruptContent
            A line of the file is not such a record.
        """
        found: SelectionRecord | None = None
        if self.selection_path.exists():
            for line, content in enumerate(self.selection_path.read_bytes().split(b"\n")[:-1], start=1):
                record = _parse_line(SelectionRecord, content, f"{self.selection_path}:{line}")
                found = record if record.round == number else found
        return found

    def close(self) -> None:
        """Close the TensorBoard file, which recording opens again, and let another server in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._scalars is not None:
            self._scalars.close()
            self._scalars = None

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        with path.open("a+b") as file:
            _cut_unfinished_line(file)
            file.write(line)

    def _parse(self, content: bytes) -> Iterator[RoundRecord]:
        # What follows the last newline is what a killed process did not finish writing.
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            yield _parse_line(RoundRecord, line, f"{self.metrics_path}:{number}")


_Line = TypeVar("_Line", bound=BaseModel)


def _parse_line(kind: type[_Line], line: bytes, where: str) -> _Line:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the line"
        raise CorruptContent(
            f"{where} is not a round's record ({field}: {problem['msg']}): restore the file, or remove that line."
        ) from error


class _Scalars:
    """A round's numbers as TensorBoard scalars, one step a round.

    Parameters
    ----------
    folder : Path
        Where the event files go; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = _open_tensorboard(folder)

    def add(self, event: RoundRecord) -> None:
        """Write the numbers a round has; what was not measured leaves a gap."""
        values: dict[str, float | None] = {
            "loss/training": event.loss,
            "accuracy/held_out": event.accuracy,
            "pace/effective_movement": event.effective_movement,
            "pace/movement_slope": event.movement_slope,
            "pace/speed": event.speed,
            "pace/stage": event.stage,
            "pace/frozen": float(event.frozen),
            "devices/selected": event.devices_selected,
            "devices/finished": event.devices_finished,
            "devices/samples": event.samples,
            "traffic/bytes_down": event.bytes_down,
            "traffic/bytes_up": event.bytes_up,
            "memory/planned_bytes": event.planned_bytes,
            "time/seconds": event.seconds,
        }
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, event.round)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


def _open_tensorboard(folder: Path) -> Any:
    # Imported here because it takes seconds, and reading a run back does not need it.
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError(
            f"TensorBoard cannot be imported ({error}): run `pip install 'frostline[server]'`."
        ) from error
    return SummaryWriter(log_dir=str(folder))


def _cut_unfinished_line(file: BinaryIO) -> None:
    if file.tell() == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be written ({error.strerror}): free space or correct permissions.")
