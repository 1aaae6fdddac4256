"""`python -m crqat.runtime_eval PATH`: measures a bundle or an export on a board with only numpy and a runtime."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from crqat.core import failures
from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import Progress, quiet
from crqat.core.results.benchmark import Accuracy, ModelResult, Results
from crqat.core.typed_json import text
from crqat.runtime_eval.benchmark import benchmark
from crqat.runtime_eval.board import bundle as bundles
from crqat.runtime_eval.config import BenchmarkConfig, of_json


def table(results: Results) -> str:
    """Return benchmark results as a text table about 100 characters wide, with one or more lines for each file."""
    device, config = results.device, results.config
    lines = [
        f"{results.run}: {results.dataset.n if results.dataset else 0} test images, {device.cpu}, "
        f"{config.threads} thread(s), {config.provider}, onnxruntime {device.onnxruntime or 'not installed'}",
        f"{'file':<20} {'top-1 %':>8} {'drop, points [95 % bounds]':>27} {'p50 ms':>9} "
        f"{'of float [95 % interval]':>25} {'kB':>8}",
    ]
    for file, model in results.models.items():
        lines += [f"{file:<20} {model.status}"] if model.accuracy is None else _lines(file, model, model.accuracy)
    return "\n".join(lines)


def _lines(file: str, model: ModelResult, accuracy: Accuracy) -> list[str]:
    latency, versus = model.timed, model.versus_float
    drop = ratio = "-"
    if versus is not None:
        low, high = versus.drop_interval_points
        drop = f"{versus.drop_points:+.2f} [{low:+.2f}, {high:+.2f}]"
        if versus.latency_ratio is not None and versus.latency_ratio_interval is not None:
            low, high = versus.latency_ratio_interval
            ratio = f"{versus.latency_ratio:.3f} [{low:.3f}, {high:.3f}]"
    p50 = "-" if latency is None else f"{latency.p50_ms:.4f}"
    size = (model.size_bytes or 0) / 1e3
    lines = [f"{file:<20} {100 * accuracy.top1:>8.2f} {drop:>27} {p50:>9} {ratio:>25} {size:>8.1f}"]
    counted = model.codes_on_this_cpu
    if counted is not None:
        left_out = f"; {counted.left_out} tensors left out" if counted.left_out else ""
        found = f"{counted.differing} of {counted.codes} differ" if counted.codes else counted.status
        lines.append(f"{'':<20} codes on this CPU{f' ({counted.family})' if counted.family else ''}: {found}{left_out}")
    if latency is None:
        lines.append(f"{'':<20} latency {'not run' if model.latency is None else model.latency.status}")
        return lines
    if latency.unstable:
        lines.append(f"{'':<20} latency unstable: {latency.unstable}")
    if latency.compute_p50_ms is not None:
        lines.append(f"{'':<20} {latency.compute_p50_ms:.4f} ms of it is the device's computation")
    return lines


def say_progress() -> Progress:
    """Return a `Progress` that prints "TASK: DONE/TOTAL  NOTE" on standard error, at most once a second."""
    said: dict[str, float] = {}

    def say(task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - said.get(task, -math.inf) >= 1.0:
            said[task] = now
            print(f"{task}: {done}/{total}{f'  {note}' if note else ''}", file=sys.stderr, flush=True)

    return say


def measure(path: Path, threads: int | None) -> Results:
    """Measure the files of an export directory or of a bundle, which brings its own benchmark settings.

    Args:
        path: An export directory, a bundle's archive, or an unpacked bundle.
        threads: Number of threads that one inference may use; None uses the bundle's value, or for an export directory
            the default.

    Raises:
        CrqatError: The path is of another kind or does not exist, or its contents are damaged.
    """
    if not path.exists():
        msg = f"{path}: no such file or directory; give a run's `export` directory, or a bundle"
        raise UsageError(msg)
    if path.is_dir() and not (path / bundles.MANIFEST).exists():
        return benchmark(path, BenchmarkConfig() if threads is None else BenchmarkConfig(threads), quiet)
    with tempfile.TemporaryDirectory() as scratch:
        folder, bundle = path, None
        if not path.is_dir():
            folder, bundle = Path(scratch), bundles.unpack(path, Path(scratch))
        bundle = bundle or bundles.verify(path)
        try:
            config = of_json(bundle.benchmark if threads is None else {**bundle.benchmark, "threads": threads})
        except (TypeError, ValueError) as error:
            msg = (
                f"{path}: the benchmark configuration is from another version of crqat ({error}); make the bundle again"
            )
            raise UsageError(msg) from error
        results = benchmark(folder / bundles.EXPORT, config, say_progress())
        return replace(results, bundle=bundle.sha256, crqat_version=bundle.crqat_version)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; `crqat.core.errors` lists the meanings of the codes.

    Args:
        arguments: Arguments without the program's name; None uses those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m runtime_eval", description="Measure an export on this machine.")
    parser.add_argument("path", type=Path, help="a run's `export` directory, a bundle's archive, or an unpacked bundle")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; default: results.json for a bundle, none for an export"
    )
    parser.add_argument("--threads", type=int, help="threads of one inference")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error("--threads must be at least 1")
    try:
        results = measure(options.path, options.threads)
        print(table(results))
        out = options.out or (Path("results.json") if results.bundle is not None else None)
        if out is not None:
            try:
                out.write_text(text(results))
            except OSError as error:
                msg = f"cannot write {out}: {error.strerror}; choose another place with --out"
                raise ToolError(msg) from error
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rest of the table must not cause an error in Python
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("runtime_eval: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        return failures.tell(error, "runtime_eval")
    return 0


if __name__ == "__main__":
    sys.exit(main())
