from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.core.targets import INT16_MAX
from crqat.train.config import Override, QuantizationConfig, Target
from crqat.train.graph.operations import through_movement
from crqat.train.models import build as models
from crqat.train.placement import insert as layout
from crqat.train.placement import nncf_layout, target_rules
from crqat.train.placement.insert import insert_quantizers, quantizer_node, weight_node
from crqat.train.placement.quantizer_spec import QuantizerSpec, codes_at
from crqat.train.quantizers import LSQQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("onnxruntime", "tensorrt")
W8A8 = QuantizationConfig()
Layout = tuple[fx.GraphModule, list[QuantizerSpec]]


@pytest.fixture(autouse=True, scope="module")
def _placement_once() -> Any:
    """NNCF's answer does not depend on widths and targets: asked once for each network, it saves half a minute."""
    answers: dict[tuple[str, ...], Any] = {}
    ask = nncf_layout.ask_layout

    def remember(model: nn.Module, example: Tensor, in_float: Sequence[str] = ()) -> Any:
        key = (str(model), str(tuple(example.shape)), *in_float)
        if key not in answers:
            answers[key] = ask(model, example, in_float)
        return answers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "ask_layout", remember)
        yield


def identity(_: QuantizerSpec) -> nn.Module:
    return nn.Identity()


def quantized(
    model: nn.Module,
    targets: Sequence[str] = BOTH,
    config: QuantizationConfig = W8A8,
    shape: Sequence[int] = (2, 3, 32, 32),
    make: Callable[[QuantizerSpec], nn.Module] = identity,
) -> Layout:
    torch.manual_seed(0)
    return insert_quantizers(model, torch.randn(*shape), config, targets, make)


def specs_of(*args: Any, **kwargs: Any) -> dict[str, QuantizerSpec]:
    return {spec.edge: spec for spec in quantized(*args, **kwargs)[1]}


def hooks(specs: Sequence[QuantizerSpec]) -> list[str]:
    return [hook for spec in specs for hook in spec.hooks]


@pytest.mark.parametrize(
    ("name", "onnxruntime", "tensorrt"),
    [("torchvision/resnet18", 51, 43), ("torchvision/mobilenet_v2", 117, 107), ("cifar/resnet20", 50, 41)],
)
def test_number_of_hooks_and_unchanged_outputs(name: str, onnxruntime: int, tensorrt: int) -> None:
    torch.manual_seed(0)
    model = models.build(name, 10, 3).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    layouts = {}
    for targets, expected in ((("onnxruntime",), onnxruntime), (BOTH, onnxruntime), (("tensorrt",), tensorrt)):
        graph_module, specs = layouts[targets] = quantized(model, targets)
        assert len(hooks(specs)) == len(set(hooks(specs))) == expected
        called = [str(node.target) for node in graph_module.graph.nodes if "quantizers." in str(node.target)]
        assert sorted(called) == sorted(f"quantizers.{spec.module_name}" for spec in specs)
        assert graph_module.state_dict().keys() == before.keys()  # identities have no state: all keys are the model's
        with torch.no_grad():
            assert torch.equal(graph_module(x), model(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    more = set(hooks(layouts["onnxruntime",][1])) - set(hooks(layouts["tensorrt",][1]))
    assert more and all(re.search(r"batch_norm/0__0\.0$", hook) for hook in more)  # the convolutions' side of each Add
    assert not any("downsample" in hook for hook in more)


def test_the_models_own_state_dict_loads_into_the_quantized_one() -> None:
    torch.manual_seed(0)
    model = models.build("cifar/resnet20", 10, 3).eval()
    graph_module, specs = quantized(model, make=LSQQuantizer)
    missing, unexpected = graph_module.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert sorted(missing) == sorted(f"quantizers.{spec.module_name}.scale" for spec in specs)


class Mixed(nn.Module):
    """Signed and unsigned tensors, a residual Add, depthwise and grouped convolutions, a Concat, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)  # called more than once
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.multiplied = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.depthwise(x)
        y = self.depthwise_reader(y)
        x += y
        x = self.relu(x)
        x = self.pool(torch.cat([x, functional.relu(y)], 1))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]

    def depthwise_reader(self, y: Tensor) -> Tensor:
        return self.grouped(self.multiplied(y))  # type: ignore[no-any-return]


def test_placement_is_that_of_nncf_with_data() -> None:
    """NNCF's own calibration of the same network puts the same hooks in the same groups, with the same channels."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        OverflowFix,
        QuantizationParameters,
    )

    torch.manual_seed(0)
    model = Mixed().eval()
    calibrated = nncf.quantize(
        model,
        nncf.Dataset([torch.randn(2, 3, 32, 32)]),
        subset_size=1,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        target_device=nncf.TargetDevice.ANY,
        advanced_parameters=AdvancedQuantizationParameters(
            disable_bias_correction=True,
            overflow_fix=OverflowFix.DISABLE,
            activations_quantization_params=QuantizationParameters(per_channel=False),
        ),
    )
    entries = nncf.torch.get_config(calibrated)["compression_state"]
    theirs = {
        tuple(sorted(entry["hook_names_in_model"])): max(entry["module_config"]["scale_shape"]) for entry in entries
    }
    ours = {spec.hooks: spec.channels or 1 for spec in quantized(model, ("onnxruntime",))[1]}
    assert theirs == ours
    assert len(ours) > 10


@pytest.mark.parametrize("targets", [("onnxruntime",), ("onnxruntime", "tensorrt")])
def test_codes_follow_from_sign_width_and_kind(targets: tuple[Target, ...]) -> None:
    specs = specs_of(Mixed().eval(), targets)
    codes = {edge: (spec.kind, spec.bits, spec.qmin, spec.qmax) for edge, spec in specs.items()}
    alone = targets == ("onnxruntime",)
    # 16-bit sums of two products: 255 * (64 + 64) and 127 * (127 + 127) fit, 255 * (127 + 127) does not.
    signed, unsigned = ("activation", 8, -128, 127), ("activation", 8, 0, 255 if alone else 127)
    narrow, seven = ("weight", 8, -127, 127), ("weight", 7, -64, 63)
    assert codes == {
        "post_hooks.x__0.0": signed,
        "post_hooks.relu/relu_/0__0.0": unsigned,
        "post_hooks.depthwise/conv2d/0__0.0": signed,
        "post_hooks.multiplied/conv2d/0__0.0": signed,
        "pre_hooks./add_/0__1.0": signed,  # of the two readers of `grouped` the Add alone
        "post_hooks.relu/relu_/1__0.0": unsigned,
        "post_hooks./relu/0__0.0": unsigned,
        "post_hooks./adaptive_avg_pool2d/0__0.0": unsigned,
        "pre_hooks.conv1/conv2d/0__1.0": seven,  # behind the image
        "pre_hooks.depthwise/conv2d/0__1.0": narrow,  # behind ReLU
        "pre_hooks.multiplied/conv2d/0__1.0": seven,  # two filters per channel: no exception
        "pre_hooks.grouped/conv2d/0__1.0": seven,
        "pre_hooks.fc/linear/0__1.0": seven if alone else narrow,
    }
    assert all(("16-bit sums" in spec.reason) == (spec.bits == 7) for spec in specs.values())
    for spec in specs.values():
        outputs = {"conv1": 8, "depthwise": 8, "multiplied": 16, "grouped": 8, "fc": 4}
        assert spec.channels == (outputs[spec.operation] if spec.kind == "weight" else None)
    assert specs["pre_hooks.conv1/conv2d/0__1.0"].bn == "bn1"
    assert specs["pre_hooks.grouped/conv2d/0__1.0"].bn is None


def test_tensorrt_alone_needs_no_narrower_weights() -> None:
    for spec in specs_of(Mixed().eval(), ("tensorrt",)).values():
        assert spec.bits == 8 and not spec.reason
        assert spec.kind == "activation" or (spec.qmin, spec.qmax) == (-127, 127)


def test_first_and_last_layer_have_widths_of_their_own() -> None:
    config = QuantizationConfig(weights=3, activations=4, first_layer=6, last_layer=5)
    specs = specs_of(Mixed().eval(), ("tensorrt",), config)
    first = {"post_hooks.x__0.0": (-32, 31), "pre_hooks.conv1/conv2d/0__1.0": (-32, 31)}
    last = {"post_hooks./adaptive_avg_pool2d/0__0.0": (0, 31), "pre_hooks.fc/linear/0__1.0": (-16, 15)}
    for edge, spec in specs.items():
        if spec.kind == "weight":
            usual = (-4, 3)
        else:
            usual = (-8, 7) if edge.startswith(("pre", "post_hooks.dep", "post_hooks.mul")) else (0, 15)
        assert (spec.qmin, spec.qmax) == {**first, **last}.get(edge, usual), edge


@pytest.mark.parametrize("activations", range(2, 9))
def test_no_pair_of_widths_overflows_16_bits(activations: int) -> None:
    """An x86 kernel adds two products of unsigned activation codes and weight codes in 16 bits."""
    model = Mixed().eval()
    for weights in range(2, 9):
        config = QuantizationConfig(
            weights=weights, activations=activations, first_layer=weights, last_layer=activations
        )
        specs = specs_of(model, BOTH, config)
        for spec in (spec for spec in specs.values() if spec.kind == "weight" and spec.operation != "depthwise"):
            assert spec.input_edge is not None
            fed = specs[spec.input_edge]
            sums = {bits: 2 * (fed.qmax - fed.qmin) * (127 if bits == 8 else 2 ** (bits - 1)) for bits in range(2, 9)}
            assert sums[spec.bits] <= INT16_MAX
            asked = {"conv1": weights, "fc": activations}.get(spec.operation, weights)
            assert spec.bits == max(bits for bits in sums if bits <= asked and sums[bits] <= INT16_MAX)
            assert max(-spec.qmin, spec.qmax) == (127 if spec.bits == 8 else 2 ** (spec.bits - 1))


def test_a_depthwise_convolution_behind_a_signed_tensor_keeps_8_bits() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 28 * 28, 2),
    ).eval()
    bits = {spec.operation: spec.bits for spec in specs_of(model).values() if spec.kind == "weight"}
    assert bits == {"0": 7, "1": 8, "2": 7, "4": 7}


def test_a_sequential_is_a_network_too() -> None:
    torch.manual_seed(0)
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(3136, 2)).eval()
    graph_module, specs = quantized(model)
    assert hooks(specs) == [
        "post_hooks.1/relu/0__0.0",
        "post_hooks.1/relu/1__0.0",
        "post_hooks.input__0.0",
        "pre_hooks.0/conv2d/0__1.0",
        "pre_hooks.2/conv2d/0__1.0",
        "pre_hooks.5/linear/0__1.0",
    ]
    assert graph_module.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(graph_module(x), model(x))


class Unusual(nn.Module):
    """What users write: ModuleList items, one nn.ReLU for all, a functional one, `+=`, a convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1, bias=False) for i in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norms[0](self.convs[0](x)))
        y = functional.relu(self.norms[1](self.shared(x)))
        y = self.norms[2](self.shared(y))
        x += y
        x = functional.relu(x)
        x = self.relu(self.norms[3](self.convs[1](x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_users_network() -> None:
    torch.manual_seed(0)
    model = Unusual().eval()
    for norm in model.norms:
        nn.init.normal_(norm.get_parameter("weight"))
    graph_module, specs = quantized(model, make=LSQQuantizer)
    by_edge = {spec.edge: spec for spec in specs}
    # NNCF names ModuleList items like operations of the root, and counts them.
    weights = {spec.edge: spec.bn for spec in specs if spec.kind == "weight"}
    assert weights == {
        "pre_hooks./conv2d/0__1.0": "norms.0",
        "pre_hooks./conv2d/1__1.0": "norms.3",
        "pre_hooks.shared/conv2d/0__1.0": "norms.1",
        "pre_hooks.shared/conv2d/1__1.0": "norms.2",
        "pre_hooks.fc/linear/0__1.0": None,
    }
    shared = [by_edge[f"pre_hooks.shared/conv2d/{call}__1.0"] for call in (0, 1)]
    # One weight, but each call has a quantizer of its own, as in NNCF.
    assert weight_node(graph_module, shared[0]) is weight_node(graph_module, shared[1])
    assert quantizer_node(graph_module, shared[0]) is not quantizer_node(graph_module, shared[1])
    for spec in specs:
        if spec.kind == "weight":
            owner = "shared" if spec in shared else {"norms.0": "convs.0", "norms.3": "convs.1"}.get(str(spec.bn), "fc")
            assert weight_node(graph_module, spec).target == f"{owner}.weight"
    assert [spec.input_edge for spec in shared] == ["post_hooks.relu/relu_/0__0.0", "post_hooks./relu/0__0.0"]
    x = torch.randn(2, 3, 32, 32)
    plain, _ = quantized(model)
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))


def test_each_quantizer_sits_on_the_edge_of_its_name() -> None:
    """What quantizers see in the FX graph is what NNCF's operations of these names compute in the user's network."""
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 32, 32)
    graph_module, specs = quantized(model)
    seen: dict[str, Tensor] = {}
    for spec in specs:
        graph_module.get_submodule(f"quantizers.{spec.module_name}").register_forward_hook(
            lambda _, inputs, __, edge=spec.edge: seen.__setitem__(edge, inputs[0].clone())
        )
    with torch.no_grad():
        graph_module(x)
        relu1 = functional.relu(model.bn1(model.conv1(x)))
        depthwise = model.depthwise(relu1)
        grouped = model.grouped(model.multiplied(depthwise))
    for edge, value in {
        "post_hooks.x__0.0": x,
        "pre_hooks.conv1/conv2d/0__1.0": model.conv1.weight,
        "post_hooks.relu/relu_/0__0.0": relu1,
        "post_hooks.depthwise/conv2d/0__0.0": depthwise,
        "pre_hooks./add_/0__1.0": grouped,
        "post_hooks./relu/0__0.0": functional.relu(grouped),
        "pre_hooks.fc/linear/0__1.0": model.fc.weight,
    }.items():
        assert torch.equal(seen[edge], value), edge


class PartlyShared(nn.Module):
    """One tensor with two convolutions and a reader that is not quantized: each convolution has its own quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.softmax(x, 1)
        x = self.left(x).relu() + self.right(x).relu() + gate
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_weight_names_the_quantizer_that_its_own_convolution_reads() -> None:
    graph_module, specs = quantized(PartlyShared().eval(), ("onnxruntime",))
    by_edge = {spec.edge: spec for spec in specs}
    for spec in specs:
        if spec.kind == "weight":
            convolution = next(iter(quantizer_node(graph_module, spec).users))
            reads = convolution.all_input_nodes[0].target
            assert spec.input_edge is not None
            assert reads == f"quantizers.{by_edge[spec.input_edge].module_name}", spec.edge


def test_a_concat_of_two_convolutions_shares_one_quantizer() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))  # type: ignore[no-any-return]

    graph_module, specs = quantized(Fork().eval())
    (shared,) = [spec for spec in specs if len(spec.hooks) > 1]
    assert shared.edge == shared.hooks[0] == "post_hooks.a/conv2d/0__0.0"
    assert shared.hooks[1] == "post_hooks.b/conv2d/0__0.0"
    target = f"quantizers.{shared.module_name}"
    assert [node.all_input_nodes[0].name for node in graph_module.graph.nodes if node.target == target] == [
        "conv2d",
        "conv2d_1",
    ]


class Refused(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.layer = layer or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.layer(x).mean((2, 3))  # type: ignore[no-any-return]


class PerImage(nn.Module):
    """Dynamic convolution, arXiv 1912.03458: weights mixed anew for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.attention = nn.Parameter(torch.randn(2, 4 * 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = torch.softmax(self.attention(x.mean((2, 3))), 1) @ self.weights
        mixed = functional.conv2d(x.reshape(1, n * c, h, w), weight.reshape(n * c, c, 1, 1), groups=n)
        return mixed.reshape(n, c, h, w)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


class Branching(Refused):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 2
        return self.conv(x)  # type: ignore[no-any-return]


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{inspect.getsourcefile(function)}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def test_a_network_with_a_branch_on_data_is_named_by_file_and_line() -> None:
    with pytest.raises(UsageError) as caught:
        quantized(Branching().eval())
    where = line_of(Branching.forward, "if x.mean")
    assert str(caught.value).startswith(f"model.name: torch.fx cannot trace Branching at {where}: ")
    assert "\n" not in str(caught.value)


def test_a_forward_that_fails_on_the_shape_is_named_by_file_and_line() -> None:
    with pytest.raises(UsageError) as caught:
        quantized(Refused(nn.Linear(7, 2)).eval())
    where = line_of(Refused.forward, "self.layer(x)")
    assert str(caught.value) == (
        f"model.name: Refused cannot run on an input of shape (2, 3, 32, 32) at {where}: "
        "mat1 and mat2 shapes cannot be multiplied (256x32 and 7x2)"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Refused(nn.BatchNorm2d(4, track_running_stats=False)),
            rf"layer \(BatchNorm2d\) at {re.escape(__file__)}:\d+ has no running statistics; use track_running_stats",
        ),
        (
            Refused(Recurrent()),
            r"no quantizer can be placed around lstm in layer\.lstm \(LSTM\) at .*:\d+; write",
        ),
        (
            Refused(PerImage()),
            r"layer \(PerImage\) at .*:\d+ convolves with a weight that depends on the image; convolve with each",
        ),
        (nn.ModuleDict({"quantizers": nn.ReLU()}), r"ModuleDict\.quantizers is reserved for the quantizers"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_any_training(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.name: {message}"):
        quantized(model.eval())


@pytest.mark.parametrize(("groups", "channels", "axis"), [(1, 6, 1), (2, None, 0)])
def test_a_transposed_convolution_has_its_channels_on_axis_1_and_groups_share_a_scale(
    groups: int, channels: int | None, axis: int
) -> None:
    specs = specs_of(Refused(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=groups))).eval())
    spec = specs["pre_hooks.layer/1/conv_transpose2d/0__1.0"]
    assert (spec.channels, spec.axis, spec.ndim, spec.bits) == (channels, axis, 4, 8)
    assert spec.input_edge == "post_hooks.layer/0/relu/0__0.0"


def test_names_that_differ_in_punctuation_alone_are_refused() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Conv2d(3, 4, 1)
            self.a = nn.Sequential()
            self.a.add_module("b", nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a_b(x)).mean((2, 3))  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match=r"^model\.name: Twins has operations whose names differ only in punctuation"):
        quantized(Twins().eval())


class Hidden(Refused):
    """What a tracer that gives no real tensor does not see."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            x = x * 2
        return self.conv(x).mean((2, 3))  # type: ignore[no-any-return]


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "a recurrent layer": lambda: Refused(Recurrent()),
    "statistics of the batch": lambda: Refused(nn.BatchNorm2d(4, track_running_stats=False)),
    "a branch on data": Branching,
    "operations that tracing hides": Hidden,
    "a layer that does not fit": lambda: Refused(nn.Linear(7, 2)),
    "a bad pool": lambda: Refused(nn.AdaptiveAvgPool2d(5)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_speak_of_modules_and_lines_and_never_of_hooks(case: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantized(REFUSED[case]().eval())
    message = str(caught.value)
    assert message.startswith("model.name: ") and "\n" not in message
    assert re.search(r" at \S+\.py:\d+", message)
    assert not re.search(r"hook|NNCF|__\d|/\d", message)


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.Sequential(nn.GroupNorm(1, 4), nn.PReLU(4))]
)
def test_weights_of_normalizations_and_activations_stay_in_float(layer: nn.Module) -> None:
    specs = specs_of(Refused(nn.Sequential(layer, nn.Conv2d(4, 4, 1))).eval())
    weights = [spec.operation for spec in specs.values() if spec.kind == "weight"]
    assert weights == ["conv", "layer.1"]


def test_an_embedding_of_positions_stays_in_float() -> None:
    class Positions(Refused):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.fc = nn.Embedding(1024, 4), nn.Linear(4, 2)
            self.register_buffer("ids", torch.arange(1024)[None])

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2) + self.positions(self.ids)
            return self.fc(tokens).mean(1)  # type: ignore[no-any-return]

    specs = specs_of(Positions().eval())
    assert [spec.operation for spec in specs.values() if spec.kind == "weight"] == ["conv", "fc"]
    assert not any("positions" in hook for hook in hooks(list(specs.values())))


def test_operations_are_named_for_people() -> None:
    specs = specs_of(models.build("cifar/resnet20", 10, 3).eval())
    assert specs["pre_hooks.layer1/0/conv1/conv2d/0__1.0"].operation == "layer1.0.conv1"
    assert specs["post_hooks.x__0.0"].operation == "x"
    assert all(spec.module_name.isidentifier() for spec in specs.values())


def test_overrides_come_before_all_other_widths_but_not_before_the_targets_limits() -> None:
    overrides = {
        "conv1": Override(weights=5, activations=3),
        "depthwise": Override(weights=2, activations=6),
        "multiplied": Override(weights=8, activations=8),
        "fc": Override(activations=7),
    }
    config = QuantizationConfig(weights=4, activations=4, first_layer=6, last_layer=6, overrides=overrides)
    specs = specs_of(Mixed().eval(), config=config)
    found = {spec.operation: (spec.bits, spec.qmin, spec.qmax) for spec in specs.values() if spec.kind == "weight"}
    assert found == {
        "conv1": (5, -16, 15),
        "depthwise": (2, -2, 1),
        "multiplied": (7, -64, 63),  # behind a signed tensor, for ONNX Runtime
        "grouped": (4, -8, 7),
        "fc": (6, -32, 31),
    }
    reads = {spec.operation: specs[spec.input_edge or ""] for spec in specs.values() if spec.kind == "weight"}
    codes = {name: (spec.bits, spec.qmin, spec.qmax) for name, spec in reads.items()}
    assert codes == {
        "conv1": (3, -4, 3),
        "depthwise": (6, 0, 63),
        "multiplied": (8, -128, 127),
        "grouped": (4, -8, 7),
        "fc": (7, 0, 127),
    }
    assert "saturate" in next(spec.reason for spec in specs.values() if spec.operation == "multiplied" and spec.reason)
    with pytest.raises(UsageError, match=r"overrides\.dephtwise: .* the nearest are depthwise"):
        specs_of(Mixed().eval(), config=QuantizationConfig(overrides={"dephtwise": Override(4)}))


def test_codes_at_another_width() -> None:
    spec = QuantizerSpec("pre_hooks.a__1.0", (), "weight", 4, -8, 7, 3, 4)
    assert [codes_at(spec, bits) for bits in (2, 4, 7, 8)] == [(-2, 1), (-8, 7), (-64, 63), (-127, 127)]
    signed = QuantizerSpec("post_hooks.a__0.0", (), "activation", 8, -128, 127, None, 4)
    assert [codes_at(signed, bits) for bits in (3, 8)] == [(-4, 3), (-128, 127)]
    # At its own width a quantizer has its own codes, which the targets may have limited.
    unsigned = QuantizerSpec("post_hooks.a__0.0", (), "activation", 8, 0, 127, None, 4)
    assert [codes_at(unsigned, bits) for bits in (3, 8)] == [(0, 7), (0, 127)]


@pytest.mark.parametrize("targets", [BOTH, ("tensorrt",)])
@pytest.mark.parametrize("pattern", ["conv1", "linear", "layer2.0.conv1", "layer1.1.*"])
def test_float_layers_carry_no_quantizers(pattern: str, targets: Sequence[str]) -> None:
    """Not on the weight and not on what they read, even where others read the same in codes."""
    network = models.build("cifar/resnet20", 10, 3).eval()
    usual = {spec.edge: spec for spec in quantized(network, targets)[1] if spec.kind == "weight"}
    config = QuantizationConfig(float_layers={"tensorrt": (pattern,)})
    graph_module, specs = quantized(network, targets, config)
    named = {edge for edge, spec in usual.items() if fnmatchcase(spec.operation, pattern)}
    assert named
    kept = {spec.edge: spec for spec in specs if spec.kind == "weight"}
    assert kept.keys() == usual.keys() - named
    found = [node for node in graph_module.graph.nodes if target_rules.FLOAT_LAYER in node.meta]
    assert len(found) == len(named)
    for node in found:
        for source in node.all_input_nodes:
            through = [moved.target for moved in through_movement(graph_module, source)]
            assert not any("quantizers." in str(target) for target in through)


def test_float_layers_of_another_target_do_not_count() -> None:
    network = models.build("cifar/resnet20", 10, 3).eval()
    config = QuantizationConfig(float_layers={"tensorrt": ("linear",)})
    assert quantized(network, ("onnxruntime",), config)[1] == quantized(network, ("onnxruntime",))[1]


def test_float_layers_that_match_nothing_are_refused_with_the_nearest() -> None:
    network = models.build("cifar/resnet20", 10, 3).eval()
    with pytest.raises(UsageError) as caught:
        quantized(network, BOTH, QuantizationConfig(float_layers={"all": ("layer1.*", "liner")}))
    assert str(caught.value).startswith("quantization.float_layers: liner matches no layer that is quantized")
    assert "the nearest are linear" in str(caught.value)


class Selects(nn.Module):
    """Layers whose results are split, moved and read twice, and one whose input is a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.rolled, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.end, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.glu(self.gated(x), 1)
        x = self.twice(torch.roll(functional.relu(self.rolled(x)), 1, 2))
        x = self.end(torch.maximum(x, x.exp()))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_layer_whose_result_is_read_in_float_has_a_quantizer_behind_it_and_one_in_front() -> None:
    graph_module, specs = quantized(Selects(), ("onnxruntime",))
    sources = {quantizer_node(graph_module, spec).all_input_nodes[0].name: spec for spec in specs}
    assert {"conv2d", "relu", "conv2d_2", "maximum"} <= set(sources)
    narrow = QuantizationConfig(weights=4, activations=4)
    bits = {spec.edge: spec.bits for spec in quantized(Selects(), ("onnxruntime",), narrow)[1]}
    assert bits[sources["conv2d"].edge] == 8  # what reads it computes in float
    assert bits[sources["maximum"].edge] == 4
    alone = {quantizer_node(*pair).all_input_nodes[0].name for pair in _pairs(quantized(Selects(), ("tensorrt",)))}
    assert "maximum" in alone and "conv2d" not in alone


def _pairs(layout_: Layout) -> list[tuple[fx.GraphModule, QuantizerSpec]]:
    return [(layout_[0], spec) for spec in layout_[1]]


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation by two convolutions and by two linear layers (arXiv 1709.01507)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.end, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = x * self.expand(functional.relu(self.reduce(functional.adaptive_avg_pool2d(x, 1)))).sigmoid()
        weights = self.up(functional.relu(self.down(x.mean((2, 3))))).sigmoid()
        return self.fc(self.end(x * weights[:, :, None, None]).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", [("onnxruntime",), ("tensorrt",), BOTH])
def test_the_layers_of_squeeze_and_excitation_are_quantized_unless_the_recipe_keeps_them(
    targets: Sequence[Target],
) -> None:
    layers = {"first", "end", "fc", "reduce", "expand", "down", "up"}
    _, specs = quantized(SqueezeExcite(), targets)
    assert {spec.operation for spec in specs if spec.kind == "weight"} == layers
    kept = QuantizationConfig(float_layers={"all": ("reduce", "expand", "down", "up")})
    _, specs = quantized(SqueezeExcite(), targets, kept)
    assert {spec.operation for spec in specs if spec.kind == "weight"} == {"first", "end", "fc"}
