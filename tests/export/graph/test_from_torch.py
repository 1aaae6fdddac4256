"""The marked float graph: a marker on every quantizer, BN folded, nothing but the network left."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor, nn

from crqat.core.errors import UsageError
from crqat.core.results.benchmark import FloatLayers
from crqat.export.graph.from_torch import marked_graph
from crqat.export.graph.macs import macs, split_macs
from crqat.export.qdq.lint import int8_share, left_in_float, lint
from crqat.export.qdq.write import float_model
from crqat.export.verification.checks import verify
from crqat.train.config import QuantizationConfig
from crqat.train.graph.operations import trace
from crqat.train.models import build as models
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer
from tests.export.conftest import Quantized, initializer, nodes, quantize, random_images, sane_bn, session

# A float32 computation of these networks is off by as much as torch's own is, seen from float64; another order of the
# same operations, and one more rounding in each weight, stay within this multiple of it.
ROUNDING_FACTOR = 4


@pytest.fixture(scope="module")
def resnet20() -> Quantized:
    images = random_images(4, 3, 32, 32)
    return quantize(sane_bn(models.build("cifar/resnet20", 10, 3), images), images)


def rounding(network: nn.Module, images: Tensor) -> tuple[npt.NDArray[np.float64], float]:
    """The exact logits and how far a float32 computation may be off."""
    with torch.no_grad():
        single = network.eval()(images).double().numpy()
        exact = copy.deepcopy(network).double()(images.double()).numpy()
    return exact, ROUNDING_FACTOR * float(np.abs(single - exact).max())


def runtime_logits(model: onnx.ModelProto, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    logits: npt.NDArray[np.float32] = session(model, "ORT_DISABLE_ALL").run(["logits"], {"input": images})[0]
    return logits


def assert_same_network(model: onnx.ModelProto, network: nn.Module, images: Tensor) -> None:
    exact, allowed = rounding(network, images)
    assert np.abs(runtime_logits(model, images.numpy()) - exact).max() <= allowed


def test_every_quantizer_has_one_marker(resnet20: Quantized) -> None:
    graph = resnet20.graph
    marked = Counter(node.attribute[0].s.decode() for node in graph.nodes if node.op_type == "Edge")
    assert marked == Counter(spec.edge for spec in resnet20.specs)


def test_batch_norm_is_folded_and_shortcuts_are_constants(resnet20: Quantized) -> None:
    """The option-A shortcut's Slice and Pad read constants; the exporter computes them by ten further nodes each."""
    graph = resnet20.graph
    kinds = Counter(node.op_type for node in graph.nodes)
    assert kinds == {
        "Edge": len(resnet20.specs), "Conv": 19, "Relu": 19, "Add": 9, "Slice": 4, "Pad": 2,
        "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1,
    }  # fmt: skip
    for node in graph.nodes:
        if node.op_type in ("Slice", "Pad"):
            assert all(name in graph.constants for name in node.input[1:] if name)
    assert len(graph.fold) == 19


def test_operations_have_unique_names_of_their_layers(resnet20: Quantized) -> None:
    graph = resnet20.graph
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    layers = {node.name for node in graph.nodes if node.op_type in ("Conv", "Gemm")}
    modules = resnet20.model.named_modules()
    assert layers == {n.replace(".", "/") for n, m in modules if n.rpartition(".")[2].startswith(("conv", "linear"))}


def test_the_model_is_not_changed(resnet20: Quantized) -> None:
    before = {name: tensor.clone() for name, tensor in resnet20.model.state_dict().items()}
    marked_graph(resnet20.model, [3, 32, 32], 10)
    assert before.keys() == resnet20.model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in resnet20.model.state_dict().items())


@pytest.mark.parametrize("name", ["cifar/resnet20", "torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_the_float_model_is_the_float_network(name: str) -> None:
    images = random_images(8, 3, 32, 32)
    network = sane_bn(models.build(name, 10, 3), images)
    model = quantize_model(network, images[:2], QuantizationConfig(), ("tensorrt",), LSQQuantizer)
    graph = marked_graph(model, [3, 32, 32], 10)
    assert "BatchNormalization" not in {node.op_type for node in graph.nodes}
    assert_same_network(float_model(graph, {}), network, images)


def test_the_comparison_sees_a_weight_off_by_a_thousandth() -> None:
    images = random_images(8, 3, 32, 32)
    network = sane_bn(models.build("cifar/resnet20", 10, 3), images)
    model = float_model(marked_graph(trace(network), [3, 32, 32], 10), {})
    exact, allowed = rounding(network, images)
    name = nodes(model, "Conv")[15].input[1]
    weight = initializer(model, name).copy()
    weight[0] *= 1.001
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(onnx.numpy_helper.from_array(weight, name))
    assert np.abs(runtime_logits(model, images.numpy()) - exact).max() > allowed


class Twins(nn.Module):
    """Two convolutions with equal weights, which the exporter stores once, and different BN behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, bias=False), nn.Conv2d(3, 3, 3, bias=False)
        self.conv2.weight.data.copy_(self.conv1.weight.data)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))).mean((2, 3))  # type: ignore[no-any-return]


class CalledTwice(Twins):
    """One convolution, used twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv1(self.relu(self.bn1(self.conv1(x))))).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [Twins, CalledTwice])
def test_equal_weights_keep_their_own_batch_norm(network: Callable[[], nn.Module]) -> None:
    images = random_images(8, 3, 8, 8)
    torch.manual_seed(0)
    built = sane_bn(network(), images)
    quantized = quantize(built, images)
    graph = quantized.graph
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert_same_network(float_model(graph, {}), built, images)


def test_a_mean_over_pixels_is_global_average_pooling() -> None:
    """ReduceMean has no form that both opset 17 and 19 take."""

    class Kept(Twins):
        def forward(self, x: Tensor) -> Tensor:
            return torch.flatten(self.conv1(x).mean((-2, -1), keepdim=True), 1)

    images = random_images(8, 3, 8, 8)
    for network in (Twins(), Kept()):
        quantized = quantize(sane_bn(network, images), images)
        for file in quantized.files().values():
            assert len(nodes(file.model, "GlobalAveragePool")) == 1
            assert not nodes(file.model, "ReduceMean")
        assert_same_network(float_model(quantized.graph, {}), network, images)


def test_a_batch_norm_without_a_convolution_of_its_own_stays() -> None:
    class Shared(Twins):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            return torch.flatten(self.bn1(x) + x, 1)

    images = random_images(4, 3, 4, 4)
    network = sane_bn(Shared(), images)
    graph = marked_graph(trace(network), [3, 4, 4], 12)
    assert [node.op_type for node in graph.nodes].count("BatchNormalization") == 1
    assert not graph.fold
    assert_same_network(float_model(graph, {}), network, images)


def test_traced_networks_are_exported_as_they_are() -> None:
    """No quantizer at all is a layout too."""
    network = models.build("cifar/resnet20", 10, 1)
    graph = marked_graph(trace(network.eval()), [1, 8, 8], 10)
    assert "Edge" not in {node.op_type for node in graph.nodes}
    assert_same_network(float_model(graph, {}), network, random_images(2, 1, 8, 8))


def test_what_the_exporter_cannot_write_is_said_in_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.special.bessel_j0(self.conv(x)).mean((2, 3))
            return y

    quantized = quantize(Odd(), random_images(4, 3, 8, 8))
    with pytest.raises(UsageError, match=r"^model\.name: .*test_from_torch.py:\d+: .*bessel_j0.*; replace that"):
        quantized.file("onnxruntime")
    assert "graph(" not in capfd.readouterr().out


class Shared(nn.Module):
    """Two layers and an Add read one tensor; a linear layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.side = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.branch(x) + self.side(x) + x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pattern", ["stem", "branch", "fc"])
def test_a_layer_that_is_kept_in_float_is_named_priced_and_verified(pattern: str) -> None:
    images = random_images(4, 3, 8, 8)
    config = QuantizationConfig(float_layers={"all": (pattern,)})
    made = quantize(sane_bn(Shared(), images), images, config=config)
    amounts = {"stem": 64 * 8 * 27, "branch": 64 * 8 * 72, "side": 64 * 8 * 8, "fc": 80}
    assert macs(made.graph) == amounts
    asked, kept = split_macs(made.graph)
    assert asked == {name: amount for name, amount in amounts.items() if name != pattern}
    assert kept == FloatLayers({pattern: amounts[pattern]}, amounts[pattern] / sum(amounts.values()))
    files = made.files()
    for target, file in files.items():
        assert lint(file.model, target) == []
        assert left_in_float(file.model) == {pattern: "input and weight"}
        assert int8_share(file.model) == pytest.approx(sum(asked.values()) / sum(amounts.values()))
    for entry in verify(made.model, made.grids, files, images.numpy()).values():
        assert entry.status == "passed"
        assert entry.codes > 0
