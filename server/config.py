"""The TOML file that describes a run, validated with the line named."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from frostline.protocol.errors import UsageError
from frostline.protocol.messages import Compression, Engine, Name, UpdateEncoding, UpdateShare, UpdateValues

MOST_EXTENDED = 4
"""Files that may extend each other in a row."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunTable(_Table):
    """`[run]`: what the run is called and the seed everything random is drawn from.

    `cache` is the folder that compiled programs are kept in: the user's own if it is left out, none if it is empty.
    """

    fleet: Name = "demo"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    cache: str | None = None


class ModelTable(_Table):
    """`[model]`: a built-in name or `package.module:factory`, and where it is cut.

    With `widths`, such as [1.0, 0.5, 0.25], each device trains the widest form of the whole model that fits its memory
    (HeteroFL): the model needs an option `width`, and `blocks = 1`.

    `input_shape` and `classes` are needed only when the server holds no test data to take them from; `vocabulary`, the
    number of token ids, only by a model of one's own that takes them and has no option of that name. `output_module` is
    what stands in for the blocks to come: a convolution each, no heavier than its block or dense whatever that takes, and the
    model's head; or one linear layer.
    """

    name: str
    options: dict[str, Any] = {}
    blocks: Annotated[int, Field(ge=1)] | list[str] = 4
    output_module: Literal["convolutions", "dense", "linear"] = "convolutions"
    widths: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=16)] = []
    input_shape: list[int] | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    vocabulary: Annotated[int, Field(ge=1, le=2**31)] | None = None


class DataTable(_Table):
    """`[data]`: the samples of the run, a built-in name or a folder.

    `train` is split over the devices by the emulator; real devices bring their own. `test` is the server's held-out
    set; without one, devices evaluate on a tenth of their samples. `train_samples` and `test_samples` limit either to as
    many, drawn at random with the run's seed.
    """

    train: str | None = None
    test: str | None = None
    train_samples: Annotated[int, Field(ge=1)] | None = None
    test_samples: Annotated[int, Field(ge=1)] | None = None


class TrainingTable(_Table):
    """`[training]`: what a device does with a lease.

    Attributes
    ----------
    momentum, nesterov
        SGD's alone.
    weight_decay : float
        An L2 penalty for SGD, decoupled decay for AdamW.
    proximal : float
        The factor of FedProx's term.
    clip_norm : float
        Largest norm of all gradients together; 0 for any.
    engines : list of Engine
        The runtimes that stages are compiled for, as devices that have them come; memory is planned for the first.
    prefix : "float32" or "int8"
        How frozen blocks are compiled for ExecuTorch; other engines run them in float32.
    variants : "auto" or "whole"
        Whether devices with too little memory for a stage in one piece are served micro-batches and recomputation, or
        left out.
    memory_limit : str or None
        The most that training may take even on devices that would give more: a size, or a percentage of what training
        the whole model at once takes. Stages that need more are served in the fastest variant within it, or where none
        is, in the smallest.
    """

    batch: Annotated[int, Field(ge=1, le=65_536)] = 16
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    proximal: Annotated[float, Field(ge=0, le=1000)] = 0.0
    clip_norm: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    engines: Annotated[list[Engine], Field(min_length=1)] = ["executorch", "onnxruntime"]
    prefix: Literal["float32", "int8"] = "float32"
    variants: Literal["auto", "whole"] = "auto"
    memory_limit: str | None = None


class RoundsTable(_Table):
    """`[rounds]`: how many devices a round takes and how long it waits for them.

    `max_per_stage` is a safety net for a block that never converges; reaching it is reported.
    """

    devices: Annotated[int, Field(ge=1)] = 8
    minimum_updates: Annotated[int, Field(ge=1)] = 1
    deadline_seconds: Annotated[float, Field(gt=0, le=10**6)] = 600.0
    join_seconds: Annotated[float, Field(gt=0, le=10**6)] = 60.0
    max_per_stage: Annotated[int, Field(ge=1)] = 200

    @model_validator(mode="after")
    def _enough_devices(self) -> Self:
        if self.minimum_updates > self.devices:
            raise ValueError(
                f"minimum_updates = {self.minimum_updates} is more than devices = {self.devices}"
            )
        return self


class SelectionTable(_Table):
    """`[selection]`: which of the devices that can train a stage are asked, explained in `frostline.server.selection`.

    Attributes
    ----------
    method : "communities", "oort" or "uniform"
        Oort's utility inside communities of devices with like data, that utility alone, or a draw.
    class_counts : bool
        Ask devices how many samples of each class they hold; without, like data show in the updates' last layer.
    exploration, exploration_decay, exploration_minimum
        Share of a round's places for devices never seen before, its factor from round to round, and its least.
    separation : int
        Rounds that a device rests after one it was asked in, as long as there are others.
    surplus : float
        The most leases a round gives out, as a multiple of the devices it wants; how many follows from the dropout seen.
    deadline_factor : float
        A lease's deadline as a multiple of what the slowest of the chosen is expected to take, within
        `rounds.deadline_seconds`; 0 for that alone.
    """

    method: Literal["communities", "oort", "uniform"] = "communities"
    class_counts: bool = False
    exploration: Annotated[float, Field(ge=0, le=1)] = 0.9
    exploration_decay: Annotated[float, Field(gt=0, le=1)] = 0.95
    exploration_minimum: Annotated[float, Field(ge=0, le=1)] = 0.2
    separation: Annotated[int, Field(ge=0, le=10_000)] = 3
    surplus: Annotated[float, Field(ge=1, le=10)] = 1.5
    deadline_factor: Annotated[float, Field(ge=0, le=1000)] = 5.0


class PaceTable(_Table):
    """`[pace]`: when a block counts as converged; the figures are explained in `frostline.server.pace`.

    Attributes
    ----------
    window : int
        H: the rounds that effective movement looks back.
    regression : int
        Values of it that the line is fitted through.
    slope : float
        It is flat when the line rises or falls by no more than this a round.
    level : float
        The block wanders when the mean of those values is no higher.
    creep : float
        The block creeps when its last step is no longer than this fraction of the longest.
    patience : int
        Rounds in a row that must look settled.
    scalars : int
        Values watched of a larger block.
    rollback : float
        A block is trained once more if the stage behind it ends with an accuracy lower by more than this than the
        block's own stage did; 1 for never.
    """

    window: Annotated[int, Field(ge=2, le=100)] = 5
    regression: Annotated[int, Field(ge=2, le=100)] = 5
    slope: Annotated[float, Field(gt=0, le=1)] = 0.03
    level: Annotated[float, Field(ge=0, le=1)] = 0.45
    creep: Annotated[float, Field(ge=0, le=1)] = 0.1
    patience: Annotated[int, Field(ge=1)] = 3
    scalars: Annotated[int, Field(ge=1)] = 10_000
    rollback: Annotated[float, Field(ge=0, le=1)] = 0.02


class UpdatesTable(_Table):
    """`[updates]`: how devices send what they learned; explained in `frostline.protocol.update_encoding`.

    Attributes
    ----------
    values : "float32", "float16" or "int8"
        What a parameter's values travel as.
    share : float
        The share of each parameter's values that travels: the largest. What stays behind is added to the device's next
        update of the stage.
    """

    values: UpdateValues = "float32"
    share: UpdateShare = 1.0
    compression: Compression = "none"

    @property
    def encoding(self) -> UpdateEncoding:
        """The same as leases say it."""
        return UpdateEncoding(**self.model_dump())


class BrokerTable(_Table):
    """`[broker]`: where the MQTT broker is; mqtts:// for TLS."""

    url: str = "mqtt://127.0.0.1:1883"
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    chunk_size: Annotated[int, Field(ge=1024, le=8 * 2**20)] = 65_536


class LedgerTable(_Table):
    """`[ledger]`: where the run's journal is: a SQLite file in its folder, or a PostgreSQL database of its own.

    `url` is such as "postgresql://user@host/database"; a password belongs into PGPASSWORD or ~/.pgpass.
    """

    url: str = ""


class FleetTable(_Table):
    """`[fleet]`: the virtual devices of `frostline emulate`; a server with real devices ignores it.

    `memory` is dealt out to the devices in turn: sizes such as "900 kB", or percentages of what training the whole
    model at once would need, such as "60%"; `memory_range` are two of them, between which every device's budget is drawn
    instead. `engines` are dealt out in turn too; all that are installed if it is left out. `seed` is that of the fleet's
    own draws: budgets, speeds and bandwidths.
    """

    devices: Annotated[int, Field(ge=1, le=10_000)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    memory: Annotated[list[str], Field(min_length=1)] = ["100%"]
    memory_range: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    engines: list[Engine] = []
    split: Literal["iid", "dirichlet"] = "iid"
    alpha: Annotated[float, Field(gt=0)] = 0.5


class SimulationTable(_Table):
    """`[simulation]`: what simulated time is counted by; `frostline emulate` and real fleets ignore it.

    Attributes
    ----------
    speed : list of float
        Speeds of the slowest and the fastest device, as multiples of this machine's; drawn between, evenly on a
        logarithmic scale.
    bandwidth : list of str
        Bytes a second of the slowest and the fastest device, each way, such as "2 MB"; drawn likewise.
    dropout : float
        Chance that a device vanishes with a lease it took.
    away_seconds : float
        How long it stays away.
    """

    speed: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(min_length=2, max_length=2)] = [
        0.1,
        0.5,
    ]
    bandwidth: Annotated[list[str], Field(min_length=2, max_length=2)] = ["500 kB", "5 MB"]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    away_seconds: Annotated[float, Field(gt=0, le=10**6)] = 120.0


class RunConfig(_Table):
    """A whole run."""

    run: RunTable = RunTable()
    model: ModelTable
    data: DataTable = DataTable()
    training: TrainingTable = TrainingTable()
    rounds: RoundsTable = RoundsTable()
    selection: SelectionTable = SelectionTable()
    pace: PaceTable = PaceTable()
    updates: UpdatesTable = UpdatesTable()
    broker: BrokerTable = BrokerTable()
    ledger: LedgerTable = LedgerTable()
    fleet: FleetTable = FleetTable()
    simulation: SimulationTable = SimulationTable()


Document = dict[str, Any]
"""What a TOML file says, table by table."""


def load_config(path: Path, changes: Mapping[str, Document] | None = None) -> tuple[RunConfig, str]:
    """Read and validate a run's TOML file; returns it with its text.

    A file may say `extends = "other.toml"` on top: it then changes single keys of that one, which lies beside it.

    Parameters
    ----------
    changes : mapping of str to mapping, optional
        Keys to change on top of the file's, by table.

    Raises
    ------
    UsageError
        Naming file, line and field, with the likely spelling of an unknown key.
    """
    sources = _sources(path)
    if len(sources) == 1 and not changes:
        return validate(sources[0].document, sources), sources[0].text
    merged: Document = {}
    for source in reversed(sources):
        merged = merge(merged, source.document)
    merged = merge(merged, changes or {})
    return validate(merged, sources), tomli_w.dumps(merged)


@dataclass(frozen=True)
class Source:
    """A TOML text, where it came from, and what it says."""

    name: str
    text: str
    document: Document


def _sources(path: Path) -> list[Source]:
    """A file, the one it extends, and so on."""
    sources: list[Source] = []
    following: Path | None = path
    while following is not None:
        text = read_text(following)
        document = parse_toml(text, str(following))
        base = document.pop("extends", None)
        if base is not None and (not isinstance(base, str) or len(sources) == MOST_EXTENDED):
            raise UsageError(
                f"{following}:{_line_of(text, ['extends'])}: extends = {_shown(base)}: give the name of one TOML file, "
                f"of at most {MOST_EXTENDED} in a row"
            )
        sources.append(Source(str(following), text, document))
        following = following.parent / base if base is not None else None
    return sources


def merge(document: Document, changes: Mapping[str, Any]) -> Document:
    """The document with single keys changed, table by table; one level deep."""
    merged = dict(document)
    for table, keys in changes.items():
        known = merged.get(table)
        merged[table] = {**known, **keys} if isinstance(known, dict) and isinstance(keys, dict) else keys
    return merged


def read_text(path: Path) -> str:
    """The text of a file.

    Raises
    ------
    UsageError
        If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r}: cannot be read: {error}".replace("'", "")) from None


def parse_config(text: str, source: str) -> RunConfig:
    """Validate a run's TOML text; `source` names it in errors.

    Raises
    ------
    UsageError
        As `load_config` does.
    """
    document = parse_toml(text, source)
    return validate(document, [Source(source, text, document)])


def parse_toml(text: str, source: str) -> Document:
    """The tables of a TOML text.

    Raises
    ------
    UsageError
        If it is none.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: not valid TOML: {error}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{source}: a number is too long, or brackets are nested too deeply") from None


def validate(document: Document, sources: Sequence[Source]) -> RunConfig:
    """The run that a document describes, put together from `sources`, the one that has the last word first.

    Raises
    ------
    UsageError
        As `load_config` does.
    """
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        # A misspelt key is named before the one that is missing because of it.
        first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
        source = next((each for each in sources if _says(each.document, first["loc"])), sources[0])
        raise UsageError(_describe(dict(first), source.text, source.name)) from None


def _says(document: Document, keys: Sequence[int | str]) -> bool:
    """Whether a document itself has the key, or the table, at fault."""
    table = document.get(str(keys[0])) if keys else None
    return table is not None and (len(keys) < 2 or not isinstance(table, dict) or str(keys[1]) in table)


def _describe(error: dict[str, Any], text: str, source: str) -> str:
    # Choices of a union add their own names behind the keys of the file; they are not in it.
    keys = [str(part) for part in error["loc"]][:2]
    line = _line_of(text, keys)
    where = f"{source}:{line}" if line else source
    field = ".".join(keys)
    if error["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        close = difflib.get_close_matches(keys[-1], known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key {field!r}; {hint}"
    if error["type"] == "missing":
        return f"{where}: {field!r} is missing"
    return f"{where}: {field} = {_shown(error['input'])}: {error['msg']}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:
        # Python prints no number of more than some thousand digits.
        return "a very long number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known_keys(table: list[str]) -> list[str]:
    if not table:
        return list(RunConfig.model_fields)
    field = RunConfig.model_fields.get(table[0])
    model = field.annotation if field else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _line_of(text: str, keys: list[str]) -> int | None:
    """The line of a key, or of its table where it has none of its own; None where the file has neither."""
    best: int | None = None
    matched = 0
    table: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        header = re.match(r"\s*\[+([^\]]+)\]+\s*(#.*)?$", line)
        assignment = re.match(r"([^=#\[]+)=", line)
        if header:
            found = table = _key_parts(header.group(1))
        elif assignment:
            found = table + _key_parts(assignment.group(1))
        else:
            continue
        common = 0
        while found[common : common + 1] == keys[common : common + 1] != []:
            common += 1
        if common > matched:
            best, matched = number, common
    return best


def _key_parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]
