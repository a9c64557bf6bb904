"""The Triton kernel of `group_advantages`: one launch, and for batch_std one more. Imported on first use only.

A program takes one group, in steps of BLOCK samples: count, sum and range; then squared deviations; then the results.
Programs (g, 1), (g, 2) ... repeat that little work and share the broadcast to the group's tokens. float64 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, TOKENS, NUM_WARPS = 128, 512, 4
TOKEN_PROGRAMS = 8


@triton.jit
def _moments(rewards, begin, end, BLOCK: tl.constexpr):
    """Of the present rewards: count, mean, unbiased std (0 when they do not differ), and max - min (-inf when none)."""
    lane = tl.arange(0, BLOCK)
    n, total = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    low, high = n + float("inf"), n - float("inf")
    for at in range(begin, end, BLOCK):
        r = tl.load(rewards + at + lane, at + lane < end, float("nan")).to(tl.float64)
        present = r == r
        n += tl.where(present, 1.0, 0.0)
        total += tl.where(present, r, 0.0)
        low = tl.where(present & (r < low), r, low)
        high = tl.where(present & (r > high), r, high)
    count = tl.sum(n, 0)
    mean = tl.sum(total, 0) / count
    span = tl.max(high, 0) - tl.min(low, 0)
    square = tl.zeros((BLOCK,), tl.float64)
    for at in range(begin, end, BLOCK):
        r = tl.load(rewards + at + lane, at + lane < end, float("nan")).to(tl.float64)
        square += tl.where(r == r, (r - mean) * (r - mean), 0.0)
    std = tl.where(span > 0, tl.sqrt(tl.sum(square, 0) / tl.maximum(count - 1, 1.0)), 0.0)
    return count, mean, std, span


@triton.jit
def batch_std_kernel(rewards, out, S, BLOCK: tl.constexpr):
    _, _, std, _ = _moments(rewards, 0, S, BLOCK)
    tl.store(out, std)


@triton.jit
def group_advantages_kernel(
    rewards,
    offsets,
    cu_seqlens,
    batch_std,
    adv,
    mean_out,
    std_out,
    live,
    token_adv,
    eps,
    MODE: tl.constexpr,
    BROADCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    group, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end = tl.load(offsets + group).to(tl.int64), tl.load(offsets + group + 1).to(tl.int64)
    count, mean, std, span = _moments(rewards, begin, end, BLOCK)
    if MODE == "grpo":
        scale = 1.0 / (std + eps)
    elif MODE == "rloo":
        scale = count / tl.maximum(count - 1, 1.0)
    elif MODE == "batch_std":
        scale = 1.0 / (tl.load(batch_std) + eps)
    else:
        scale = count * 0 + 1.0
    if share == 0:
        tl.store(mean_out + group, mean)
        tl.store(std_out + group, std)
        lane = tl.arange(0, BLOCK)
        for at in range(begin, end, BLOCK):
            i = at + lane
            r = tl.load(rewards + i, i < end, float("nan")).to(tl.float64)
            teaches = tl.where(r == r, span, 0.0) > 0  # present and alive
            tl.store(adv + i, tl.where(teaches, (r - mean) * scale, 0.0), i < end)
            tl.store(live + i, teaches, i < end)
    if BROADCAST:
        lane = tl.arange(0, TOKENS)
        for sample in range(begin + share, end, shares):
            r = tl.load(rewards + sample).to(tl.float64)
            value = tl.where(tl.where(r == r, span, 0.0) > 0, (r - mean) * scale, 0.0)
            first, last = tl.load(cu_seqlens + sample).to(tl.int64), tl.load(cu_seqlens + sample + 1).to(tl.int64)
            for at in range(first, last, TOKENS):
                tl.store(token_adv + at + lane, tl.zeros((TOKENS,), tl.float64) + value, at + lane < last)


def group_advantages_triton(rewards, group_offsets, mode, eps, cu_seqlens, total_tokens):
    S, G = rewards.shape[0], group_offsets.shape[0] - 1
    rewards, group_offsets = rewards.contiguous(), group_offsets.contiguous()
    adv, live = torch.empty_like(rewards), torch.empty_like(rewards, dtype=torch.bool)
    mean, std = rewards.new_empty(G), rewards.new_empty(G)
    token_adv = rewards.new_empty(0 if cu_seqlens is None else total_tokens)
    if G == 0:
        return adv, mean, std, live, token_adv
    batch = rewards.new_empty(1, dtype=torch.float64) if mode == "batch_std" else mean
    if mode == "batch_std":
        batch_std_kernel[(1,)](rewards, batch, S, BLOCK=1024, num_warps=8)
    grid = (G, 1 if cu_seqlens is None else TOKEN_PROGRAMS)
    group_advantages_kernel[grid](
        rewards,
        group_offsets,
        mean if cu_seqlens is None else cu_seqlens.contiguous(),
        batch,
        adv,
        mean,
        std,
        live,
        token_adv,
        eps,
        MODE=mode,
        BROADCAST=cu_seqlens is not None,
        BLOCK=BLOCK,
        TOKENS=TOKENS,
        num_warps=NUM_WARPS,
    )
    return adv, mean, std, live, token_adv
