"""Configuration files: good ones load, and of the others one line says what is wrong and where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from frostline.protocol.errors import UsageError
from frostline.server.config import MOST_EXTENDED, RunConfig, load_config, parse_config

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.toml"


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_config(text, "run.toml")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_the_quickstart_loads() -> None:
    config, text = load_config(QUICKSTART)
    assert text == QUICKSTART.read_text(encoding="utf-8")
    assert config.run.fleet == "quickstart"
    assert (config.model.name, config.model.blocks) == ("resnet10", 4)
    assert config.model.options == {"width": 16, "norm": "group"}
    assert config.fleet.split == "dirichlet"


def test_everything_but_the_model_has_a_default() -> None:
    assert parse_config('model.name = "resnet10"', "run.toml") == RunConfig.model_validate(
        {"model": {"name": "resnet10"}}
    )


def test_a_good_file_sets_every_kind_of_value() -> None:
    config = parse_config(
        """
        [model]
        name = "package.module:factory"
        blocks = ["stem", "body"]
        input_shape = [3, 8, 8]
        classes = 4
        [broker]
        url = "mqtts://broker.example"
        ca_file = "ca.pem"
        [fleet]
        memory = ["900 kB", "60%"]
        """,
        "run.toml",
    )
    assert config.model.blocks == ["stem", "body"]
    assert config.broker.ca_file == Path("ca.pem")
    assert config.fleet.memory == ["900 kB", "60%"]


MODEL = '[model]\nname = "resnet10"\n'


@pytest.mark.parametrize(
    ("text", "where", "key", "suggestion"),
    [
        (f"{MODEL}[training]\nbatch = 4\nlerning_rate = 0.1\n", 5, "training.lerning_rate", "learning_rate"),
        (f"{MODEL}\n[trainning]\nbatch = 4\n", 4, "trainning", "training"),
        (f"# a comment\nzzz = 3\n{MODEL}[run]\nseed = 3\n", 2, "zzz", None),
        ('[model]\nnme = "resnet10"\n', 2, "model.nme", "name"),
        ('[modle]\nname = "resnet10"\n', 1, "modle", "model"),
        (f"{MODEL}run.sead = 1\n", 3, "model.run", None),
        (f"run.sead = 1\n{MODEL}", 1, "run.sead", "seed"),
        (f"run = {{ sead = 1 }}\n{MODEL}", 1, "run.sead", "seed"),
        (f'{MODEL}[ run ]\n"sead" = 1\n', 4, "run.sead", "seed"),
        (f"{MODEL}[run.sead]\nvalue = 1\n", 3, "run.sead", "seed"),
        (f"# \N{LINE SEPARATOR} is no line of TOML\n{MODEL}[run]\nsead = 1\n", 5, "run.sead", "seed"),
    ],
)
def test_an_unknown_key_is_named_with_its_line(
    text: str, where: int, key: str, suggestion: str | None
) -> None:
    message = refusal(text)
    assert message.startswith(f"run.toml:{where}: unknown key {key!r}; ")
    hint = message.partition("; ")[2]
    assert hint.startswith(f"did you mean {suggestion!r}?" if suggestion else "known here: ")


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (f'{MODEL}[run]\nseed = "many"\n', "run.toml:4: run.seed = 'many': "),
        (f"{MODEL}[run]\nfleet = 3\n", "run.toml:4: run.fleet = 3: "),
        (f'{MODEL}[run]\nfleet = "My Fleet"\n', "run.toml:4: run.fleet = 'My Fleet': "),
        (f"{MODEL}[training]\nepochs = 2\nmomentum = 1.0\n", "run.toml:5: training.momentum = 1.0: "),
        (f"{MODEL}[training]\nlearning_rate = nan\n", "run.toml:4: training.learning_rate = nan: "),
        (f"{MODEL}[fleet]\nalpha = inf\n", "run.toml:4: fleet.alpha = inf: "),
        (f"{MODEL}[rounds]\n\n\ndevices = 0\n", "run.toml:6: rounds.devices = 0: "),
        (f'{MODEL}[fleet]\nsplit = "shards"\n', "run.toml:4: fleet.split = 'shards': "),
        (f"{MODEL}[fleet]\nmemory = []\n", "run.toml:4: fleet.memory = []: "),
        ("[model]\nname = 'a'\nblocks = 0\n", "run.toml:3: model.blocks = 0: "),
        ("[model]\nname = 'a'\nblocks = [1]\n", "run.toml:3: model.blocks = "),
        (f"{MODEL}output_module = 'pooled'\n", "run.toml:3: model.output_module = 'pooled': "),
        (f"{MODEL}output_module = 1\n", "run.toml:3: model.output_module = 1: "),
        (f'[run]\nfleet = "a"\n{MODEL}[[fleet]]\n', "run.toml:5: fleet = [{}]: "),
        (f"{MODEL}[selection]\nmethod = 'fair'\n", "run.toml:4: selection.method = 'fair': "),
        (f"{MODEL}[selection]\nexploration = 1.1\n", "run.toml:4: selection.exploration = 1.1: "),
        (f"{MODEL}[selection]\nexploration_decay = 0\n", "run.toml:4: selection.exploration_decay = 0: "),
        (f"{MODEL}[selection]\nseparation = -1\n", "run.toml:4: selection.separation = -1: "),
        (f"{MODEL}[selection]\nsurplus = 0.9\n", "run.toml:4: selection.surplus = 0.9: "),
        (f"{MODEL}[selection]\ndeadline_factor = -1\n", "run.toml:4: selection.deadline_factor = -1: "),
        (f"{MODEL}[simulation]\nspeed = [0.5]\n", "run.toml:4: simulation.speed = [0.5]: "),
        (f"{MODEL}[simulation]\nspeed = [0, 1]\n", "run.toml:4: simulation.speed = 0: "),
        (f"{MODEL}[simulation]\nbandwidth = ['1 MB']\n", "run.toml:4: simulation.bandwidth = ['1 MB']: "),
        (f"{MODEL}[simulation]\ndropout = 1\n", "run.toml:4: simulation.dropout = 1: "),
        (f"{MODEL}[simulation]\naway_seconds = 0\n", "run.toml:4: simulation.away_seconds = 0: "),
        (f"{MODEL}widths = [1.0, 0]\n", "run.toml:3: model.widths = 0: "),
        (f"{MODEL}[run]\nseed = 0x{'f' * 9000}\n", "run.toml:4: run.seed = a very long number: "),
    ],
)
def test_a_wrong_value_is_named_with_its_line(text: str, start: str) -> None:
    message = refusal(text)
    assert message.startswith(start)
    assert len(message) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.toml: 'model' is missing"),
        ("[run]\n\n[model]\nblocks = 2\n", "run.toml:3: 'model.name' is missing"),
    ],
)
def test_what_is_missing_is_named(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[model\nname = 3", "line 1"),
        ('[model]\nname = "a"\nname = "b"\n', "line 3"),
        ("[run]\nseed = \n", "line 2"),
        (f"seed = {'1' * 5000}", "too long"),
        (f"seed = {'[' * 5000}", "too deeply"),
    ],
)
def test_what_is_no_toml_is_refused(text: str, part: str) -> None:
    message = refusal(text)
    assert message.startswith("run.toml: ")
    assert part in message


@pytest.mark.parametrize("content", [None, b"\xff\xfe[model]"], ids=["missing", "not UTF-8"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read") as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path)


def files(folder: Path, **texts: str) -> Path:
    """Write TOML files; returns the first."""
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(texts))}.toml"


def extension_refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_file_changes_single_keys_of_the_one_it_extends(tmp_path: Path) -> None:
    path = files(
        tmp_path,
        top='extends = "middle.toml"\n[training]\nbatch = 4\n[model]\noptions = { width = 8 }\n',
        middle='extends = "base.toml"\n[training]\nbatch = 2\nepochs = 3\n[selection]\nmethod = "oort"\n',
        base=f'{MODEL}options = {{ width = 4, norm = "group" }}\n[training]\nepochs = 2\nmomentum = 0.5\n',
    )
    config, text = load_config(path, {"run": {"seed": 7}, "training": {"momentum": 0.25}})
    training = config.training
    assert (training.batch, training.epochs, training.momentum) == (4, 3, 0.25)
    assert (config.model.name, config.model.options) == ("resnet10", {"width": 8})
    assert (config.selection.method, config.run.seed) == ("oort", 7)
    assert parse_config(text, "config.toml") == config
    assert "extends" not in text
    assert load_config(path)[0].training.momentum == 0.5


def test_only_so_many_files_extend_each_other(tmp_path: Path) -> None:
    chain = {f"f{i}": f'# a comment\nextends = "f{i + 1}.toml"\n' for i in range(MOST_EXTENDED)}
    path = files(tmp_path, **chain, **{f"f{MOST_EXTENDED}": MODEL})
    assert load_config(path)[0].model.name == "resnet10"
    longer = files(tmp_path, first='extends = "f0.toml"\n')
    last = tmp_path / f"f{MOST_EXTENDED - 1}.toml"
    assert extension_refused(longer).startswith(f"{last}:2: extends = 'f{MOST_EXTENDED}.toml': ")
    itself = files(tmp_path, itself='\nextends = "itself.toml"\n')
    assert extension_refused(itself).startswith(f"{itself}:2: extends = 'itself.toml': ")


@pytest.mark.parametrize("value", ["3", "['base.toml']", "true"])
def test_what_is_extended_is_a_file_name(tmp_path: Path, value: str) -> None:
    path = files(tmp_path, run=f"extends = {value}\n{MODEL}")
    assert extension_refused(path).startswith(f"{path}:1: extends = ")


def test_a_file_that_cannot_be_extended_is_named(tmp_path: Path) -> None:
    path = files(tmp_path, run=f'extends = "absent.toml"\n{MODEL}', broken="[model\n")
    assert extension_refused(path).startswith(f"{tmp_path / 'absent.toml'}: cannot be read: ")
    path.write_text('extends = "broken.toml"\n')
    assert extension_refused(path).startswith(f"{tmp_path / 'broken.toml'}: not valid TOML: ")


def test_a_wrong_value_of_the_extending_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = files(tmp_path, run='extends = "base.toml"\n[rounds]\ndevices = 0\n', base=MODEL)
    assert extension_refused(path).startswith(f"{path}:3: rounds.devices = 0: ")


def test_a_wrong_value_of_the_extended_file_is_not_looked_for_in_the_other(tmp_path: Path) -> None:
    path = files(
        tmp_path,
        run='extends = "base.toml"\n[rounds]\nminimum_updates = 1\n',
        base=f"{MODEL}[rounds]\ndevices = 0\n",
    )
    assert extension_refused(path).startswith(f"{tmp_path / 'base.toml'}:4: rounds.devices = 0: ")


def test_a_name_that_is_no_path_is_refused(tmp_path: Path) -> None:
    extension_refused(files(tmp_path, run='extends = "a\\u0000b"\n'))


fragments = st.sampled_from(
    [
        "[model]",
        "[run]",
        "[[fleet]]",
        "\n",
        "=",
        ".",
        '"',
        "name",
        "seed",
        "1e999",
        "{",
        "}",
        "[",
        "]",
        " ",
        "0x",
    ]
)


@given(st.text() | st.lists(fragments | st.text(max_size=3), max_size=25).map("".join))
@example('"a\nb" = 1')
@example(r'"a\nb" = 1')
@example(r'[run]\n"\u2028" = 1')
@example("[run]\nfleet = '''a\nb'''\n[model]\nname='a'")
def test_any_text_is_a_configuration_or_one_line(text: str) -> None:
    try:
        parse_config(text, "run.toml")
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith("run.toml")
