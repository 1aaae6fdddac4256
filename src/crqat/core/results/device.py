"""The machine that measured, as results name it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crqat.core.typed_json import OMIT


@dataclass(frozen=True)
class JetsonRun:
    """What a Jetson said of itself while it was measured.

    Attributes:
        clocks_locked: At the end; None if no clock can be read.
        throttle_events: By how much each counter rose.
        max_temperatures_c: The highest of each zone, degrees Celsius.
        max_power_mw: The highest of each rail, milliwatts.
        max_total_power_mw: The highest of the module's input; None if its rails are not known.
        looks: How often it was asked.
        unstable: Why a latency measured meanwhile is not to be trusted, or False.
    """

    clocks_locked: bool | None
    throttle_events: dict[str, int]
    max_temperatures_c: dict[str, float]
    max_power_mw: dict[str, float]
    max_total_power_mw: float | None
    looks: int
    unstable: Literal[False] | str


@dataclass(frozen=True)
class Jetson:
    """A Jetson board; None is what it does not tell.

    Attributes:
        model: The board's name.
        soc: Its chip.
        l4t: The L4T release.
        jetpack: The JetPack that the release belongs to.
        power_mode: As nvpmodel names it.
        run: What was seen during the measurement.
    """

    model: str | None
    soc: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    run: JetsonRun | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class LoadAverage:
    """Processes that wanted to run over the last minute, before and after the measurement."""

    start: float | None
    end: float | None


@dataclass(frozen=True)
class Device:
    """The machine that measured; None is what the system does not tell.

    Attributes:
        cpu: Its model name; on ARM the board's.
        onnxruntime: The version; None if it is not installed.
        architecture: Of the CPU.
        cores: Of the machine.
        usable_cores: By this process.
        flags: Whether the CPU has each instruction set that INT8 kernels are written for.
        governor: Of the first core's clock.
        frequency_mhz: Of the first core.
        memory_bytes: Of the machine.
        cuda_device: Whether there is one.
        os: Name and version.
        python: Version.
        numpy: Version.
        jetson: Of a Jetson alone.
        load_average: Before and after.
    """

    cpu: str
    onnxruntime: str | None
    architecture: str | None = None
    cores: int | None = None
    usable_cores: int | None = None
    flags: dict[str, bool] | None = None
    governor: str | None = None
    frequency_mhz: float | None = None
    memory_bytes: int | None = None
    cuda_device: bool | None = None
    os: str | None = None
    python: str | None = None
    numpy: str | None = None
    jetson: Jetson | None = None
    load_average: LoadAverage | None = None
