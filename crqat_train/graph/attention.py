"""Computes nn.MultiheadAttention by single operations, which are those of torch's own forward, in the same order.

torch.fx and NNCF can then trace these operations, and each quantizer that NNCF places maps to one edge of the graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import UsageError


class _Weights:
    """Placeholder for attention weights, which are not computed; any use of it raises an error."""

    def __getattr__(self, name: str) -> Any:
        del name
        self._refuse()

    def _refuse(self, *_: Any) -> NoReturn:
        msg = (
            "the attention weights are used, which are not quantized: use the first output of "
            "nn.MultiheadAttention alone"
        )
        raise UsageError(msg)

    __getitem__ = __iter__ = __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _refuse


class WrittenOut(nn.MultiheadAttention):
    """nn.MultiheadAttention that computes its result by `attend`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute attention; see `attend`."""
        return attend(self, *args, **kwargs)


def write_out(model: nn.Module) -> None:
    """Make each nn.MultiheadAttention of a network run `attend`, in place; parameters are unchanged."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            module.__class__ = WrittenOut


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **further: Any,
) -> tuple[Tensor, Any]:
    """Return the result of `module(query, key, value)`, without dropout of attention weights.

    Args:
        module: Module whose parameters are used.
        query: Shape [N, T, E], or [T, N, E] without `batch_first`.
        key: Shape [N, S, E_k], or [S, N, E_k] without `batch_first`.
        value: Shape [N, S, E_v], or [S, N, E_v] without `batch_first`.
        key_padding_mask: Must be None.
        need_weights: Accepted as in torch; the attention weights themselves cannot be used.
        attn_mask: Must be None.
        further: Other arguments of the module; they have no effect without a mask.

    Returns:
        The output, in the shape of `query`; and None in place of attention weights that are not needed, or a
        placeholder that refuses any use.

    Raises:
        UsageError: The attention is called with a mask, or the module has unsupported options.
    """
    if key_padding_mask is not None or attn_mask is not None or further.get("is_causal"):
        msg = "attention with a mask is not quantized: call nn.MultiheadAttention without a mask"
        raise UsageError(msg)
    if module.bias_k is not None or module.add_zero_attn:
        msg = "nn.MultiheadAttention is quantized without add_bias_kv and add_zero_attn: leave them out"
        raise UsageError(msg)
    heads, size, embedding = module.num_heads, module.head_dim, module.embed_dim
    if key is query and value is query and module.in_proj_weight is not None:
        x = query.transpose(1, 0) if module.batch_first else query
        tokens, batch = x.shape[0], x.shape[1]
        projected = functional.linear(x, module.in_proj_weight, module.in_proj_bias)
        split: Tensor = projected.unflatten(-1, (3, embedding))  # type: ignore[no-untyped-call]
        parts = split.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        q, k, v = parts[0], parts[1], parts[2]
        keys = tokens
    else:
        if module.in_proj_weight is not None:
            weights: Any = module.in_proj_weight.chunk(3)
        else:
            weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        biases: Any = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        sources = (source.transpose(1, 0) if module.batch_first else source for source in (query, key, value))
        q, k, v = (functional.linear(*part) for part in zip(sources, weights, biases, strict=True))
        tokens, batch, keys = q.shape[0], q.shape[1], k.shape[0]
    q = q.view(tokens, batch * heads, size).transpose(0, 1)
    k = k.view(keys, batch * heads, size).transpose(0, 1)
    v = v.view(keys, batch * heads, size).transpose(0, 1)
    q = q.view(batch, heads, tokens, size)
    k = k.view(batch, heads, keys, size)
    v = v.view(batch, heads, keys, size)
    attended = functional.scaled_dot_product_attention(q, k, v)
    attended = attended.permute(2, 0, 1, 3).reshape(batch * tokens, embedding)
    out = functional.linear(attended, module.out_proj.weight, module.out_proj.bias)
    out = out.view(tokens, batch, embedding)
    return (out.transpose(1, 0) if module.batch_first else out), (_Weights() if need_weights else None)
