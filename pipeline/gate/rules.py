"""The `gate` stage: judges a benchmark's results against limits. It measures nothing.

A bound that is uncertain is judged by its interval: it passes if the whole interval is within the limit, fails if the
whole interval is beyond it, and is inconclusive otherwise. What was not run neither passes nor fails.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal
from xml.etree import ElementTree

from crqat.core.field_bounds import STRICT, Range
from crqat.core.targets import TARGETS, builds_engine

# What is compared with, and has nothing to prove.
BASELINES = ("float", "float16", "float_openvino")
# The share of the way from chance to always right that a float model must be proven to have gone where no limit is set.
BEYOND_CHANCE = 0.1
NO_ENGINE = "not run: the benchmark is of a version that built no engine; run it again"
Status = Literal["pass", "fail", "inconclusive", "not run", "error"]


@dataclass(frozen=True)
class GateConfig:
    """What every quantized model must keep to.

    Attributes:
        max_accuracy_drop: Percentage points of top-1 accuracy that it may lose against the float model.
        min_agreement: Share of the test images on which it must answer as the float model does.
        min_accuracy: Share of the test images that it must answer rightly (top-1), such as 0.9; without it the float
            model must be clearly better than chance.
        max_latency_ratio: Its latency divided by the float model's.
        max_latency_regression: Its latency divided by that of the same file in the baseline that the gate is given.
        max_size_ratio: Its file size divided by the float model's.
        min_int8_coverage: Share of the multiply-accumulates of Conv and Gemm that its TensorRT engine computes in INT8.
        max_reformat_layers: Layers of its TensorRT engine that only change type or layout.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    max_accuracy_drop: Annotated[float, Range(ge=0, le=100)] = 1.0
    min_agreement: Annotated[float, Range(ge=0, le=1)] | None = None
    min_accuracy: Annotated[float, Range(ge=0, le=1)] | None = None
    max_latency_ratio: Annotated[float, Range(gt=0)] | None = None
    max_latency_regression: Annotated[float, Range(gt=0)] | None = None
    max_size_ratio: Annotated[float, Range(gt=0)] | None = None
    min_int8_coverage: Annotated[float, Range(ge=0, le=1)] | None = 1.0
    max_reformat_layers: Annotated[int, Range(ge=0)] | None = None


@dataclass(frozen=True)
class KnownAccuracy:
    """What the float model's accuracy is known to be.

    Attributes:
        share: Of the test images answered rightly.
        source: Who says so.
        points: How many percentage points below it are still what was said.
    """

    share: float
    source: str
    points: float


@dataclass(frozen=True)
class Verdict:
    """One rule on one file.

    Attributes:
        rule: "measurement", "required", "findings", "verification", "codes_on_this_cpu", "engine", "int8_coverage",
            "reformat_layers", "accuracy_drop", "agreement", "accuracy", "latency_ratio", "latency_regression" or
            "size_ratio"; of the float model "float_accuracy" or "known_accuracy".
        file: The model's file.
        status: "error" means that the environment kept the rule from being judged.
        measured: In the rule's own unit; None if there is no number.
        interval: What the rule was judged by; None for what is exact.
        allowed: The limit.
        n: Images, inference rounds or codes behind `measured`.
        message: One line.
        images_needed: Of an inconclusive rule on test images: about how many would decide it if the measured rates
            stay; None if no number would, or where n counts something else.
    """

    rule: str
    file: str
    status: Status
    measured: float | None
    interval: tuple[float, float] | None
    allowed: float | None
    n: int | None
    message: str
    images_needed: int | None = None


def judge(results: dict[str, Any], config: GateConfig, known: KnownAccuracy | None = None) -> list[Verdict]:
    """Apply every rule that has a limit to every quantized model, and those without to the float model.

    Args:
        results: What `crqat.runtime_eval.benchmark` returned or `read_results` read.
        config: The limits.
        known: What the float model's accuracy should be.
    """
    verdicts = []
    models: dict[str, Any] = results["models"]
    float_latencies = {model["target"]: model["latency"] or {} for model in models.values()}
    for file, model in models.items():
        if model["status"] != "measured" and model["target"] != "float16":  # no rule needs that one
            # Not run: its accuracy, which always has a limit, is neither kept nor broken, and that must not pass.
            status: Status = "inconclusive" if model["status"].startswith("not run") else "error"
            verdicts.append(_plain("measurement", file, status, model["status"]))
        elif model["status"] == "measured" and model["target"] not in BASELINES and model["versus_float"] is None:
            verdicts.append(
                _plain("measurement", file, "error", "the float model that it is compared with has no result")
            )
        if model["target"] == "float" and model["status"] == "measured":
            verdicts += _float_accuracy(file, model["accuracy"], config, known)
        if model["target"] in BASELINES:
            continue
        if model.get("findings"):
            number, first = len(model["findings"]), model["findings"][0]
            verdicts.append(_plain("findings", file, "fail", f"exported with --unsafe, breaks {number} rules: {first}"))
        if model["target"] != "openvino":  # the file is ONNX Runtime's, under whose name its proof is judged
            verdicts.append(_verification(file, model["verification"]))
        if model.get("codes_on_this_cpu") is not None:
            verdicts.append(_codes(file, model["codes_on_this_cpu"]))
        if builds_engine(model["target"]):
            engine = model.get("engine") or {"status": NO_ENGINE}
            verdicts += _engine(file, engine, (model.get("float_layers") or {}).get("share", 0.0), config)
        if model["status"] == "measured" and model["versus_float"] is not None:
            baseline = "float_openvino" if model["target"] == "openvino" else "float"
            verdicts += _limits(file, model, float_latencies.get(baseline, {}).get("unstable", False), config)
    return verdicts + _required(models, results.get("config", {}).get("require", []))


def _required(models: dict[str, Any], runtimes: Sequence[str]) -> list[Verdict]:
    """An error for each runtime that must be measured and was not."""
    verdicts = []
    for runtime in runtimes:
        found = {file: model for file, model in models.items() if model["target"] == runtime}
        if not found:
            # Whose file it runs.
            target = next((name for name, target in TARGETS.items() if runtime in target.runs_also), runtime)
            message = f"no file for {runtime}, which benchmark.require names; add {target} to export.targets"
            verdicts.append(_plain("required", runtime, "error", message))
        for file, model in found.items():
            latency = model["latency"] or {"status": model["status"]}
            if latency["status"] != "measured":
                message = f"{latency['status']}, and benchmark.require names {runtime}"
                verdicts.append(_plain("required", file, "error", message))
    return verdicts


def _plain(rule: str, file: str, status: Status, message: str) -> Verdict:
    return Verdict(rule, file, status, None, None, None, None, message)


def _verification(file: str, verification: dict[str, Any] | None) -> Verdict:
    """The export's proof in integer codes: it must be there, have compared something, and have passed."""
    if verification is None:
        return _plain("verification", file, "fail", "the export did not verify this file; export it again")
    codes, differing, images = verification["codes"], verification["differing_codes"], verification["images"]
    figures = f"{differing} of {codes} codes differ on {images} images"
    if verification["status"].startswith("not run"):
        # Not disproven, but not proven either: it must not pass.
        return _plain("verification", file, "inconclusive", verification["status"])
    status: Status = "pass" if verification["status"] == "passed" and codes > 0 else "fail"
    message = figures if verification["status"] == "passed" else f"{verification['status']}; {figures}"
    return Verdict("verification", file, status, differing, None, None, codes, message)


def _codes(file: str, counted: dict[str, Any]) -> Verdict:
    """The same proof on the CPU that was measured: an export is verified on one machine and runs on another."""
    status: Status = "pass" if counted["status"] == "passed" and counted["codes"] > 0 else "fail"
    figures = f"{counted['differing']} of {counted['codes']} codes differ on {counted['images']} images"
    message = figures if counted["status"] == "passed" else f"{counted['status']}; {figures}"
    return Verdict("codes_on_this_cpu", file, status, counted["differing"], None, None, counted["codes"], message)


def _engine(file: str, engine: dict[str, Any], in_float: float, config: GateConfig) -> list[Verdict]:
    """The rules on a TensorRT engine: that it was built as the file says, and what its plan is.

    INT8 is asked of all layers but those that `quantization.float_layers` names: `in_float` is their share of the MACs.

    Where none was built because the builder is missing, nothing passes and nothing fails. A builder that died or was
    stopped says nothing of the file.
    """
    verdicts = []
    if engine["status"].startswith("not run"):
        first: Status = "not run"
    elif engine["status"] != "built":
        first = "error" if (engine.get("failure") or {}).get("stage") == "process" else "fail"
    else:
        first = "fail" if any(remark["severity"] == "error" for remark in engine["remarks"]) else "pass"
    verdicts.append(_plain("engine", file, first, _of_engine(engine)))
    built, unbuilt = engine["status"] == "built", "not run: there is no engine"
    if config.min_int8_coverage is not None:
        share, allowed = engine["coverage"]["by_macs"] if built else None, config.min_int8_coverage
        if share is None:
            why = "not run: the file has no Conv or Gemm whose MACs are known" if built else unbuilt
            verdicts.append(Verdict("int8_coverage", file, "not run", None, None, allowed, None, why))
        else:
            status: Status = "pass" if share >= allowed else "fail"
            message = _of_coverage(engine, allowed, in_float)
            nodes = engine["coverage"]["nodes"]
            verdicts.append(Verdict("int8_coverage", file, status, share, None, allowed, nodes, message))
    if config.max_reformat_layers is not None:
        limit = config.max_reformat_layers
        if built:
            found = engine["counts"]["reformat"]
            message = f"{found} of {engine['counts']['layers']} layers only change type or layout, allowed {limit}"
            status = "pass" if found <= limit else "fail"
            verdicts.append(Verdict("reformat_layers", file, status, found, None, limit, None, message))
        else:
            verdicts.append(Verdict("reformat_layers", file, "not run", None, None, limit, None, unbuilt))
    return verdicts


def _of_engine(engine: dict[str, Any]) -> str:
    if engine["status"] != "built":
        return str(engine["status"])
    wrong = [remark for remark in engine["remarks"] if remark["severity"] == "error"]
    by = f"{engine['builder']['name']} {engine['builder']['version']}"
    if not wrong:
        return f"built by {by}, which has nothing against it"
    at = f", first at {wrong[0]['nodes'][0]}" if wrong[0]["nodes"] else ""
    return f"built by {by}, but {wrong[0]['message']} ({wrong[0]['count']} times{at})"


def _of_coverage(engine: dict[str, Any], allowed: float, in_float: float) -> str:
    covered = engine["coverage"]
    asked = f"; besides, float_layers keeps {100 * in_float:.2f} % of the network's in float" if in_float else ""
    text = (
        f"{100 * covered['by_macs']:.2f} % of the MACs, {covered['int8_nodes']} of {covered['nodes']} Conv and Gemm, "
        f"required {100 * allowed:g} %{asked}"
    )
    missing = [f"{entry['node']} {entry['reason']}" for entry in engine["uncovered"][:1]]
    return "; ".join([text, *missing])


def _float_accuracy(
    file: str, accuracy: dict[str, Any], config: GateConfig, known: KnownAccuracy | None
) -> list[Verdict]:
    """Whether the float model knows anything, and what it is known to know: a small drop from nothing is no success.

    Where the user says what accuracy is enough, `min_accuracy`, it is compared with chance itself.
    """
    verdicts = []
    if accuracy.get("chance") is not None:
        beyond = BEYOND_CHANCE if config.min_accuracy is None else 0.0
        allowed = accuracy["chance"] + beyond * (1 - accuracy["chance"])
        verdict = _at_least("float_accuracy", file, accuracy["top1"], accuracy["n"], allowed)
        text = f"{_percent(verdict)}; chance is {100 * accuracy['chance']:.2f} %"
        if verdict.status == "fail":
            text += (
                ", and it is hardly better: its weights, data.mean and data.std, or labels are not what they should be"
            )
        verdicts.append(_with_images(replace(verdict, message=text)))
    if known is not None:
        floor = known.share - known.points / 100
        verdict = _at_least("known_accuracy", file, accuracy["top1"], accuracy["n"], floor)
        text = f"{_percent(verdict)}; {known.source} says {100 * known.share:.2f} %"
        if verdict.status != "fail":  # it would take more images to be sure, and nobody asked for more
            verdict = replace(verdict, status="pass")
        else:
            text += ": data.mean, data.std, data.size, data.crop or the weights are other ones"
        verdicts.append(replace(verdict, message=text))
    return verdicts


def _percent(verdict: Verdict) -> str:
    low, high = verdict.interval or (0.0, 1.0)
    measured = verdict.measured or 0.0
    return f"{100 * measured:.2f} [{100 * low:.2f}, {100 * high:.2f}] % of {verdict.n} test images"


def _at_least(rule: str, file: str, share: float, n: int, allowed: float) -> Verdict:
    """The verdict on a lower limit of a share of the test images."""
    from crqat.runtime_eval.measure.accuracy import images_for_share, wilson

    low, high = wilson(round(share * n), n)
    status: Status = "pass" if low >= allowed else "fail" if high < allowed else "inconclusive"
    needed = images_for_share(share, allowed) if status == "inconclusive" else None
    message = f"{share:.4f} [{low:.4f}, {high:.4f}] of {n} test images, required {allowed:g}"
    return Verdict(rule, file, status, share, (low, high), allowed, n, message, needed)


def _with_images(verdict: Verdict) -> Verdict:
    """An inconclusive verdict whose message says how many test images would decide."""
    if verdict.status != "inconclusive":
        return replace(verdict, images_needed=None)
    needed = verdict.images_needed
    text = "no number of test images would decide: what was measured is the limit itself"
    if needed is not None:
        text = f"about {needed:,} test images would decide if the rates stay as they are"
    return replace(verdict, message=f"{verdict.message}; {text}")


def _limits(file: str, model: dict[str, Any], float_unstable: str | bool, config: GateConfig) -> list[Verdict]:
    versus, n = model["versus_float"], model["accuracy"]["n"]
    drop = at_most(
        ("accuracy_drop", file, n, "test images"),
        versus["drop_points"],
        versus["drop_interval_points"],
        config.max_accuracy_drop,
        " points",
    )
    if "only_float_right" in versus:
        from crqat.runtime_eval.measure.accuracy import images_for_difference

        counts = (versus["only_float_right"], versus["only_this_right"])
        needed = images_for_difference(*counts, n, config.max_accuracy_drop / 100)
        drop = _with_images(replace(drop, images_needed=needed))
    verdicts = [drop]
    if config.min_agreement is not None:
        from crqat.runtime_eval.measure.accuracy import images_for_share

        low, high = versus["agreement_interval"]
        allowed = config.min_agreement
        status: Status = "pass" if low >= allowed else "fail" if high < allowed else "inconclusive"
        message = f"{versus['agreement']:.4f} [{low:.4f}, {high:.4f}] of {n} test images, required {allowed:g}"
        needed = images_for_share(versus["agreement"], allowed)
        interval = (low, high)
        agreement = Verdict("agreement", file, status, versus["agreement"], interval, allowed, n, message, needed)
        verdicts.append(_with_images(agreement))
    if config.min_accuracy is not None:
        share = model["accuracy"]["top1"]
        verdicts.append(_with_images(_at_least("accuracy", file, share, n, config.min_accuracy)))
    if config.max_latency_ratio is not None:
        verdicts.append(_latency(file, model, float_unstable, config.max_latency_ratio))
    if config.max_size_ratio is not None:
        ratio, allowed = versus["size_ratio"], config.max_size_ratio
        message = f"{ratio:.4f} of the float file, allowed {allowed:g}"
        status = "pass" if ratio <= allowed else "fail"
        verdicts.append(Verdict("size_ratio", file, status, ratio, None, allowed, None, message))
    return verdicts


def at_most(
    what: tuple[str, str, int, str], measured: float, interval: Sequence[float], allowed: float, unit: str
) -> Verdict:
    """The verdict on an upper limit; `what` is rule, file, n and what n counts."""
    rule, file, n, counted = what
    low, high = interval
    status: Status = "pass" if high <= allowed else "fail" if low > allowed else "inconclusive"
    message = f"{measured:.3f} [{low:.3f}, {high:.3f}]{unit} over {n} {counted}, allowed {allowed:g}"
    return Verdict(rule, file, status, measured, (low, high), allowed, n, message)


def _latency(file: str, model: dict[str, Any], float_unstable: str | bool, allowed: float) -> Verdict:
    latency, versus = model["latency"], model["versus_float"]
    if latency["status"] != "measured":
        return Verdict("latency_ratio", file, "not run", None, None, allowed, None, latency["status"])
    if versus["latency_ratio"] is None:
        message = "not run: the float model was timed in another runtime"
        return Verdict("latency_ratio", file, "not run", None, None, allowed, None, message)
    what = ("latency_ratio", file, latency["rounds"], "rounds")
    verdict = at_most(what, versus["latency_ratio"], versus["latency_ratio_interval"], allowed, " of float")
    for name, unstable in (("the float model", float_unstable), (file, latency["unstable"])):
        if unstable:
            message = f"{verdict.message}; {name} is unstable: {unstable}"
            return Verdict(*what[:2], "inconclusive", verdict.measured, verdict.interval, allowed, what[2], message)
    return verdict


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 if a rule failed; else 3 for an error; else 4 if one is inconclusive or nothing passed; else 0.

    A failure comes first because it is proven whatever else could not be measured.
    """
    statuses = {verdict.status for verdict in verdicts}
    if "fail" in statuses:
        return 1
    if "error" in statuses:
        return 3
    return 0 if "pass" in statuses and "inconclusive" not in statuses else 4


def junit(verdicts: Sequence[Verdict], run: str) -> str:
    """JUnit XML, one testcase for each rule and file.

    JUnit knows four outcomes: "fail" becomes `failure`, "not run" `skipped`, and both "inconclusive" and "error" become
    `error` with that word as the type.
    """
    count = [verdict.status for verdict in verdicts].count
    suite = ElementTree.Element(
        "testsuite",
        name=_xml_text(f"crqat gate {run}"),
        tests=str(len(verdicts)),
        failures=str(count("fail")),
        errors=str(count("inconclusive") + count("error")),
        skipped=str(count("not run")),
    )
    tags = {"fail": "failure", "inconclusive": "error", "error": "error", "not run": "skipped"}
    for verdict in verdicts:
        message = _xml_text(verdict.message)
        case = ElementTree.SubElement(suite, "testcase", classname=_xml_text(verdict.file), name=verdict.rule)
        if verdict.status == "pass":
            ElementTree.SubElement(case, "system-out").text = message
        else:
            ElementTree.SubElement(case, tags[verdict.status], type=verdict.status, message=message)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def _xml_text(text: str) -> str:
    """The text with each character that XML 1.0 cannot hold (a runtime's last words may have any) as U+FFFD."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
