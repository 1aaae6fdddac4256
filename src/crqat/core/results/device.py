"""Description of the machine that measured, as results.json holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crqat.core.typed_json import OMIT


@dataclass(frozen=True)
class JetsonRun:
    """Readings of a Jetson during a measurement.

    Attributes:
        clocks_locked: Whether the clocks were locked at the end; None if no clock can be read.
        throttle_events: Increase of each throttling counter.
        max_temperatures_c: Highest temperature of each thermal zone, in degrees Celsius.
        max_power_mw: Highest power of each rail, in milliwatts.
        max_total_power_mw: Highest power of the module's input, in milliwatts; None if its rails are not known.
        looks: Number of readings.
        unstable: Why latencies measured between these readings are unreliable, such as throttling; else False.
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
    """Description of a Jetson board; a field is None if the board does not report it.

    Attributes:
        model: Name of the board.
        soc: Name of the chip.
        l4t: Release of L4T (NVIDIA's Linux for Tegra).
        jetpack: JetPack version that the L4T release belongs to.
        power_mode: Power mode, as nvpmodel names it.
        run: Readings during the measurement.
    """

    model: str | None
    soc: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    run: JetsonRun | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class LoadAverage:
    """Load averages of a machine over one minute; None if the system does not report them.

    Attributes:
        start: Load average before a measurement.
        end: Load average after it.
    """

    start: float | None
    end: float | None


@dataclass(frozen=True)
class Device:
    """Description of the machine that measured; a field is None if the system does not report it.

    Attributes:
        cpu: Model name of the CPU; on ARM, of the board.
        onnxruntime: Version of ONNX Runtime; None if it is not installed.
        architecture: Architecture of the CPU.
        cores: Number of cores of the machine.
        usable_cores: Number of cores that this process may use.
        flags: Whether the CPU has each instruction set that INT8 kernels are written for.
        governor: Frequency governor of the first core.
        frequency_mhz: Clock frequency of the first core, in MHz.
        memory_bytes: Memory of the machine, in bytes.
        cuda_device: Whether the machine has a CUDA device.
        os: Name and version of the operating system.
        python: Version of Python.
        numpy: Version of NumPy.
        jetson: Description of the Jetson board; None on other machines.
        load_average: Load averages before and after the measurement.
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
