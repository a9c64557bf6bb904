"""Log-probability of target tokens from hidden states and a head, without the [N, V] logits; forward and backward.

    z_iv = <hidden_i, weight_v> / temperature      logp_i = z_iy - log sum_v exp z_iv      (y = targets_i)
    entropy_i = - sum_v p_iv log p_iv              p_iv = exp(z_iv) / sum_u exp z_iu

Method: target-anchored softmax. The offset of a row is its own target logit k_i = z_iy, a cheap row dot, and not the
row maximum:

    E_iv = exp(z_iv - k_i)      S_i = sum_v E_iv = 1 / p_i(y)      U_i = sum_v E_iv (z_iv - k_i)
    logp_i = -log S_i           entropy_i = log S_i - U_i / S_i

One pass over the vocabulary, no running maximum, no rescaling. The target was sampled from (nearly) this
distribution, so S is not large; a row with logp < -60 or a sum that is not finite is redone with k_i = max_v z_iv
(the guard path). With upstream gradients c_i on logp and h_i on entropy,

    dL/dz_iv = c_i [v = y] - E_iv / S_i * (c_i + h_i (z_iv - k_i - U_i / S_i)),

which for h = 0 is a per-row scale of E' (E with S_i subtracted at the target): dX and dW are plain matrix products on
E' with [N]-sized scales. E' of the first `cache_bytes` worth of rows is kept from the forward, the rest is recomputed
with the same anchor: three matrix products for forward and backward where everything is kept, four where nothing is.
On the CPU a vocabulary of one block (2048) takes the row's maximum as the anchor, in one native pass: E = p, S = 1, the
same products.

Promises: log-probabilities, entropies and input gradients are float32 inside; dW is accumulated in float32 and
rounded once. On the CPU, logp, entropy and dX of a row are the same bits in any row order, batch or cache size for one
number of threads (the matrix products run on multiples of 16 rows; a test holds the BLAS to it), and dW is bitwise
repeatable. logp is never positive beyond rounding of the guard path.

Letters: N rows (tokens), H hidden width, V vocabulary, R cached rows, M live rows. Natural logarithms (nats)
throughout.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from m2rl_kernels import native

GUARD_LOGP = -60.0  # below this (p < 1e-26) the anchor moves to the row maximum; float32 overflows at e^88
DEFAULT_CACHE_BYTES = 5 << 30
ROW_MULTIPLE = 16  # CPU: products of 8 or more rows give a row the same bits whatever its neighbours; 1 row does not
VOCAB_BLOCK = 2048  # CPU: a [256, 2048] float32 block stays in the last-level cache between its passes
BLOCK_ELEMENTS = 256 * 2048
SHORT_ROW = 4096  # the longest that softmax_rows takes: kSoftmaxRow in csrc/softmax_blocks.h
SOFTMAX_ROWS = 512  # CPU, vocabularies of one block: rows per product and softmax of the forward


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    live: Tensor | None = None,
    return_entropy: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    tp_group=None,
):
    """Log-probability [N] (float32, nats) of `targets` under softmax(hidden @ weight.T / temperature); with
    `return_entropy` the pair (logp, entropy). Differentiable with respect to hidden and weight, through either
    output.

    hidden [N, H] and weight [V, H]: one dtype of float16, bfloat16, float32 (float64 runs the reference, for
        gradcheck), any strides; on CUDA H is a multiple of 8. Any V >= 1 and N >= 0.
    targets [N]: int64 or int32 in [0, V); targets of dead rows are not read.
    live [N] bool: rows that are False return exactly 0, get a zero gradient and cost nothing. On CUDA a `live` on the
        device costs one synchronisation (to size the compaction); a `live` on the CPU costs none.
    cache_bytes: budget for exponentials kept for the backward (float32 on the CPU, hidden's dtype on CUDA); more rows
        kept means fewer recomputed, never other bits.
    tp_group: process group over which the vocabulary is sharded in equal parts by rank; weight is this rank's
        [V / size, H], hidden and targets (global ids) are replicated, the gradient of hidden is summed over the group.
        Nothing is cached then (four matrix products), and a row on the guard path costs one more reduction.

    On CUDA a target outside [0, V) gives NaN (a check would wait for the device); on the CPU it is a ValueError, inside
    torch.compile NaN (a vocabulary of one block) or an IndexError. A ValueError names the argument, the rule and the
    value. ImportError: CUDA tensors without Triton; on the CPU a vocabulary of one block without the C++ library.
    Second derivatives and torch.func transforms are errors.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature, live, cache_bytes, tp_group)
    if tp_group is not None:
        rows_M = _live_rows(live, hidden_NH.device)
        logp_N, entropy_N = _TensorParallel.apply(
            hidden_NH, weight_VH, targets_N, rows_M, float(temperature), return_entropy, tp_group
        )
        return (logp_N, entropy_N) if return_entropy else logp_N
    if hidden_NH.dtype == torch.float64:
        return linear_logprob_ref(hidden_NH, weight_VH, targets_N, temperature, live, return_entropy)
    rows_M = _live_rows(live, hidden_NH.device)
    needs_grad = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    cached = _cached_rows(hidden_NH, weight_VH, rows_M, cache_bytes) if needs_grad else 0
    logp_N, entropy_N, _, _ = linear_logprob_fwd(
        hidden_NH, weight_VH, targets_N, rows_M, float(temperature), cached, return_entropy
    )
    return (logp_N, entropy_N) if return_entropy else logp_N


def linear_logprob_ref(hidden_NH, weight_VH, targets_N, temperature=1.0, live=None, return_entropy=False):
    """The definition, in float32 or float64, with torch's autograd."""
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    live = torch.ones_like(targets_N, dtype=torch.bool) if live is None else live.to(hidden_NH.device)
    logp_NV = (hidden_NH.to(dtype) @ weight_VH.to(dtype).T / temperature).log_softmax(-1)
    targets_N = torch.where(live, targets_N, 0).long()
    logp_N = torch.where(live, logp_NV.gather(1, targets_N[:, None])[:, 0], 0.0)
    entropy_N = torch.where(live, -(logp_NV.exp() * logp_NV).sum(-1), 0.0)
    return (logp_N, entropy_N) if return_entropy else logp_N


@dataclass(frozen=True, slots=True)
class Saved:
    """What `linear_logprob_forward` keeps for `linear_logprob_backward`."""

    hidden_NH: Tensor
    weight_VH: Tensor
    targets_N: Tensor
    rows_M: Tensor | None  # int64 live rows, ascending; None = all
    stats_4M: Tensor  # float32: target logit, anchor k, S, U
    cache_RV: Tensor  # E' of the first R live rows
    temperature: float
    with_entropy: bool


def linear_logprob_forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    live: Tensor | None = None,
    return_entropy: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> tuple[Tensor, Tensor | None, Saved]:
    """(logp [N], entropy [N] or None, saved) outside autograd, for a caller that runs `linear_logprob_backward` itself.

    Arguments and errors as for `linear_logprob`; float16, bfloat16 or float32 only. `saved` holds the inputs, 16 bytes
    per live row and at most `cache_bytes` of exponentials.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature, live, cache_bytes, None)
    _require(hidden_NH.dtype != torch.float64, "hidden must be float16, bfloat16 or float32 here, got torch.float64")
    rows_M = _live_rows(live, hidden_NH.device)
    cached = _cached_rows(hidden_NH, weight_VH, rows_M, cache_bytes)
    with torch.no_grad():
        logp_N, entropy_N, stats_4M, cache_RV = linear_logprob_fwd(
            hidden_NH, weight_VH, targets_N, rows_M, float(temperature), cached, return_entropy
        )
    saved = Saved(
        hidden_NH.detach(),
        weight_VH.detach(),
        targets_N,
        rows_M,
        stats_4M,
        cache_RV,
        float(temperature),
        return_entropy,
    )
    return logp_N, entropy_N if return_entropy else None, saved


def linear_logprob_backward(
    saved: Saved, grad_logp_N: Tensor, grad_entropy_N: Tensor | None = None, *, grad_weight_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(grad_hidden [N, H], grad_weight [V, H]) in the inputs' dtype, from the upstream gradients of logp [N] and, when
    the forward returned it, of the entropy [N] (any floating dtype, hidden's device). With `grad_weight_out` (float32
    [V, H], contiguous) the weight's gradient is added into it instead, in float32, and the second result is None:
    gradients of many bins accumulate without rounding. ValueError names the argument, the rule and the value."""
    weight_VH = saved.weight_VH
    N, out = saved.hidden_NH.shape[0], grad_weight_out
    _require(grad_logp_N.shape == (N,), lambda: f"grad_logp must have shape [N] = [{N}], got {list(grad_logp_N.shape)}")
    if grad_entropy_N is not None:
        _require(saved.with_entropy, "grad_entropy must be None unless the forward ran with return_entropy=True")
        _require(
            grad_entropy_N.shape == (N,),
            lambda: f"grad_entropy must have shape [N] = [{N}], got {list(grad_entropy_N.shape)}",
        )
    if out is not None:
        _require(out.dtype == torch.float32, lambda: f"grad_weight_out must be float32, got {out.dtype}")
        _require(
            out.shape == weight_VH.shape and out.is_contiguous() and out.device == weight_VH.device,
            lambda: (
                f"grad_weight_out must be contiguous, [V, H] = {list(weight_VH.shape)} on {weight_VH.device}, "
                f"got {list(out.shape)} with strides {out.stride()} on {out.device}"
            ),
        )
    with torch.no_grad():
        return _backward(
            grad_logp_N,
            grad_entropy_N,
            saved.hidden_NH,
            weight_VH,
            saved.targets_N,
            saved.rows_M,
            saved.stats_4M,
            saved.cache_RV,
            saved.temperature,
            True,
            True,
            out,
        )


# ---- checks and sizes ----------------------------------------------------------------------------------------------


def _require(condition, message) -> None:
    if not condition:
        raise ValueError(message() if callable(message) else message)


def _check_temperature(temperature) -> None:
    """Its reciprocal becomes a float32 factor."""
    _require(1e-30 <= temperature <= 1e30, lambda: f"temperature must be in [1e-30, 1e30], got {temperature}")


def _check(hidden_NH, weight_VH, targets_N, temperature, live, cache_bytes, tp_group) -> None:
    _require(hidden_NH.dim() == 2, lambda: f"hidden must have shape [N, H], got {list(hidden_NH.shape)}")
    _require(
        weight_VH.dim() == 2 and weight_VH.shape[1] == hidden_NH.shape[1] and weight_VH.shape[0] > 0,
        lambda: f"weight must have shape [V, H] with H = {hidden_NH.shape[1]}, V > 0, got {list(weight_VH.shape)}",
    )
    N, V = hidden_NH.shape[0], weight_VH.shape[0]
    _require(
        hidden_NH.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        lambda: f"hidden must be float16, bfloat16, float32 or float64, got {hidden_NH.dtype}",
    )
    _require(
        weight_VH.dtype == hidden_NH.dtype,
        lambda: f"weight must have the dtype of hidden, {hidden_NH.dtype}, got {weight_VH.dtype}",
    )
    _require(
        hidden_NH.shape[1] % 8 == 0 or not hidden_NH.is_cuda,
        lambda: f"hidden's width H must be a multiple of 8 on CUDA, got {hidden_NH.shape[1]}",
    )
    _require(targets_N.shape == (N,), lambda: f"targets must have shape [N] = [{N}], got {list(targets_N.shape)}")
    _require(
        targets_N.dtype in (torch.int64, torch.int32), lambda: f"targets must be int64 or int32, got {targets_N.dtype}"
    )
    _require(
        weight_VH.device == hidden_NH.device and targets_N.device == hidden_NH.device,
        lambda: (
            f"weight and targets must be on hidden's device, {hidden_NH.device}, got {weight_VH.device} and "
            f"{targets_N.device}"
        ),
    )
    _require(
        tp_group is None or hidden_NH.dtype != torch.float64,
        "hidden must be float16, bfloat16 or float32 with tp_group, got torch.float64",
    )
    _check_temperature(temperature)
    _require(cache_bytes >= 0, lambda: f"cache_bytes must be at least 0, got {cache_bytes}")
    if live is not None:
        _require(
            live.dtype == torch.bool and live.shape == (N,),
            lambda: f"live must be bool of shape [N] = [{N}], got {live.dtype} {list(live.shape)}",
        )
    if targets_N.device.type == "cpu" and N > 0 and not torch.compiler.is_compiling():
        # On CUDA this check would wait for the device; there a target out of range gives NaN.
        used = targets_N if live is None else targets_N[live]
        if used.numel():
            low, high = (int(x) for x in torch.aminmax(used))
            total = V if tp_group is None else V * torch.distributed.get_world_size(tp_group)
            _require(low >= 0 and high < total, f"targets must be in [0, V) = [0, {total}), got {low} .. {high}")


def _live_rows(live: Tensor | None, device: torch.device) -> Tensor | None:
    return None if live is None else live.nonzero()[:, 0].to(device, non_blocking=True)


def _tile_rows(V: int) -> int:
    """CPU rows per block: BLOCK_ELEMENTS elements, a multiple of ROW_MULTIPLE."""
    return max(64, min(2048, BLOCK_ELEMENTS // min(V, VOCAB_BLOCK))) // ROW_MULTIPLE * ROW_MULTIPLE


def _padded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def _cached_rows(hidden_NH: Tensor, weight_VH: Tensor, rows_M: Tensor | None, cache_bytes: int) -> int:
    """How many live rows keep E' for the backward: whole tiles, or all rows."""
    M, V = (hidden_NH.shape[0] if rows_M is None else rows_M.shape[0]), weight_VH.shape[0]
    if hidden_NH.is_cuda:
        if hidden_NH.dtype == torch.float16:
            return 0  # exp(z - k) overflows float16: recomputed in the backward, scaled by 1 / S
        fits = cache_bytes // (_cache_columns(hidden_NH, V) * hidden_NH.element_size())
        return M if fits >= M else fits // 128 * 128
    fits, tile = cache_bytes // (V * 4), _tile_rows(V)
    return _padded(M) if fits >= _padded(M) else fits // tile * tile


def _cache_columns(hidden_NH: Tensor, V: int) -> int:
    """Row stride of the cache: on CUDA rows start on 128 bytes for any V."""
    return -(-V // 64) * 64 if hidden_NH.is_cuda else V


def _new_cache(hidden_NH: Tensor, rows: int, V: int) -> Tensor:
    dtype = hidden_NH.dtype if hidden_NH.is_cuda else torch.float32
    return hidden_NH.new_empty(rows, _cache_columns(hidden_NH, V), dtype=dtype)


def _triton():
    """The Triton half; ImportError with the command that installs Triton."""
    try:
        from . import linear_logprob_triton
    except ImportError as error:
        if error.name not in ("triton", None) and not str(error.name).startswith("triton"):
            raise
        raise ImportError("linear_logprob on CUDA tensors needs Triton: pip install 'triton>=3.6'") from error
    return linear_logprob_triton


# ---- torch.library operations --------------------------------------------------------------------------------------


@torch.library.custom_op("m2rl::linear_logprob_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def linear_logprob_fwd(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    rows_M: Tensor | None,
    temperature: float,
    cached_rows: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N], stats [4, M], cache [R, V]); entropy is empty without `with_entropy`."""
    N, V, inv_t = hidden_NH.shape[0], weight_VH.shape[0], 1.0 / temperature
    x_MH = _gather(hidden_NH, rows_M)
    y_M = _gather(targets_N, rows_M).long()
    cache_RV = _new_cache(hidden_NH, cached_rows, V)
    forward = _triton().forward if hidden_NH.is_cuda else _forward_cpu
    with torch.cuda.device_of(hidden_NH):  # Triton launches on the current device
        stats_4M = forward(x_MH, weight_VH, y_M, inv_t, with_entropy, cache_RV)
    target_M, anchor_M, S_M, U_M = stats_4M
    log_S_M = S_M.log()
    logp_N = _spread(target_M - anchor_M - log_S_M, rows_M, N)
    entropy_N = _spread(log_S_M - U_M / S_M, rows_M, N) if with_entropy else logp_N.new_empty(0)
    return logp_N, entropy_N, stats_4M, cache_RV


@linear_logprob_fwd.register_fake
def _(hidden_NH, weight_VH, targets_N, rows_M, temperature, cached_rows, with_entropy):
    N, V = hidden_NH.shape[0], weight_VH.shape[0]
    M = N if rows_M is None else rows_M.shape[0]
    new = lambda *shape: hidden_NH.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return new(N), new(N if with_entropy else 0), new(4, M), _new_cache(hidden_NH, cached_rows, V)


@torch.library.custom_op("m2rl::linear_logprob_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def linear_logprob_bwd(
    grad_logp_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    rows_M: Tensor | None,
    stats_4M: Tensor,
    cache_RV: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_hidden [N, H], grad_weight [V, H]), each empty when not needed."""
    grad_hidden, grad_weight = _backward(
        grad_logp_N,
        grad_entropy_N,
        hidden_NH,
        weight_VH,
        targets_N,
        rows_M,
        stats_4M,
        cache_RV,
        temperature,
        need_hidden,
        need_weight,
        None,
    )
    return (
        hidden_NH.new_empty(0) if grad_hidden is None else grad_hidden,
        hidden_NH.new_empty(0) if grad_weight is None else grad_weight,
    )


@linear_logprob_bwd.register_fake
def _(
    grad_logp_N,
    grad_entropy_N,
    hidden_NH,
    weight_VH,
    targets_N,
    rows_M,
    stats_4M,
    cache_RV,
    temperature,
    need_hidden,
    need_weight,
):
    return (
        hidden_NH.new_empty(hidden_NH.shape if need_hidden else 0),
        hidden_NH.new_empty(weight_VH.shape if need_weight else 0),
    )


def _save(ctx, inputs, output) -> None:
    hidden_NH, weight_VH, targets_N, rows_M, ctx.temperature, _, ctx.with_entropy = inputs
    _, _, stats_4M, cache_RV = output
    ctx.mark_non_differentiable(stats_4M, cache_RV)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_NH, weight_VH, targets_N, rows_M, stats_4M, cache_RV)


def _grads(ctx, grad_logp_N, grad_entropy_N, _stats, _cache):
    grad_entropy_N = grad_entropy_N if ctx.with_entropy else None
    if grad_logp_N is None and grad_entropy_N is None:
        return (None,) * 7
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = linear_logprob_bwd(
        grad_logp_N, grad_entropy_N, *ctx.saved_tensors, ctx.temperature, need_hidden, need_weight
    )
    return (grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None, None, None)


linear_logprob_fwd.register_autograd(_grads, setup_context=_save)


def _gather(x: Tensor, rows_M: Tensor | None) -> Tensor:
    return x if rows_M is None else x.index_select(0, rows_M)


def _spread(x_M: Tensor, rows_M: Tensor | None, N: int) -> Tensor:
    return x_M if rows_M is None else x_M.new_zeros(N, *x_M.shape[1:]).index_copy_(0, rows_M, x_M)


def _backward(
    grad_logp_N,
    grad_entropy_N,
    hidden_NH,
    weight_VH,
    targets_N,
    rows_M,
    stats_4M,
    cache_RV,
    temperature,
    need_hidden,
    need_weight,
    grad_weight_out,
):
    N, inv_t = hidden_NH.shape[0], 1.0 / temperature
    c_M = torch.zeros_like(stats_4M[0]) if grad_logp_N is None else _gather(grad_logp_N, rows_M).float()
    h_M = None if grad_entropy_N is None else _gather(grad_entropy_N, rows_M).float()
    backward = _triton().backward if hidden_NH.is_cuda else _backward_cpu
    x_MH, y_M = _gather(hidden_NH, rows_M), _gather(targets_N, rows_M).long()
    with torch.cuda.device_of(hidden_NH):
        grad_x_MH, grad_weight = backward(
            c_M, h_M, x_MH, weight_VH, y_M, stats_4M, cache_RV, inv_t, need_hidden, need_weight, grad_weight_out
        )
    return _spread(grad_x_MH, rows_M, N) if need_hidden else None, grad_weight


# ---- CPU -----------------------------------------------------------------------------------------------------------
# float32 throughout: half-precision weights are widened one vocabulary block at a time. Loops: vocabulary blocks
# outside, row tiles inside, so that a block of weight is widened once and the [tile, block] exponentials stay in
# cache between their passes.


def _blocks(V: int):
    return ((v, min(v + VOCAB_BLOCK, V)) for v in range(0, V, VOCAB_BLOCK))


def _tiles(rows: int, tile: int, first: int = 0):
    return ((r, min(r + tile, rows)) for r in range(first, rows, tile))


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _pad_rows(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """x with `value` rows appended up to `rows`."""
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), value)])


def _target_logits_cpu(x_MH, weight_VH, y_M, inv_t) -> Tensor:
    """Row dots. index_select, because weight[-100] would be a row: a compiled call's targets are not checked."""
    target_M = torch.empty(x_MH.shape[0])
    for r, e in _tiles(x_MH.shape[0], 2048):
        torch.sum(x_MH[r:e] * weight_VH.index_select(0, y_M[r:e]).float(), 1, out=target_M[r:e])
    return target_M.mul_(inv_t)


def _put_at_target(block, y_tile, v, value_tile) -> None:
    """block[i, y_i - v] = value_i in those rows whose target lies in this block."""
    local = (y_tile - v)[:, None]
    inside = (local >= 0) & (local < block.shape[1])
    local = torch.where(inside, local, 0)
    block.scatter_(1, local, torch.where(inside, value_tile[:, None], block.gather(1, local)))


def _logits(out, x_tile, w_block_T, inv_t) -> Tensor:
    torch.mm(x_tile, w_block_T, out=out)
    return out if inv_t == 1.0 else out.mul_(inv_t)


def _sums_cpu(x_MH, weight_VH, y_M, target_M, anchor_M, inv_t, with_entropy, cache_RV) -> tuple[Tensor, Tensor]:
    """S, U of padded rows; E into the cache's rows."""
    M, V, R = x_MH.shape[0], weight_VH.shape[0], cache_RV.shape[0]
    tile = min(_tile_rows(V), M)
    S_M, U_M = torch.zeros(M), torch.zeros(M)
    scratch = torch.empty(2, tile * min(V, VOCAB_BLOCK))
    for v, ve in _blocks(V):
        w_T = _widen(weight_VH[v:ve]).T
        for r, re in _tiles(M, tile):
            n = (re - r) * (ve - v)
            E = cache_RV[r:re, v:ve] if re <= R else scratch[0, :n].view(re - r, ve - v)
            d = scratch[1, :n].view(re - r, ve - v) if with_entropy else E
            _logits(d, x_MH[r:re], w_T, inv_t).sub_(anchor_M[r:re, None])
            _put_at_target(d, y_M[r:re], v, target_M[r:re] - anchor_M[r:re])
            torch.exp(d, out=E)
            S_M[r:re] += E.sum(1)
            if with_entropy:
                U_M[r:re] += d.mul_(E).sum(1)
    return S_M, U_M


def _forward_cpu(x_MH, weight_VH, y_M, inv_t, with_entropy, cache_RV) -> Tensor:
    """stats [4, M]: target logit, anchor, S, U. Fills the cache with E'."""
    M, R = x_MH.shape[0], cache_RV.shape[0]
    if M == 0:
        return torch.empty(4, 0)
    x = _pad_rows(_widen(x_MH), _padded(M))
    y = _pad_rows(y_M, _padded(M)).contiguous()
    if weight_VH.shape[0] <= VOCAB_BLOCK:
        return _forward_softmax_cpu(x, weight_VH, y, inv_t, with_entropy, cache_RV)[:, :M].contiguous()
    target = anchor = _target_logits_cpu(x, weight_VH, y, inv_t)
    S, U = _sums_cpu(x, weight_VH, y, target, anchor, inv_t, with_entropy, cache_RV)
    at_target = 1 - S
    bad = ~(S.log() <= -GUARD_LOGP)
    if bad.any():
        anchor = target.clone()
        _guard_cpu(bad.nonzero()[:, 0], x, weight_VH, y, target, anchor, S, U, inv_t, with_entropy, cache_RV)
        at_target = (target - anchor).exp() - S
    if R:
        cache_RV.scatter_(1, y[:R, None], at_target[:R, None])
    return torch.stack([target, anchor, S, U])[:, :M].contiguous()


def _forward_softmax_cpu(x, weight_VH, y, inv_t, with_entropy, cache_RV) -> Tensor:
    """The same where a row fits one block: softmax in one native pass, with the row's maximum as the anchor. E' is then
    p (less 1 at the target), and stats are log p of the target, 0, 1 and sum p log p."""
    M, V, R = x.shape[0], weight_VH.shape[0], cache_RV.shape[0]
    tile, w_T = min(SOFTMAX_ROWS, M), _widen(weight_VH).T
    stats = torch.zeros(4, M)
    logp, _, S, U = stats
    S.fill_(1.0)
    scratch = torch.empty(tile * V if R < M else 0)
    for r, re in itertools.chain(_tiles(R, tile), _tiles(M, tile, R)):
        z = cache_RV[r:re] if re <= R else scratch[: (re - r) * V].view(-1, V)
        torch.mm(x[r:re], w_T, out=z)
        softmax_rows(z, y[r:re], inv_t, z if re <= R else None, logp[r:re], U[r:re] if with_entropy else None)
    return stats


def softmax_rows(z, y, inv_t, grad, logp, plogp=None, weight=None) -> None:
    """CPU, float32, contiguous, at most SHORT_ROW columns: p = softmax(z inv_t) by rows, logp = log p[y]; plogp = sum
    p log p and grad = (p - onehot(y)) weight unless None. grad may be z; without weight [rows] it is 1."""
    native.cpu().m2rl_softmax_rows(
        ctypes.c_void_p(z.data_ptr()),
        ctypes.c_int64(z.shape[0]),
        ctypes.c_int64(z.shape[1]),
        ctypes.c_float(inv_t),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(None if weight is None else weight.data_ptr()),
        ctypes.c_void_p(None if grad is None else grad.data_ptr()),
        ctypes.c_void_p(logp.data_ptr()),
        ctypes.c_void_p(None if plogp is None else plogp.data_ptr()),
        ctypes.c_int32(torch.get_num_threads()),
    )


def _guard_cpu(rows, x, weight_VH, y, target, anchor, S, U, inv_t, with_entropy, cache_RV) -> None:
    """Redoes `rows` with the row maximum as the anchor, in place."""
    V, padded, count = weight_VH.shape[0], _padded(rows.shape[0]), rows.shape[0]
    index = _pad_rows(rows, padded)
    x_B, y_B, target_B = x[index], y[index], target[index]
    anchor_B = target_B.clone()
    z = torch.empty(padded * min(V, VOCAB_BLOCK))
    for v, ve in _blocks(V):
        _logits(z_block := z[: padded * (ve - v)].view(padded, -1), x_B, _widen(weight_VH[v:ve]).T, inv_t)
        anchor_B = torch.maximum(anchor_B, z_block.amax(1))
    kept = rows < cache_RV.shape[0]
    E_BV = torch.empty(padded if kept.any() else 0, V)
    S_B, U_B = _sums_cpu(x_B, weight_VH, y_B, target_B, anchor_B, inv_t, with_entropy, E_BV)
    anchor[rows], S[rows], U[rows] = anchor_B[:count], S_B[:count], U_B[:count]
    if E_BV.shape[0]:
        cache_RV[rows[kept]] = E_BV[:count][kept]


def _backward_cpu(
    c_M,
    h_M,
    x_MH,
    weight_VH,
    y_M,
    stats_4M,
    cache_RV,
    inv_t,
    need_hidden,
    need_weight,
    grad_weight_out,
    sharded=False,
):
    """(grad_x [M, H] or None, grad_weight [V, H] or None), from E' cached or recomputed."""
    M, (V, H), R, dtype = x_MH.shape[0], weight_VH.shape, cache_RV.shape[0], weight_VH.dtype
    padded, by_softmax = _padded(M), V <= VOCAB_BLOCK and not sharded  # as the forward did it
    if M == 0:
        grad_weight = torch.zeros(V, H, dtype=dtype) if need_weight and grad_weight_out is None else None
        return torch.zeros(0, H, dtype=dtype) if need_hidden else None, grad_weight
    x, y = _pad_rows(_widen(x_MH), padded), _pad_rows(y_M, padded).contiguous()
    target, anchor, S, U = stats_4M if padded == M else _pad_rows(stats_4M.T, padded, 1.0).T
    c = _pad_rows(c_M, padded)
    h = None if h_M is None else _pad_rows(h_M, padded)
    e_target, tile = (target - anchor).exp(), min(_tile_rows(V), padded)
    scale = -inv_t / S
    if h is None:  # dz = scale E', E' at the target = E - S
        scale, at_target = scale * c, e_target - S
    else:  # dz = scale F, F = E (alpha + h (z - k)), minus c S at the target
        alpha = c - h * U / S
        at_target = e_target * (alpha + h * (target - anchor)) - c * S
    xs = x * scale[:, None]
    grad_x = torch.empty(padded, H) if need_hidden else None
    grad_weight = torch.empty(V, H, dtype=dtype) if need_weight and grad_weight_out is None else None
    direct = grad_weight if grad_weight is not None and dtype == torch.float32 else grad_weight_out  # summed in place
    scratch = torch.empty(2, tile * min(V, VOCAB_BLOCK))
    for v, ve in _blocks(V):
        w = _widen(weight_VH[v:ve])
        grad_w = None
        if need_weight:
            grad_w = torch.empty(ve - v, H) if direct is None else direct[v:ve]
        for r, re in _tiles(padded, tile):
            n = (re - r) * (ve - v)
            if re <= R:
                E = cache_RV[r:re, v:ve]
            else:
                E = scratch[0, :n].view(re - r, ve - v)
                if by_softmax:
                    torch.mm(x[r:re], w.T, out=E)
                    softmax_rows(E, y[r:re], inv_t, E, torch.empty(re - r))
                else:
                    _logits(E, x[r:re], w.T, inv_t).sub_(anchor[r:re, None]).exp_()
            F = E
            if h is not None:
                F = scratch[1, :n].view(re - r, ve - v)
                torch.xlogy(E, E, out=F).mul_(h[r:re, None]).addcmul_(E, alpha[r:re, None])
            if h is not None or (re > R and not by_softmax):
                _put_at_target(F, y[r:re], v, at_target[r:re])
            if grad_x is not None:
                torch.addmm(grad_x[r:re], F, w, beta=float(v > 0), out=grad_x[r:re])
            if grad_w is not None:
                torch.addmm(grad_w, F.T, xs[r:re], beta=float(r > 0 or grad_weight_out is not None), out=grad_w)
        if grad_w is not None and grad_weight is not None and direct is None:
            grad_weight[v:ve] = grad_w
    if grad_x is not None:
        grad_x = grad_x.mul_(scale[:, None])[:M].to(dtype)
    return grad_x, grad_weight


# ---- tensor parallel: the vocabulary in equal shards ----------------------------------------------------------------
# The anchored sums of the shards simply add up: two all-reduces of [M] vectors, no maximum to agree on.


class _TensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, rows_M, temperature, with_entropy, group):
        from torch import distributed as dist

        N, V, inv_t = hidden_NH.shape[0], weight_VH.shape[0], 1.0 / temperature
        x_MH = _gather(hidden_NH, rows_M)
        y_M = _gather(targets_N, rows_M).long()
        nowhere_M = (y_M < 0) | (y_M >= dist.get_world_size(group) * V)
        y_M = y_M - dist.get_rank(group) * V  # outside [0, V) on the other ranks
        target_M = _shard_target_logits(x_MH, weight_VH, y_M, inv_t)
        dist.all_reduce(target_M, group=group)
        target_M.masked_fill_(nowhere_M, float("nan"))
        anchor_M = target_M.clone()
        sums_2M = _shard_sums(x_MH, weight_VH, y_M, target_M, anchor_M, inv_t, with_entropy)
        dist.all_reduce(sums_2M, group=group)
        bad = (~(sums_2M[0].log() <= -GUARD_LOGP)).nonzero()[:, 0]  # the same rows on every rank
        if bad.numel():
            best = (
                torch.stack([(x_MH[bad] @ weight_VH[v:ve].T).float().amax(1) for v, ve in _blocks(V)]).amax(0) * inv_t
            )
            dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
            anchor_M[bad] = torch.maximum(best, target_M[bad])
            again = _shard_sums(x_MH[bad], weight_VH, y_M[bad], target_M[bad], anchor_M[bad], inv_t, with_entropy)
            dist.all_reduce(again, group=group)
            sums_2M[:, bad] = again
        S_M, U_M = sums_2M
        ctx.save_for_backward(hidden_NH, weight_VH, y_M, rows_M, torch.stack([target_M, anchor_M, S_M, U_M]))
        ctx.inv_t, ctx.group = inv_t, group
        logp_N = _spread(target_M - anchor_M - S_M.log(), rows_M, N)
        return logp_N, _spread(S_M.log() - U_M / S_M, rows_M, N) if with_entropy else None

    @staticmethod
    def backward(ctx, *grads):
        hidden_NH, weight_VH, y_M, rows_M, stats_4M = ctx.saved_tensors
        c_M, h_M = (None if g is None else _gather(g, rows_M).float() for g in grads)
        x_MH, cache = _gather(hidden_NH, rows_M), _new_cache(hidden_NH, 0, weight_VH.shape[0])
        backward = _triton().backward if hidden_NH.is_cuda else functools.partial(_backward_cpu, sharded=True)
        with torch.cuda.device_of(hidden_NH):
            grad_x, grad_weight = backward(
                torch.zeros_like(stats_4M[0]) if c_M is None else c_M,
                h_M,
                x_MH,
                weight_VH,
                y_M,
                stats_4M,
                cache,
                ctx.inv_t,
                ctx.needs_input_grad[0],
                ctx.needs_input_grad[1],
                None,
            )
        if grad_x is not None:
            total = grad_x.float()
            torch.distributed.all_reduce(total, group=ctx.group)
            grad_x = _spread(total.to(grad_x.dtype), rows_M, hidden_NH.shape[0])
        return grad_x, grad_weight, None, None, None, None, None


def _shard_target_logits(x_MH, weight_VH, y_M, inv_t) -> Tensor:
    """Target logits, 0 where another shard holds the target."""
    if x_MH.is_cuda:
        with torch.cuda.device_of(x_MH):
            return _triton().target_logits(x_MH, weight_VH, y_M, inv_t, 0.0, torch.empty_like(y_M, dtype=torch.float32))
    inside = (y_M >= 0) & (y_M < weight_VH.shape[0])
    return torch.where(inside, _target_logits_cpu(_widen(x_MH), weight_VH, torch.where(inside, y_M, 0), inv_t), 0.0)


def _shard_sums(x_MH, weight_VH, y_M, target_M, anchor_M, inv_t, with_entropy) -> Tensor:
    """[2, M]: this shard's S and U."""
    M, padded = x_MH.shape[0], _padded(x_MH.shape[0])
    if x_MH.is_cuda:
        with torch.cuda.device_of(x_MH):
            return _triton().shard_sums(x_MH, weight_VH, y_M, target_M, anchor_M, inv_t, with_entropy)
    if M == 0:
        return torch.zeros(2, 0)
    x, y, target, anchor = _pad_rows(_widen(x_MH), padded), *(_pad_rows(t, padded) for t in (y_M, target_M, anchor_M))
    no_cache = torch.empty(0, weight_VH.shape[0])
    sums = _sums_cpu(x, weight_VH, y, target, anchor, inv_t, with_entropy, no_cache)
    return torch.stack(sums)[:, :M].contiguous()  # a collective reads a tensor by its address and count
