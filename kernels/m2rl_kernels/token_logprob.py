"""Log-probability of target tokens from given logits; forward and backward.

    logp_i = z_iy - log sum_v exp z_iv      entropy_i = -sum_v p_iv log p_iv      (z = logits / temperature,
                                                                                   y = targets_i)

The forward reads the logits once and keeps four numbers per row; the backward reads them once and writes their
gradient:

    dL/dz_iv = c_i [v = y] - p_iv (c_i + h_i (log p_iv + entropy_i)),      c, h: upstream gradients of logp and entropy.

As in linear_logprob the offset of the exponential is the target's own logit k, not the row maximum, so one pass is
enough; a row with logp < -60 or a sum that is not finite is redone with the row maximum. On the CPU a row of at most
4096 logits goes through one native pass with its maximum as the offset. Where the logits come from a head, use
`linear_logprob`, which never makes them.

Letters: N rows (tokens), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_logprob import GUARD_LOGP, SHORT_ROW, _check_temperature, _require, softmax_rows

TILE_ELEMENTS = 1 << 18  # CPU: rows are taken so many elements at a time, 1 MiB of float32
LOWEST = -200.0  # far below the last z - k whose exponential is not 0 in float32, and finite


def token_logprob(logits_NV: Tensor, targets_N: Tensor, *, temperature: float = 1.0, return_entropy: bool = False):
    """Log-probability [N] (float32, nats) of `targets` under softmax(logits / temperature); with `return_entropy` the
    pair (logp, entropy). Differentiable with respect to the logits, through either output; the gradient has the
    logits' dtype.

    logits [N, V]: float16, bfloat16, float32 (float64 runs the reference, for gradcheck), unit stride along V. A logit
        of -inf is a token that cannot be drawn: probability 0, gradient 0, nothing added to the entropy.
    targets [N]: int64 or int32 in [0, V). On CUDA a target outside gives NaN; on the CPU it is a ValueError.
    A ValueError names the argument, the rule and the value. ImportError: CUDA tensors without Triton; rows of at most
    4096 logits on the CPU without the C++ library.
    """
    _check(logits_NV, targets_N, temperature)
    if logits_NV.dtype == torch.float64:
        return token_logprob_ref(logits_NV, targets_N, temperature, return_entropy)
    logp_N, entropy_N, _ = token_logprob_fwd(logits_NV, targets_N, float(temperature), return_entropy)
    return (logp_N, entropy_N) if return_entropy else logp_N


def token_logprob_ref(logits_NV, targets_N, temperature=1.0, return_entropy=False):
    """The definition, in float32 or float64, with torch's autograd."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    logp_NV = (logits_NV.to(dtype) / temperature).log_softmax(-1)
    logp_N = logp_NV.gather(1, targets_N.long()[:, None])[:, 0]
    possible_NV = torch.where(logp_NV == -torch.inf, 0.0, logp_NV)  # 0 log 0 = 0
    return (logp_N, -(logp_NV.exp() * possible_NV).sum(-1)) if return_entropy else logp_N


def _check(logits_NV, targets_N, temperature) -> None:
    _require(
        logits_NV.dim() == 2 and logits_NV.shape[1] > 0,
        lambda: f"logits must have shape [N, V] with V > 0, got {list(logits_NV.shape)}",
    )
    N, V = logits_NV.shape
    _require(
        logits_NV.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        lambda: f"logits must be float16, bfloat16, float32 or float64, got {logits_NV.dtype}",
    )
    _require(
        logits_NV.stride(1) == 1, lambda: f"logits must have unit stride along V, got strides {logits_NV.stride()}"
    )
    _require(targets_N.shape == (N,), lambda: f"targets must have shape [N] = [{N}], got {list(targets_N.shape)}")
    _require(
        targets_N.dtype in (torch.int64, torch.int32), lambda: f"targets must be int64 or int32, got {targets_N.dtype}"
    )
    _require(
        targets_N.device == logits_NV.device,
        lambda: f"targets must be on logits' device, {logits_NV.device}, got {targets_N.device}",
    )
    _check_temperature(temperature)
    if targets_N.device.type == "cpu" and N > 0 and not torch.compiler.is_compiling():
        low, high = (int(t) for t in torch.aminmax(targets_N))
        _require(low >= 0 and high < V, lambda: f"targets must be in [0, V) = [0, {V}), got {low} .. {high}")


def _triton():
    """The Triton half; ImportError with the command that installs Triton."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError("token_logprob on CUDA tensors needs Triton: pip install 'triton>=3.6'") from error
    from . import token_logprob_triton

    return token_logprob_triton


@torch.library.custom_op("m2rl::token_logprob_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def token_logprob_fwd(
    logits_NV: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N], stats [4, N]: target logit, anchor k, S, U); entropy is empty without `with_entropy`."""
    forward = _triton().forward if logits_NV.is_cuda else _forward_cpu
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
        stats_4N = forward(logits_NV, targets_N, 1.0 / temperature, with_entropy)
    target_N, anchor_N, S_N, U_N = stats_4N
    log_S_N = S_N.log()
    entropy_N = log_S_N - U_N / S_N if with_entropy else log_S_N.new_empty(0)
    return target_N - anchor_N - log_S_N, entropy_N, stats_4N


@token_logprob_fwd.register_fake
def _(logits_NV, targets_N, temperature, with_entropy):
    N, f32 = logits_NV.shape[0], torch.float32
    return (
        logits_NV.new_empty(N, dtype=f32),
        logits_NV.new_empty(N if with_entropy else 0, dtype=f32),
        logits_NV.new_empty(4, N, dtype=f32),
    )


@torch.library.custom_op("m2rl::token_logprob_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def token_logprob_bwd(
    grad_logp_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    logits_NV: Tensor,
    targets_N: Tensor,
    stats_4N: Tensor,
    temperature: float,
) -> Tensor:
    """The gradient of the logits [N, V], contiguous, in their dtype."""
    inv_t = 1.0 / temperature
    _, anchor_N, S_N, U_N = stats_4N
    c_N = torch.zeros_like(S_N) if grad_logp_N is None else grad_logp_N.float()
    # dlogits = E (alpha + beta (z - k)) + [v = y] gamma
    alpha_N, gamma_N = -inv_t * c_N / S_N, inv_t * c_N
    beta_N = None
    if grad_entropy_N is not None:
        beta_N = -inv_t * grad_entropy_N.float() / S_N
        alpha_N = alpha_N - beta_N * U_N / S_N
    grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    backward = _triton().backward if logits_NV.is_cuda else _backward_cpu
    with torch.cuda.device_of(logits_NV):
        backward(grad_NV, logits_NV, targets_N, anchor_N, alpha_N, beta_N, gamma_N, inv_t)
    return grad_NV


@token_logprob_bwd.register_fake
def _(grad_logp_N, grad_entropy_N, logits_NV, targets_N, stats_4N, temperature):
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    logits_NV, targets_N, ctx.temperature, ctx.with_entropy = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_NV, targets_N, output[2])


def _grads(ctx, grad_logp_N, grad_entropy_N, _stats):
    grad_entropy_N = grad_entropy_N if ctx.with_entropy else None
    if grad_logp_N is None and grad_entropy_N is None:
        return None, None, None, None
    return token_logprob_bwd(grad_logp_N, grad_entropy_N, *ctx.saved_tensors, ctx.temperature), None, None, None


token_logprob_fwd.register_autograd(_grads, setup_context=_save)


# ---- CPU: a tile of rows at a time stays in cache between its passes -------------------------------------------------


def _tiles(N: int, V: int):
    rows = max(1, TILE_ELEMENTS // V)
    return ((r, min(r + rows, N)) for r in range(0, N, rows))


def _shifted(logits_tile: Tensor, anchor_tile: Tensor, inv_t: float) -> Tensor:
    """z - k in float32, a new tensor."""
    k = anchor_tile[:, None]
    if inv_t != 1.0:
        return (logits_tile.float() * inv_t).sub_(k)
    return logits_tile - k if logits_tile.dtype == torch.float32 else logits_tile.float().sub_(k)


def _row_sums(x: Tensor, add=torch.sum) -> Tensor:
    """add(x, 1). Twice for one row where others come in tiles: torch shares a single sum among its threads, and a row's
    bits would depend on its place."""
    return add(x, 1) if x.shape[0] > 1 or 2 * x.shape[1] > TILE_ELEMENTS else add(x.expand(2, -1), 1)[:1]


def _forward_cpu(logits_NV, targets_N, inv_t, with_entropy) -> Tensor:
    N, V = logits_NV.shape
    y_N = targets_N.long().contiguous()
    stats = torch.zeros(4, N)
    target, anchor, S, U = stats
    if V <= SHORT_ROW:  # E = p: logp itself in the place of the target logit, 0, 1 and sum p log p
        S.fill_(1.0)
        for r, e in _tiles(N, V):
            z = logits_NV[r:e].float().contiguous()
            softmax_rows(z, y_N[r:e], inv_t, None, target[r:e], U[r:e] if with_entropy else None)
        return stats
    target.copy_(logits_NV.gather(1, y_N[:, None])[:, 0]).mul_(inv_t)
    anchor.copy_(target)
    for r, e in _tiles(N, V):
        again = None
        for _ in range(2):
            d = _shifted(logits_NV[r:e], anchor[r:e], inv_t)
            if with_entropy:
                E = d.exp()
                S_tile, U_tile = _row_sums(E), _row_sums(d.mul_(E), torch.nansum)  # 0 * -inf: S tells of true NaNs
            else:
                S_tile, U_tile = _row_sums(d.exp_()), None
            S[r:e] = S_tile if again is None else torch.where(again, S_tile, S[r:e])
            if U_tile is not None:
                U[r:e] = U_tile if again is None else torch.where(again, U_tile, U[r:e])
            again = ~(S[r:e].log() <= -GUARD_LOGP)
            if not again.any():
                break
            anchor[r:e] = torch.where(again, (logits_NV[r:e].float() * inv_t).amax(1), anchor[r:e])
    return stats


def _backward_cpu(grad_NV, logits_NV, targets_N, anchor_N, alpha_N, beta_N, gamma_N, inv_t) -> None:
    y_N, (N, V) = targets_N.long().contiguous(), logits_NV.shape
    for r, e in _tiles(N, V):
        if V <= SHORT_ROW:
            z = logits_NV[r:e].float().contiguous()
            F = grad_NV[r:e] if grad_NV.dtype == torch.float32 else torch.empty_like(z)
            if beta_N is None:  # gamma = -alpha
                softmax_rows(z, y_N[r:e], inv_t, F, torch.empty(e - r), weight=alpha_N[r:e])
            else:
                softmax_rows(z, y_N[r:e], inv_t, F, torch.empty(e - r))
                p = F.scatter_add_(1, y_N[r:e, None], torch.ones(e - r, 1)).clamp_(min=0.0)
                F.copy_(torch.xlogy(p, p).mul_(beta_N[r:e, None]).addcmul_(p, alpha_N[r:e, None]))
                F.scatter_add_(1, y_N[r:e, None], gamma_N[r:e, None])
            if F.dtype != grad_NV.dtype:
                grad_NV[r:e] = F
            continue
        d = _shifted(logits_NV[r:e], anchor_N[r:e], inv_t)
        if beta_N is None:
            F = d.exp_().mul_(alpha_N[r:e, None])
        else:
            E = d.exp()
            F = d.clamp_(min=LOWEST).mul_(beta_N[r:e, None]).add_(alpha_N[r:e, None]).mul_(E)
        F.scatter_add_(1, y_N[r:e, None], gamma_N[r:e, None])
        grad_NV[r:e] = F
