"""The gate rule `latency_regression`: compares latency with earlier results of the same device and settings."""

from __future__ import annotations

from crqat.core.results.benchmark import MEASURED, Latency, ModelResult, Results
from crqat.core.results.verdict import Verdict
from crqat.pipeline.gate.rules import BASELINES, at_most

RULE = "latency_regression"


def key(results: Results, model: ModelResult) -> dict[str, str | int | None]:
    """Return the settings of a measurement, by name, that must be equal in two results to compare their latencies.

    A setting that was not recorded has the value None.
    """
    device, config, board = results.device, results.config, results.device.jetson
    return {
        "run": results.run,
        "device": (board and board.model) or device.cpu,
        "power mode": (board and board.power_mode) or device.governor,
        "runtime": model.runtime,
        "provider": model.provider,
        "runtime version": model.runtime_version,
        "number of threads": config.threads,
        "CUDA graph setting": config.cuda_graph,
    }


def judge(results: Results, baseline: Results | None, allowed: float) -> list[Verdict]:
    """Return a verdict on each quantized file whose latency was measured.

    Args:
        results: Results to judge.
        baseline: Earlier results; None if the gate was given none.
        allowed: Largest allowed latency divided by the baseline's (the limit `max_latency_regression`).
    """
    return [
        _judge(file, results, model, baseline, allowed)
        for file, model in results.models.items()
        if model.target not in BASELINES and model.status == MEASURED
    ]


def _judge(file: str, results: Results, model: ModelResult, baseline: Results | None, allowed: float) -> Verdict:
    latency, base = model.timed, None if baseline is None else baseline.models.get(file)
    old = None if base is None else base.timed
    reason = None
    if latency is None:
        reason = model.status if model.latency is None else model.latency.status
    elif baseline is None:
        reason = "not run: no --baseline was given"
    elif base is None or old is None:
        reason = f"not run: the baseline has no latency of {file}"
    else:
        reason = _other_key(key(results, model), key(baseline, base))
    if latency is None or old is None or reason is not None:
        return Verdict(RULE, file, "not run", None, None, allowed, None, reason or "not run")
    ratio, interval = _ratio(latency, old)
    what = (RULE, file, latency.rounds, "rounds")
    verdict = at_most(what, ratio, interval, allowed, " of the baseline")
    for name, one in (("this latency", latency), ("the baseline", old)):
        if one.unstable:
            message = f"{verdict.message}; {name} is unstable: {one.unstable}"
            return Verdict(RULE, file, "inconclusive", ratio, interval, allowed, latency.rounds, message)
    return verdict


def _other_key(here: dict[str, str | int | None], there: dict[str, str | int | None]) -> str | None:
    """Return why latencies with the settings `here` and `there` cannot be compared; None if they can."""
    for name, value in here.items():
        if there[name] != value:
            return f"not run: the baseline has another {name} ({_text(there[name])}, here {_text(value)})"
    return None


def _text(value: str | int | None) -> str:
    return "not recorded" if value is None else str(value)


def _ratio(latency: Latency, base: Latency) -> tuple[float, tuple[float, float]]:
    """Return the ratio of the medians, and its interval from the intervals of both medians over their rounds."""
    from crqat.runtime_eval.measure.latency import median_interval

    ratio = latency.p50_ms / base.p50_ms
    low, high, _ = median_interval(latency.round_p50_ms)
    base_low, base_high, _ = median_interval(base.round_p50_ms)
    # The two runs were not interleaved. Each interval misses with at most 5 %, so both together with at most 10 %.
    return ratio, (min(low / base_high, ratio), max(high / base_low, ratio))
