"""The float network by its name in the recipe, and its weights from a file. No file's code is ever run."""

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
    """See that a network's name is known, or that its function can be called by `build`; nothing is built.

    Raises:
        UsageError: It is not, or cannot.
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
    """A network with freshly drawn weights (torch's global generator), on the CPU, in training mode.

    That of an ONNX file has the file's weights and is in eval mode.

    Args:
        name: "cifar/resnet8", "cifar/resnet20", "cifar/resnet56", "cifar/resnet18", "cifar/mobilenet_v2",
            "torchvision/NAME", "timm/NAME", "package.module:function", a function or a class (see
            `network_arguments`), or the path of an ONNX file.
        classes: Number of logits.
        channels: Of the images.

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
    """A network of torchvision or timm with the weights that its library publishes, downloaded if need be.

    Args:
        name: "torchvision/NAME" or "timm/NAME".
        classes: Number of logits.
        channels: Of the images.

    Returns:
        The network, and whether its classifier is new: drawn at random, because the weights are for other classes.

    Raises:
        UsageError: The name is unknown or has no published weights.
        ToolError: They cannot be fetched.
    """
    if not name.startswith(("torchvision/", "timm/")):
        msg = f'model.weights: "pretrained" is for torchvision/NAME and timm/NAME; "{name}" needs a file, or `float`'
        raise UsageError(msg)
    if name.removeprefix("torchvision/") in AUXILIARY_HEADS:
        msg = (
            f"model.weights: the published weights of {name} want their images normalized anew inside of the network, "
            "which is left out here; train it by a `float` section, or name a file"
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
    """A published weight of a first convolution for RGB, for as many channels as the network's own has."""
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
    # Imported here because other networks do without torchvision, which takes a second.
    import torchvision  # type: ignore[import-untyped]

    # Only classifiers, not its detectors and the like.
    known = set(torchvision.models.list_models(module=torchvision.models))
    names = [*CIFAR_BLOCKS, *CIFAR_NETWORKS, *(f"torchvision/{model}" for model in sorted(known))]
    if name not in names:
        # The part before the slash must not make "torchvision/x" resemble every torchvision name.
        names_of = {candidate.rpartition("/")[2]: candidate for candidate in names}
        near = difflib.get_close_matches(name.rpartition("/")[2], names_of, n=1)
        hint = f'; did you mean "{names_of[near[0]]}"?' if near else ""
        kinds = '"cifar/...", "torchvision/...", "timm/..." or "package.module:function"'
        msg = f'model.name: "{name}" is no {kinds} known here{hint}'
        raise UsageError(msg)


def _torchvision(name: str, classes: int, channels: int) -> nn.Module:
    _check_torchvision(name)
    import torchvision

    short = name.removeprefix("torchvision/")
    # The heads that help these two to train from scratch are a second output, and no part of what is delivered.
    further = {"aux_logits": False, "init_weights": True} if short in AUXILIARY_HEADS else {}
    model: nn.Module = torchvision.models.get_model(short, weights=None, num_classes=classes, **further)
    return model if channels == RGB else _with_channels(model, channels)


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    """A network of torchvision, whose first convolution reads RGB, for images of other channels; see `of_channels`."""
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
    """A first convolution's weight for RGB, float32 [out, 3, h, w], for images of other channels, as timm does it.

    Of one channel it is the sum: what the convolution gives of a grey image in all three. Of others the three are
    repeated, scaled by 3 / channels.

    Args:
        weight: Of the convolution.
        channels: Of the images.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // RGB), 1, 1)[:, :channels]
    return repeated * (RGB / channels)


def load_weights(model: nn.Module, path: Path, key: str | None = None) -> str:
    """Fill a network with the weights in a file; all of them must fit, and nothing is changed if one does not.

    Args:
        model: Changed in place.
        path: See `crqat.train.models.weight_files.choose`, and there `key`.
        key: Likewise.

    Returns:
        What was taken of the file, in one line; "" where there is nothing to say.

    Raises:
        UsageError: The file is missing, damaged, needs code to load, does not fit the network, or holds two that do.
    """
    chosen, said = weight_files.choose(path, key, model.state_dict())
    model.load_state_dict(chosen.state, strict=False)
    return said


def fill(model: nn.Module, values: Mapping[str, Tensor], source: str) -> None:
    """Fill a network with a state dict, as `load_weights` does with a file's; `source` is where it comes from.

    Raises:
        UsageError: It does not fit the network.
    """
    match = weight_files.match(values, model.state_dict())
    if match.count:
        msg = f"{source} does not fit the network in model.name: {match}"
        raise UsageError(msg)
    model.load_state_dict(match.state, strict=False)
