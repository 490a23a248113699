"""Puts a server together from a run's configuration: the one place where its parts meet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from frostline.datasets.load import load_samples
from frostline.datasets.samples import Samples
from frostline.exporter.artifact import ExportOptions
from frostline.exporter.lowering_cache import LoweringCache, default_folder
from frostline.exporter.models.lookup import ModelSpec
from frostline.exporter.onnxruntime_training import check_installed, check_optimizer
from frostline.exporter.optimizer import build_optimizer
from frostline.exporter.targets import target_of
from frostline.protocol.blobs import BlobStore
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.errors import UsageError
from frostline.protocol.sizes import parse_share
from frostline.protocol.topics import Topics
from frostline.server.compilation import RemoteCompiler, StageCompiler, StageSource
from frostline.server.compiler_process import CompilerProcess
from frostline.server.config import DataTable, RunConfig, RunTable, parse_config
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
    process: CompilerProcess | None = None,
) -> Run:
    """Build the model, cut it and open the run's folder.

    Parameters
    ----------
    compiled : Path or None
        A folder for compiled programs, which runs may share.
    process : CompilerProcess or None
        Where stages are compiled, so that rounds go on meanwhile; it ends with the run. In this process if None, as is
        right in simulated time.

    Raises
    ------
    UsageError
        If the model, its blocks, the data or the folder do not fit; the folder is touched only when all else does.
    """
    if config.training.memory_limit is not None:
        parse_share(config.training.memory_limit, 0, "training.memory_limit")
    test = load_test_samples(config)
    source = _source(config, test)
    spec = _model(source, test, config.data)
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
    options = ExportOptions(
        batch=training.batch,
        classes=spec.classes,
        optimizer=optimizer,
        target=target_of(training.engines[0]),
        cache=LoweringCache(compiled) if compiled else None,
    )
    compiler = RemoteCompiler(process, source, options) if process else None
    if compiler is not None and not resume:
        # Goes on while this process cuts the same model.
        compiler.begin(0, training.engines[0])
    full = _growing(config, source, spec, options, test, compiler)
    schedule = _scaled(config, source, full, spec, options, process) if config.model.widths else full
    if resume:
        folder = _open_unfinished(out, config)
        folder.lock()
    else:
        _check_unused(config)
        folder = RunFolder.create(out)
        folder.lock()
        folder.write_config(config_text)
    return Run(config, config_text, folder, schedule, address, observer)


def cache_folder(config: RunConfig, option: Path | None = None, *, unused: bool = False) -> Path | None:
    """Where a run keeps compiled programs: what the command line says, else the configuration, else the user's cache.

    Returns
    -------
    Path or None
        None if it keeps none: as asked for, or because the user has no cache that can be written.
    """
    if unused or (option is None and config.run.cache == ""):
        return None
    if option is not None or config.run.cache is not None:
        return option or Path(config.run.cache or "")
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def load_test_samples(config: RunConfig) -> Samples | None:
    """The server's held-out samples; None if the run has none."""
    table = config.data
    if table.test is None:
        return None
    return load_samples(table.test, "test").some(table.test_samples, config.run.seed)


def _scaled(
    config: RunConfig,
    source: StageSource,
    full: GrowingSchedule,
    spec: ModelSpec,
    options: ExportOptions,
    process: CompilerProcess | None,
) -> WidthSchedule:
    """The model in every width, each a part of the full one."""
    table = config.model
    if table.blocks != 1 or max(table.widths) != 1:
        raise UsageError(
            "model.widths needs blocks = 1 and 1.0 among the widths: every device trains a whole model"
        )
    scaled = []
    for width in sorted(set(table.widths), reverse=True)[1:]:
        channels = _scaled_width(spec, table.options, width)
        narrow = table.model_copy(update={"options": {**table.options, "width": channels}})
        narrower = replace(source, model=narrow)
        compiler = RemoteCompiler(process, narrower, options) if process else None
        scaled.append((width, _growing(config, narrower, narrower.build(), options, None, compiler)))
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
    config: RunConfig,
    source: StageSource,
    spec: ModelSpec,
    options: ExportOptions,
    test: Samples | None,
    compiler: StageCompiler | None,
) -> GrowingSchedule:
    return GrowingSchedule(
        spec,
        source.cut(spec),
        options,
        config.run.seed,
        test,
        int8_prefix=config.training.prefix == "int8",
        output_module=source.model.output_module,
        compiler=compiler,
        engines=config.training.engines,
    )


def _open_unfinished(out: Path, config: RunConfig) -> RunFolder:
    folder = RunFolder.open(out)
    began_with = parse_config(folder.config_path.read_text(encoding="utf-8"), str(folder.config_path))
    for table in RunConfig.model_fields:
        if table != "broker" and _lasting(config, table) != _lasting(began_with, table):
            raise UsageError(
                f"[{table}] differs from {folder.config_path}, which the run began with; resume it with that file"
            )
    with closing(open_ledger(config.ledger.url, folder.ledger_path)) as ledger:
        if ledger.finished():
            raise UsageError(f"the run in {out} is finished: its results are in {folder.report_path.name}")
    return folder


def _lasting(config: RunConfig, table: str) -> object:
    """A table without what may change while a run lasts: where compiled programs are kept changes nothing else."""
    value = getattr(config, table)
    return value.model_copy(update={"cache": None}) if isinstance(value, RunTable) else value


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


def _source(config: RunConfig, test: Samples | None) -> StageSource:
    table = config.model
    shape = tuple(table.input_shape) if table.input_shape else None
    classes = table.classes
    if test is not None:
        found = (test.x.shape[1:], test.classes)
        if (shape or found[0], classes or found[1]) != found:
            raise UsageError(
                f"model.input_shape and model.classes do not fit the samples of data.test = {config.data.test!r}, "
                f"which have shape {list(found[0])} and {found[1]} classes; leave them out"
            )
        shape, classes = found
    return StageSource(table, shape, classes, config.run.seed)


def _model(source: StageSource, test: Samples | None, data: DataTable) -> ModelSpec:
    spec = source.build()
    if test is not None:
        _check_inputs(test, spec, data)
    return spec


def _check_inputs(test: Samples, spec: ModelSpec, data: DataTable) -> None:
    source = f"the samples of data.test = {data.test!r}"
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
