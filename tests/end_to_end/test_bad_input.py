"""What a user gets wrong: one clear line, the right exit code, nothing left half-written."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from frostline.emulator.broker import EmbeddedBroker
from tests.end_to_end.conftest import run_command, write_config


def check(
    arguments: list[str | Path],
    exit_code: int,
    mentions: list[str],
    absent: Path | None = None,
    timeout: float = 120,
) -> None:
    """Run the command; it must say one line with all of `mentions`."""
    result = run_command(*arguments, timeout=timeout)
    message = [line for line in result.stderr.splitlines() if line.startswith("frostline: ")]
    assert result.returncode == exit_code, result.stderr
    assert len(message) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    for text in mentions:
        assert text in message[0], message[0]
    assert absent is None or not absent.exists()


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--model", "resnet81"], ["resnet81", "resnet18"]),
        (["--model", "nowhere.to:be_found", "--input-shape", "1,8,8", "--classes", "10"], ["nowhere"]),
        (["--model", "small_cnn", "--blocks", "block1,layer9"], ["layer9", "block3"]),
        (["--model", "small_cnn", "--blocks", "99"], ["99"]),
        (["--model", "small_cnn", "-O", "widht=8"], ["widht", "width"]),
        (["--model", "small_cnn", "-O", "width"], ["name=value"]),
        (["--model", "small_cnn", "--input-shape", "1,x"], ["--input-shape", "3,32,32"]),
        (["--model", "small_cnn", "--optimizer", "adam"], ["adam", "adamw"]),
        (["--model", "small_cnn", "--nesterov", "--momentum", "0"], ["nesterov", "momentum"]),
        (["--model", "small_cnn", "--memory-budget", "some"], ["--memory-budget", "64MB"]),
        (["--model", "small_cnn", "--prefix", "int4"], ["--prefix", "int4", "int8"]),
        (["--model", "small_cnn", "--output-module", "pooled"], ["--output-module", "pooled", "linear"]),
        (["--model", "small_cnn", "--engine", "tensorflow"], ["tensorflow", "onnxruntime"]),
        (
            ["--model", "small_cnn", "-O", "width=8", "--batch", "2", "--memory-budget", "30kB"],
            ["does not fit 30", "which comes closest", "--memory-budget"],
        ),
    ],
)
def test_export(tmp_path: Path, arguments: list[str], mentions: list[str]) -> None:
    out = tmp_path / "out"
    check(["export", *arguments, "--out", out], 2, mentions, absent=out)


MODELS = """
import torch
from torch import nn


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def chain(function, classes=2):
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Apply(function))
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    return nn.Sequential(convolution, nn.Conv2d(4, 4, 1), *pooled)


def unlowerable():
    return chain(torch.erfinv)


def data_dependent():
    return chain(lambda x: x * x[x > 0].mean())


def complex_numbers():
    return chain(lambda x: torch.fft.fft2(x).abs())


def tied():
    model = chain(torch.relu)
    model[0][0] = nn.Conv2d(1, 4, 1)
    model[1] = nn.Sequential(nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 1))
    model[1][1].weight = model[0][0].weight
    return model


def tokens():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(256, 2))
"""


@pytest.mark.parametrize(
    ("factory", "blocks", "exit_code", "mentions"),
    [
        (
            "unlowerable",
            "0,1",
            1,
            ["stage '0' cannot be compiled: aten.erfinv of shape [2, 4, 8, 8] in module '0.1'"],
        ),
        ("data_dependent", "0,1", 2, ["aten.index of shape [3, 4, 8, 8] in module '0.1'", "torch.where"]),
        ("complex_numbers", "0,1", 2, ["in module '0.1' returns complex64"]),
        ("tied", "0,1", 2, ["'0.0.weight' (also named '1.1.weight') is used by block '0' and by block '1'"]),
        ("tokens", "1", 2, ["[3, 1, 8, 8], float32", "give its vocabulary, if it takes token ids"]),
    ],
)
def test_export_of_a_model_that_cannot_be_trained_in_blocks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factory: str,
    blocks: str,
    exit_code: int,
    mentions: list[str],
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    arguments = ["export", "--model", f"models:{factory}", "--blocks", blocks, "--out", out]
    arguments += ["--input-shape", "1,8,8", "--classes", "2", "--batch", "2"]
    check(arguments, exit_code, mentions, absent=out)


def test_export_into_a_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    check(["export", "--model", "small_cnn", "--out", tmp_path], 2, ["not an empty folder"])
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "mentions"),
    [
        (
            "learning_rate",
            "learning_rat",
            ["run.toml:LINE: ", "training.learning_rat", "did you mean 'learning_rate'"],
        ),
        ("[pace]", "[pase]", ["run.toml:LINE: ", "pase", "did you mean 'pace'"]),
        ("epochs = 2", 'epochs = "two"', ["run.toml:LINE: ", "training.epochs", "two"]),
        ("epochs = 2", "epochs = ", ["not valid TOML", "line LINE"]),
        ('"small_cnn"', '"tiny_cnn"', ["tiny_cnn", "small_cnn"]),
        ('test = "digits"', 'test = "digit"', ["digit", "digits"]),
        ('"70%"', '"lots"', ["fleet.memory", "lots"]),
        ('train = "digits"', "", ["data.train"]),
        ("epochs = 2", 'engines = ["tensorflow"]', ["run.toml:LINE: ", "training.engines"]),
        ("blocks = 2", 'output_module = "x"', ["run.toml:LINE: ", "model.output_module", "'linear'"]),
        ("epochs = 2", 'engines = ["onnxruntime-training"]', ["without momentum", "'onnxruntime'"]),
        ('["100%", "70%"]', '["100%"]\nengines = ["onnxruntime-training"]', ["not installed on this device"]),
        ("join_seconds = 60", "minimum_updates = 9", ["minimum_updates = 9", "devices = 3"]),
    ],
)
def test_configuration(tmp_path: Path, old: str, new: str, mentions: list[str]) -> None:
    config = write_config(tmp_path)
    text = config.read_text()
    line = str(text[: text.index(old)].count("\n") + 1)
    config.write_text(text.replace(old, new, 1))
    mentions = [text.replace("LINE", line) for text in mentions]
    check(["emulate", "--config", config, "--out", tmp_path / "run"], 2, mentions, absent=tmp_path / "run")


def test_a_corrupted_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["-O", "width=4", "-O", "input_size=8", "-O", "channels=1", "--blocks", "1", "--batch", "2"]
    assert run_command("export", "--model", "small_cnn", *options, "--out", out).returncode == 0
    intact = run_command("inspect", out / "stage-1", "--json")
    assert intact.returncode == 0, intact.stderr
    manifest = json.loads(intact.stdout)
    assert manifest["planned_bytes"] == sum(manifest["planned"].values())

    program = out / "stage-1" / "files" / manifest["training"]["file"]["sha256"]
    content = bytearray(program.read_bytes())
    content[100] ^= 1
    program.write_bytes(content)
    check(["inspect", out / "stage-1"], 1, [program.name, "does not match its hash"])
    (out / "stage-1" / "manifest.json").write_text("{}")
    check(["inspect", out / "stage-1"], 1, ["manifest.json", "not a stage manifest"])
    check(["inspect", tmp_path], 2, ["no artifact here"])


def test_a_missing_configuration(tmp_path: Path) -> None:
    check(["serve", "--config", tmp_path / "none.toml"], 2, ["none.toml"])


def test_a_run_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    check(["serve", "--config", write_config(tmp_path), "--out", tmp_path / "run"], 2, ["not empty"])


@pytest.mark.parametrize("kind", ["serve", "device"])
def test_an_unreachable_broker(tmp_path: Path, kind: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"mqtt://127.0.0.1:{unused.getsockname()[1]}"
    if kind == "serve":
        out = tmp_path / "run"
        arguments: list[str | Path] = [
            "serve",
            "--config",
            write_config(tmp_path),
            "--out",
            out,
            "--broker",
            url,
        ]
    else:
        arguments = [
            "device",
            "--broker",
            url,
            "--data",
            "digits",
            "--id",
            "a",
            "--state",
            tmp_path / "state",
        ]
    check(arguments, 1, [url, "refused"])


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (("--broker", "http://there"), ["http://there", "mqtt://"]),
        (("--id", "../../etc"), ["../../etc", "letters"]),
        (("--memory", "plenty"), ["--memory", "plenty"]),
        (("--data", "nothing-here"), ["nothing-here"]),
        (("--engine", "tensorflow"), ["tensorflow", "executorch, onnxruntime, onnxruntime-training"]),
        (("--engine", "onnxruntime-training"), ["not installed", "pip uninstall onnxruntime"]),
        (("--data", "EMPTY"), ["safetensors"]),
        (("--ca-file", __file__), [__file__, "PEM"]),
    ],
)
def test_device(tmp_path: Path, change: tuple[str, str], mentions: list[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    options = {
        "--broker": "mqtt://127.0.0.1:1",
        "--data": "digits",
        "--id": "a",
        "--state": str(tmp_path / "s"),
    }
    options[change[0]] = change[1].replace("EMPTY", str(empty))
    if change[0] == "--ca-file":
        options["--broker"] = "mqtts://127.0.0.1:1"
    arguments = ["device", *(part for pair in options.items() for part in pair)]
    check(list(arguments), 2, mentions, absent=tmp_path / "s")


def test_a_fleet_whose_memory_fits_nothing(tmp_path: Path, broker: EmbeddedBroker) -> None:
    config = write_config(tmp_path)
    text = (
        config.read_text()
        .replace('["100%", "70%"]', '["10 kB", "20 kB"]')
        .replace("join_seconds = 60", "join_seconds = 3")
    )
    config.write_text(text)
    arguments: list[str | Path] = [
        "emulate",
        "--config",
        config,
        "--out",
        tmp_path / "run",
        "--broker",
        broker.url,
    ]
    check(arguments, 1, ["can be trained with", "the largest budget is 20000 bytes", "more blocks"])


def test_a_broker_port_in_use(tmp_path: Path, broker: EmbeddedBroker) -> None:
    port = broker.url.rsplit(":", 1)[1]
    config = write_config(tmp_path)
    arguments: list[str | Path] = ["emulate", "--config", config, "--out", tmp_path / "run", "--port", port]
    check(arguments, 1, [port], absent=tmp_path / "run")
