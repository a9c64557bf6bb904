"""The Triton kernels of `token_logprob`: one read forward, one read and one write backward. Imported on first use
only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_logprob_triton import MAX_SUM

BLOCK = 4096


@triton.jit
def row_sums(z_row, ki, V, inv_t, WITH_U: tl.constexpr, B: tl.constexpr):
    s = tl.zeros([B], tl.float32)
    u = tl.zeros([B], tl.float32)
    for first in range(0, V, B):
        v = first + tl.arange(0, B)
        d = tl.load(z_row + v, mask=v < V, other=float("-inf")).to(tl.float32) * inv_t - ki
        e = tl.exp2(d * 1.4426950408889634)
        s += e
        if WITH_U:
            u += tl.where(e > 0, e * d, 0.0)
    return tl.sum(s, 0), tl.sum(u, 0)


@triton.jit
def forward_kernel(
    logits, targets, target, anchor, S_out, U_out, V, stride, inv_t, max_sum, WITH_U: tl.constexpr, B: tl.constexpr
):
    """One row per program. A sum out of range is redone from the row maximum by the same program."""
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * stride
    yi = tl.load(targets + row).to(tl.int64)
    inside = (yi >= 0) & (yi < V)
    zy = tl.where(inside, tl.load(z_row + tl.where(inside, yi, 0)).to(tl.float32) * inv_t, float("nan"))
    ki = zy
    S, U = row_sums(z_row, ki, V, inv_t, WITH_U, B)
    in_range = max_sum >= S  # false for NaN
    if not in_range:
        best = tl.full([B], float("-inf"), tl.float32)
        for first in range(0, V, B):
            v = first + tl.arange(0, B)
            best = tl.maximum(best, tl.load(z_row + v, mask=v < V, other=float("-inf")).to(tl.float32) * inv_t)
        ki = tl.max(best, 0)
        S, U = row_sums(z_row, ki, V, inv_t, WITH_U, B)
    tl.store(target + row, zy)
    tl.store(anchor + row, ki)
    tl.store(S_out + row, S)
    tl.store(U_out + row, U)


@triton.jit
def backward_kernel(
    grad, logits, targets, anchor, alpha, beta, gamma, V, stride, inv_t, WITH_U: tl.constexpr, B: tl.constexpr
):
    """grad = E (alpha + beta (z - k)) + [v = y] gamma, one block of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * B + tl.arange(0, B)
    z = tl.load(logits + row * stride + v, mask=v < V, other=0.0).to(tl.float32)
    d = z * inv_t - tl.load(anchor + row)
    e = tl.exp2(d * 1.4426950408889634)
    f = tl.load(alpha + row)
    if WITH_U:
        g = tl.where(e == 0, 0.0, e * (f + tl.load(beta + row) * d))  # d may be -inf
    else:
        g = e * f
    g += tl.where(v == tl.load(targets + row), tl.load(gamma + row), 0.0)
    tl.store(grad + row * V + v, g.to(grad.dtype.element_ty), mask=v < V)


def _block(V: int) -> int:
    return min(BLOCK, triton.next_power_of_2(V))


def forward(logits_NV: Tensor, targets_N: Tensor, inv_t: float, with_entropy: bool) -> Tensor:
    """stats [4, N]: target logit, anchor, S, U."""
    N, V = logits_NV.shape
    stats = torch.empty(4, N, dtype=torch.float32, device=logits_NV.device)
    if N:
        forward_kernel[(N,)](
            logits_NV,
            targets_N,
            *stats,
            V,
            logits_NV.stride(0),
            inv_t,
            MAX_SUM,
            WITH_U=with_entropy,
            B=_block(V),
            num_warps=8,
        )
    return stats


def backward(grad_NV, logits_NV, targets_N, anchor_N, alpha_N, beta_N, gamma_N, inv_t) -> None:
    """Writes the gradient of the logits into contiguous grad [N, V]."""
    N, V = logits_NV.shape
    if N:
        B = _block(V)
        backward_kernel[(N, triton.cdiv(V, B))](
            grad_NV,
            logits_NV,
            targets_N,
            anchor_N,
            alpha_N,
            alpha_N if beta_N is None else beta_N,
            gamma_N,
            V,
            logits_NV.stride(0),
            inv_t,
            WITH_U=beta_N is not None,
            B=B,
            num_warps=8,
        )
