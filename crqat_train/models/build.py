"""The float network by its name in the recipe, and its weights from a file. No file's code is ever run."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crqat.core.errors import ToolError, UsageError
from crqat.train.models import weight_files
from crqat.train.own_code import call_function, import_function

# Residual blocks in each of the three stages of a CIFAR ResNet of 6 n + 2 layers.
CIFAR_BLOCKS = {"cifar/resnet20": 3, "cifar/resnet56": 9}
RGB = 3
AUXILIARY_HEADS = ("googlenet", "inception_v3")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters ("option A" of arXiv 1512.03385).

    Where the resolution halves, the shortcut takes every second pixel and pads the new channels with zeros.

    Args:
        channels: Of the input.
        width: Channels of the output.
        stride: 1, or 2 where the resolution halves.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = width - channels

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, channels, H, W] to [B, width, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride == 2:
            before = self.new_channels // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))
        return self.relu2(out + x)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """The ResNet for small images of arXiv 1512.03385, section 4.2.

    Attribute names are those of the published CIFAR-10 weights.

    Args:
        blocks: Residual blocks in each of the three stages.
        classes: Number of logits.
        channels: Of the images.
    """

    def __init__(self, blocks: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 [B, classes], of normalized float32 images [B, channels, H, W]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(torch.flatten(self.pool(out), 1))  # type: ignore[no-any-return]


def _stage(blocks: int, channels: int, width: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))


def _small_resnet18(classes: int, channels: int) -> nn.Module:
    """The ResNet-18 of torchvision with the stem that small images need: 3x3, stride 1, no pooling."""
    from torchvision.models import resnet18  # type: ignore[import-untyped]

    model: nn.Module = resnet18(weights=None, num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _small_mobilenet_v2(classes: int, channels: int) -> nn.Module:
    """The MobileNetV2 of torchvision for small images: the stem and the second stage keep the resolution."""
    from torchvision.models import mobilenet_v2

    # Expansion, channels, repetitions, stride of each stage; 224 px networks have stride 2 in the second one too.
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    model: nn.Module = mobilenet_v2(weights=None, num_classes=classes, inverted_residual_setting=stages)
    stem = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    model.get_submodule("features.0").add_module("0", stem)
    return model


# Networks of torchvision whose first layers are replaced for images of about 32 pixels.
CIFAR_STEMS: dict[str, Callable[[int, int], nn.Module]] = {
    "cifar/resnet18": _small_resnet18,
    "cifar/mobilenet_v2": _small_mobilenet_v2,
}


def check_name(name: str) -> None:
    """See that a network's name is known, or that its function can be called by `build`; nothing is built.

    Raises:
        UsageError: It is not, or cannot.
    """
    if ":" in name:
        check_callable(name)
    elif name.startswith("timm/"):
        _check_timm(name, pretrained=False)
    elif name not in CIFAR_BLOCKS and name not in CIFAR_STEMS:
        _check_torchvision(name)


def build(name: str, classes: int, channels: int) -> nn.Module:
    """A network with freshly drawn weights (torch's global generator), on the CPU, in training mode.

    Args:
        name: "cifar/resnet20", "cifar/resnet56", "cifar/resnet18", "cifar/mobilenet_v2", "torchvision/NAME",
            "timm/NAME" or "package.module:function", a function or a class; see `network_arguments`.
        classes: Number of logits.
        channels: Of the images.

    Raises:
        UsageError: The name is unknown, or the network does not take these arguments.
    """
    if name in CIFAR_BLOCKS:
        return CifarResNet(CIFAR_BLOCKS[name], classes, channels)
    if name in CIFAR_STEMS:
        return CIFAR_STEMS[name](classes, channels)
    if ":" in name:
        return _users(name, classes, channels)
    if name.startswith("timm/"):
        return _timm(name, classes, channels, pretrained=False)
    return _torchvision(name, classes, channels)


# What functions and classes of a user's call the two numbers, the product's own name first.
CLASSES_NAMES = ("classes", "num_classes", "n_classes", "nb_classes")
CHANNELS_NAMES = ("channels", "in_channels", "in_chans", "num_channels", "input_channels")


def check_callable(name: str) -> None:
    """Check that `build` can call what `model.name` names, without calling it; other names than a user's pass.

    Raises:
        UsageError: It cannot be imported, or has a parameter that is neither number of classes, channels nor optional.
    """
    if ":" in name:
        network_arguments(import_function(name, "model.name"), name, 1, 1)


def network_arguments(function: Callable[..., Any], name: str, classes: int, channels: int) -> dict[str, int]:
    """The arguments that a user's function or class of a network takes, by the names that it has for them.

    Args:
        function: See `check_callable`.
        name: As in the recipe, for messages.
        classes: Number of logits.
        channels: Of the images.

    Raises:
        UsageError: See `check_callable`.
    """
    short = name.partition(":")[2]
    if isinstance(function, nn.Module):
        msg = f"model.name: {name} is a network, not what makes one; name its class, or `def build(): return {short}`"
        raise UsageError(msg)
    signature = inspect.signature(function)
    named = [parameter.name for parameter in signature.parameters.values() if _by_name(parameter)]
    every = any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    arguments: dict[str, int] = {}
    for names, value in ((CLASSES_NAMES, classes), (CHANNELS_NAMES, channels)):
        taken = next((own for own in names if own in named), None)
        if taken is not None:
            arguments[taken] = value
    if every and not arguments:
        arguments = {CLASSES_NAMES[0]: classes, CHANNELS_NAMES[0]: channels}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        msg = (
            f"model.name: {name} must be callable as {short}(classes=, channels=), {short}(num_classes=) or {short}() "
            f"({error}); give its other parameters defaults, or name a function of yours that calls it"
        )
        raise UsageError(msg) from error
    return arguments


def _by_name(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _users(name: str, classes: int, channels: int) -> nn.Module:
    """The network of a user's function or class."""
    function = import_function(name, "model.name")
    arguments = network_arguments(function, name, classes, channels)
    model = call_function(function, name, "model.name", arguments)
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        msg = f"model.name: {name} must return a torch.nn.Module, got {kind}"
        raise UsageError(msg)
    return model


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
        from torchvision.models import get_model_weights

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
    names = [*CIFAR_BLOCKS, *CIFAR_STEMS, *(f"torchvision/{model}" for model in sorted(known))]
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
