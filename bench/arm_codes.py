"""Compares integer codes of ARM CPUs with the simulator, on emulated CPUs, for every operation that ONNX Runtime fuses.

Each file is run by several versions of ONNX Runtime on each CPU model of `bench.emulated_arm`, with all its codes as
outputs. A code that the export expects on every board must be the simulator's for ARM. A code that an export leaves
out, because it depends on float operations, is recomputed from ONNX Runtime's own codes before it, and must lie within
the bound of a float32 computation. Corrupted files of one network are counted as a board counts its own file.

    python -m bench.arm_codes [--versions 1.20.0,1.23.2,1.32.0] [--cifar10 data/cifar10] [--names "Add;Mul"]

writes the tables of docs/arm.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bench import emulated_arm
from bench.arm_networks import cases
from bench.onnxruntime_process import NotRun
from crqat.core.compare_codes import Tie, compare_codes
from crqat.core.preprocessing import Preprocessing
from crqat.core.results.benchmark import CountedCodes
from crqat.core.targets import ONNXRUNTIME
from crqat.core.typed_json import from_json
from crqat.export.qdq.write import QDQModel
from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import Simulation
from crqat.export.to_onnx import Quantized, quantize_network
from crqat.export.verification.expected_codes import IMAGES, expected_codes
from crqat.export.verification.fusion import in_float, optimized_operations
from crqat.train.config import QuantizationConfig
from crqat.train.data import sources

PAGE = Path("docs/arm.md")
VERSIONS = ("1.20.0", "1.23.2", "1.32.0")
TIME_LIMIT_SECONDS = 1800.0
_SOURCES = Path(__file__).parents[1] / "src"
_NORMALIZE = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Runs all files in one process, because an emulated process takes seconds to start.
_SHOW = """
import sys, numpy, onnxruntime
from pathlib import Path
for folder in map(Path, sys.argv[2:]):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(folder / "shown.onnx"), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    numpy.savez(folder / sys.argv[1], *session.run(names, {"input": numpy.load(folder / "images.npy")}))
"""
# Counts the codes of a bundle's file, as a board does.
_COUNT = """
import json, sys
from pathlib import Path
from crqat.core.typed_json import to_json
from crqat.runtime_eval.measure.codes import check_codes
files = [(Path(folder) / "onnxruntime.onnx", Path(folder) / "onnxruntime.codes.npz") for folder in sys.argv[1:]]
print(json.dumps([to_json(check_codes(model, codes, 1)) for model, codes in files]))
"""


@dataclass
class Written:
    """The exported file of one network, in its own folder.

    Attributes:
        file: The file for ONNX Runtime.
        folder: Folder of the file and of the codes that a board expects.
        images: Normalized images, float32 [N, C, H, W].
    """

    file: QDQModel
    folder: Path
    images: npt.NDArray[np.float32]

    @property
    def zero_points(self) -> dict[str, int]:
        """Zero point of each tensor of codes in the file, by tensor name."""
        activations, codes = self.file.activations, self.file.codes
        return {name: activations[edge].grid.zero_point for edge, names in codes.items() for name in names}


def images(cifar10: Path | None) -> npt.NDArray[np.float32]:
    """Return 64 normalized images of 32 x 32 pixels: from CIFAR-10, or enlarged digits in three different colours."""
    if cifar10 is not None:
        return _NORMALIZE(sources.load("cifar10", str(cifar10), False).train_images[:64].numpy())
    grey = sources.load("digits", None, False).train_images[:64].float().expand(-1, 3, -1, -1)
    colours = torch.stack([nn.functional.interpolate(grey, 32)[:, i].roll(4 * i, -1) for i in range(3)], 1)
    return _NORMALIZE(colours.byte().numpy())


def quantized(network: nn.Module, config: QuantizationConfig, pictures: npt.NDArray[np.float32]) -> Quantized:
    """Fit the BN statistics of a randomly initialized network to images, and quantize it by calibration on them."""
    batch = torch.from_numpy(pictures)
    with torch.no_grad():
        for _ in range(3):
            network(batch)
    return quantize_network(network, [batch], ("onnxruntime",), config)


def write(network: Quantized, folder: Path) -> Written:
    """Write a network's file for ONNX Runtime with the expected codes of two images, and a copy that outputs all codes.

    Args:
        network: The quantized network with its images.
        folder: Output folder, which is created.
    """
    folder.mkdir()
    written = Written(network.file("onnxruntime"), folder, network.images[:IMAGES])
    save(written, written.file.model)
    np.save(folder / "images.npy", written.images)
    expected_codes(written.file, written.images, folder / "onnxruntime.codes.npz")
    return written


def save(written: Written, model: onnx.ModelProto) -> None:
    """Write `model` to the folder of `written` as onnxruntime.onnx, and a copy that outputs all codes as shown.onnx."""
    onnx.save(model, written.folder / "onnxruntime.onnx")
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for name in written.zero_points:
        shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    onnx.save(shown, written.folder / "shown.onnx")


def broken(model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """Return three corrupted copies of a model, each with one wrong constant; the keys say in words what is wrong."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    dequantizers = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    weight = next(n for n in dequantizers if n.input[0] in constants and constants[n.input[0]].ndim == 4)
    scales = constants[weight.input[1]]
    order = np.argsort(scales)
    swapped = scales.copy()
    swapped[order[[0, -1]]] = scales[order[[-1, 0]]]
    activation = next(n for n in dequantizers if n.input[0] not in constants)
    zero = constants[activation.input[2]]
    wrong = {
        "weight scales 1 % too large": (weight.input[1], (scales * np.float32(1.01)).astype(np.float32)),
        "a zero point off by one": (activation.input[2], zero + np.uint8(1) if zero < 255 else zero - np.uint8(1)),
        "two channels' scales swapped": (weight.input[1], swapped),
    }
    result = {}
    for what, (name, value) in wrong.items():
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        tensor = next(tensor for tensor in copied.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))
        result[what] = copied
    return result


def run(python: Path, script: str, *arguments: str) -> str:
    """Run a Python script on the CPU that the interpreter `python` emulates, and return what it prints.

    Raises:
        NotRun: The script fails or exceeds the time limit.
    """
    command = [str(python), "-c", script, *arguments]
    return emulated_arm.run_program(command, _SOURCES, "the emulated Python", TIME_LIMIT_SECONDS)


def counted(python: Path, folders: Sequence[Path]) -> list[CountedCodes]:
    """Count, for each folder, the codes of its onnxruntime.onnx that differ from those in its onnxruntime.codes.npz.

    The files run on the CPU that the interpreter `python` emulates.

    Raises:
        NotRun: See `run`.
    """
    return [from_json(CountedCodes, entry) for entry in json.loads(run(python, _COUNT, *map(str, folders)))]


@dataclass(frozen=True)
class Cell:
    """Counts of codes for one file on one ARM CPU.

    Attributes:
        codes: Number of codes that must equal those of the simulator for ARM.
        differing: Number of these codes that differ.
        near: Number of codes that depend on float operations.
        wrong: Number of the latter that no float32 computation gives.
        other: Number of codes that this machine's CPU computes differently from the ARM CPU.
    """

    codes: int
    differing: int
    near: int
    wrong: int
    other: int


class Judge:
    """Checks a file's codes on ARM CPUs against the simulator.

    Args:
        written: The file to check.
    """

    def __init__(self, written: Written) -> None:
        self._written = written
        arm = ONNXRUNTIME.cpu("aarch64")
        assert arm is not None  # noqa: S101 (the Target has it; this tells mypy)
        self._kernel = arm.add_kernel
        self._seen = in_float(written.file.model)
        self._own = self._simulated()
        run(Path(sys.executable), _SHOW, "here.npz", str(written.folder))
        self._here = self.shown("here.npz")
        self._known: dict[bytes, Cell] = {}

    def _simulated(self, forced: Mapping[str, npt.NDArray[Any]] | None = None) -> Simulation:
        return simulate(
            self._written.file.model, self._written.images, forced, in_float=self._seen, add_kernel=self._kernel
        )

    def shown(self, name: str) -> dict[str, npt.NDArray[np.int64]]:
        """Return the codes in the .npz file `name`, by tensor name, with the zero points subtracted."""
        zeros = self._written.zero_points
        names = [output.name for output in onnx.load(self._written.folder / "shown.onnx").graph.output]
        with np.load(self._written.folder / name) as arrays:
            found = {key: arrays[f"arr_{index}"] for index, key in enumerate(names)}
        return {key: found[key].astype(np.int64) - zeros[key] for key in zeros}

    def cell(self, name: str) -> Cell:
        """Return the comparison of the codes in the .npz file `name`, from an ARM CPU, with those of the simulator."""
        theirs = self.shown(name)
        key = b"".join(codes.tobytes() for codes in theirs.values())
        if key not in self._known:
            doubtful = self._own.inexact
            simulation = self._simulated(theirs) if doubtful else self._own
            exact = compare_codes({n: (simulation.codes[n], own) for n, own in theirs.items() if n not in doubtful})
            ties = {
                n: Tie(simulation.before_rounding[n], np.asarray(simulation.bounds[n] + simulation.kernel_bounds[n]))
                for n in doubtful & theirs.keys()
            }
            near = compare_codes({n: (simulation.codes[n], theirs[n]) for n in ties}, ties)
            other = sum(int((own != self._here[n]).sum()) for n, own in theirs.items())
            self._known[key] = Cell(exact.codes, exact.differing, near.codes, near.wrong, other)
        return self._known[key]


def measure(
    names: Sequence[str], versions: Sequence[str], pictures: npt.NDArray[np.float32], folder: Path
) -> tuple[dict[str, dict[tuple[str, str], Cell | str]], dict[str, dict[tuple[str, str], CountedCodes | str]]]:
    """Export each case's network, run its file on all emulated CPUs, and count the codes.

    Args:
        names: Names of the cases; empty for all.
        versions: Versions of ONNX Runtime.
        pictures: Normalized images, float32 [N, 3, 32, 32].
        folder: Folder for the files.

    Returns:
        For each case, the counts or the reason for none, by (version, CPU); and the same for the corrupted files.
    """
    written: dict[str, Written] = {}
    for name, build, config in cases():
        if not names or name in names:
            torch.manual_seed(0)
            written[name] = write(quantized(build(), config, pictures), folder / f"{len(written)}")
            fused = {op: len(nodes) for op, nodes in optimized_operations(written[name].file.model).items()}
            print(f"{name}: {', '.join(f'{count} {op}' for op, count in sorted(fused.items()))}", file=sys.stderr)
    judges = {name: Judge(case) for name, case in written.items()}
    first = next(iter(written.values()))
    wrong: dict[str, Path] = {"none": first.folder}
    for what, model in broken(first.file.model).items():
        wrong[what] = folder / what.split()[0]
        wrong[what].mkdir()
        onnx.save(model, wrong[what] / "onnxruntime.onnx")
        (wrong[what] / "onnxruntime.codes.npz").write_bytes((first.folder / "onnxruntime.codes.npz").read_bytes())
    cells: dict[str, dict[tuple[str, str], Cell | str]] = {name: {} for name in written}
    failing: dict[str, dict[tuple[str, str], CountedCodes | str]] = {what: {} for what in wrong}
    for version in versions:
        for cpu in emulated_arm.CPUS:
            print(f"ONNX Runtime {version} on {cpu}", file=sys.stderr)
            key = version, cpu
            try:
                python = emulated_arm.python(cpu, version)
                run(python, _SHOW, f"{version}-{cpu}.npz", *(str(case.folder) for case in written.values()))
                for name, judge in judges.items():
                    cells[name][key] = judge.cell(f"{version}-{cpu}.npz")
                for what, found in zip(wrong, counted(python, list(wrong.values())), strict=True):
                    failing[what][key] = found
            except NotRun as reason:
                for row in (*cells.values(), *failing.values()):
                    row.setdefault(key, str(reason))  # type: ignore[attr-defined]
    return cells, failing


def tables(
    cells: Mapping[str, Mapping[tuple[str, str], Cell | str]],
    failing: Mapping[str, Mapping[tuple[str, str], CountedCodes | str]],
    versions: Sequence[str],
) -> str:
    """Return two Markdown tables: the counts of all files, and those of the corrupted files.

    A cell has one number for each CPU, in the order of `emulated_arm.CPUS`.
    """
    cpus = list(emulated_arm.CPUS)
    lines = [f"| network | codes | behind float | otherwise than x86 | {' | '.join(versions)} |"]
    lines.append("|---|---:|---:|---:|" + "---|" * len(versions))
    for name, row in cells.items():
        found = [cell for cell in row.values() if isinstance(cell, Cell)]
        largest = max((cell.other for cell in found), default=0)
        shown = [" ".join(_shown(row[version, cpu]) for cpu in cpus) for version in versions]
        known = found[0] if found else Cell(0, 0, 0, 0, 0)
        lines.append(f"| {name} | {known.codes:,} | {known.near:,} | {largest:,} | {' | '.join(shown)} |")
    lines += ["", f"| wrong in the file | {' | '.join(versions)} |", "|---|" + "---|" * len(versions)]
    for what, broken_row in failing.items():
        shown = [
            " ".join(
                f"{entry.differing:,}" if isinstance(entry, CountedCodes) else entry
                for entry in (broken_row[version, cpu] for cpu in cpus)
            )
            for version in versions
        ]
        lines.append(f"| {what} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else f"{cell.differing + cell.wrong:,}"


def main() -> None:
    """Run the measurement and write its tables into docs/arm.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--names", default="")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--out", type=Path, default=PAGE)
    arguments = parser.parse_args()
    versions = arguments.versions.split(",")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in arguments.names.split(";") if name]
        found = measure(names, versions, images(arguments.cifar10), Path(folder))
    text = tables(*found, versions)
    page = arguments.out.read_text()
    before, mark, rest = page.partition("<!-- python -m bench.arm_codes -->\n")
    arguments.out.write_text(f"{before}{mark}\n{text}\n\n{rest[rest.index('<!-- end -->') :]}" if mark else text)
    print(text)


if __name__ == "__main__":
    main()
