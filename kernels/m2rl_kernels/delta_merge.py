"""Merging over many tensors at once: average, task arithmetic, TIES, DARE, SCE, and the rules made for RL experts.

    d_k = x_k - b                                      task vector of expert k, float32
    out = b + lambda * combine_k(w_k, filter(d_k))     one rounding, to the type of the output

Every operation takes `base` [T tensors] and `experts` [K][T tensors] (bf16, fp16 or fp32, any mix), merges all T in
one native call and returns T new tensors (or fills `out`). Top-k keeps exactly k, ties to the lowest flat index; random
masks are Philox keyed by (seed, tensor name, expert, element), so the same on CPU and GPU and in any shard or order.
Cost: one reading per statistic (thresholds, energies) and one that writes; a few 256 KiB chunks of memory per thread.

Letters: T tensors, K experts, N elements. Formulas and sources: `merge_recipe.METHODS`. Errors: ValueError that names
the argument.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rl_kernels import merge_passes as passes
from m2rl_kernels import native
from m2rl_kernels.merge_passes import Device, Statistics, Tensors
from m2rl_kernels.merge_recipe import Recipe, recipe

CODES = {getattr(torch, name): code for name, code in native.DTYPE_CODES.items()}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def average(
    experts: Sequence[Sequence[Tensor]], *, weights: Sequence[float] | None = None, **options: Any
) -> list[Tensor]:
    """out = sum_k w_k x_k / sum_k w_k. Wortsman et al., arXiv:2203.05482."""
    return merge_tensors(None, experts, "average", weights=weights, **options)


def task_arithmetic(
    base: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    *,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """out = b + lambda sum_k w_k d_k. Ilharco et al., arXiv:2212.04089."""
    return merge_tensors(base, experts, "task_arithmetic", weights=weights, lam=lam, **options)


def ties(
    base: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float | Sequence[float],
    lam: float = 1.0,
    scope: str | None = None,
    **options: Any,
) -> list[Tensor]:
    """Keep the k = max(1, floor(density N)) largest |d_k|, elect s = sign(sum_k w_k d_k) (0 counts as +), average
    those of sign s.

    scope: "tensor" (N of each tensor) or "model" (one threshold over all T). Yadav et al., arXiv:2306.01708.
    """
    return merge_tensors(base, experts, "ties", density=density, lam=lam, scope=scope, **options)


def dare(
    base: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float | Sequence[float],
    then: str = "task_arithmetic",
    lam: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> list[Tensor]:
    """Keep each element of d_k with probability density, divide by it, then task arithmetic or TIES' sign election.

    then: "task_arithmetic" | "ties" (with trim_density: top-k in between, as in the authors' code). Yu et al.,
    arXiv:2311.03099.
    """
    if then not in ("task_arithmetic", "ties"):
        raise ValueError(f"then must be task_arithmetic or ties, got {then!r}")
    return merge_tensors(
        base,
        experts,
        "dare_linear" if then == "task_arithmetic" else "dare_ties",
        density=density,
        lam=lam,
        seed=seed,
        **options,
    )


def sce(
    base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], *, density: float = 1.0, **options: Any
) -> list[Tensor]:
    """Select the largest variances over experts, w_k = mean(d_k^2) / sum, erase minority signs, weighted mean of the
    rest.

    Uniform weights only where every selected d is exactly 0 (mergekit: below 1e-6, which RL-sized deltas always are;
    preset="mergekit").
    Wan et al., arXiv:2408.07990.
    """
    return merge_tensors(base, experts, "sce", density=density, **options)


def ram(
    base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], *, plus: bool = False, lam: float = 1.0, **options: Any
) -> list[Tensor]:
    """Elements changed (|d| > epsilon) by one expert are kept whole, by several averaged.

    plus: the unique part of expert k times 1 + r min(shared_k / unique_k, alpha). arXiv:2601.13572.
    """
    return merge_tensors(base, experts, "ram_plus" if plus else "ram", lam=lam, **options)


def della(
    base: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float,
    epsilon: float = 0.15,
    lam: float = 1.0,
    elect: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Keep with probability density - epsilon .. density + epsilon by the rank of |d| in its row, over that
    probability.

    Deep et al., arXiv:2406.11617.
    """
    return merge_tensors(
        base, experts, "della" if elect else "della_linear", density=density, epsilon=epsilon, lam=lam, **options
    )


def breadcrumbs(
    base: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float,
    gamma: float = 0.01,
    lam: float = 1.0,
    elect: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Drop the floor(gamma N) largest |d_k|, keep the next floor(density N). Davari and Belilovsky,
    arXiv:2312.06795."""
    return merge_tensors(
        base, experts, "breadcrumbs_ties" if elect else "breadcrumbs", density=density, gamma=gamma, lam=lam, **options
    )


def model_stock(base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], **options: Any) -> list[Tensor]:
    """out = b + t mean_k d_k, t = K c / (1 + (K - 1) c), c the mean cosine of pairs. Jang et al., arXiv:2403.19522."""
    return merge_tensors(base, experts, "model_stock", **options)


def karcher(experts: Sequence[Sequence[Tensor]], *, iterations: int = 10, **options: Any) -> list[Tensor]:
    """The Riemannian mean of x_k / |x_k| times the mean norm, iterated on the K x K Gram matrix. arXiv:2603.04972."""
    return merge_tensors(None, experts, "karcher", iterations=iterations, **options)


def tsv_m(
    base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], *, lam: float = 1.0, **options: Any
) -> list[Tensor]:
    """Matrices: the top rank/K singular parts of each d_k, U and V orthogonalised together; others: the mean of d_k.

    Gargiulo et al., arXiv:2412.00081.
    """
    return merge_tensors(base, experts, "tsv_m", lam=lam, **options)


def iso_c(
    base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], *, lam: float = 1.0, **options: Any
) -> list[Tensor]:
    """Matrices: sum_k d_k = U S V^T becomes mean(S) U V^T; others: the mean of d_k. Marczak et al.,
    arXiv:2502.04959."""
    return merge_tensors(base, experts, "iso_c", lam=lam, **options)


def merge_tensors(
    base: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    method: str | Recipe,
    *,
    names: Sequence[str] | None = None,
    out: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    offsets: Sequence[int] | None = None,
    backend: str | None = None,
    threads: int = 0,
    chunk: int = passes.CHUNK,
    **options: Any,
) -> list[Tensor]:
    """Any method by name or resolved Recipe.

    base: T tensors, or None for average and karcher.     experts: K sequences of T tensors of the same shapes and
    device.
    names: T names, the keys of random masks (default "0", "1", ...).     out: T tensors to fill; default new ones of
    `dtype` or base's.
    offsets: flat index of each tensor's first element, for a shard of a larger tensor (random masks, elementwise
    rules only).
    backend: "cpu" | "cuda" | "ref"; default by where the tensors are.
    """
    base_t, experts_kt = None if base is None else list(base), [list(e) for e in experts]
    names = [str(t) for t in range(len(experts_kt[0]) if experts_kt else 0)] if names is None else list(names)
    chosen = method if isinstance(method, Recipe) else recipe(method, len(experts_kt), **options)
    base_t, experts_kt = _check(base_t, experts_kt, names, chosen)
    like = base_t if base_t is not None else experts_kt[0]
    if out is None:
        out = [torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in like]
    if len(out) != len(names) or any(
        o.shape != x.shape or not o.is_contiguous() or o.dtype not in CODES for o, x in zip(out, like)
    ):
        raise ValueError(f"out must be {len(names)} contiguous float tensors of the experts' shapes")
    if chosen.rule.combine == "spectral":
        for t, o in enumerate(out):
            assert base_t is not None
            o.copy_(spectral(base_t[t], [e[t] for e in experts_kt], chosen))
        return list(out)
    if backend == "ref":
        for o, value in zip(out, merge_ref(base_t, experts_kt, chosen, names, offsets)):
            o.copy_(value)
        return list(out)
    tensors = as_tensors(base_t, experts_kt, names, offsets)
    place = _device(like, backend, threads, chunk)
    if not chosen.needs_base:
        tensors = tensors.without_base()
    with _current(like):
        (statistics,) = passes.gather(tensors, [chosen], device=place)
        report = passes.apply(
            tensors,
            chosen,
            statistics,
            out_dtype=np.array([CODES[o.dtype] for o in out], np.int32),
            addresses=np.array([o.data_ptr() for o in out], np.uint64),
            device=place,
        )
    assert report.nonfinite is not None and report.overflow is not None
    for t, who in np.argwhere(report.nonfinite).tolist():
        raise ValueError(
            f"tensor {names[t]} of {f'expert {who - 1}' if who else 'the base'} has {report.nonfinite[t, who]} NaN or "
            "infinite elements"
        )
    for t in np.flatnonzero(report.overflow).tolist():
        raise ValueError(
            f"tensor {names[t]}: {report.overflow[t]} merged elements overflow {out[t].dtype}; choose a wider dtype"
        )
    return list(out)


def _check(
    base: list[Tensor] | None, experts: list[list[Tensor]], names: list[str], r: Recipe
) -> tuple[list[Tensor] | None, list[list[Tensor]]]:
    if base is None and r.needs_base:
        raise ValueError(f"base must be given for {r.method}, got None")
    lists = [*([("base", base)] if base is not None else []), *((f"experts[{k}]", e) for k, e in enumerate(experts))]
    for label, tensors in lists:
        if len(tensors) != len(names):
            raise ValueError(f"{label} must hold {len(names)} tensors, got {len(tensors)}")
        for t, x in enumerate(tensors):
            first = experts[0][t]
            if x.dtype not in CODES:
                raise ValueError(f"{label}[{t}] must be float32, bfloat16 or float16, got {x.dtype}")
            if x.shape != first.shape:
                raise ValueError(f"{label}[{t}] must have shape {list(first.shape)}, got {list(x.shape)}")
            if x.device != experts[0][0].device:
                raise ValueError(f"{label}[{t}] must be on {experts[0][0].device}, got {x.device}")
    return None if base is None else [x.detach().contiguous() for x in base], [
        [x.detach().contiguous() for x in e] for e in experts
    ]


def as_tensors(
    base: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    names: Sequence[str],
    offsets: Sequence[int] | None = None,
) -> Tensors:
    """Addresses of contiguous tensors; the result keeps them alive."""
    T, K = len(names), len(experts)
    return Tensors(
        names=list(names),
        shapes=[tuple(x.shape) for x in experts[0]],
        base=None if base is None else np.array([x.data_ptr() for x in base], np.uint64),
        base_dtype=np.array([CODES[x.dtype] for x in (experts[0] if base is None else base)], np.int32),
        experts=np.array([[e[t].data_ptr() for e in experts] for t in range(T)], np.uint64).reshape(T, K),
        expert_dtype=np.array([[CODES[e[t].dtype] for e in experts] for t in range(T)], np.int32).reshape(T, K),
        offset=None if offsets is None else np.asarray(offsets, np.int64),
        owner=(base, experts),
    )


def _device(tensors: Sequence[Tensor], backend: str | None, threads: int, chunk: int) -> Device:
    on_cuda = bool(tensors) and tensors[0].is_cuda
    if backend not in (None, "cpu", "cuda") or (backend is not None and (backend == "cuda") != on_cuda):
        raise ValueError(f"backend must be cpu, cuda or ref and fit the tensors' device, got {backend!r}")
    if not on_cuda:
        return Device("cpu", threads, chunk=chunk)
    return Device("cuda", stream=torch.cuda.current_stream(tensors[0].device).cuda_stream, chunk=chunk)


def _current(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager:
    """The tensors' GPU as the current one: scratch is allocated where the stream runs."""
    on_cuda = bool(tensors) and tensors[0].is_cuda
    return torch.cuda.device(tensors[0].device) if on_cuda else contextlib.nullcontext()


def topk_masks(
    base: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    density: float,
    *,
    scope: str = "tensor",
    threads: int = 0,
    chunk: int = passes.CHUNK,
) -> list[list[Tensor]]:
    """Bool masks [K][T] of what TIES keeps: exactly k per tensor (or over all T), ties to the lowest flat index."""
    names = [str(t) for t in range(len(base))]
    chosen = recipe("ties", len(experts), density=density, scope=scope)
    bases, expert_lists = _check(list(base), [list(e) for e in experts], names, chosen)
    assert bases is not None
    place = _device(bases, None, threads, chunk)
    with _current(bases):
        (s,) = passes.gather(as_tensors(bases, expert_lists, names), [chosen], device=place)
    if s.low is None:
        return [[torch.ones_like(x, dtype=torch.bool) for x in e] for e in expert_lists]
    key, cut = s.low
    masks: list[list[Tensor]] = []
    for k, e in enumerate(expert_lists):
        masks.append([])
        for t, x in enumerate(e):
            magnitude = (x.float() - bases[t].float()).abs().reshape(-1).view(torch.int32)
            index = torch.arange(x.numel(), device=x.device)
            bar = min(int(key[t, k]), 0x7FFFFFFF)
            masks[k].append(((magnitude > bar) | ((magnitude == bar) & (index <= int(cut[t, k])))).view(x.shape))
    return masks


# ---- the definition ----


def merge_ref(
    base: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    r: Recipe,
    names: Sequence[str],
    offsets: Sequence[int] | None = None,
) -> list[Tensor]:
    """The specification, in float64 (keys and variances in float32, as documented): T tensors of float64.

    Covers every rule of csrc; recipes with one value per option (no per-tensor overrides) and compute_dtype float32.
    """
    T, w = len(names), torch.tensor(r.weights, dtype=torch.float64)[:, None]
    b = [
        torch.zeros(e.numel(), dtype=torch.float64)
        if base is None or not r.needs_base
        else base[t].double().reshape(-1).cpu()
        for t, e in enumerate(experts[0])
    ]
    d = [torch.stack([e[t].double().reshape(-1).cpu() - b[t] for e in experts]) for t in range(T)]  # [K, N] each
    spans = [list(range(T))] if r.scope == "model" else [[t] for t in range(T)]
    z = [filter_ref(d[t], r, names[t], experts[0][t].shape, 0 if offsets is None else offsets[t]) for t in range(T)]
    for span in spans:
        joined = topk_ref(torch.cat([z[t] for t in span], 1), r)
        for t, part in zip(span, joined.split([z[t].shape[1] for t in span], 1)):
            z[t] = scale_ref(part, d[t], r)
    combined = [combine_ref(z[t], w, r) for t in range(T)]
    if r.rule.combine == "elect" and r.zero_sign == "majority":
        for span in spans:
            total = int(sum(torch.sign((w * z[t]).sum(0)).sum() for t in span))
            for t in span:
                combined[t] = combine_ref(z[t], w, r, (total > 0) - (total < 0))
    if r.method == "ram_plus":
        for span in spans:
            moved = [(z[t].abs() > r.epsilon) for t in span]
            unique = torch.stack([(m & (m.sum(0) == 1)).sum(1) for m in moved]).sum(0)
            shared = torch.stack([(m & (m.sum(0) > 1)).sum(1) for m in moved]).sum(0)
            gain = 1 + r.r * (shared / unique.clamp(min=r.epsilon)).clamp(0, r.alpha)
            for t in span:
                combined[t] = combine_ref(z[t], w, r, gain=gain[:, None])
    return [
        (b[t] + (1.0 if r.method in ("average", "karcher") else r.lam) * combined[t]).view(experts[0][t].shape)
        for t in range(T)
    ]


def filter_ref(d: Tensor, r: Recipe, name: str, shape: Sequence[int], offset: int = 0) -> Tensor:
    """Random and variance masks of d [K, N], one tensor at a time."""
    z = d.clone()
    for k in range(len(d)):
        p = r.density[k]
        if r.rule.filter == "random" and p < 1:
            keep = random_mask_ref(r.seed, name, k, d.shape[1], p, offset)
            z[k] = torch.where(keep, d[k], 0.0)
    if r.method == "sce" and r.density[0] < 1 and r.sce_select == "deltas":
        z = torch.where(variance_mask_ref(d, r.density[0]), d, 0.0)
    return z


def topk_ref(z: Tensor, r: Recipe) -> Tensor:
    """The magnitude filter of z [K, N] over one scope: a stable sort of float32 magnitudes."""
    z = z.clone()
    trim = r.density if r.rule.filter in ("magnitude", "outliers") else (r.trim_density or 1.0,) * len(z)
    low, high = passes.ranks(r, np.array([z.shape[1]]), np.array([trim]))
    for k in range(len(z)):
        if trim[k] < 1:
            order = torch.argsort(z[k].float().abs(), descending=True, stable=True)
            drop = torch.ones(z.shape[1], dtype=torch.bool)
            first = 0 if high is None else int(high[0, k])
            drop[order[first : int(low[0, k])]] = False
            if r.ties == "all" and high is None:
                drop &= z[k].float().abs() < z[k].float().abs()[order[int(low[0, k]) - 1]]
            z[k][drop] = 0.0
    return z


def scale_ref(z: Tensor, d: Tensor, r: Recipe) -> Tensor:
    """After the filters: 1/p of a random mask, or the factor that restores the L1 norm of d [K, N]."""
    z = z.clone()
    for k, p in enumerate(r.density):
        if p < 1 and r.rescale == "inv_keep" and r.rule.filter == "random":
            z[k] *= float(np.float32(1 / p))
        elif (
            p < 1
            and r.rescale == "l1"
            and "rescale" in r.rule.uses
            and d[k].abs().sum() >= 1e-7
            and z[k].abs().sum() >= 1e-7
        ):
            z[k] *= float(np.float32(d[k].abs().sum() / z[k].abs().sum()))
    return z


def variance_mask_ref(d: Tensor, density: float) -> Tensor:
    """Bool [N]: the int(density * #nonzero) largest variances over experts (float32, two passes), ties to the lowest
    index."""
    x = d.float()
    total = torch.zeros_like(x[0])
    for row in x:
        total += row
    mean, v = total / len(x), torch.zeros_like(x[0])
    for row in x:
        v += (row - mean) * (row - mean)
    v = v / len(x)
    order = torch.argsort(v, descending=True, stable=True)
    mask = torch.zeros(x.shape[1], dtype=torch.bool)
    mask[order[: int(density * int(v.count_nonzero()))]] = True
    return mask


def combine_ref(z: Tensor, w: Tensor, r: Recipe, zero_sign: int = 1, gain: Tensor | None = None) -> Tensor:
    """z [K, N], w [K, 1] -> the merged task vector [N], before lambda."""
    combine, K = r.rule.combine, len(z)
    if combine == "ram":
        moved = z.abs() > r.epsilon
        count, mass = moved.sum(0), (w * moved).sum(0)
        alone = (z * moved * (1.0 if gain is None else gain)).sum(0)
        return torch.where(count > 1, (w * z * moved).sum(0) / torch.where(mass == 0, 1.0, mass), alone)
    if combine in ("stock", "karcher"):
        gram = (z @ z.T).numpy()
        if combine == "stock":
            return passes.stock_factor(gram) * z.mean(0)
        return (torch.from_numpy(passes.karcher_coefficients(gram, r.iterations))[:, None] * z).sum(0)
    if combine == "elect":
        elect = w
        if r.method == "sce":
            chosen = (
                variance_mask_ref(z, r.density[0])
                if r.density[0] < 1 and r.sce_select == "weights"
                else torch.ones(z.shape[1])
            )
            energy = (z * chosen).square().mean(1, keepdim=True) if z.shape[1] else torch.zeros(K, 1, dtype=z.dtype)
            uniform = energy.sum() < r.sce_eps or energy.sum() == 0
            w, elect = torch.full_like(energy, 1 / K) if uniform else energy / energy.sum(), torch.ones_like(energy)
        s = torch.sign((elect * z).sum(0))
        s = torch.where(s == 0, float(zero_sign), s)
        agree = (torch.sign(z) == s) & (z != 0)
        num, den = (w * z * agree).sum(0), (w * agree).sum(0)
        den = (
            torch.where(den < 1e-6, 1e-6, den)
            if r.method == "sce" and r.sce_eps > 0
            else torch.where(den == 0, 1.0, den)
        )
        return num / den if r.normalize else num
    total = w.sum()
    return (w * z).sum(0) / (total if abs(total) >= 1e-8 else 1.0) if r.normalize else (w * z).sum(0)


def random_mask_ref(seed: int, name: str, expert: int, n: int, density: float, offset: int = 0) -> Tensor:
    """Bool [n]: the elements a random mask keeps; csrc/counter_rng.h in numpy."""
    index = np.arange(offset, offset + n, dtype=np.uint64)
    key, bar = passes.random_key(seed, name), round(density * 2**32)

    def draw(stream: int) -> np.ndarray:
        c = (index >> np.uint64(7)) * np.uint64(16) + (index & np.uint64(15))
        low = np.uint64(0xFFFFFFFF)
        x = [c & low, c >> np.uint64(32), np.full_like(c, expert), np.full_like(c, stream)]
        k = [key & 0xFFFFFFFF, key >> 32]
        for _ in range(7):
            p, q = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
            x = [
                (q >> np.uint64(32)) ^ x[1] ^ np.uint64(k[0]),
                q & low,
                (p >> np.uint64(32)) ^ x[3] ^ np.uint64(k[1]),
                p & low,
            ]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        lane = (index >> np.uint64(4)) & np.uint64(7)
        word = np.choose((lane & np.uint64(3)).astype(np.int64), x)
        return (word >> np.where(lane < 4, 0, 16).astype(np.uint64)) & np.uint64(0xFFFF)

    high = draw(0)
    return torch.from_numpy((high < bar >> 16) | ((high == bar >> 16) & (draw(1) < (bar & 0xFFFF))))


# ---- spectral rules: matrices, in torch ----


def spectral(base: Tensor, experts: Sequence[Tensor], r: Recipe) -> Tensor:
    """TSV-M or Iso-C of one tensor, float32 arithmetic; the type of base. Needs K + 3 matrices of memory."""
    deltas = [x.float() - base.float() for x in experts]
    if base.dim() != 2 or 0 in base.shape:
        merged = torch.stack(deltas).mean(0) if deltas else torch.zeros_like(base, dtype=torch.float32)
    elif r.method == "iso_c":
        total = sum(w * d for w, d in zip(r.weights, deltas))
        assert isinstance(total, Tensor)
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        merged = s.mean() * (u @ vt)
    else:
        rank = max(1, min(base.shape) // len(deltas))
        parts = []
        for w, d in zip(r.weights, deltas):
            u, s, vt = torch.linalg.svd(w * d, full_matrices=False)
            # directions of singular value ~ 0 are arbitrary, and would turn the others when orthogonalised with them
            kept = min(rank, int((s > s[0] * max(base.shape) * torch.finfo(torch.float32).eps).sum()))
            parts.append((u[:, :kept], s[:kept], vt[:kept].T))
        u = _orthogonal(torch.cat([p[0] for p in parts], 1))
        s = torch.cat([p[1] for p in parts])
        v = _orthogonal(torch.cat([p[2] for p in parts], 1))
        merged = (u * s) @ v.T
    return (base.float() + r.lam * merged).to(base.dtype)


def _orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (polar factor)."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


def spectral_from_bytes(
    r: Recipe, shape: Sequence[int], tensors: Sequence[tuple[str, np.ndarray, int]], out_code: int
) -> np.ndarray:
    """`spectral` of (label, raw bytes, native dtype code), base first; raw bytes [n] of the result.

    ValueError names the label of an input that has NaN or infinite elements.
    """
    models = [torch.empty(tuple(shape), dtype=DTYPES[code]) for _, _, code in tensors]
    for x, (_, data, _) in zip(models, tensors):
        x.view(-1).view(torch.uint8).numpy()[:] = data
    for (label, _, _), x in zip(tensors, models):
        if bad := int((~torch.isfinite(x)).sum()):
            raise ValueError(f"{label} has {bad} NaN or infinite elements")
    merged = spectral(models[0].float(), models[1:], r).to(DTYPES[out_code])
    if bad := int((~torch.isfinite(merged)).sum()):
        raise ValueError(
            f"{bad} elements of {tensors[0][0]} overflow {DTYPES[out_code]} when merged: choose a wider type"
        )
    return merged.reshape(-1).view(torch.uint8).numpy()


# ---- state dicts and modules ----


def merge_state_dicts(
    base: Any, experts: Sequence[Any], method: str, *, dtype: str | None = None, threads: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Merge state dicts (or modules) in memory: a new state dict, names in base's order. Non-float tensors must
    agree; copied."""
    states = [
        m.state_dict() if isinstance(m, torch.nn.Module) else m
        for m in ([base] if base is not None else []) + list(experts)
    ]
    if not all(isinstance(s, Mapping) for s in states):
        raise ValueError("base and experts must all be folders, or all state dicts or modules")
    donor = states[0]
    for i, state in enumerate(states[1:]):
        if missing := set(donor) ^ set(state):
            raise ValueError(
                f"tensor {sorted(missing)[0]} is not in every model (first seen in model {i + 1} of {len(states)})"
            )
    for name, x in donor.items():
        for i, state in enumerate(states[1:]):
            y = state[name]
            if x.shape != y.shape:
                raise ValueError(f"{name} has shape {list(x.shape)} in model 0 and {list(y.shape)} in model {i + 1}")
            if x.dtype != y.dtype and not {x.dtype, y.dtype} <= set(CODES):
                raise ValueError(f"{name} has dtype {x.dtype} in model 0 and {y.dtype} in model {i + 1}")
    names = [n for n, x in donor.items() if x.dtype in CODES]
    lists = [[s[n] for n in names] for s in states]
    wide = None if dtype is None else getattr(torch, dtype)
    merged = merge_tensors(
        lists[0] if base is not None else None,
        lists[1:] if base is not None else lists,
        method,
        names=names,
        dtype=wide,
        threads=threads,
        **options,
    )
    out = dict(zip(names, merged))
    for name, x in donor.items():
        if name not in out:
            if not all(torch.equal(x, s[name]) for s in states[1:]):
                raise ValueError(
                    f"{name} is {x.dtype}, which is copied and not merged, and it differs between the models"
                )
            out[name] = x.clone()
    return {name: out[name] for name in donor}


__all__ = [
    "Recipe",
    "Statistics",
    "average",
    "breadcrumbs",
    "dare",
    "della",
    "iso_c",
    "karcher",
    "merge_ref",
    "merge_state_dicts",
    "merge_tensors",
    "model_stock",
    "native",
    "ram",
    "recipe",
    "sce",
    "task_arithmetic",
    "ties",
    "topk_masks",
    "tsv_m",
]
