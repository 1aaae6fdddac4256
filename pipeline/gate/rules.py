"""The `gate` stage: judges a benchmark's results against limits. It measures nothing.

A measured value with an interval passes if the whole interval is within the limit, fails if the whole interval is
beyond it, and is inconclusive otherwise. A rule that was not run neither passes nor fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from crqat.core.field_bounds import STRICT, Range
from crqat.core.results.benchmark import MEASURED, Accuracy, CountedCodes, ModelResult, Results, VersusFloat
from crqat.core.results.engine import BUILT, Coverage, EngineSummary, Uncovered
from crqat.core.results.verdict import Status, Verdict
from crqat.core.results.verification import Verification
from crqat.core.targets import TARGETS, builds_engine

# The file that the others are compared with.
BASELINES = ("float", "float16", "float_openvino")
# Without a limit, a float model must reach this share of the distance from chance to perfect accuracy.
BEYOND_CHANCE = 0.1
NO_ENGINE = "not run: the benchmark was run by a version of crqat that built no engine; run it again"


@dataclass(frozen=True)
class GateConfig:
    """Limits that every quantized model must meet.

    Attributes:
        max_accuracy_drop: Percentage points of top-1 accuracy that the model may lose against the float model; None
            allows any loss.
        relative_accuracy: Share of the float model's top-1 accuracy that the model must keep, such as MLPerf's 0.99.
        min_agreement: Share of the test images on which the model must predict the same class as the float model.
        min_accuracy: Share of the test images that the model must classify correctly (top-1), such as 0.9; without it
            the float model must be clearly better than chance.
        max_latency_ratio: Largest allowed value of the model's latency divided by the float model's.
        max_latency_regression: Largest allowed value of the model's latency divided by that of the same file in the
            earlier results given with `crqat gate --baseline`.
        max_size_ratio: Largest allowed value of the file's size divided by that of the float model's file.
        min_int8_coverage: Share of the multiply-accumulates of Conv and Gemm that the TensorRT engine must compute in
            INT8.
        max_reformat_layers: Largest number of TensorRT engine layers that only change type or layout.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    max_accuracy_drop: Annotated[float, Range(ge=0, le=100)] | None = 1.0
    relative_accuracy: Annotated[float, Range(gt=0, le=1)] | None = None
    min_agreement: Annotated[float, Range(ge=0, le=1)] | None = None
    min_accuracy: Annotated[float, Range(ge=0, le=1)] | None = None
    max_latency_ratio: Annotated[float, Range(gt=0)] | None = None
    max_latency_regression: Annotated[float, Range(gt=0)] | None = None
    max_size_ratio: Annotated[float, Range(gt=0)] | None = None
    min_int8_coverage: Annotated[float, Range(ge=0, le=1)] | None = 1.0
    max_reformat_layers: Annotated[int, Range(ge=0)] | None = None


@dataclass(frozen=True)
class KnownAccuracy:
    """Expected accuracy of the float model from another source.

    Attributes:
        share: Share of the test images classified correctly.
        source: Who publishes `share`, in words.
        points: Tolerance below `share`, in percentage points.
    """

    share: float
    source: str
    points: float


def judge(results: Results, config: GateConfig, known: KnownAccuracy | None = None) -> list[Verdict]:
    """Return the gate's verdicts on all models of a benchmark, one for each model and rule that applies to it.

    A quantized model is judged by the rules that need no limit, such as its verification, and by each rule whose limit
    in `config` is set. The float model's accuracy is compared with chance and with `known`.

    Args:
        results: Results from `crqat.runtime_eval.benchmark` or from results.json.
        config: Limits of the gate.
        known: Expected accuracy of the float model, if known.
    """
    verdicts = []
    timed = {model.target: model.timed for model in results.models.values()}
    for file, model in results.models.items():
        measured = model.status == MEASURED
        if not measured and model.target != "float16":  # no rule needs the float16 model
            # Accuracy always has a limit. A file that did not run neither meets nor breaks it, and that must not pass.
            status: Status = "inconclusive" if model.status.startswith("not run") else "error"
            verdicts.append(_plain("measurement", file, status, model.status))
        elif measured and model.target not in BASELINES and model.versus_float is None:
            verdicts.append(
                _plain("measurement", file, "error", "the float model that the file is compared with has no result")
            )
        if model.target == "float" and measured and model.accuracy is not None:
            verdicts += _float_accuracy(file, model.accuracy, config, known)
        if model.target in BASELINES:
            continue
        if model.findings:
            number, first = len(model.findings), model.findings[0]
            verdicts.append(_plain("findings", file, "fail", f"exported with --unsafe, breaks {number} rules: {first}"))
        if model.target != "openvino":  # the file is ONNX Runtime's, and its verification is judged there
            verdicts.append(_verification(file, model.verification))
        if model.codes_on_this_cpu is not None:
            verdicts.append(_codes(file, model.codes_on_this_cpu))
        if builds_engine(model.target):
            in_float = 0.0 if model.float_layers is None else model.float_layers.share
            verdicts += _engine(file, model.engine or EngineSummary(status=NO_ENGINE), in_float, config)
        if measured and model.accuracy is not None and model.versus_float is not None:
            verdicts += _limits(file, model.accuracy, model.versus_float, config)
            if config.max_latency_ratio is not None:
                base = timed.get("float_openvino" if model.target == "openvino" else "float")
                float_unstable = False if base is None else base.unstable
                verdicts.append(_latency(file, model, model.versus_float, float_unstable, config.max_latency_ratio))
            if config.max_size_ratio is not None:
                verdicts.append(_size(file, model.versus_float.size_ratio, config.max_size_ratio))
    return verdicts + _required(results.models, results.config.require)


def on_images(name: str, accuracy: Accuracy, versus: VersusFloat, config: GateConfig) -> list[Verdict]:
    """Return the verdicts of the rules on accuracy and agreement, which can judge a network before it is exported.

    Args:
        name: Name of the network.
        accuracy: Accuracy of the network on some images.
        versus: Comparison with the float network on the same images.
        config: Limits of the gate.
    """
    return _limits(name, accuracy, versus, config)


def _required(models: Mapping[str, ModelResult], runtimes: Sequence[str]) -> list[Verdict]:
    """Return an error for each runtime that `benchmark.require` names and that was not measured."""
    verdicts = []
    for runtime in runtimes:
        found = {file: model for file, model in models.items() if model.target == runtime}
        if not found:
            # The runtime's own file, or the target whose file it runs.
            target = next((name for name, target in TARGETS.items() if runtime in target.runs_also), runtime)
            message = f"no file for {runtime}, which benchmark.require names; add {target} to export.targets"
            verdicts.append(_plain("required", runtime, "error", message))
        for file, model in found.items():
            if model.timed is None:
                status = model.status if model.latency is None else model.latency.status
                message = f"{status}, and benchmark.require names {runtime}"
                verdicts.append(_plain("required", file, "error", message))
    return verdicts


def _plain(rule: str, file: str, status: Status, message: str) -> Verdict:
    return Verdict(rule, file, status, None, None, None, None, message)


def _verification(file: str, verification: Verification | None) -> Verdict:
    """Judge the export's verification in integer codes: it must exist, have compared codes, and have passed."""
    if verification is None:
        return _plain("verification", file, "fail", "the export did not verify this file; export it again")
    if verification.status.startswith("not run"):
        # The file is neither refuted nor verified, so it must not pass.
        return _plain("verification", file, "inconclusive", verification.status)
    codes, differing = verification.codes, verification.differing_codes
    return _equal("verification", file, verification.status, codes, differing, verification.images)


def _codes(file: str, counted: CountedCodes) -> Verdict:
    """Judge whether the CPU of the benchmark, perhaps another than the export's, computes the expected codes."""
    if counted.status.startswith("not run"):
        return _plain("codes_on_this_cpu", file, "inconclusive", counted.status)
    found = _equal("codes_on_this_cpu", file, counted.status, counted.codes, counted.differing, counted.images)
    if not counted.left_out:
        return found
    every = counted.tensors + counted.left_out
    rest = (
        f"{found.message}, in {counted.tensors} of {every} tensors; the codes of the others depend on float operations"
    )
    return replace(found, message=rest)


def _equal(rule: str, file: str, found: str, codes: int, differing: int, images: int) -> Verdict:
    status: Status = "pass" if found == "passed" and codes > 0 else "fail"
    figures = f"{differing} of {codes} codes differ on {images} images"
    message = figures if found == "passed" else f"{found}; {figures}"
    return Verdict(rule, file, status, differing, None, None, codes, message)


def _engine(file: str, engine: EngineSummary, in_float: float, config: GateConfig) -> list[Verdict]:
    """Judge a TensorRT engine: whether it was built without errors, and which precision its layers have.

    INT8 is expected of all layers except those in `quantization.float_layers`; `in_float` is their share of the MACs.

    Without a builder, the engine rules neither pass nor fail. A builder that crashed or was stopped says nothing about
    the file.
    """
    covered = engine.coverage if engine.status == BUILT else None
    counts = engine.counts if engine.status == BUILT else None
    if engine.status.startswith("not run"):
        first: Status = "not run"
    elif engine.status != BUILT:
        first = "error" if engine.failure is not None and engine.failure.stage == "process" else "fail"
    else:
        first = "fail" if any(message.severity == "error" for message in engine.messages) else "pass"
    verdicts = [_plain("engine", file, first, _of_engine(engine))]
    unbuilt = "not run: there is no engine"
    if config.min_int8_coverage is not None:
        allowed = config.min_int8_coverage
        if covered is None or covered.by_macs is None:
            why = unbuilt if covered is None else "not run: the file has no Conv or Gemm whose MACs are known"
            verdicts.append(Verdict("int8_coverage", file, "not run", None, None, allowed, None, why))
        else:
            status: Status = "pass" if covered.by_macs >= allowed else "fail"
            message = _of_coverage(covered, engine.uncovered, allowed, in_float)
            verdicts.append(
                Verdict("int8_coverage", file, status, covered.by_macs, None, allowed, covered.nodes, message)
            )
    if config.max_reformat_layers is not None:
        limit = config.max_reformat_layers
        if counts is None:
            verdicts.append(Verdict("reformat_layers", file, "not run", None, None, limit, None, unbuilt))
        else:
            message = f"{counts.reformat} of {counts.layers} layers only change type or layout, allowed {limit}"
            status = "pass" if counts.reformat <= limit else "fail"
            verdicts.append(Verdict("reformat_layers", file, status, counts.reformat, None, limit, None, message))
    return verdicts


def _of_engine(engine: EngineSummary) -> str:
    if engine.status != BUILT or engine.builder is None:
        return engine.status
    wrong = next((message for message in engine.messages if message.severity == "error"), None)
    by = f"{engine.builder.name} {engine.builder.version}"
    if wrong is None:
        return f"built by {by} without errors"
    at = f", first at {wrong.nodes[0]}" if wrong.nodes else ""
    return f"built by {by}, but {wrong.message} ({wrong.count} times{at})"


def _of_coverage(covered: Coverage, uncovered: Sequence[Uncovered], allowed: float, in_float: float) -> str:
    asked = (
        f"; in addition, float_layers keeps {100 * in_float:.2f} % of the network's MACs in float" if in_float else ""
    )
    text = (
        f"{100 * (covered.by_macs or 0.0):.2f} % of the MACs, {covered.int8_nodes} of {covered.nodes} Conv and Gemm, "
        f"required {100 * allowed:g} %{asked}"
    )
    return "; ".join([text, *(f"{entry.node} {entry.reason}" for entry in uncovered[:1])])


def _float_accuracy(file: str, accuracy: Accuracy, config: GateConfig, known: KnownAccuracy | None) -> list[Verdict]:
    """Judge whether the float model is better than chance and matches its known accuracy.

    A small drop from a useless model is no success. The float model must therefore exceed chance by a tenth of the
    distance from chance to 100 %. With `min_accuracy`, which sets a limit of its own, it need only exceed chance.
    """
    verdicts = []
    if accuracy.chance is not None:
        beyond = BEYOND_CHANCE if config.min_accuracy is None else 0.0
        allowed = accuracy.chance + beyond * (1 - accuracy.chance)
        verdict = _at_least("float_accuracy", file, accuracy.top1, accuracy.n, allowed)
        text = f"{_percent(verdict)}; chance is {100 * accuracy.chance:.2f} %"
        if verdict.status == "fail":
            text += ", hardly better than chance: check the model's weights, data.mean, data.std and the labels"
        verdicts.append(_with_images(replace(verdict, message=text)))
    if known is not None:
        floor = known.share - known.points / 100
        verdict = _at_least("known_accuracy", file, accuracy.top1, accuracy.n, floor)
        text = f"{_percent(verdict)}; {known.source} says {100 * known.share:.2f} %"
        if verdict.status != "fail":  # more images could decide it, but no limit was set
            verdict = replace(verdict, status="pass")
        else:
            text += ": check data.mean, data.std, data.size, data.crop and the weights"
        verdicts.append(replace(verdict, message=text))
    return verdicts


def _percent(verdict: Verdict) -> str:
    low, high = verdict.interval or (0.0, 1.0)
    measured = verdict.measured or 0.0
    return f"{100 * measured:.2f} [{100 * low:.2f}, {100 * high:.2f}] % of {verdict.n} test images"


def _at_least(rule: str, file: str, share: float, n: int, allowed: float) -> Verdict:
    """Return the verdict on a lower limit of a share of the test images."""
    from crqat.runtime_eval.measure.accuracy import images_for_share, wilson

    low, high = wilson(round(share * n), n)
    status: Status = "pass" if low >= allowed else "fail" if high < allowed else "inconclusive"
    needed = images_for_share(share, allowed) if status == "inconclusive" else None
    message = f"{share:.4f} [{low:.4f}, {high:.4f}] of {n} test images, required {allowed:g}"
    return Verdict(rule, file, status, share, (low, high), allowed, n, message, needed)


def _with_images(verdict: Verdict) -> Verdict:
    """Add to an inconclusive verdict how many test images would decide it."""
    if verdict.status != "inconclusive":
        return replace(verdict, images_needed=None)
    needed = verdict.images_needed
    text = "more test images would not decide: the measured value equals the limit"
    if needed is not None:
        text = f"about {needed:,} test images would decide if the rates stay as they are"
    return replace(verdict, message=f"{verdict.message}; {text}")


def _limits(file: str, accuracy: Accuracy, versus: VersusFloat, config: GateConfig) -> list[Verdict]:
    """Apply the rules on accuracy and agreement that have a limit."""
    from crqat.runtime_eval.measure.accuracy import images_for_difference, images_for_share

    n = accuracy.n
    verdicts = []
    if config.max_accuracy_drop is not None:
        what = "accuracy_drop", file, n, "test images"
        points, interval = versus.drop_points, versus.drop_interval_points
        drop = at_most(what, points, interval, config.max_accuracy_drop, " points")
        if versus.only_float_right is not None and versus.only_this_right is not None:
            counts = (versus.only_float_right, versus.only_this_right)
            needed = images_for_difference(*counts, n, config.max_accuracy_drop / 100)
            drop = _with_images(replace(drop, images_needed=needed))
        verdicts.append(drop)
    if config.relative_accuracy is not None:
        verdicts.append(_relative(file, n, versus, config.relative_accuracy))
    if config.min_agreement is not None:
        (low, high), allowed = versus.agreement_interval, config.min_agreement
        status: Status = "pass" if low >= allowed else "fail" if high < allowed else "inconclusive"
        message = f"{versus.agreement:.4f} [{low:.4f}, {high:.4f}] of {n} test images, required {allowed:g}"
        needed = images_for_share(versus.agreement, allowed)
        agreement = Verdict("agreement", file, status, versus.agreement, (low, high), allowed, n, message, needed)
        verdicts.append(_with_images(agreement))
    if config.min_accuracy is not None:
        verdicts.append(_with_images(_at_least("accuracy", file, accuracy.top1, n, config.min_accuracy)))
    return verdicts


def _relative(file: str, n: int, versus: VersusFloat, allowed: float) -> Verdict:
    """Return the verdict on the share of the float model's accuracy that the model keeps."""
    from crqat.runtime_eval.measure.accuracy import images_for_ratio, ratio_bounds

    both, first, second = versus.both_right, versus.only_float_right, versus.only_this_right
    if both is None or first is None or second is None:
        why = "not run: the benchmark was run by a version of crqat that did not count the images; run it again"
        return Verdict("relative_accuracy", file, "inconclusive", None, None, allowed, n, why)
    if both + first == 0:
        why = "the float model classifies no image correctly"
        return Verdict("relative_accuracy", file, "fail", None, None, allowed, n, why)
    low, high = ratio_bounds(both, first, second, n)
    kept = (both + second) / (both + first)
    status: Status = "pass" if low >= allowed else "fail" if high < allowed else "inconclusive"
    message = (
        f"{kept:.4f} [{low:.4f}, {high:.4f}] of the float model's accuracy over {n} test images, required {allowed:g}"
    )
    needed = images_for_ratio(both, first, second, n, allowed)
    return _with_images(Verdict("relative_accuracy", file, status, kept, (low, high), allowed, n, message, needed))


def _size(file: str, ratio: float, allowed: float) -> Verdict:
    status: Status = "pass" if ratio <= allowed else "fail"
    message = f"{ratio:.4f} of the float file's size, allowed {allowed:g}"
    return Verdict("size_ratio", file, status, ratio, None, allowed, None, message)


def at_most(
    what: tuple[str, str, int, str], measured: float, interval: Sequence[float], allowed: float, unit: str
) -> Verdict:
    """Return the verdict of a rule that limits `measured` to `allowed`; `what` is (rule, file, n, what n counts)."""
    rule, file, n, counted = what
    low, high = interval
    status: Status = "pass" if high <= allowed else "fail" if low > allowed else "inconclusive"
    message = f"{measured:.3f} [{low:.3f}, {high:.3f}]{unit} over {n} {counted}, allowed {allowed:g}"
    return Verdict(rule, file, status, measured, (low, high), allowed, n, message)


def _latency(file: str, model: ModelResult, versus: VersusFloat, float_unstable: str | bool, allowed: float) -> Verdict:
    latency = model.timed
    if latency is None:
        why = model.status if model.latency is None else model.latency.status
        return Verdict("latency_ratio", file, "not run", None, None, allowed, None, why)
    if versus.latency_ratio is None or versus.latency_ratio_interval is None:
        message = "not run: the float model was timed in another runtime"
        return Verdict("latency_ratio", file, "not run", None, None, allowed, None, message)
    what = ("latency_ratio", file, latency.rounds, "rounds")
    verdict = at_most(what, versus.latency_ratio, versus.latency_ratio_interval, allowed, " of float")
    for name, unstable in (("the float model", float_unstable), (file, latency.unstable)):
        if unstable:
            message = f"{verdict.message}; {name} is unstable: {unstable}"
            return Verdict(*what[:2], "inconclusive", verdict.measured, verdict.interval, allowed, what[2], message)
    return verdict


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Return 1 if a rule failed, else 3 for an error, else 4 if a rule is inconclusive or none passed, else 0.

    A failure comes first because it holds whatever else could not be measured.
    """
    statuses = {verdict.status for verdict in verdicts}
    if "fail" in statuses:
        return 1
    if "error" in statuses:
        return 3
    return 0 if "pass" in statuses and "inconclusive" not in statuses else 4
