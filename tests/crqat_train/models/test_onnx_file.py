"""Float ONNX files as networks: what is read computes what ONNX Runtime does, all else is refused by its node."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.models import build as models
from crqat.train.models import from_onnx, onnx_file
from crqat.train.quantized_model import quantize

SIDE, CLASSES = 16, 5


class Own(nn.Module):
    """A network with a forward of its own on the features of one convolution, float32 [N, 8, 8, 8]."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.stem, self.function = nn.Conv2d(3, 8, 3, 2, 1), function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        features = self.function(self, self.stem(x))
        if features.ndim == 4:
            features = features.mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


def shuffled(_: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def activated(own: Any, x: Tensor) -> Any:
    bounded = x.clamp(-1.0, 0.5) / (x.exp() + 1.0) + functional.softplus(x) + x.abs().add(0.1).sqrt().log()
    return own.slopes(functional.leaky_relu(x, 0.2)) + functional.elu(x).tanh() - bounded + x**2 + (1 - x)


def attended(own: Any, x: Tensor) -> Any:
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([own.token.expand(x.shape[0], -1, -1), tokens], 1) + own.position
    q, k, v = own.qkv(own.norm(tokens)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1)
    tokens = tokens + (weights @ v).transpose(1, 2).reshape(x.shape[0], -1, 8)
    return tokens[:, 0]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sequence": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.Hardswish(), nn.AvgPool2d(2, count_include_pad=False),
        nn.Flatten(), nn.Dropout(), nn.Linear(32, CLASSES),
    ),
    "norm in front": lambda: Own(lambda own, x: x + own.branch(x), branch=nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))),
    "gates": lambda: Own(lambda own, x: functional.silu(x) * own.gate(x).sigmoid(), gate=nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())),
    "activations": lambda: Own(activated, slopes=nn.PReLU(8)),
    "gelu": lambda: Own(lambda own, x: functional.gelu(own.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) * own.scale,
        norm=nn.LayerNorm(8), scale=torch.rand(8, 1, 1)),
    "shuffle": lambda: Own(shuffled),
    "split": lambda: Own(
        lambda own, x: torch.cat([*torch.split(x, [2, 6], 1)[::-1], x.chunk(2, 1)[1], x[:, ::2]], 1)[:, 4:12]),
    "pads": lambda: Own(
        lambda own, x: functional.pad(x, (1, 2, 0, 1), value=0.5) + functional.pad(x, (2, 1, 1, 0), "reflect")),
    "sizes": lambda: Own(lambda own, x: functional.interpolate(own.up(x), scale_factor=2.0) - functional.interpolate(
        x, (32, 32), mode="bilinear"), up=nn.ConvTranspose2d(8, 8, 2, 2)),
    "attention": lambda: Own(attended, token=torch.randn(1, 1, 8), position=torch.randn(1, 65, 8), qkv=nn.Linear(8, 24),
        norm=nn.LayerNorm(8)),
    "maximum": lambda: Own(lambda own, x: torch.maximum(x, x.mean((2, 3), keepdim=True)).amax((2, 3))),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean, part.running_var = torch.randn(8) * 0.1, torch.rand(8) + 0.5
    return network.eval()


def exported(network: nn.Module, path: Path, opset: int = 17, batch: int | None = None) -> Path:
    """By torch's older exporter, which needs no further package; `batch` None leaves the number of images open."""
    free: dict[str, Any] = {"dynamic_axes": {"x": {0: "n"}}} if batch is None else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.randn(batch or 2, 3, SIDE, SIDE),), str(path), opset_version=opset, input_names=["x"],
            dynamo=False, **free,
        )  # fmt: skip
    return path


@pytest.mark.parametrize(("opset", "batch"), [(13, None), (17, 1), (17, None), (20, None)])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_computes_what_its_file_does(name: str, opset: int, batch: int | None, tmp_path: Path) -> None:
    path = exported(made(name), tmp_path / "net.onnx", opset, batch)
    network = models.build(str(path), CLASSES, 3)
    images = torch.randn(5, 3, SIDE, SIDE)
    assert "of their range" in from_onnx.compare(str(path), network, images)
    torch.testing.assert_close(network(images), made(name)(images), rtol=1e-4, atol=1e-4)
    # It is an ordinary network: every parameter learns, and the weights lie in its state dict.
    network.train()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert len(network.state_dict()) >= 3


def test_layers_have_the_names_that_they_had_and_activations_are_whole(tmp_path: Path) -> None:
    gates = from_onnx.network(onnx_file.read(exported(made("gates"), tmp_path / "gates.onnx")))
    assert {name for name, _ in gates.named_parameters()} == {name for name, _ in made("gates").named_parameters()}
    functions = [getattr(step.function, "__name__", step.function) for step in gates._steps]
    assert functions.count("silu") == 1 and functions.count("sigmoid") == 1
    gelu = from_onnx.network(onnx_file.read(exported(made("gelu"), tmp_path / "gelu.onnx")))
    assert [getattr(step.function, "__name__", "") for step in gelu._steps].count("gelu") == 1
    assert not any(getattr(step.function, "__name__", "") == "erf" for step in gelu._steps)


def newer(path: Path, batch: int | str = "n", beside: bool = True) -> Path:
    """A file as torch's newer exporter writes it: weights in a file beside it, axes and shapes as inputs."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "features.0.weight": (8, 3, 3, 3),
        "features.0.weight_bias": (8,),
        "fc.weight": (CLASSES, 8),
        "b": (CLASSES,),
    }
    stored = [
        numpy_helper.from_array(torch.randn(shape, generator=generator).numpy(), name)
        for name, shape in weights.items()
    ]
    names = list(weights)
    stored += [
        helper.make_tensor("axes", TensorProto.INT64, [2], [-1, -2]),
        helper.make_tensor("shape", TensorProto.INT64, [2], [batch if isinstance(batch, int) else -1, 8]),
        helper.make_tensor("six", TensorProto.FLOAT, [], [6.0]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
    ]
    nodes = [
        helper.make_node("Conv", ["x", *names[:2]], ["c"], "node_conv", pads=[0, 0, 1, 1], strides=[2, 2]),
        helper.make_node("Clip", ["c", "zero", "six"], ["r"], "node_clip"),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"], "node_mean", keepdims=1),
        helper.make_node("Reshape", ["m", "shape"], ["f"], "node_view", allowzero=1),
        helper.make_node("Gemm", ["f", "fc.weight", "b"], ["y"], "node_linear", transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "main", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])], stored,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=beside, location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.mark.parametrize("batch", ["n", 1, 2])
def test_weights_in_a_file_beside_it_are_taken_in(batch: int | str, tmp_path: Path) -> None:
    path = newer(tmp_path / "net.onnx", batch)
    network = models.build(str(path), CLASSES, 3)
    from_onnx.compare(str(path), network, torch.randn(5, 3, SIDE, SIDE))
    assert [name for name, _ in network.named_parameters()][:2] == ["features.0.weight", "features.0.bias"]


def test_paths_in_a_file_lead_to_its_own_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = newer(folder / "net.onnx")
    data = folder / "net.onnx.data"
    content = data.read_bytes()
    (tmp_path / "secret").write_bytes(content)

    def refused(location: str) -> str:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        onnx.save(model, folder / "other.onnx")
        with pytest.raises(UsageError) as caught:
            onnx_file.read(folder / "other.onnx")
        return str(caught.value)

    (folder / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", str(tmp_path / "secret"), "link", "folder/../../secret"):
        assert "outside of the file's own folder" in refused(location)
    assert "damaged" in refused("a\0b")
    assert "lies in gone.data, which is not there" in refused("gone.data")
    data.write_bytes(content[:100])
    with pytest.raises(
        UsageError, match=r"net\.onnx: the tensor .* takes \d+ bytes .*, and net\.onnx\.data has \d+ .* damaged"
    ):
        onnx_file.read(path)
    data.unlink()
    with pytest.raises(
        UsageError, match=r"net\.onnx: the tensor features\.0\.weight lies in net\.onnx\.data, which is not"
    ):
        onnx_file.read(path)


def test_names_in_a_file_name_modules_and_nothing_else(tmp_path: Path) -> None:
    model = onnx.load(newer(tmp_path / "net.onnx", beside=False))
    model.graph.node[4].name = '"); __import__("os").abort() #'
    names = {"features.0.weight": "forward.__class__.weight", "fc.weight": "a'];x"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    onnx.save(model, tmp_path / "net.onnx")
    network = models.build(str(tmp_path / "net.onnx"), CLASSES, 3)
    from_onnx.compare(str(tmp_path / "net.onnx"), network, torch.randn(2, 3, SIDE, SIDE))
    paths = [name for name, _ in network.named_parameters()]
    assert len(paths) == 4 and all(part.replace("_", "").isalnum() for path in paths for part in path.split("."))


def node(kind: str, **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    """Put another operator in the place of the Clip."""

    def change(model: onnx.ModelProto) -> None:
        inputs = attributes.pop("inputs", ["c"])
        model.graph.node[1].CopyFrom(helper.make_node(kind, inputs, ["r"], "node_1", **attributes))

    return change


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
    node("If", inputs=["zero"], then_branch=body, else_branch=body)(model)


def branch_after_its_condition(model: onnx.ModelProto) -> None:
    node("Det")(model)
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
    model.graph.node.append(helper.make_node("If", ["r"], ["s"], "branch", then_branch=body, else_branch=body))


def opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def input_of(*shape: int | str, kind: int = TensorProto.FLOAT) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, list(shape)))

    return change


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))


def computed_weight(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[1] = "m"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (loop, "node node_1 (If): contains a subgraph"),
        (branch_after_its_condition, "node branch (If): contains a subgraph"),
        (node("Det"), "node node_1 (Det): is not a supported operator"),
        (node("Relu", domain="com.example"), "node node_1 (Relu): is an operator of com.example"),
        (node("QuantizeLinear", inputs=["c", "six"]), "node node_1 (QuantizeLinear): belongs to a quantized file"),
        (node("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]), "node node_1 (AveragePool): an average pool"),
        (node("Conv", inputs=["c", "c"]), "node node_1 (Conv): its input c is computed from the image"),
        (node("Flatten", axis=0), "node node_1 (Flatten): is supported with axis 1 only"),
        (opset(12), "has opset 12; opsets 13 to 23 are supported"),
        (second_input, "has 2 inputs (x, mask)"),
        (second_output, "has 2 outputs (y, c)"),
        (input_of("n", SIDE, SIDE, 3), f"the input x has the shape ? x {SIDE} x {SIDE} x 3"),
        (input_of("n", 3), "the input x has the shape ? x 3;"),
        (input_of("n", 3, SIDE, SIDE, kind=TensorProto.FLOAT16), "the input x is FLOAT16"),
        (computed_weight, "node node_linear (Gemm): its input m is computed from the image"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_its_node(
    change: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    model = onnx.load(newer(path, beside=False))
    change(model)
    onnx.save(model, path)
    with pytest.raises(UsageError) as caught:
        from_onnx.network(onnx_file.read(path))
    assert str(caught.value).startswith(f"{path}: {message}")


def test_files_that_are_none_and_other_numbers_of_classes_end_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(UsageError, match=r"model\.name: no file"):
        models.check_name(str(path))
    path.write_bytes(b"\x08\x07not a model")
    with pytest.raises(UsageError, match="not an ONNX file"):
        models.check_name(str(path))
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="contains no operators"):
        models.check_name(str(path))
    newer(path)
    models.check_name(str(path))
    with pytest.raises(UsageError, match="has 5 outputs, and the data set has 7 classes"):
        models.build(str(path), 7, 3)
    with pytest.raises(UsageError, match=r"data\.channels: the images have 1 channels, and .* takes 3"):
        models.build(str(path), CLASSES, 1)


def test_a_network_that_computes_something_else_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = newer(tmp_path / "net.onnx", beside=False)
    network, images = models.build(str(path), CLASSES, 3), torch.randn(3, 3, SIDE, SIDE)
    with pytest.raises(UsageError, match=r"data\.crop: images are 8 x 8, and .*net\.onnx takes 16 x 16"):
        from_onnx.compare(str(path), network, images[:, :, :8, :8])
    with torch.no_grad():
        next(network.parameters()).mul_(1.001)
    with pytest.raises(UsageError, match=r"from .*net\.onnx does not match the file: .* returns logits that differ by"):
        from_onnx.compare(str(path), network, images)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))  # type: ignore[no-any-return]


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, CLASSES)
        self.blocks = nn.Sequential(_Block(), _Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.conv(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


def test_repeated_blocks_and_words_of_python_can_be_quantized(tmp_path: Path) -> None:
    """No two names are alike but for their dots, and none is a word of the grammar."""
    path = exported(_Blocks().eval(), tmp_path / "net.onnx")
    model = onnx.load(path)
    for node, name in zip(model.graph.node, ("in", "/class/lambda/Conv"), strict=False):
        node.name = name
    onnx.save(model, path)
    network = models.build(str(path), CLASSES, 3)
    flat = [name.replace(".", "_") for name, _ in network.named_modules()]
    assert len(flat) == len(set(flat))
    assert quantize(network, torch.randn(4, 3, SIDE, SIDE)).specs
    named = nn.Sequential()
    named.add_module("in", nn.Conv2d(3, 4, SIDE))
    with pytest.raises(UsageError, match=r"^net: in: in is a Python keyword"):
        quantize(named.append(nn.Flatten()).eval(), torch.randn(4, 3, SIDE, SIDE))
