"""The `scale` command: predicts how a recipe's training scales, as a table and JSON; see docs/scaling.md."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from crqat.core.errors import ToolError, UsageError
from crqat.core.typed_json import to_json
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe
from crqat.runtime_eval.machine import host
from crqat.train.scaling.measure import measure
from crqat.train.scaling.model import Link

# Load average per core before the measurement above which the constants are not valid for this machine.
_BUSY = 0.5


def scale(
    config: recipe.Recipe, processes: Sequence[int], bandwidth: float | None, latency: float | None, out: Path
) -> None:
    """Measure a recipe's training step, predict it for more processes, write the result as JSON, and print it.

    Args:
        config: The recipe.
        processes: Numbers of processes to predict; empty for powers of two up to what this machine can run, and, with
            `bandwidth` and `latency`, for 2, 4 and 8 machines.
        bandwidth: Bandwidth between machines in bytes per second; None if there is one machine.
        latency: Latency between machines in seconds per message; None if there is one machine.
        out: The JSON file.

    Raises:
        UsageError: Only one of bandwidth and latency is given, or `crqat.train.scaling.measure.measure` raises it.
        ToolError: `out` cannot be written, or `measure` raises it.
    """
    between = _link(bandwidth, latency)
    load = host.load_average()
    with console.show_progress() as progress:
        result = measure(recipe.train_config(config), processes, between, progress)
    described = {**to_json(host.describe()), "load_average_before": load}
    result = {"run": config.name, "machine": described, "torch": metadata.version("torch"), **result}
    try:
        out.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        msg = f"{out}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error
    show(result)
    click.echo(f"wrote {out}")
    console.give(file=str(out), scaling=result)


def _link(bandwidth: float | None, latency: float | None) -> Link | None:
    if bandwidth is None and latency is None:
        return None
    if bandwidth is None or latency is None:
        msg = "--bandwidth and --latency: only one is given; give both, or neither for a single machine"
        raise UsageError(msg)
    if not (math.isfinite(bandwidth) and math.isfinite(latency) and bandwidth > 0 and latency >= 0):
        msg = f"--bandwidth {bandwidth:g} --latency {latency:g}: needs bytes per second above 0, and seconds from 0"
        raise UsageError(msg)
    return Link(latency, bandwidth)


def show(result: dict[str, Any]) -> None:
    """Print predicted step times, the formula with its constants, and a measured step time beside its prediction."""
    constants, check = result["constants"], result["check"]
    title = (
        f"{result['run']}: predicted from constants measured on this machine; {constants['batch']} images a step "
        f"in all, {result['device']}, {result['threads']} thread{'s' * (result['threads'] > 1)} a process, "
        f"compiled: {result['compiled']}"
    )
    columns = ("processes", "machines", "predicted s / step", "images / s", "efficiency", "limit",
               "compute s", "all-reduce s", "data s")  # fmt: skip
    console.show_table(title, columns, [_row(entry) for entry in result["predictions"]])
    for line in formula(constants):
        click.echo(line)
    if check["status"] != "measured":
        click.echo(f"measured and predicted: {check['status']}")
    else:
        real = check["measured_seconds"]
        click.echo(
            f"measured and predicted, {check['processes']} processes on this machine: "
            f"{real['median']:.4g} s / step [{real['quartiles'][0]:.4g}, {real['quartiles'][1]:.4g}], n {real['n']}; "
            f"predicted {check['predicted_seconds']:.4g}; measured / predicted {check['measured_to_predicted']:.2f}"
        )
        beside, alone = check["measured_compute_seconds"]["median"], check["predicted_compute_seconds"]
        click.echo(
            f"  computation in this step: {beside:.4g} s with all processes running; "
            f"predicted from one process running alone: {alone:.4g} s"
        )
    load, cores = result["machine"]["load_average_before"], result["machine"]["usable_cores"]
    if load is not None and cores and load / cores > _BUSY:
        click.echo(
            f"this machine was busy before the measurement (load average {load:.1f} on {cores} cores): "
            "measure on an idle one"
        )


def _row(entry: dict[str, Any]) -> list[str]:
    numbers = [str(entry["processes"]), str(entry["machines"])]
    if "not_predicted" in entry:
        return [*numbers, "not predicted", "", "", entry["not_predicted"], "", "", ""]
    parts = [f"{entry[f'{part}_seconds']:.4g}" for part in ("compute", "all_reduce", "data")]
    step, images = f"{entry['step_seconds']:.4g}", f"{entry['images_per_second']:.4g}"
    return [*numbers, step, images, f"{entry['efficiency']:.0%}", entry["limit"], *parts]


def formula(constants: dict[str, Any]) -> list[str]:
    """Return lines of text with the formula of a step's time, and each constant with its quartiles over the rounds."""
    local = f"ceil({constants['batch']} / P)"
    step, image, rate = (_number(constants[name]) for name in ("step_seconds", "image_seconds", "data_rate"))
    lines = [
        "seconds a step = max(compute + all-reduce, data), P processes:",
        f"  compute    = {step} s + {image} s x {local}",
        f"  data       = min(P, {constants['holds']}) x {local} x {constants['image_bytes']} B / {rate} B/s",
    ]
    sent = f"2 (P - 1) / P x {constants['gradient_bytes']} B"
    if constants["local"] is not None:
        latency, bandwidth = (_number(constants["local"][name]) for name in ("latency", "bandwidth"))
        lines.append(f"  all-reduce = 2 (P - 1) x {latency} s + {sent} / {bandwidth} B/s, on one machine")
    if constants["between"] is not None:
        link = constants["between"]
        lines.append(
            f"  all-reduce = 2 (P - 1) x {link['latency']:.4g} s + {sent} / {link['bandwidth']:.4g} B/s, between "
            f"machines; {link['source']}"
        )
    return lines


def _number(constant: dict[str, Any]) -> str:
    low, high = ("?" if end is None else f"{end:.3g}" for end in constant["quartiles"])
    return f"{constant['value']:.4g} [{low}, {high}]"
