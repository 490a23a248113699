"""What a run needs to begin; resuming: only the run that was begun, and only while it is unfinished."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from frostline.protocol.connection import BrokerAddress
from frostline.protocol.errors import UsageError
from frostline.server import assembly
from frostline.server.assembly import Run, assemble, cache_folder
from frostline.server.config import parse_config
from frostline.server.coordinator import RunObserver
from frostline.server.ledger import Ledger, sqlite_url
from tests.byte_patterns import write_byte_patterns

TEXT = """
[model]
name = "small_cnn"
blocks = 2
input_shape = [1, 8, 8]
classes = 10
options = { width = 4 }

[broker]
url = "mqtt://127.0.0.1:1"
"""


def begin(text: str, out: Path, *, resume: bool) -> Run:
    address = BrokerAddress.parse("mqtt://127.0.0.1:1")
    return assemble(parse_config(text, "run.toml"), text, out, address, RunObserver(), resume=resume)


def test_a_run_is_resumed_with_the_file_it_began_with(tmp_path: Path) -> None:
    begin(TEXT, tmp_path / "run", resume=False)
    begin(TEXT, tmp_path / "run", resume=True)
    begin(TEXT.replace("127.0.0.1:1", "127.0.0.1:2"), tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match=r"\[model\] differs from .*config.toml"):
        begin(TEXT.replace("width = 4", "width = 8"), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("text_transformer", "vocabulary = 100, ", "has a vocabulary of 100, but .* token ids up to 12[0-9]"),
        ("text_transformer", "", None),
        ("torch.nn:Flatten", "", "'torch.nn:Flatten' takes numbers, but the samples of .* are token ids"),
        ("small_cnn", "", r"takes square images, not samples of shape \[16\]"),
    ],
)
def test_token_ids_fit_the_model(tmp_path: Path, name: str, options: str, said: str | None) -> None:
    data = write_byte_patterns(tmp_path / "data")
    more = "" if ":" in name else f"{options} width = 8"
    text = f'[model]\nname = "{name}"\noptions = {{{more}}}\n[data]\ntest = "{data}"\n'
    if said is None:
        begin(text, tmp_path / "run", resume=False)
        return
    with pytest.raises(UsageError, match=said):
        begin(text, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    run = begin(TEXT, tmp_path / "run", resume=False)
    ledger = Ledger(sqlite_url(run.folder.ledger_path))
    ledger.run()
    ledger.finish()
    ledger.close()
    with pytest.raises(UsageError, match="is finished"):
        begin(TEXT, tmp_path / "run", resume=True)


def test_a_database_is_given_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is in a database does not depend on the kind: a file in its place.
    monkeypatch.setattr(assembly, "postgresql_url", lambda url: sqlite_url(tmp_path / "shared.sqlite"))
    with closing(Ledger(sqlite_url(tmp_path / "shared.sqlite"))) as ledger:
        ledger.run()
    with pytest.raises(UsageError, match="the database holds a run"):
        begin(f'{TEXT}\n[ledger]\nurl = "postgresql://host/name"\n', tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("table", "option", "unused", "expected"),
    [
        ("", None, False, "user/frostline/programs"),
        ('cache = "programs"', None, False, "programs"),
        ('cache = ""', None, False, None),
        ('cache = "programs"', "named", False, "named"),
        ('cache = ""', "named", False, "named"),
        ('cache = "programs"', "named", True, None),
        ("", None, True, None),
    ],
)
def test_where_compiled_programs_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    option: str | None,
    unused: bool,
    expected: str | None,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    config = parse_config(f"[run]\n{table}\n{TEXT}", "run.toml")
    folder = cache_folder(config, None if option is None else Path(option), unused=unused)
    home = tmp_path / expected if expected and expected.startswith("user") else expected and Path(expected)
    assert folder == home


def test_a_user_without_a_cache_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(parse_config(TEXT, "run.toml")) is None


def test_a_run_goes_on_with_another_cache(tmp_path: Path) -> None:
    begin(f'[run]\ncache = "{tmp_path}/one"\n{TEXT}', tmp_path / "run", resume=False)
    begin(TEXT, tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match=r"\[run\] differs"):
        begin(f"[run]\nseed = 1\n{TEXT}", tmp_path / "run", resume=True)
