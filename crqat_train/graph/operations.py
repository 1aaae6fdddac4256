"""Traces a model with torch.fx and classifies the graph's operations by their effect on quantized values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.graph.attention import write_out
from crqat.train.graph.explain import forward_of, hint, one_line, where
from crqat.train.graph.sizes import SizedTracer
from crqat.train.graph.train_eval_diff import HOLDER, follow_eval

# Key of a GraphModule's `meta`: lines on how its training differs from the original network's.
NOTES = "crqat_notes"
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_MATMULS = {"linear", "conv1d", "conv2d", "conv3d", *_TRANSPOSED}
# These move values without changing them, so a quantizer before them also holds after them.
_MOVEMENT_MODULES = (nn.MaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd, nn.ZeroPad2d,
                     nn.ChannelShuffle, nn.ReflectionPad2d, nn.ReplicationPad2d)  # fmt: skip
# torchvision's and timm's modules that drop whole samples in training; traced as one operation, and moving values.
_STOCHASTIC_DEPTH = {"StochasticDepth", "DropPath"}
_MOVEMENT_FUNCTIONS: set[Any] = {
    functional.max_pool2d, torch.max_pool2d, torch.flatten, functional.pad, functional.dropout, torch.reshape,
    torch.chunk, torch.split, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, "chunk", "split",
    "flatten", "unflatten", "reshape", "view", "contiguous", "permute", "transpose", "squeeze", "unsqueeze",
    "__getitem__",
}  # fmt: skip
_NONNEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_NONNEGATIVE_FUNCTIONS = {
    functional.relu, functional.relu6, torch.relu, torch.sigmoid, functional.hardsigmoid, "relu",
    torch.zeros, torch.ones, torch.zeros_like, torch.ones_like, "new_zeros", "new_ones",
}  # fmt: skip
# ONNX Runtime fuses a convolution with the next operation only if that is a quantizer, or a ReLU or ReLU6 before one.
_UNFUSED_MODULES = (nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid, nn.Hardsigmoid, nn.GELU, nn.ELU, nn.Tanh, nn.PReLU,
                    nn.Hardtanh, nn.Mish)  # fmt: skip
_UNFUSED_FUNCTIONS: set[Any] = {
    functional.silu, functional.hardswish, functional.leaky_relu, torch.sigmoid, functional.sigmoid,
    functional.hardsigmoid, functional.gelu, functional.elu, torch.tanh, functional.tanh, functional.prelu,
    functional.hardtanh, functional.mish, "sigmoid", "tanh",
}  # fmt: skip
_SIGN_KEEPING_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_SIGN_KEEPING_FUNCTIONS: set[Any] = {
    functional.adaptive_avg_pool2d, functional.avg_pool2d, torch.cat, torch.mean, "mean",
}  # fmt: skip


def trace(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """Trace a network as a GraphModule in which each weight is a node of its own; the state dict keeps its keys.

    Args:
        model: The float network in eval mode, whose modules the graph uses. It is changed in place:
            nn.MultiheadAttention and timm's BatchNormAct2d get other classes, and dropouts of the graph are added.
        example: Input of shape [N, C, H, W], float32; without one, the forward must not use sizes.

    Raises:
        UsageError: torch.fx cannot trace the model; the message says where.
    """
    write_out(model)
    # Tracing replaces some modules, so each mode traces its own copy.
    training = copy.deepcopy(model).train()
    graph = _graph(model, example)
    dropouts, note = follow_eval(model, graph, lambda: _graph(training, example))
    if dropouts:
        model.add_module(HOLDER, nn.Sequential(*dropouts.values()).eval())
    (output,) = graph.find_nodes(op="output")
    if not isinstance(output.args[0], fx.Node):
        kind = type(output.args[0]).__name__.replace("immutable_", "")
        msg = (
            f"model.name: the forward of {type(model).__name__}{forward_of(model)} returns a {kind}; wrap it in a "
            "module whose forward returns the logits alone"
        )
        raise UsageError(msg)
    made = fx.GraphModule(model, graph)
    made.meta[NOTES] = [note] if note else []
    return made


def _graph(model: nn.Module, example: Tensor | None) -> fx.Graph:
    try:
        with torch.no_grad(), _caches_empty(model):
            graph = _Tracer(example).trace(model)
    except Exception as error:  # the user's forward may raise anything when it gets a Proxy
        msg = f"model.name: torch.fx cannot trace {type(model).__name__}{where(error)}: {one_line(error)}{hint(error)}"
        raise UsageError(msg) from error
    for node in reversed(graph.nodes):
        if node.target is getattr and not node.users:
            graph.erase_node(node)  # queries the device in one of the modes only
    return graph


@contextmanager
def _caches_empty(model: nn.Module) -> Iterator[None]:
    """Empty the caches that timm's networks keep in eval mode, so that a trace computes their values.

    The cached values are computed from parameters that training changes.
    """
    kept = [pair for part in model.modules() for pair in vars(part).items()]
    caches = [value for name, value in kept if "cache" in name and type(value) is dict]
    for cache in caches:
        cache.clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.clear()  # it holds proxies


class _Tracer(SizedTracer):
    """Traces into convolutions and linear layers, so that their weights become edges that can be quantized."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm, nn.MultiheadAttention,
                          nn.TransformerEncoderLayer, nn.TransformerEncoder)):  # fmt: skip
            return False
        # timm derives from BatchNorm; tracing into it would fix `self.training` at its present value.
        if isinstance(m, nn.modules.batchnorm._BatchNorm) or type(m).__name__ in _STOCHASTIC_DEPTH:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Split timm's BatchNormAct2d into a BatchNorm2d and its activation as a separate node.

        Inside one node the activation would be hidden from the analysis of signs and quantizer positions.
        """
        if self.computes:
            return forward(*args, **kwargs)
        if type(m) is nn.Identity and len(args) == 1:
            return args[0]  # an Identity between a convolution and its activation would prevent their fusion
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(m, nn.BatchNorm2d) and type(m) is not nn.BatchNorm2d and hasattr(m, "act"):
            m.__class__ = nn.BatchNorm2d  # the same tensors under the same names
            path = self.path_of_module(m)
            self.module_stack[path] = (path, nn.BatchNorm2d)
            for module in (m.get_submodule("drop"), m.get_submodule("act")):
                result = self.call_module(module, module.forward, (result,), {})
            del self.module_stack[path]
        return result


def _is(graph_module: fx.GraphModule, node: fx.Node, modules: tuple[type, ...], functions: set[Any]) -> bool:
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), modules)
    if node.op == "call_method":
        return str(node.target).rstrip("_") in functions
    return node.op == "call_function" and (node.target in functions or f"__{_name(node)}__" in functions)


def moves_values(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node only moves the values of its first input, possibly adding zeros."""
    if node.op != "call_module" and _name(node) == "pad":
        value: Any = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        return bool(mode != "constant" or not value)
    if node.op == "call_module" and type(graph_module.get_submodule(str(node.target))).__name__ in _STOCHASTIC_DEPTH:
        return True
    return _is(graph_module, node, _MOVEMENT_MODULES, _MOVEMENT_FUNCTIONS)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def is_matmul(node: fx.Node) -> bool:
    """Whether the node is a convolution or a linear layer."""
    return node.op == "call_function" and _name(node) in _MATMULS


def is_linear(node: fx.Node) -> bool:
    """Whether the node is a linear layer."""
    return node.op == "call_function" and _name(node) == "linear"


def is_transposed(node: fx.Node) -> bool:
    """Whether the node is a transposed convolution, whose weight has the shape [in, out / groups, ...]."""
    return node.op == "call_function" and _name(node) in _TRANSPOSED


def is_batch_norm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a BatchNorm module."""
    return _is(graph_module, node, (nn.modules.batchnorm._BatchNorm,), set())


def is_add(node: fx.Node) -> bool:
    """Whether the node adds two tensors."""
    return node.op in ("call_function", "call_method") and _name(node).strip("_") in {"add", "iadd"}


def is_concat(node: fx.Node) -> bool:
    """Whether the node concatenates tensors."""
    return node.op == "call_function" and node.target in {torch.cat, torch.concat, torch.concatenate}


def is_unfused_activation(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is an activation that ONNX Runtime cannot fuse into the convolution before it."""
    bounds = clip_bounds(graph_module, node)
    if bounds is not None:
        return bounds[0] != 0  # ReLU and ReLU6 are fused, in any spelling
    return _is(graph_module, node, _UNFUSED_MODULES, _UNFUSED_FUNCTIONS)


def is_fused_activation(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a ReLU or a bounded ReLU (ReLU6), which ONNX Runtime fuses into the convolution before it."""
    bounds = clip_bounds(graph_module, node)
    if bounds is not None:
        return bounds[0] == 0
    return _is(graph_module, node, (nn.ReLU, nn.ReLU6), {functional.relu, functional.relu6, torch.relu, "relu"})


def is_softmax(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a softmax."""
    return _is(graph_module, node, (nn.Softmax, nn.Softmax2d), {functional.softmax, torch.softmax, "softmax"})


def clip_bounds(graph_module: fx.GraphModule, node: fx.Node) -> tuple[float | None, float | None] | None:
    """Return the bounds to which a node clips its input, None for no bound; None if the node does not clip."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return (float(module.min_val), float(module.max_val)) if isinstance(module, nn.Hardtanh) else None
    name = _name(node).rstrip("_") if node.op in ("call_function", "call_method") else ""
    if name not in {"clamp", "clip", "clamp_min", "clamp_max", "hardtanh"}:
        return None
    keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    given: list[Any] = [-1.0, 1.0] if name == "hardtanh" else [None, None]
    for index, value in enumerate(node.args[1:], start=int(name == "clamp_max")):
        given[index] = value
    given = [node.kwargs.get(key, value) for key, value in zip(keys, given, strict=True)]
    if not all(value is None or isinstance(value, (int, float)) for value in given):
        return None  # the bounds are computed
    low, high = (None if value is None else float(value) for value in given)
    return low, high


def is_nonnegative(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether no value of the node can be negative, for any input of the network."""
    if _is(graph_module, node, _NONNEGATIVE_MODULES, _NONNEGATIVE_FUNCTIONS):
        return True
    low = (clip_bounds(graph_module, node) or (None,))[0]
    if low is not None and low >= 0:
        return True
    sources: list[Any] = []
    if moves_values(graph_module, node):
        sources = node.all_input_nodes[:1]
    elif is_add(node) or node.target is torch.mul:
        sources = [*node.args, *node.kwargs.values()]  # include numbers: x + y * alpha, x * -1
    elif _is(graph_module, node, _SIGN_KEEPING_MODULES, _SIGN_KEEPING_FUNCTIONS) or _interpolates(graph_module, node):
        sources = node.all_input_nodes
    return bool(sources) and all(
        is_nonnegative(graph_module, source)
        if isinstance(source, fx.Node)
        else isinstance(source, (int, float)) and source >= 0
        for source in sources
    )


def _interpolates(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node interpolates within the range of neighbouring values, which cubic interpolation can exceed."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return isinstance(module, nn.Upsample) and module.mode != "bicubic"
    mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
    return bool(node.target is functional.interpolate and mode != "bicubic")


def through_movement(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the node and all nodes after it that receive its values by data movement only."""
    yield node
    while moves_values(graph_module, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node


def reads_images(node: fx.Node) -> bool:
    """Whether the values of the node's first input depend on the network's input, not only on its size."""
    return any(of_images(source) for source in node.all_input_nodes[:1])


def of_images(node: fx.Node) -> bool:
    """Whether the node's values depend on the network's input, not only on its size."""
    left, seen = [node], set()
    while left:
        source = left.pop()
        if source.op == "placeholder":
            return True
        if source not in seen and _name(source) not in {"size", "getattr"}:
            seen.add(source)
            left += source.all_input_nodes
    return False


def batch_norm_after(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    """Return the name of the BatchNorm that is a convolution's only consumer; None if there is none.

    A BatchNorm after a linear layer or a transposed convolution is not folded; it stays a separate operation.
    """
    users = list(node.users)
    if _name(node) == "linear" or is_transposed(node) or len(users) != 1 or not is_batch_norm(graph_module, users[0]):
        return None
    return str(users[0].target)


def convolution_groups(node: fx.Node) -> int:
    """Return the `groups` argument of a convolution."""
    if "groups" in node.kwargs:
        return int(node.kwargs["groups"])  # type: ignore[arg-type]
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


def parameter(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """Return the stored tensor of a get_attr node.

    Raises:
        UsageError: The node is not a get_attr node, so the weight is computed in the forward pass.
    """
    value: Any = graph_module if node.op == "get_attr" else None
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor):
        msg = f"model.name: the weight {node.target} is computed in the forward pass; only stored weights are quantized"
        raise UsageError(msg)
    return value
