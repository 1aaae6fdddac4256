"""A network with its quantizers, graph and targets: one object that all stages share."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from crqat.core.errors import UsageError
from crqat.core.grid import Grid
from crqat.core.targets import ALL, Residual
from crqat.train.arguments import checked
from crqat.train.checkpoint import read_header, read_tensors, write_tensors
from crqat.train.config import Override, PTQConfig, QuantizationConfig
from crqat.train.graph.operations import NOTES
from crqat.train.placement.insert import insert_quantizers
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.ptq import steps as ptq
from crqat.train.quantizers import Quantizer, calibration, quantizer_maker, quantizer_of, specs_of
from crqat.train.quantizers import finalize as representable


class QuantizedModel(fx.GraphModule):
    """A float network's graph with quantizers on the edges that its targets need quantized.

    It behaves like any `nn.Module`: `train()`, `eval()`, `to()`, `state_dict()`, `copy.deepcopy` and `torch.compile`
    work as usual. Its state dict has the keys of the float network, and those of the quantizers under
    `quantizers.NAME`. Create it by `quantize_model`.

    Attributes:
        targets: Names of the runtimes whose limits it respects.
        specs: Edge, bit width and integer range of each quantizer, in NNCF's order.
        notes: What the float network does differently in training, such as an operation in train mode only, or a weight
            that it computes in each step; one line each.
    """

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the runtimes whose limits the network respects."""
        return tuple(self.meta["targets"])

    @property
    def specs(self) -> list[QuantizerSpec]:
        """Edge, bit width and integer range of each quantizer."""
        return specs_of(self)

    @property
    def notes(self) -> list[str]:
        """What the float network does differently in training, one line each."""
        return list(self.meta.get(NOTES, ()))

    def quantizer(self, spec: QuantizerSpec) -> Quantizer:
        """Return the quantizer of one of `specs`."""
        return quantizer_of(self, spec)

    def calibrate(self, batches: Iterable[Tensor], method: str = "mse") -> None:
        """Set every quantizer's range from images. Call it in eval mode.

        Args:
            batches: Normalized images, float32 of shape [N, C, H, W] each.
            method: "mse", "minmax" or "percentile"; see `QuantizationConfig.calibration`.
        """
        calibration.calibrate(self, batches, method)

    def finalize(self, trained: bool = True) -> list[str]:
        """Move each scale to a value that every target can store. Calling it again changes nothing.

        Args:
            trained: Whether the network was trained after calibration; used in messages only.

        Returns:
            One line for each weight with channels whose scale was too small and had to be raised; see
            `make_representable`.

        Raises:
            UsageError: A scale is larger than a target can store.
        """
        return representable.make_representable(self, self.targets, trained)

    def grids(self) -> dict[str, Grid]:
        """Return the scale, zero point and integer range of each edge, by edge name."""
        return {spec.edge: self.quantizer(spec).grid() for spec in self.specs}


def quantize_model(
    model: nn.Module,
    example: Tensor,
    config: QuantizationConfig,
    targets: Sequence[str],
    make_quantizer: Callable[[QuantizerSpec], nn.Module] | None = None,
    residual: Residual | None = None,
) -> QuantizedModel:
    """Insert quantizers into a copy of the model, at NNCF's positions and within the limits of the targets.

    Args:
        model: Float network. It is not changed.
        example: Input of shape [N, C, H, W], float32.
        config: Bit widths and quantization methods.
        targets: Names of runtimes; see `crqat.core.targets`.
        make_quantizer: Called once for each spec; None creates the quantizers that the config names.
        residual: Which inputs of a residual Add are quantized; None uses the targets' choice.

    Returns:
        The network with uncalibrated quantizers, in eval mode.

    Raises:
        UsageError: A parameter is not float32; or see `crqat.train.placement.insert.insert_quantizers`.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            msg = f"model.name: {name} is {kind}, and quantization needs float32; call .float() on the network"
            raise UsageError(msg)
    make = make_quantizer or quantizer_maker(config)
    inserted, specs = insert_quantizers(model, example, config, targets, make, residual)
    quantized = QuantizedModel(inserted, inserted.graph)
    # fx.GraphModule copies `meta` when it is copied; other attributes would be lost.
    quantized.meta.update({"specs": specs, "targets": tuple(targets), NOTES: inserted.meta[NOTES]})
    return quantized


FLOAT_WEIGHTS, QUANTIZERS = "float_weights", "quantizers."


def keep_float_weights(model: QuantizedModel) -> None:
    """Store a copy of a quantized network's weights, without those of the quantizers, in its `meta`.

    The weights must still be those of the float network: call this before training and before the steps of `ptq`. A
    weight that the float network computes, as weight normalization does, is stored as computed.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(QUANTIZERS)}
    model.meta[FLOAT_WEIGHTS] = {name: tensor.detach().cpu().clone() for name, tensor in own.items()}


def take_float_weights(model: QuantizedModel) -> None:
    """Load the weights that `keep_float_weights` stored; the quantizers do not change."""
    model.load_state_dict({**model.state_dict(), **model.meta[FLOAT_WEIGHTS]})


CALIBRATION_IMAGES = 512
_FORMAT = "1"
_ARGUMENTS = {"calibration": "calibration_method"}


def quantize(
    net: nn.Module,
    calibration: Iterable[Any],
    *,
    weights: int = 8,
    activations: int = 8,
    first_layer: int = 8,
    last_layer: int = 8,
    overrides: Mapping[str, Override] | None = None,
    float_layers: Sequence[str] | Mapping[str, Sequence[str]] = (),
    weight_method: str = "lsq",
    activation_method: str = "lsq",
    calibration_method: str = "mse",
    calibration_images: int = CALIBRATION_IMAGES,
    equalization: bool = False,
    adaround: bool = False,
    bias_correction: bool = False,
    targets: Sequence[str] = ("onnxruntime", "tensorrt"),
) -> QuantizedModel:
    """Insert quantizers into a copy of a float network and calibrate their ranges on images.

    The result is an `nn.Module`: train it, or export it unchanged (post-training quantization).

    Args:
        net: The float network. It is not changed; the copy stays on its device.
        calibration: A DataLoader or any iterable of batches, or one tensor. A batch is a tensor of images or a tuple
            that begins with one: float32 of shape [N, C, H, W], normalized by your own code.
        weights: Bit width of the weights, 2 to 8.
        activations: Bit width of the activations, 2 to 8.
        first_layer: Bit width of the network's input and of the first layer's weights.
        last_layer: Bit width of the last layer's input and weights.
        overrides: Bit widths of single layers by name or pattern; they take precedence over all of the above.
        float_layers: Convolutions and linear layers that stay in float, by name or pattern such as "layer4.*"; a
            mapping gives them by target. `Export.float_layers` reports their cost.
        weight_method: How weights learn their scales; docs/methods.md describes each method. "package.module:Class" is
            your own method; see docs/adding_a_method.md.
        activation_method: How activations learn their scales, as for weights.
        calibration_method: "mse", "minmax" or "percentile".
        calibration_images: Largest number of images taken from `calibration`.
        equalization: Equalize the channel ranges of consecutive layers before calibration. `PTQConfig` describes
            `equalization`, `adaround` and `bias_correction`.
        adaround: Choose the rounding of weights so that each layer's outputs come closest to the float network's;
            needed at few bits without training.
        bias_correction: Correct the mean of each output channel to that of the float network.
        targets: Name or names of the runtimes that the network must run on; see `crqat.targets()`.

    Returns:
        The calibrated quantized network, in eval mode.

    Raises:
        UsageError: There are no images, they have another type or shape, or the network cannot be quantized; the
            message names the layer.
    """
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    device = next((tensor.device for tensor in net.parameters()), torch.device("cpu"))
    batches = [batch.to(device) for batch in _images(calibration, calibration_images)]
    if not batches:
        msg = "calibration: it holds no images; pass a DataLoader or a list of batches"
        raise UsageError(msg)
    config = QuantizationConfig(
        weight_method=weight_method,
        activation_method=activation_method,
        weights=weights,
        activations=activations,
        first_layer=first_layer,
        last_layer=last_layer,
        overrides=dict(overrides or {}),
        float_layers=_by_target(float_layers),
        calibration=calibration_method,  # type: ignore[arg-type]
    )
    config = checked(config, _ARGUMENTS)
    example = batches[0][:2]
    if len(example) < 2:
        example = example.repeat(2, *[1] * (example.ndim - 1))
    try:
        model = quantize_model(net, example, config, targets).to(device)
    except UsageError as error:
        # Errors name recipe keys; here the user passed arguments.
        msg = str(error).replace("model.name: ", "net: ", 1).replace("quantization.", "", 1)
        raise UsageError(msg) from error
    for note in model.notes:
        warnings.warn(f"net: {note}", stacklevel=2)
    with torch.no_grad():
        logits = model(example)
    if logits.ndim != 2:
        msg = f"net: returns shape {list(logits.shape)}; it must return logits of shape [N, classes]"
        raise UsageError(msg)
    model.meta["quantization"] = asdict(config)
    keep_float_weights(model)
    model.meta["input_shape"] = list(example.shape[1:])
    steps = PTQConfig(bias_correction, equalization, adaround)
    for name, asked in asdict(steps).items():
        if not isinstance(asked, bool):
            msg = f"{name}: should be True or False, not {asked!r}"
            raise UsageError(msg)
    try:
        ptq.apply(model, targets, batches, config.calibration, steps)
    except UsageError as error:
        msg = str(error).replace("ptq.", "", 1).replace("quantization.", "", 1)
        raise UsageError(msg) from error
    return model


def _by_target(layers: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    if isinstance(layers, str):
        layers = [layers]
    if not isinstance(layers, Mapping):
        layers = {ALL: layers} if layers else {}
    return {target: tuple(names) for target, names in layers.items()}


def _images(batches: Iterable[Any], limit: int) -> Iterator[Tensor]:
    """Yield the images of each batch until there are `limit` images."""
    left = limit
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
            is_tensor = isinstance(images, Tensor)
            found = f"{images.dtype} of shape {list(images.shape)}" if is_tensor else type(images).__name__
            msg = (
                f"calibration: a batch begins with {found}; expected normalized images, float32 of shape [N, C, H, W], "
                "or a tuple that begins with them"
            )
            raise UsageError(msg)
        yield images[:left].float()
        left -= len(images)
        if left <= 0:
            return


def save(model: QuantizedModel, path: str | Path) -> None:
    """Write a network made by `quantize` to one safetensors file: weights, scales and quantization settings.

    Args:
        model: The network, or the average of it that a `crqat.EMATeacher` keeps as its `model`.
        path: The file; its directory is created if it is missing.

    Raises:
        UsageError: The network was not made by `quantize`.
    """
    if "quantization" not in model.meta:
        msg = (
            "save: the network was not made by crqat.quantize; a network that `crqat train` made is already in the "
            "directory of its run"
        )
        raise UsageError(msg)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"quantized.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors.update({f"float.{name}": tensor for name, tensor in model.meta[FLOAT_WEIGHTS].items()})
    header = {key: json.dumps(model.meta[key]) for key in ("quantization", "targets", "input_shape")}
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_tensors(path, own, {"crqat.format": _FORMAT, **header})


def load(path: str | Path, net: nn.Module) -> QuantizedModel:
    """Read a quantized network that `save` wrote.

    Args:
        path: The file. Nothing in it is executed.
        net: The float network that was quantized; its weights do not matter.

    Returns:
        The quantized network on the CPU, in eval mode.

    Raises:
        UsageError: The file is missing, damaged, of another network, or was not written by `save`.
    """
    path = Path(path)
    header, tensors = read_header(path), read_tensors(path)
    try:
        if header["crqat.format"] != _FORMAT:
            msg = f"{path}: format {header['crqat.format']}; this version of crqat reads format {_FORMAT}"
            raise UsageError(msg)
        values = {key: json.loads(header[key]) for key in ("quantization", "targets", "input_shape")}
        config = checked(_config_of(values["quantization"]), _ARGUMENTS)
        example = torch.zeros(2, *map(int, values["input_shape"]))
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{path}: not written by crqat.save ({type(error).__name__}: {error})"
        raise UsageError(msg) from error
    model = quantize_model(copy.deepcopy(net).cpu(), example, config, values["targets"])
    groups = {kind: {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)} for kind in _KINDS}
    try:
        model.load_state_dict(groups["quantized."])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        msg = f"{path}: was saved from another network than {type(net).__name__}: {reason[:300]}"
        raise UsageError(msg) from error
    own = [name for name in model.state_dict() if not name.startswith(QUANTIZERS)]
    lost = next((name for name in own if name not in groups["float."]), None)
    if lost is not None:
        msg = f"{path}: does not hold the float network's {lost}; quantize the network again and save it"
        raise UsageError(msg)
    # Older versions also stored weights that the network never uses.
    model.meta[FLOAT_WEIGHTS] = {name: groups["float."][name] for name in own}
    values["targets"] = tuple(values["targets"])
    model.meta.update(values, quantization=asdict(config))
    return model.eval()


_KINDS = ("quantized.", "float.")


def _config_of(values: Mapping[str, Any]) -> QuantizationConfig:
    overrides = {name: Override(**override) for name, override in values["overrides"].items()}
    return QuantizationConfig(**{**values, "overrides": overrides})
