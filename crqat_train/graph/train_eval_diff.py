"""What a forward does otherwise in training: torch.fx records one of the two, so the difference is found here.

A functional dropout becomes a Dropout module, which asks for the mode each time it runs. Whatever else differs is
refused: training would go on without it, and nobody would know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.graph.explain import source_line

# Where the modules are put in the network.
HOLDER = "functional_dropouts"
_DROPOUTS: dict[Any, type[nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def keep_dropouts(model: nn.Module, graph: fx.Graph, trace: Callable[[], fx.Graph]) -> dict[str, nn.Module]:
    """Compare the graph of evaluation with that of training, and turn what only drops values into modules.

    Args:
        model: The network.
        graph: Of evaluation; changed in place.
        trace: Traces the same network in training mode.

    Returns:
        The modules that the graph calls now, by name.

    Raises:
        UsageError: Something else differs.
    """
    name = type(model).__name__
    try:
        twin = trace()
    except UsageError as error:
        msg = f"{error} (in training mode: in eval mode it is traced)"
        raise UsageError(msg) from error
    pairs = list(zip(graph.nodes, twin.nodes, strict=False))
    modules: dict[str, nn.Module] = {}
    for node, other in pairs:
        if (node.op, node.target) != (other.op, other.target):
            _refuse(name, other)
        if _plain(node) == _plain(other):
            continue
        if node.target not in _DROPOUTS:
            _refuse(name, other)
        p = other.kwargs.get("p", other.args[1] if len(other.args) > 1 else 0.5)
        path = f"{HOLDER}.{len(modules)}"
        modules[path] = _DROPOUTS[node.target](p)
    if len(graph.nodes) != len(twin.nodes):
        longer = max((graph, twin), key=lambda g: len(g.nodes))
        _refuse(name, list(longer.nodes)[len(pairs)])
    nodes = [node for node, other in pairs if _plain(node) != _plain(other)]
    for node, path in zip(nodes, modules, strict=True):
        node.op, node.target = "call_module", path
        node.args, node.kwargs = (node.all_input_nodes[0],), {}
    return modules


def _plain(node: fx.Node) -> str:
    """Arguments by the names of the nodes that make them, which are the same in both graphs as long as all agrees."""
    return repr((node.args, node.kwargs))


def _refuse(name: str, node: fx.Node) -> None:
    msg = (
        f"model.name: {name} computes something else in training than in eval mode{source_line(node.stack_trace)} "
        f"({node.name}); take a module such as nn.Dropout for it, which torch.fx keeps as one operation"
    )
    raise UsageError(msg)
