"""Kullback-Leibler divergence between two heads' distributions, per token, without either [N, V] logits; and its
sampled-token estimate.

    p_i = softmax(W x_i / T)   the student: hidden [N, H], weight [V, H]
    q_i = softmax(W' x'_i / T) the teacher: hidden [N, K], weight [V, K]; its own width, the same vocabulary

    reverse:  KL(p || q) = sum_v p_v (log p_v - log q_v)      d/dz_v = p_v (log p_v - log q_v - KL)
    forward:  KL(q || p) = sum_v q_v (log q_v - log p_v)      d/dz_v = p_v - q_v

Reverse is mode-seeking, the objective of on-policy distillation (Agarwal et al., "On-Policy Distillation of Language
Models", arXiv 2306.13649); forward is the classic, mass-covering one (Hinton et al., arXiv 1503.02531).

Method: rows are taken `chunk_bytes` of float32 logits at a time (three [rows, V] buffers, reused). With both rows of
logits less their maxima and g_v = z_v - z'_v, log p - log q is g less a number of the row, so KL = sum p g - log S +
log S', and dz = p (g - sum p g): nothing large cancels, however large the logits. Kept for the backward are the inputs
and three numbers a row; it makes the chunk's logits again: four products forward and backward for the student, two for
the teacher. Gradients flow to the student only. The gradient of
the student's weight is accumulated in float32 and rounded once. On the CPU a row's bits do not depend on the batch
around it.

Letters: N rows (tokens), H and K hidden widths, V vocabulary. Nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .linear_logprob import _check_temperature, _gather, _live_rows, _pad_rows, _padded, _require, _spread

DEFAULT_CHUNK_BYTES = 256 << 20


def linear_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_NK: Tensor,
    teacher_weight_VK: Tensor,
    *,
    direction: Literal["reverse", "forward"] = "reverse",
    temperature: float = 1.0,
    live: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """KL [N] (float32, nats) between student and teacher at each token: "reverse" KL(student || teacher), "forward"
    KL(teacher || student). Differentiable with respect to hidden and weight; the teacher gets no gradient.

    hidden [N, H], weight [V, H], teacher_hidden [N, K], teacher_weight [V, K]: float16, bfloat16 or float32, one dtype
    per pair (float64 runs the reference, for gradcheck). Both distributions use `temperature`.
    live [N] bool: rows that are False return exactly 0, get a zero gradient and cost nothing.
    chunk_bytes: bound on the [rows, V] float32 buffers alive at once, three of them (16 rows at least).
    A ValueError names the argument, the rule and the value.
    """
    _check(hidden_NH, weight_VH, teacher_hidden_NK, teacher_weight_VK, direction, temperature, live, chunk_bytes)
    if hidden_NH.dtype == torch.float64:
        return linear_kl_ref(hidden_NH, weight_VH, teacher_hidden_NK, teacher_weight_VK, direction, temperature, live)
    rows_M = _live_rows(live, hidden_NH.device)
    return linear_kl_fwd(
        hidden_NH,
        weight_VH,
        teacher_hidden_NK.detach(),
        teacher_weight_VK.detach(),
        rows_M,
        direction == "reverse",
        float(temperature),
        chunk_bytes,
    )[0]


def linear_kl_ref(
    hidden_NH, weight_VH, teacher_hidden_NK, teacher_weight_VK, direction="reverse", temperature=1.0, live=None
):
    """The definition, in float32 or float64, with torch's autograd."""
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    p = (hidden_NH.to(dtype) @ weight_VH.to(dtype).T / temperature).log_softmax(-1)
    q = (teacher_hidden_NK.detach().to(dtype) @ teacher_weight_VK.detach().to(dtype).T / temperature).log_softmax(-1)
    kl_N = (p.exp() * (p - q)).sum(-1) if direction == "reverse" else (q.exp() * (q - p)).sum(-1)
    return kl_N if live is None else torch.where(live.to(kl_N.device), kl_N, 0.0)


def sampled_reverse_kl(logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """One-sample estimate [N] of KL(student || teacher) at tokens drawn from the student: logp - teacher_logp, in nats.

    Its mean is the divergence, and the mean of its gradient is the divergence's gradient: the estimate multiplies the
    score, grad = (logp - teacher_logp) grad logp. (Differentiating the difference itself would give zero in the mean.)
    Sum it with weights over tokens; both log-probabilities come from `linear_logprob`, so nothing of size [N, V]
    exists.
    """
    _require(
        teacher_logp_N.shape == logp_N.shape,
        lambda: f"teacher_logp must have the shape of logp, {list(logp_N.shape)}, got {list(teacher_logp_N.shape)}",
    )
    estimate_N = (logp_N - teacher_logp_N).detach()
    return estimate_N + estimate_N * (logp_N - logp_N.detach())


def _check_pair(x, name, h, weight) -> None:
    _require(h.dim() == 2, lambda: f"{name}hidden must have two dimensions, got {list(h.shape)}")
    _require(
        weight.dim() == 2 and weight.shape[1] == h.shape[1] and weight.shape[0] > 0,
        lambda: f"{name}weight must have shape [V, {h.shape[1]}], V > 0, got {list(weight.shape)}",
    )
    _require(
        h.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        lambda: f"{name}hidden must be float16, bfloat16, float32 or float64, got {h.dtype}",
    )
    _require(
        weight.dtype == h.dtype,
        lambda: f"{name}weight must have the dtype of {name}hidden, {h.dtype}, got {weight.dtype}",
    )
    _require(
        weight.device == h.device == x.device,
        lambda: f"{name}hidden and {name}weight must be on {x.device}, got {h.device} and {weight.device}",
    )


def _check(x, w, x2, w2, direction, temperature, live, chunk_bytes) -> None:
    _check_pair(x, "", x, w)
    _check_pair(x, "teacher_", x2, w2)
    N = x.shape[0]
    _require(x2.shape[0] == N, lambda: f"teacher_hidden must have the rows of hidden, {N}, got {x2.shape[0]}")
    _require(
        w2.shape[0] == w.shape[0],
        lambda: f"teacher_weight must have the vocabulary of weight, {w.shape[0]}, got {w2.shape[0]}",
    )
    _require(
        direction in ("reverse", "forward"), lambda: f"direction must be 'reverse' or 'forward', got {direction!r}"
    )
    _check_temperature(temperature)
    _require(chunk_bytes > 0, lambda: f"chunk_bytes must be positive, got {chunk_bytes}")
    _require(
        live is None or (live.dtype == torch.bool and live.shape == (N,)),
        lambda: f"live must be bool of shape [N] = [{N}], got {live.dtype} {list(live.shape)}",
    )


# ---- torch.library operations ----------------------------------------------------------------------------------------


@torch.library.custom_op("m2rl::linear_kl_fwd", mutates_args=())
def linear_kl_fwd(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_NK: Tensor,
    teacher_weight_VK: Tensor,
    rows_M: Tensor | None,
    reverse: bool,
    temperature: float,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """(kl [N], stats [3, M]: log sum exp of the student's and the teacher's shifted logits, mean gap)."""
    x, x2 = _gather(hidden_NH, rows_M), _gather(teacher_hidden_NK, rows_M)
    M, inv_t = x.shape[0], 1.0 / temperature
    kl_M, stats_3M = x.new_zeros(M, dtype=torch.float32), x.new_zeros(3, M, dtype=torch.float32)
    for r, e, z, z2, scratch in _chunks(x, weight_VH, x2, teacher_weight_VK, inv_t, chunk_bytes):
        log_S, log_S2 = (torch.exp(logits, out=scratch).sum(1).log() for logits in (z, z2))
        own, log_own = (z, log_S) if reverse else (z2, log_S2)
        weights = torch.sub(own, log_own[:, None], out=scratch).exp_()
        gap = z.sub_(z2)
        mean = weights.mul_(gap).sum(1)
        kl = mean - log_S + log_S2 if reverse else log_S - log_S2 - mean
        kl_M[r:e], stats_3M[:, r:e] = kl[: e - r], torch.stack([log_S, log_S2, mean])[:, : e - r]
    return _spread(kl_M, rows_M, hidden_NH.shape[0]), stats_3M


@linear_kl_fwd.register_fake
def _(hidden_NH, weight_VH, teacher_hidden_NK, teacher_weight_VK, rows_M, reverse, temperature, chunk_bytes):
    N = hidden_NH.shape[0]
    M = N if rows_M is None else rows_M.shape[0]
    return hidden_NH.new_empty(N, dtype=torch.float32), hidden_NH.new_empty(3, M, dtype=torch.float32)


@torch.library.custom_op("m2rl::linear_kl_bwd", mutates_args=())
def linear_kl_bwd(
    grad_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_NK: Tensor,
    teacher_weight_VK: Tensor,
    rows_M: Tensor | None,
    stats_3M: Tensor,
    reverse: bool,
    temperature: float,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_hidden [N, H], grad_weight [V, H]) of the student, each empty when not needed."""
    x, x2 = _gather(hidden_NH, rows_M), _gather(teacher_hidden_NK, rows_M)
    (M, H), (V, _), dtype, inv_t = x.shape, weight_VH.shape, x.dtype, 1.0 / temperature
    scale_M, size = _gather(grad_N, rows_M).float() * inv_t, None
    if x.is_cuda and dtype != torch.float32 and M:  # keeps small upstream gradients inside float16's range
        size = scale_M.abs().amax()
        scale_M = scale_M / torch.where(size > 0, size, 1.0)
    grad_x = torch.zeros(M, H, dtype=dtype, device=x.device) if need_hidden else None
    grad_w32 = torch.zeros(V, H, dtype=torch.float32, device=x.device) if need_weight else None
    for r, e, z, z2, _ in _chunks(x, weight_VH, x2, teacher_weight_VK, inv_t, chunk_bytes):
        log_S, log_S2, mean = (_pad_rows(s[r:e], z.shape[0])[:, None] for s in stats_3M)
        if reverse:
            dz = z2.neg_().add_(z).sub_(mean).mul_(z.sub_(log_S).exp_())
        else:
            dz = z.sub_(log_S).exp_().sub_(z2.sub_(log_S2).exp_())
        dz.mul_(_pad_rows(scale_M[r:e], z.shape[0])[:, None])
        dz = dz if z.device.type == "cpu" else dz.to(dtype)  # a half-precision product accumulates in float32
        if grad_x is not None:
            grad = _product(dz, weight_VH)[: e - r]
            grad_x[r:e] = grad if size is None else grad.mul_(size)
        if grad_w32 is not None:
            _add_product(grad_w32, dz[: e - r].T, x[r:e])
    if grad_w32 is not None and size is not None:
        grad_w32.mul_(size)
    return (
        hidden_NH.new_empty(0) if grad_x is None else _spread(grad_x, rows_M, hidden_NH.shape[0]),
        hidden_NH.new_empty(0) if grad_w32 is None else grad_w32.to(dtype),
    )


@linear_kl_bwd.register_fake
def _(
    grad_N,
    hidden_NH,
    weight_VH,
    teacher_hidden_NK,
    teacher_weight_VK,
    rows_M,
    stats_3M,
    reverse,
    temperature,
    chunk_bytes,
    need_hidden,
    need_weight,
):
    return (
        hidden_NH.new_empty(hidden_NH.shape if need_hidden else 0),
        hidden_NH.new_empty(weight_VH.shape if need_weight else 0),
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.temperature, ctx.chunk_bytes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _grads(ctx, grad_N, _stats):
    if grad_N is None:
        return (None,) * 8
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = linear_kl_bwd(
        grad_N, *ctx.saved_tensors, ctx.reverse, ctx.temperature, ctx.chunk_bytes, need_hidden, need_weight
    )
    return (grad_hidden if need_hidden else None, grad_weight if need_weight else None, *(None,) * 6)


linear_kl_fwd.register_autograd(_grads, setup_context=_save)


# ---- chunks ---------------------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32: widened on the CPU, float32 accumulation and result on CUDA. Always into `out`: autocast would
    turn a product without it into half precision."""
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if out is None else out
    if a.device.type == "cpu" or a.dtype == torch.float32:
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(out32: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        out32.addmm_(a, b.float())
    else:
        torch.addmm(out32, a, b, out_dtype=torch.float32, out=out32)


def _chunks(x, w, x2, w2, inv_t, chunk_bytes):
    """(first row, end, z, z', scratch) over the rows: [padded rows, V] float32 logits of both heads, less their row's
    maximum. All three are the caller's to overwrite."""
    M, V = x.shape[0], w.shape[0]
    if M == 0:
        return
    rows = _padded(max(1, min(M, chunk_bytes // (12 * V))))
    buffer = torch.empty(3, rows, V, dtype=torch.float32, device=x.device)
    for r in range(0, M, rows):
        e = min(r + rows, M)
        padded = _padded(e - r)
        z, z2, scratch = buffer[:, :padded]
        for logits, hidden, weight in ((z, x, w), (z2, x2, w2)):
            _product(_pad_rows(hidden[r:e], padded), weight.T, out=logits).mul_(inv_t)
            logits.sub_(logits.amax(1, keepdim=True))
        yield r, e, z, z2, scratch
