"""Parsers on lines that real boards printed, and a board's files laid out below a directory.

Recorded on boards: /etc/nv_tegra_release, the device tree's model, the outputs of `nvpmodel -q`, tegrastats' lines
("..." where a recording was cut) and the numbers of the clocks.

Built from the documented formats, since there is no recording: everything below /sys - thermal zones with their trips,
cooling devices (the kernel's sysfs-class-thermal), devfreq and cpufreq, INA3221 (hwmon), the soctherm event counters -
and the device tree's `compatible`.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from crqat.core.results.device import Jetson
from crqat.core.typed_json import from_json, to_json
from crqat.runtime_eval.machine import jetson

RELEASE = (
    "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, "
    "DATE: Mon Jun 16 16:07:13 UTC 2025\n"
    "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
)
ORIN_NANO_JP7 = (
    "09-19-2026 13:33:02 RAM 2850/7486MB (lfb 33x4MB) CPU [2%@729,0%@729,0%@729,0%@729,1%@729,0%@729] EMC_FREQ 5%@665 "
    "GR3D_FREQ 0%@[305] NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA off APE 200 cpu@45.812C/45.812C "
    "soc2@44.843C/44.843C soc0@46.093C/46.093C gpu@46.843C/46.843C tj@46.843C/46.843C soc1@46.281C/46.281C "
    "VDD_IN 3582mW/3582mW/3582mW VDD_CPU_GPU_CV 523mW/523mW/523mW VDD_SOC 1127mW/1127mW/1127mW"
)
ORIN_NANO_JP6 = (
    "11-30-2025 13:26:01 RAM 2461/7620MB (lfb 3x2MB) SWAP 1243/3810MB (cached 5MB) "
    "CPU [19%@729,14%@729,22%@729,8%@729,15%@729,17%@729] EMC_FREQ 4%@2133 GR3D_FREQ 0%@[305] NVDEC off NVJPG off "
    "NVJPG1 off VIC off OFA off APE 200 cpu@46.531C soc2@47.312C soc0@46.593C gpu@48.218C tj@48.843C soc1@48.843C "
    "VDD_IN 5704mW/5704mW VDD_CPU_GPU_CV 831mW/831mW VDD_SOC 1624mW/1624mW"
)
AGX_ORIN = (
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,...] "
    "EMC_FREQ 3%@2133 GR3D_FREQ 0%@[0,0] NVENC 79%@166 NVDEC off ... NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 "
    "cpu@52.562C soc2@48.437C soc0@49.093C tj@52.562C soc1@49.656C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW "
    "VIN_SYS_5V0 4707mW/4707mW"
)
AGX_ORIN_DLA = (
    "GR3D_FREQ 14%@[407,407] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CV0@73.625C ... VDD_GPU_SOC 3150mW/2971mW "
    "VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
XAVIER_NX = (
    "RAM 2690/6854MB (lfb 6x1MB) SWAP 479/3427MB (cached 3MB) CPU [3%@1904,7%@1906,1%@1905,0%@1907,off,off] "
    "EMC_FREQ 0%@1600 GR3D_FREQ 0%@[510] VIC_FREQ 601 APE 150 AUX@39C CPU@39.5C AO@37.5C GPU@37.5C PMIC@50C "
    "VDD_IN 5079mW/5079mW VDD_CPU_GPU_CV 696mW/696mW VDD_SOC 1104mW/1104mW"
)
AGX_XAVIER_JP4 = (
    "RAM 14700/15692MB (lfb 3x2MB) SWAP 898/8192MB (cached 23MB) CPU [0%@1190,...] EMC_FREQ 0% GR3D_FREQ 0% AO@30C "
    "GPU@30.5C Tboard@31C Tdiode@32C AUX@30.5C CPU@31.5C thermal@30.8C PMIC@100C GPU 463/463 CPU 618/618 "
    "SOC 2936/2936 CV 0/0 VDDRQ 309/309 SYS5V 3306/3306"
)
NANO = "GR3D_FREQ 0%@76 ... POM_5V_IN 2003/2003 POM_5V_GPU 0/0 POM_5V_CPU 320/320"
THOR = (
    "04-21-2026 15:50:52 RAM 105265/125772MB ... EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] NVENC0_FREQ @314 ... "
    "cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C soc345@37.406C VDD_GPU 1962mW/1962mW "
    "VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
)


@pytest.mark.parametrize(
    ("text", "release", "jetpack"),
    [
        (RELEASE, "36.4.4", "6.2.1"),
        ("# R39 (release), REVISION: 2.1, GCID: 46758480", "39.2.1", "7.2.1"),
        ("# R38 (release), REVISION: 4.0, GCID: 43443517", "38.4.0", "7.1"),
    ],
)
def test_a_release_and_its_jetpack(text: str, release: str, jetpack: str) -> None:
    assert jetson.parse_release(text) == release
    assert jetson.jetpack(release) == jetpack


def test_a_release_that_nobody_knows_is_not_guessed() -> None:
    assert jetson.jetpack("36.4.9") is None
    assert jetson.jetpack("99.0") is None
    assert (jetson.jetpack("36.3.0"), jetson.jetpack("32.7.5")) == ("6.0", "4.6")
    assert jetson.parse_release("Ubuntu") is None


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", "MAXN_SUPER"),
        ("NV Power Mode: 25W\n1\n", "25W"),
        ("NV Power Mode: MODE_30W\n2\n", "MODE_30W"),
        ("NVPM WARN: fan mode is not set to cool\nNV Power Mode: MAXN\n0\n", "MAXN"),
        ("NVPM ERROR: bad input!\n", None),
        ("", None),
    ],
)
def test_the_power_mode_is_its_name(text: str, mode: str | None) -> None:
    assert jetson.parse_power_mode(text) == mode


@pytest.mark.parametrize(
    ("line", "cpu_mhz", "off", "gpu_mhz", "temperatures", "power"),
    [
        (ORIN_NANO_JP7, [729] * 6, 0, [305], {"cpu": 45.812, "tj": 46.843}, {"VDD_IN": 3582, "VDD_SOC": 1127}),
        (ORIN_NANO_JP6, [729] * 6, 0, [305], {"gpu": 48.218, "soc1": 48.843}, {"VDD_IN": 5704, "VDD_SOC": 1624}),
        (AGX_ORIN, [2188], 0, [0, 0], {"cpu": 52.562, "soc1": 49.656}, {"VDD_GPU_SOC": 2412, "VIN_SYS_5V0": 4707}),
        (AGX_ORIN_DLA, [], 0, [407, 407], {"CV0": 73.625}, {"VDD_CPU_CV": 14312, "VDDQ_VDD2_1V8AO": 1091}),
        (XAVIER_NX, [1904, 1906, 1905, 1907], 2, [510], {"AUX": 39, "PMIC": 50}, {"VDD_IN": 5079, "VDD_SOC": 1104}),
        (AGX_XAVIER_JP4, [1190], 0, [], {"Tboard": 31, "thermal": 30.8}, {"GPU": 463, "CV": 0, "SYS5V": 3306}),
        (NANO, [], 0, [76], {}, {"POM_5V_IN": 2003, "POM_5V_GPU": 0, "POM_5V_CPU": 320}),
        (THOR, [], 0, [314, 314, 314], {"gpu": 38.875, "soc345": 37.406}, {"VDD_GPU": 1962, "VIN": 19780}),
    ],
)
def test_a_line_of_tegrastats(
    line: str, cpu_mhz: list[int], off: int, gpu_mhz: list[int], temperatures: dict[str, Any], power: dict[str, Any]
) -> None:
    found = jetson.parse_tegrastats(line)
    assert (found.cpu_mhz, found.cpus_off, found.gpu_mhz) == (cpu_mhz, off, gpu_mhz)
    assert temperatures.items() <= found.temperatures_c.items()
    assert power.items() <= found.power_mw.items()
    assert len(found.temperatures_c) == len(set(re.findall(r"\w+@[0-9.]+(?=C)", line)))
    assert not {"RAM", "SWAP", "NC"} & set(found.power_mw)


def test_a_sensor_that_is_off_and_a_rail_that_is_not_connected_are_no_values() -> None:
    found = jetson.parse_tegrastats("CV0@-256C GPU@-256C tj@50C NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW")
    assert found.temperatures_c == {"tj": 50}
    assert found.power_mw == {"VDDQ_VDD2_1V8AO": 301}
    assert jetson.parse_tegrastats("GR3D_FREQ off,off").gpu_mhz == []


@pytest.mark.parametrize(
    ("line", "total"),
    [(ORIN_NANO_JP7, 3582), (AGX_ORIN, 2412 + 1607 + 4707), (AGX_ORIN_DLA, 3150 + 14312 + 4968), (NANO, 2003)],
)
def test_the_total_is_the_input_rail_or_the_sum_of_three(line: str, total: float) -> None:
    assert jetson.total_power(jetson.parse_tegrastats(line).power_mw) == total


def test_the_total_of_thor_is_vin_and_of_unknown_rails_nothing() -> None:
    assert jetson.total_power(jetson.parse_tegrastats(THOR).power_mw) == 19780
    assert jetson.total_power(jetson.parse_tegrastats(AGX_XAVIER_JP4).power_mw) is None


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def put_tool(root: Path, name: str, script: str) -> None:
    put(root, {f"usr/sbin/{name}": f"#!/bin/sh\n{script}\n"})
    (root / f"usr/sbin/{name}").chmod(0o755)


OC = "sys/devices/platform/soctherm-oc-event/hwmon/hwmon2"
INA = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
GPU = "sys/class/devfreq/17000000.gpu"
ZONES = "sys/class/thermal"


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """An Orin NX in the power mode MAXN_SUPER, its clocks locked, cool."""
    put(
        tmp_path,
        {
            "etc/nv_tegra_release": RELEASE,
            "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234\0",
            f"{GPU}/min_freq": "624750000\n",
            f"{GPU}/max_freq": "624750000\n",
            f"{ZONES}/thermal_zone0/type": "cpu-thermal\n",
            f"{ZONES}/thermal_zone0/temp": "46531\n",
            f"{ZONES}/thermal_zone0/trip_point_0_type": "passive\n",
            f"{ZONES}/thermal_zone0/trip_point_0_temp": "99000\n",
            f"{ZONES}/thermal_zone0/trip_point_1_type": "active\n",
            f"{ZONES}/thermal_zone0/trip_point_1_temp": "40000\n",
            f"{ZONES}/thermal_zone1/type": "cv0-thermal\n",
            f"{ZONES}/thermal_zone1/temp": "-256000\n",
            f"{ZONES}/cooling_device0/type": "pwm-fan\n",
            f"{ZONES}/cooling_device0/cur_state": "2\n",
            f"{ZONES}/cooling_device1/type": "cpu-throttle-alert\n",
            f"{ZONES}/cooling_device1/cur_state": "0\n",
            f"{OC}/oc1_event_cnt": "0\n",
            f"{OC}/oc3_event_cnt": "17\n",
            f"{OC}/oc3_throt_en": "1\n",
            f"{INA}/in1_label": "VDD_IN\n",
            f"{INA}/in1_input": "5000\n",
            f"{INA}/curr1_input": "1200\n",
            f"{INA}/in2_label": "NC\n",
            f"{INA}/in2_input": "5000\n",
            f"{INA}/curr2_input": "8\n",
            f"{INA}/in7_label": "sum of shunt voltages\n",
            f"{INA}/in7_input": "3\n",
        },
    )
    for cpu in range(2):
        directory = f"sys/devices/system/cpu/cpu{cpu}"
        put(tmp_path, {f"{directory}/cpufreq/scaling_{end}_freq": "1510400\n" for end in ("min", "max")})
    put(tmp_path, {"sys/devices/system/cpu/cpu1/online": "1\n"})
    put_tool(tmp_path, "nvpmodel", 'test "$*" = -q && echo "NV Power Mode: MAXN_SUPER" && echo 2')
    return tmp_path


def test_a_board_describes_itself(board: Path) -> None:
    assert jetson.describe(board) == Jetson(
        model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        soc="tegra234",
        l4t="36.4.4",
        jetpack="6.2.1",
        power_mode="MAXN_SUPER",
    )
    assert asdict(jetson.state(board)) == {
        "clocks_locked": True,
        "free_clocks": [],
        "temperatures_c": {"cpu-thermal": 46.531},
        "over_trip": [],
        "throttle_events": {"oc1": 0, "oc3": 17},
        "cooling": {"cpu-throttle-alert": 0},
        "power_mw": {"VDD_IN": 6000},
        "total_power_mw": 6000,
    }


def test_what_is_no_jetson_is_not_described_and_has_no_objection(tmp_path: Path) -> None:
    put(tmp_path, {"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"})
    assert jetson.describe(tmp_path) is None
    watch = jetson.Watch(tmp_path)
    watch.look()
    assert (watch.result(), watch.unstable()) == (None, None)


def test_a_minimal_flash_without_release_and_tools_is_still_a_jetson(tmp_path: Path) -> None:
    put(tmp_path, {"proc/device-tree/compatible": "nvidia,tegra264\0"})
    assert jetson.describe(tmp_path) == Jetson(None, "tegra264")
    assert jetson.Watch(tmp_path).unstable() == "the clocks cannot be read"


def power_mode(board: Path) -> str | None:
    described = jetson.describe(board)
    assert described is not None
    return described.power_mode


def test_nvpmodel_gets_no_input_and_a_time_limit(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With an open input `read` would wait for the terminal; closed, it fails at once.
    put_tool(board, "nvpmodel", 'read answer && echo "NV Power Mode: ASKED"; echo "NV Power Mode: QUIET"')
    assert power_mode(board) == "QUIET"
    put_tool(board, "nvpmodel", "exec sleep 60")
    monkeypatch.setattr(jetson, "TOOL_SECONDS", 0.2)
    start = time.monotonic()
    assert power_mode(board) is None
    assert time.monotonic() - start < 10
    put_tool(board, "nvpmodel", "exit 1")
    (board / "usr/sbin/nvpmodel").write_bytes(b"\x7fELF")  # of another architecture
    assert power_mode(board) is None


def test_tegrastats_is_asked_where_sysfs_has_no_power_and_ended(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson, "TEGRASTATS_SECONDS", 0.5)
    put_tool(board, "tegrastats", f"echo $$ > {board}/pid; echo '{ORIN_NANO_JP6}'; exec sleep 60")
    (board / f"{INA}/in1_label").unlink()
    state = jetson.state(board)
    assert state.power_mw == {"VDD_IN": 5704, "VDD_CPU_GPU_CV": 831, "VDD_SOC": 1624}
    assert state.temperatures_c == {"cpu-thermal": 46.531}
    with pytest.raises(ProcessLookupError):
        os.kill(int((board / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({f"{GPU}/min_freq": "306000000\n"}, "clocks not locked (GPU 306 to 625 MHz)"),
        (
            {"sys/devices/system/cpu/cpu1/cpufreq/scaling_min_freq": "729600"},
            "clocks not locked (cpu1 730 to 1510 MHz)",
        ),
        ({f"{OC}/oc3_event_cnt": "19\n"}, "throttled: oc3 rose by 2"),
        ({f"{ZONES}/cooling_device1/cur_state": "3\n"}, "throttled: cpu-throttle-alert in state 3"),
        ({f"{ZONES}/thermal_zone0/temp": "99000\n"}, "hot: cpu-thermal over its passive trip at 99.0 C"),
        (
            {"sys/devices/system/cpu/cpu1/online": "0", "sys/devices/system/cpu/cpu1/cpufreq/scaling_min_freq": "1"},
            None,
        ),
        ({f"{ZONES}/thermal_zone0/temp": "98900\n"}, None),
    ],
)
def test_what_happens_during_a_run_makes_it_unstable(board: Path, files: dict[str, str], reason: str | None) -> None:
    watch = jetson.Watch(board)
    assert watch.unstable() is None
    before = {name: (board / name).read_text() for name in files}
    put(board, files)
    watch.look()
    if not any("event_cnt" in name for name in files):  # a counter does not fall again; everything else may
        put(board, before)
        watch.look()
    assert watch.unstable() == reason
    result = watch.result()
    assert result is not None and result.run is not None
    assert result.run.unstable == (reason or False)
    assert from_json(Jetson, json.loads(json.dumps(to_json(result), allow_nan=False))) == result


def test_a_run_keeps_the_largest_values(board: Path) -> None:
    watch = jetson.Watch(board)
    put(board, {f"{INA}/curr1_input": "2000\n", f"{ZONES}/thermal_zone0/temp": "60000\n"})
    watch.look()
    put(board, {f"{INA}/curr1_input": "10\n", f"{ZONES}/thermal_zone0/temp": "50000\n"})
    watch.look()
    result = watch.result()
    assert result is not None and result.run is not None
    assert result.jetpack == "6.2.1"
    run = result.run
    assert (run.max_total_power_mw, run.max_temperatures_c, run.looks) == (10000, {"cpu-thermal": 60}, 3)
    assert run.throttle_events == {"oc1": 0, "oc3": 0}


def test_the_clock_of_older_and_newer_gpus_has_other_names(board: Path) -> None:
    for old in (board / GPU).iterdir():
        old.unlink()
    (board / GPU).rmdir()
    for name in ("17000000.ga10b", "17000000.gv11b", "gpu-gpc-0"):
        put(board, {f"sys/class/devfreq/{name}/min_freq": "1", f"sys/class/devfreq/{name}/max_freq": "2000000"})
    assert jetson.state(board).free_clocks == ["GPU 0 to 2 MHz"] * 3
