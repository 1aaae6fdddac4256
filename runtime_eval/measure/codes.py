"""Whether this CPU computes the integer codes that the export's simulator expects, counted on the file that ships.

The expectation is an .npz file without pickled objects: `images`, float32 [N, C, H, W], normalized; `names` of the
tensors of codes, and `codes`, uint8, their bytes one after the other; `left_out`, how many tensors hold codes that
another correct float computation may round otherwise; `outputs`, uint8, an ONNX model of these tensors as outputs and
nothing else. Protobuf merges messages that follow each other, so the model's own bytes and `outputs` behind them are
the same model with its codes shown, and a board needs no onnx to see them.

CPUs of another family round some codes otherwise: `families` names those whose codes are known, the first of them that
of `codes`, and `changes`, uint8 [other families, codes], has the exclusive or of each other's codes with these. An
expectation of an earlier version has neither key: its codes are those of the Target's first family.
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
    """Run a model on the CPU with its codes shown and count those that are not the expected ones.

    Args:
        model: The ONNX file, with "input" and "logits".
        expected: What `crqat.export.verification.expected_codes.expected_codes` wrote for it.
        threads: Threads within one operator.

    Raises:
        ToolError: The expectation does not fit the model, or ONNX Runtime refuses it.
    """
    arrays = read(expected)
    names, images = [str(name) for name in arrays["names"]], arrays["images"]
    family = ONNXRUNTIME.cpu(platform.machine())
    known = dict(zip(arrays["families"].tolist(), [arrays["codes"], *arrays["codes"] ^ arrays["changes"]], strict=True))
    if family is None or family.name not in known:
        status = f"not run: codes are known for {' and '.join(known)}, not for {platform.machine()}; export again"
        return CountedCodes(status, len(images), codes=0, differing=0, tensors=len(names))
    codes = known[family.name]
    content = model.read_bytes()
    logits, *theirs = _run(content + arrays["outputs"].tobytes(), ["logits", *names], images, threads)
    (shipped,) = _run(content, ["logits"], images, threads)
    raw = [np.ascontiguousarray(tensor).reshape(-1).view(np.uint8) for tensor in theirs]
    if sum(tensor.size for tensor in raw) != codes.size:
        msg = f"{expected.name} holds {codes.size} codes, {model.name} computes another number; export again"
        raise ToolError(msg)
    parts = np.split(codes, np.cumsum([tensor.size for tensor in raw])[:-1])
    counted = compare_codes(dict(zip(names, zip(parts, raw, strict=True), strict=True)))
    status = PASSED
    if counted.differing:
        status = f"failed: {counted.differing} of {counted.codes} codes differ, first in {counted.first_wrong}"
    elif not np.array_equal(logits, shipped):
        # Then it is another computation that was looked at.
        status = "failed: with its codes shown the file computes other logits than as it ships"
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
    """The arrays of an expectation by their keys.

    Raises:
        ToolError: It holds something else, or more than `MAX_BYTES`.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            # A few compressed bytes may be more than the memory holds; no more is read than the archive says.
            if sum(entry.file_size for entry in stored.zip.infolist()) > MAX_BYTES:
                msg = f"unpacked it is larger than {MAX_BYTES // 2**20} MiB"
                raise ValueError(msg)
            arrays = {key: stored[key] for key in (*_KEYS, *(key for key in _FAMILIES if key in stored))}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # bytes of another kind of file
                msg = "a member is no array"
                raise ValueError(msg)
    except Exception as error:  # a zip file that is none fails in many ways
        msg = f"{path.name}: no expected codes ({type(error).__name__}: {error}); export again"
        raise ToolError(msg) from error
    codes = arrays["codes"]
    earlier = {"families": np.array([ONNXRUNTIME.cpus[0].name]), "changes": np.zeros((0, codes.size), np.uint8)}
    arrays = {**earlier, **arrays}
    kinds = [arrays[key].dtype for key in ("images", "codes", "outputs", "changes")]
    whole = codes.ndim == 1 and arrays["changes"].shape == (arrays["families"].size - 1, codes.size)
    if kinds != [np.float32, *[np.uint8] * 3] or not codes.size or not arrays["names"].size or not whole:
        msg = f"{path.name}: no expected codes; export again"
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
        msg = f"ONNX Runtime does not show the file's codes: {error}"
        raise ToolError(msg) from error
    return results
