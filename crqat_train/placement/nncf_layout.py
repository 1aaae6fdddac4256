"""Queries NNCF's internals: its quantizer placement, without data, and its names for operations.

NNCF's public API needs data and runs quantizers to get a layout; this module calls the placement algorithm directly.
Tests compare the result with `nncf.quantize`, to detect a version of NNCF in which these internals changed.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from crqat.core.errors import UsageError
from crqat.train.graph.explain import forward_of, one_line, where


@dataclass(frozen=True)
class Hooks:
    """NNCF's quantizer placement for a network.

    Attributes:
        groups: One entry per quantizer: the hook names that share it, its channels (None for per tensor), and whether
            it quantizes a weight.
        operations: Names of all operations, in execution order.
    """

    groups: list[tuple[tuple[str, ...], int | None, bool]]
    operations: list[str]


class _Chain(nn.Module):
    """Runs the layers of a network that is a Sequential, as a plain module.

    NNCF adds a child to the root module, and a Sequential would run this child as a layer.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.names = list(layers._modules)
        for name, layer in layers._modules.items():
            self.add_module(name, layer)

    def forward(self, input: Tensor) -> Tensor:  # the argument's name is Sequential's, and part of an edge's name
        for name in self.names:
            input = self._modules[name](input)  # type: ignore[misc]
        return input


def ask_layout(model: nn.Module, example: Tensor, in_float: Sequence[str] = ()) -> Hooks:
    """Run NNCF's placement algorithm with per-tensor activations; needs one eval forward and no calibration.

    Args:
        model: Float network in eval mode. It is not changed.
        example: Input of shape [N, C, H, W], float32.
        in_float: Names of operations that must not be quantized, as in `Hooks.operations`: NNCF's ignored scope.

    Raises:
        UsageError: The network's forward fails on the example; the message names file and line.
    """
    os.environ.setdefault("NNCF_CI", "1")  # otherwise importing NNCF sets up telemetry
    # Importing NNCF searches for CUDA to build extensions, and warns on machines without; nothing is built here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf
    from nncf.common.graph.transformations.commands import TargetType
    from nncf.common.quantization.structs import QuantizationPreset
    from nncf.quantization.advanced_parameters import OverflowFix, QuantizationParameters
    from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
    from nncf.torch.function_hook.hook_storage import HookStorage
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
    from nncf.torch.function_hook.wrapper import wrap_model

    nncf.set_log_level("ERROR")
    root = _Chain(model) if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward else model
    wrapper = GraphModelWrapper(wrap_model(copy.deepcopy(root)), example)
    try:
        with _tuples_as_lists():
            graph = wrapper.build_graph()
    except Exception as error:  # the user's forward may raise anything
        shape, line = tuple(example.shape), where(error) or forward_of(model)
        msg = f"model.name: {type(model).__name__} cannot run on an input of shape {shape}{line}: {one_line(error)}"
        raise UsageError(msg) from error
    algorithm = MinMaxQuantization(
        preset=QuantizationPreset.PERFORMANCE,
        target_device=nncf.TargetDevice.ANY,
        ignored_scope=nncf.IgnoredScope(names=list(in_float)),
        overflow_fix=OverflowFix.DISABLE,
        activations_quantization_params=QuantizationParameters(per_channel=False),
    )
    algorithm._set_backend_entity(wrapper)
    algorithm._reset_cache()
    points, unified = algorithm._get_quantization_target_points(wrapper, graph)
    backend = algorithm._backend_entity
    before = (TargetType.OPERATOR_PRE_HOOK, TargetType.PRE_LAYER_OPERATION, TargetType.OPERATION_WITH_WEIGHTS)
    slots: dict[str, int] = {}

    def hook_name(point: Any) -> str:
        key = HookStorage._generate_key(point.target_node_name, point.input_port_id or 0)
        base = f"{'pre_hooks' if point.type in before else 'post_hooks'}.{key}"
        slot = slots.get(base, 0)
        slots[base] = slot + 1
        return f"{base}.{slot}"

    shared = {point for group in unified for point in group}
    groups = []
    for points_of_group in [list(group) for group in unified] + [[point] for point in points if point not in shared]:
        config, first = points[points_of_group[0]], points_of_group[0]
        shape = backend._get_input_scale_shape(graph, first, config.per_channel)
        channels = max(shape) if config.per_channel and len(shape) > 1 else None
        names = tuple(sorted(hook_name(point) for point in points_of_group))
        groups.append((names, channels, bool(first.is_weight_target_point())))
    constants = ("nncf_model_input", "nncf_model_output", "nncf_model_const")
    nodes = sorted(graph.get_all_nodes(), key=lambda node: node.node_id)
    # Values without an input, such as torch.arange's, are constants in torch.fx, not operations.
    left = [node for node in nodes if node.node_type in ("nncf_model_input", "nncf_model_const")]
    reached = {node.node_id for node in left}
    while left:
        new = [node for node in graph.get_next_nodes(left.pop()) if node.node_id not in reached]
        reached |= {node.node_id for node in new}
        left += new
    operations = [n for n in nodes if n.node_type not in constants]
    made = {n.node_name for n in operations if n.node_id not in reached}
    kept = []
    for names, channels, is_weight in groups:
        names = tuple(name for name in names if parts_of(name)[1] not in made)
        if names:
            kept.append((names, channels, is_weight))
    return Hooks(sorted(kept, key=lambda g: g[0]), [n.node_name for n in operations if n.node_name not in made])


@contextmanager
def _tuples_as_lists() -> Iterator[None]:
    """Let NNCF see parameters in a tuple, as in torch.cat((a, b)): it searches lists only."""
    from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode

    original = FunctionHookMode.process_parameters

    def process(self: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        def listed(value: Any) -> Any:
            # An index is a tuple, too, and must stay one; it holds no parameters.
            return list(value) if type(value) is tuple and any(isinstance(v, nn.Parameter) for v in value) else value

        return original(self, [listed(value) for value in args], {key: listed(value) for key, value in kwargs.items()})

    FunctionHookMode.process_parameters = process
    try:
        yield
    finally:
        FunctionHookMode.process_parameters = original


def parts_of(hook: str) -> tuple[str, str, int]:
    """Split a hook name: "pre_hooks" or "post_hooks", NNCF's name of the operation, and its port."""
    side, rest = hook.split(".", 1)
    operation, port = rest.rsplit(".", 1)[0].replace(":", ".").rsplit("__", 1)
    return side, operation, int(port)


def without_extension() -> None:
    """Make NNCF's quantizers use NNCF's torch implementation, eagerly, for the rest of this process.

    Otherwise the first forward pass compiles C++ for minutes, and fails without a compiler or if compilation exceeds
    NNCF's timeout.
    """
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize

    reference = ReferenceQuantize(ReferenceBackendType.TORCH)
    QuantizedFunctionsCPU._loaded_namespace = SimpleNamespace(Quantize_forward=reference.forward)


def name_operations(
    graph_module: fx.GraphModule, model: nn.Module, example: Tensor
) -> tuple[dict[str, tuple[fx.Node, list[Any], Any]], dict[fx.Node, Any]]:
    """Run a graph once, node by node, under NNCF's own naming.

    Args:
        graph_module: Graph of the model from `crqat.train.graph.operations.trace`.
        model: The network itself; NNCF's names follow its modules.
        example: Input of shape [N, C, H, W], float32.

    Returns:
        A mapping of operation name to (FX node, flattened arguments, output), in order; and the value of each node.
    """
    from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
    from nncf.torch.function_hook.hook_storage import HookStorage

    operations: dict[str, tuple[fx.Node, list[Any], Any]] = {}
    # Kept alive, so that no other value gets their addresses.
    from_nothing: dict[int, Any] = {}

    class Recorder(FunctionHookMode):  # type: ignore[misc]
        node: fx.Node

        def execute_pre_hooks(self, args: Any, kwargs: Any, op_meta: Any) -> tuple[Any, Any]:
            flat: list[Any] = []
            for value in [*args, *kwargs.values()]:
                is_list = isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value)
                flat.extend(value if is_list else [value])
            op_meta.extra_info["flat"] = flat
            return args, kwargs

        def execute_post_hooks(self, output: Any, op_meta: Any) -> Any:
            flat = op_meta.extra_info["flat"]
            results = output if isinstance(output, (list, tuple)) else [output]
            if all(id(value) in from_nothing for value in flat if isinstance(value, Tensor)):
                from_nothing.update({id(value): value for value in results})  # as `ask_layout` leaves them out
            elif op_meta.func.__name__ != "__get__" or isinstance(output, Tensor):  # not x.shape and the like
                operations[op_meta.op_name] = (self.node, flat, output)
            return output

    class Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            stack = [path for path, _ in (n.meta.get("nn_module_stack") or {}).values() if path]
            if n.op == "call_module" and stack and stack[-1] == n.target:
                stack = stack[:-1]  # running the leaf pushes it itself
            recorder.module_call_stack = [model, *(model.get_submodule(path) for path in stack)]
            recorder.node = n
            return super().run_node(n)

    recorder = Recorder(model, HookStorage())
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    graph_module.eval()
    with torch.no_grad(), recorder:
        interpreter.run(example)
    return operations, dict(interpreter.env)
