"""What a merge is: the methods, the presets, and `recipe()`, which resolves every choice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """What a method does with the task vectors; `normalize` is its default."""

    filter: str  # none | magnitude | random | ranked | outliers | variance
    combine: str  # linear | sum | elect | ram | stock | karcher | spectral
    normalize: bool
    uses: tuple[str, ...]  # options it reads, beyond weights and lam
    formula: str
    source: str


METHODS: dict[str, Method] = {
    "average": Method("none", "linear", True, (), "sum w_k x_k / sum w_k", "arXiv:2203.05482"),
    "task_arithmetic": Method("none", "sum", False, (), "b + lambda sum w_k d_k", "arXiv:2212.04089"),
    "ties": Method(
        "magnitude",
        "elect",
        True,
        ("density", "scope", "ties", "zero_sign"),
        "top-k |d|, elect sign(sum w_k d_k), mean of those that agree",
        "arXiv:2306.01708",
    ),
    "dare_linear": Method(
        "random",
        "sum",
        False,
        ("density", "rescale", "seed"),
        "b + lambda sum w_k m_k d_k / p, m ~ Bernoulli(p)",
        "arXiv:2311.03099",
    ),
    "dare_ties": Method(
        "random",
        "elect",
        True,
        ("density", "rescale", "seed", "zero_sign", "trim_density", "scope", "ties"),
        "random mask, then sign election (top-k first with trim_density)",
        "arXiv:2311.03099",
    ),
    "sce": Method(
        "variance",
        "elect",
        True,
        ("density", "sce_select", "sce_eps", "zero_sign"),
        "w_k = mean(d_k^2) / sum, sign of the plain sum, weighted mean of those that agree",
        "arXiv:2408.07990",
    ),
    "breadcrumbs": Method(
        "outliers",
        "sum",
        False,
        ("density", "gamma", "scope", "rescale"),
        "drop the largest gamma, keep the next density, sum",
        "arXiv:2312.06795",
    ),
    "breadcrumbs_ties": Method(
        "outliers",
        "elect",
        True,
        ("density", "gamma", "scope", "rescale", "zero_sign"),
        "the same, then sign election",
        "arXiv:2312.06795",
    ),
    "della": Method(
        "ranked",
        "elect",
        True,
        ("density", "epsilon", "rescale", "seed", "zero_sign"),
        "keep probability p - eps .. p + eps by rank in the row, then sign election",
        "arXiv:2406.11617",
    ),
    "della_linear": Method(
        "ranked", "sum", False, ("density", "epsilon", "rescale", "seed"), "the same, then sum", "arXiv:2406.11617"
    ),
    "ram": Method(
        "none",
        "ram",
        False,
        ("epsilon",),
        "changed by one expert: kept whole; by several: their mean",
        "arXiv:2601.13572",
    ),
    "ram_plus": Method(
        "none",
        "ram",
        False,
        ("epsilon", "r", "alpha", "scope"),
        "RAM, the unique part times 1 + r min(shared / unique, alpha)",
        "arXiv:2601.13572",
    ),
    "model_stock": Method(
        "none", "stock", False, (), "b + t mean d, t = K c / (1 + (K - 1) c), c = mean cosine", "arXiv:2403.19522"
    ),
    "karcher": Method(
        "none",
        "karcher",
        False,
        ("iterations",),
        "Riemannian mean of x_k / |x_k|, times the mean norm",
        "arXiv:2603.04972",
    ),
    "tsv_m": Method(
        "none",
        "spectral",
        False,
        (),
        "rank/K singular parts of each d_k, U and V orthogonalised together",
        "arXiv:2412.00081",
    ),
    "iso_c": Method("none", "spectral", False, (), "sum d_k = U S V^T -> mean(S) U V^T", "arXiv:2502.04959"),
}

# What a preset changes, by option; `normalize` may depend on the method.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "scope": "model",
        "ties": "all",
        "zero_sign": "majority",
        "rescale": "inv_keep",
        "normalize": {},
        "sce_select": "weights",
        "sce_eps": 0.0,
        "compute_dtype": "float32",
    },
    "mergekit": {
        "scope": "tensor",
        "ties": "lowest_index",
        "zero_sign": "plus",
        "rescale": "l1",
        "normalize": {"dare_ties": False, "breadcrumbs_ties": False},
        "sce_select": "deltas",
        "sce_eps": 1e-6,
        "compute_dtype": "input",
    },
}
CHOICES = {
    "scope": ("tensor", "model"),
    "ties": ("lowest_index", "all"),
    "zero_sign": ("plus", "majority"),
    "rescale": ("inv_keep", "l1", "none"),
    "sce_select": ("weights", "deltas"),
    "compute_dtype": ("float32", "bfloat16", "float16", "input"),
}


@dataclass(frozen=True)
class Recipe:
    """One merge, every choice resolved. Build it with `recipe()`."""

    method: str
    experts: int
    weights: tuple[float, ...]  # [K]
    density: tuple[float, ...]  # [K] fraction kept, in (0, 1]; DARE's and DELLA's keep probability
    lam: float = 1.0  # factor of the merged task vector
    normalize: bool = False  # divide by the weights that count
    scope: str = "tensor"  # thresholds per tensor, or one over the whole flattened model
    ties: str = "lowest_index"  # exactly k kept, or all that equal the threshold (the authors' >=)
    zero_sign: str = "plus"  # elected sign where the sum is exactly 0: +, or the sign of most elements
    rescale: str = "inv_keep"  # after a random mask: 1/p, restore the L1 norm, or nothing
    sce_select: str = "weights"  # the variance mask acts on SCE's weights only, or on the task vectors too
    sce_eps: float = 0.0  # SCE falls back to uniform weights when sum_k mean(d_k^2) <= this
    compute_dtype: str = "float32"  # every intermediate is rounded to it ("input": to the tensors' own type)
    trim_density: float | None = None  # DARE+TIES: top-k after the random mask
    gamma: float = 0.01  # breadcrumbs: fraction of the largest dropped
    epsilon: float = 0.0  # DELLA: half width of the keep probabilities; RAM: |d| above it counts as changed
    r: float = 0.1  # RAM+
    alpha: float = 0.2  # RAM+
    iterations: int = 10  # Karcher
    seed: int = 0
    preset: str | None = None
    config: str | None = None  # the text of the recipe file, for the card
    # tensor name -> options that differ for it (weights, density, lam): filters and gradients of a YAML recipe
    per_tensor: Callable[[str], Mapping[str, Any]] | None = field(default=None, compare=False)

    @property
    def rule(self) -> Method:
        return METHODS[self.method]

    @property
    def needs_base(self) -> bool:
        return self.method not in ("average", "karcher")

    def describe(self) -> dict[str, Any]:
        """The resolved choices this method reads, for the model card and for fingerprints."""
        keep = {"method", "weights", "lam", "normalize", "compute_dtype", "preset", "config", *self.rule.uses}
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in keep}
        if self.method in ("average", "karcher"):
            del found["lam"]
        return found


def recipe(
    method: str,
    experts: int,
    *,
    preset: str | None = None,
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    **options: Any,
) -> Recipe:
    """Resolve defaults, then the preset, then what the caller names. ValueError names the option, the rule and the
    value."""
    if method in ("dare", "dare_task_arithmetic"):
        method = "dare_linear"
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)} or None, got {preset!r}")
    if experts < 1:
        raise ValueError("experts must name at least one model, got none")
    rule = METHODS[method]
    resolved: dict[str, Any] = {"normalize": rule.normalize}
    if method in ("breadcrumbs", "breadcrumbs_ties"):
        resolved["rescale"] = "none"  # only a random mask is rescaled unless asked
    for name, value in (PRESETS[preset] if preset else {}).items():
        if name == "normalize":
            resolved[name] = value.get(method, rule.normalize)
        elif name != "rescale" or rule.filter in ("random", "ranked"):
            resolved[name] = value
    resolved["epsilon"] = 0.15 if rule.filter == "ranked" else 1e-5
    unknown = set(options) - {f.name for f in dataclasses.fields(Recipe)}
    if unknown:
        raise ValueError(
            f"unknown merge option {sorted(unknown)[0]!r}; {method} reads {', '.join(('weights', 'lam', *rule.uses))}"
        )
    resolved.update({name: value for name, value in options.items() if value is not None})
    for name, allowed in CHOICES.items():
        if name in resolved and resolved[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {resolved[name]!r}")
    if density is None and rule.filter in ("magnitude", "random", "ranked", "outliers"):
        raise ValueError(f"density must be given for {method}: the fraction of each task vector that is kept")
    if not -(2**63) <= resolved.get("seed", 0) < 2**63:
        raise ValueError(f"seed must be a signed 64-bit integer, got {resolved['seed']}")
    share = per_expert("weights", 1.0 if weights is None else weights, experts)
    keep = per_expert("density", 1.0 if density is None else density, experts)
    check_density("density", keep)
    if resolved.get("trim_density") is not None:
        check_density("trim_density", (resolved["trim_density"],))
    if not all(math.isfinite(w) for w in share):
        raise ValueError(f"weights must be finite, got {share}")
    if method == "average" and resolved["normalize"] and sum(share) == 0:
        raise ValueError(f"weights of an average must not sum to 0, got {share}")
    if method == "model_stock" and experts < 2:
        raise ValueError(f"model_stock needs at least 2 experts, got {experts}")
    if not math.isfinite(resolved.get("lam", 1.0)):
        raise ValueError(f"lam must be finite, got {resolved['lam']}")
    if not 0 <= resolved.get("gamma", 0.01) < 1:
        raise ValueError(f"gamma must lie in [0, 1), got {resolved['gamma']}")
    if resolved.get("iterations", 0) < 0:
        raise ValueError(f"iterations must be 0 or more, got {resolved['iterations']}")
    if rule.filter == "ranked":
        for p in keep:
            if p < 1 and not (resolved["epsilon"] >= 0 and p - resolved["epsilon"] > 0 and p + resolved["epsilon"] < 1):
                raise ValueError(
                    f"epsilon must keep density - epsilon and density + epsilon inside (0, 1), "
                    f"got density {p}, epsilon {resolved['epsilon']}"
                )
    return Recipe(method, experts, share, keep, preset=preset, **resolved)


def check_read(method: str, given: Iterable[str]) -> None:
    """ValueError for an option of `recipe` that this method does not read: it would change nothing, silently."""
    rule = METHODS.get({"dare": "dare_linear", "dare_task_arithmetic": "dare_linear"}.get(method, method))
    if rule is None:
        return  # `recipe` says so
    read = ["preset", "weights", "normalize", "compute_dtype", *rule.uses]
    read += [] if method in ("average", "karcher") else ["lam"]
    for name in given:
        if name not in read:
            raise ValueError(f"{method} does not read {name}; it reads {', '.join(read)}")


def per_expert(name: str, value: float | Sequence[float], experts: int) -> tuple[float, ...]:
    values = tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),) * experts
    if len(values) != experts:
        raise ValueError(f"{name} must be one number or one per expert ({experts}), got {len(values)}")
    return values


def check_density(name: str, values: Sequence[float]) -> None:
    for p in values:
        if not 0 < p <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {p}")
