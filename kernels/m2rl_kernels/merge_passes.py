"""The passes of merging on addresses: recipe -> statistics -> apply. Free of torch; what `delta_merge` and
`m2rl.merge` share.

    d_k = x_k - b                                     task vector of expert k, float32
    z_k = scale_k * filter(d_k)                       top-k magnitude, random mask, variance mask, or none
    out = b + lambda * combine_k(w_k, z_k)            sum, or the mean over those that agree with the elected sign, ...

`merge_recipe.Recipe` holds every choice, `gather` computes what needs a reading of its own (thresholds, norms,
energies; shared by the recipes of a sweep), `apply` writes. Axes: T tensors, K experts. Nothing here holds more than a
few chunks of memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2rl_kernels import native
from m2rl_kernels.merge_recipe import Recipe, check_density, per_expert

CHUNK = 65536  # elements per task; results do not depend on it
ITEM_BYTES = {0: 4, 1: 2, 2: 2}
RANDOM, MAGNITUDE, VARIANCE, SCALE = 1, 2, 4, 8  # M2rlFilter in csrc/ops.h
LINEAR, SUM, ELECT, RAM = 0, 1, 2, 3  # M2rlCombine


def random_key(seed: int, name: str) -> int:
    """Philox key of one tensor: 64 bits of BLAKE2b over its name, keyed by the seed."""
    return int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=8, key=int(seed).to_bytes(8, "little", signed=True)).digest(),
        "little",
    )


@dataclass
class Tensors:
    """T tensors of a base and K experts, as addresses; `owner` keeps the memory alive."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    base: np.ndarray | None  # [T] uint64 addresses
    base_dtype: np.ndarray  # [T] int32 codes of native.DTYPE_CODES
    experts: np.ndarray  # [T, K] uint64
    expert_dtype: np.ndarray  # [T, K] int32
    offset: np.ndarray | None = None  # [T] flat index of the first element (shards)
    owner: Any = None

    def __post_init__(self) -> None:
        self.numel = np.array([math.prod(s) for s in self.shapes], np.int64)
        self.row = np.array([s[-1] if len(s) > 1 else math.prod(s) for s in self.shapes], np.int64)
        self.start = np.zeros(len(self.names), np.int64) if self.offset is None else np.asarray(self.offset, np.int64)

    @property
    def count(self) -> int:
        return self.experts.shape[1]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Sequence[int]) -> Tensors:
        """Some of the tensors."""
        index = np.asarray(rows, np.int64)
        return Tensors(
            [self.names[t] for t in rows],
            [self.shapes[t] for t in rows],
            None if self.base is None else self.base[index],
            self.base_dtype[index],
            self.experts[index],
            self.expert_dtype[index],
            self.start[index],
            self.owner,
        )

    def without_base(self) -> Tensors:
        return dataclasses.replace(self, base=None)


@dataclass
class Statistics:
    """What `apply` needs beyond the recipe, per tensor and expert; produced by `gather`."""

    weight: np.ndarray  # [T, K] float32
    elect: np.ndarray  # [T, K] float32
    scale: np.ndarray  # [T, K] float32
    lam: np.ndarray  # [T] float32
    divisor: np.ndarray  # [T] float32
    zero_sign: np.ndarray  # [T] int8
    keep: np.ndarray  # [T, K] float64
    round: str  # "float32", or "input" resolved per batch
    low: tuple[np.ndarray, np.ndarray] | None = None  # (key, cut) [T, K]
    high: tuple[np.ndarray, np.ndarray] | None = None
    variance: tuple[np.ndarray, np.ndarray] | None = None  # [T]
    spread: np.ndarray | None = None  # [T, K] float64

    def take(self, rows: Sequence[int]) -> Statistics:
        """Those of some of the tensors."""
        index = np.asarray(rows, np.int64)

        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(v[index] for v in value)
            return value[index] if isinstance(value, np.ndarray) else value

        return Statistics(**{f.name: pick(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass
class Report:
    """Counters of one pass."""

    nonfinite: np.ndarray | None = None  # [T, K+1] NaN or infinite inputs: base, experts
    overflow: np.ndarray | None = None  # [T] NaN or infinite outputs
    nonzero: np.ndarray | None = None  # [T, K] elements with d != 0
    changed: np.ndarray | None = None  # [T] outputs that differ from the base
    checksum: np.ndarray | None = None  # [T, K+2] uint64: base, experts, output
    elements: np.ndarray | None = None  # [1] int64, CPU: merged elements looked at so far; may be read during the pass
    read: bool = False

    def once(self) -> _Report:
        """The C structure for the first pass, an empty one for later passes: an input's NaNs count once."""
        first, self.read = not self.read, True
        return _report_struct(self) if first else _Report()


def cpu_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the C structures of csrc/ops.h ----


class _Struct(ctypes.Structure):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.alive = []
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value)
                self.alive.append(value)
                value = value.ctypes.data
            setattr(self, name, value)


def _fields(spec: str) -> list[tuple[str, Any]]:
    kinds = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
    return [(name, kinds[kind]) for kind, name in (item.split(":") for item in spec.split())]


class _Tensors(_Struct):
    _fields_ = _fields("q:tensors q:experts p:numel p:row p:offset p:base p:base_dtype p:expert p:expert_dtype")


class _Rule(_Struct):
    _fields_ = _fields(
        "i:filter i:combine i:round i:normalize f:den_floor f:den_substitute f:epsilon i:inverse_keep p:weight "
        "p:elect p:scale p:lam p:divisor p:zero_sign p:low_key p:low_cut p:high_key p:high_cut p:variance_key "
        "p:variance_cut p:random_key p:expert_id p:keep p:spread"
    )


class _Output(_Struct):
    _fields_ = _fields("p:address p:file p:position p:dtype")


class _Report(_Struct):
    _fields_ = _fields("p:nonfinite p:overflow p:nonzero p:changed p:checksum p:elements")


class _Sums(_Struct):
    _fields_ = _fields("p:abs_before p:abs_after p:square p:gram p:sign p:variance_nonzero p:unique p:shared")


class _Select(_Struct):
    _fields_ = _fields("i:key i:ranks q:groups p:start p:rank p:share p:threshold p:cut p:above p:equal")


@dataclass(frozen=True)
class Device:
    """Where the addresses live: `cpu` with a number of threads, or `cuda` with a stream."""

    kind: str = "cpu"
    threads: int = 0
    stream: int = 0
    chunk: int = CHUNK

    def call(self, name: str, tensors: Tensors, rule: _Rule, argument: _Struct, report: _Report) -> int:
        heads = [
            ctypes.byref(_tensors(tensors)),
            ctypes.byref(rule),
            ctypes.byref(argument),
            ctypes.byref(report),
            ctypes.c_int64(self.chunk),
        ]
        if self.kind == "cpu":
            return getattr(native.cpu(), f"m2rl_merge_{name}")(*heads, ctypes.c_int32(self.threads or cpu_threads()))
        status = getattr(native.cuda(), f"m2rl_merge_{name}_cuda")(*heads, ctypes.c_void_p(self.stream))
        if status == -errno.ENOTSUP:
            raise ValueError(f"on CUDA a merge takes at most 8 experts, and not DELLA; got {tensors.count} experts")
        if status:
            raise RuntimeError(f"m2rl_merge_{name}_cuda failed with CUDA error {-1000 - status}")
        return 0


def _tensors(t: Tensors) -> _Tensors:
    fields = {
        "numel": t.numel,
        "row": t.row,
        "offset": t.start,
        "base_dtype": t.base_dtype,
        "expert": t.experts,
        "expert_dtype": t.expert_dtype,
    }
    if t.base is not None:
        fields["base"] = t.base
    return _Tensors(tensors=len(t), experts=t.count, **fields)


def _rule(t: Tensors, r: Recipe, s: Statistics, filters: int, elect: np.ndarray | None = None) -> _Rule:
    combine = {"linear": LINEAR, "karcher": LINEAR, "sum": SUM, "stock": SUM, "elect": ELECT, "ram": RAM}[
        r.rule.combine
    ]
    floor, substitute = (1e-6, 1e-6) if r.method == "sce" and r.sce_eps > 0 else (0.0, 1.0)
    optional: dict[str, np.ndarray] = {}
    for name, pair in (("low", s.low), ("high", s.high), ("variance", s.variance)):
        if pair is not None:
            optional[f"{name}_key"], optional[f"{name}_cut"] = pair
    if s.spread is not None:
        optional["spread"] = s.spread
    return _Rule(
        filter=filters,
        combine=combine,
        round=_round_code(t, s.round),
        normalize=int(r.normalize),
        den_floor=floor,
        den_substitute=substitute,
        epsilon=r.epsilon,
        inverse_keep=int(r.rule.filter == "ranked" and r.rescale == "inv_keep"),
        weight=s.weight,
        elect=s.elect if elect is None else elect,
        scale=s.scale,
        lam=s.lam,
        divisor=s.divisor,
        zero_sign=s.zero_sign,
        random_key=np.array([random_key(r.seed, n) for n in t.names], np.uint64),
        expert_id=np.arange(t.count, dtype=np.uint32),
        keep=s.keep,
        **optional,
    )


def _round_code(t: Tensors, compute: str) -> int:
    if compute != "input":
        return native.DTYPE_CODES[compute]
    codes = set(np.unique(t.expert_dtype).tolist()) | (
        set(np.unique(t.base_dtype).tolist()) if t.base is not None else set()
    )
    return codes.pop() if len(codes) == 1 else 0  # mixed types promote to float32


def _report_struct(report: Report) -> _Report:
    fields = {name: getattr(report, name) for name, _ in _Report._fields_ if getattr(report, name) is not None}
    return _Report(**fields)


# ---- gather ----


def _options(tensors: Tensors, r: Recipe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights [T, K], density [T, K], lam [T]) after per-tensor overrides."""
    T, K = len(tensors), tensors.count
    weights, density, lam = (
        np.tile(np.array(r.weights), (T, 1)),
        np.tile(np.array(r.density), (T, 1)),
        np.full(T, r.lam),
    )
    if r.per_tensor is not None:
        for t, name in enumerate(tensors.names):
            own = r.per_tensor(name)
            weights[t] = per_expert("weights", own.get("weights", r.weights), K)
            density[t] = per_expert("density", own.get("density", r.density), K)
            lam[t] = own.get("lam", r.lam)
            check_density(f"density of {name}", density[t])
    return weights, density, lam


def kept_count(n: int, density: float) -> int:
    """k = max(1, floor(density * n)): how many of n elements a top-k keeps."""
    return n if density >= 1 else max(1, int(density * n)) if n else 0


def ranks(r: Recipe, sizes: np.ndarray, density: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(low, high) ranks [G, K] of the magnitude filter for groups of `sizes` elements."""
    low, high = np.zeros(density.shape, np.int64), np.zeros(density.shape, np.int64)
    for g, n in enumerate(sizes.tolist()):
        for k, p in enumerate(density[g].tolist()):
            if p >= 1:
                low[g, k] = n
            elif r.rule.filter == "outliers":
                target, top = kept_count(n, p), int(r.gamma * n)
                low[g, k] = n - max(0, n - target - top)
                high[g, k] = low[g, k] - target
            elif r.ties == "all":  # the authors' code: |d| >= the kth smallest, kth = int(n * (1 - density))
                low[g, k] = n - max(1, int(n * (1 - p))) + 1 if n else 0
            else:
                low[g, k] = kept_count(n, p)
    return low, high if r.rule.filter == "outliers" else None


def _group_starts(tensors: Tensors, scope: str) -> np.ndarray:
    return np.arange(len(tensors) + 1, dtype=np.int64) if scope == "tensor" else np.array([0, len(tensors)], np.int64)


def select(
    tensors: Tensors,
    r: Recipe,
    s: Statistics,
    ranks: np.ndarray,
    *,
    key: int,
    scope: str,
    filters: int,
    report: Report,
    device: Device,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact top-k. ranks [G, L, R] -> (threshold key uint32, cut int64) [G, L, R]: kept are key > t, or == t and
    index <= cut.

    ranks int64: how many to keep; float64: floor(that share of the keys that are not zero), everything from 1 on.
    """
    threshold, cut = np.zeros(ranks.shape, np.uint32), np.zeros(ranks.shape, np.int64)
    start = _group_starts(tensors, scope)
    want = _Select(
        key=key,
        ranks=ranks.shape[2],
        groups=len(start) - 1,
        start=start,
        **{"share" if ranks.dtype == np.float64 else "rank": ranks},
        threshold=threshold,
        cut=cut,
    )
    device.call("select", tensors, _rule(tensors, r, s, filters), want, report.once())
    return threshold, cut


def _local_cuts(tensors: Tensors, threshold: np.ndarray, cut: np.ndarray, scope: str) -> tuple[np.ndarray, np.ndarray]:
    """[G, K] of groups -> [T, K] with cuts as indices within each tensor."""
    if scope == "tensor":
        return threshold, cut
    first = np.concatenate([[0], np.cumsum(tensors.numel)[:-1]])[:, None]
    T = len(tensors)
    return np.tile(threshold, (T, 1)), np.clip(cut - first, -1, np.maximum(tensors.numel - 1, -1)[:, None])


def sums(
    tensors: Tensors,
    r: Recipe,
    s: Statistics,
    *,
    filters: int,
    want: Mapping[str, tuple[Any, ...]],
    report: Report,
    device: Device,
) -> dict[str, np.ndarray]:
    """Float64 (or int64) reductions per tensor; `want` names fields of M2rlSums and their shapes after [T]."""
    out = {
        name: np.zeros((len(tensors), *shape), np.int64 if name in ("sign", "unique", "shared") else np.float64)
        for name, shape in want.items()
    }
    device.call(
        "sums",
        tensors,
        _rule(tensors, r, s, filters, elect=np.ones_like(s.elect) if r.method == "sce" else None),
        _Sums(**out),
        report.once(),
    )
    return out


def gather(
    tensors: Tensors, recipes: Sequence[Recipe], *, device: Device = Device(), report: Report | None = None
) -> list[Statistics]:
    """The statistics of each recipe. Recipes that differ only in lambda, weights or density share one reading.

    `tensors` must be the whole model when a recipe has scope="model", and whole tensors always. Costs one reading per
    kind of statistic: thresholds (TIES, breadcrumbs), variances (SCE with density < 1), energies (SCE), norms (L1
    rescale), signs (zero_sign="majority"), Gram matrices (model stock, Karcher), overlaps (RAM+). NaN and infinities
    are counted in `report`.
    """
    T, K = len(tensors), tensors.count
    if report is None:
        report = Report(nonfinite=np.zeros((T, K + 1), np.int64))
    memo: dict[Any, Any] = {}
    found = []
    for r in recipes:
        weights, density, lam = _options(tensors, r)
        weight = weights.astype(np.float32)
        if r.compute_dtype == "input":
            weight = round_array(weight, _round_code(tensors, "input"))
        s = Statistics(
            weight,
            weight,
            np.ones((T, K), np.float32),
            lam.astype(np.float32),
            np.ones(T, np.float32),
            np.ones(T, np.int8),
            density.astype(np.float64),
            r.compute_dtype,
        )
        s.divisor = weight.sum(1, dtype=np.float32)
        s.divisor[np.abs(s.divisor) < 1e-8] = 1.0
        found.append(s)

    # Random masks come first: what follows looks at the masked task vectors.
    for r, s in zip(recipes, found):
        if r.rule.filter == "ranked":
            s.spread = np.where(s.keep < 1, r.epsilon, 0.0)
        if r.rule.filter == "random" and r.rescale == "inv_keep":
            s.scale = (1.0 / s.keep).astype(np.float32)

    # Magnitude thresholds: one selection for all densities that look at the same vectors.
    groups: dict[Any, list[int]] = {}
    for i, (r, s) in enumerate(zip(recipes, found)):
        trim = _trim(r, s)
        if trim is not None and (trim < 1).any():
            mask = (r.seed, s.keep.tobytes()) if r.rule.filter == "random" else None
            groups.setdefault((r.scope, r.compute_dtype, mask), []).append(i)
    for (scope, _, mask), members in groups.items():
        sizes = tensors.numel if scope == "tensor" else np.array([tensors.numel.sum()])
        columns: list[np.ndarray] = []
        slots: dict[bytes, int] = {}
        plan = []
        for i in members:
            trim = _trim(recipes[i], found[i])
            assert trim is not None
            if scope == "model" and (trim != trim[0]).any():
                raise ValueError("density must be the same for every tensor when scope is 'model'")
            pair: list[int | None] = []
            for column in ranks(recipes[i], sizes, trim if scope == "tensor" else trim[:1]):
                if column is None:
                    pair.append(None)
                    continue
                if column.tobytes() not in slots:
                    slots[column.tobytes()] = len(columns)
                    columns.append(column)
                pair.append(slots[column.tobytes()])
            plan.append((i, pair))
        lead = recipes[members[0]]
        filters = RANDOM if mask is not None else 0  # before the scale, which does not change the order
        threshold, cut = select(
            tensors,
            lead,
            found[members[0]],
            np.stack(columns, -1),
            key=0,
            scope=scope,
            filters=filters,
            report=report,
            device=device,
        )
        for i, (low, high) in plan:
            for name, slot in (("low", low), ("high", high)):
                if slot is not None:
                    t, c = threshold[..., slot], cut[..., slot]
                    if recipes[i].ties == "all" and name == "low" and recipes[i].rule.filter != "outliers":
                        c = np.full_like(c, np.iinfo(np.int64).max // 2)
                    setattr(found[i], name, _local_cuts(tensors, t, c, scope))

    for r, s in zip(recipes, found):
        rule = r.rule
        if (
            rule.filter in ("random", "ranked", "outliers", "magnitude")
            and r.rescale == "l1"
            and (rule.filter in ("random", "ranked") or "rescale" in rule.uses)
        ):
            key = (
                "l1",
                r.seed,
                rule.filter,
                s.keep.tobytes(),
                None if s.low is None else s.low[0].tobytes(),
                r.compute_dtype,
                r.epsilon,
            )
            if key not in memo:
                memo[key] = sums(
                    tensors,
                    r,
                    s,
                    filters=_filters(r, s) & ~SCALE,
                    want={"abs_before": (K,), "abs_after": (K,)},
                    report=report,
                    device=device,
                )
            s.scale = _l1_scale(
                memo[key]["abs_before"], memo[key]["abs_after"], s.keep, _round_code(tensors, r.compute_dtype)
            )
        if r.method == "sce":
            _gather_sce(tensors, r, s, memo, report, device)
        if r.method == "ram_plus":
            if ("ram", r.epsilon) not in memo:
                memo["ram", r.epsilon] = sums(
                    tensors, r, s, filters=0, want={"unique": (K,), "shared": (K,)}, report=report, device=device
                )
            unique, shared = (memo["ram", r.epsilon][name].astype(np.float64) for name in ("unique", "shared"))
            if r.scope == "model":
                unique, shared = (np.tile(x.sum(0), (T, 1)) for x in (unique, shared))
            s.scale = (1 + r.r * np.clip(shared / np.maximum(unique, r.epsilon), 0, r.alpha)).astype(np.float32)
        if rule.combine in ("stock", "karcher"):
            if ("gram", r.needs_base) not in memo:
                seen = tensors if r.needs_base else tensors.without_base()
                memo["gram", r.needs_base] = sums(
                    seen, r, s, filters=0, want={"gram": (K, K)}, report=report, device=device
                )["gram"]
            gram = memo["gram", r.needs_base]
            if rule.combine == "stock":
                s.lam = (s.lam * [stock_factor(g) for g in gram]).astype(np.float32)
                s.weight = np.full((T, K), 1.0 / K, np.float32)
            else:
                s.weight = np.array([karcher_coefficients(g, r.iterations) for g in gram], np.float32).reshape(T, K)
        if rule.combine == "elect" and r.zero_sign == "majority":
            total = sums(tensors, r, s, filters=_filters(r, s), want={"sign": ()}, report=report, device=device)["sign"]
            s.zero_sign = np.sign(np.full(T, total.sum()) if r.scope == "model" else total).astype(np.int8)
    return found


def _trim(r: Recipe, s: Statistics) -> np.ndarray | None:
    """Densities [T, K] of the magnitude filter, or None where the method has none."""
    if r.rule.filter in ("magnitude", "outliers"):
        return s.keep
    return np.full_like(s.keep, r.trim_density) if r.method == "dare_ties" and r.trim_density is not None else None


def _filters(r: Recipe, s: Statistics) -> int:
    """Which of the native filters this recipe turns on."""
    bits = MAGNITUDE if s.low is not None else 0
    if r.rule.filter in ("random", "ranked"):
        bits |= RANDOM
    if s.variance is not None and r.sce_select == "deltas":
        bits |= VARIANCE
    return bits | (SCALE if (s.scale != 1).any() and r.rule.combine != "ram" else 0)


def _gather_sce(
    tensors: Tensors, r: Recipe, s: Statistics, memo: dict[Any, Any], report: Report, device: Device
) -> None:
    """SCE's weights w_k = mean(d_k^2) / sum over the selected elements, and its variance mask."""
    T, K = len(tensors), tensors.count
    if (s.keep < 1).any():
        share = s.keep[:, :1, None]  # of the variances that are not zero
        key: Any = ("variance", share.tobytes(), r.compute_dtype)
        if key not in memo:
            t, c = select(tensors, r, s, share, key=1, scope="tensor", filters=0, report=report, device=device)
            memo[key] = (t.reshape(T), c.reshape(T))
        s.variance = memo[key]
    key = ("square", None if s.variance is None else s.keep.tobytes(), r.compute_dtype)
    if key not in memo:
        memo[key] = sums(
            tensors,
            r,
            s,
            filters=VARIANCE if s.variance is not None else 0,
            want={"square": (K,)},
            report=report,
            device=device,
        )["square"]
    energy = memo[key] / np.maximum(tensors.numel, 1)[:, None]
    total = energy.sum(1, keepdims=True)
    uniform = (total < r.sce_eps) | (total == 0)
    s.weight = np.where(uniform, 1.0 / K, energy / np.where(uniform, 1.0, total)).astype(np.float32)
    s.elect = np.ones((T, K), np.float32)


def _l1_scale(before: np.ndarray, after: np.ndarray, keep: np.ndarray, code: int) -> np.ndarray:
    """Restore the L1 norm, mergekit's rule: no factor where either norm is below 1e-7; none where nothing was
    dropped."""
    usable = (before >= 1e-7) & (after >= 1e-7) & (keep < 1)
    return round_array(np.where(usable, before / np.where(usable, after, 1.0), 1.0).astype(np.float32), code)


def stock_factor(gram: np.ndarray) -> float:
    """t = K c / (1 + (K - 1) c), c the mean pairwise cosine of the task vectors; 0 where undefined."""
    K, norms = len(gram), np.sqrt(np.diag(gram))
    cosines = [gram[i, j] / max(norms[i] * norms[j], 1e-12) for i in range(K) for j in range(i)]
    c = float(np.clip(np.mean(np.clip(cosines, -1, 1)), -1, 1))
    return 0.0 if abs(1 + (K - 1) * c) < 1e-6 else K * c / (1 + (K - 1) * c)


def karcher_coefficients(gram: np.ndarray, iterations: int, tolerance: float = 1e-5) -> np.ndarray:
    """c [K] with out = sum c_k x_k: the Riemannian mean stays in the span of the experts, so their Gram matrix [K, K]
    is enough."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0))
    valid = norms > tolerance
    if not valid.any():
        return np.zeros(len(gram))
    inverse = np.where(valid, 1 / np.where(valid, norms, 1), 0)
    cosine = gram * inverse[:, None] * inverse  # Gram matrix of the unit tensors
    share = valid / valid.sum()
    mean = share.copy()  # coefficients over unit tensors
    size = math.sqrt(max(mean @ cosine @ mean, 0))
    mean = np.eye(len(gram))[int(np.argmax(valid))] if size < tolerance else mean / size
    for _ in range(iterations):
        tangent = np.zeros(len(gram))
        for k in np.flatnonzero(valid):
            dot = float(np.clip(cosine[k] @ mean, -1, 1))
            theta = math.acos(dot)
            if theta >= tolerance:
                unit = np.zeros(len(gram))
                unit[k] = 1
                tangent += share[k] * theta / math.sin(theta) * (unit - dot * mean)
        length = math.sqrt(max(tangent @ cosine @ tangent, 0))
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / math.sqrt(mean @ cosine @ mean)
    return norms.mean() * mean * inverse


def round_array(x: np.ndarray, code: int) -> np.ndarray:
    """float32 values rounded to bfloat16 or float16 and back."""
    if code == native.DTYPE_CODES["float16"]:
        return x.astype(np.float16).astype(np.float32)
    if code == native.DTYPE_CODES["bfloat16"]:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return x


# ---- apply ----


def apply(
    tensors: Tensors,
    r: Recipe,
    s: Statistics,
    *,
    out_dtype: np.ndarray,
    addresses: np.ndarray | None = None,
    files: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    checksum: bool = False,
    device: Device = Device(),
) -> Report:
    """Write the merged tensors, to memory (`addresses` [T]) or to files (`files` [T] descriptors, `positions` [T]
    bytes).

    OSError on a failed write. The report counts NaN and infinities on both sides: the caller decides what they mean.
    """
    T, K = len(tensors), tensors.count
    report = Report(
        np.zeros((T, K + 1), np.int64),
        np.zeros(T, np.int64),
        np.zeros((T, K), np.int64),
        np.zeros(T, np.int64),
        np.zeros((T, K + 2), np.uint64) if checksum else None,
    )
    target = (
        {"address": addresses}
        if addresses is not None
        else {"file": np.asarray(files, np.int32), "position": np.asarray(positions, np.int64)}
    )
    status = device.call(
        "apply",
        tensors,
        _rule(tensors, r, s, _filters(r, s)),
        _Output(dtype=np.asarray(out_dtype, np.int32), **target),
        _report_struct(report),
    )
    if status:
        raise OSError(status, os.strerror(status))
    return report


def checksum(address: int, size: int, threads: int = 0) -> int:
    """The 64-bit checksum that `apply` reports, of `size` bytes at `address`. Detects corruption; not cryptographic."""
    function = native.cpu().m2rl_merge_checksum
    function.restype = ctypes.c_uint64
    return function(ctypes.c_void_p(address), ctypes.c_int64(size), ctypes.c_int32(threads or cpu_threads()))
