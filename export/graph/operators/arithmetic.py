"""Converters of torch operators: arithmetic, comparisons and reductions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from crqat.export.graph.operators.walk import HANDLERS, Arguments, Handler, Walk, axes_of, first, operator


def _same(operation: str) -> Handler:
    return lambda w, a: w.emit(operation, [w.float_name(first(a))])


for _torch, _onnx in {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "neg": "Neg", "abs": "Abs", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign",
    "reciprocal": "Reciprocal", "hardswish": "HardSwish", "sin": "Sin", "cos": "Cos", "selu": "Selu", "negative": "Neg",
}.items():  # fmt: skip
    HANDLERS[_torch] = _same(_onnx)


def _two(operation: str) -> Handler:
    def write(w: Walk, a: Arguments) -> str:
        dtype = w.node.meta["val"].dtype
        x, y = list(a.values())[:2]
        if a.get("alpha", 1) != 1:
            y = w.emit("Mul", [w.name(y, dtype), w.name(a["alpha"], dtype)])
            return str(w.emit(operation, [w.name(x, dtype), y]))
        return str(w.emit(operation, [w.name(x, dtype), w.name(y, dtype)]))

    return write


for _torch, _onnx in {
    "add": "Add", "sub": "Sub", "mul": "Mul", "maximum": "Max", "minimum": "Min", "pow": "Pow", "multiply": "Mul",
    "subtract": "Sub",
}.items():  # fmt: skip
    HANDLERS[_torch] = _two(_onnx)


def _compare(operation: str) -> Handler:
    def write(w: Walk, a: Arguments) -> str:
        x, y = list(a.values())[:2]
        dtype = torch.float32
        return str(w.emit(operation, [w.name(x, dtype), w.name(y, dtype)]))

    return write


for _torch, _onnx in {
    "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal",
}.items():  # fmt: skip
    HANDLERS[_torch] = _compare(_onnx)


@operator("ne")
def _not_equal(w: Walk, a: Arguments) -> Any:
    return w.emit("Not", [_compare("Equal")(w, a)])


@operator("logical_not", "bitwise_not")
def _not(w: Walk, a: Arguments) -> Any:
    return w.emit("Not", [w.name(a["self"], torch.bool)])


@operator("logical_and", "bitwise_and", "__and__")
def _and(w: Walk, a: Arguments) -> Any:
    return w.emit("And", [w.name(value, torch.bool) for value in list(a.values())[:2]])


@operator("logical_or", "bitwise_or", "__or__")
def _or(w: Walk, a: Arguments) -> Any:
    return w.emit("Or", [w.name(value, torch.bool) for value in list(a.values())[:2]])


@operator("rsub")
def _rsub(w: Walk, a: Arguments) -> Any:
    values = list(a.values())
    return _two("Sub")(w, {"self": values[1], "other": values[0], "alpha": a.get("alpha", 1)})


@operator("div", "divide", "true_divide", "floor_divide")
def _div(w: Walk, a: Arguments) -> Any:
    mode = "floor" if "floor_divide" in str(w.node.target) else a.get("rounding_mode")
    result = w.emit("Div", [w.float_name(a["self"]), w.float_name(a["other"])])
    if mode == "trunc":
        result = w.emit("Mul", [w.emit("Sign", [result]), w.emit("Floor", [w.emit("Abs", [result])])])
    return w.emit("Floor", [result]) if mode == "floor" else result


@operator("square")
def _square(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    return w.emit("Mul", [name, name])


@operator("rsqrt")
def _rsqrt(w: Walk, a: Arguments) -> Any:
    return w.emit("Reciprocal", [w.emit("Sqrt", [w.float_name(a["self"])])])


@operator("log1p")
def _log1p(w: Walk, a: Arguments) -> Any:
    return w.emit("Log", [w.emit("Add", [w.float_name(a["self"]), w.name(1.0)])])


@operator("expm1")
def _expm1(w: Walk, a: Arguments) -> Any:
    return w.emit("Sub", [w.emit("Exp", [w.float_name(a["self"])]), w.name(1.0)])


@operator("log2", "log10")
def _log_of_base(w: Walk, a: Arguments) -> Any:
    base = 2.0 if "log2" in str(w.node.target) else 10.0
    return w.emit("Mul", [w.emit("Log", [w.float_name(a["self"])]), w.name(1 / math.log(base))])


@operator("lerp")
def _lerp(w: Walk, a: Arguments) -> Any:
    start, end = w.float_name(a["self"]), w.float_name(a["end"])
    return w.emit("Add", [start, w.emit("Mul", [w.emit("Sub", [end, start]), w.float_name(a["weight"])])])


@operator("addcmul", "addcdiv")
def _addcmul(w: Walk, a: Arguments) -> Any:
    operation = "Div" if "addcdiv" in str(w.node.target) else "Mul"
    product = w.emit(operation, [w.float_name(a["tensor1"]), w.float_name(a["tensor2"])])
    if a["value"] != 1:
        product = w.emit("Mul", [product, w.name(a["value"])])
    return w.emit("Add", [w.float_name(a["self"]), product])


@operator("clamp", "clip", "hardtanh", "clamp_min", "clamp_max")
def _clamp(w: Walk, a: Arguments) -> Any:
    low, high = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    x = w.float_name(a["self"])
    for bound, operation in ((low, "Max"), (high, "Min")):
        if isinstance(bound, fx.Node):
            x = w.emit(operation, [x, w.float_name(bound)])
    numbers = [None if isinstance(bound, fx.Node) else bound for bound in (low, high)]
    if numbers == [None, None]:
        return x
    if numbers[0] == 0 and numbers[1] is None:
        return w.emit("Relu", [x])
    bounds = ["" if bound is None else w.float_name(float(bound)) for bound in numbers]
    return w.emit("Clip", [x, *bounds] if bounds[1] else [x, bounds[0]])


@operator("relu6")
def _relu6(w: Walk, a: Arguments) -> Any:
    return w.emit("Clip", [w.float_name(a["self"]), w.name(0.0), w.name(6.0)])


@operator("where")
def _where(w: Walk, a: Arguments) -> Any:
    dtype = w.node.meta["val"].dtype
    return w.emit("Where", [w.name(a["condition"], torch.bool), w.name(a["self"], dtype), w.name(a["other"], dtype)])


@operator("masked_fill")
def _masked_fill(w: Walk, a: Arguments) -> Any:
    return w.emit("Where", [w.name(a["mask"], torch.bool), w.float_name(a["value"]), w.float_name(a["self"])])


@operator("max", "amax", "min", "amin")
def _extreme(w: Walk, a: Arguments) -> Any:
    kind = "Max" if "max" in str(w.node.target) else "Min"
    if "other" in a:
        return _two(kind)(w, a)
    axes = axes_of(a["self"], a.get("dim"))
    for axis in axes:
        w.known(a["self"], axis)
    name, kept = w.float_name(a["self"]), int(a.get("keepdim", False))
    values = w.emit(f"Reduce{kind}", [name], axes=axes, keepdims=kept)
    if not isinstance(w.node.meta["val"], (tuple, list)):
        return values
    read = any(user.args[1] == 1 for user in w.node.users)
    return [values, w.emit(f"Arg{kind}", [name], axis=axes[0], keepdims=kept) if read else ""]


@operator("mean", "sum", "prod", "logsumexp")
def _reduced(w: Walk, a: Arguments) -> Any:
    axes = axes_of(a["self"], a.get("dim"))
    for axis in axes:
        w.known(a["self"], axis)
    name, kept = w.float_name(a["self"]), int(a.get("keepdim", False))
    if "mean" in str(w.node.target):
        return w.emit("ReduceMean", [name], axes=axes, keepdims=kept)
    if "logsumexp" in str(w.node.target):
        return w.emit("ReduceLogSumExp", [name], axes=axes, keepdims=kept)
    if "prod" in str(w.node.target):
        return w.emit("ReduceProd", [name], axes=axes, keepdims=kept)
    return w.emit("ReduceSum", [name, w.ints(axes)], keepdims=kept)


@operator("cumsum")
def _cumulative_sum(w: Walk, a: Arguments) -> Any:
    axis = axes_of(a["self"], a["dim"])[0]
    return w.emit("CumSum", [w.float_name(a["self"]), w.constant(np.asarray(axis, np.int64))])


@operator("linalg_vector_norm", "norm")
def _norm(w: Walk, a: Arguments) -> Any:
    order = a.get("ord", a.get("p"))
    order = 2 if order is None else order
    axes = axes_of(a["self"], a["dim"])
    for axis in axes:
        w.known(a["self"], axis)
    name, kept = w.float_name(a["self"]), int(a["keepdim"])
    if order in (1, 2):
        return w.emit(f"ReduceL{int(order)}", [name], axes=axes, keepdims=kept)
    name = w.emit("Abs", [name])
    if order == math.inf:
        return w.emit("ReduceMax", [name], axes=axes, keepdims=kept)
    summed = w.emit("ReduceSum", [w.emit("Pow", [name, w.name(order)]), w.ints(axes)], keepdims=kept)
    return w.emit("Pow", [summed, w.name(1 / order)])


def _variance(w: Walk, a: Arguments, kept: int) -> tuple[str, str]:
    """Return the names of variance and mean; the mean keeps all dimensions."""
    x, axes = a["self"], axes_of(a["self"], a.get("dim"))
    count = math.prod(w.known(x, axis) for axis in axes)
    correction = a.get("correction", int(a.get("unbiased", True)))
    correction = 1 if correction is None else correction
    name = w.float_name(x)
    mean = w.emit("ReduceMean", [name], axes=axes, keepdims=1)
    off = w.emit("Sub", [name, mean])
    variance = w.emit("ReduceMean", [w.emit("Mul", [off, off])], axes=axes, keepdims=kept)
    if correction:
        variance = w.emit("Mul", [variance, w.name(count / (count - correction))])
    return variance, mean


@operator("var")
def _var(w: Walk, a: Arguments) -> Any:
    return _variance(w, a, int(a.get("keepdim", False)))[0]


@operator("std")
def _std(w: Walk, a: Arguments) -> Any:
    return w.emit("Sqrt", [_var(w, a)])


@operator("var_mean", "std_mean")
def _var_mean(w: Walk, a: Arguments) -> Any:
    kept = int(a.get("keepdim", False))
    variance, mean = _variance(w, a, kept)
    if not kept:
        mean = w.emit("Squeeze", [mean, w.ints(axes_of(a["self"], a.get("dim")))])
    return [w.emit("Sqrt", [variance]) if "std" in str(w.node.target) else variance, mean]
