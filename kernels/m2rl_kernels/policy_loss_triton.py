"""The Triton kernel of `policy_loss`: loss, gradients and statistics in one launch. Imported on first use only.

A program takes BLOCK tokens, or for gspo one sequence in steps of BLOCK tokens: first its mean log-ratio, then the
loss, then the sequence's mean slope into every token's gradient. Each program leaves its sums in `partial`; the one
that finishes last adds them in the order of programs, so that the result has the same bits in every run, and sets the
ticket counter back to 0.

Cost: at most seven [N] vectors read and two written, 36 bytes per token: 0.6 MB at N = 16384, bound by the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 256, 4
COLUMNS = 16  # len(STATS) rounded up to a power of two
_tickets: dict[tuple[torch.device, int], Tensor] = {}  # one per device and stream: zero between launches


@triton.jit
def _exp_minus(x):
    """exp(x) - x - 1, without cancellation near 0."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x / 40320))))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - x - 1)


@triton.jit
def _table(c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15, BLOCK: tl.constexpr):
    """[BLOCK, 16] with c_k as column k."""
    p0, p1, p2, p3 = tl.join(c0, c8), tl.join(c1, c9), tl.join(c2, c10), tl.join(c3, c11)
    p4, p5, p6, p7 = tl.join(c4, c12), tl.join(c5, c13), tl.join(c6, c14), tl.join(c7, c15)
    q0, q1, q2, q3 = tl.join(p0, p4), tl.join(p1, p5), tl.join(p2, p6), tl.join(p3, p7)
    return tl.reshape(tl.join(tl.join(q0, q2), tl.join(q1, q3)), (BLOCK, 16))


@triton.jit
def policy_loss_kernel(
    logp,
    behaviour,
    advantage,
    weight,
    old,
    ref,
    entropy,
    cu_seqlens,
    segment,
    grad_logp,
    grad_entropy,
    partial,
    ticket,
    loss,
    stats,
    N,
    n_segments,
    eps_low,
    eps_high,
    dual_clip,
    tis_cap,
    kl_coef,
    entropy_coef,
    KIND: tl.constexpr,
    KL: tl.constexpr,
    BEHAVIOUR: tl.constexpr,
    OLD: tl.constexpr,
    REF: tl.constexpr,
    ENTROPY: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    SEGMENT: tl.constexpr,
    DUAL: tl.constexpr,
    TIS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, 16)[None, :]
    if KIND == "gspo":
        begin, end = tl.load(cu_seqlens + program).to(tl.int64), tl.load(cu_seqlens + program + 1).to(tl.int64)
        total = tl.zeros((BLOCK,), tl.float32)
        if OLD:
            for at in range(begin, end, BLOCK):
                i = at + lane
                total += tl.load(logp + i, i < end, 0.0) - tl.load(old + i, i < end, 0.0)
        length = tl.maximum(end - begin, 1).to(tl.float32)
        sequence_ratio = tl.exp(tl.sum(total, 0) / length)
    else:
        begin = program.to(tl.int64) * BLOCK
        end = tl.minimum(begin + BLOCK, N)
    sums = tl.zeros((ROWS, 16), tl.float32)
    slopes = tl.zeros((BLOCK,), tl.float32)
    zero = tl.zeros((BLOCK,), tl.float32)
    for at in range(begin, end, BLOCK):
        i = at + lane
        valid = i < end
        lp = tl.load(logp + i, valid, 0.0)
        A = tl.load(advantage + i, valid, 0.0)
        w = tl.load(weight + i, valid, 0.0)
        dead = w == 0
        o = tl.load(old + i, valid, 0.0) if OLD else lp
        if KIND == "gspo":
            r = zero + sequence_ratio
        else:
            r = tl.exp(lp - o)
        low, high = r < 1 - eps_low, r > 1 + eps_high
        bounded = tl.minimum(tl.maximum(r, 1 - eps_low), 1 + eps_high)
        if KIND == "reinforce":
            slope, pg, clip = -A, -A * lp, dead & (not dead)
        elif KIND == "cispo":
            slope = -A * bounded
            pg, clip = slope * lp, (low | high) & (A != 0)
        else:
            clip = ((A > 0) & high) | ((A < 0) & low)
            pg = tl.maximum(-A * r, -A * bounded)
            if DUAL:
                far = (A < 0) & (r > dual_clip)
                pg = tl.where(far, -dual_clip * A, pg)
                clip = clip | far
            slope = tl.where(clip, 0.0, -A * r)
        tis, tis_clip, m, k3 = zero + 1, zero, zero, zero
        if BEHAVIOUR:
            m = o - tl.load(behaviour + i, valid, 0.0)
            k3 = _exp_minus(m)
            if TIS:
                e = tl.exp(m)
                tis, tis_clip = tl.minimum(e, tis_cap), tl.where(e > tis_cap, 1.0, 0.0)
                pg, slope = pg * tis, slope * tis
        slope = tl.where(dead, 0.0, w * slope)
        g = zero
        if KIND == "gspo":
            slopes += slope
        else:
            g = slope
        kl1, kl3 = zero, zero
        if REF:
            d = tl.load(ref + i, valid, 0.0) - lp
            kl1, kl3 = -d, _exp_minus(d)
            if KL == "k1":
                kl, pull = -d, zero + 1
            elif KL == "k2":
                kl, pull = d * d * 0.5, -d
            else:
                kl, pull = kl3, 1 - tl.exp(d)
            if kl_coef != 0:
                pg += kl_coef * kl
                g += tl.where(dead, 0.0, w * kl_coef * pull)
        en = zero
        if ENTROPY:
            en = tl.load(entropy + i, valid, 0.0)
            if ENTROPY_GRAD:
                pg -= entropy_coef * en
                tl.store(grad_entropy + i, w * -entropy_coef, valid)
        tl.store(grad_logp + i, g, valid)
        value = tl.where(dead, 0.0, w * pg)
        table = _table(
            zero + 1,
            w,
            w * tl.abs(A),
            value,
            lp,
            en,
            r,
            tl.where(clip, 1.0, 0.0),
            -m,
            k3,
            tl.exp(tl.abs(m)),
            tis,
            tis_clip,
            kl1,
            kl3,
            zero,
            BLOCK,
        )
        group = tl.zeros((BLOCK,), tl.int64)
        if SEGMENT:
            group = tl.load(segment + i, valid, -1)
        for s in range(0, n_segments):
            mine = tl.sum(tl.where((valid & (group == s))[:, None], table, 0.0), 0)
            sums += tl.where(rows == s, mine[None, :], 0.0)
        everyone = tl.sum(tl.where(valid[:, None], table, 0.0), 0)
        sums += tl.where(rows == n_segments, everyone[None, :], 0.0)
    if KIND == "gspo":
        tl.debug_barrier()
        mean_slope = tl.sum(slopes, 0) / length
        for at in range(begin, end, BLOCK):
            i = at + lane
            tl.store(grad_logp + i, tl.load(grad_logp + i, i < end, 0.0) + mean_slope, i < end)
    cell = rows * 16 + columns
    tl.store(partial + program.to(tl.int64) * ROWS * 16 + cell, sums)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        cells = tl.arange(0, ROWS * 16)
        result = tl.zeros((ROWS * 16,), tl.float32)
        for p in range(0, programs, CHUNK):  # CHUNK programs' loads are in flight at a time
            each = p + tl.arange(0, CHUNK)[:, None]
            result += tl.sum(
                tl.load(
                    partial + each.to(tl.int64) * (ROWS * 16) + cells[None, :],
                    each < programs,
                    0.0,
                    cache_modifier=".cg",
                ),
                0,
            )
        tl.store(stats + cells // 16 * STATS + cells % 16, result, (cells // 16 < n_segments) & (cells % 16 < STATS))
        tl.store(loss, tl.sum(tl.where(cells == n_segments * 16 + 3, result, 0.0), 0))
        tl.store(ticket, 0)


def policy_loss_triton(
    logp,
    behaviour,
    advantage,
    weight,
    old,
    ref,
    entropy,
    cu_seqlens,
    segment,
    kind,
    eps_low,
    eps_high,
    dual_clip,
    tis_cap,
    kl,
    kl_coef,
    entropy_coef,
    n_segments,
    columns,
):
    """(loss [], stats [D, columns], dloss/dlogp [N], dloss/dentropy [N] or empty)."""
    N = logp.shape[0]
    new = lambda *shape: logp.new_empty(shape, dtype=torch.float32)  # noqa: E731
    grad_logp, grad_entropy = new(N), new(N if entropy_coef != 0 else 0)
    programs = cu_seqlens.shape[0] - 1 if kind == "gspo" else triton.cdiv(N, BLOCK)
    if N == 0 or programs == 0:
        return logp.new_zeros(()), logp.new_zeros(n_segments, columns), grad_logp, grad_entropy
    key = (logp.device, torch.cuda.current_stream(logp.device).cuda_stream if logp.is_cuda else 0)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=logp.device)
    rows = triton.next_power_of_2(n_segments + 1)
    loss, stats = new(), new(n_segments, columns)
    vectors = (logp, behaviour, advantage, weight, old, ref, entropy, cu_seqlens, segment)
    absent = logp.contiguous()
    pointers = [absent if x is None else x.contiguous() for x in vectors]
    policy_loss_kernel[(programs,)](
        *pointers,
        grad_logp,
        grad_entropy if entropy_coef != 0 else absent,
        new(programs, rows, COLUMNS),
        _tickets[key],
        loss,
        stats,
        N,
        n_segments,
        eps_low,
        eps_high,
        dual_clip or 0.0,
        tis_cap or 0.0,
        kl_coef,
        entropy_coef,
        KIND=kind,
        KL=kl,
        BEHAVIOUR=behaviour is not None,
        OLD=old is not None,
        REF=ref is not None,
        ENTROPY=entropy is not None,
        ENTROPY_GRAD=entropy_coef != 0,
        SEGMENT=segment is not None,
        DUAL=dual_clip is not None,
        TIS=tis_cap is not None,
        ROWS=rows,
        BLOCK=BLOCK,
        STATS=columns,
        CHUNK=max(4096 // (rows * COLUMNS), 1),
        num_warps=NUM_WARPS,
    )
    return loss, stats, grad_logp, grad_entropy
