"""Linear layers on sequences and attention, as graphs that compute the same and that ONNX Runtime fuses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crqat.export.graph.macs import macs
from crqat.export.qdq.write import float_model
from crqat.export.verification.checks import verify
from crqat.export.verification.fusion import fusion
from crqat.train.untrained import awake
from tests.export.conftest import Quantized, edited_file, initializer, nodes, quantize, random_images, session


class Encoder(nn.Module):
    """One block of a vision transformer: class token, LayerNorm, attention, GELU, linear layers on [N, T, E]."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 24, bias=bias), nn.Linear(24, 16, bias=bias)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.fc(x[:, 0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def encoder(request: pytest.FixtureRequest) -> Quantized:
    torch.manual_seed(0)
    return quantize(awake(Encoder(request.param)), random_images(5, 3, 12, 12))


def test_the_float_graph_computes_what_torch_does_for_any_batch(encoder: Quantized) -> None:
    graph = encoder.graph
    run = session(float_model(graph, {}))
    for spec in encoder.specs:
        encoder.model.get_submodule(f"quantizers.{spec.module_name}").register_forward_hook(lambda _, x, __: x[0])
    for batch in (1, 3):
        with torch.no_grad():
            expected = encoder.model(torch.from_numpy(encoder.images[:batch])).numpy()
        np.testing.assert_allclose(run.run(None, {"input": encoder.images[:batch]})[0], expected, atol=2e-5)
    for spec in encoder.specs:
        encoder.model.get_submodule(f"quantizers.{spec.module_name}")._forward_hooks.clear()


def test_all_linear_layers_are_gemm_and_only_attention_multiplies_two_tensors(encoder: Quantized) -> None:
    graph = encoder.graph
    assert Counter(node.op_type for node in graph.nodes if node.op_type in ("Gemm", "MatMul")) == {
        "Gemm": 5,
        "MatMul": 2,
    }
    tokens, amounts = 10, macs(graph)
    by_size = sorted(amounts.values())
    assert tokens * 16 * 24 in by_size and tokens * tokens * 16 in by_size and 16 * 4 in by_size
    # The factor of the scores comes behind their product: nothing stands between a quantizer and the multiplication.
    product = next(node for node in graph.nodes if node.op_type == "MatMul")
    assert {graph.producers()[name].op_type for name in product.input} <= {"Transpose", "Reshape"}
    assert not any(node.op_type in ("ConstantOfShape", "Where") for node in graph.nodes)


def test_no_code_differs_and_what_stays_float_has_a_reason(encoder: Quantized) -> None:
    files = encoder.files()
    grids = encoder.grids
    result = verify(encoder.model, grids, files, encoder.images)
    assert {target: entry.status for target, entry in result.items()} == {
        "onnxruntime": "passed",
        "tensorrt": "passed",
    }
    assert result["onnxruntime"].differing_codes == 0 and result["onnxruntime"].codes > 5000
    fused = fusion(files["onnxruntime"].model)
    assert fused.operations["QGemm"] == 5 and fused.operations["MatMulIntegerToFloat"] == 1
    multiplying = [entry for entry in fused.in_float if entry.operation in ("Conv", "Gemm", "MatMul")]
    assert [entry.reason.rpartition("(")[2] for entry in multiplying] == ["Softmax)"]
    assert not any(entry.reason == "ONNX Runtime did not fuse it" for entry in fused.in_float)


def test_a_damaged_constant_of_the_float_parts_is_found(encoder: Quantized) -> None:
    files = encoder.files()
    gammas = [node.input[1] for node in nodes(files["tensorrt"].model, "LayerNormalization")]
    damaged = (np.full(16, 1.02)).astype(np.float16)  # gamma is 1
    assert (initializer(files["tensorrt"].model, gammas[1]) == 1).all()
    files["tensorrt"] = edited_file(files["tensorrt"], gammas[1], damaged)
    result = verify(encoder.model, encoder.grids, files, encoder.images)
    assert result["tensorrt"].status.startswith("failed: ")
