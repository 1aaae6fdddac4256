"""Builds a float network from an ONNX file, and compares it with ONNX Runtime's results for the file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crqat.core.errors import ToolError, UsageError
from crqat.core.field_bounds import user_path
from crqat.train.models.onnx_file import OnnxFile, read
from crqat.train.models.onnx_network import Builder, OnnxNetwork

# Largest difference of the logits relative to their range; the network and the file differ by rounding only.
TOLERANCE = 1e-4
# Number of images for the comparison.
COMPARED = 8


def network(file: OnnxFile) -> OnnxNetwork:
    """Return the network of a file, on the CPU in eval mode; it accepts any batch size, even if the file fixes one.

    Raises:
        UsageError: A node is used in a way that is not supported; the message names it.
    """
    return Builder(file).build()


def build(name: str, classes: int, channels: int) -> OnnxNetwork:
    """Return the network of the ONNX file that `model.name` names, with the file's weights.

    Args:
        name: Path of the file.
        classes: Number of classes of the data set.
        channels: Number of image channels.

    Raises:
        UsageError: See `read` and `network`; or the file has another number of outputs or channels.
        ToolError: See `read`.
    """
    path = user_path(name, "model.name")
    made = network(read(path))
    if made.shape[1] != channels:
        msg = f"data.channels: the images have {channels} channels, and {path} takes {made.shape[1]}; make them equal"
        raise UsageError(msg)
    if made.classes != classes:
        msg = (
            f"model.name: {path} has {made.classes} outputs, and the data set has {classes} classes; both must be the "
            "same"
        )
        raise UsageError(msg)
    return made


def compare(name: str, network: nn.Module, images: Tensor) -> str:
    """Compare a converted network with the results of ONNX Runtime for the file.

    Args:
        name: Path of the file.
        network: The network, on the CPU in eval mode.
        images: Preprocessed images, float32 [N, C, H, W], on the CPU; only the first few are used.

    Returns:
        One line for the user that states the largest difference of the logits.

    Raises:
        UsageError: The file does not accept images of this size, or the results differ by more than rounding.
        ToolError: ONNX Runtime cannot run the file.
    """
    file = read(user_path(name, "model.name"))
    images = images[:COMPARED].contiguous()
    if any(side not in (None, own) for side, own in zip(file.shape[2:], images.shape[2:], strict=True)):
        sides = " x ".join(str(side or "?") for side in file.shape[2:])
        given = " x ".join(map(str, images.shape[2:]))
        msg = f"data.crop: images are {given}, and {file.path} takes {sides}; set data.crop to the file's size"
        raise UsageError(msg)
    reference = _by_runtime(file, images)
    with torch.no_grad():
        logits = network(images)
    span = float(reference.max() - reference.min())
    difference = float((logits - reference).abs().max()) / max(span, 1e-30) if logits.shape == reference.shape else None
    if difference is None or not difference <= TOLERANCE:
        found = "another shape" if difference is None else f"logits that differ by {difference:.1e} of their range"
        free = "" if file.shape[0] is None else "; export it with a dynamic batch size"
        msg = (
            f"model.name: the network converted from {file.path} does not match the file: compared with ONNX "
            f"Runtime, it returns {found} (up to {TOLERANCE:g} is rounding)"
            f"{free or '; give the network as module:function instead'}"
        )
        raise UsageError(msg)
    return (
        f"{file.path}: on {len(images)} images the converted network's logits differ from the file's logits in "
        f"ONNX Runtime by at most {difference:.1e} of their range"
    )


def _by_runtime(file: OnnxFile, images: Tensor) -> Tensor:
    """Return ONNX Runtime's logits for the file, computed in batches of the size that the file requires."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    count = file.shape[0] or len(images)
    padded = torch.cat([images, images[-1:].repeat(-len(images) % count, 1, 1, 1)])
    try:
        content = file.model.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        parts = [session.run([file.output], {file.input: part.numpy()})[0] for part in torch.split(padded, count)]
    except Exception as error:  # ONNX Runtime has its own exceptions for each kind of failure
        words = " ".join(str(error).split())[:200]
        msg = f"{file.path}: ONNX Runtime cannot run it: {words}"
        raise ToolError(msg) from error
    return torch.cat([torch.from_numpy(part) for part in parts])[: len(images)]
