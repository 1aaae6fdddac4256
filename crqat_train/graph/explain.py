"""Explains why a network cannot be traced or run; messages name the line of the user's code and the change to make."""

from __future__ import annotations

import inspect
import keyword
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from crqat.core.errors import CrqatError, UsageError

_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
_OWN = {
    "crqat.train.graph.operations",
    "crqat.train.graph.sizes",
    "crqat.train.placement.insert",
    "crqat.train.graph.attention",
    "crqat.train.placement.nncf_layout",
    "crqat.train.training.first_step",
    "crqat.train.training.optimizer",
    "crqat.train.training.loop",
    "crqat.train.training.stage",
}
_ADAPTIVE_POOLS: set[Any] = {functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d}
# Words in an error message, and the advice for it.
_HINTS = (
    (
        "control flow",
        "an `if`, `while` or `assert` there depends on values or sizes; decide it in __init__, take torch.where for "
        "values, leave asserts out",
    ),
    (
        "item assignment",
        "a part of a tensor is assigned there; build the tensor by torch.cat, torch.where or a product with a mask",
    ),
    ("np.ndarray", "NumPy computes there; take torch's operation"),
    ("zeros() takes", "torch.zeros of a tensor's size is computed there; write x.new_zeros(...)"),
    ("ones() takes", "torch.ones of a tensor's size is computed there; write x.new_ones(...)"),
    (
        "iterated over",
        "a loop there runs over a tensor or its size; loop over a number that is known in __init__, or take x.unbind()",
    ),
)
_OTHERWISE = "replace data-dependent Python code by tensor operations"


def where(error: BaseException) -> str:
    """Return file and line of the model's own code that raised the error, as " at file:line"; empty if none."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        filename, module = traceback.tb_frame.f_code.co_filename, traceback.tb_frame.f_globals.get("__name__", "")
        standard = filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
        foreign = module in _OWN or module.partition(".")[0] in {"torch", "nncf"} or standard
        if not foreign and not filename.startswith("<"):
            frames.append(f" at {filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return frames[-1] if frames else ""


def failing_module(network: nn.Module, error: BaseException) -> str:
    """Return the innermost module that was running when the error was raised, as "fc (Linear)"; empty if none."""
    names = {module: name for name, module in network.named_modules() if name}
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names:
            found = f"{names[module]} ({type(module).__name__})"
        traceback = traceback.tb_next
    return found


def passes_through(error: BaseException) -> bool:
    """Whether an error is reported unchanged: one with crqat's own message, or one for lack of memory."""
    return isinstance(error, (CrqatError, MemoryError, torch.OutOfMemoryError))


def forward_of(model: nn.Module) -> str:
    """Return file and line of a network's forward, as " at file:line"; empty if it has no source."""
    function = inspect.unwrap(type(model).forward)
    if type(model).__module__.startswith("torch."):  # e.g. nn.Sequential: not the user's own code
        return ""
    try:
        return f" at {inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):
        return ""


def one_line(error: BaseException) -> str:
    """Return the error's text without line breaks, shortened; its type if it has no text."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def hint(error: BaseException) -> str:
    """Return advice for an error of torch.fx; empty if the error explains itself."""
    if isinstance(error, UsageError):
        return ""
    text = str(error)
    return "; " + next((way_out for words, way_out in _HINTS if words in text), _OTHERWISE)


def check_module(model: nn.Module) -> None:
    """Refuse anything but a plain network of one input tensor, before it is copied or run.

    Raises:
        UsageError: A part is compiled, scripted or spread over devices, or its forward has other parameters.
    """
    name = type(model).__name__
    lazy = next((path for path, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)), None)
    if lazy is not None:
        msg = (
            f"model.name: the parameter {lazy} has no shape yet; run the network once on a tensor before your function "
            "returns it"
        )
        raise UsageError(msg)
    for path, module in model.named_modules():
        reserved = next((part for part in path.split(".") if keyword.iskeyword(part)), None)
        if reserved is not None:
            msg = f"model.name: {path}: {reserved} is a Python keyword, which torch.fx cannot trace; rename it"
            raise UsageError(msg)
        kind = _wrapped(module)
        if kind:
            msg = f"model.name: {path or name} is {kind}; build it without that, training does it itself"
            raise UsageError(msg)
    if type(model).forward is nn.Module.forward:
        msg = f"model.name: {name} has no forward; define one that takes the images and returns the logits"
        raise UsageError(msg)
    parameters = list(inspect.signature(model.forward).parameters.values())
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(needed) > 1 or not (parameters or takes_any):
        msg = (
            f"model.name: the forward of {name}{forward_of(model)} takes {', '.join(needed) or 'nothing'}; wrap it in "
            "a module whose forward takes the images alone"
        )
        raise UsageError(msg)


def _wrapped(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted by torch.jit"
    if type(module).__name__ == "OptimizedModule":
        return "compiled by torch.compile"
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return f"wrapped in {type(module).__name__}"
    return ""


def check_pools(graph_module: fx.GraphModule, values: Mapping[fx.Node, Any]) -> None:
    """Refuse adaptive pools with windows of unequal size, which ONNX cannot express, before training.

    Args:
        graph_module: The traced network.
        values: Value of each node for an example.

    Raises:
        UsageError: A pool does not divide its input evenly.
    """
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(node.target) if node.op == "call_module" else None
        adaptive = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
        if not isinstance(module, adaptive) and node.target not in _ADAPTIVE_POOLS:
            continue
        before, after = (tuple(values[n].shape[-2:]) for n in (node.all_input_nodes[0], node))
        if any(size % pooled for size, pooled in zip(before, after, strict=True)):
            place = f"{node.target if module is not None else node.name}{source_line(node.stack_trace)}"
            msg = (
                f"model.name: {place} pools {before} pixels to {after}, which ONNX cannot express: take images whose "
                "size makes the pool's input a multiple of its output, or pool to 1"
            )
            raise UsageError(msg)


def check_norms(graph_module: fx.GraphModule) -> None:
    """Refuse a BatchNorm that uses batch statistics in eval mode, too.

    Raises:
        UsageError: A BatchNorm has no running statistics.
    """
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is None:
            msg = f"model.name: {place(graph_module, node)} has no running statistics; use track_running_stats=True"
            raise UsageError(msg)


def place(model: nn.Module, node: fx.Node) -> str:
    """Describe where a node comes from: its module, class and line, as "layer1.conv (Conv2d) at file:line"."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", type(model))}).values()))
    if node.op == "call_module":
        path, kind = str(node.target), type(model.get_submodule(str(node.target)))
    name = getattr(kind, "__name__", str(kind).rpartition(".")[2])
    return (f"{path} ({name})" if path else name) + source_line(node.stack_trace)


def source_line(stack_trace: str | None) -> str:
    """Return the last line of user code in a node's stack trace, as " at file:line"; empty if there is none."""
    found = ""
    for line in (stack_trace or "").splitlines():
        if line.lstrip().startswith('File "'):
            filename, _, rest = line.strip().removeprefix('File "').partition('", line ')
            if "/torch/" not in filename and not filename.startswith(
                (_STANDARD_LIBRARY + "/", str(Path(__file__).parents[1]))
            ):
                found = f" at {filename}:{rest.partition(',')[0]}"
    return found
