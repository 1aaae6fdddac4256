"""Reads the state of a Jetson from files, `nvpmodel -q` and tegrastats. It changes nothing and needs no root.

Every path is looked up below `root`, which only tests set to another directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from crqat.core.results.device import Jetson, JetsonRun

_Number = TypeVar("_Number", int, float)
ROOT = Path("/")
TOOL_SECONDS = 10.0
TEGRASTATS_SECONDS = 1.5
# JetPack by L4T release, the longest prefix first. Other releases are named by their L4T alone.
JETPACK = {
    "32.7": "4.6",
    "35.1": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "35.6.3": "5.1.5",
    "35.6.4": "5.1.6",
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.0": "7.2",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
# A sensor whose block is powered off reads -256 degrees.
_POWERED_OFF = -200.0
# Power of the module input; on boards without it (AGX Orin), the sum of three rails that do not feed each other.
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
_SUMMED_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
# Thermal trips at which the kernel slows or stops the machine; "active" trips only switch a fan.
_THROTTLING_TRIPS = ("passive", "hot", "critical")
_GPU_CLOCKS = ("*.gpu", "*.gv11b", "*.ga10b", "gpu-gpc-0")


def parse_release(text: str) -> str | None:
    """Return the L4T release, such as "36.4.4", from the text of /etc/nv_tegra_release; None if it has none."""
    match = re.search(r"R(\d+).*REVISION:\s*(\d+(?:\.\d+)*)", text)
    return f"{match[1]}.{match[2]}" if match else None


def jetpack(release: str) -> str | None:
    """Return the JetPack version that an L4T release such as "36.4.4" belongs to; None if it is not known."""
    parts = release.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((JETPACK[prefix] for prefix in prefixes if prefix in JETPACK), None)


def parse_power_mode(text: str) -> str | None:
    """Return the power mode's name from the output of `nvpmodel -q`; its number differs between boards."""
    match = re.search(r"^NV Power Mode:\s*(\S+)", text, re.MULTILINE)
    return match[1] if match else None


@dataclass(frozen=True)
class Tegrastats:
    """Values in a line of tegrastats; a value that the line does not report is empty or 0.

    Attributes:
        temperatures_c: Temperature in degrees Celsius by sensor.
        power_mw: Present power in milliwatts by rail.
        cpu_mhz: Clock frequency of each core that is on, in MHz.
        cpus_off: Number of cores that are off.
        gpu_mhz: Clock frequency of each GPC, in MHz.
    """

    temperatures_c: dict[str, float]
    power_mw: dict[str, float]
    cpu_mhz: list[int]
    cpus_off: int
    gpu_mhz: list[int]


@dataclass(frozen=True)
class State:
    """Clocks, temperatures, throttling and power of a Jetson at one moment.

    Attributes:
        clocks_locked: Whether the clocks are locked; None if no clock can be read.
        free_clocks: Names of the clocks that are not locked, with the range in which they may change.
        temperatures_c: Temperature in degrees Celsius by zone.
        over_trip: Thermal zones at or above a temperature (trip point) at which the machine is slowed down.
        throttle_events: Throttling events since boot, by counter.
        cooling: State of each cooling device except fans.
        power_mw: Power in milliwatts by rail.
        total_power_mw: Power of the module's input in milliwatts; None if its rails are not known.
    """

    clocks_locked: bool | None
    free_clocks: list[str]
    temperatures_c: dict[str, float]
    over_trip: list[str]
    throttle_events: dict[str, int]
    cooling: dict[str, int]
    power_mw: dict[str, float]
    total_power_mw: float | None


def parse_tegrastats(line: str) -> Tegrastats:
    """Parse temperatures, power and clocks in a line of tegrastats, of any JetPack from 4 on."""
    temperatures = {name: float(value) for name, value in re.findall(r"(\w+)@(-?\d+(?:\.\d+)?)C\b", line)}
    # Present/average, on JetPack 7 also /maximum; JetPack 4 has no unit, which separates power from "RAM 2850/7486MB".
    power = re.findall(r"\b([A-Z]\w*) (\d+)(?:mW)?/\d+(?:mW)?(?:/\d+(?:mW)?)?(?=\s|$)", line)
    cores = re.search(r"\bCPU \[([^\]]*)\]", line)
    gpu = re.search(r"\bGR3D_FREQ (?:\d+%)?@?\[?(\d+(?:,\d+)*)?\]?(?=\s|$)", line)
    return Tegrastats(
        temperatures_c={name: value for name, value in temperatures.items() if value > _POWERED_OFF},
        power_mw={name: float(value) for name, value in power if name != "NC"},
        cpu_mhz=[int(value) for value in re.findall(r"\d+%@(\d+)", cores[1])] if cores else [],
        cpus_off=cores[1].split(",").count("off") if cores else 0,
        gpu_mhz=[int(value) for value in gpu[1].split(",")] if gpu and gpu[1] else [],
    )


def total_power(power_mw: dict[str, float]) -> float | None:
    """Return the power that the Jetson module draws at its input, in mW; None if its rails are not known."""
    for rail in _INPUT_RAILS:
        if rail in power_mw:
            return power_mw[rail]
    if all(rail in power_mw for rail in _SUMMED_RAILS):
        return sum(power_mw[rail] for rail in _SUMMED_RAILS)
    return None


def describe(root: Path = ROOT) -> Jetson | None:
    """Return the model, software release and power mode of this board; None if the machine is not a Jetson."""
    text = _read(root / "etc/nv_tegra_release")
    compatible = (_read(root / "proc/device-tree/compatible") or "").split("\0")
    soc = next((name.removeprefix("nvidia,") for name in compatible if name.startswith("nvidia,tegra")), None)
    if text is None and soc is None:
        return None
    release = parse_release(text or "")
    return Jetson(
        model=_read(root / "proc/device-tree/model"),
        soc=soc,
        l4t=release,
        jetpack=jetpack(release) if release else None,
        power_mode=parse_power_mode(_output(root, "nvpmodel", ["-q"], TOOL_SECONDS)),
    )


def state(root: Path = ROOT) -> State:
    """Return the present clocks, temperatures, throttling events and power of this Jetson."""
    free, locked = _free_clocks(root)
    temperatures, over = _temperatures(root)
    power = _power(root)
    if not power or not temperatures:  # some boards have them in other places, which tegrastats knows
        line = parse_tegrastats(_output(root, "tegrastats", ["--interval", "100"], TEGRASTATS_SECONDS))
        power, temperatures = power or line.power_mw, temperatures or line.temperatures_c
    return State(
        clocks_locked=None if locked is None else not free,
        free_clocks=free,
        temperatures_c=temperatures,
        over_trip=over,
        throttle_events=_counters(root),
        cooling=_cooling(root),
        power_mw=power,
        total_power_mw=total_power(power),
    )


class Watch:
    """Watches a Jetson during a measurement; on other machines it does nothing and finds no problem.

    Args:
        root: Directory below which all paths, such as /proc, are looked up; "/" except in tests.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self.board = describe(root)
        self._states: list[State] = []
        self.look()

    def look(self) -> None:
        """Read and store the board's state; call it before, between and after timed work."""
        if self.board is not None:
            self._states.append(state(self._root))

    def result(self) -> Jetson | None:
        """Return the board's description; None if the machine is not a Jetson.

        Its attribute `run` summarizes the readings so far: `throttle_events` holds the increase of each counter since
        this object was made; temperatures and powers are the largest readings.
        """
        if self.board is None:
            return None
        run = JetsonRun(
            clocks_locked=self._states[-1].clocks_locked,
            throttle_events=self._rises(),
            max_temperatures_c=_largest([seen.temperatures_c for seen in self._states]),
            max_power_mw=_largest([seen.power_mw for seen in self._states]),
            max_total_power_mw=max((s.total_power_mw for s in self._states if s.total_power_mw), default=None),
            looks=len(self._states),
            unstable=self.unstable() or False,
        )
        return replace(self.board, run=run)

    def unstable(self) -> str | None:
        """Return in one line why latencies measured since this object was made are unreliable; None if they are not."""
        if self.board is None:
            return None
        reasons = []
        for seen in self._states:
            if seen.clocks_locked is None:
                reasons.append("the clocks cannot be read")
            elif not seen.clocks_locked:
                reasons.append(f"clocks not locked ({seen.free_clocks[0]})")
            reasons += [f"hot: {zone}" for zone in seen.over_trip]
        reasons += [f"throttled: {name} rose by {by}" for name, by in self._rises().items() if by]
        cooling = _largest([seen.cooling for seen in self._states])
        reasons += [f"throttled: {name} in state {value}" for name, value in cooling.items() if value]
        return "; ".join(dict.fromkeys(reasons)) or None

    def _rises(self) -> dict[str, int]:
        """Return by how much each throttling counter rose since the first reading; new counters are left out."""
        first, last = self._states[0].throttle_events, self._states[-1].throttle_events
        return {name: last[name] - first[name] for name in first if name in last}


def _largest(several: Sequence[Mapping[str, _Number]]) -> dict[str, _Number]:
    largest: dict[str, _Number] = {}
    for values in several:
        for name, value in values.items():
            largest[name] = max(value, largest.get(name, value))
    return largest


def _read(path: Path) -> str | None:
    """Return a file's text without the NUL and newline at its end; None if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _output(root: Path, tool: str, arguments: list[str], seconds: float) -> str:
    """Return what one of the board's tools prints until it ends or times out; empty if it cannot start.

    Standard input is closed, because nvpmodel asks questions if it can.
    """
    found = shutil.which(tool, path=os.pathsep.join(str(root / place) for place in ("usr/sbin", "usr/bin")))
    if found is None:
        return ""
    try:
        result = subprocess.run(
            [found, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:  # tegrastats never ends by itself
        return (expired.output or b"").decode(errors="replace")
    except OSError:
        return ""
    return result.stdout.decode(errors="replace")


def _free_clocks(root: Path) -> tuple[list[str], bool | None]:
    """Return the clocks that are not locked, each with its range in MHz, and whether any clock is readable.

    The second value is True, or None if no clock is readable.
    """
    pairs: list[tuple[str, Path, str]] = []
    for pattern in _GPU_CLOCKS:
        pairs += [("GPU", path, "") for path in sorted((root / "sys/class/devfreq").glob(pattern))]
    for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*")):
        if _read(cpu / "online") != "0":  # the first core has no such file, since it cannot be switched off
            pairs.append((cpu.name, cpu / "cpufreq", "scaling_"))
    free, readable = [], None
    for name, path, prefix in pairs:
        low, high = _number(path / f"{prefix}min_freq"), _number(path / f"{prefix}max_freq")
        if low is None or high is None:
            continue
        readable = True
        if low != high:
            unit = 1_000 if prefix else 1_000_000  # cpufreq counts kHz, devfreq Hz
            free.append(f"{name} {low / unit:.0f} to {high / unit:.0f} MHz")
    return free, readable


def _temperatures(root: Path) -> tuple[dict[str, float], list[str]]:
    """Return degrees Celsius by zone, and the zones that reach a trip point at which the machine is slowed down."""
    temperatures, over = {}, []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, value = _read(zone / "type"), _number(zone / "temp")
        if name is None or value is None or value / 1000 <= _POWERED_OFF:
            continue
        temperatures[name] = value / 1000
        for trip in sorted(zone.glob("trip_point_*_temp")):
            kind, limit = _read(trip.with_name(trip.name.replace("_temp", "_type"))), _number(trip)
            if kind in _THROTTLING_TRIPS and limit is not None and 0 < limit <= value:
                over.append(f"{name} over its {kind} trip at {limit / 1000:.1f} C")
    return temperatures, over


def _counters(root: Path) -> dict[str, int]:
    """Return the number of over-current and under-voltage events since boot, by counter."""
    base = root / "sys/devices/platform/soctherm-oc-event/hwmon"
    counts = ((path.name.removesuffix("_event_cnt"), _number(path)) for path in base.glob("hwmon*/oc*_event_cnt"))
    return {name: count for name, count in sorted(counts) if count is not None}


def _cooling(root: Path) -> dict[str, int]:
    """Return the state of each cooling device except fans; 0 means that the device slows nothing down."""
    states: dict[str, int] = {}
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        name, value = _read(device / "type"), _number(device / "cur_state")
        if name is not None and value is not None and "fan" not in name:
            states[name] = max(value, states.get(name, 0))
    return states


def _power(root: Path) -> dict[str, float]:
    """Return the power in mW by rail, from the voltage and current of the INA3221 monitors."""
    rails = {}
    for label in sorted((root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        name = _read(label)
        volts, amperes = _number(label.with_name(f"in{number}_input")), _number(label.with_name(f"curr{number}_input"))
        # NC is not connected; the seventh input is the sum of the shunt voltages and has no current.
        if name and name != "NC" and volts is not None and amperes is not None:
            rails[name] = volts * amperes / 1000
    return rails
