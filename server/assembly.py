"""Puts a server together from a run's configuration: the one place where its parts meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frostline.datasets.load import load_samples
from frostline.datasets.samples import Samples
from frostline.exporter.artifact import ExportOptions
from frostline.exporter.cutting import cut
from frostline.exporter.models.lookup import ModelSpec, build_model
from frostline.exporter.onnxruntime_training import check_installed, check_optimizer
from frostline.exporter.optimizer import build_optimizer
from frostline.exporter.targets import target_of
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.errors import UsageError
from frostline.server.config import RunConfig, parse_config
from frostline.server.coordinator import Coordinator, RunObserver
from frostline.server.ledger import Ledger, sqlite_url
from frostline.server.run_folder import RunFolder
from frostline.server.schedule import GrowingSchedule


@dataclass
class Run:
    """A run that is ready to start."""

    config: RunConfig
    config_text: str
    folder: RunFolder
    schedule: GrowingSchedule
    address: BrokerAddress
    observer: RunObserver = field(default_factory=RunObserver)

    def coordinator(self) -> Coordinator:
        """The server of this run. Call it inside a running event loop."""
        return Coordinator(
            self.config, self.config_text, self.folder, self.schedule, self.address, self.observer
        )


def assemble(
    config: RunConfig,
    config_text: str,
    out: Path,
    address: BrokerAddress,
    observer: RunObserver,
    *,
    resume: bool,
) -> Run:
    """Build the model, cut it and open the run's folder.

    Raises
    ------
    UsageError
        If the model, its blocks, the data or the folder do not fit; the folder is touched only when all else does.
    """
    test = load_samples(config.data.test, "test") if config.data.test else None
    spec = _model(config, test)
    parts = cut(spec.module, config.model.blocks, spec.example(2), spec.vocabulary)
    training = config.training
    optimizer = build_optimizer(
        training.optimizer,
        momentum=training.momentum,
        nesterov=training.nesterov,
        weight_decay=training.weight_decay,
        proximal=training.proximal,
        clip_norm=training.clip_norm,
    )
    if "onnxruntime-training" in training.engines:
        check_optimizer(optimizer)
        check_installed()
    target = target_of(training.engines[0])
    options = ExportOptions(batch=training.batch, classes=spec.classes, optimizer=optimizer, target=target)
    schedule = GrowingSchedule(
        spec,
        parts,
        options,
        config.run.seed,
        test,
        int8_prefix=training.prefix == "int8",
        output_module=config.model.output_module,
    )
    if resume:
        folder = _open_unfinished(out, config)
    else:
        folder = RunFolder.create(out)
        folder.write_config(config_text)
    return Run(config, config_text, folder, schedule, address, observer)


def _open_unfinished(out: Path, config: RunConfig) -> RunFolder:
    folder = RunFolder.open(out)
    began_with = parse_config(folder.config_path.read_text(encoding="utf-8"), str(folder.config_path))
    for table in RunConfig.model_fields:
        if table != "broker" and getattr(config, table) != getattr(began_with, table):
            raise UsageError(
                f"[{table}] differs from {folder.config_path}, which the run began with; resume it with that file"
            )
    ledger = Ledger(sqlite_url(folder.ledger_path))
    try:
        if ledger.finished():
            raise UsageError(f"the run in {out} is finished: its results are in {folder.report_path.name}")
    finally:
        ledger.close()
    return folder


def broker_address(config: RunConfig, url: str | None = None) -> BrokerAddress:
    """The broker of the configuration, or of `url` in its place."""
    table = config.broker
    return BrokerAddress.parse(url or table.url, table.ca_file, table.certificate_file, table.key_file)


def _model(config: RunConfig, test: Samples | None) -> ModelSpec:
    shape = tuple(config.model.input_shape) if config.model.input_shape else None
    classes = config.model.classes
    if test is not None:
        found = (test.x.shape[1:], test.classes)
        if (shape or found[0], classes or found[1]) != found:
            raise UsageError(
                f"model.input_shape and model.classes do not fit the samples of data.test = {config.data.test!r}, "
                f"which have shape {list(found[0])} and {found[1]} classes; leave them out"
            )
        shape, classes = found
    table = config.model
    spec = build_model(table.name, table.options, shape, classes, config.run.seed, table.vocabulary)
    if test is not None:
        _check_inputs(test, spec, config)
    return spec


def _check_inputs(test: Samples, spec: ModelSpec, config: RunConfig) -> None:
    source = f"the samples of data.test = {config.data.test!r}"
    if (test.x.dtype == np.int64) != (spec.vocabulary is not None):
        takes, given = ("numbers", "token ids") if spec.vocabulary is None else ("token ids", "numbers")
        raise UsageError(
            f"model {spec.name!r} takes {takes}, but {source} are {given}; change one of the two"
        )
    if spec.vocabulary is not None and test.x.size and int(test.x.max()) >= spec.vocabulary:
        raise UsageError(
            f"model {spec.name!r} has a vocabulary of {spec.vocabulary}, but {source} have token ids up to "
            f"{test.x.max()}; raise the vocabulary"
        )
