"""The journal: every method, one count per update whatever happens, and nothing committed is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import URL, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from frostline.protocol.errors import UsageError
from frostline.protocol.manifest import PlannedMemory
from frostline.protocol.messages import BlobReference, TrainingMetrics
from frostline.server.ledger import AcceptedUpdate, Ledger, LedgerUnavailable, NewLease, postgresql_url
from tests.server.builders import planned
from tests.server.postgresql import PostgreSQL, find_programs, running


def identifier(number: int) -> str:
    return f"{number:032x}"


def reference(number: int) -> BlobReference:
    return BlobReference(sha256=f"{number:064x}", size=number + 1)


def accepted(update: int, lease: int, device: str = "phone") -> AcceptedUpdate:
    metrics = TrainingMetrics(samples=10, steps=3, loss=0.5, seconds=1.25, evaluated=4, correct=2)
    return AcceptedUpdate(identifier(update), identifier(lease), device, reference(update), metrics)


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/ledger.sqlite"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    # A socket's path may have 107 bytes, and another user has to get there.
    with (
        tempfile.TemporaryDirectory(prefix="postgresql-") as folder,
        running(programs, Path(folder)) as server,
    ):
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """A database of the test's own."""
    if request.param == "sqlite":
        return make_url(url(tmp_path))
    server: PostgreSQL = request.getfixturevalue("server")
    name = f"run-{os.urandom(4).hex()}"
    engine = create_engine(postgresql_url(server.url()), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    engine.dispose()
    return postgresql_url(server.url(name))


@pytest.fixture
def ledger(database: URL) -> Iterator[Ledger]:
    opened = Ledger(database)
    yield opened
    opened.close()


@pytest.fixture
def in_round(ledger: Ledger) -> Ledger:
    """A ledger with round 0 open and leases 1 and 2 in it."""
    ledger.begin_stage(0, "stem")
    ledger.open_round(0, 0, reference(0))
    ledger.add_leases(0, [NewLease(identifier(1), "phone"), NewLease(identifier(2), "board")])
    return ledger


def test_the_run_has_one_identifier(ledger: Ledger, database: URL) -> None:
    run = ledger.run()
    assert len(run) == 32
    assert ledger.run() == run
    ledger.close()
    with closing(Ledger(database)) as again:
        assert again.holds_run()
        assert again.run() == run


def test_a_run_is_finished_once_it_says_so(ledger: Ledger) -> None:
    assert not ledger.finished()
    ledger.run()
    assert not ledger.finished()
    ledger.finish()
    assert ledger.finished()


def test_a_run_that_never_began_cannot_finish(ledger: Ledger) -> None:
    with pytest.raises(SQLAlchemyError):
        ledger.finish()


def test_a_stage_that_is_begun_again_is_the_same(ledger: Ledger) -> None:
    assert ledger.begin_stage(1, "layer1").rounds == 0
    ledger.open_round(0, 1, reference(0))
    ledger.close_round(0, reference(1), reference(2))
    ledger.freeze_stage(1, "pace", reference(1), planned(700))
    row = ledger.begin_stage(1, "another name")
    assert (row.name, row.rounds, row.frozen_by) == ("layer1", 1, "pace")
    assert row.result is not None and row.planned is not None
    assert BlobReference.model_validate_json(row.result) == reference(1)
    assert PlannedMemory.model_validate_json(row.planned).total == 700


def test_a_reopened_stage_and_those_behind_it_go_on_as_if_they_were_new_to_be_watched(ledger: Ledger) -> None:
    for stage in range(3):
        ledger.begin_stage(stage, "block")
        ledger.open_round(stage, stage, reference(stage))
        ledger.close_round(stage, reference(stage + 1), reference(100 + stage))
        ledger.freeze_stage(stage, "pace", reference(stage + 1), planned())
    ledger.reopen_stage(1)
    rows = [ledger.begin_stage(stage, "block") for stage in range(3)]
    assert [row.reopened for row in rows] == [False, True, False]
    assert [(row.frozen_by, row.result is None) for row in rows] == [("pace", False), *[(None, True)] * 2]
    assert [(row.rounds, row.rounds_before) for row in rows] == [(1, 0), (1, 1), (1, 1)]
    assert [ledger.last_pace(stage) for stage in range(3)] == [reference(100), None, None]
    last = ledger.last_round(2)
    assert last is not None and last.result is not None
    assert BlobReference.model_validate_json(last.result) == reference(3)
    assert ledger.rounds() == 3


def test_a_lease_is_of_a_width(in_round: Ledger) -> None:
    in_round.add_leases(0, [NewLease(identifier(3), "narrow", 0.25)])
    assert [row.width for row in in_round.leases(0)] == [1.0, 1.0, 0.25]


def test_an_unknown_stage_cannot_be_frozen_nor_an_unknown_round_closed(ledger: Ledger) -> None:
    with pytest.raises(SQLAlchemyError):
        ledger.freeze_stage(0, "pace", reference(0), planned())
    with pytest.raises(SQLAlchemyError):
        ledger.close_round(0, reference(0), reference(1))
    with pytest.raises(IntegrityError):
        ledger.open_round(0, 5, reference(0))


def test_rounds_of_a_stage(ledger: Ledger) -> None:
    ledger.begin_stage(0, "stem")
    ledger.begin_stage(1, "layer1")
    assert ledger.last_round(0) is None
    assert ledger.last_pace(0) is None
    for number in range(2):
        ledger.open_round(number, 0, reference(number))
        ledger.close_round(number, reference(number + 1), reference(100 + number))
    ledger.open_round(2, 0, reference(2))
    last = ledger.last_round(0)
    assert last is not None
    assert (last.number, last.result, last.pace) == (2, None, None)
    assert BlobReference.model_validate_json(last.weights) == reference(2)
    assert ledger.last_pace(0) == reference(101)
    assert ledger.rounds() == 2
    assert ledger.begin_stage(0, "stem").rounds == 2
    assert ledger.last_round(1) is None
    assert ledger.last_pace(1) is None


def test_opening_a_known_round_changes_nothing(ledger: Ledger) -> None:
    ledger.begin_stage(0, "stem")
    ledger.open_round(0, 0, reference(1))
    ledger.open_round(0, 0, reference(2))
    last = ledger.last_round(0)
    assert last is not None
    assert BlobReference.model_validate_json(last.weights) == reference(1)


def test_closing_a_round_expires_only_its_open_leases(in_round: Ledger) -> None:
    in_round.add_leases(0, [NewLease(identifier(3), "third")])
    in_round.open_round(1, 0, reference(1))
    in_round.add_leases(1, [NewLease(identifier(4), "phone")])
    in_round.add_update(accepted(9, 1), 0)
    in_round.settle_lease(identifier(2), "refused", "low battery")
    in_round.close_round(0, reference(1), reference(2))
    assert {(row.device, row.state, row.reason) for row in in_round.leases(0)} == {
        ("phone", "done", ""),
        ("board", "refused", "low battery"),
        ("third", "expired", ""),
    }
    assert [row.state for row in in_round.leases(1)] == ["open"]


def test_a_lease_is_added_once_and_to_a_known_round(in_round: Ledger) -> None:
    with pytest.raises(IntegrityError):
        in_round.add_leases(0, [NewLease(identifier(1), "another")])
    with pytest.raises(IntegrityError):
        in_round.add_leases(7, [NewLease(identifier(3), "phone")])
    with pytest.raises(IntegrityError):
        in_round.add_leases(0, [NewLease(identifier(3), "third"), NewLease(identifier(1), "another")])
    with pytest.raises(SQLAlchemyError):
        in_round.settle_lease(identifier(3), "failed")
    assert [(row.lease, row.device) for row in in_round.leases(0)] == [
        (identifier(1), "phone"),
        (identifier(2), "board"),
    ]


def test_an_update_comes_back_whole(in_round: Ledger) -> None:
    assert not in_round.has_update(identifier(9))
    in_round.add_update(accepted(9, 1), 0)
    assert in_round.has_update(identifier(9))
    assert in_round.updates(0) == [accepted(9, 1)]
    assert in_round.updates(1) == []


def test_updates_come_in_one_order_however_they_were_added(in_round: Ledger) -> None:
    in_round.add_update(accepted(9, 1), 0)
    in_round.add_update(accepted(5, 2, "board"), 0)
    assert [update.update for update in in_round.updates(0)] == [identifier(5), identifier(9)]


@pytest.mark.parametrize(
    "second",
    [accepted(9, 1), accepted(9, 2, "board"), accepted(10, 1), accepted(10, 77)],
    ids=["same", "same update for another lease", "same lease", "unknown lease"],
)
def test_a_second_or_unleased_update_raises_and_changes_nothing(
    in_round: Ledger, second: AcceptedUpdate
) -> None:
    in_round.add_update(accepted(9, 1), 0)
    with pytest.raises(SQLAlchemyError):
        in_round.add_update(second, 0)
    assert in_round.updates(0) == [accepted(9, 1)]
    assert [row.state for row in in_round.leases(0)] == ["done", "open"]


def test_a_reopened_ledger_goes_on(in_round: Ledger, database: URL) -> None:
    in_round.add_update(accepted(9, 1), 0)
    in_round.close()
    again = Ledger(database)
    assert again.has_update(identifier(9))
    assert again.updates(0) == [accepted(9, 1)]
    again.add_update(accepted(10, 2, "board"), 0)
    again.close_round(0, reference(1), reference(2))
    assert again.rounds() == 1
    again.close()


class CountingOnce(RuleBasedStateMachine):
    """Offers the same few updates for the same few leases again and again, across restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(url(Path(self.folder.name)))
        self.counted: dict[int, int] = {}
        self.leases: dict[int, str] = {}

    @initialize()
    def begin(self) -> None:
        self.ledger.begin_stage(0, "stem")
        self.ledger.open_round(0, 0, reference(0))

    @rule(lease=st.integers(1, 3))
    def grant(self, lease: int) -> None:
        if lease in self.leases:
            with pytest.raises(IntegrityError):
                self.ledger.add_leases(0, [NewLease(identifier(lease), "phone")])
        else:
            self.ledger.add_leases(0, [NewLease(identifier(lease), "phone")])
            self.leases[lease] = "open"

    @rule(update=st.integers(11, 13), lease=st.integers(1, 3))
    def add(self, update: int, lease: int) -> None:
        allowed = update not in self.counted and lease in self.leases and lease not in self.counted.values()
        if allowed:
            self.ledger.add_update(accepted(update, lease), 0)
            self.counted[update] = lease
            self.leases[lease] = "done"
        else:
            with pytest.raises(SQLAlchemyError):
                self.ledger.add_update(accepted(update, lease), 0)

    @rule(lease=st.integers(1, 3))
    def give_up(self, lease: int) -> None:
        if self.leases.get(lease) == "open":
            self.ledger.settle_lease(identifier(lease), "failed")
            self.leases[lease] = "failed"

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(url(Path(self.folder.name)))

    @invariant()
    def what_was_counted_is_counted_once(self) -> None:
        expected = [accepted(update, lease) for update, lease in sorted(self.counted.items())]
        assert self.ledger.updates(0) == expected
        assert [self.ledger.has_update(identifier(u)) for u in (11, 12, 13)] == [
            u in self.counted for u in (11, 12, 13)
        ]
        assert {row.lease: row.state for row in self.ledger.leases(0)} == {
            identifier(lease): state for lease, state in self.leases.items()
        }

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()


TestCountingOnce = CountingOnce.TestCase
TestCountingOnce.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)


WRITER = """
import sys
from frostline.protocol.messages import BlobReference, TrainingMetrics
from frostline.server.ledger import AcceptedUpdate, Ledger, NewLease

ledger = Ledger(sys.argv[1])
content = BlobReference(sha256="0" * 64, size=1)
metrics = TrainingMetrics(samples=1, steps=1, loss=0.0, seconds=0.0)
ledger.begin_stage(0, "stem")
ledger.open_round(0, 0, content)
for number in range(100_000):
    name = f"{number:032x}"
    ledger.add_leases(0, [NewLease(name, "phone")])
    ledger.add_update(AcceptedUpdate(name, name, "phone", content, metrics), 0)
    print(name, flush=True)
"""


def test_a_killed_writer_leaves_every_update_it_acknowledged(database: URL) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, database.render_as_string()], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(30)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += process.stdout.read().split()
    process.wait()
    process.stdout.close()
    assert all(len(name) == 32 for name in acknowledged[:30])
    ledger = Ledger(database)
    found = [update.update for update in ledger.updates(0)]
    # One update may have been committed and its line not written.
    assert found[: len(acknowledged)] == [name for name in acknowledged if len(name) == 32]
    assert len(found) - len(acknowledged) in (0, 1)
    states = {row.lease: row.state for row in ledger.leases(0)}
    assert all(states[update] == "done" for update in found)
    ledger.add_leases(0, [NewLease("f" * 32, "phone")])
    ledger.close()


def test_a_killed_server_of_postgresql_keeps_what_was_acknowledged(server: PostgreSQL) -> None:
    ledger = Ledger(postgresql_url(server.url()))
    ledger.begin_stage(0, "stem")
    ledger.open_round(0, 0, reference(0))
    ledger.add_leases(0, [NewLease(identifier(1), "phone")])
    ledger.add_leases(0, [NewLease(identifier(2), "board")])
    ledger.add_update(accepted(9, 1), 0)
    server.stop("immediate")
    with pytest.raises(LedgerUnavailable, match="go on with --resume"):
        ledger.add_update(accepted(10, 2, "board"), 0)
    server.start()
    assert ledger.updates(0) == [accepted(9, 1)]
    ledger.add_update(accepted(10, 2, "board"), 0)
    assert ledger.has_update(identifier(10))
    ledger.close()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    ledger = Ledger(url(tmp_path))
    ledger.begin_stage(0, "stem")
    ledger.open_round(0, 0, reference(0))
    for number in range(200):
        ledger.add_leases(0, [NewLease(identifier(number), "phone")])
    with ledger._engine.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        # What a full disk looks like to SQLite; the pool has this one connection.
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(LedgerUnavailable, match="full; mend that and go on with --resume"):
        for number in range(1000):
            ledger.add_update(accepted(1000 + number, number), 0)
    ledger.close()
    again = Ledger(url(tmp_path))
    counted = len(again.updates(0))
    assert [row.state for row in again.leases(0)].count("done") == counted
    again.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nonsense", "not a database's URL"),
        ("mysql://host/name", "not a PostgreSQL database's URL"),
        ("postgresql://host", "not a PostgreSQL database's URL"),
        ("postgresql://user:secret@host/name", "leave the password out"),
    ],
)
def test_a_url_that_cannot_be_used_is_said_in_one_line_without_its_password(given: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        postgresql_url(given)
    assert "secret" not in str(raised.value)


def test_a_server_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match=r"the ledger postgresql.*failed: ") as raised:
        Ledger(postgresql_url(f"postgresql://user@/name?host={tmp_path}"))
    assert "\n" not in str(raised.value)
