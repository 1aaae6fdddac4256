"""Attention, written out: torch's own results, torch's own parameters, NNCF's own names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crqat.core.errors import UsageError
from crqat.train.config import QuantizationConfig
from crqat.train.graph.attention import attend
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_torchs(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias).train()
    x = torch.randn(4, 5, 12, requires_grad=True)
    outputs = module(x, x, x, need_weights=False)[0], attend(module, x, x, x, need_weights=False)[0]
    parameters = [x, module.in_proj_weight, module.out_proj.weight]
    results = [(y, *torch.autograd.grad(y.square().sum(), parameters)) for y in outputs]
    assert all(torch.equal(expected, got) for expected, got in zip(*results, strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 7}])
def test_queries_of_their_own_give_torchs_outputs_and_gradients(batch_first: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options)
    query = torch.randn(4, 5, 12) if batch_first else torch.randn(5, 4, 12)
    shape = (4, 7) if batch_first else (7, 4)
    key, value = torch.randn(*shape, module.kdim), torch.randn(*shape, module.vdim)
    outputs = (
        module(query, key, value, need_weights=False)[0],
        attend(module, query, key, value, need_weights=False)[0],
    )
    torch.testing.assert_close(*outputs)
    results = [torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in outputs]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use", [lambda w: w.mean(), lambda w: w[0], lambda w: w + 1, lambda w: 2 * w, list])
def test_weights_may_be_asked_for_but_not_used(use: Any) -> None:
    module, x = nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(4, 5, 12)
    expected = module(x, x, x)[0]
    got, weights = attend(module, x, x, x)
    torch.testing.assert_close(got, expected)
    with pytest.raises(UsageError, match=r"use the first output of nn\.MultiheadAttention alone"):
        use(weights)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"attn_mask": torch.zeros(5, 5)}, {}),
        ({"key_padding_mask": torch.zeros(4, 5)}, {}),
        ({"is_causal": True}, {}),
        ({}, {"add_bias_kv": True}),
        ({}, {"add_zero_attn": True}),
    ],
)
def test_what_is_not_written_out_is_refused(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    module, x = nn.MultiheadAttention(12, 3, batch_first=True, **options), torch.randn(4, 5, 12)
    with pytest.raises(UsageError):
        attend(module, x, x, x, **{"need_weights": False, **arguments})


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.fc((tokens + attended).mean(1))  # type: ignore[no-any-return]


def test_projections_queries_and_keys_are_quantized_and_values_are_not() -> None:
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 3, 8, 8)
    graph = quantize_model(model, x, QuantizationConfig(), ("onnxruntime", "tensorrt"), LSQQuantizer)
    specs = graph.specs
    inside = {spec.edge: spec.kind for spec in specs if "attention/" in spec.edge}
    assert inside == {
        "pre_hooks.attention/linear/0__1.0": "weight",
        "pre_hooks.attention/linear/1__1.0": "weight",
        "pre_hooks.attention/__getitem__/0__0.0": "activation",
        "pre_hooks.attention/__getitem__/1__0.0": "activation",
        "post_hooks.attention/scaled_dot_product_attention/0__0.0": "activation",
        "post_hooks.attention/linear/1__0.0": "activation",
    }
    # A LayerNorm's weight stays float, whatever NNCF would do with it.
    assert not any(spec.kind == "weight" and "layer_norm" in spec.edge for spec in specs)
    assert set(model.state_dict()) <= set(graph.state_dict())
    by_edge = {spec.edge: spec for spec in specs}
    assert by_edge["pre_hooks.attention/linear/0__1.0"].input_edge == "post_hooks.norm/layer_norm/0__0.0"


class Queries(nn.Module):
    """Learned queries read tokens, then tokens read what those found."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, 2)
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.gather = nn.MultiheadAttention(8, 2, batch_first=True)
        self.spread = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        queries = self.queries.expand(x.shape[0], -1, -1)
        found, _ = self.gather(queries, tokens, tokens)
        found, tokens = found.transpose(0, 1), tokens.transpose(0, 1)
        spread, _ = self.spread(tokens, found, found)
        return self.fc(spread.mean(0))  # type: ignore[no-any-return]


def test_cross_attention_is_quantized_but_for_what_reads_constants() -> None:
    torch.manual_seed(0)
    model, x = Queries().eval(), torch.randn(2, 3, 8, 8)
    graph = quantize_model(model, x, QuantizationConfig(), ("onnxruntime", "tensorrt"), lambda _: nn.Identity())
    torch.testing.assert_close(graph(x), model(x))
    weights = [spec.edge.removeprefix("pre_hooks.") for spec in graph.specs if spec.kind == "weight"]
    gather = [f"gather/linear/{i}__1.0" for i in (1, 2, 3)]  # the first one projects the learned queries
    spread = [f"spread/linear/{i}__1.0" for i in range(4)]
    assert sorted(weights) == sorted(["conv/conv2d/0__1.0", "fc/linear/0__1.0", *gather, *spread])
    assert not graph.notes  # parts of a weight that nothing else uses are what they were
