"""Latency against earlier results of the same device in the same state, and never against anything else."""

from __future__ import annotations

from typing import Any

from crqat.core.errors import UsageError
from crqat.pipeline.gate.rules import BASELINES, Verdict, at_most

RULE = "latency_regression"


def key(results: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Everything that two latencies of a file must share to be comparable, by name; None is what was not recorded."""
    device, config = results.get("device", {}), results.get("config", {})
    board = device.get("jetson") or {}
    return {
        "run": results.get("run"),
        "device": board.get("model") or device.get("cpu"),
        "power mode": board.get("power_mode") or device.get("governor"),
        "runtime": model.get("runtime"),
        "provider": model.get("provider"),
        "runtime version": model.get("runtime_version"),
        "number of threads": config.get("threads"),
        "CUDA graph setting": config.get("cuda_graph", False),
    }


def judge(results: dict[str, Any], baseline: dict[str, Any] | None, allowed: float) -> list[Verdict]:
    """A verdict on each quantized file whose latency was measured.

    Args:
        results: What `results_file.read_results` read.
        baseline: The same of the baseline; None if the gate was given none.
        allowed: `max_latency_regression`.

    Raises:
        UsageError: One of the results is damaged.
    """
    verdicts = []
    for file, model in results["models"].items():
        if model["target"] in BASELINES or model["status"] != "measured":
            continue
        try:
            verdicts.append(_judge(file, results, baseline, allowed))
        except (LookupError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            msg = f"the latency of {file} is damaged in the results or the baseline ({error!r}); benchmark again"
            raise UsageError(msg) from error
    return verdicts


def _judge(file: str, results: dict[str, Any], baseline: dict[str, Any] | None, allowed: float) -> Verdict:
    model = results["models"][file]
    latency = model["latency"]
    reason = latency["status"] if latency["status"] != "measured" else _incomparable(file, results, baseline)
    if baseline is None or reason is not None:
        return Verdict(RULE, file, "not run", None, None, allowed, None, reason or "not run: no --baseline was given")
    base = baseline["models"][file]["latency"]
    ratio, interval = _ratio(latency, base)
    what = (RULE, file, latency["rounds"], "rounds")
    verdict = at_most(what, ratio, interval, allowed, " of the baseline")
    for name, one in (("this latency", latency), ("the baseline", base)):
        if one["unstable"]:
            message = f"{verdict.message}; {name} is unstable: {one['unstable']}"
            return Verdict(RULE, file, "inconclusive", ratio, interval, allowed, latency["rounds"], message)
    return verdict


def _incomparable(file: str, results: dict[str, Any], baseline: dict[str, Any] | None) -> str | None:
    """Why the baseline says nothing of a file."""
    if baseline is None:
        return None
    base = baseline["models"].get(file)
    if base is None or (base["latency"] or {}).get("status") != "measured":
        return f"not run: the baseline has no latency of {file}"
    here, there = key(results, results["models"][file]), key(baseline, base)
    for name, value in here.items():
        if there[name] != value:
            return f"not run: baseline is of another {name} ({_text(there[name])}, here {_text(value)})"
    return None


def _text(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def _ratio(latency: dict[str, Any], base: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """Median by median, and an interval from the intervals of both medians over their rounds."""
    from crqat.runtime_eval.measure.latency import median_interval

    ratio = latency["p50_ms"] / base["p50_ms"]
    low, high, _ = median_interval(latency["round_p50_ms"])
    base_low, base_high, _ = median_interval(base["round_p50_ms"])
    # The two runs were not interleaved. Each interval misses with at most 5 %, both together with at most 10 %.
    return ratio, (min(low / base_high, ratio), max(high / base_low, ratio))
