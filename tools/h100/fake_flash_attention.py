"""A module `flash_attn_interface` that knows FlashAttention 3's shapes alone, to trace ATTENTION=fa3 without it.

The signature is the public one of Dao-AILab/flash-attention, hopper/flash_attn_interface.py.
"""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor


def install() -> None:
    """Makes `import flash_attn_interface` find this module's function."""
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["flash_attn_interface"] = module


@torch.library.custom_op("fake_flash_attn_3::forward", mutates_args=(), device_types="cuda")
def attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """q [N, H, h], k and v [N, K, h] -> y [N, H, h] and its log-sum-exp [H, N]. Errors: it never runs."""
    raise NotImplementedError("only shapes are known")


@attention.register_fake
def _(q, k, v, bounds, longest, causal, window):
    return torch.empty_like(q), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


@torch.library.custom_op("fake_flash_attn_3::backward", mutates_args=(), device_types="cuda")
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: int,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Errors: it never runs."""
    raise NotImplementedError("only shapes are known")


@attention_backward.register_fake
def _(grad, q, k, v, y, lse, bounds, longest, causal, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class FlashAttention(torch.autograd.Function):
    """Saves what FlashAttention saves: inputs, output, log-sum-exp and sequence bounds."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest, causal, window):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        y, lse = attention(q, k, v, bounds, longest, causal, window)
        ctx.save_for_backward(q, k, v, y, lse, bounds)
        ctx.options = longest, causal, window
        return y

    @staticmethod
    def backward(ctx, *grads):
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return (*attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **_options: object,
) -> Tensor:
    """Attention of packed sequences: q [N, H, h], k and v [N, K, h], bounds [n + 1] -> [N, H, h].

    window_size: keys before a query and after it; -1: all.
    """
    if cu_seqlens_q.dtype != torch.int32 or q.size(1) % k.size(1) or k.shape != v.shape:
        raise ValueError("FlashAttention 3 takes int32 bounds and a number of heads that the key heads divide")
    return FlashAttention.apply(q, k, v, cu_seqlens_q, max_seqlen_q, causal, max(0, window_size[0]))
