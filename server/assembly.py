"""Puts a server together from a run's configuration: the one place where its parts meet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from frostline.datasets.load import load_samples
from frostline.datasets.samples import Samples
from frostline.exporter.artifact import ExportOptions
from frostline.exporter.cutting import cut
from frostline.exporter.lowering_cache import LoweringCache
from frostline.exporter.models.lookup import ModelSpec, build_model
from frostline.exporter.onnxruntime_training import check_installed, check_optimizer
from frostline.exporter.optimizer import build_optimizer
from frostline.exporter.targets import target_of
from frostline.protocol.blobs import BlobStore
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.errors import UsageError
from frostline.protocol.sizes import parse_share
from frostline.protocol.topics import Topics
from frostline.server.config import RunConfig, parse_config
from frostline.server.coordinator import Coordinator, RunObserver
from frostline.server.fleet import Fleet
from frostline.server.gateway import Gateway
from frostline.server.ledger import Ledger, open_ledger, postgresql_url
from frostline.server.run_folder import RunFolder
from frostline.server.schedule import GrowingSchedule, Schedule
from frostline.server.width_scaling import WidthSchedule


@dataclass
class Run:
    """A run that is ready to start."""

    config: RunConfig
    config_text: str
    folder: RunFolder
    schedule: Schedule
    address: BrokerAddress
    observer: RunObserver = field(default_factory=RunObserver)

    def coordinator(self, fleet: Fleet | None = None) -> Coordinator:
        """The server of this run, for the fleet behind its broker or another. Call it inside a running event loop."""
        if fleet is None:
            updates = BlobStore(self.folder.updates_dir)
            chunk_size = self.config.broker.chunk_size
            fleet = Gateway(self.address, Topics(self.config.run.fleet), chunk_size, updates)
        ledger = open_ledger(self.config.ledger.url, self.folder.ledger_path)
        return Coordinator(
            self.config, self.config_text, self.folder, ledger, self.schedule, fleet, self.observer
        )


def assemble(
    config: RunConfig,
    config_text: str,
    out: Path,
    address: BrokerAddress,
    observer: RunObserver,
    *,
    resume: bool,
    compiled: Path | None = None,
) -> Run:
    """Build the model, cut it and open the run's folder.

    Parameters
    ----------
    compiled : Path or None
        A folder for compiled programs, which runs may share.

    Raises
    ------
    UsageError
        If the model, its blocks, the data or the folder do not fit; the folder is touched only when all else does.
    """
    if config.training.memory_limit is not None:
        parse_share(config.training.memory_limit, 0, "training.memory_limit")
    test = load_test_samples(config)
    spec = _model(config, test)
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
    options = ExportOptions(
        batch=training.batch,
        classes=spec.classes,
        optimizer=optimizer,
        target=target,
        cache=LoweringCache(compiled) if compiled else None,
    )
    schedule = _schedule(config, spec, options, test)
    if resume:
        folder = _open_unfinished(out, config)
        folder.lock()
    else:
        _check_unused(config)
        folder = RunFolder.create(out)
        folder.lock()
        folder.write_config(config_text)
    return Run(config, config_text, folder, schedule, address, observer)


def load_test_samples(config: RunConfig) -> Samples | None:
    """The server's held-out samples; None if the run has none."""
    table = config.data
    if table.test is None:
        return None
    return load_samples(table.test, "test").some(table.test_samples, config.run.seed)


def _schedule(config: RunConfig, spec: ModelSpec, options: ExportOptions, test: Samples | None) -> Schedule:
    full = _growing(config, spec, options, test)
    if not config.model.widths:
        return full
    table = config.model
    if table.blocks != 1 or max(table.widths) != 1:
        raise UsageError(
            "model.widths needs blocks = 1 and 1.0 among the widths: every device trains a whole model"
        )
    scaled = []
    for width in sorted(set(table.widths), reverse=True)[1:]:
        channels = _scaled_width(spec, table.options, width)
        narrow = table.model_copy(update={"options": {**table.options, "width": channels}})
        narrower = _model(config.model_copy(update={"model": narrow}), test)
        scaled.append((width, _growing(config, narrower, options, None)))
    return WidthSchedule([(1.0, full), *scaled])


def _scaled_width(spec: ModelSpec, options: Mapping[str, Any], width: float) -> int:
    """The model's option `width`, scaled.

    Raises
    ------
    UsageError
        If the run does not give it, or it scales to less than one channel.
    """
    full = options.get("width")
    if not isinstance(full, int):
        raise UsageError(
            f"model.widths: give model {spec.name!r} its full width, such as options = {{ width = 16 }}"
        )
    scaled = round(full * width)
    if scaled < 1:
        raise UsageError(f"model.widths: {width:g} of width {full} leaves no channel; use wider models")
    return scaled


def _growing(
    config: RunConfig, spec: ModelSpec, options: ExportOptions, test: Samples | None
) -> GrowingSchedule:
    parts = cut(spec.module, config.model.blocks, spec.example(2), spec.vocabulary, spec.classes)
    int8 = config.training.prefix == "int8"
    return GrowingSchedule(
        spec,
        parts,
        options,
        config.run.seed,
        test,
        int8_prefix=int8,
        output_module=config.model.output_module,
    )


def _open_unfinished(out: Path, config: RunConfig) -> RunFolder:
    folder = RunFolder.open(out)
    began_with = parse_config(folder.config_path.read_text(encoding="utf-8"), str(folder.config_path))
    for table in RunConfig.model_fields:
        if table != "broker" and getattr(config, table) != getattr(began_with, table):
            raise UsageError(
                f"[{table}] differs from {folder.config_path}, which the run began with; resume it with that file"
            )
    with closing(open_ledger(config.ledger.url, folder.ledger_path)) as ledger:
        if ledger.finished():
            raise UsageError(f"the run in {out} is finished: its results are in {folder.report_path.name}")
    return folder


def _check_unused(config: RunConfig) -> None:
    """A database holds one run; a new one must not go on with another's."""
    if config.ledger.url:
        with closing(Ledger(postgresql_url(config.ledger.url))) as ledger:
            if ledger.holds_run():
                raise UsageError(
                    f"ledger.url = {config.ledger.url!r}: the database holds a run; go on with it by --resume, or give "
                    "this one a database of its own"
                )


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
