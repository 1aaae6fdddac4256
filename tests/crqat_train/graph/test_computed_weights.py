"""Weights that are computed from parameters end as plain ones with quantizers on them; the results stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from crqat.core.errors import UsageError
from crqat.train.config import QuantizationConfig
from crqat.train.quantized_model import QuantizedModel, quantize, quantize_model

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Net(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.fc = nn.Conv2d(3, 8, 3), middle, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.relu(self.middle(functional.relu(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Computing(nn.Module):
    """A layer that `function` computes from parameters of these shapes."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def standardized(m: Any, x: Tensor) -> Tensor:
    centred = m.w - m.w.mean((1, 2, 3), keepdim=True)
    return functional.conv2d(x, centred / centred.std((1, 2, 3), keepdim=True), m.b * 2)


def tied(m: Any, x: Tensor) -> Tensor:
    tokens = functional.linear(x.permute(0, 2, 3, 1), m.w)
    return functional.linear(functional.relu(tokens), m.w.t()).permute(0, 3, 1, 2)


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "WeightNorm"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), "SpectralNorm"),
    "weight norm by a hook": (lambda: weight_norm(nn.Conv2d(8, 8, 1)), "WeightNorm"),
    "spectral norm by a hook": (lambda: spectral_norm(nn.Conv2d(8, 8, 1)), "SpectralNorm"),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Conv2d(8, 8, 1), "weight", 0.5),  # type: ignore[no-untyped-call]
        "L1Unstructured, which prunes: training may change",
    ),
    "standardized": (lambda: Computing(standardized, w=(8, 8, 3, 3), b=(8,)), "mean, std, sub, truediv"),
    "tied": (lambda: Computing(tied, w=(8, 8)), "t, of a weight that is used elsewhere"),
    "low rank": (
        lambda: Computing(lambda m, x: functional.conv2d(x, (m.u @ m.v)[..., None, None]), u=(8, 2), v=(2, 8)),
        "getitem, matmul",
    ),
    "cosine": (
        lambda: Computing(
            lambda m, x: functional.linear(x.permute(0, 2, 3, 1), functional.normalize(m.w)).permute(0, 3, 1, 2),
            w=(8, 8),
        ),
        "normalize",
    ),
    "a product": (
        lambda: Computing(lambda m, x: (x.permute(0, 2, 3, 1) @ m.w).permute(0, 3, 1, 2), w=(8, 8)),
        "",
    ),
}


def quantized(model: nn.Module, x: Tensor) -> QuantizedModel:
    return quantize_model(model, x, QuantizationConfig(), ("onnxruntime", "tensorrt"), lambda _: nn.Identity())


@pytest.mark.parametrize("case", COMPUTED)
def test_it_is_folded_with_quantizers_and_told(case: str) -> None:
    torch.manual_seed(0)
    build, by = COMPUTED[case]
    model, x = Net(build()), torch.randn(4, 3, 8, 8)
    model(x)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = quantized(model, x)
    torch.testing.assert_close(graph(x), model(x))
    layers = 2 if case == "tied" else 1
    weights = [spec for spec in graph.specs if spec.kind == "weight"]
    assert [spec.operation for spec in weights].count("middle") == layers and len(weights) == 2 + layers
    assert all(spec.channels and spec.input_edge for spec in weights)
    # The user's own network is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(graph.notes) == (1 if by else 0)
    for note in graph.notes:
        assert note.startswith("middle (") and f"its weight is computed ({by}" in note
        assert note.endswith("training continues with the computed weight as a plain parameter")


def test_the_plain_weight_is_trained_and_kept() -> None:
    torch.manual_seed(0)
    model, x = Net(COMPUTED["standardized"][0]()).eval(), torch.randn(4, 3, 8, 8)
    graph = quantized(model, x).train()
    graph(x).square().sum().backward()
    weight = graph.get_parameter("middle.folded_0")
    assert weight.grad is not None and bool(weight.grad.any())
    again = quantized(model, x)
    with torch.no_grad():
        weight.mul_(2)
    again.load_state_dict(graph.state_dict())
    assert torch.equal(again.get_parameter("middle.folded_0"), weight)


def test_a_weight_that_depends_on_the_image_is_refused() -> None:
    def dynamic(m: Any, x: Tensor) -> Tensor:
        return functional.conv2d(x, m.w * x.mean())

    where = r"middle \(Computing\) at .*test_computed_weights\.py:\d+"
    with pytest.raises(UsageError, match=rf"{where} convolves with a weight that depends on the image"):
        quantized(Net(Computing(dynamic, w=(8, 8, 1, 1))).eval(), torch.randn(2, 3, 8, 8))


def test_the_line_reaches_who_calls_it_from_python() -> None:
    network = Net(parametrizations.weight_norm(nn.Conv2d(8, 8, 1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = quantize(network, torch.randn(4, 3, 8, 8))
    (line,) = (str(one.message) for one in caught if "is computed" in str(one.message))
    assert line.startswith("net: middle (Conv2d): its weight is computed (WeightNorm)")
    assert list(model.notes) == [line.removeprefix("net: ")]
    assert isinstance(network.middle.parametrizations, nn.ModuleDict), "the caller's own network stays as it is"
