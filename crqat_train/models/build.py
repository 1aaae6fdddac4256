"""Builds the float network that a recipe names, and loads weights from a file without executing code in it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crqat.core.errors import ToolError, UsageError
from crqat.core.field_bounds import user_path
from crqat.train.config import is_onnx_file
from crqat.train.models import from_onnx, onnx_file, weight_files
from crqat.train.models.cifar import CIFAR_BLOCKS, CIFAR_NETWORKS, CifarResNet
from crqat.train.models.own_network import build_own, check_callable

RGB = 3
AUXILIARY_HEADS = ("googlenet", "inception_v3")


def check_name(name: str) -> None:
    """Check that a network's name is known, or that `build` can call its function; nothing is built.

    Raises:
        UsageError: The name is unknown, or its function cannot be called.
    """
    if is_onnx_file(name):
        onnx_file.read(user_path(name, "model.name"))
    elif ":" in name:
        check_callable(name)
    elif name.startswith("timm/"):
        _check_timm(name, pretrained=False)
    elif name not in CIFAR_BLOCKS and name not in CIFAR_NETWORKS:
        _check_torchvision(name)


def build(name: str, classes: int, channels: int) -> nn.Module:
    """Return a network with randomly initialized weights (torch's global generator), on the CPU, in training mode.

    The network of an ONNX file has the file's weights and is in eval mode.

    Args:
        name: "cifar/resnet8", "cifar/resnet20", "cifar/resnet56", "cifar/resnet18", "cifar/mobilenet_v2",
            "torchvision/NAME", "timm/NAME", "package.module:function", a function or a class (see
            `network_arguments`), or the path of an ONNX file.
        classes: Number of logits.
        channels: Number of image channels.

    Raises:
        UsageError: The name is unknown, or the network does not take these arguments.
    """
    if is_onnx_file(name):
        return from_onnx.build(name, classes, channels)
    if name in CIFAR_BLOCKS:
        return CifarResNet(CIFAR_BLOCKS[name], classes, channels)
    if name in CIFAR_NETWORKS:
        return CIFAR_NETWORKS[name](classes, channels)
    if ":" in name:
        return build_own(name, classes, channels)
    if name.startswith("timm/"):
        return _timm(name, classes, channels, pretrained=False)
    return _torchvision(name, classes, channels)


def pretrained(name: str, classes: int, channels: int) -> tuple[nn.Module, bool]:
    """Return a torchvision or timm network with its published weights, downloading them if necessary.

    Args:
        name: "torchvision/NAME" or "timm/NAME".
        classes: Number of logits.
        channels: Number of image channels.

    Returns:
        The network, and whether its classifier is newly initialized because the weights are for other classes.

    Raises:
        UsageError: The name is unknown or has no published weights.
        ToolError: The weights cannot be downloaded.
    """
    if not name.startswith(("torchvision/", "timm/")):
        msg = (
            f'model.weights: "pretrained" is for torchvision/NAME and timm/NAME; for "{name}", name a file of '
            "weights, or train the network by a `float` section"
        )
        raise UsageError(msg)
    if name.removeprefix("torchvision/") in AUXILIARY_HEADS:
        msg = (
            f"model.weights: the published weights of {name} need a second normalization of the images inside the "
            "network, which crqat leaves out; train the network by a `float` section, or name a file of other weights"
        )
        raise UsageError(msg)
    try:
        if name.startswith("timm/"):
            model = _timm(name, classes, channels, pretrained=True)
            configuration: Any = model.pretrained_cfg
            return model, configuration["num_classes"] != classes
        model = _torchvision(name, classes, channels)
        from torchvision.models import get_model_weights  # type: ignore[import-untyped]

        weights = get_model_weights(name.removeprefix("torchvision/")).DEFAULT
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # urllib's and the hubs' errors, and a wrong hash
        reason = " ".join(str(error).split())[:200]
        msg = f"model.weights: cannot fetch the weights of {name} ({reason}); check the network, or name a file"
        raise ToolError(msg) from error
    own = model.state_dict()
    state = {key: _stem_for(value, own.get(key)) for key, value in state.items()} if channels != RGB else state
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    return model, len(fitting) < len(state)


def _stem_for(value: Tensor, own: Tensor | None) -> Tensor:
    """Return a published weight, adapted to the image channels of the network's own weight.

    Args:
        value: The published weight. It is returned unchanged unless it belongs to a convolution on RGB images.
        own: The network's weight of the same name; None if there is none.
    """
    if own is None or value.ndim != 4 or value.shape[1] != RGB or own.shape[2:] != value.shape[2:]:
        return value
    return of_channels(value, own.shape[1])


def _timm(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    _check_timm(name, pretrained)
    import timm

    short = name.removeprefix("timm/")
    model: nn.Module = timm.create_model(short, pretrained=pretrained, num_classes=classes, in_chans=channels)
    return model


def _check_timm(name: str, pretrained: bool) -> None:
    try:
        import timm
    except ImportError as error:
        msg = f'model.name: "{name}" needs timm; pip install crqat-edge[timm]'
        raise ToolError(msg) from error
    short = name.removeprefix("timm/")
    known = timm.list_models(pretrained=pretrained) if pretrained else timm.list_models()
    if short.partition(".")[0] not in {model.partition(".")[0] for model in known}:
        near = difflib.get_close_matches(short, known, n=1)
        hint = f'; did you mean "timm/{near[0]}"?' if near else ""
        msg = f'model.name: timm has no "{short}"{" with published weights" if pretrained else ""}{hint}'
        raise UsageError(msg)


def _check_torchvision(name: str) -> None:
    # Imported here: torchvision takes a second, and other networks do not need it.
    import torchvision  # type: ignore[import-untyped]

    # Only classifiers, not its detectors and the like.
    known = set(torchvision.models.list_models(module=torchvision.models))
    names = [*CIFAR_BLOCKS, *CIFAR_NETWORKS, *(f"torchvision/{model}" for model in sorted(known))]
    if name not in names:
        # Compare the part after the slash only: with "torchvision/" all names would look similar.
        names_of = {candidate.rpartition("/")[2]: candidate for candidate in names}
        near = difflib.get_close_matches(name.rpartition("/")[2], names_of, n=1)
        hint = f'; did you mean "{names_of[near[0]]}"?' if near else ""
        kinds = '"cifar/...", "torchvision/...", "timm/..." or "package.module:function"'
        msg = f'model.name: "{name}" is not a known {kinds}{hint}'
        raise UsageError(msg)


def _torchvision(name: str, classes: int, channels: int) -> nn.Module:
    _check_torchvision(name)
    import torchvision

    short = name.removeprefix("torchvision/")
    # These two networks have auxiliary heads for training, which are a second output and not part of the export.
    further = {"aux_logits": False, "init_weights": True} if short in AUXILIARY_HEADS else {}
    model: nn.Module = torchvision.models.get_model(short, weights=None, num_classes=classes, **further)
    return model if channels == RGB else _with_channels(model, channels)


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    """Adapt a torchvision network, whose first convolution takes RGB, to other channels; see `of_channels`."""
    name, first = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == RGB
    )
    made = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    with torch.no_grad():
        made.weight.copy_(of_channels(first.weight, channels))
        if made.bias is not None and first.bias is not None:
            made.bias.copy_(first.bias)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, made)
    return model


def of_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt a first convolution's RGB weight, float32 [out, 3, h, w], to another number of channels, as timm does.

    For one channel the result is the sum of the three channels' weights: a grey image then gives the same output as
    three equal channels did before. For any other number the three channels' weights are repeated and multiplied by
    3 / channels.

    Args:
        weight: Weight of the convolution.
        channels: Number of image channels.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // RGB), 1, 1)[:, :channels]
    return repeated * (RGB / channels)


def load_weights(model: nn.Module, path: Path, key: str | None = None) -> str:
    """Load the weights in a file into a network; if any does not fit, nothing is changed.

    Args:
        model: Changed in place.
        path: The file; see `crqat.train.models.weight_files.choose`.
        key: Key of the state dict in the file; see `crqat.train.models.weight_files.choose`.

    Returns:
        A note of what was taken from the file, in one line; "" if there is nothing to report.

    Raises:
        UsageError: The file is missing, damaged, needs code to load, does not fit, or has several state dicts that fit.
    """
    chosen, said = weight_files.choose(path, key, model.state_dict())
    model.load_state_dict(chosen.state, strict=False)
    return said


def fill(model: nn.Module, values: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a network; if any tensor does not fit, nothing is changed.

    Args:
        model: Changed in place.
        values: The state dict.
        source: Where the state dict comes from; used in messages.

    Raises:
        UsageError: The state dict does not fit the network.
    """
    match = weight_files.match(values, model.state_dict())
    if match.count:
        msg = f"{source} does not fit the network in model.name: {match}"
        raise UsageError(msg)
    model.load_state_dict(match.state, strict=False)
