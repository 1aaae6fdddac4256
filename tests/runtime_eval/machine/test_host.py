from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from crqat.core.results.device import Device
from crqat.core.typed_json import from_json, text
from crqat.runtime_eval.machine import host


def test_describe_is_json_without_the_machines_name() -> None:
    description = host.describe()
    assert description.flags is not None and set(description.flags) == set(host.FLAGS)
    assert description.python == platform.python_version()
    assert description.cpu
    assert from_json(Device, json.loads(text(description))) == description
    assert not any(platform.node() == value for value in vars(description).values())


def test_an_arm_board_is_told_by_its_device_tree(tmp_path: Path) -> None:
    files = {
        "/proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd asimddp\n\nprocessor\t: 1\n",
        "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
        "/proc/meminfo": "MemTotal:        7802344 kB\nMemFree: 1 kB",
    }
    for name, content in files.items():
        path = tmp_path / name.removeprefix("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\0\n")
    description = host.describe(tmp_path)
    assert description.cpu == "NVIDIA Jetson Orin Nano Developer Kit"
    assert description.flags == {"avx2": False, "avx512_vnni": False, "avx_vnni": False, "asimddp": True}
    assert (description.governor, description.frequency_mhz) == ("schedutil", 1510.4)
    assert description.memory_bytes == 7802344 * 1024


def test_a_system_without_proc_is_described_too(tmp_path: Path) -> None:
    description = host.describe(tmp_path)
    assert description.memory_bytes is None
    assert description.frequency_mhz is None
    assert description.cpu


def test_a_cuda_device_is_a_device_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = tmp_path / "nvidiactl"
    monkeypatch.setattr(host, "CUDA_DEVICES", (str(node),))
    assert not host.cuda_device()
    node.touch()
    assert host.cuda_device()
