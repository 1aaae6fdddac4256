"""Latency against a baseline: judged only if the two were measured in the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from crqat.core.results.benchmark import Results
from crqat.core.results.verdict import Status, Verdict
from crqat.core.typed_json import from_json
from crqat.pipeline.gate import latency_regression

FILE = "onnxruntime.onnx"
ACCURACY = {"n": 100, "top1": 0.9, "top1_interval": [0.8, 0.95]}


def judge(data: dict[str, Any], baseline: dict[str, Any] | None, allowed: float) -> list[Verdict]:
    """The verdicts on results as JSON has them."""
    base = None if baseline is None else from_json(Results, baseline)
    return latency_regression.judge(from_json(Results, data), base, allowed)


def results(p50: float = 1.0, spread: float = 0.0, unstable: str | bool = False, **latency: Any) -> dict[str, Any]:
    """A run whose rounds have medians evenly from `p50` x (1 - spread) to `p50` x (1 + spread)."""
    rounds = [p50 * (1 + spread * (turn - 4.5) / 4.5) for turn in range(10)]
    timed = {"status": "measured", "p50_ms": p50, "rounds": 10, "round_p50_ms": rounds, "unstable": unstable}
    unlike = dict.fromkeys(("versus_float", "verification"))
    common = {
        **unlike,
        "accuracy": ACCURACY,
        "status": "measured",
        "runtime": "onnxruntime",
        "provider": "CPU",
        "runtime_version": "1.32.0",
    }
    return {
        "run": "run1",
        "device": {"cpu": "Xeon", "onnxruntime": "1.32.0", "governor": "performance", "jetson": None},
        "config": {"threads": 1, "cuda_graph": False},
        "models": {
            "float.onnx": {**common, "target": "float", "latency": timed},
            FILE: {**common, "target": "onnxruntime", "latency": {**timed, **latency}},
        },
    }


def only(verdicts: list[Verdict]) -> Verdict:
    (verdict,) = verdicts
    assert (verdict.rule, verdict.file) == ("latency_regression", FILE)
    assert "\n" not in verdict.message
    return verdict


@pytest.mark.parametrize(
    ("now", "spread", "status"),
    [(1.05, 0.0, "pass"), (1.1, 0.0, "pass"), (1.2, 0.0, "fail"), (1.05, 0.1, "inconclusive"), (1.5, 0.1, "fail")],
)
def test_the_interval_of_the_ratio_is_judged(now: float, spread: float, status: Status) -> None:
    verdict = only(judge(results(now, spread), results(1.0, spread), 1.1))
    assert verdict.status == status
    assert verdict.measured == pytest.approx(now)
    assert verdict.interval is not None
    assert verdict.interval[0] <= now <= verdict.interval[1]
    assert (verdict.allowed, verdict.n) == (1.1, 10)
    # The second smallest and the second largest of ten rounds.
    edge = spread * 3.5 / 4.5
    assert verdict.interval == pytest.approx((now * (1 - edge) / (1 + edge), now * (1 + edge) / (1 - edge)))


@pytest.mark.parametrize("name", ["this latency", "the baseline"])
def test_an_unstable_latency_decides_nothing(name: str) -> None:
    here, there = results(9.0), results()
    (here if name == "this latency" else there)["models"][FILE]["latency"]["unstable"] = "clocks not locked"
    verdict = only(judge(here, there, 1.1))
    assert verdict.status == "inconclusive"
    assert f"{name} is unstable: clocks not locked" in verdict.message


def on(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in keys[:-1]:
            data = data[name]
        data[keys[-1]] = value

    return change


ORIN = {"model": "NVIDIA Jetson Orin NX", "power_mode": "25W"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (on("device", "cpu", value="Core i5"), "another device (Core i5, here Xeon)"),
        (on("device", "governor", value="powersave"), "another power mode (powersave, here performance)"),
        (on("device", "jetson", value=ORIN), "another device (NVIDIA Jetson Orin NX, here Xeon)"),
        (on("models", FILE, "runtime", value="tensorrt"), "another runtime (tensorrt, here onnxruntime)"),
        (on("models", FILE, "provider", value="CUDA"), "another provider (CUDA, here CPU)"),
        (on("models", FILE, "runtime_version", value="1.20.0"), "another runtime version (1.20.0, here 1.32.0)"),
        (on("models", FILE, "runtime_version", value=None), "another runtime version (not recorded, here 1.32.0)"),
        (on("config", "threads", value=4), "another number of threads (4, here 1)"),
        (on("config", "cuda_graph", value=True), "another CUDA graph setting (True, here False)"),
    ],
)
def test_a_foreign_key_is_never_compared(change: Callable[[dict[str, Any]], None], words: str) -> None:
    base = results(0.001)  # compared, it would fail
    change(base)
    verdict = only(judge(results(), base, 1.1))
    assert (verdict.status, verdict.measured) == ("not run", None)
    assert verdict.message == f"not run: the baseline has {words}"


def test_on_a_jetson_the_power_mode_is_nvpmodels() -> None:
    here, base = results(), results()
    here["device"]["jetson"] = {**ORIN, "power_mode": "MAXN_SUPER"}
    base["device"]["jetson"] = ORIN
    base["device"]["cpu"] = "whatever the kernel calls it"
    verdict = only(judge(here, base, 1.1))
    assert verdict.message == "not run: the baseline has another power mode (25W, here MAXN_SUPER)"
    base["device"]["jetson"] = here["device"]["jetson"]
    assert only(judge(here, base, 1.1)).status == "pass"


def test_what_was_not_measured_is_not_run() -> None:
    assert only(judge(results(), None, 1.1)).message == "not run: no --baseline was given"
    not_run: Any = {"status": "not run: no CUDA device"}
    here = results()
    here["models"][FILE]["latency"] = not_run
    assert only(judge(here, results(), 1.1)).message == "not run: no CUDA device"
    base = results()
    base["models"][FILE] |= {"latency": not_run}
    assert only(judge(results(), base, 1.1)).message == f"not run: the baseline has no latency of {FILE}"
    base["models"][FILE] |= {"status": "failed: killed", "latency": None}
    assert only(judge(results(), base, 1.1)).status == "not run"
    del base["models"][FILE]
    assert only(judge(results(), base, 1.1)).status == "not run"
    here["models"][FILE] |= {"status": "failed: killed", "latency": None}
    assert judge(here, results(), 1.1) == []  # the gate has said so already


def test_results_from_before_the_key_was_recorded_are_another_one() -> None:
    old = copy.deepcopy(results())
    del old["models"][FILE]["runtime_version"]
    del old["config"]["cuda_graph"]
    read = from_json(Results, old)
    assert latency_regression.key(read, read.models[FILE])["CUDA graph setting"] is False
    assert "runtime version (not recorded" in only(judge(results(), old, 1.1)).message
