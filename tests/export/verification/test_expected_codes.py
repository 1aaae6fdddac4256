"""What a board is given to compare its codes with: complete, right, and without what may differ for good reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from crqat.core.targets import AddKernel
from crqat.core.typed_json import to_json
from crqat.export.qdq.write import QDQModel
from crqat.export.simulator.run import simulate
from crqat.export.verification.expected_codes import IMAGES, expected_codes
from crqat.runtime_eval.measure.codes import check_codes, read
from tests.export.conftest import Quantized, edited_file, initializer, nodes, quantize, random_images, with_ties

Digits = Callable[[int], Quantized]
KERNELS: tuple[AddKernel, ...] = ("float32", "fixed_point")


def written(file: QDQModel, quantized: Quantized, folder: Path) -> tuple[Path, Path]:
    """The file and its expected codes, on disk."""
    model, expected = folder / "onnxruntime.onnx", folder / "onnxruntime.codes.npz"
    onnx.save(file.model, model)
    assert expected_codes(file, quantized.images, expected)
    return model, expected


def test_every_code_of_a_trained_network_is_expected_and_computed(digits: Digits, tmp_path: Path) -> None:
    for bits in (8, 4):
        file = digits(bits).file("onnxruntime")
        result = check_codes(*written(file, digits(bits), tmp_path), threads=1)
        simulation = simulate(file.model, digits(bits).images[:IMAGES])
        names = [name for names in file.codes.values() for name in names]
        count = sum(simulation.codes[name].size for name in names)
        assert to_json(result) == {
            "status": "passed",
            "images": IMAGES,
            "tensors": len(names),
            "left_out": 0,
            "codes": count,
            "differing": 0,
            "family": "x86",
        }


def test_the_codes_of_each_family_are_those_of_its_kernels(digits: Digits, tmp_path: Path) -> None:
    quantized = with_ties(digits(8))
    file = quantized.file("onnxruntime")
    arrays = read(written(file, quantized, tmp_path)[1])
    assert arrays["families"].tolist() == ["x86", "arm"]
    for codes, kernel in zip((arrays["codes"], arrays["codes"] ^ arrays["changes"][0]), KERNELS, strict=True):
        simulation = simulate(file.model, digits(8).images[:IMAGES], add_kernel=kernel)
        zero_points = {name: file.activations[edge].grid.zero_point for edge in file.codes for name in file.codes[edge]}
        own = [(simulation.codes[name] + zero_points[name]).reshape(-1) for name in arrays["names"]]
        assert (codes == np.concatenate(own)).all()
    assert arrays["changes"].any()


def test_another_file_than_the_proven_one_is_noticed(digits: Digits, tmp_path: Path) -> None:
    quantized = digits(8)
    file = quantized.file("onnxruntime")
    model, expected = written(file, quantized, tmp_path)
    weight = next(tensor.name for tensor in file.model.graph.initializer if tensor.name.endswith(".codes"))
    changed = edited_file(file, weight, np.zeros_like(initializer(file.model, weight)))
    onnx.save(changed.model, model)
    result = check_codes(model, expected, threads=1)
    assert 0 < result.differing < result.codes
    assert result.status.startswith(f"failed: {result.differing} of {result.codes} codes differ, first in ")


def test_codes_behind_float_operations_are_left_out_and_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip
    quantized = quantize(network, random_images(8, 3, 12, 12), targets=("onnxruntime",))
    file = quantized.file("onnxruntime")
    inexact = simulate(file.model, quantized.images).inexact
    result = check_codes(*written(file, quantized, tmp_path), threads=1)
    total = sum(len(names) for names in file.codes.values())
    assert (result.status, result.differing) == ("passed", 0)
    assert result.tensors + result.left_out == total
    # The codes behind the inexact ones are computed from them: they are left out too.
    assert result.left_out > len(inexact) > 0
    assert result.tensors > 0


def test_nothing_is_written_where_nothing_is_known(digits: Digits, tmp_path: Path) -> None:
    quantized = digits(8)
    file = quantized.file("onnxruntime")
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    nodes(model, "Relu")[0].op_type = "Det"
    assert not expected_codes(replace(file, model=model), quantized.images, tmp_path / "codes.npz")
    assert not expected_codes(replace(file, codes={}), quantized.images, tmp_path / "codes.npz")
    assert list(tmp_path.iterdir()) == []
