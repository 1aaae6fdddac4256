"""Converters of torch operators: activation functions."""

from __future__ import annotations

import math
from typing import Any

from crqat.export.graph.operators.walk import Arguments, Walk, axis_of, operator


@operator("silu")
def _silu(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    return w.emit("Mul", [name, w.emit("Sigmoid", [name])])


@operator("hardsigmoid")
def _hardsigmoid(w: Walk, a: Arguments) -> Any:
    return w.emit("HardSigmoid", [w.float_name(a["self"])], alpha=1 / 6)


@operator("gelu")
def _gelu(w: Walk, a: Arguments) -> Any:
    x = w.float_name(a["self"])
    if a["approximate"] == "tanh":
        cube = w.emit("Mul", [w.emit("Mul", [x, x]), x])
        inner = w.emit("Add", [x, w.emit("Mul", [cube, w.name(0.044715)])])
        bent = w.emit("Tanh", [w.emit("Mul", [inner, w.name(math.sqrt(2 / math.pi))])])
    else:
        bent = w.emit("Erf", [w.emit("Div", [x, w.name(math.sqrt(2))])])
    return w.emit("Mul", [w.emit("Mul", [x, w.emit("Add", [bent, w.name(1.0)])]), w.name(0.5)])


@operator("elu")
def _elu(w: Walk, a: Arguments) -> Any:
    if a["scale"] != 1 or a["input_scale"] != 1:
        w.refuse("ONNX cannot express an ELU with scale or input_scale")
    return w.emit("Elu", [w.float_name(a["self"])], alpha=float(a["alpha"]))


@operator("celu")
def _celu(w: Walk, a: Arguments) -> Any:
    return w.emit("Celu", [w.float_name(a["self"])], alpha=float(a["alpha"]))


@operator("softplus")
def _softplus(w: Walk, a: Arguments) -> Any:
    name, beta = w.float_name(a["self"]), float(a["beta"])
    if beta == 1:
        return w.emit("Softplus", [name])
    return w.emit("Div", [w.emit("Softplus", [w.emit("Mul", [name, w.name(beta)])]), w.name(beta)])


@operator("log_sigmoid")
def _log_sigmoid(w: Walk, a: Arguments) -> Any:
    return w.emit("Neg", [w.emit("Softplus", [w.emit("Neg", [w.float_name(a["self"])])])])


@operator("mish")
def _mish(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    return w.emit("Mul", [name, w.emit("Tanh", [w.emit("Softplus", [name])])])


@operator("leaky_relu")
def _leaky_relu(w: Walk, a: Arguments) -> Any:
    return w.emit("LeakyRelu", [w.float_name(a["self"])], alpha=float(a["negative_slope"]))


@operator("rrelu")
def _rrelu(w: Walk, a: Arguments) -> Any:
    return w.emit("LeakyRelu", [w.float_name(a["self"])], alpha=(a["lower"] + a["upper"]) / 2)


@operator("prelu")
def _prelu(w: Walk, a: Arguments) -> Any:
    name, slope = w.float_name(a["self"]), w.float_name(a["weight"])
    ndim = a["self"].meta["val"].ndim
    if slope in w.constants and w.constants[slope].size > 1 and ndim > 2:
        slope = w.constant(w.constants[slope].reshape(-1, *[1] * (ndim - 2)))
    return w.emit("PRelu", [name, slope])


@operator("glu")
def _glu(w: Walk, a: Arguments) -> Any:
    axis = axis_of(a["self"], a["dim"])
    half = w.known(a["self"], axis) // 2
    left, right = w.emit("Split", [w.float_name(a["self"]), w.ints([half, half])], 2, axis=axis)
    return w.emit("Mul", [left, w.emit("Sigmoid", [right])])


@operator("softmax", "_softmax")
def _softmax(w: Walk, a: Arguments) -> Any:
    return w.emit("Softmax", [w.float_name(a["self"])], axis=axis_of(a["self"], a["dim"]))


@operator("log_softmax", "_log_softmax")
def _log_softmax(w: Walk, a: Arguments) -> Any:
    return w.emit("LogSoftmax", [w.float_name(a["self"])], axis=axis_of(a["self"], a["dim"]))


@operator("softshrink", "hardshrink")
def _shrink(w: Walk, a: Arguments) -> Any:
    name, bound, zero = w.float_name(a["self"]), float(a["lambd"]), w.name(0.0)
    soft = "softshrink" in str(w.node.target)
    above = w.emit("Sub", [name, w.name(bound)]) if soft else name
    below = w.emit("Add", [name, w.name(bound)]) if soft else name
    low = w.emit("Where", [w.emit("Less", [name, w.name(-bound)]), below, zero])
    return w.emit("Where", [w.emit("Greater", [name, w.name(bound)]), above, low])


@operator("threshold")
def _threshold(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    if a["threshold"] == a["value"] == 0:
        return w.emit("Relu", [name])
    above = w.emit("Greater", [name, w.name(float(a["threshold"]))])
    return w.emit("Where", [above, name, w.name(float(a["value"]))])
