"""Checks that this CPU computes, with the exported file, the integer codes that the export's simulator computed.

The expected codes are in an .npz file without pickled objects: `images`, float32 [N, C, H, W], normalized; `names`, the
tensors of codes; `codes`, uint8, their bytes in sequence; `left_out`, the number of tensors that are left out because
another correct float computation may round their codes differently; `outputs`, uint8, an ONNX model that only has the
tensors in `names` as outputs. Protobuf merges messages that follow each other, so the model's own bytes followed by
`outputs` are the same model with exposed codes, and a board needs no onnx for it.

CPUs of another family round some codes differently: `families` names the families whose codes are known, first that of
`codes`, and `changes`, uint8 [other families, codes], holds the exclusive or of each other family's codes with `codes`.
A file from an earlier version has neither key: its codes are those of the first family in `Target.cpus`.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from crqat.core.compare_codes import compare_codes
from crqat.core.errors import ToolError
from crqat.core.results.benchmark import CountedCodes
from crqat.core.targets import ONNXRUNTIME

PASSED = "passed"
_KEYS = ("images", "names", "codes", "left_out", "outputs")
_FAMILIES = ("families", "changes")
MAX_BYTES = 2**30  # of all arrays, unpacked


def check_codes(model: Path, expected: Path, threads: int) -> CountedCodes:
    """Run a model on the CPU with its codes as additional outputs, and count those that are not as expected.

    Args:
        model: The ONNX file, with "input" and "logits".
        expected: File that `crqat.export.verification.expected_codes.expected_codes` wrote for the model.
        threads: Number of threads within one operator.

    Raises:
        ToolError: The file of expected codes does not fit the model, or ONNX Runtime cannot run the model.
    """
    arrays = read(expected)
    names, images = [str(name) for name in arrays["names"]], arrays["images"]
    family = ONNXRUNTIME.cpu(platform.machine())
    known = dict(zip(arrays["families"].tolist(), [arrays["codes"], *arrays["codes"] ^ arrays["changes"]], strict=True))
    if family is None or family.name not in known:
        cpus = f"{' and '.join(known)} CPUs, not for {platform.machine()}"
        status = f"not run: expected codes are known for {cpus}; export again"
        return CountedCodes(status, len(images), codes=0, differing=0, tensors=len(names))
    codes = known[family.name]
    content = model.read_bytes()
    logits, *theirs = _run(content + arrays["outputs"].tobytes(), ["logits", *names], images, threads)
    (shipped,) = _run(content, ["logits"], images, threads)
    raw = [np.ascontiguousarray(tensor).reshape(-1).view(np.uint8) for tensor in theirs]
    if sum(tensor.size for tensor in raw) != codes.size:
        msg = f"{expected.name} holds {codes.size} codes, but {model.name} computes another number; export again"
        raise ToolError(msg)
    parts = np.split(codes, np.cumsum([tensor.size for tensor in raw])[:-1])
    counted = compare_codes(dict(zip(names, zip(parts, raw, strict=True), strict=True)))
    status = PASSED
    if counted.differing:
        status = f"failed: {counted.differing} of {counted.codes} codes differ, first in {counted.first_wrong}"
    elif not np.array_equal(logits, shipped):
        # The check then ran another computation than the shipped file.
        status = "failed: with its codes as additional outputs, the file computes other logits than without"
    return CountedCodes(
        status=status,
        images=len(images),
        tensors=len(names),
        left_out=int(arrays["left_out"]),
        codes=counted.codes,
        differing=counted.differing,
        family=family.name,
    )


def read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays in a file of expected codes by key; the module's docstring describes them.

    Raises:
        ToolError: The file holds other data, or more than `MAX_BYTES`.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            # A few compressed bytes may unpack to more than the memory; only as much is read as the archive declares.
            if sum(entry.file_size for entry in stored.zip.infolist()) > MAX_BYTES:
                msg = f"unpacked it is larger than {MAX_BYTES // 2**20} MiB"
                raise ValueError(msg)
            arrays = {key: stored[key] for key in (*_KEYS, *(key for key in _FAMILIES if key in stored))}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # members of other files are bytes
                msg = "a member is not an array"
                raise ValueError(msg)
    except Exception as error:  # a file that is no zip archive fails in many ways
        msg = f"{path.name}: not a file of expected codes ({type(error).__name__}: {error}); export again"
        raise ToolError(msg) from error
    codes = arrays["codes"]
    earlier = {"families": np.array([ONNXRUNTIME.cpus[0].name]), "changes": np.zeros((0, codes.size), np.uint8)}
    arrays = {**earlier, **arrays}
    kinds = [arrays[key].dtype for key in ("images", "codes", "outputs", "changes")]
    whole = codes.ndim == 1 and arrays["changes"].shape == (arrays["families"].size - 1, codes.size)
    if kinds != [np.float32, *[np.uint8] * 3] or not codes.size or not arrays["names"].size or not whole:
        msg = f"{path.name}: not a file of expected codes; export again"
        raise ToolError(msg)
    return arrays


def _run(model: bytes, outputs: list[str], images: npt.NDArray[np.float32], threads: int) -> list[npt.NDArray[Any]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results: list[npt.NDArray[Any]] = session.run(outputs, {"input": images})
    except Exception as error:  # ONNX Runtime's own exception classes share no public base
        msg = f"ONNX Runtime does not run the file with its codes as outputs: {error}"
        raise ToolError(msg) from error
    return results
