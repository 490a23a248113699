"""What a run writes down about itself: one record a round, one a stage, one for the whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

AccuracySource = Literal["server", "devices", "none"]
FrozenBy = Literal["pace", "round_cap"]


class _Record(BaseModel):
    # A diverged loss is NaN or infinite, which JSON can only carry as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class RoundRecord(_Record):
    """How one round went.

    Attributes
    ----------
    stage : int
        The stage trained, counted from 0.
    stage_name : str
        Its name.
    stages : int
        How many stages the schedule has.
    round : int
        The round, counted from 0 over the whole run.
    round_in_stage : int
        The round, counted from 0 within the stage.
    loss : float
        Mean training loss per sample over the updates that were counted.
    accuracy : float or None
        Fraction of held-out samples classified correctly after the round; None when it was not measured.
    accuracy_source : {"server", "devices", "none"}
        Who measured the accuracy.
    effective_movement : float or None
        Distance the block's weights covered over the window, as a fraction of the path they took; None before the
        window is full.
    movement_slope : float or None
        Slope of the effective movement, per round; None before there are enough points.
    speed : float or None
        Length of the block's last step over that of the stage's longest; None before the second round.
    frozen : bool
        Whether the block was frozen after this round.
    devices_selected : int
        Devices that were asked to train.
    devices_finished : int
        Devices whose update was counted.
    samples : int
        Training samples behind the counted updates.
    bytes_down : int
        Bytes sent to devices in the round.
    bytes_up : int
        Bytes received from devices in the round.
    planned_bytes : int
        Bytes of memory that the fastest form of the stage takes on a device.
    served_bytes : int
        The same of the forms that the round's devices trained, their mean.
    variants : dict of str to int
        How many of the devices trained which variant of the stage.
    seconds : float
        Wall-clock duration of the round.
    """

    stage: Count
    stage_name: str
    stages: Count
    round: Count
    round_in_stage: Count
    loss: float
    accuracy: Fraction | None
    accuracy_source: AccuracySource
    effective_movement: float | None
    movement_slope: float | None
    speed: float | None
    frozen: bool
    devices_selected: Count
    devices_finished: Count
    samples: Count
    bytes_down: Count
    bytes_up: Count
    planned_bytes: Count
    served_bytes: Count = 0
    variants: dict[str, Count]
    engines: dict[str, Count]
    seconds: float


class StageRecord(_Record):
    """One stage of a finished run.

    Attributes
    ----------
    stage : int
        The stage, counted from 0.
    name : str
        Its name.
    planned_bytes : int
        Bytes of memory that the fastest form of the stage on offer takes on a device.
    memory : dict of str to int
        The same bytes by kind, such as "arena", "parameters" or "optimizer_state".
    rounds : int
        Rounds spent on the stage.
    frozen_by : {"pace", "round_cap"}
        What ended the stage: the pace controller, or the configured limit on rounds.
    reopened : bool
        Whether the block was frozen, found to cost accuracy, and trained once more.
    int8_accuracy_change : float or None
        What the frozen block in int8, as devices run it, changes of the stage's accuracy; None if it is not in int8, or
        without held-out samples on the server.
    """

    stage: Count
    name: str
    planned_bytes: Count
    memory: dict[str, Count]
    rounds: Count
    frozen_by: FrozenBy
    reopened: bool = False
    int8_accuracy_change: float | None = None


class RunSummary(_Record):
    """A finished run.

    Attributes
    ----------
    run : str
        Name of the run.
    accuracy : float or None
        Fraction of held-out samples the final model classifies correctly; None when it was not measured.
    rounds : int
        Rounds over all stages.
    blocks_frozen : int
        Blocks that the pace controller froze; the others met the cap on rounds.
    blocks : int
        Blocks of the model.
    peak_planned_bytes : int
        Bytes of memory that the largest stage takes on a device.
    full_model_planned_bytes : int
        About the bytes of memory that training the whole model at once would take on a device: estimated, within about a
        tenth; 0 if it cannot be.
    bytes_down : int
        Bytes sent to devices.
    bytes_up : int
        Bytes received from devices.
    seconds : float
        Wall-clock duration of the run.
    stages : list of StageRecord
        The stages, in the order they were trained.
    """

    run: str
    accuracy: Fraction | None
    rounds: Count
    blocks_frozen: Count
    blocks: Count
    peak_planned_bytes: Count
    full_model_planned_bytes: Count
    bytes_down: Count
    bytes_up: Count
    seconds: float
    stages: list[StageRecord]


class DeviceChoice(_Record):
    """Where one device stood when a round was planned, and why.

    Attributes
    ----------
    chosen : bool
        Whether its place was among those asked at once; later places are asked as others fail.
    place : int or None
        Its place in the order, from 0; None if it cannot train the stage.
    reason : str
        Why it stands there, or why it cannot.
    community, utility, speed_factor, score
        As `frostline.server.selection.Ranked` has them.
    memory_bytes, planned_bytes : int
        Its budget, and what the form it would be served takes.
    variant : str
        That form.
    predicted_seconds : float or None
        How long it was expected to take.
    """

    device: str
    reason: str
    chosen: bool = False
    place: Count | None = None
    community: Count | None = None
    utility: float | None = None
    speed_factor: float | None = None
    score: float | None = None
    memory_bytes: Count = 0
    planned_bytes: Count | None = None
    variant: str = ""
    predicted_seconds: float | None = None


class SelectionRecord(_Record):
    """How a round's devices were chosen.

    Attributes
    ----------
    devices_wanted, surplus : int
        Updates that end the round, and leases given out beyond that.
    dropout : float
        Share of the latest leases that were taken and not kept.
    deadline_seconds : float
        A lease's deadline.
    devices : list of DeviceChoice
        Every device known, in the order of asking; those that cannot train the stage last.
    """

    round: Count
    stage: Count
    stage_name: str
    method: str
    devices_wanted: Count
    surplus: Count
    dropout: Fraction
    deadline_seconds: float
    devices: list[DeviceChoice]
