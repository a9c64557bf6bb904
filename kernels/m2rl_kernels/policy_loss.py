"""Per-token policy losses and KL estimators on [N] vectors: closed-form gradients, statistics that stay on the device.

    loss = sum_t weight_t * ( tis_t * pg_t + kl_coef * KL_t - entropy_coef * entropy_t )

    r_t   = exp(logp_t - old_t);  gspo: exp(mean over the sequence of logp - old), one ratio for all of its tokens
    pg_t  = max(-A_t r_t, -A_t clip(r_t, 1 - eps_low, 1 + eps_high))   grpo, gspo; where A_t < 0 at most -dual_clip A_t
            -A_t sg[clip(r_t, 1 - eps_low, 1 + eps_high)] logp_t       cispo (sg: no gradient)
            -A_t logp_t                                                reinforce
    tis_t = sg[min(exp(old_t - behaviour_t), tis_cap)]                 truncated importance sampling
    KL_t  = -d (k1),  d^2 / 2 (k2),  exp(d) - d - 1 (k3)   with d = ref_t - logp_t

There is no denominator here: `weight` carries it, so the gradient cannot depend on how tokens were packed. A token of
weight 0 adds exactly 0 to the loss and to every gradient, whatever its other values are (NaN included; but under gspo
its log-probabilities are part of its sequence's ratio).

Sources: PPO 1707.06347, dual clip 1912.09729, GRPO 2402.03300, DAPO (eps_high) 2503.14476, CISPO 2506.13585, GSPO
2507.18071, k1/k2/k3: Schulman, "Approximating KL divergence", 2020. TRL writes CISPO's bound as its epsilon_high:
eps_low=1, eps_high=bound - 1.

Letters: N trained tokens, S sequences, D segments (domains). Log-probabilities are in nats, natural logarithm.
Cost: one read of at most seven [N] vectors, one write of one or two. One launch on CUDA (Triton).
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from m2rl_kernels import native

KINDS = ("grpo", "cispo", "gspo", "reinforce")  # M2rlLossKind in csrc/ops.h
KLS = ("k1", "k2", "k3")  # M2rlKl
STATS = (
    "count",  # tokens; every other column is a sum over them, so a mean is column / count
    "weight",  # weight
    "pull",  # weight * |advantage|: this segment's share of what drives the update
    "loss",  # weight * loss
    "logp",  # logp
    "entropy",  # entropy; 0 when not given
    "ratio",  # r: policy / old policy (per sequence for gspo)
    "clip",  # 1 where the clip (or the dual clip) takes the token's gradient away; cispo: where it changes its factor
    "mismatch_k1",  # behaviour - old: the sampling engine against the trainer; expectation KL(engine || trainer)
    "mismatch_k3",  # exp(d) - d - 1 with d = old - behaviour: the same expectation, never negative
    "mismatch_ratio",  # exp(|old - behaviour|)
    "tis",  # tis, after the cap; 1 without behaviour_logp or with tis_cap=None
    "tis_clip",  # 1 where the cap applied
    "kl_k1",  # logp - ref: expectation KL(policy || reference); 0 without ref_logp
    "kl_k3",  # exp(d) - d - 1 with d = ref - logp
)
"""Columns of the returned statistics: raw sums, to be added over bins and all-reduced over ranks before dividing."""


def policy_loss(
    logp_N: Tensor,
    behaviour_logp_N: Tensor | None,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kind: str = "grpo",
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    dual_clip: float | None = None,
    tis_cap: float | None = 2.0,
    kl: str = "k3",
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
    segment: Tensor | None = None,
    n_segments: int = 1,
) -> tuple[Tensor, Tensor]:
    """(loss, stats): the weighted sum of the tokens' losses, a float32 scalar differentiable in logp and entropy, and
    the raw sums [n_segments, len(STATS)] float32, without gradient, on the same device. No synchronisation. This file's
    head has the formulas of kind (one of KINDS), kl (one of KLS) and the clips; STATS names the columns of the sums.

    logp, behaviour_logp, advantage, weight, old_logp, ref_logp, entropy: [N] float32 (logp float64: the reference
    runs, for gradcheck). behaviour_logp None: no importance correction. old_logp None: strictly on-policy, old is logp
    without gradient. tis_cap None: no importance correction, the mismatch is still measured. dual_clip None: off;
    otherwise above 1. ref_logp None: no KL; kl_coef must then be 0. entropy is only measured while entropy_coef is 0.
    cu_seqlens: int32 [S+1] from 0 to N, needed by gspo alone; every token belongs to one sequence.
    segment: int64 [N] in [0, n_segments), the row of stats a token counts in; a value outside counts in none. None:
    all in row 0.

    First derivatives only. ValueError names the argument, the rule and the value.
    """
    tensors = {
        "behaviour_logp": behaviour_logp_N,
        "advantage": advantage_N,
        "weight": weight_N,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "entropy": entropy,
    }
    _check(
        logp_N,
        tensors,
        kind,
        eps_low,
        eps_high,
        dual_clip,
        tis_cap,
        kl,
        kl_coef,
        entropy_coef,
        cu_seqlens,
        segment,
        n_segments,
    )
    if logp_N.dtype == torch.float64:
        return policy_loss_ref(
            logp_N,
            behaviour_logp_N,
            advantage_N,
            weight_N,
            old_logp,
            ref_logp,
            kind,
            eps_low,
            eps_high,
            dual_clip,
            tis_cap,
            kl,
            kl_coef,
            entropy,
            entropy_coef,
            cu_seqlens,
            segment,
            n_segments,
        )
    loss, stats, _, _ = policy_loss_fwd(
        logp_N,
        behaviour_logp_N,
        advantage_N,
        weight_N,
        old_logp,
        ref_logp,
        entropy,
        cu_seqlens if kind == "gspo" else None,
        segment,
        kind,
        float(eps_low),
        float(eps_high),
        None if dual_clip is None else float(dual_clip),
        None if tis_cap is None else float(tis_cap),
        kl,
        float(kl_coef),
        float(entropy_coef),
        n_segments,
    )
    return loss, stats


def policy_loss_ref(
    logp,
    behaviour,
    advantage,
    weight,
    old=None,
    ref=None,
    kind="grpo",
    eps_low=0.2,
    eps_high=0.28,
    dual_clip=None,
    tis_cap=2.0,
    kl="k3",
    kl_coef=0.0,
    entropy=None,
    entropy_coef=0.0,
    cu_seqlens=None,
    segment=None,
    n_segments=1,
):
    """The definition, in the dtype of logp, with torch's autograd."""
    old = logp.detach() if old is None else old
    r = (_sequence_mean(logp - old, cu_seqlens) if kind == "gspo" else logp - old).exp()
    clipped = r.clamp(1 - eps_low, 1 + eps_high)
    uncorrected = behaviour is None or tis_cap is None
    tis = torch.ones_like(logp) if uncorrected else (old - behaviour).exp().clamp(max=tis_cap).detach()
    pg = -advantage * {"reinforce": logp, "cispo": clipped.detach() * logp}.get(kind, r)
    if kind in ("grpo", "gspo"):
        pg = torch.maximum(pg, -advantage * clipped)
        if dual_clip is not None:
            pg = torch.where(advantage < 0, torch.minimum(pg, -dual_clip * advantage), pg)
    d = torch.zeros_like(logp) if ref is None else ref - logp
    loss = tis * pg + kl_coef * {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kl]
    loss = loss if entropy is None else loss - entropy_coef * entropy
    loss = torch.where(weight == 0, 0.0, weight * loss)
    return loss.sum(), _stats_ref(locals())


def _stats_ref(v: dict) -> Tensor:
    """[n_segments, len(STATS)] from the reference's variables, as STATS defines the columns."""
    r, logp, A, weight, behaviour = v["r"], v["logp"], v["advantage"], v["weight"], v["behaviour"]
    zero, one = torch.zeros_like(logp), torch.ones_like(logp)
    low, high = r < 1 - v["eps_low"], r > 1 + v["eps_high"]
    if v["kind"] == "cispo":
        clip = (low | high) & (A != 0)
    elif v["kind"] == "reinforce":
        clip = zero
    else:
        clip = (A > 0) & high | (A < 0) & low
        clip = clip if v["dual_clip"] is None else clip | (A < 0) & (r > v["dual_clip"])
    m = zero if behaviour is None else v["old"] - behaviour
    columns = [
        one,
        weight,
        weight * A.abs(),
        v["loss"],
        logp,
        zero if v["entropy"] is None else v["entropy"],
        r,
        clip,
        -m,
        m.exp() - m - 1,
        m.abs().exp(),
        v["tis"],
        zero if v["uncorrected"] else m.exp() > v["tis_cap"],
        -v["d"],
        v["d"].exp() - v["d"] - 1,
    ]
    table = torch.stack([c.detach().to(logp.dtype) for c in columns], 1)
    segment = torch.zeros_like(logp, dtype=torch.int64) if v["segment"] is None else v["segment"].long()
    inside = (segment >= 0) & (segment < v["n_segments"])
    return table.new_zeros(v["n_segments"], len(STATS)).index_add_(0, segment[inside], table[inside])


def _sequence_mean(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N]: the mean of x over each token's sequence."""
    lengths = cu_seqlens.long().diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=x_N.device), lengths, output_size=len(x_N))
    return (x_N.new_zeros(len(lengths)).index_add(0, sequence, x_N) / lengths.clamp(min=1))[sequence]


# ---- checks ----------------------------------------------------------------------------------------------------------


def _require(condition, message) -> None:
    if not condition:
        raise ValueError(message() if callable(message) else message)


def _check(
    logp,
    tensors,
    kind,
    eps_low,
    eps_high,
    dual_clip,
    tis_cap,
    kl,
    kl_coef,
    entropy_coef,
    cu_seqlens,
    segment,
    n_segments,
) -> None:
    _require(logp.dim() == 1, lambda: f"logp must have shape [N], got {list(logp.shape)}")
    _require(logp.dtype in (torch.float32, torch.float64), lambda: f"logp must be float32, got {logp.dtype}")
    for name, x in tensors.items():
        if x is None:
            _require(name not in ("advantage", "weight"), f"{name} must be a tensor of shape [N], got None")
            continue
        for what in ("shape", "dtype", "device"):
            want, got = getattr(logp, what), getattr(x, what)
            _require(got == want, lambda: f"{name} must have the {what} of logp, {want}, got {got}")  # noqa: B023
    _require(kind in KINDS, lambda: f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _require(kl in KLS, lambda: f"kl must be one of {', '.join(KLS)}, got {kl!r}")
    _require(0 <= eps_low <= 1, lambda: f"eps_low must be in [0, 1], got {eps_low}")
    _require(eps_high >= 0, lambda: f"eps_high must be at least 0, got {eps_high}")
    _require(dual_clip is None or dual_clip > 1, lambda: f"dual_clip must be None or above 1, got {dual_clip}")
    _require(tis_cap is None or tis_cap > 0, lambda: f"tis_cap must be None or above 0, got {tis_cap}")
    _require(math.isfinite(kl_coef), lambda: f"kl_coef must be finite, got {kl_coef}")
    _require(math.isfinite(entropy_coef), lambda: f"entropy_coef must be finite, got {entropy_coef}")
    _require(
        kl_coef == 0 or tensors["ref_logp"] is not None, lambda: f"kl_coef must be 0 without ref_logp, got {kl_coef}"
    )
    _require(
        entropy_coef == 0 or tensors["entropy"] is not None,
        lambda: f"entropy_coef must be 0 without entropy, got {entropy_coef}",
    )
    _require(n_segments >= 1, lambda: f"n_segments must be at least 1, got {n_segments}")
    if segment is not None:
        _require(
            segment.shape == logp.shape and segment.dtype == torch.int64 and segment.device == logp.device,
            lambda: (
                f"segment must be int64 {list(logp.shape)} on {logp.device}, got {segment.dtype} "
                f"{list(segment.shape)} on {segment.device}"
            ),
        )
    if kind == "gspo":
        _require(cu_seqlens is not None, "cu_seqlens must be given for kind='gspo', got None")
        _require(
            cu_seqlens.dim() == 1
            and cu_seqlens.dtype == torch.int32
            and len(cu_seqlens) >= 1
            and cu_seqlens.device == logp.device,
            lambda: (
                f"cu_seqlens must be int32 [S+1] on {logp.device}, got {cu_seqlens.dtype} "
                f"{list(cu_seqlens.shape)} on {cu_seqlens.device}"
            ),
        )
        if logp.device.type == "cpu" and not torch.compiler.is_compiling():  # on CUDA this would wait for the device
            ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
            _require(
                ends == (0, len(logp)) and bool((cu_seqlens.diff() >= 0).all()),
                lambda: (
                    f"cu_seqlens must rise from 0 to N = {len(logp)}, got {cu_seqlens[:4].tolist()} ... "
                    f"{cu_seqlens[-4:].tolist()}"
                ),
            )


# ---- torch.library operation -----------------------------------------------------------------------------------------


@torch.library.custom_op("m2rl::policy_loss_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def policy_loss_fwd(
    logp: Tensor,
    behaviour: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    segment: Tensor | None,
    kind: str,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
    tis_cap: float | None,
    kl: str,
    kl_coef: float,
    entropy_coef: float,
    n_segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], stats [D, len(STATS)], dloss/dlogp [N], dloss/dentropy [N] or empty): gradients come with the loss."""
    arguments = (
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
    )
    if logp.is_cuda:
        from m2rl_kernels.policy_loss_triton import policy_loss_triton

        with torch.cuda.device_of(logp):  # Triton launches on the current device
            return policy_loss_triton(*arguments, len(STATS))
    return policy_loss_cpu(*arguments)


@policy_loss_fwd.register_fake
def _(
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
):
    return (
        logp.new_empty(()),
        logp.new_empty(n_segments, len(STATS)),
        logp.new_empty(logp.shape),
        logp.new_empty(logp.shape if entropy_coef != 0 else 0),
    )


def _save(ctx, inputs, output) -> None:
    _, stats, grad_logp, grad_entropy = output
    ctx.entropy_counts = inputs[-2] != 0
    ctx.mark_non_differentiable(stats, grad_logp, grad_entropy)
    ctx.save_for_backward(grad_logp, grad_entropy)


@torch.autograd.function.once_differentiable  # a second derivative would miss that of grad_logp: an error instead
def _grads(ctx, grad_loss, *_):
    grad_logp, grad_entropy = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        grad_logp * grad_loss if needs[0] else None,
        None,
        None,
        None,
        None,
        None,
        grad_entropy * grad_loss if needs[6] and ctx.entropy_counts else None,
        *[None] * 11,
    )


policy_loss_fwd.register_autograd(_grads, setup_context=_save)


# ---- CPU: one pass in C++, a block of tokens in cache at a time ------------------------------------------------------


class _Arguments(ctypes.Structure):
    """M2rlPolicyLoss in csrc/ops.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "segments")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("logp", "behaviour", "advantage", "weight", "old_logp", "ref_logp", "entropy"),
                *("cu_seqlens", "segment", "grad_logp", "grad_entropy", "loss", "stats"),
            )
        ),
        *((name, ctypes.c_int32) for name in ("kind", "kl")),
        *(
            (name, ctypes.c_float)
            for name in ("ratio_low", "ratio_high", "dual_clip", "tis_cap", "kl_coef", "entropy_coef")
        ),
    )


def policy_loss_cpu(
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
):
    """dpg/dlogp is -A r (grpo, gspo, where not clipped), -A clip(r) (cispo), -A (reinforce); for gspo the token's own
    derivative is replaced by its sequence's mean, since every token of the sequence moves the one ratio."""
    vectors = [
        None if x is None else x.contiguous()
        for x in (logp, behaviour, advantage, weight, old, ref, entropy, cu_seqlens, segment)
    ]
    grad_logp = torch.empty(logp.shape)
    grad_entropy = torch.empty(logp.shape if entropy_coef != 0 else 0)
    loss, stats = torch.empty(()), torch.empty(n_segments, len(STATS))
    address = lambda x: None if x is None else x.data_ptr()  # noqa: E731
    arguments = _Arguments(
        len(logp),
        0 if cu_seqlens is None else len(cu_seqlens) - 1,
        n_segments,
        *map(address, vectors),
        address(grad_logp),
        address(grad_entropy) if entropy_coef != 0 else None,
        address(loss),
        address(stats),
        KINDS.index(kind),
        KLS.index(kl),
        1 - eps_low,
        1 + eps_high,
        dual_clip or 0.0,
        tis_cap or 0.0,
        kl_coef,
        entropy_coef,
    )
    native.cpu().m2rl_policy_loss(ctypes.byref(arguments))
    return loss, stats, grad_logp, grad_entropy
