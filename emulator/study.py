"""A study: several methods on the same simulated fleets, over several seeds, run once each and kept."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from frostline.device_runtime.worker import kill_workers, prepare_worker
from frostline.emulator.emulation import split_samples
from frostline.emulator.simulation import simulate
from frostline.protocol.errors import FrostlineError, RunError, UsageError
from frostline.protocol.messages import Name
from frostline.server.assembly import assemble, broker_address
from frostline.server.config import Document, load_config, merge, parse_toml, read_text
from frostline.server.coordinator import RunObserver


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StudyTable(_Table):
    """`[study]`: the seeds every run is repeated with, and what methods are compared by.

    Attributes
    ----------
    reference : str
        The method whose best accuracy the others are timed to.
    target_accuracy : float
        A fraction that all are timed to.
    """

    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    reference: Name
    target_accuracy: Annotated[float, Field(gt=0, lt=1)]

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("every seed but once")
        return seeds


class MethodTable(_Table):
    """`[methods.<name>]`: the TOML file of its runs, beside the study's, and keys to change in it, table by table.

    `settings` are those it is run in; all if it is left out.
    """

    run: str
    changes: dict[str, Document] = {}
    settings: list[Name] | None = None


class StudyConfig(_Table):
    """A study's TOML file; `settings` are keys to change in every method's file, table by table."""

    study: StudyTable
    settings: Annotated[dict[Name, dict[str, Document]], Field(min_length=1)]
    methods: Annotated[dict[Name, MethodTable], Field(min_length=1)]


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    setting: str
    method: str
    seed: int
    config: Path
    changes: Mapping[str, Document]
    folder: Path

    @property
    def name(self) -> str:
        """How people are told of it."""
        return f"{self.setting} {self.method}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it ended well."""
        return (self.folder / "summary.json").is_file()


@dataclass(frozen=True)
class Study:
    """All runs of a study, below a folder `out`."""

    config: StudyConfig
    out: Path
    runs: list[StudyRun]


def load_study(path: Path, out: Path, changes: Mapping[str, Document] | None = None) -> Study:
    """Read a study and every run's file.

    Parameters
    ----------
    changes : mapping, optional
        Keys to change in every run, by table.

    Raises
    ------
    UsageError
        Naming file and key of the first mistake.
    """
    try:
        config = StudyConfig.model_validate(parse_toml(read_text(path), str(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {where}: {first['msg']}") from None
    if config.study.reference not in config.methods:
        raise UsageError(f"{path}: study.reference = {config.study.reference!r} is none of the methods")
    for method, table in config.methods.items():
        for setting in table.settings or []:
            if setting not in config.settings:
                raise UsageError(f"{path}: methods.{method}.settings: {setting!r} is none of the settings")
    runs = []
    for setting, keys in config.settings.items():
        for seed in config.study.seeds:
            for method, table in config.methods.items():
                if table.settings is None or setting in table.settings:
                    every: Document = {}
                    for each in (table.changes, keys, changes or {}, {"run": {"seed": seed}}):
                        every = merge(every, each)
                    folder = out / setting / method / f"seed{seed}"
                    run = StudyRun(setting, method, seed, path.parent / table.run, every, folder)
                    load_config(run.config, run.changes)
                    runs.append(run)
    return Study(config, out, runs)


class StudyObserver:
    """Told how a study goes. Does nothing by itself."""

    def on_begin(self, waiting: int, done: int) -> None:
        """So many runs are left; `done` were there before."""

    def on_run(self, run: StudyRun, problem: str) -> None:
        """A run ended, well if `problem` is empty."""


def run_study(study: Study, workers: int, observer: StudyObserver) -> None:
    """Run what is not done yet, `workers` runs at a time; a run that fails is reported and the others go on.

    Raises
    ------
    RunError
        If a process died, as it does when memory runs out.
    """
    waiting = [run for run in study.runs if not run.done]
    observer.on_begin(len(waiting), len(study.runs) - len(waiting))
    if not waiting:
        return
    study.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=prepare_worker)
    try:
        futures = {pool.submit(_run, run, study.out): run for run in waiting}
        for future in as_completed(futures):
            observer.on_run(futures[future], future.result())
    except BrokenProcessPool:
        kill_workers(pool)
        raise RunError(
            "a process of the study died, as when memory runs out; begin it again with fewer --workers, finished runs stay"
        ) from None
    except BaseException:
        kill_workers(pool)
        raise
    pool.shutdown()


def _run(run: StudyRun, out: Path) -> str:
    """Run one from the start; returns what went wrong, or nothing."""
    import torch

    torch.set_num_threads(1)
    # What a killed study left behind cannot be gone on with: virtual devices forget.
    shutil.rmtree(run.folder, ignore_errors=True)
    try:
        config, text = load_config(run.config, run.changes)
        compiled = out / "compiled"
        address = broker_address(config)
        prepared = assemble(config, text, run.folder, address, RunObserver(), resume=False, compiled=compiled)
        simulate(prepared, split_samples(config), out / "profile.json")
    except FrostlineError as error:
        return str(error)
    return ""
