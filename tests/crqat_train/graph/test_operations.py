from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.graph.operations import (
    batch_norm_after,
    convolution_groups,
    is_add,
    is_matmul,
    is_nonnegative,
    moves_values,
    parameter,
    through_movement,
    trace,
)
from crqat.train.models import build as models


class Of(nn.Module):
    """A network with a forward of its own and named children."""

    def __init__(self, function: Callable[..., Tensor], **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def last(function: Callable[..., Any], **children: nn.Module | nn.Parameter) -> tuple[fx.GraphModule, fx.Node]:
    """The traced network and the node that makes its output."""
    graph_module = trace(Of(function, **children).eval())
    (output,) = graph_module.graph.find_nodes(op="output")
    return graph_module, output.all_input_nodes[0]


def nonnegative(function: Callable[..., Any], **children: nn.Module | nn.Parameter) -> bool:
    return is_nonnegative(*last(function, **children))


def moves(function: Callable[..., Any], **children: nn.Module | nn.Parameter) -> bool:
    return moves_values(*last(function, **children))


NONNEGATIVE: dict[str, Callable[..., Any]] = {
    "F.relu": lambda m, x: functional.relu(x),
    "F.relu in place": lambda m, x: functional.relu(x, inplace=True),
    "torch.relu": lambda m, x: torch.relu(x),
    "method relu": lambda m, x: x.relu(),
    "method relu_": lambda m, x: x.relu_(),
    "F.relu6": lambda m, x: functional.relu6(x),
    "sigmoid": lambda m, x: torch.sigmoid(x),
    "hardsigmoid": lambda m, x: functional.hardsigmoid(x),
    "pooled": lambda m, x: functional.max_pool2d(functional.relu(x), 2),
    "average": lambda m, x: functional.adaptive_avg_pool2d(functional.relu(x), 1),
    "mean over negative dims": lambda m, x: x.relu().mean((-1, -2)),
    "torch.mean": lambda m, x: torch.mean(x.relu(), -1),
    "concatenated": lambda m, x: torch.cat([functional.relu(x), torch.sigmoid(x)], -1),
    "sum": lambda m, x: functional.relu(x) + torch.relu(x),
    "sum in place": lambda m, x: functional.relu(x).add_(torch.relu(x)),
    "more": lambda m, x: functional.relu(x) + 0.5,
    "weighted sum": lambda m, x: torch.add(functional.relu(x), torch.relu(x), alpha=2),
    "product": lambda m, x: torch.mul(functional.relu(x), torch.sigmoid(x)),
    "sliced and padded": lambda m, x: functional.pad(functional.relu(x)[:, :, ::2], (0, 0, 0, 0, 2, 2)),
    "flattened": lambda m, x: torch.flatten(functional.relu(x), 1),
    "view by its own size": lambda m, x: (lambda y: y.view(y.size(0), -1))(functional.relu(x)),
    "reshaped": lambda m, x: functional.relu(x).reshape(x.shape[0], -1),
}
POSSIBLY_NEGATIVE: dict[str, Callable[..., Any]] = {
    "input": lambda m, x: x,
    "convolution": lambda m, x: functional.conv2d(x, torch.ones(1, 1, 1, 1)),
    "leaky": lambda m, x: functional.leaky_relu(x),
    "sum with a signed": lambda m, x: functional.relu(x) + x,
    "less": lambda m, x: torch.add(functional.relu(x), -0.5),
    "plus a negative number": lambda m, x: functional.relu(x) + (-0.5),
    "difference": lambda m, x: functional.relu(x) - torch.relu(x),
    "difference by alpha": lambda m, x: torch.add(functional.relu(x), torch.relu(x), alpha=-1),
    "negated": lambda m, x: torch.mul(functional.relu(x), -1.0),
    "concatenated with a signed": lambda m, x: torch.cat([functional.relu(x), x], 1),
    "padded with a negative": lambda m, x: functional.pad(functional.relu(x), (1, 1), value=-1.0),
    "chunk of a signed": lambda m, x: torch.chunk(x, 2)[0],
    "pooled signed": lambda m, x: functional.adaptive_avg_pool2d(x, 1),
}


@pytest.mark.parametrize("case", NONNEGATIVE)
def test_what_cannot_be_negative(case: str) -> None:
    assert nonnegative(NONNEGATIVE[case])
    assert (trace(Of(NONNEGATIVE[case]))(torch.randn(2, 4, 4, 4)) >= 0).all()  # the claim itself


@pytest.mark.parametrize("case", POSSIBLY_NEGATIVE)
def test_what_may_be_negative(case: str) -> None:
    assert not nonnegative(POSSIBLY_NEGATIVE[case])


def test_a_parameter_may_be_negative() -> None:
    factor = nn.Parameter(torch.tensor([-1.0]))
    assert not nonnegative(lambda m, x: torch.mul(m.factor, functional.relu(x)), factor=factor)
    assert not nonnegative(lambda m, x: torch.add(functional.relu(x), m.factor), factor=factor)
    assert not nonnegative(lambda m, x: torch.cat([functional.relu(x), m.factor]), factor=factor)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), True),
        (nn.ReLU6(), True),
        (nn.Sigmoid(), True),
        (nn.Hardsigmoid(), True),
        (nn.Softmax(1), True),
        (nn.Hardswish(), False),
        (nn.LeakyReLU(), False),
        (nn.BatchNorm2d(4), False),
        (nn.AvgPool2d(2), False),
    ],
)
def test_activation_modules(module: nn.Module, expected: bool) -> None:
    assert nonnegative(lambda m, x: m.layer(x), layer=module) is expected


def test_modules_that_keep_the_sign() -> None:
    for layer in (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Identity()):
        assert nonnegative(lambda m, x: m.layer(functional.relu(x)), layer=layer)
        assert not nonnegative(lambda m, x: m.layer(x), layer=layer)


MOVEMENT: dict[str, Callable[..., Any]] = {
    "max_pool": lambda m, x: functional.max_pool2d(x, 2),
    "flatten": lambda m, x: torch.flatten(x, 1),
    "reflect": lambda m, x: functional.pad(x, (1, 1), mode="reflect"),
    "method flatten": lambda m, x: x.flatten(1),
    "view": lambda m, x: x.view(2, -1),
    "permute": lambda m, x: x.permute(0, 2, 3, 1),
    "slice": lambda m, x: x[:, :, ::2, ::2],
    "pad": lambda m, x: functional.pad(x, (1, 1)),
    "pad with 0": lambda m, x: functional.pad(x, (1, 1), "constant", 0.0),
    "pad with 0 by keyword": lambda m, x: functional.pad(x, (1, 1), mode="constant", value=0),
    "dropout": lambda m, x: functional.dropout(x, 0.5, training=False),
}
NO_MOVEMENT: dict[str, Callable[..., Any]] = {
    "pad with 1": lambda m, x: functional.pad(x, (1, 1), "constant", 1.0),
    "pad with 1 by keyword": lambda m, x: functional.pad(x, (1, 1), value=1.0),
    "relu": lambda m, x: functional.relu(x),
    "add": lambda m, x: x + 1,
    "average": lambda m, x: functional.avg_pool2d(x, 2),
    "cat": lambda m, x: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("case", MOVEMENT)
def test_what_moves_values(case: str) -> None:
    assert moves(MOVEMENT[case])


@pytest.mark.parametrize("case", NO_MOVEMENT)
def test_what_does_not_move_values(case: str) -> None:
    assert not moves(NO_MOVEMENT[case])


def test_a_layer_that_is_called_pad_is_judged_by_what_it_is() -> None:
    assert moves(lambda m, x: m.pad(x), pad=nn.ZeroPad2d(1))
    assert not moves(lambda m, x: m.pad(x), pad=nn.ConstantPad2d(1, 5.0))


def test_the_way_back_through_movement_ends_at_the_first_computation() -> None:
    graph_module, node = last(
        lambda m, x: m.flatten(functional.pad(functional.relu(x)[:, :, ::2], (1, 1))), flatten=nn.Flatten()
    )
    path = [str(n.target) if n.op == "call_module" else n.name for n in through_movement(graph_module, node)]
    assert path == ["flatten", "pad", "getitem", "relu"]
    graph_module, node = last(lambda m, x: functional.pad(functional.relu(x), (1, 1), value=1.0))
    assert list(through_movement(graph_module, node)) == [node]


def test_additions() -> None:
    for function in (
        lambda m, x: x + x.relu(),
        lambda m, x: torch.add(x, x.relu()),
        lambda m, x: x.add(x.relu()),
        lambda m, x: x.add_(x.relu()),
    ):
        assert is_add(last(function)[1])
    assert not is_add(last(lambda m, x: x - x.relu())[1])
    assert not is_add(last(lambda m, x: m.add(x), add=nn.ReLU())[1])


def test_convolutions_and_linear_layers_show_their_weights() -> None:
    layers: dict[str, nn.Module | nn.Parameter] = {
        "conv": nn.Conv2d(4, 4, 3, groups=2),
        "linear": nn.Linear(4, 4),
        "own": nn.Parameter(torch.ones(2, 2)),
    }
    graph_module, conv = last(lambda m, x: m.conv(x), **layers)
    assert is_matmul(conv) and convolution_groups(conv) == 2
    assert parameter(graph_module, conv.all_input_nodes[1]) is graph_module.get_parameter("conv.weight")
    graph_module, linear = last(lambda m, x: m.linear(x), **layers)
    assert is_matmul(linear)
    assert parameter(graph_module, linear.all_input_nodes[1]) is graph_module.get_parameter("linear.weight")
    graph_module, own = last(lambda m, x: functional.linear(x, m.own), **layers)
    assert is_matmul(own)
    assert parameter(graph_module, own.all_input_nodes[1]) is graph_module.get_parameter("own")
    assert not is_matmul(last(lambda m, x: m.linear(x).relu(), **layers)[1])
    _, grouped = last(lambda m, x: functional.conv2d(x, torch.ones(4, 1, 1, 1), groups=4))
    assert convolution_groups(grouped) == 4
    _, plain = last(lambda m, x: functional.conv2d(x, torch.ones(4, 4, 1, 1)))
    assert convolution_groups(plain) == 1


def test_a_computed_weight_is_no_parameter() -> None:
    graph_module, node = last(
        lambda m, x: functional.conv2d(x, m.weight / m.weight.std()), weight=nn.Parameter(torch.ones(1, 1, 1, 1))
    )
    with pytest.raises(UsageError, match=r"^model\.name: the weight .* is computed in the forward pass"):
        parameter(graph_module, node.all_input_nodes[1])


def batch_norm(function: Callable[..., Any], **children: nn.Module) -> str | None:
    graph_module = trace(Of(function, **children).eval())
    return batch_norm_after(graph_module, next(filter(is_matmul, graph_module.graph.nodes)))


def test_only_a_batch_norm_that_alone_reads_a_convolution_is_folded() -> None:
    conv, linear = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
    bn, bn1d = nn.BatchNorm2d(3), nn.BatchNorm1d(3)
    assert batch_norm(lambda m, x: m.norm(m.conv(x)), conv=conv, norm=bn) == "norm"
    assert batch_norm(lambda m, x: m.conv(x).relu(), conv=conv) is None
    assert batch_norm(lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), conv=conv, norm=bn) is None
    assert batch_norm(lambda m, x: m.norm(m.fc(x)), fc=linear, norm=bn1d) is None


def test_tracing_changes_neither_the_state_nor_one_bit_of_the_output() -> None:
    torch.manual_seed(0)
    for name in ("cifar/resnet20", "torchvision/mobilenet_v2"):
        model = models.build(name, 10, 3).eval()
        traced, x = trace(model), torch.randn(2, 3, 32, 32)
        assert traced.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(traced(x), model(x))


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{inspect.getsourcefile(function)}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def branches(m: Of, x: Tensor) -> Tensor:
    if x.sum() > 0:  # a Proxy has no truth
        return x.relu()
    return x


def counts(m: Of, x: Tensor) -> Tensor:
    for _ in range(x.shape[1]):  # a Proxy is no integer
        x = x + 1
    return x


def looks_up(m: Of, x: Tensor) -> Tensor:
    factor = {4: 2.0}[x.shape[1]]  # a Proxy is not among the keys
    return x * factor


def iterates(m: Of, x: Tensor) -> Tensor:
    return torch.stack([row + 1 for row in x])  # a Proxy has no length


@pytest.mark.parametrize(
    ("function", "text"), [(branches, "if x"), (counts, "for _"), (looks_up, "factor ="), (iterates, "torch.stack")]
)
def test_what_cannot_be_traced_is_named_by_file_and_line(function: Callable[..., Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        trace(Of(function))
    message = str(caught.value)
    assert re.match(rf"model\.name: torch\.fx cannot trace Of at {re.escape(line_of(function, text))}: \S", message)
    assert any(message.endswith(end) for end in ("leave asserts out", "tensor operations", "take x.unbind()"))
    assert "\n" not in message
    assert len(message) < 500


def test_batch_norm_stays_a_leaf_so_that_it_can_still_be_trained() -> None:
    class WithActivation(nn.BatchNorm2d):  # as timm derives it
        def forward(self, input: Tensor) -> Tensor:
            return functional.relu(super().forward(input))

    model = Of(lambda m, x: m.norm(x), norm=WithActivation(3)).eval()
    traced, x = trace(model), torch.randn(4, 3, 5, 5)
    before = traced(x)
    traced.train()
    assert not torch.equal(traced(x), before)
    assert traced.get_buffer("norm.num_batches_tracked").item() == 1
