"""Layers between convolutions: each is written and verified, and leaves the convolutions in integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crqat.core.errors import UsageError
from crqat.export.qdq.lint import lint
from crqat.export.verification.checks import verify
from crqat.export.verification.fusion import fusion
from tests.export.conftest import BOTH, quantize, random_images

CHANNELS = 8


class Attention(nn.Module):
    """Of all pixels to all pixels, with queries, keys and values unpacked from one tensor."""

    def __init__(self, unpack: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.qkv, self.unpack, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), unpack, nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        n, c, h, w = x.shape
        q, k, v = self.unpack(self.qkv(x.flatten(2).transpose(1, 2)))
        attention = torch.softmax(q @ k.transpose(-2, -1) * c**-0.5, dim=-1)
        return self.out(attention @ v).transpose(1, 2).reshape(n, c, h, w)  # type: ignore[no-any-return]


class GeneralizedMean(nn.Module):
    """Over windows of two by two pixels (GeM, arXiv 1711.02512), with a learned power."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H / 2, W / 2]."""
        return F.avg_pool2d(x.clamp(min=1e-3).pow(self.power), 2).pow(1.0 / self.power)


class EfficientChannelAttention(nn.Module):
    """ECA, arXiv 1910.03151: a convolution over the means of neighboring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        weights: Tensor = self.conv(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return x * weights.sigmoid()


class BlockAttention(nn.Module):
    """CBAM, arXiv 1807.06521: channels, then pixels, weighted by means and maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.ReLU(), nn.Conv2d(4, CHANNELS, 1))
        self.pixels = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        x = x * torch.sigmoid(self.shared(F.adaptive_avg_pool2d(x, 1)) + self.shared(F.adaptive_max_pool2d(x, 1)))
        means, maxima = x.mean(1, keepdim=True), x.amax(1, keepdim=True)
        return x * torch.sigmoid(self.pixels(torch.cat([means, maxima], 1)))


class StackedBias(nn.Module):
    """A linear layer whose bias is put together in the forward, as of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / CHANNELS**0.5)
        self.one, self.other = nn.Parameter(torch.randn(CHANNELS // 2)), nn.Parameter(torch.randn(CHANNELS // 2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        bias = torch.cat((self.one, self.other))
        return F.linear(x.permute(0, 2, 3, 1), self.weight, bias).permute(0, 3, 1, 2)


class AttentionPool(nn.Module):
    """CLIP's: attention of the mean to all pixels, by torch's function, which is told the mode (arXiv 2103.00020)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
        query, key, value = self.query, self.key, self.value
        pooled, _ = F.multi_head_attention_forward(
            query=tokens[:1], key=tokens, value=tokens, embed_dim_to_check=CHANNELS, num_heads=2,
            in_proj_weight=None, in_proj_bias=torch.cat([query.bias, key.bias, value.bias]), bias_k=None, bias_v=None,
            add_zero_attn=False, dropout_p=0.0, out_proj_weight=self.out.weight, out_proj_bias=self.out.bias,
            training=self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=query.weight, k_proj_weight=key.weight, v_proj_weight=value.weight,
        )  # fmt: skip
        return x + pooled.squeeze(0)[:, :, None, None]


class MeanOverTokens(nn.Module):
    """Patches as tokens, mixed and averaged, spread over the pixels again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        means = F.relu(self.mix(x.flatten(2).transpose(1, 2))).mean(1)
        return x + means[:, :, None, None]


class Normalization(nn.Module):
    """By buffers, as a network does that takes images as they are."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, CHANNELS, 1, 1), 0.1))
        self.register_buffer("std", torch.full((1, CHANNELS, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return (x - self.mean) / self.std


class SamePadding(nn.Conv2d):
    """Padding as TensorFlow computes it, with a condition on the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same of half the size."""
        need = max((-(-x.shape[-1] // 2) - 1) * 2 + 3 - x.shape[-1], 0)
        if need > 0:
            x = F.pad(x, [need // 2, need - need // 2, need // 2, need - need // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0)


class Optional(nn.Module):
    """A forward whose second argument has a default and decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor, features_only: bool = False) -> Tensor:
        """[N, C, H, W] to the same."""
        return x if features_only else self.conv(x)


class Blur(nn.Module):
    """Anti-aliased pooling (arXiv 1904.11486): a fixed filter, expanded over the channels."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.full((1, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same of half the size."""
        kernel = self.kernel.expand(CHANNELS, 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=CHANNELS)


class PreActivation(nn.Module):
    """A residual block that rectifies its input, while the skip takes it as it is (arXiv 1603.05027)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        branch: Tensor = self.bn(self.conv(F.relu(x)))
        return branch + x


class FunctionOf(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to what the function gives."""
        return self.function(x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "prelu per channel": lambda: nn.PReLU(CHANNELS),
    "pixel shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(CHANNELS // 4, CHANNELS, 1)),
    "upsample nearest": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "upsample nearest exact": lambda: nn.Upsample(scale_factor=2, mode="nearest-exact"),
    "upsample bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "upsample bilinear by corners": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "upsample bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "upsample to a size": lambda: FunctionOf(lambda x: F.interpolate(x, size=(9, 11), mode="bilinear")),
    "gated linear unit": lambda: nn.Sequential(
        FunctionOf(lambda x: F.glu(x, 1)), nn.Conv2d(CHANNELS // 2, CHANNELS, 1)
    ),
    "normalize": lambda: FunctionOf(lambda x: F.normalize(x, dim=1)),
    "log softmax": lambda: nn.LogSoftmax(1),
    "generalized mean": GeneralizedMean,
    "efficient channel attention": EfficientChannelAttention,
    "block attention": BlockAttention,
    "attention by chunk": lambda: Attention(lambda x: x.chunk(3, -1)),
    "attention by unbind": lambda: Attention(lambda x: x.reshape(*x.shape[:-1], 3, CHANNELS).unbind(-2)),
    "mean over tokens": MeanOverTokens,
    "normalization by buffers": Normalization,
    "padding same": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same"),
    "padding same with a dilation": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same", dilation=2),
    "padding by size": lambda: SamePadding(CHANNELS, CHANNELS, 3, stride=2),
    "padding by new zeros": lambda: nn.Sequential(
        FunctionOf(lambda x: torch.cat([x, x.new_zeros(x.shape[0], 4, *x.shape[2:])], 1)),
        nn.Conv2d(CHANNELS + 4, CHANNELS, 1),
    ),
    "views by attributes": lambda: FunctionOf(lambda x: x.transpose(2, 3).mT.data),
    "cumulative sum": lambda: FunctionOf(lambda x: x.cumsum(2)),
    "product": lambda: FunctionOf(lambda x: torch.stack([x, x + 1, 1 - x]).prod(0)),
    "log of a sum of exponentials": lambda: FunctionOf(lambda x: x.logsumexp(1, keepdim=True) + x),
    "stack side by side": lambda: nn.Sequential(
        FunctionOf(lambda x: torch.hstack((x, 1 - x))), nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
    ),
    "smallest values": lambda: FunctionOf(lambda x: x.min(1, keepdim=True)[0] + x),
    "largest values": lambda: FunctionOf(lambda x: x.max(1, keepdim=True).values * x),
    "groups in the batch": lambda: FunctionOf(
        lambda x: x.view(x.shape[0] * 2, CHANNELS // 2, *x.shape[2:]).sigmoid().view_as(x) * x
    ),
    "transformer encoder": lambda: nn.Sequential(
        nn.Flatten(2),
        FunctionOf(lambda x: x.transpose(1, 2)),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(CHANNELS, 2, 16, 0.1, batch_first=True), 2),
        FunctionOf(lambda x: x.transpose(1, 2).unflatten(2, (8, 8))),  # type: ignore[no-untyped-call]
    ),
    "constants of the forward": lambda: FunctionOf(
        lambda x: x * torch.linspace(0.5, 1, 8) + torch.sin(torch.arange(CHANNELS) / 3).view(1, -1, 1, 1)
    ),
    "stacked bias": StackedBias,
    "attention pool": AttentionPool,
    "mask": lambda: FunctionOf(lambda x: x * (x > 0.5).float()),
    "optional argument": Optional,
    "anti-aliased pooling": Blur,
    "pre-activation residuals": lambda: nn.Sequential(*(PreActivation() for _ in range(3))),
    "transposed convolution": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2),
}


class Network(nn.Module):
    """A layer between two convolutions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Conv2d(3, CHANNELS, 3, padding=1), layer
        self.after, self.fc = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to logits [N, 5]."""
        x = self.layer(F.relu(self.before(x)))
        return self.fc(F.relu(self.after(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_between_two_convolutions_is_verified_for_both_targets(name: str) -> None:
    torch.manual_seed(0)
    quantized = quantize(Network(LAYERS[name]()), random_images(8, 3, 8, 8), targets=BOTH)
    files = quantized.files()
    assert [finding for target, file in files.items() for finding in lint(file.model, target)] == []
    proof = verify(quantized.model, quantized.grids, files, quantized.images)
    assert {target: entry.status for target, entry in proof.items()} == dict.fromkeys(BOTH, "passed")
    in_float = {entry.operation for entry in fusion(files["onnxruntime"].model).in_float}
    assert not in_float & {"Conv", "Gemm"}, in_float


@pytest.mark.parametrize(
    ("cast", "message"),
    [
        (lambda x: x.double().float(), r"a cast to torch\.float64"),
        (lambda x: x.half().float(), r"a cast to torch\.float16"),
        (lambda x: x.bfloat16().float(), r"a cast to torch\.bfloat16"),
        (lambda x: x.long().float(), r"a cast of real values to torch\.int64"),
    ],
)
def test_casts_that_no_file_keeps_are_refused_by_their_line(cast: Callable[[Tensor], Tensor], message: str) -> None:
    quantized = quantize(Network(FunctionOf(cast)), random_images(2, 3, 8, 8))
    with pytest.raises(UsageError, match=rf"layer at .*test_layers\.py:\d+: {message}"):
        quantized.files()


def test_complex_numbers_are_refused_with_the_line_that_computes_them() -> None:
    network = Network(FunctionOf(lambda x: torch.fft.fft2(x).real))
    quantized = quantize(network, random_images(2, 3, 8, 8))
    with pytest.raises(UsageError, match=r"layer at .*test_layers\.py:\d+: torch's fft_fft2 has no form in ONNX"):
        quantized.files()
