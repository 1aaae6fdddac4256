"""The cache's file: locked, merged, hashed. TensorRT's own two calls are faked; the builds' tests use the real ones."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from crqat.core.errors import ToolError
from crqat.runtime_eval.trt import timing_cache


class FakeCache:
    """Kernel times by layer; two of different devices do not combine, as TensorRT's."""

    def __init__(self, blob: bytes, device: str) -> None:
        content: Any = json.loads(blob) if blob else {"device": device, "times": {}}
        self.device: str = content["device"]
        self.times: dict[str, float] = dict(content["times"])

    def combine(self, other: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if other.device != self.device:
            return False
        self.times = {**other.times, **self.times}
        return True

    def serialize(self) -> memoryview:
        return memoryview(json.dumps({"device": self.device, "times": self.times}).encode())


class FakeConfig:
    def __init__(self, device: str = "orin") -> None:
        self.device = device

    def create_timing_cache(self, blob: bytes) -> FakeCache | None:
        return None if blob == b"of another version" else FakeCache(blob, self.device)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache.device == self.device


def build(path: Path, layer: str, device: str = "orin") -> str:
    config: Any = FakeConfig(device)
    cache: Any = timing_cache.attach(config, path)
    cache.times[layer] = 1.0
    return timing_cache.merge(config, cache, path)


def stored(path: Path) -> tuple[str, Any]:
    digest, _, blob = path.read_bytes().partition(b"\n")
    assert hashlib.sha256(blob).hexdigest() == digest.decode()
    return digest.decode(), json.loads(blob)


def test_a_build_adds_to_the_cache_and_gets_the_hash_of_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    assert build(path, "conv1") == stored(path)[0]
    digest = build(path, "conv2")
    assert stored(path) == (digest, {"device": "orin", "times": {"conv1": 1.0, "conv2": 1.0}})


def test_of_two_builds_at_the_same_time_neither_loses_its_part(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    config: Any = FakeConfig()
    first: Any = timing_cache.attach(config, path)
    first.times["conv1"] = 1.0
    build(path, "conv2")  # from start to end while the first one builds
    timing_cache.merge(config, first, path)
    assert set(stored(path)[1]["times"]) == {"conv1", "conv2"}


def test_a_merge_waits_for_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    thread = threading.Thread(target=build, args=(path, "conv1"))
    with timing_cache._locked(path):
        thread.start()
        time.sleep(0.2)
        assert not path.exists()
        assert thread.is_alive()
    thread.join(10)
    assert set(stored(path)[1]["times"]) == {"conv1"}


@pytest.mark.parametrize("damage", ["torn", "altered", "empty"])
def test_a_damaged_cache_is_not_used_but_replaced(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "timing.cache"
    build(path, "conv1")
    content = path.read_bytes()
    path.write_bytes({"torn": content[:-5], "altered": content.replace(b"conv1", b"conv9"), "empty": b""}[damage])
    build(path, "conv2")
    assert set(stored(path)[1]["times"]) == {"conv2"}


def test_a_cache_of_another_device_or_version_is_not_used_but_replaced(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    build(path, "conv1", device="a100")
    build(path, "conv2")
    assert stored(path)[1] == {"device": "orin", "times": {"conv2": 1.0}}
    blob = b"of another version"
    path.write_bytes(hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob)
    build(path, "conv3")
    assert set(stored(path)[1]["times"]) == {"conv3"}


def test_what_tensorrt_or_the_place_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timing.cache"
    with pytest.raises(ToolError, match="cannot be locked"):
        build(tmp_path / "nowhere" / "timing.cache", "conv1")
    monkeypatch.setattr(FakeCache, "serialize", lambda self: None)
    with pytest.raises(ToolError, match="does not serialize"):
        build(path, "conv1")
    monkeypatch.setattr(FakeConfig, "set_timing_cache", lambda self, cache, ignore_mismatch: False)
    with pytest.raises(ToolError, match="rejects every timing cache"):
        build(path, "conv1")
    assert not path.exists()
