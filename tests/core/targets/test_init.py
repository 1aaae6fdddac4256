"""The numbers of the runtimes' rules, and what they ask together."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crqat.core.errors import UsageError
from crqat.core.targets import (
    INT16_MAX,
    ONNXRUNTIME,
    TENSORRT,
    ClipNode,
    LayerNode,
    Node,
    QuantizeNode,
    find,
    get,
    is_depthwise,
    union,
    weight_codes,
)
from crqat.core.targets.scale_rounding import round_up, too_large

BOTH = ("onnxruntime", "tensorrt")


def test_a_name_is_found_or_refused_with_the_nearest() -> None:
    assert [get(name) for name in BOTH] == [ONNXRUNTIME, TENSORRT]
    assert find("float16") is None
    with pytest.raises(UsageError, match="did you mean `tensorrt`"):
        get("tensorr")


@pytest.mark.parametrize(
    ("shape", "groups", "depthwise"),
    [
        ((8, 1, 3, 3), 8, True),
        ((16, 1, 3, 3), 8, False),  # two filters per channel
        ((8, 2, 3, 3), 4, False),
        ((8, 1, 3, 3), 1, False),  # one input channel
        ((8, 1, 3), 8, False),  # one dimension
        ((1, 1), 1, False),
    ],
)
def test_depthwise_is_one_filter_of_one_channel(shape: tuple[int, ...], groups: int, depthwise: bool) -> None:
    assert is_depthwise(shape, groups) is depthwise


@given(st.integers(1, 255), st.integers(2, 8))
def test_the_widest_weight_whose_sums_fit_in_16_bits(codes: int, asked: int) -> None:
    bits, reason = union(BOTH).weight_bits(asked, codes, depthwise=False)
    fitting = [b for b in range(2, asked + 1) if 2 * codes * weight_codes(b)[1] <= INT16_MAX]
    assert bits == max(fitting)
    assert bool(reason) == (bits != asked)


def test_the_family_of_a_cpu_says_how_its_kernels_add() -> None:
    kernels = {machine: family.add_kernel for family in ONNXRUNTIME.cpus for machine in family.machines}
    assert kernels["x86_64"] == kernels["AMD64"] == "float32"
    assert kernels["aarch64"] == kernels["arm64"] == "fixed_point"
    found = ONNXRUNTIME.cpu("aarch64")
    assert found is not None and found.name == "arm"
    assert ONNXRUNTIME.cpu("riscv64") is None
    assert TENSORRT.cpus == ()


def test_sums_of_32_bits_and_of_one_product_fit() -> None:
    assert union(["tensorrt"]).weight_bits(8, 255, depthwise=False) == (8, "")
    assert union(BOTH).weight_bits(8, 255, depthwise=True) == (8, "")
    assert union(BOTH).weight_bits(8, None, depthwise=False) == (8, "")


def test_the_union_keeps_to_the_strictest() -> None:
    assert union(["onnxruntime"]).activation_codes(8, nonnegative=True) == (0, 255)
    assert union(BOTH).activation_codes(8, nonnegative=True) == (0, 127)
    assert union(BOTH).activation_codes(4, nonnegative=True) == (0, 15)
    assert union(BOTH).activation_codes(8, nonnegative=False) == (-128, 127)
    assert (union(BOTH).residual, union(["tensorrt"]).residual) == ("both", "skip")
    assert union(BOTH).without_zero_points is TENSORRT
    assert union(["onnxruntime"]).without_zero_points is None


@given(st.floats(2.0**-30, 60000, width=32))
def test_scales_go_up_to_the_next_value_that_is_stored(scale: float) -> None:
    scales = np.array([scale], np.float32)
    raised = round_up(scales, union(BOTH).targets)
    assert raised >= scales
    assert raised.astype(np.float16).astype(np.float32) == raised
    assert np.nextafter(raised.astype(np.float16), np.float16(0)).astype(np.float32) < scales
    np.testing.assert_array_equal(round_up(scales, union(["onnxruntime"]).targets), scales)


def test_a_scale_beyond_float16_is_named() -> None:
    for large in (65536.0, np.nan):
        assert too_large(np.array([1.0, large], np.float32), union(BOTH).targets) is TENSORRT
    assert too_large(np.array([65536.0], np.float32), union(["onnxruntime"]).targets) is None


GOOD_ACTIVATION = {"of_constant": False, "zero_point_is_zero": True, "scalar_scale": True}


@pytest.mark.parametrize(
    ("target", "node", "rule"),
    [
        ("onnxruntime", QuantizeNode(zero_point_type="UINT8", **GOOD_ACTIVATION), ""),
        ("onnxruntime", QuantizeNode(zero_point_type="INT8", **GOOD_ACTIVATION), "activations must be UINT8"),
        ("onnxruntime", QuantizeNode(False, "UINT8", True, False), "a per-tensor scale must be a scalar"),
        ("onnxruntime", QuantizeNode(True, "INT8", True, False), ""),
        ("onnxruntime", LayerNode("Conv", True, True, True, 127, 127), ""),
        ("onnxruntime", LayerNode("Conv", True, True, True, 255, 65), "255 \\* 2 \\* 65 > 32767"),
        ("onnxruntime", LayerNode("Conv", True, True, True, 255, 65, depthwise=True), ""),
        ("onnxruntime", LayerNode("Conv", True, True, False), "weights must be stored as integers"),
        ("onnxruntime", LayerNode("Gemm", True, True, True, 127, 127, constant_bias=True), "int32 bias"),
        ("onnxruntime", LayerNode("Gemm", False, False, constant_bias=True), ""),
        ("onnxruntime", ClipNode(True), "a float Clip before a quantizer"),
        ("tensorrt", QuantizeNode(zero_point_type="INT8", **GOOD_ACTIVATION), ""),
        ("tensorrt", QuantizeNode(zero_point_type="UINT8", **GOOD_ACTIVATION), "reads UINT8"),
        ("tensorrt", QuantizeNode(zero_point_type=None, **GOOD_ACTIVATION), "reads none"),
        ("tensorrt", QuantizeNode(False, "INT8", False, True), "zero point other than 0"),
        ("tensorrt", LayerNode("Conv", True, False), "its weight is not quantized"),
        ("tensorrt", LayerNode("Conv", False, True), "its input is not quantized"),
        ("tensorrt", LayerNode("Conv", False, False), ""),
        ("tensorrt", LayerNode("Conv", True, True, True, 255, 127), ""),
    ],
)
def test_rules_of_lint(target: str, node: Node, rule: str) -> None:
    broken = [text.rule for text in get(target).rules(node)]
    if not rule:
        assert broken == []
        return
    assert len(broken) == 1
    assert re.search(rule, broken[0])
