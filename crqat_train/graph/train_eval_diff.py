"""Finds differences between a network's forward in training and in eval mode; torch.fx records only one of them.

A functional dropout becomes a Dropout module, which checks the mode each time it runs. Other operations that run in one
mode only, such as noise, are reported, because the quantized network computes as in eval mode. Weights or outputs that
exist only in training are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import fx, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.graph.explain import place

# Name of the submodule that holds the new Dropout modules.
HOLDER = "functional_dropouts"
_DROPOUTS: dict[Any, type[nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def follow_eval(model: nn.Module, graph: fx.Graph, trace: Callable[[], fx.Graph]) -> tuple[dict[str, nn.Module], str]:
    """Compare the graphs of eval and training mode, and turn functional dropouts into modules.

    Args:
        model: The network.
        graph: Graph in eval mode; changed in place.
        trace: Traces the same network in training mode.

    Returns:
        The new modules by name, and a line that describes the remaining differences from training, empty if there are
        none.

    Raises:
        UsageError: Training has weights, outputs or settings that eval mode lacks.
    """
    try:
        twin = trace()
    except UsageError as error:
        msg = f"{error} (in training mode only; torch.fx can trace the network in eval mode)"
        raise UsageError(msg) from error
    nodes, others = list(graph.nodes), list(twin.nodes)
    _check_weights(model, nodes, others)
    (output,), (other_output,) = graph.find_nodes(op="output"), twin.find_nodes(op="output")
    if isinstance(output.args[0], fx.Node) != isinstance(other_output.args[0], fx.Node):
        last = list(other_output.all_input_nodes)[-1:] or [other_output]
        _refuse(model, last[0])
    matcher = SequenceMatcher(None, list(map(_key, nodes)), list(map(_key, others)), autojunk=False)
    modules: dict[str, nn.Module] = {}
    alone: list[list[fx.Node]] = [[], []]
    for tag, begin, end, other_begin, other_end in matcher.get_opcodes():
        if tag != "equal":
            alone[0] += nodes[begin:end]
            alone[1] += others[other_begin:other_end]
            continue
        for node, other in zip(nodes[begin:end], others[other_begin:other_end], strict=True):
            if _settings(node) == _settings(other) or _drops_nothing(node, other):
                continue
            if node.target not in _DROPOUTS:
                _refuse(model, other)
            p = other.kwargs.get("p", other.args[1] if len(other.args) > 1 else 0.5)
            path = f"{HOLDER}.{len(modules)}"
            modules[path] = _DROPOUTS[node.target](p)
            node.op, node.target = "call_module", path
            node.args, node.kwargs = (node.all_input_nodes[0],), {}
    return modules, _note(model, *alone)


def _key(node: fx.Node) -> tuple[str, str]:
    return node.op, str(node.target)


def _settings(node: fx.Node) -> Any:
    """Return a node's arguments without other nodes, whose names differ between graphs of different length."""
    return fx.map_arg((node.args, node.kwargs), lambda _: None)


def _drops_nothing(node: fx.Node, other: fx.Node) -> bool:
    """Whether two calls have dropout probability 0 and differ only in `training`, such as attention without dropout."""
    found = []
    for call in (node, other):
        try:
            given = inspect.signature(call.target).bind(*call.args, **call.kwargs).arguments  # type: ignore[arg-type]
        except (TypeError, ValueError):  # not a function, or one without a signature
            return False
        if given.pop("training", None) is None or given.get("dropout_p", given.get("p")) != 0:
            return False
        found.append(repr(fx.map_arg(given, lambda _: None)))
    return found[0] == found[1]


def _weights(model: nn.Module, node: fx.Node) -> set[str]:
    """Return the names of the parameters that a node uses."""
    if node.op == "get_attr":
        return {str(node.target)} & dict(model.named_parameters(remove_duplicate=False)).keys()
    if node.op == "call_module":
        return {f"{node.target}.{name}" for name, _ in model.get_submodule(str(node.target)).named_parameters()}
    return set()


def _check_weights(model: nn.Module, nodes: Sequence[fx.Node], others: Sequence[fx.Node]) -> None:
    used = set().union(*(_weights(model, node) for node in nodes))
    for other in others:
        if not _weights(model, other) <= used:
            _refuse(model, other)


def _note(model: nn.Module, alone: Sequence[fx.Node], other_alone: Sequence[fx.Node]) -> str:
    parts = []
    for mode, found in (("training", other_alone), ("eval", alone)):
        found = [node for node in found if node.op.startswith("call") and node.target is not getattr]
        if found:
            names = ", ".join(dict.fromkeys(_name(node) for node in found))
            parts.append(f"{place(model, found[0])} computes {names} only in {mode} mode")
    if not parts:
        return ""
    line = f"{', and '.join(parts)}; the quantized network follows eval mode, in training too"
    if any("softmax" in _name(node) or "sigmoid" in _name(node) for node in alone):
        line += "; return the logits in both modes if the loss expects them"
    return line


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _refuse(model: nn.Module, node: fx.Node) -> None:
    msg = (
        f"model.name: {type(model).__name__} computes something else in training than in eval mode: "
        f"{place(model, node)} ({_name(node)}); leave auxiliary outputs and heads out, use the same settings in both "
        "modes, or leave the difference to a torch.nn module such as nn.Dropout, which torch.fx keeps as one operation"
    )
    raise UsageError(msg)
