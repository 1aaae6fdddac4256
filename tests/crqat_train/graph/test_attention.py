"""Self-attention, written out: torch's own results, torch's own parameters, NNCF's own names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crqat.core.errors import UsageError
from crqat.train.config import QuantizationConfig
from crqat.train.graph.attention import self_attention
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_torchs(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias).train()
    x = torch.randn(4, 5, 12, requires_grad=True)
    outputs = module(x, x, x, need_weights=False)[0], self_attention(module, x, x, x, need_weights=False)[0]
    parameters = [x, module.in_proj_weight, module.out_proj.weight]
    results = [(y, *torch.autograd.grad(y.square().sum(), parameters)) for y in outputs]
    assert all(torch.equal(expected, got) for expected, got in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"need_weights": True}, {}),
        ({"attn_mask": torch.zeros(5, 5)}, {}),
        ({"key_padding_mask": torch.zeros(4, 5)}, {}),
        ({"is_causal": True}, {}),
        ({}, {"add_bias_kv": True}),
        ({}, {"add_zero_attn": True}),
        ({}, {"kdim": 6, "vdim": 6}),
    ],
)
def test_what_is_not_written_out_is_refused(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    module, x = nn.MultiheadAttention(12, 3, batch_first=True, **options), torch.randn(4, 5, 12)
    with pytest.raises(UsageError):
        self_attention(module, x, x, x, **{"need_weights": False, **arguments})


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
