"""`python -m runtime_eval EXPORT_DIR`: the benchmark alone, for a board that has numpy and a runtime only."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from artifacts.errors import CrqatError, ToolError
from artifacts.progress import quiet
from runtime_eval.benchmark import benchmark
from runtime_eval.config import BenchmarkConfig


def table(results: dict[str, Any]) -> str:
    """The results in lines of at most about 100 characters, one for each model."""
    device, config = results["device"], results["config"]
    lines = [
        f"{results['run']}: {results['dataset']['n']} test images, {device['cpu']}, {config['threads']} thread(s), "
        f"{config['provider']}, onnxruntime {device['onnxruntime']}",
        f"{'file':<20} {'top-1 %':>8} {'drop, points [95 % bounds]':>27} {'p50 ms':>9} "
        f"{'of float [95 % interval]':>25} {'kB':>8}",
    ]
    for file, model in results["models"].items():
        if model["status"] != "measured":
            lines.append(f"{file:<20} {model['status']}")
            continue
        latency, versus = model["latency"], model["versus_float"]
        drop = ratio = "-"
        if versus is not None:
            low, high = versus["drop_interval_points"]
            drop = f"{versus['drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]"
            if versus["latency_ratio"] is not None:
                low, high = versus["latency_ratio_interval"]
                ratio = f"{versus['latency_ratio']:.3f} [{low:.3f}, {high:.3f}]"
        p50 = f"{latency['p50_ms']:.4f}" if latency["status"] == "measured" else "-"
        top1 = 100 * model["accuracy"]["top1"]
        lines.append(f"{file:<20} {top1:>8.2f} {drop:>27} {p50:>9} {ratio:>25} {model['size_bytes'] / 1e3:>8.1f}")
        counted = model["codes_on_this_cpu"]
        if counted is not None:
            left_out = f"; {counted['left_out']} tensors left out" if counted["left_out"] else ""
            lines.append(f"{'':<20} codes on this CPU: {counted['differing']} of {counted['codes']} differ{left_out}")
        if latency["status"] != "measured":
            lines.append(f"{'':<20} latency {latency['status']}")
        elif latency["unstable"]:
            lines.append(f"{'':<20} latency unstable: {latency['unstable']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or the error's.

    Args:
        arguments: Without the program's name; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m runtime_eval", description="Measure an export on this machine.")
    parser.add_argument("export_dir", type=Path, help="a run's `export` directory")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--threads", type=int, default=BenchmarkConfig.threads, help="threads of one inference")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    try:
        results = benchmark(options.export_dir, BenchmarkConfig(threads=options.threads), quiet)
        print(table(results))
        if options.out is not None:
            try:
                options.out.write_text(json.dumps(results, indent=1))
            except OSError as error:
                msg = f"cannot write {options.out}: {error.strerror}; choose another place with --out"
                raise ToolError(msg) from error
    except CrqatError as error:
        print(f"runtime_eval: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
