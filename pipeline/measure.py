"""`crqat.benchmark` and `crqat.gate`: measure exported files on the user's own images, and judge the results."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crqat.core.errors import UsageError
from crqat.core.preprocessing import checked_bytes
from crqat.core.progress import Progress, quiet
from crqat.core.results.benchmark import ModelResult, Results, read_results
from crqat.core.results.export import ExportPayload
from crqat.core.results.verdict import Verdict
from crqat.core.run_directory import Manifest, payload_of, verify_stage, write_stage
from crqat.core.typed_json import to_json
from crqat.pipeline.gate import rules
from crqat.pipeline.report import tables
from crqat.runtime_eval.benchmark import benchmark as measure
from crqat.runtime_eval.config import BenchmarkConfig, Provider
from crqat.train.arguments import checked

if TYPE_CHECKING:
    from crqat.export.export_model import Export


@dataclass(frozen=True)
class Benchmark:
    """Results of `crqat.benchmark`; `print` shows them as a table.

    Attributes:
        results: All results, in the layout of a run's results.json.
    """

    results: Results = field(repr=False)

    @property
    def files(self) -> Mapping[str, ModelResult]:
        """Result of each file by file name, such as "onnxruntime.onnx"."""
        return self.results.models

    def __str__(self) -> str:
        """Return the results as a text table, and one line for every file that could not be measured."""
        return tables.as_text(self.results)


@dataclass(frozen=True)
class Gate:
    """Result of `crqat.gate`: the verdicts on a benchmark.

    Attributes:
        exit_code: Exit code for `sys.exit` in a CI job: 0 pass, 1 a rule failed, 3 a rule could not be checked, 4
            inconclusive.
        verdicts: Verdict of each rule on each file.
    """

    exit_code: int
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether the exit code is 0."""
        return self.exit_code == 0

    @property
    def lines(self) -> list[str]:
        """Text lines: one for each rule and file, then the overall verdict."""
        return tables.verdict_lines(self.verdicts)

    def __str__(self) -> str:
        """Return the lines as one text."""
        return "\n".join(self.lines)


def benchmark(
    files: Export | str | Path,
    images: Any,
    labels: Any,
    *,
    threads: int = 1,
    provider: Provider = "CPUExecutionProvider",
    warm_up_seconds: float = 0.2,
    latency_rounds: int = 10,
    latency_seconds: float = 5.0,
    accuracy_batch: int = 64,
    openvino: bool = False,
    time_limit_seconds: float = 300.0,
    progress: Progress = quiet,
) -> Benchmark:
    """Measure accuracy, latency, memory and size of exported files on this machine, next to the float baseline.

    Each file runs in its own processes, one file at a time.

    Args:
        files: Result of `crqat.export`, its directory, or a run's `export` directory; the file hashes are checked.
        images: Test images as bytes before normalization: uint8 of shape [N, C, H, W], a tensor or an array.
        labels: Class indices of the images, integers of shape [N]; each is the index of a logit.
        threads: Number of threads that one inference may use.
        provider: Execution provider of ONNX Runtime.
        warm_up_seconds: Duration of uncounted inferences at the start of each process.
        latency_rounds: Number of rounds in which the files take turns; at least 6.
        latency_seconds: Total counted time of one file over all rounds.
        accuracy_batch: Batch size for measuring accuracy.
        openvino: Also measure the float file and ONNX Runtime's file in OpenVINO.
        time_limit_seconds: A process that is silent for longer is considered hung.
        progress: Callback for the progress of rounds and images.

    Returns:
        The result of each file. A file that cannot run has the status "failed: ..." or "not run: ...".

    Raises:
        UsageError: Images, labels or an option have the wrong type, shape or range, or a file is missing or damaged.
    """
    config = checked(
        BenchmarkConfig(
            threads=threads,
            provider=provider,
            warm_up_seconds=warm_up_seconds,
            latency_rounds=latency_rounds,
            latency_seconds=latency_seconds,
            accuracy_batch=accuracy_batch,
            openvino=openvino,
            time_limit_seconds=time_limit_seconds,
        )
    )
    directory = (Path(files) if isinstance(files, str | Path) else files.directory).absolute()
    exported = verify_stage(directory)
    payload = payload_of(ExportPayload, directory, exported)
    # The export stage stores the preprocessing in the payload of its training.
    preprocessing = payload.training.preprocessing if payload.training is not None else payload.preprocessing
    pixels = checked_bytes(images, preprocessing)
    numbers = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if numbers.dtype.kind not in "iu" or numbers.shape != (len(pixels),):
        msg = f"labels: {numbers.dtype} of shape {list(numbers.shape)}; expected one integer for each of "
        msg += f"{len(pixels)} images"
        raise UsageError(msg)
    # The stage's own function measures. It gets what the stage gets: a complete export with its images.
    with tempfile.TemporaryDirectory(prefix="crqat-benchmark-") as scratch:
        payload = replace(payload, images="images.npy", labels="labels.npy")
        manifest = Manifest("export", "", None, {}, {}, to_json(payload))
        with write_stage(Path(scratch), manifest) as out:
            for name in set(exported.files) - {"images.npy", "labels.npy"}:
                shutil.copyfile(directory / name, out / name)
            np.save(out / "images.npy", pixels)
            np.save(out / "labels.npy", numbers.astype(np.int64))
        return Benchmark(measure(Path(scratch) / "export", config, progress))


def gate(
    results: Benchmark | Results | str | Path,
    *,
    max_accuracy_drop: float | None = 1.0,
    relative_accuracy: float | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    max_latency_ratio: float | None = None,
    max_size_ratio: float | None = None,
    min_int8_coverage: float | None = 1.0,
    max_reformat_layers: int | None = None,
) -> Gate:
    """Judge a benchmark by the rules of the command `crqat gate`, without measuring.

    Args:
        results: Result of `crqat.benchmark`, or the path of a results.json.
        max_accuracy_drop: Percentage points of top-1 accuracy that a quantized file may lose against the float file;
            None allows any drop.
        relative_accuracy: Share of the float file's top-1 accuracy that the file must keep, such as MLPerf's 0.99.
        min_agreement: Share of the images for which the file must predict the same class as the float file.
        min_accuracy: Share of the images that the file must classify correctly.
        max_latency_ratio: Largest allowed value of the file's latency divided by the float file's.
        max_size_ratio: Largest allowed value of the file's size divided by the float file's.
        min_int8_coverage: Share of the multiply-accumulates that the TensorRT engine must compute in INT8.
        max_reformat_layers: Largest number of TensorRT engine layers that only change type or layout.

    Returns:
        The verdict. Uncertain values are judged by their intervals; a file whose verification failed always fails.

    Raises:
        UsageError: A limit has the wrong type or is out of range, or the file is missing or damaged.
    """
    limits = checked(
        rules.GateConfig(
            max_accuracy_drop=max_accuracy_drop,
            relative_accuracy=relative_accuracy,
            min_agreement=min_agreement,
            min_accuracy=min_accuracy,
            max_latency_ratio=max_latency_ratio,
            max_size_ratio=max_size_ratio,
            min_int8_coverage=min_int8_coverage,
            max_reformat_layers=max_reformat_layers,
        )
    )
    if isinstance(results, Benchmark):
        results = results.results
    verdicts = rules.judge(results if isinstance(results, Results) else read_results(Path(results)), limits)
    return Gate(rules.exit_code(verdicts), tuple(verdicts))
