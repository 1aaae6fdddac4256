"""nn.MultiheadAttention as operations that torch.fx can show: those of torch's own forward, in its order.

NNCF names operations as they run inside of torch's functional attention. Written out with nothing between, the traced
graph has the same operations under the same names, so that NNCF's layout maps to it one to one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import UsageError


def self_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """What `module(query, query, query, need_weights=False)` computes; dropout of attention weights is left out.

    Args:
        module: Whose parameters are used.
        query: Shape [N, T, E], or [T, N, E] without `batch_first`.
        key: The same object as `query`.
        value: The same object as `query`.
        key_padding_mask: None.
        need_weights: False.
        attn_mask: None.
        further: What else the module takes, and what changes nothing then.

    Returns:
        Of the shape of `query`; and None, as torch gives it in place of the weights that are not needed.

    Raises:
        UsageError: It is called in another way, or has other parts.
    """
    if key is not query or value is not query:
        msg = "only self-attention is quantized: pass one tensor as query, key and value"
        raise UsageError(msg)
    if need_weights:
        msg = "attention weights as an output are not quantized: call nn.MultiheadAttention with need_weights=False"
        raise UsageError(msg)
    if key_padding_mask is not None or attn_mask is not None or further.get("is_causal"):
        msg = "attention with a mask is not quantized: images need none"
        raise UsageError(msg)
    weight = module.in_proj_weight
    if weight is None or module.bias_k is not None or module.add_zero_attn:
        msg = "nn.MultiheadAttention is quantized without kdim, vdim, add_bias_kv and add_zero_attn"
        raise UsageError(msg)
    x = query.transpose(1, 0) if module.batch_first else query
    tokens, batch = x.shape[0], x.shape[1]
    heads, size, embedding = module.num_heads, module.head_dim, module.embed_dim
    projected = functional.linear(x, weight, module.in_proj_bias)
    split: Tensor = projected.unflatten(-1, (3, embedding))  # type: ignore[no-untyped-call]
    parts = split.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    q, k, v = parts[0], parts[1], parts[2]
    q = q.view(tokens, batch * heads, size).transpose(0, 1)
    k = k.view(tokens, batch * heads, size).transpose(0, 1)
    v = v.view(tokens, batch * heads, size).transpose(0, 1)
    q = q.view(batch, heads, tokens, size)
    k = k.view(batch, heads, tokens, size)
    v = v.view(batch, heads, tokens, size)
    attended = functional.scaled_dot_product_attention(q, k, v)
    attended = attended.permute(2, 0, 1, 3).reshape(batch * tokens, embedding)
    out = functional.linear(attended, module.out_proj.weight, module.out_proj.bias)
    out = out.view(tokens, batch, embedding)
    return (out.transpose(1, 0) if module.batch_first else out), None
