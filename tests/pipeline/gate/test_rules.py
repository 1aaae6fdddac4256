from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from crqat.core.errors import UsageError
from crqat.core.results.benchmark import Results, read_results
from crqat.core.results.verdict import Status, Verdict
from crqat.core.typed_json import from_json, to_json
from crqat.pipeline.gate import latency_regression, rules
from crqat.pipeline.gate.junit import junit
from crqat.pipeline.gate.rules import GateConfig, KnownAccuracy, exit_code
from crqat.runtime_eval.measure.accuracy import ratio_bounds, tango

ALL_RULES = GateConfig(max_accuracy_drop=1.0, min_agreement=0.95, max_latency_ratio=0.8, max_size_ratio=0.5)
FILE = "onnxruntime.onnx"


LATENCY = {"status": "measured", "p50_ms": 1.0, "rounds": 10, "round_p50_ms": [1.0] * 10, "unstable": False}


def judge(data: dict[str, Any], config: GateConfig, known: KnownAccuracy | None = None) -> list[Verdict]:
    """The verdicts on results as JSON has them."""
    return rules.judge(from_json(Results, data), config, known)


def model(**versus: Any) -> dict[str, Any]:
    """A quantized model that keeps to `ALL_RULES`."""
    return {
        "target": "onnxruntime",
        "status": "measured",
        "accuracy": {"n": 797, "top1": 0.95, "top1_interval": [0.93, 0.96]},
        "latency": LATENCY,
        "versus_float": {
            "drop_points": 0.25,
            "drop_interval_points": [-0.3, 0.8],
            "agreement": 0.98,
            "agreement_interval": [0.97, 0.99],
            "latency_ratio": 0.5,
            "latency_ratio_interval": [0.45, 0.55],
            "size_ratio": 0.3,
            **versus,
        },
        "verification": {"status": "passed", "codes": 1280, "differing_codes": 0, "images": 32},
    }


def results(quantized: dict[str, Any], **base: Any) -> dict[str, Any]:
    base_model = {
        "target": "float",
        "status": "measured",
        "accuracy": {"n": 797, "top1": 0.96, "top1_interval": [0.94, 0.97]},
        "latency": LATENCY,
        "versus_float": None,
        "verification": None,
        **base,
    }
    return {
        "schema_version": 1,
        "run": "digits",
        "models": {"float.onnx": copy.deepcopy(base_model), FILE: copy.deepcopy(quantized)},
        "config": {"threads": 1},
        "device": {"cpu": "a CPU", "onnxruntime": "1.0"},
    }


def verdict_on(rule: str, quantized: dict[str, Any], **base: Any) -> Verdict:
    (verdict,) = (v for v in judge(results(quantized, **base), ALL_RULES) if v.rule == rule)
    assert verdict.file == FILE
    assert "\n" not in verdict.message
    return verdict


def test_a_good_model_passes_every_rule() -> None:
    verdicts = judge(results(model()), ALL_RULES)
    rules = ["verification", "accuracy_drop", "agreement", "latency_ratio", "size_ratio"]
    assert [(v.rule, v.status) for v in verdicts] == [(rule, "pass") for rule in rules]
    assert exit_code(verdicts) == 0


def test_codes_of_the_cpu_that_was_measured_are_judged() -> None:
    counted = {"status": "passed", "images": 2, "tensors": 3, "left_out": 0, "codes": 100, "differing": 0}
    verdict = verdict_on("codes_on_this_cpu", {**model(), "codes_on_this_cpu": counted})
    assert (verdict.status, verdict.n, verdict.message) == ("pass", 100, "0 of 100 codes differ on 2 images")
    counted |= {"status": "failed: 3 of 100 codes differ, first in x", "differing": 3}
    verdicts = judge(results({**model(), "codes_on_this_cpu": counted}), ALL_RULES)
    assert [v.rule for v in verdicts if v.status == "fail"] == ["codes_on_this_cpu"]
    part = verdict_on("codes_on_this_cpu", {**model(), "codes_on_this_cpu": {**counted, "left_out": 9}})
    assert part.message.endswith(" images, in 3 of 12 tensors; the codes of the others depend on float operations")
    assert exit_code(verdicts) == 1


def test_codes_of_a_cpu_of_which_the_export_knows_none_are_inconclusive() -> None:
    unknown = "not run: expected codes are known for x86 CPUs, not for aarch64; export again"
    counted = {"status": unknown, "images": 2, "tensors": 3, "left_out": 0, "codes": 0, "differing": 0}
    verdict = verdict_on("codes_on_this_cpu", {**model(), "codes_on_this_cpu": counted})
    assert (verdict.status, verdict.message) == ("inconclusive", unknown)


def test_a_file_that_was_not_run_neither_passes_nor_fails() -> None:
    absent: dict[str, Any] = dict.fromkeys(("accuracy", "latency", "versus_float"))
    verdicts = judge(results({**model(), **absent, "status": "not run: no CUDA device"}), ALL_RULES)
    assert [(v.rule, v.status) for v in verdicts] == [("measurement", "inconclusive"), ("verification", "pass")]
    assert verdicts[0].message == "not run: no CUDA device"
    assert exit_code(verdicts) == 4


def test_only_rules_with_a_limit_are_applied() -> None:
    assert [v.rule for v in judge(results(model()), GateConfig())] == ["verification", "accuracy_drop"]


@pytest.mark.parametrize(
    ("rule", "key", "interval", "status"),
    [
        ("accuracy_drop", "drop_interval_points", [-0.5, 1.0], "pass"),
        ("accuracy_drop", "drop_interval_points", [0.9, 1.01], "inconclusive"),
        ("accuracy_drop", "drop_interval_points", [1.0, 2.0], "inconclusive"),
        ("accuracy_drop", "drop_interval_points", [1.01, 2.0], "fail"),
        ("agreement", "agreement_interval", [0.95, 0.99], "pass"),
        ("agreement", "agreement_interval", [0.949, 0.99], "inconclusive"),
        ("agreement", "agreement_interval", [0.90, 0.95], "inconclusive"),
        ("agreement", "agreement_interval", [0.90, 0.949], "fail"),
        ("latency_ratio", "latency_ratio_interval", [0.7, 0.8], "pass"),
        ("latency_ratio", "latency_ratio_interval", [0.8, 0.81], "inconclusive"),
        ("latency_ratio", "latency_ratio_interval", [0.81, 0.9], "fail"),
    ],
)
def test_an_interval_decides(rule: str, key: str, interval: list[float], status: Status) -> None:
    verdict = verdict_on(rule, model(**{key: interval}))
    assert (verdict.status, verdict.interval) == (status, tuple(interval))


@pytest.mark.parametrize(("ratio", "status"), [(0.5, "pass"), (0.5001, "fail")])
def test_the_size_is_exact(ratio: float, status: Status) -> None:
    verdict = verdict_on("size_ratio", model(size_ratio=ratio))
    assert (verdict.status, verdict.measured, verdict.interval) == (status, ratio, None)


def test_a_verdict_carries_its_evidence() -> None:
    drop = verdict_on("accuracy_drop", model())
    assert (drop.measured, drop.interval, drop.allowed, drop.n) == (0.25, (-0.3, 0.8), 1.0, 797)
    assert drop.message == "0.250 [-0.300, 0.800] points over 797 test images, allowed 1"
    assert verdict_on("latency_ratio", model()).n == 10


@pytest.mark.parametrize("interval", [[0.1, 0.2], [2.0, 3.0]])
@pytest.mark.parametrize("who", [FILE, "the float model"])
def test_an_unstable_latency_is_inconclusive_whatever_it_says(who: str, interval: list[float]) -> None:
    latency = {**LATENCY, "unstable": "the medians vary by 9 %"}
    quantized = model(latency_ratio_interval=interval)
    if who == FILE:
        verdict = verdict_on("latency_ratio", {**quantized, "latency": latency})
    else:
        verdict = verdict_on("latency_ratio", quantized, latency=latency)
    assert verdict.status == "inconclusive"
    assert f"{who} is unstable: the medians vary by 9 %" in verdict.message


@pytest.mark.parametrize(
    ("target", "latency", "words"),
    [
        ("tensorrt", {"status": "not run: no CUDA device"}, "not run: no CUDA device, and benchmark.require names"),
        ("tensorrt", LATENCY, None),
        ("onnxruntime", LATENCY, "no file for tensorrt"),
    ],
)
def test_a_required_runtime_that_was_not_measured_is_an_error(
    target: str, latency: dict[str, Any], words: str | None
) -> None:
    quantized = {**model(), "target": target, "latency": latency}
    data = {**results(quantized), "config": {"threads": 1, "require": ["tensorrt"]}}
    verdicts = judge(data, GateConfig())
    required = [verdict for verdict in verdicts if verdict.rule == "required"]
    assert [verdict.status for verdict in required] == (["error"] if words else [])
    assert all(words in verdict.message for verdict in required if words)
    assert exit_code(verdicts) == (3 if words else 0)
    data["config"] = {"threads": 1, "require": []}
    assert exit_code(judge(data, GateConfig())) == 0


def test_openvino_is_judged_against_its_own_float_model() -> None:
    data = results(model())
    float_model, fast = data["models"]["float.onnx"], data["models"]["onnxruntime.onnx"]
    unstable = {**float_model["latency"], "unstable": "it swings"}
    data["models"] |= {
        "float.onnx@openvino": {**float_model, "target": "float_openvino", "latency": unstable},
        "onnxruntime.onnx@openvino": {**fast, "target": "openvino", "verification": None},
    }
    judged = judge(data, GateConfig(max_latency_ratio=0.9))
    verdicts = {(v.rule, v.file): v.status for v in judged if "onnxruntime" in v.file}
    assert verdicts == {
        ("verification", "onnxruntime.onnx"): "pass",
        ("accuracy_drop", "onnxruntime.onnx"): "pass",
        ("latency_ratio", "onnxruntime.onnx"): "pass",
        ("accuracy_drop", "onnxruntime.onnx@openvino"): "pass",
        ("latency_ratio", "onnxruntime.onnx@openvino"): "inconclusive",
    }
    assert not [v for v in judged if v.file == "float.onnx@openvino"]
    data["config"] = {"threads": 1, "require": ["openvino"]}
    assert not [v for v in judge(data, GateConfig()) if v.rule == "required"]
    del data["models"]["onnxruntime.onnx@openvino"]
    assert [v.message for v in judge(data, GateConfig()) if v.rule == "required"] == [
        "no file for openvino, which benchmark.require names; add onnxruntime to export.targets"
    ]


def test_a_required_runtime_whose_file_failed_is_an_error() -> None:
    failed = {**model(), "target": "tensorrt", "status": "failed: killed", "latency": None, "versus_float": None}
    data = {**results(failed), "config": {"threads": 1, "require": ["tensorrt"]}}
    assert [v.message for v in judge(data, ALL_RULES) if v.rule == "required"] == [
        "failed: killed, and benchmark.require names tensorrt"
    ]


def test_a_ratio_across_two_runtimes_is_not_made(tmp_path: Path) -> None:
    quantized = model(latency_ratio=None, latency_ratio_interval=None)
    verdict = verdict_on("latency_ratio", quantized)
    assert (verdict.status, verdict.message) == ("not run", "not run: the float model was timed in another runtime")
    data = results(quantized)
    assert read_results(write(tmp_path / "results.json", data)) == from_json(Results, data)


def test_a_latency_that_was_not_run_is_shown_and_decides_nothing() -> None:
    quantized = model(latency_ratio=None, latency_ratio_interval=None)
    verdicts = judge(results({**quantized, "latency": {"status": "not run: no CUDA device"}}), ALL_RULES)
    (verdict,) = (v for v in verdicts if v.rule == "latency_ratio")
    assert (verdict.status, verdict.message, verdict.measured) == ("not run", "not run: no CUDA device", None)
    assert exit_code(verdicts) == 0


@pytest.mark.parametrize(
    ("verification", "status", "words"),
    [
        (
            {"status": "passed", "codes": 9, "differing_codes": 0, "images": 1},
            "pass",
            "0 of 9 codes differ on 1 images",
        ),
        ({"status": "failed: conv1", "codes": 9, "differing_codes": 4, "images": 1}, "fail", "failed: conv1; 4 of 9"),
        ({"status": "passed", "codes": 0, "differing_codes": 0, "images": 1}, "fail", "0 of 0 codes"),
        ({"status": "skipped", "codes": 9, "differing_codes": 0, "images": 1}, "fail", "skipped"),
        (None, "fail", "did not verify"),
    ],
)
def test_verification_is_always_judged(verification: dict[str, Any] | None, status: Status, words: str) -> None:
    quantized = {**model(), "verification": verification}
    (verdict,) = (v for v in judge(results(quantized), GateConfig()) if v.rule == "verification")
    assert verdict.status == status
    assert words in verdict.message


def test_a_model_that_could_not_be_measured_is_an_error_of_the_environment() -> None:
    failed = {**model(), "status": "failed: its process was ended by SIGKILL", "accuracy": None, "latency": None}
    verdicts = judge(results({**failed, "versus_float": None}), ALL_RULES)
    assert [(v.rule, v.status) for v in verdicts] == [("measurement", "error"), ("verification", "pass")]
    assert "SIGKILL" in verdicts[0].message
    assert exit_code(verdicts) == 3


def test_without_the_float_model_nothing_can_be_compared() -> None:
    verdicts = judge(
        results({**model(), "versus_float": None}, status="failed: killed", accuracy=None, latency=None), ALL_RULES
    )
    assert [(v.file, v.rule, v.status) for v in verdicts] == [
        ("float.onnx", "measurement", "error"),
        (FILE, "measurement", "error"),
        (FILE, "verification", "pass"),
    ]
    assert exit_code(verdicts) == 3


def engine(share: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """The summary of a TensorRT engine."""
    uncovered = [] if share == 1.0 else [{"node": "conv7", "macs": 5, "reason": "multiplies Half by Half"}]
    return {
        "status": "built",
        "builder": {"name": "tensorrt_rtx", "version": "1.7"},
        "remarks": [],
        "coverage": {"by_macs": share, "by_count": share, "nodes": 20, "int8_nodes": 20 - len(uncovered)},
        "uncovered": uncovered,
        "counts": {"layers": 41, "reformat": 2},
        **changes,
    }


def on_engine(summary: dict[str, Any] | None, config: GateConfig | None = None, **changes: Any) -> dict[str, Verdict]:
    """The verdicts on a TensorRT file's engine, by rule."""
    data = results({**model(), "target": "tensorrt", "engine": summary, **changes})
    verdicts = judge(data, config or GateConfig(max_reformat_layers=2))
    return {v.rule: v for v in verdicts if v.rule in ("findings", "engine", "int8_coverage", "reformat_layers")}


def test_what_float_layers_cost_is_said_beside_the_coverage_of_all_others() -> None:
    kept = {"macs": {"fc": 5}, "share": 0.0291}
    verdict = on_engine(engine(), float_layers=kept)["int8_coverage"]
    assert verdict.status == "pass"
    assert "required 100 %; in addition, float_layers keeps 2.91 % of the network's MACs in float" in verdict.message
    assert "float_layers" not in on_engine(engine())["int8_coverage"].message


def test_a_good_engine_passes() -> None:
    verdicts = on_engine(engine())
    assert {rule: v.status for rule, v in verdicts.items()} == dict.fromkeys(
        ("engine", "int8_coverage", "reformat_layers"), "pass"
    )
    assert verdicts["engine"].message == "built by tensorrt_rtx 1.7 without errors"
    coverage, reformat = verdicts["int8_coverage"], verdicts["reformat_layers"]
    assert (coverage.measured, coverage.allowed, coverage.n) == (1.0, 1.0, 20)
    assert coverage.message == "100.00 % of the MACs, 20 of 20 Conv and Gemm, required 100 %"
    assert (reformat.measured, reformat.allowed) == (2, 2)
    assert set(on_engine(engine(), GateConfig(min_int8_coverage=None))) == {"engine"}


@pytest.mark.parametrize(("required", "status"), [(0.94, "pass"), (0.95, "pass"), (0.951, "fail"), (1.0, "fail")])
def test_coverage_is_by_macs_and_names_what_is_missing(required: float, status: Status) -> None:
    verdict = on_engine(engine(0.95), GateConfig(min_int8_coverage=required))["int8_coverage"]
    assert verdict.status == status
    assert verdict.message == (
        f"95.00 % of the MACs, 19 of 20 Conv and Gemm, required {100 * required:g} %; conv7 multiplies Half by Half"
    )


def test_too_many_reformat_layers_fail() -> None:
    verdict = on_engine(engine(), GateConfig(max_reformat_layers=1))["reformat_layers"]
    assert (verdict.status, verdict.message) == ("fail", "2 of 41 layers only change type or layout, allowed 1")


@pytest.mark.parametrize(("severity", "status"), [("error", "fail"), ("warning", "pass"), ("harmless", "pass")])
def test_an_engine_that_computes_something_else_fails(severity: str, status: Status) -> None:
    remark = {"severity": severity, "message": "codes are clipped", "count": 3, "nodes": ["relu/Q"]}
    verdict = on_engine(engine(remarks=[remark]))["engine"]
    assert verdict.status == status
    assert ("codes are clipped (3 times, first at relu/Q)" in verdict.message) == (status == "fail")


@pytest.mark.parametrize("summary", [None, {"status": "not run: tensorrt_rtx is not installed"}])
def test_an_engine_that_was_not_built_passes_nothing(summary: dict[str, Any] | None) -> None:
    verdicts = on_engine(summary)
    assert {rule: v.status for rule, v in verdicts.items()} == dict.fromkeys(
        ("engine", "int8_coverage", "reformat_layers"), "not run"
    )
    assert all(v.message.startswith("not run: ") and v.measured is None for v in verdicts.values())


def test_a_file_that_no_engine_can_be_made_of_fails() -> None:
    verdicts = on_engine({"status": "failed: parse at conv1 [Conv]: a rule", "coverage": None, "counts": None})
    assert {rule: v.status for rule, v in verdicts.items()} == {
        "engine": "fail",
        "int8_coverage": "not run",
        "reformat_layers": "not run",
    }
    assert verdicts["engine"].message == "failed: parse at conv1 [Conv]: a rule"


def test_coverage_of_a_file_without_known_macs_is_not_run() -> None:
    assert on_engine(engine(None))["int8_coverage"].status == "not run"


def test_findings_of_an_unsafe_export_fail_whatever_else_holds() -> None:
    verdict = on_engine(engine(), findings=["conv1: a rule; a fix", "conv2: b"])["findings"]
    assert (verdict.status, verdict.message) == ("fail", "exported with --unsafe, breaks 2 rules: conv1: a rule; a fix")
    assert "findings" not in on_engine(engine(), findings=[])


def test_engines_are_judged_of_files_for_tensorrt_alone_and_baselines_not_at_all() -> None:
    data = results({**model(), "engine": engine(0.5)}, target="float")
    data["models"]["float16.onnx"] = {**model(), "target": "float16", "verification": None}
    assert {(v.file, v.rule) for v in judge(data, GateConfig())} == {(FILE, "verification"), (FILE, "accuracy_drop")}


def verdicts_with(*statuses: Status) -> list[Verdict]:
    return [Verdict("accuracy_drop", f"{i}.onnx", s, None, None, None, None, "why") for i, s in enumerate(statuses)]


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (("pass",), 0),
        (("pass", "not run"), 0),
        (("not run",), 4),
        ((), 4),
        (("pass", "inconclusive"), 4),
        (("pass", "inconclusive", "error"), 3),
        (("error",), 3),
        (("pass", "inconclusive", "error", "fail"), 1),
        (("fail", "not run"), 1),
    ],
)
def test_exit_code(statuses: tuple[Status, ...], code: int) -> None:
    assert exit_code(verdicts_with(*statuses)) == code


def test_junit_reads_back_and_tells_the_outcomes_apart() -> None:
    statuses: tuple[Status, ...] = ("pass", "fail", "inconclusive", "error", "not run")
    suite = ElementTree.fromstring(junit(verdicts_with(*statuses), "digits"))  # noqa: S314 (it is our own)
    assert suite.tag == "testsuite"
    assert suite.get("name") == "crqat gate digits"
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["5", "1", "2", "1"]
    cases = suite.findall("testcase")
    assert [case.get("classname") for case in cases] == [f"{i}.onnx" for i in range(5)]
    assert {case.get("name") for case in cases} == {"accuracy_drop"}
    outcomes = [(case[0].tag, case[0].get("type")) for case in cases]
    assert outcomes == [
        ("system-out", None),
        ("failure", "fail"),
        ("error", "inconclusive"),
        ("error", "error"),
        ("skipped", "not run"),
    ]
    assert [case[0].get("message") for case in cases[1:]] == ["why"] * 4


def test_junit_holds_any_text_a_runtime_may_leave() -> None:
    message = 'a\x00b\x1b[31m<&">\ud800\uffff\U0001f600'
    verdict = Verdict("measurement", "\x07.onnx", "error", None, None, None, None, message)
    text = junit([verdict], "run\x01")
    suite = ElementTree.fromstring(text.encode())  # noqa: S314 (it is our own)
    assert suite[0][0].get("message") == 'a\ufffdb\ufffd[31m<&">\ufffd\ufffd\U0001f600'
    assert suite[0].get("classname") == "\ufffd.onnx"
    assert suite.get("name") == "crqat gate run\ufffd"


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def holds(written: Any, data: Any) -> bool:
    """Whether everything in `data` is in `written` as it was, apart from what is null or empty."""
    if isinstance(data, dict):
        return all(holds(written[key], value) for key, value in data.items() if value not in (None, [], {}))
    return bool(written == data)


def test_results_read_back_as_they_were_written(tmp_path: Path) -> None:
    not_run = {"latency": {"status": "not run: no CUDA device"}}
    failed = {**model(), "status": "failed: x", "accuracy": None, "latency": None, "versus_float": None}
    for quantized in (
        model(),
        model(drop_points=0),
        {**model(latency_ratio=None, latency_ratio_interval=None), **not_run},
        failed,
        {**model(), "verification": None},
        {**model(), "target": "tensorrt", "engine": engine(0.5), "findings": ["a rule"]},
        {**model(), "target": "tensorrt", "engine": engine(None)},
        {**model(), "target": "tensorrt", "engine": {"status": "not run: x"}, "findings": []},
    ):
        data = results(quantized)
        written = to_json(read_results(write(tmp_path / "results.json", data)))
        assert holds(written, data)
        assert from_json(Results, written) == from_json(Results, data)


def at(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets the value at these keys, or removes it if the value is Ellipsis."""

    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        if value is ...:
            del data[keys[-1]]
        else:
            data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (at("schema_version", value=2), "written by a newer crqat with schema version 2, and this crqat reads 1"),
        (at("schema_version", value=0), "written by an older crqat with schema version 0"),
        (at("schema_version", value="1"), "schema_version is not an integer"),
        (at("run", value=...), "run is missing"),
        (at("config", value={"threads": 1, "require": "tensorrt"}), "config.require is not a list"),
        (at("models", value=[]), "models is not an object"),
        (at("models", FILE, value=3), f"models.{FILE} is not"),
        (at("models", FILE, "target", value=...), f"models.{FILE}.target is missing"),
        (at("models", FILE, "status", value=None), f"models.{FILE}.status is not a text"),
        (at("models", FILE, "accuracy", value=None), f"models.{FILE} has status measured but no accuracy"),
        (at("models", FILE, "accuracy", "n", value=1.5), f"models.{FILE}.accuracy.n is not an integer"),
        (at("models", FILE, "latency", "rounds", value=...), f"models.{FILE}.latency.rounds is missing"),
        (
            at("models", FILE, "latency", "unstable", value=True),
            "latency.unstable is not false or a text",
        ),
        (at("models", FILE, "versus_float", "drop_points", value="0"), "versus_float.drop_points is not a finite"),
        (at("models", FILE, "versus_float", "drop_points", value=True), "versus_float.drop_points is not a finite"),
        (at("models", FILE, "versus_float", "agreement", value=float("nan")), "NaN is not a number in JSON"),
        (at("models", FILE, "versus_float", "size_ratio", value=...), "size_ratio is missing"),
        (
            at("models", FILE, "versus_float", "drop_interval_points", value=[1]),
            "drop_interval_points is not a list",
        ),
        (at("models", FILE, "versus_float", "drop_interval_points", value=[2, 1]), "drop_interval_points is not an in"),
        (
            at("models", FILE, "versus_float", "agreement_interval", value=[0, "1"]),
            "agreement_interval[1] is not a finite",
        ),
        (
            at("models", FILE, "versus_float", "latency_ratio_interval", value=None),
            "has latency_ratio without latency_ratio_interval",
        ),
        (at("models", FILE, "verification", "codes", value=...), "verification.codes is missing"),
        (
            at("models", FILE, "engine", value=engine(coverage={"nodes": 1, "int8_nodes": 1})),
            "engine.coverage.by_macs is missing",
        ),
        (at("config", value={"threads": 1, "require": [None]}), "config.require[0] is not a text"),
    ],
)
def test_damaged_results_are_refused_by_file_and_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    data = results(model())
    change(data)
    with pytest.raises(UsageError) as caught:
        read_results(write(tmp_path / "results.json", data))
    assert str(tmp_path / "results.json") in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (at("engine", value=[]), "engine is not an object"),
        (at("engine", "status", value=...), "engine.status is missing"),
        (at("engine", "coverage", value=...), "engine has status built but no coverage"),
        (at("engine", "coverage", "by_macs", value="1"), "engine.coverage.by_macs is not a finite"),
        (at("engine", "coverage", "nodes", value=1.5), "engine.coverage.nodes is not an integer"),
        (at("engine", "counts", "reformat", value=...), "engine.counts.reformat is missing"),
        (at("engine", "uncovered", value=[{"node": "a"}]), r"engine.uncovered[0].reason is missing"),
        (at("engine", "remarks", value=[{"severity": 1}]), 'engine.remarks[0].severity is not "error"'),
        (at("engine", "remarks", value=["error"]), r"engine.remarks[0] is not an object"),
        (at("engine", "builder", value="x"), "engine.builder is not an object"),
        (at("findings", value="x"), "findings is not a list"),
    ],
)
def test_a_damaged_engine_is_refused_likewise(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    damaged = {**model(), "target": "tensorrt", "engine": engine()}
    change(damaged)
    with pytest.raises(UsageError) as caught:
        read_results(write(tmp_path / "results.json", results(damaged)))
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"results\.json"):
        read_results(write(tmp_path / "results.json", text))


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing; run the benchmark again with --force"):
        read_results(tmp_path / "results.json")
    with pytest.raises(UsageError, match=r"a directory; name the file in it"):
        read_results(tmp_path)


def test_a_recipe_is_held_to_the_limits_ranges() -> None:
    adapter = TypeAdapter(GateConfig)
    assert adapter.validate_python({"max_accuracy_drop": 2}) == GateConfig(max_accuracy_drop=2)
    for wrong in (
        {"max_accuracy_drop": -1},
        {"min_agreement": 1.1},
        {"max_latency_ratio": 0},
        {"max_drop": 1},
        {"min_int8_coverage": 100},
        {"max_reformat_layers": -1},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_a_builder_that_was_stopped_is_an_error_and_says_nothing_of_the_file() -> None:
    engine = {"status": "failed: process: stopped", "failure": {"stage": "process"}, "coverage": None, "counts": None}
    verdicts = judge(results({**model(), "target": "tensorrt", "engine": engine}), GateConfig())
    assert next(v.status for v in verdicts if v.rule == "engine") == "error"
    assert exit_code(verdicts) == 3


def test_a_float16_file_that_fails_decides_nothing() -> None:
    data = results(model())
    data["models"]["float16.onnx"] = {**model(), "target": "float16", "status": "failed: x", "versus_float": None}
    assert exit_code(judge(data, ALL_RULES)) == 0


FROZEN = json.loads((Path(__file__).parents[2] / "frozen" / "v1" / "frozen" / "benchmark" / "results.json").read_text())
WORDS = st.text(max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.just("measured")
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)


@st.composite
def changed_results(draw: st.DrawFn) -> Any:
    """Real results in which up to three values, at any depth, are anything or gone."""
    data = copy.deepcopy(FROZEN)
    for _ in range(draw(st.integers(1, 3))):
        inner: Any = data
        while inner:
            key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
            if not isinstance(inner[key], dict | list) or not inner[key] or draw(st.integers(0, 4)) == 0:
                inner[key] = draw(ANYTHING)
                if isinstance(inner, dict) and draw(st.integers(0, 3)) == 0:
                    del inner[key]
                break
            inner = inner[key]
    return data


@settings(max_examples=100, deadline=None)
@given(changed_results())
def test_any_results_are_judged_or_refused_in_one_line(data: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "results.json", data)
        try:
            read = read_results(path)
            verdicts = rules.judge(read, ALL_RULES) + latency_regression.judge(read, read, 1.1)
        except UsageError as error:
            assert str(error).isprintable() and "\n" not in str(error)
            return
    ElementTree.fromstring(junit(verdicts, "run"))  # noqa: S314 - our own
    assert exit_code(verdicts) in (0, 1, 3, 4)


def float_verdicts(top1: float, n: int, known: KnownAccuracy | None = None, **limits: Any) -> dict[str, Verdict]:
    data = results(model(), accuracy={"n": n, "top1": top1, "top1_interval": [0.0, 1.0], "chance": 0.1})
    return {v.rule: v for v in judge(data, GateConfig(**limits), known) if v.file == "float.onnx"}


@pytest.mark.parametrize(
    ("top1", "n", "status"),
    [
        (0.1, 10_000, "fail"),
        (0.13, 10_000, "fail"),
        (0.33, 10_000, "pass"),
        (0.3, 20, "inconclusive"),
        (0.8, 20, "pass"),
    ],
)
def test_a_float_model_at_chance_fails_without_any_limit(top1: float, n: int, status: Status) -> None:
    verdict = float_verdicts(top1, n)["float_accuracy"]
    assert verdict.status == status
    assert f"of {n} test images; chance is 10.00 %" in verdict.message
    assert ("data.mean" in verdict.message) == (status == "fail")
    assert (verdict.images_needed is not None) == (status == "inconclusive")


def test_whoever_sets_a_minimum_says_what_is_enough() -> None:
    assert float_verdicts(0.13, 10_000, min_accuracy=0.12)["float_accuracy"].status == "pass"
    assert float_verdicts(0.1, 10_000, min_accuracy=0.12)["float_accuracy"].status == "inconclusive"
    assert float_verdicts(0.08, 10_000, min_accuracy=0.05)["float_accuracy"].status == "fail"


@pytest.mark.parametrize(
    ("top1", "n", "status"),
    [(0.33, 10_000, "fail"), (0.85, 10_000, "fail"), (0.865, 10_000, "pass"), (0.8, 50, "pass")],
)
def test_a_float_model_far_below_what_it_is_known_to_do_fails(top1: float, n: int, status: Status) -> None:
    verdict = float_verdicts(top1, n, KnownAccuracy(0.87, "model.accuracy", 1.0))["known_accuracy"]
    assert verdict.status == status
    assert "model.accuracy says 87.00 %" in verdict.message


@pytest.mark.parametrize(
    ("allowed", "status"), [(0.93, "pass"), (0.95, "inconclusive"), (0.94, "inconclusive"), (0.97, "fail")]
)
def test_a_least_accuracy_is_judged_by_its_interval(allowed: float, status: Status) -> None:
    verdicts = judge(results(model()), GateConfig(min_accuracy=allowed))
    (verdict,) = (v for v in verdicts if v.rule == "accuracy")
    assert (verdict.file, verdict.status, verdict.measured, verdict.n) == (FILE, status, 0.95, 797)
    assert verdict.message.startswith("0.9500 [0.93")
    if allowed == 0.95:
        assert verdict.images_needed is None
        assert verdict.message.endswith("more test images would not decide: the measured value equals the limit")


def test_an_inconclusive_drop_says_how_many_images_would_decide() -> None:
    b, c = 14, 8
    interval = [100 * bound for bound in tango(b, c, 797)]
    quantized = model(
        drop_points=100 * (b - c) / 797, drop_interval_points=interval, only_float_right=b, only_this_right=c
    )
    verdict = verdict_on("accuracy_drop", quantized)
    needed = verdict.images_needed
    assert (verdict.status, needed is not None) == ("inconclusive", True)
    assert verdict.message.endswith(f"about {needed:,} test images would decide if the rates stay as they are")
    factor = (needed or 0) / 797
    assert (
        100 * tango(math.ceil(b * factor * 1.01), math.floor(c * factor * 1.01), round(797 * factor * 1.01))[1] < 1.05
    )
    assert 100 * tango(round(b * factor * 0.9), round(c * factor * 0.9), round(797 * factor * 0.9))[1] > 1.0
    agreement = verdict_on("agreement", model(agreement=0.96, agreement_interval=[0.94, 0.97]))
    assert f"about {agreement.images_needed:,} test images would decide" in agreement.message
    assert verdict_on("agreement", model()).images_needed is None


@pytest.mark.parametrize(
    ("counts", "limit", "status"),
    [((700, 9, 6), 0.97, "pass"), ((700, 60, 6), 0.99, "fail"), ((700, 9, 6), 0.99, "inconclusive")],
)
def test_what_is_kept_of_the_float_models_accuracy_is_judged_by_the_ratio(
    counts: tuple[int, int, int], limit: float, status: Status
) -> None:
    names = ("both_right", "only_float_right", "only_this_right")
    data = results(model(**dict(zip(names, counts, strict=True))))
    (verdict,) = (v for v in judge(data, GateConfig(relative_accuracy=limit)) if v.rule == "relative_accuracy")
    low, high = ratio_bounds(*counts, 797)
    assert (verdict.status, verdict.interval) == (status, (low, high))
    assert verdict.measured == (counts[0] + counts[2]) / (counts[0] + counts[1])
    assert ("test images would decide" in verdict.message) == (status == "inconclusive")


def test_a_ratio_is_not_judged_where_the_images_were_not_counted() -> None:
    (verdict,) = (
        v for v in judge(results(model()), GateConfig(relative_accuracy=0.99)) if v.rule == "relative_accuracy"
    )
    assert verdict.status == "inconclusive" and "run it again" in verdict.message


def test_without_a_limit_any_drop_is_kept_to() -> None:
    verdicts = judge(
        results(model(drop_points=50.0, drop_interval_points=[40.0, 60.0])), GateConfig(max_accuracy_drop=None)
    )
    assert not any(verdict.rule == "accuracy_drop" or verdict.status == "fail" for verdict in verdicts)
