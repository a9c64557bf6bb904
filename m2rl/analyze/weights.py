"""Weights: what training changed, and how much of it different models share.

    d_k = w_k - w_0                                          the update of model k, element by element, in float32
    footprint   share of elements in A_k, by four criteria:
      nonzero   d_k != 0
      bf16      bf16(w_k) != bf16(w_0): what a bfloat16 engine can see
      relative  |d_k| > eta max(|w_0|, |w_k|), eta = 1e-3 (arXiv 2511.08567)
      large     |d_k| >= 2^e with the least e such that at most 10% of the tensor's elements are that large
    overlap     |A_i n A_j| / |A_i u A_j| (Jaccard) and / min(|A_i|, |A_j|); `expected`: the same when the two supports
                are independent inside every tensor, |A_i n A_j| = sum_t |A_it| |A_jt| / n_t
    cosine      <d_i, d_j> / |d_i| |d_j|, exact; and after a random projection of the whole update to 4096 dimensions
                (count sketch), whose standard deviation is at most sqrt((1 + cosine^2) / 4096)
    signs       share of elements changed by both whose signs agree
    rank        of a matrix: effective exp(-sum p log p), p = sigma / sum sigma (Roy & Vetterli 2007); stable
                sum sigma^2 / max sigma^2

All per tensor, per layer, per module type and for the whole model: counts and products add up. T tensors, M models. One
streaming read of all checkpoints: a tensor is mapped, measured and unmapped, so memory is bounded by the largest tensor
of every model. The paper's section "Explore Weight Shift" reports overlap and cosine after random projection without a
formula; relative criterion after arXiv 2511.08567, the rest is ours.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from m2rl_kernels.delta_stats import DeltaStats, concatenate, count_sketch, delta_stats
from torch import Tensor

from m2rl.analyze import figures
from m2rl.analyze.output import PAPER, Analysis
from m2rl.command import named
from m2rl.merge_inputs import open_inputs
from m2rl.safetensors_io import Checkpoint
from m2rl.types import InputError

CRITERIA = ("nonzero", "bf16", "relative", "large")
ETA = 1e-3
LARGE_SHARE = 0.1
SKETCH_SIZE = 4096
CHUNK = 1 << 17  # elements: a few float32 copies of it stay in cache
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BIG = 1_000_000_000  # parameters from which the spectra of every layer are no longer the default
RANK_EVERY_BIG = 6


@dataclass(frozen=True)
class WeightStats:
    """What one reading measured."""

    models: list[str]
    tensors: list[str]
    shapes: list[tuple[int, ...]]
    delta: DeltaStats
    supports: dict[str, np.ndarray]  # criterion -> [T, M, M] int64 |A_i n A_j|; the diagonal is |A_i|
    base_square: np.ndarray  # [T] sum of w_0^2
    sketch: np.ndarray  # [M, size] projection of the whole update
    ranks: dict[int, dict[str, list[float]]]  # tensor index -> effective and stable rank of each model's update


def tensor_of(checkpoint: Checkpoint, name: str) -> Tensor:
    """A mapped tensor, flat; it must not outlive `checkpoint`, nor be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark a tensor read-only and says so
        return torch.from_numpy(checkpoint.bytes(name)).view(DTYPES[checkpoint.tensors[name].dtype])


def measure(
    base: str | os.PathLike,
    models: Mapping[str, str | os.PathLike],
    *,
    sketch_size: int = SKETCH_SIZE,
    rank_every: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> WeightStats:
    """Read all checkpoints once. rank_every: spectra of every n-th layer (0 = none; default: all below 1e9 parameters,
    else every 6th). device: where spectra are computed. InputError, before any weight is read, for no model, another
    architecture or another tokenizer; and for weights that are not finite."""
    if not models:
        raise InputError("the weights analysis needs at least one model, got none")
    inputs = open_inputs(base, list(models.values()))
    names = inputs.merged
    assert inputs.base is not None
    if not names:
        raise InputError(f"{base} has no floating-point tensors")
    parameters = sum(math.prod(inputs.info(n).shape) for n in names)
    every = (1 if parameters < BIG else RANK_EVERY_BIG) if rank_every is None else rank_every
    M = len(models)
    parts, squares, shapes = [], np.zeros(len(names)), []
    supports = {c: np.zeros((len(names), M, M), np.int64) for c in CRITERIA}
    sketch = torch.zeros(M, sketch_size, dtype=torch.float64)
    ranks: dict[int, dict[str, list[float]]] = {}
    for t, name in enumerate(names):
        shape = inputs.info(name).shape
        w = tensor_of(inputs.base, name)
        others = [tensor_of(c, name) for c in inputs.experts]
        stats = delta_stats([w], [[x] for x in others])
        for k, model in enumerate(models):
            if not np.isfinite(stats.gram[0, k, k]):
                raise InputError(f"{name} of {model} or of {base} has NaN or infinite elements")
            sketch[k] += count_sketch(others[k], base=w, size=sketch_size, seed=seed, name=name)
        counted, squares[t] = _supports(w, others, stats)
        for c in CRITERIA:
            supports[c][t] = counted[c]
        layer = layer_of(name)
        if every and len(shape) == 2 and min(shape) > 1 and (layer is None or layer % every == 0):
            found = [spectrum(w, x, shape, device) for x in others]
            ranks[t] = {"effective": [effective_rank(s) for s in found], "stable": [stable_rank(s) for s in found]}
        parts.append(stats)
        shapes.append(shape)
        del w, others
        for checkpoint in inputs.all:
            checkpoint.release([name])
    for checkpoint in inputs.all:
        checkpoint.check_unchanged()
    return WeightStats(list(models), names, shapes, concatenate(parts), supports, squares, sketch.numpy(), ranks)


def large_exponents(exponents_MB: np.ndarray, share: float = LARGE_SHARE) -> np.ndarray:
    """[M] biased exponent e of the threshold 2^(e-127): the least with at most `share` of the elements at or above."""
    above = exponents_MB[:, ::-1].cumsum(1)[:, ::-1]  # [M, 256] elements with exponent >= e
    small_enough = above <= share * exponents_MB.sum(1, keepdims=True)
    small_enough[:, 0] = False  # 0 is the bin of elements that did not change
    return np.where(small_enough.any(1), small_enough.argmax(1), 255)


def _supports(w: Tensor, others: list[Tensor], stats: DeltaStats) -> tuple[dict[str, np.ndarray], float]:
    """(criterion -> [M, M] counts, sum of w^2) of one tensor, chunk by chunk."""
    M, square = len(others), 0.0
    exponents = large_exponents(stats.exponents[0])
    limits = [math.ldexp(1.0, int(e) - 127) if e < 255 else math.inf for e in exponents]
    out = {c: torch.zeros(M, M, dtype=torch.int64) for c in CRITERIA}
    out["nonzero"] = torch.from_numpy(stats.both[0])
    # Deltas of bfloat16 checkpoints are nonzero exactly where a bfloat16 engine sees a change.
    same = all(x.dtype == torch.bfloat16 for x in (w, *others))
    if same:
        out["bf16"] = out["nonzero"]
    for at in range(0, w.numel(), CHUNK):
        b_low = w[at : at + CHUNK]
        b = b_low.float()
        square += float(b.double().square().sum())
        masks: dict[str, list[Tensor]] = {c: [] for c in CRITERIA}
        for x_low, limit in zip(others, limits):
            x = x_low[at : at + CHUNK].float()
            size = (x - b).abs_()
            masks["relative"].append(size > ETA * torch.maximum(x.abs(), b.abs()))
            masks["large"].append(size >= limit)
            if not same:
                masks["bf16"].append(x.bfloat16() != b.bfloat16())
        for c, mine in masks.items():
            if mine:
                m = torch.stack(mine).float()
                out[c] += (m @ m.T).long()  # at most CHUNK < 2^24: exact in float32
    return {c: v.numpy() for c, v in out.items()}, square


# ---- spectra ---------------------------------------------------------------------------------------------------------


def spectrum(w: Tensor, x: Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> np.ndarray:
    """Singular values of the update of one matrix, largest first: roots of the eigenvalues of its smaller Gram matrix
    (float64). Rows are taken a block at a time, so that an embedding of 150,000 rows needs no float copy."""
    R, C = shape
    w, x = w.view(R, C), x.view(R, C)
    if R < C:
        return spectrum(w.T.contiguous().flatten(), x.T.contiguous().flatten(), (C, R), device)
    gram = torch.zeros(C, C, dtype=torch.float64, device=device)
    rows = max(1, (1 << 23) // C)
    for r in range(0, R, rows):
        d = (x[r : r + rows].to(device).float() - w[r : r + rows].to(device).float()).double()
        gram.addmm_(d.T, d)
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).cpu().numpy()


def effective_rank(sigma: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values; 0 for a zero matrix."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    p = sigma[sigma > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(sigma: np.ndarray) -> float:
    """Squared Frobenius over squared spectral norm; 0 for a zero matrix."""
    top = float(sigma.max(initial=0.0))
    return float((sigma**2).sum() / top**2) if top else 0.0


# ---- groups ----------------------------------------------------------------------------------------------------------


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor; None outside the layers."""
    found = re.search(r"\.layers\.(\d+)\.", f".{name}")
    return int(found.group(1)) if found else None


def module_of(name: str) -> str:
    """The module type: q_proj, down_proj, input_layernorm, embed_tokens ..."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def groups(stats: WeightStats) -> dict[str, dict[str, list[int]]]:
    """level -> group -> tensor indices; levels model, module, layer, tensor."""
    out: dict[str, dict[str, list[int]]] = {"model": {"all": list(range(len(stats.tensors)))}}
    for level, key in (("module", module_of), ("layer", layer_of)):
        found: dict[str, list[int]] = {}
        for t, name in enumerate(stats.tensors):
            group = key(name)
            if group is not None:
                found.setdefault(f"{group}", []).append(t)
        out[level] = dict(sorted(found.items(), key=lambda item: int(item[0]))) if level == "layer" else found
    out["tensor"] = {name: [t] for t, name in enumerate(stats.tensors)}
    return out


def share_rows(stats: WeightStats, level: str, group: str, index: list[int]) -> list[dict[str, Any]]:
    """One row per model: footprint, norms, ranks."""
    chosen = stats.delta.select(index)
    whole = chosen.total()
    rows = []
    for k, model in enumerate(stats.models):
        row: dict[str, Any] = {"level": level, "group": group, "model": model, "parameters": int(whole.numel[0])}
        for c in CRITERIA:
            row[f"changed_{c}"] = float(stats.supports[c][index, k, k].sum() / max(whole.numel[0], 1))
        row["norm"] = float(whole.norm[0, k])
        row["relative_norm"] = _over(row["norm"], math.sqrt(stats.base_square[index].sum()))
        row["mean_abs"] = float(whole.l1[0, k] / max(whole.numel[0], 1))
        row["max_abs"] = float(whole.largest[0, k])
        spectra = [stats.ranks[t] for t in index if t in stats.ranks]
        for kind in ("effective", "stable"):
            row[f"{kind}_rank"] = float(np.mean([s[kind][k] for s in spectra])) if spectra else float("nan")
        smaller = [min(stats.shapes[t]) for t in index if t in stats.ranks]
        row["effective_rank_share"] = (
            float(np.mean([s["effective"][k] / n for s, n in zip(spectra, smaller)])) if spectra else float("nan")
        )
        rows.append(row)
    return rows


def pair_rows(stats: WeightStats, level: str, group: str, index: list[int]) -> list[dict[str, Any]]:
    """One row per pair of models: cosine, signs, overlaps with their expectation."""
    whole = stats.delta.select(index).total()
    numel = np.maximum(stats.delta.numel[index], 1)
    rows = []
    for i, a in enumerate(stats.models):
        for j, b in enumerate(stats.models[i + 1 :], i + 1):
            row: dict[str, Any] = {
                "level": level,
                "group": group,
                "a": a,
                "b": b,
                "cosine": float(whole.cosine[0, i, j]),
                "sign_agreement": float(whole.sign_agreement[0, i, j]),
            }
            for c in CRITERIA:
                counts = stats.supports[c][index]
                A, B, both = (float(counts[:, p, q].sum()) for p, q in ((i, i), (j, j), (i, j)))
                expected = float((counts[:, i, i] * (counts[:, j, j] / numel)).sum())
                row |= {
                    f"jaccard_{c}": _over(both, A + B - both),
                    f"expected_jaccard_{c}": _over(expected, A + B - expected),
                    f"overlap_{c}": _over(both, min(A, B)),
                    f"expected_overlap_{c}": _over(expected, min(A, B)),
                    f"lift_{c}": _over(both, expected),
                }
            rows.append(row)
    return rows


def _over(a: float, b: float) -> float:
    return float(a / b) if b > 0 else float("nan")


def projected_cosine(sketch_MS: np.ndarray) -> np.ndarray:
    """[M, M] cosines of projected updates; NaN where one is zero."""
    inner = sketch_MS @ sketch_MS.T
    norm = np.sqrt(np.diagonal(inner))
    scale = norm[:, None] * norm[None, :]
    return np.divide(inner, scale, out=np.full_like(inner, np.nan), where=scale > 0)


# ---- the analysis ----------------------------------------------------------------------------------------------------


def analyze(stats: WeightStats, *, base: str = "base") -> Analysis:
    """Tables and figures of one measurement."""
    levels = groups(stats)
    updates = [
        r for level, members in levels.items() for g, i in members.items() for r in share_rows(stats, level, g, i)
    ]
    pairs = [r for level, members in levels.items() for g, i in members.items() for r in pair_rows(stats, level, g, i)]
    whole = stats.delta.total()
    cosine = whole.cosine[0]
    projected = projected_cosine(stats.sketch)
    size = stats.sketch.shape[1]
    names = stats.models
    M = len(names)

    def matrix(key: str) -> np.ndarray:
        out = np.full((M, M), np.nan)
        for row in pairs:
            if row["level"] == "model":
                i, j = names.index(row["a"]), names.index(row["b"])
                out[i, j] = out[j, i] = row[key]
        return out

    layers, modules = list(levels["layer"]), list(levels["module"])
    found = {(r["level"], r["group"], r["model"]): r for r in updates}

    def by_layer(key: str) -> list[figures.Series]:
        depth = [float(g) for g in layers]
        return [figures.Series(m, depth, [found["layer", g, m][key] for g in layers]) for m in names]

    drawn = [
        figures.heat_map("cosine", "Cosine of updates", cosine, names, names),
        figures.heat_map("projected", f"Cosine after random projection to {size} dimensions", projected, names, names),
        figures.heat_map("signs", "Sign agreement where both changed", whole.sign_agreement[0], names, names),
        *(
            figures.heat_map(f"overlap-{c}", f"Overlap over its expectation ({c})", matrix(f"lift_{c}"), names, names)
            for c in CRITERIA
        ),
        figures.bars(
            "footprint",
            "Share of parameters changed",
            {c: [float(stats.supports[c][:, k, k].sum() / max(whole.numel[0], 1)) for k in range(M)] for c in CRITERIA},
            names,
            y_title="share",
        ),
        figures.bars(
            "modules",
            "Size of updates by module type",
            {m: [found["module", g, m]["relative_norm"] for g in modules] for m in names},
            modules,
            y_title="|d| / |w|",
        ),
    ]
    if layers:
        drawn.append(
            figures.chart(
                "layers",
                "lines",
                "Size of updates by layer",
                by_layer("relative_norm"),
                x_title="layer",
                y_title="|d| / |w|",
            )
        )
        if stats.ranks:
            drawn.append(
                figures.chart(
                    "rank",
                    "lines",
                    "Effective rank over full rank, mean of a layer's matrices",
                    by_layer("effective_rank_share"),
                    x_title="layer",
                    y_title="share",
                )
            )
    return Analysis(
        "weights",
        {
            "changed_nonzero": "share of elements with w != base, as stored",
            "changed_bf16": "share of elements whose bfloat16 value differs from the base's",
            "changed_relative": f"share of elements with |w - base| > {ETA:g} max(|w|, |base|)",
            "changed_large": f"share of elements with |w - base| >= 2^e, per tensor and model the least e that "
            f"leaves at most {LARGE_SHARE:.0%}",
            "norm": "Euclidean norm of the update; relative_norm: over the base's norm",
            "rank": "effective rank exp(entropy of sigma / sum sigma), stable rank sum sigma^2 / max sigma^2, means "
            "over the matrices of a group whose spectra were taken",
            "cosine": "inner product of two updates over the product of their norms, exact",
            "projected": f"the same after a count sketch of the whole update to {size} dimensions; standard deviation "
            f"at most sqrt((1 + cosine^2) / {size})",
            "sign_agreement": "of the elements changed in both models, the share changed in the same direction",
            "jaccard": "|A and B| / |A or B| of the two footprints",
            "overlap": "|A and B| / min(|A|, |B|)",
            "expected": "the same if the footprints were independent inside every tensor",
            "lift": "|A and B| over its expectation under independence",
        },
        f"Idea: {PAPER}, section 'Explore Weight Shift' (no formula is given). Relative criterion: arXiv 2511.08567. "
        "Effective rank: Roy & Vetterli 2007. Count sketch: Charikar et al. 2002.",
        {
            "base": base,
            "models": names,
            "tensors": len(stats.tensors),
            "parameters": int(whole.numel[0]),
            "spectra": len(stats.ranks),
            "sketch_size": size,
        },
        {
            "cosine": cosine,
            "projected_cosine": projected,
            "projected_std_at_most": np.sqrt((1 + cosine**2) / size),
            "sign_agreement": whole.sign_agreement[0],
            "updates": [r for r in updates if r["level"] == "model"],
            "pairs": [r for r in pairs if r["level"] == "model"],
        },
        {"updates": updates, "pairs": pairs},
        drawn,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="folder or cached hub id of the model that training started from")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--sketch-size", type=int, default=SKETCH_SIZE, help="dimensions of the random projection")
    parser.add_argument("--rank-every", type=int, help="spectra of every n-th layer; 0 = none")
    parser.add_argument("--seed", type=int, default=0, help="of the random projection")


def run(args: argparse.Namespace) -> Analysis:
    device = torch.device("cuda") if torch.cuda.is_available() else None
    stats = measure(
        args.base,
        named(args.models, "--models"),
        sketch_size=args.sketch_size,
        rank_every=args.rank_every,
        seed=args.seed,
        device=device,
    )
    return analyze(stats, base=str(args.base))
