"""The journal of a run, in SQLite by default: what was decided is on disk before anyone is told.

Each method is one transaction. A run has a file of its own, or a database of its own on a PostgreSQL server.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import URL, ForeignKey, create_engine, event, inspect, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from frostline.protocol.errors import RunError, UsageError
from frostline.protocol.manifest import PlannedMemory
from frostline.protocol.messages import BlobReference, TrainingMetrics


class LedgerUnavailable(RunError):
    """The ledger's database cannot be reached, or its disk is full."""


class _Base(DeclarativeBase):
    pass


class RunRow(_Base):
    """The run itself; one row."""

    __tablename__ = "runs"
    run: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]


class StageRow(_Base):
    """A stage that began; `result` names its weights once it is frozen, `planned` what its fastest form took, as JSON.

    `rounds_before` are those of it that passed before it was opened again.
    """

    __tablename__ = "stages"
    stage: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    rounds: Mapped[int] = mapped_column(default=0)
    reopened: Mapped[bool] = mapped_column(default=False)
    rounds_before: Mapped[int] = mapped_column(default=0)
    frozen_by: Mapped[str | None]
    result: Mapped[str | None]
    planned: Mapped[str | None]


class RoundRow(_Base):
    """A round; `result` and `pace` name what it left behind once it is closed."""

    __tablename__ = "rounds"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stage: Mapped[int] = mapped_column(ForeignKey("stages.stage"))
    weights: Mapped[str]
    result: Mapped[str | None]
    pace: Mapped[str | None]


class LeaseRow(_Base):
    """A lease; `state` is open, done, refused, failed, expired or surplus.

    `width` is that of the form of the stage that was leased; `surplus` means that the round had enough without it.
    """

    __tablename__ = "leases"
    lease: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(ForeignKey("rounds.number"), index=True)
    device: Mapped[str]
    state: Mapped[str]
    width: Mapped[float] = mapped_column(default=1.0)
    reason: Mapped[str] = mapped_column(default="")


class UpdateRow(_Base):
    """An accepted update; its id makes counting it twice impossible."""

    __tablename__ = "updates"
    update: Mapped[str] = mapped_column(primary_key=True)
    lease: Mapped[str] = mapped_column(ForeignKey("leases.lease"), unique=True)
    round: Mapped[int] = mapped_column(index=True)
    device: Mapped[str]
    content: Mapped[str]
    metrics: Mapped[str]
    observation: Mapped[str]


@dataclass(frozen=True)
class AcceptedUpdate:
    """An update as the ledger remembers it; `observation` is `frostline.server.history.Observation` as JSON."""

    update: str
    lease: str
    device: str
    content: BlobReference
    metrics: TrainingMetrics
    observation: str = "{}"


@dataclass(frozen=True)
class NewLease:
    """A lease that is about to be sent; `width` is that of the form of the stage."""

    lease: str
    device: str
    width: float = 1.0


def sqlite_url(path: Path) -> URL:
    """The URL of a SQLite file; its folder must exist."""
    return URL.create("sqlite", database=str(path.absolute()))


def postgresql_url(text: str) -> URL:
    """Parse `postgresql://user@host/database`.

    Raises
    ------
    UsageError
        If it is none, or holds a password: it would be copied into the run's folder.
    """
    example = "use postgresql://user@host/database"
    try:
        url = make_url(text)
    except ArgumentError:
        raise UsageError(f"ledger.url = {text!r}: not a database's URL; {example}") from None
    if url.drivername != "postgresql" or not url.database:
        raise UsageError(
            f"ledger.url = {url.render_as_string()!r}: not a PostgreSQL database's URL; {example}"
        )
    if url.password is not None:
        raise UsageError("ledger.url: leave the password out; set PGPASSWORD, or put it into ~/.pgpass")
    return url.set(drivername="postgresql+psycopg")


class Ledger:
    """The journal behind a database URL: that of `sqlite_url` or of `postgresql_url`.

    Every method raises `LedgerUnavailable` if the database cannot be reached or written to. Whether its transaction took
    place is not known then, except after a restart.

    Raises
    ------
    UsageError
        If the database holds the ledger of another version, or what it takes to reach it is not installed.
    LedgerUnavailable
        If it cannot be reached.
    """

    def __init__(self, url: URL | str) -> None:
        try:
            # A database that was restarted meanwhile is connected to anew.
            self._engine = create_engine(url, pool_pre_ping=True)
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise UsageError(f"ledger.url: {error}: pip install 'frostline[postgresql]'") from None
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _configure_sqlite)
        with self._reachable():
            self._check_columns()
            _Base.metadata.create_all(self._engine)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            raise LedgerUnavailable(
                f"the ledger {self._engine.url.render_as_string()}: {reason}; mend that and go on with --resume"
            ) from error

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with self._reachable(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with self._read() as session, session.begin():
            yield session

    def holds_run(self) -> bool:
        """Whether a run began here."""
        with self._read() as session:
            return session.scalar(select(RunRow)) is not None

    def _check_columns(self) -> None:
        found = inspect(self._engine)
        for table in _Base.metadata.sorted_tables:
            known = (
                {column["name"] for column in found.get_columns(table.name)}
                if found.has_table(table.name)
                else None
            )
            if known is not None and not known.issuperset(table.columns.keys()):
                raise UsageError(
                    f"the ledger {self._engine.url} was written by another version of Frostline: finish the run with that "
                    "one, or begin it anew"
                )

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def run(self) -> str:
        """The run's identifier, made on first use."""
        with self._write() as session:
            row = session.scalar(select(RunRow))
            if row is None:
                row = RunRow(run=os.urandom(16).hex(), state="open")
                session.add(row)
            return row.run

    def finished(self) -> bool:
        """Whether the run ended well."""
        with self._read() as session:
            row = session.scalar(select(RunRow))
            return row is not None and row.state == "finished"

    def finish(self) -> None:
        """Record that the run ended well."""
        with self._write() as session:
            session.scalars(select(RunRow)).one().state = "finished"

    def begin_stage(self, stage: int, name: str) -> StageRow:
        """Record that a stage began, or return what is known of it."""
        with self._write() as session:
            row = session.get(StageRow, stage)
            if row is None:
                row = StageRow(stage=stage, name=name, rounds=0)
                session.add(row)
            return row

    def current_stage(self) -> int:
        """The first stage that is not frozen, counted from 0."""
        with self._read() as session:
            frozen = set(session.scalars(select(StageRow.stage).where(StageRow.result.is_not(None))))
            return next(stage for stage in count() if stage not in frozen)

    def freeze_stage(self, stage: int, frozen_by: str, result: BlobReference, planned: PlannedMemory) -> None:
        """Record that a stage's block is frozen with the weights `result`, trained in forms of at most `planned`."""
        with self._write() as session:
            row = session.get_one(StageRow, stage)
            row.frozen_by, row.result = frozen_by, result.model_dump_json()
            row.planned = planned.model_dump_json()

    def reopen_stage(self, stage: int) -> None:
        """Record that a frozen block is to be trained once more, and the stages behind it after it.

        All go on from the weights they had, but are watched as if they were new.
        """
        with self._write() as session:
            session.get_one(StageRow, stage).reopened = True
            for row in session.scalars(select(StageRow).where(StageRow.stage >= stage)):
                row.frozen_by = row.result = None
                row.rounds_before = row.rounds
            for each in session.scalars(select(RoundRow).where(RoundRow.stage >= stage)):
                each.pace = None

    def last_round(self, stage: int) -> RoundRow | None:
        """The latest round of a stage."""
        with self._read() as session:
            query = select(RoundRow).where(RoundRow.stage == stage).order_by(RoundRow.number.desc())
            return session.scalar(query.limit(1))

    def last_pace(self, stage: int) -> BlobReference | None:
        """The pace controller's snapshot after the latest closed round of a stage."""
        with self._read() as session:
            query = select(RoundRow.pace).where(RoundRow.stage == stage, RoundRow.pace.is_not(None))
            found = session.scalar(query.order_by(RoundRow.number.desc()).limit(1))
            return BlobReference.model_validate_json(found) if found else None

    def rounds(self) -> int:
        """How many rounds have been closed in all."""
        with self._read() as session:
            return len(session.scalars(select(RoundRow.number).where(RoundRow.result.is_not(None))).all())

    def open_round(self, number: int, stage: int, weights: BlobReference) -> None:
        """Record that a round began from `weights`; nothing happens if it is known."""
        with self._write() as session:
            if session.get(RoundRow, number) is None:
                session.add(RoundRow(number=number, stage=stage, weights=weights.model_dump_json()))

    def close_round(self, number: int, result: BlobReference, pace: BlobReference) -> None:
        """Record what a round ended with, and settle the leases still open."""
        with self._write() as session:
            row = session.get_one(RoundRow, number)
            row.result, row.pace = result.model_dump_json(), pace.model_dump_json()
            session.get_one(StageRow, row.stage).rounds += 1
            for lease in session.scalars(
                select(LeaseRow).where(LeaseRow.round == number, LeaseRow.state == "open")
            ):
                lease.state = "expired"

    def add_leases(self, number: int, leases: Iterable[NewLease]) -> None:
        """Record leases of a round before they are sent; all of them or none."""
        with self._write() as session:
            session.add_all(
                LeaseRow(lease=new.lease, round=number, device=new.device, state="open", width=new.width)
                for new in leases
            )

    def settle_lease(self, lease: str, state: str, reason: str = "") -> None:
        """Record how a lease ended."""
        with self._write() as session:
            row = session.get_one(LeaseRow, lease)
            row.state, row.reason = state, reason

    def leases(self, number: int) -> list[LeaseRow]:
        """All leases of a round."""
        with self._read() as session:
            return list(
                session.scalars(select(LeaseRow).where(LeaseRow.round == number).order_by(LeaseRow.lease))
            )

    def add_update(self, accepted: AcceptedUpdate, number: int) -> None:
        """Record an update and settle its lease, in one transaction, before it is acknowledged."""
        with self._write() as session:
            session.add(
                UpdateRow(
                    update=accepted.update,
                    lease=accepted.lease,
                    round=number,
                    device=accepted.device,
                    content=accepted.content.model_dump_json(),
                    metrics=accepted.metrics.model_dump_json(),
                    observation=accepted.observation,
                )
            )
            session.get_one(LeaseRow, accepted.lease).state = "done"

    def has_update(self, update: str) -> bool:
        """Whether an update was counted."""
        with self._read() as session:
            return session.get(UpdateRow, update) is not None

    def updates(self, number: int) -> list[AcceptedUpdate]:
        """The updates counted in a round, in a fixed order."""
        with self._read() as session:
            query = select(UpdateRow).where(UpdateRow.round == number).order_by(UpdateRow.update)
            return [
                AcceptedUpdate(
                    row.update,
                    row.lease,
                    row.device,
                    BlobReference.model_validate_json(row.content),
                    TrainingMetrics.model_validate_json(row.metrics),
                    row.observation,
                )
                for row in session.scalars(query)
            ]


def open_ledger(url: str, path: Path) -> Ledger:
    """The journal of a run: at the configuration's `ledger.url`, or where that is empty, in the file `path`.

    Raises
    ------
    UsageError
        If the URL cannot be used.
    LedgerUnavailable
        If the database cannot be reached.
    """
    return Ledger(postgresql_url(url) if url else sqlite_url(path))


def _configure_sqlite(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    # WAL with full flushes: an acknowledged update survives a power cut, and readers never block the server.
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
