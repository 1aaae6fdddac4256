"""torch's operators as operations of ONNX, opset 17: a closed list."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from crqat.core.errors import UsageError
from crqat.export.graph.record import DOMAIN, Program, module_of
from crqat.train.graph.explain import source_line

Arguments = dict[str, Any]
_TYPES = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL,
    torch.uint8: TensorProto.UINT8,
}  # fmt: skip


class Walk:
    """Writes a program as nodes of ONNX.

    Attributes:
        nodes: In topological order; the last one's output is "logits".
        constants: Tensor name to array.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.names: dict[fx.Node, Any] = {}
        self.node: fx.Node = program.nodes[0]  # the one at hand
        self._batch = ""

    def run(self) -> None:
        """Write all of it.

        Raises:
            UsageError: An operator has no form in ONNX; the message names module and line.
        """
        for node in self.program.nodes:
            self.node = node
            if node.op == "placeholder":
                self.names[node] = "input"
            elif node.op == "output":
                (result,) = node.all_input_nodes
                self._end(self.name(result))
            elif node.op == "call_function" and not self.program.is_fixed(node):
                self.names[node] = self._written(node)

    def _end(self, last: str) -> None:
        if not any(last in node.output for node in self.nodes):
            last = self.emit("Identity", [last])
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == last:
                        names[index] = "logits"

    def _written(self, node: fx.Node) -> Any:
        target: Any = node.target
        if getattr(target, "__name__", "") == "getitem":
            return self.names[node.args[0]][node.args[1]]  # type: ignore[index]
        schema = target._schema
        name = schema.name.partition("::")[2]
        if name.endswith("_"):
            self._refuse_shared(node)
            name = name[:-1]
        handler = HANDLERS.get(name)
        if handler is None:
            self.refuse(f"torch's {name} has no form in ONNX that is known here")
        arguments = {a.name: a.default_value for a in schema.arguments}
        arguments.update(zip(arguments, node.args, strict=False))
        arguments.update(node.kwargs)
        return handler(self, arguments)

    def _refuse_shared(self, node: fx.Node) -> None:
        """An operator that changes its input in place is the same as one that does not, unless views share it."""
        changed = node.all_input_nodes[0]
        shared = any(_is_view(user) for user in changed.users if user is not node)
        if shared or (_is_view(changed) and len(changed.all_input_nodes[0].users) > 1):
            self.refuse("a tensor is changed in place of which a part or another view is in use")

    def refuse(self, what: str) -> NoReturn:
        """Say what cannot be written, with the module and the line of the operator at hand."""
        place = module_of(self.node) or "the network itself"
        msg = f"model.name: {place}{source_line(self.node.stack_trace)}: {what}; replace that operation"
        raise UsageError(msg)

    def sizes(self, node: fx.Node) -> list[int | None]:
        """See `Program.sizes`."""
        return self.program.sizes(node)

    def shape(self, node: fx.Node) -> list[int]:
        """As `sizes`, with -1 for the batch, which must be in one dimension alone."""
        sizes = self.sizes(node)
        if sizes.count(None) > 1:
            self.refuse("the number of images is in two dimensions of a tensor")
        return [-1 if size is None else size for size in sizes]

    def known(self, node: fx.Node, axis: int) -> int:
        """A size that is not the batch's."""
        size = self.sizes(node)[axis]
        if size is None:
            self.refuse("images are mixed with one another")
        return int(size)

    def name(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """The tensor of a node or a number.

        Args:
            value: An fx node, or a number that becomes a constant.
            dtype: What it is converted to; None leaves it.
        """
        if not isinstance(value, fx.Node):
            return self.constant(np.asarray(value, _numpy(dtype or torch.float32)))
        found = value.meta["val"].dtype
        if value not in self.names:
            self.names[value] = self._fixed(value)
        name = str(self.names[value])
        if dtype is None or found == dtype:
            return name
        if name in self.constants:
            return self.constant(self.constants[name].astype(_numpy(dtype)))
        return str(self.emit("Cast", [name], to=_TYPES[dtype]))

    def _fixed(self, node: fx.Node) -> str:
        value: Tensor = self.program.value(node).detach()
        sizes = self.sizes(node)
        if None not in sizes:
            return self.constant(value.cpu().numpy(), self.program.stored_name(node))
        axis = sizes.index(None)
        row = value.narrow(axis, 0, 1)
        if sizes.count(None) > 1 or not torch.equal(row.expand_as(value), value):
            self.refuse("a tensor is computed from the number of images")
        return str(self.emit("Expand", [self.constant(row.cpu().numpy()), self.batch_shape(self.shape(node))]))

    def batch_shape(self, shape: Sequence[int]) -> str:
        """A shape with the number of images in place of -1, computed."""
        if not self._batch:
            self._batch = self.emit("Shape", ["input"], start=0, end=1)
        axis = list(shape).index(-1)
        parts = [self._batch]
        if shape[:axis]:
            parts.insert(0, self.ints(shape[:axis]))
        if shape[axis + 1 :]:
            parts.append(self.ints(shape[axis + 1 :]))
        return str(self.emit("Concat", parts, axis=0))

    def constant(self, value: npt.NDArray[Any], name: str | None = None) -> str:
        """A constant's name."""
        name = name or f"constant.{len(self.constants)}"
        self.constants[name] = value
        return name

    def ints(self, values: Sequence[int]) -> str:
        """A constant of int64."""
        return self.constant(np.asarray(values, np.int64))

    def emit(self, operation: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; its output's name, or a list of names."""
        scope = module_of(self.node).replace(".", "/")
        base = f"/{scope}/{operation}_{len(self.nodes)}" if scope else f"/{operation}_{len(self.nodes)}"
        names = [base] if outputs == 1 else [f"{base}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operation, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def float_name(self, value: Any) -> str:
        """An operand of what is computed in float32."""
        return self.name(value, torch.float32)

    def reshaped(self, name: str, source: Sequence[int | None], shape: Sequence[int]) -> str:
        """A tensor in another shape; nothing if it has that one."""
        if [-1 if size is None else size for size in source] == list(shape):
            return name
        if len(shape) == 2 and len(source) > 2 and source[0] is None and shape[0] == -1:
            return str(self.emit("Flatten", [name], axis=1))
        return str(self.emit("Reshape", [name, self.ints(shape)]))


def _is_view(node: fx.Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", [])
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _numpy(dtype: torch.dtype) -> Any:
    return torch.empty((), dtype=dtype).numpy().dtype


HANDLERS: dict[str, Callable[[Walk, Arguments], Any]] = {}
_Handler = Callable[[Walk, Arguments], Any]


def _operator(*names: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _first(a: Arguments) -> Any:
    return next(iter(a.values()))


def _list(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * count if len(values) == 1 else values)]


def _axis(node: fx.Node, axis: int) -> int:
    return axis % int(node.meta["val"].ndim)


def _axes(node: fx.Node, axes: Any) -> list[int]:
    ndim = node.meta["val"].ndim
    if axes is None or axes == []:
        return list(range(ndim))
    return sorted(axis % ndim for axis in ([axes] if isinstance(axes, int) else axes))


# Arithmetic


def _same(operation: str) -> _Handler:
    return lambda w, a: w.emit(operation, [w.float_name(_first(a))])


for _torch, _onnx in {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "neg": "Neg", "abs": "Abs", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign",
    "reciprocal": "Reciprocal", "hardswish": "HardSwish", "sin": "Sin", "cos": "Cos", "selu": "Selu", "negative": "Neg",
}.items():  # fmt: skip
    HANDLERS[_torch] = _same(_onnx)


def _two(operation: str) -> _Handler:
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


def _compare(operation: str) -> _Handler:
    def write(w: Walk, a: Arguments) -> str:
        x, y = list(a.values())[:2]
        dtype = torch.float32
        return str(w.emit(operation, [w.name(x, dtype), w.name(y, dtype)]))

    return write


for _torch, _onnx in {
    "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal",
}.items():  # fmt: skip
    HANDLERS[_torch] = _compare(_onnx)


@_operator("ne")
def _not_equal(w: Walk, a: Arguments) -> Any:
    return w.emit("Not", [_compare("Equal")(w, a)])


@_operator("logical_not", "bitwise_not")
def _not(w: Walk, a: Arguments) -> Any:
    return w.emit("Not", [w.name(a["self"], torch.bool)])


@_operator("logical_and", "bitwise_and", "__and__")
def _and(w: Walk, a: Arguments) -> Any:
    return w.emit("And", [w.name(value, torch.bool) for value in list(a.values())[:2]])


@_operator("logical_or", "bitwise_or", "__or__")
def _or(w: Walk, a: Arguments) -> Any:
    return w.emit("Or", [w.name(value, torch.bool) for value in list(a.values())[:2]])


@_operator("rsub")
def _rsub(w: Walk, a: Arguments) -> Any:
    values = list(a.values())
    return _two("Sub")(w, {"self": values[1], "other": values[0], "alpha": a.get("alpha", 1)})


@_operator("div", "divide", "true_divide", "floor_divide")
def _div(w: Walk, a: Arguments) -> Any:
    mode = "floor" if "floor_divide" in str(w.node.target) else a.get("rounding_mode")
    result = w.emit("Div", [w.float_name(a["self"]), w.float_name(a["other"])])
    if mode == "trunc":
        result = w.emit("Mul", [w.emit("Sign", [result]), w.emit("Floor", [w.emit("Abs", [result])])])
    return w.emit("Floor", [result]) if mode == "floor" else result


@_operator("square")
def _square(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    return w.emit("Mul", [name, name])


@_operator("rsqrt")
def _rsqrt(w: Walk, a: Arguments) -> Any:
    return w.emit("Reciprocal", [w.emit("Sqrt", [w.float_name(a["self"])])])


@_operator("log1p")
def _log1p(w: Walk, a: Arguments) -> Any:
    return w.emit("Log", [w.emit("Add", [w.float_name(a["self"]), w.name(1.0)])])


@_operator("expm1")
def _expm1(w: Walk, a: Arguments) -> Any:
    return w.emit("Sub", [w.emit("Exp", [w.float_name(a["self"])]), w.name(1.0)])


@_operator("log2", "log10")
def _log_of_base(w: Walk, a: Arguments) -> Any:
    base = 2.0 if "log2" in str(w.node.target) else 10.0
    return w.emit("Mul", [w.emit("Log", [w.float_name(a["self"])]), w.name(1 / math.log(base))])


@_operator("lerp")
def _lerp(w: Walk, a: Arguments) -> Any:
    start, end = w.float_name(a["self"]), w.float_name(a["end"])
    return w.emit("Add", [start, w.emit("Mul", [w.emit("Sub", [end, start]), w.float_name(a["weight"])])])


@_operator("addcmul", "addcdiv")
def _addcmul(w: Walk, a: Arguments) -> Any:
    operation = "Div" if "addcdiv" in str(w.node.target) else "Mul"
    product = w.emit(operation, [w.float_name(a["tensor1"]), w.float_name(a["tensor2"])])
    if a["value"] != 1:
        product = w.emit("Mul", [product, w.name(a["value"])])
    return w.emit("Add", [w.float_name(a["self"]), product])


@_operator("clamp", "clip", "hardtanh", "clamp_min", "clamp_max")
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


@_operator("relu6")
def _relu6(w: Walk, a: Arguments) -> Any:
    return w.emit("Clip", [w.float_name(a["self"]), w.name(0.0), w.name(6.0)])


@_operator("where")
def _where(w: Walk, a: Arguments) -> Any:
    dtype = w.node.meta["val"].dtype
    return w.emit("Where", [w.name(a["condition"], torch.bool), w.name(a["self"], dtype), w.name(a["other"], dtype)])


@_operator("masked_fill")
def _masked_fill(w: Walk, a: Arguments) -> Any:
    return w.emit("Where", [w.name(a["mask"], torch.bool), w.float_name(a["value"]), w.float_name(a["self"])])


@_operator("max", "amax", "min", "amin")
def _extreme(w: Walk, a: Arguments) -> Any:
    kind = "Max" if "max" in str(w.node.target) else "Min"
    if "other" in a:
        return _two(kind)(w, a)
    axes = _axes(a["self"], a.get("dim"))
    for axis in axes:
        w.known(a["self"], axis)
    name, kept = w.float_name(a["self"]), int(a.get("keepdim", False))
    values = w.emit(f"Reduce{kind}", [name], axes=axes, keepdims=kept)
    if not isinstance(w.node.meta["val"], (tuple, list)):
        return values
    read = any(user.args[1] == 1 for user in w.node.users)
    return [values, w.emit(f"Arg{kind}", [name], axis=axes[0], keepdims=kept) if read else ""]


@_operator("mean", "sum", "prod", "logsumexp")
def _reduced(w: Walk, a: Arguments) -> Any:
    axes = _axes(a["self"], a.get("dim"))
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


@_operator("cumsum")
def _cumulative_sum(w: Walk, a: Arguments) -> Any:
    axis = _axes(a["self"], a["dim"])[0]
    return w.emit("CumSum", [w.float_name(a["self"]), w.constant(np.asarray(axis, np.int64))])


@_operator("linalg_vector_norm", "norm")
def _norm(w: Walk, a: Arguments) -> Any:
    order = a.get("ord", a.get("p"))
    order = 2 if order is None else order
    axes = _axes(a["self"], a["dim"])
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
    """Variance and mean, the latter with all dimensions."""
    x, axes = a["self"], _axes(a["self"], a.get("dim"))
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


@_operator("var")
def _var(w: Walk, a: Arguments) -> Any:
    return _variance(w, a, int(a.get("keepdim", False)))[0]


@_operator("std")
def _std(w: Walk, a: Arguments) -> Any:
    return w.emit("Sqrt", [_var(w, a)])


@_operator("var_mean", "std_mean")
def _var_mean(w: Walk, a: Arguments) -> Any:
    kept = int(a.get("keepdim", False))
    variance, mean = _variance(w, a, kept)
    if not kept:
        mean = w.emit("Squeeze", [mean, w.ints(_axes(a["self"], a.get("dim")))])
    return [w.emit("Sqrt", [variance]) if "std" in str(w.node.target) else variance, mean]


# Activations


@_operator("silu")
def _silu(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    return w.emit("Mul", [name, w.emit("Sigmoid", [name])])


@_operator("hardsigmoid")
def _hardsigmoid(w: Walk, a: Arguments) -> Any:
    return w.emit("HardSigmoid", [w.float_name(a["self"])], alpha=1 / 6)


@_operator("gelu")
def _gelu(w: Walk, a: Arguments) -> Any:
    x = w.float_name(a["self"])
    if a["approximate"] == "tanh":
        cube = w.emit("Mul", [w.emit("Mul", [x, x]), x])
        inner = w.emit("Add", [x, w.emit("Mul", [cube, w.name(0.044715)])])
        bent = w.emit("Tanh", [w.emit("Mul", [inner, w.name(math.sqrt(2 / math.pi))])])
    else:
        bent = w.emit("Erf", [w.emit("Div", [x, w.name(math.sqrt(2))])])
    return w.emit("Mul", [w.emit("Mul", [x, w.emit("Add", [bent, w.name(1.0)])]), w.name(0.5)])


@_operator("elu")
def _elu(w: Walk, a: Arguments) -> Any:
    if a["scale"] != 1 or a["input_scale"] != 1:
        w.refuse("an ELU with scales of its own is none of ONNX")
    return w.emit("Elu", [w.float_name(a["self"])], alpha=float(a["alpha"]))


@_operator("celu")
def _celu(w: Walk, a: Arguments) -> Any:
    return w.emit("Celu", [w.float_name(a["self"])], alpha=float(a["alpha"]))


@_operator("softplus")
def _softplus(w: Walk, a: Arguments) -> Any:
    name, beta = w.float_name(a["self"]), float(a["beta"])
    if beta == 1:
        return w.emit("Softplus", [name])
    return w.emit("Div", [w.emit("Softplus", [w.emit("Mul", [name, w.name(beta)])]), w.name(beta)])


@_operator("log_sigmoid")
def _log_sigmoid(w: Walk, a: Arguments) -> Any:
    return w.emit("Neg", [w.emit("Softplus", [w.emit("Neg", [w.float_name(a["self"])])])])


@_operator("mish")
def _mish(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    return w.emit("Mul", [name, w.emit("Tanh", [w.emit("Softplus", [name])])])


@_operator("leaky_relu")
def _leaky_relu(w: Walk, a: Arguments) -> Any:
    return w.emit("LeakyRelu", [w.float_name(a["self"])], alpha=float(a["negative_slope"]))


@_operator("rrelu")
def _rrelu(w: Walk, a: Arguments) -> Any:
    return w.emit("LeakyRelu", [w.float_name(a["self"])], alpha=(a["lower"] + a["upper"]) / 2)


@_operator("prelu")
def _prelu(w: Walk, a: Arguments) -> Any:
    name, slope = w.float_name(a["self"]), w.float_name(a["weight"])
    ndim = a["self"].meta["val"].ndim
    if slope in w.constants and w.constants[slope].size > 1 and ndim > 2:
        slope = w.constant(w.constants[slope].reshape(-1, *[1] * (ndim - 2)))
    return w.emit("PRelu", [name, slope])


@_operator("glu")
def _glu(w: Walk, a: Arguments) -> Any:
    axis = _axis(a["self"], a["dim"])
    half = w.known(a["self"], axis) // 2
    left, right = w.emit("Split", [w.float_name(a["self"]), w.ints([half, half])], 2, axis=axis)
    return w.emit("Mul", [left, w.emit("Sigmoid", [right])])


@_operator("softmax", "_softmax")
def _softmax(w: Walk, a: Arguments) -> Any:
    return w.emit("Softmax", [w.float_name(a["self"])], axis=_axis(a["self"], a["dim"]))


@_operator("log_softmax", "_log_softmax")
def _log_softmax(w: Walk, a: Arguments) -> Any:
    return w.emit("LogSoftmax", [w.float_name(a["self"])], axis=_axis(a["self"], a["dim"]))


@_operator("softshrink", "hardshrink")
def _shrink(w: Walk, a: Arguments) -> Any:
    name, bound, zero = w.float_name(a["self"]), float(a["lambd"]), w.name(0.0)
    soft = "softshrink" in str(w.node.target)
    above = w.emit("Sub", [name, w.name(bound)]) if soft else name
    below = w.emit("Add", [name, w.name(bound)]) if soft else name
    low = w.emit("Where", [w.emit("Less", [name, w.name(-bound)]), below, zero])
    return w.emit("Where", [w.emit("Greater", [name, w.name(bound)]), above, low])


@_operator("threshold")
def _threshold(w: Walk, a: Arguments) -> Any:
    name = w.float_name(a["self"])
    if a["threshold"] == a["value"] == 0:
        return w.emit("Relu", [name])
    above = w.emit("Greater", [name, w.name(float(a["threshold"]))])
    return w.emit("Where", [above, name, w.name(float(a["value"]))])


# Layers


@_operator("conv1d", "conv2d", "conv3d")
def _conv(w: Walk, a: Arguments) -> Any:
    dims = a["weight"].meta["val"].ndim - 2
    kernel = list(a["weight"].meta["val"].shape[2:])
    dilations = _list(a["dilation"], dims)
    padding = a["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = _list(0 if padding == "valid" else padding, dims) * 2
    inputs = [w.float_name(a["input"]), w.float_name(a["weight"])]
    if a["bias"] is not None:
        inputs.append(w.float_name(a["bias"]))
    return w.emit(
        "Conv", inputs, dilations=dilations, group=int(a["groups"]), kernel_shape=kernel, pads=pads,
        strides=_list(a["stride"], dims),
    )  # fmt: skip


@_operator("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(w: Walk, a: Arguments) -> Any:
    dims = a["weight"].meta["val"].ndim - 2
    inputs = [w.float_name(a["input"]), w.float_name(a["weight"])]
    if a["bias"] is not None:
        inputs.append(w.float_name(a["bias"]))
    further = _list(a["output_padding"], dims)
    attributes: Arguments = {"output_padding": further} if any(further) else {}
    return w.emit(
        "ConvTranspose", inputs, dilations=_list(a["dilation"], dims), group=int(a["groups"]),
        kernel_shape=list(a["weight"].meta["val"].shape[2:]), pads=_list(a["padding"], dims) * 2,
        strides=_list(a["stride"], dims), **attributes,
    )  # fmt: skip


@_operator("linear")
def _linear(w: Walk, a: Arguments) -> Any:
    """A Gemm, which fuses with its bias inside; a tensor of more than two dimensions is reshaped around it.

    A quantizer that alone reads the result comes in front of the second Reshape, which then moves codes.
    """
    x, weight = a["input"], a["weight"]
    name, weights = w.float_name(x), w.float_name(weight)
    channels, features = weight.meta["val"].shape
    bias = np.zeros(channels, np.float32)
    given = w.constant(bias) if a["bias"] is None else w.float_name(a["bias"])
    if x.meta["val"].ndim == 2:
        return w.emit("Gemm", [name, weights, given], transB=1)
    rows = w.emit("Reshape", [name, w.ints([-1, features])])
    flat = w.emit("Gemm", [rows, weights, given], transB=1)
    shape, users = w.shape(w.node), list(w.node.users)
    if len(users) == 1 and users[0].target is torch.ops.crqat.edge.default:
        quantized = w.emit("Edge", [flat], domain=DOMAIN, edge=users[0].args[1])
        w.names[users[0]] = w.emit("Reshape", [quantized, w.ints(shape)])
        return flat
    return w.emit("Reshape", [flat, w.ints(shape)])


@_operator("edge")
def _edge(w: Walk, a: Arguments) -> Any:
    if w.node in w.names:
        return w.names[w.node]
    return w.emit("Edge", [w.name(a["x"])], domain=DOMAIN, edge=a["edge"])


@_operator("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(w: Walk, a: Arguments) -> Any:
    channels = a["input"].meta["val"].shape[1]
    names = []
    for key, default in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        filled = np.full(channels, default, np.float32)
        names.append(w.constant(filled) if a[key] is None else w.float_name(a[key]))
    return w.emit("BatchNormalization", [w.float_name(a["input"]), *names], epsilon=float(a["eps"]))


@_operator("instance_norm")
def _instance_norm(w: Walk, a: Arguments) -> Any:
    if not a["use_input_stats"]:
        return _batch_norm(w, a)
    channels = a["input"].meta["val"].shape[1]
    gain = w.constant(np.ones(channels, np.float32)) if a["weight"] is None else w.float_name(a["weight"])
    shift = w.constant(np.zeros(channels, np.float32)) if a["bias"] is None else w.float_name(a["bias"])
    return w.emit("InstanceNormalization", [w.float_name(a["input"]), gain, shift], epsilon=float(a["eps"]))


@_operator("group_norm")
def _group_norm(w: Walk, a: Arguments) -> Any:
    x, groups = a["input"], int(a["num_groups"])
    sizes = w.sizes(x)
    inner = math.prod(w.known(x, axis) for axis in range(1, len(sizes))) // groups
    grouped = w.emit("Reshape", [w.float_name(x), w.ints([-1, groups, inner])])
    ones, zeros = (w.constant(np.full(groups, value, np.float32)) for value in (1, 0))
    normal = w.emit("InstanceNormalization", [grouped, ones, zeros], epsilon=float(a["eps"]))
    result = w.emit("Reshape", [normal, w.ints(w.shape(x))])
    for operation, value in (("Mul", a["weight"]), ("Add", a["bias"])):
        if value is not None:
            stored = w.constants[w.float_name(value)].reshape(-1, *[1] * (len(sizes) - 2))
            result = w.emit(operation, [result, w.constant(stored)])
    return result


@_operator("layer_norm")
def _layer_norm(w: Walk, a: Arguments) -> Any:
    shape = list(a["normalized_shape"])
    gain = w.constant(np.ones(shape, np.float32)) if a["weight"] is None else w.float_name(a["weight"])
    shift = w.constant(np.zeros(shape, np.float32)) if a["bias"] is None else w.float_name(a["bias"])
    inputs = [w.float_name(a["input"]), gain, shift]
    return w.emit("LayerNormalization", inputs, axis=-len(shape), epsilon=float(a["eps"]))


@_operator("rms_norm")
def _rms_norm(w: Walk, a: Arguments) -> Any:
    name, axes = w.float_name(a["input"]), list(range(-len(a["normalized_shape"]), 0))
    epsilon = float(torch.finfo(torch.float32).eps if a["eps"] is None else a["eps"])
    mean = w.emit("ReduceMean", [w.emit("Mul", [name, name])], axes=axes, keepdims=1)
    root = w.emit("Sqrt", [w.emit("Add", [mean, w.name(epsilon)])])
    result = w.emit("Div", [name, root])
    return result if a["weight"] is None else w.emit("Mul", [result, w.float_name(a["weight"])])


def _pool_attributes(a: Arguments, dims: int) -> dict[str, Any]:
    kernel = _list(a["kernel_size"], dims)
    strides = _list(a["stride"], dims) if a["stride"] not in (None, []) else kernel
    return {
        "kernel_shape": kernel,
        "strides": strides,
        "pads": _list(a["padding"], dims) * 2,
        "ceil_mode": int(a["ceil_mode"]),
    }


@_operator("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(w: Walk, a: Arguments) -> Any:
    dims = w.node.meta["val"].ndim - 2
    attributes = {**_pool_attributes(a, dims), "dilations": _list(a["dilation"], dims)}
    return w.emit("MaxPool", [w.float_name(a["self"])], **attributes)


@_operator("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(w: Walk, a: Arguments) -> Any:
    attributes = _pool_attributes(a, w.node.meta["val"].ndim - 2)
    divisor = a.get("divisor_override")
    counts = bool(a["count_include_pad"] or divisor)
    result = w.emit("AveragePool", [w.float_name(a["self"])], count_include_pad=int(counts), **attributes)
    if divisor:
        result = w.emit("Mul", [result, w.name(math.prod(attributes["kernel_shape"]) / divisor)])
    return result


@_operator("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
           "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")  # fmt: skip
def _adaptive_pool(w: Walk, a: Arguments) -> Any:
    kind = "Max" if "max" in str(w.node.target) else "Average"
    value = w.node.meta["val"]
    after = list((value[0] if isinstance(value, (tuple, list)) else value).shape[2:])
    before = list(a["self"].meta["val"].shape[2:])
    name = w.float_name(a["self"])
    if all(size == 1 for size in after):
        result = w.emit(f"Global{kind}Pool", [name])
    elif any(size % pooled for size, pooled in zip(before, after, strict=True)):
        w.refuse(f"{before} pixels are pooled to {after}, which ONNX cannot")
    else:
        kernel = [size // pooled for size, pooled in zip(before, after, strict=True)]
        result = w.emit(f"{kind}Pool", [name], kernel_shape=kernel, strides=kernel) if before != after else name
    return [result, ""] if isinstance(value, (tuple, list)) else result


@_operator("matmul", "bmm", "mm", "__matmul__")
def _matmul(w: Walk, a: Arguments) -> Any:
    return w.emit("MatMul", [w.float_name(value) for value in list(a.values())[:2]])


@_operator("addmm", "baddbmm")
def _addmm(w: Walk, a: Arguments) -> Any:
    names = [a[key] for key in (("mat1", "mat2") if "mat1" in a else ("batch1", "batch2"))]
    product = w.emit("MatMul", [w.float_name(name) for name in names])
    if a["alpha"] != 1:
        product = w.emit("Mul", [product, w.name(a["alpha"])])
    if a["beta"] == 0:
        return product
    added = w.float_name(a["self"])
    if a["beta"] != 1:
        added = w.emit("Mul", [added, w.name(a["beta"])])
    return w.emit("Add", [product, added])


@_operator("einsum")
def _einsum(w: Walk, a: Arguments) -> Any:
    return w.emit("Einsum", [w.float_name(value) for value in a["tensors"]], equation=a["equation"].replace(" ", ""))


@_operator("scaled_dot_product_attention")
def _attention(w: Walk, a: Arguments) -> Any:
    """The factor of the scores comes behind their product: nothing stands between a quantizer and the product."""
    query, key = a["query"], a["key"]
    if a["enable_gqa"]:
        w.refuse("attention with fewer keys than queries in heads has no form in ONNX")
    ndim, features = query.meta["val"].ndim, query.meta["val"].shape[-1]
    turned = w.emit("Transpose", [w.float_name(key)], perm=[*range(ndim - 2), ndim - 1, ndim - 2])
    scale = 1 / math.sqrt(features) if a["scale"] is None else float(a["scale"])
    scores = w.emit("Mul", [w.emit("MatMul", [w.float_name(query), turned]), w.name(scale)])
    mask = a["attn_mask"]
    if a["is_causal"]:
        length, keys = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
        scores = w.emit("Add", [scores, w.constant(np.triu(np.full((length, keys), -np.inf, np.float32), 1))])
    elif mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = w.emit("Where", [w.name(mask), scores, w.name(-math.inf)])
    elif mask is not None:
        scores = w.emit("Add", [scores, w.float_name(mask)])
    return w.emit("MatMul", [w.emit("Softmax", [scores], axis=ndim - 1), w.float_name(a["value"])])


# Movement


@_operator("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "clone", "contiguous", "detach",
           "alias", "lift_fresh", "lift_fresh_copy", "positive", "resolve_conj", "resolve_neg")  # fmt: skip
def _nothing(w: Walk, a: Arguments) -> Any:
    return w.name(_first(a))


@_operator("to", "_to_copy", "type_as", "float")
def _to(w: Walk, a: Arguments) -> Any:
    return w.name(a["self"], w.node.meta["val"].dtype)


@_operator("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def _reshape(w: Walk, a: Arguments) -> Any:
    return w.reshaped(w.name(a["self"]), w.sizes(a["self"]), w.shape(w.node))


@_operator("squeeze")
def _squeeze(w: Walk, a: Arguments) -> Any:
    before = w.sizes(a["self"])
    asked = _axes(a["self"], a.get("dim")) if a.get("dim") is not None else range(len(before))
    axes = [axis for axis in asked if before[axis] == 1]
    return w.emit("Squeeze", [w.name(a["self"]), w.ints(axes)]) if axes else w.name(a["self"])


@_operator("unsqueeze")
def _unsqueeze(w: Walk, a: Arguments) -> Any:
    return w.emit("Unsqueeze", [w.name(a["self"]), w.ints([_axis(w.node, a["dim"])])])


def _transposed(w: Walk, source: Any, permutation: Sequence[int]) -> Any:
    name = w.name(source)
    return name if list(permutation) == sorted(permutation) else w.emit("Transpose", [name], perm=list(permutation))


@_operator("permute")
def _permute(w: Walk, a: Arguments) -> Any:
    return _transposed(w, a["self"], [_axis(a["self"], axis) for axis in a["dims"]])


@_operator("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T", "adjoint", "matrix_H")
def _transpose(w: Walk, a: Arguments) -> Any:
    ndim = a["self"].meta["val"].ndim
    pair = [a.get("dim0", a.get("axis0", -1)), a.get("dim1", a.get("axis1", -2))] if ndim > 1 else [0, 0]
    permutation = list(range(ndim))
    one, other = (axis % ndim for axis in pair)
    permutation[one], permutation[other] = other, one
    return _transposed(w, a["self"], permutation)


@_operator("movedim", "moveaxis")
def _movedim(w: Walk, a: Arguments) -> Any:
    ndim = a["self"].meta["val"].ndim
    source, to = ([axis % ndim for axis in ([v] if isinstance(v, int) else v)] for v in (a["source"], a["destination"]))
    left = iter(axis for axis in range(ndim) if axis not in source)
    placed = dict(zip(to, source, strict=True))
    return _transposed(w, a["self"], [placed[axis] if axis in placed else next(left) for axis in range(ndim)])


@_operator("expand", "expand_as", "broadcast_to")
def _expand(w: Walk, a: Arguments) -> Any:
    after = w.sizes(w.node)
    before = [1] * (len(after) - a["self"].meta["val"].ndim) + w.sizes(a["self"])
    if after == before:
        return w.name(a["self"])
    if any(new is None and old is not None for new, old in zip(after, before, strict=True)):
        return w.emit("Expand", [w.name(a["self"]), w.batch_shape(w.shape(w.node))])
    sizes = [1 if new == old or new is None else new for new, old in zip(after, before, strict=True)]
    return w.emit("Expand", [w.name(a["self"]), w.ints(sizes)])


@_operator("repeat", "tile")
def _repeat(w: Walk, a: Arguments) -> Any:
    times = list(a["repeats"] if "repeats" in a else a["dims"])
    sizes, after = w.sizes(a["self"]), w.sizes(w.node)
    name = w.name(a["self"])
    extra = len(after) - len(sizes)
    if extra:
        name = w.emit("Unsqueeze", [name, w.ints(list(range(extra)))])
    times = [1] * (len(after) - len(times)) + times
    if after.count(None) > sizes.count(None):
        w.refuse("a tensor is repeated for each image; use expand")
    return w.emit("Tile", [name, w.ints(times)])


@_operator("repeat_interleave")
def _repeat_interleave(w: Walk, a: Arguments) -> Any:
    axis, times = _axis(a["self"], a["dim"]), a["repeats"]
    if not isinstance(times, int):
        w.refuse("elements are repeated by numbers that a tensor holds")
    index = np.repeat(np.arange(w.known(a["self"], axis)), times)
    return w.emit("Gather", [w.name(a["self"]), w.ints(index.tolist())], axis=axis)


@_operator("select")
def _select(w: Walk, a: Arguments) -> Any:
    axis = _axis(a["self"], a["dim"])
    size = w.known(a["self"], axis)
    index = w.constant(np.asarray(a["index"] % size, np.int64))
    return w.emit("Gather", [w.name(a["self"]), index], axis=axis)


def _sliced(w: Walk, node: Any, axis: int, start: int, end: int, step: int = 1) -> str:
    bounds = [w.ints([value]) for value in (start, end, axis, step)]
    return str(w.emit("Slice", [w.name(node), *bounds]))


@_operator("slice")
def _slice(w: Walk, a: Arguments) -> Any:
    axis, step = _axis(a["self"], a["dim"]), a["step"]
    size = a["self"].meta["val"].shape[axis]
    start, end, step = slice(a["start"], a["end"], step).indices(size)
    if (start, end, step) == (0, size, 1):
        return w.name(a["self"])
    w.known(a["self"], axis)
    return _sliced(w, a["self"], axis, start, end, step)


@_operator("narrow")
def _narrow(w: Walk, a: Arguments) -> Any:
    axis = _axis(a["self"], a["dim"])
    start = a["start"] % w.known(a["self"], axis)
    return _sliced(w, a["self"], axis, start, start + a["length"])


@_operator("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(w: Walk, a: Arguments) -> Any:
    """Slices, which move codes; a Split would leave them between two float values."""
    axis, start, parts = _axis(_first(a), a.get("dim", 0)), 0, []
    w.known(_first(a), axis)
    read = {user.args[1] for user in w.node.users}
    for index, part in enumerate(w.node.meta["val"]):
        end = start + int(part.shape[axis])
        parts.append(_sliced(w, _first(a), axis, start, end) if index in read else "")
        start = end
    return parts


@_operator("unbind")
def _unbind(w: Walk, a: Arguments) -> Any:
    axis = _axis(a["self"], a["dim"])
    read = {user.args[1] for user in w.node.users}
    found = []
    for index in range(w.known(a["self"], axis)):
        position = w.constant(np.asarray(index, np.int64))
        found.append(w.emit("Gather", [w.name(a["self"]), position], axis=axis) if index in read else "")
    return found


@_operator("index", "index_select", "embedding")
def _index(w: Walk, a: Arguments) -> Any:
    source = a["self"] if "self" in a else a["weight"]
    indices = a["indices"] if "indices" in a else [*[None] * _axis(source, a["dim"]), a["index"]]
    indices = indices if isinstance(indices, (list, tuple)) else [indices]
    read = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(read) != 1 or read[0][1].meta["val"].dtype == torch.bool:
        w.refuse("elements are selected by several tensors, or by a mask")
    axis, index = read[0]
    w.known(source, axis)
    return w.emit("Gather", [w.name(source), w.name(index)], axis=axis)


@_operator("cat", "concat", "concatenate")
def _cat(w: Walk, a: Arguments) -> Any:
    dtype = w.node.meta["val"].dtype
    parts = [w.name(part, dtype) for part in a["tensors"] if part.meta["val"].numel()]
    axis = _axis(w.node, a["axis"] if "axis" in a else a["dim"])
    return w.emit("Concat", parts, axis=axis) if len(parts) > 1 else parts[0]


@_operator("stack")
def _stack(w: Walk, a: Arguments) -> Any:
    axis = w.ints([_axis(w.node, a["dim"])])
    parts = [w.emit("Unsqueeze", [w.name(part), axis]) for part in a["tensors"]]
    return w.emit("Concat", parts, axis=_axis(w.node, a["dim"]))


@_operator("roll")
def _roll(w: Walk, a: Arguments) -> Any:
    node, name = a["self"], w.name(a["self"])
    for shift, dim in zip(_list(a["shifts"], 1), _list(a["dims"], 1), strict=True):
        axis = _axis(node, dim)
        size = w.known(node, axis)
        cut = -shift % size
        bounds = [[w.ints([v]) for v in (low, high, axis, 1)] for low, high in ((cut, size), (0, cut))]
        if cut:
            name = w.emit("Concat", [w.emit("Slice", [name, *b]) for b in bounds], axis=axis)
    return name


@_operator("flip")
def _flip(w: Walk, a: Arguments) -> Any:
    name = w.name(a["self"])
    for dim in a["dims"]:
        axis = _axis(a["self"], dim)
        order = list(range(w.known(a["self"], axis)))[::-1]
        name = w.emit("Gather", [name, w.ints(order)], axis=axis)
    return name


@_operator("pixel_shuffle")
def _pixel_shuffle(w: Walk, a: Arguments) -> Any:
    return w.emit("DepthToSpace", [w.float_name(a["self"])], blocksize=int(a["upscale_factor"]), mode="CRD")


@_operator("pixel_unshuffle")
def _pixel_unshuffle(w: Walk, a: Arguments) -> Any:
    _, channels, height, width = w.shape(a["self"]) if a["self"].meta["val"].ndim == 4 else [0, 0, 0, 0]
    r = int(a["downscale_factor"])
    split = w.emit("Reshape", [w.name(a["self"]), w.ints([-1, channels, height // r, r, width // r, r])])
    turned = w.emit("Transpose", [split], perm=[0, 1, 3, 5, 2, 4])
    return w.emit("Reshape", [turned, w.ints(w.shape(w.node))])


@_operator("channel_shuffle")
def _channel_shuffle(w: Walk, a: Arguments) -> Any:
    shape, groups = w.shape(a["self"]), int(a["groups"])
    split = w.emit("Reshape", [w.name(a["self"]), w.ints([-1, groups, shape[1] // groups, *shape[2:]])])
    turned = w.emit("Transpose", [split], perm=[0, 2, 1, *range(3, len(shape) + 1)])
    return w.emit("Reshape", [turned, w.ints(shape)])


@_operator("pad", "constant_pad_nd")
def _pad(w: Walk, a: Arguments) -> Any:
    sizes, pads = w.sizes(a["self"]), list(a["pad"])
    ndim = len(sizes)
    mode, name = a.get("mode", "constant"), w.float_name(a["self"])
    pairs = [(0, 0)] * (ndim - len(pads) // 2) + list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    for axis, (before, after) in enumerate(pairs):
        if before < 0 or after < 0:
            size = w.known(a["self"], axis)
            bounds = [w.ints([v]) for v in (max(-before, 0), size - max(-after, 0), axis, 1)]
            name = w.emit("Slice", [name, *bounds])
    pairs = [(max(before, 0), max(after, 0)) for before, after in pairs]
    if not any(before or after for before, after in pairs):
        return name
    if mode == "circular":
        for axis, (before, after) in enumerate(pairs):
            size = w.known(a["self"], axis) if before or after else 0
            ends = [(size - before, size)] * bool(before), [(0, after)] * bool(after)
            left, right = (
                [w.emit("Slice", [name, *(w.ints([v]) for v in (low, high, axis, 1))]) for low, high in end]
                for end in ends
            )
            name = w.emit("Concat", [*left, name, *right], axis=axis) if left or right else name
        return name
    amounts = w.ints([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    if mode != "constant":
        return w.emit("Pad", [name, amounts], mode={"reflect": "reflect", "replicate": "edge"}[mode])
    value = float(a["value"] or 0.0)
    return w.emit("Pad", [name, amounts, w.name(value) if value else ""], mode="constant")


@_operator("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
           "_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
           "upsample_bicubic2d")  # fmt: skip
def _upsample(w: Walk, a: Arguments) -> Any:
    kind = str(w.node.target)
    before, after = (list(node.meta["val"].shape[2:]) for node in (a["input"], w.node))
    scales = [np.float32(1), np.float32(1)]
    for old, new in zip(before, after, strict=True):
        scale = np.float32(new / old)
        while math.floor(np.float32(old) * scale) < new:
            scale = np.nextafter(scale, np.float32(np.inf))
        scales.append(scale)
    attributes: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}
    if "exact" in kind:
        attributes = {
            "mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil",
        }  # fmt: skip
    elif "nearest" in kind:
        attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif a["align_corners"]:
        attributes["coordinate_transformation_mode"] = "align_corners"
    if "bicubic" in kind:
        attributes.update(mode="cubic", cubic_coeff_a=-0.75)
    return w.emit("Resize", [w.float_name(a["input"]), "", w.constant(np.asarray(scales))], **attributes)
