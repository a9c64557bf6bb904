"""Policies: how far every policy is from every other, who its neighbours are, and what explains its accuracy.

    KL(a || b) = E_{y ~ a(.|x)} sum_t log a(y_t) / b(y_t)     nats per response, y sampled from a, x from a domain
    with d_t = log a(y_t|s_t) - log b(y_t|s_t):
      k1    sum_t d_t                          unbiased, high variance
      k3    sum_t (exp(-d_t) - 1 + d_t)        unbiased where a's support covers b's, never negative per token
      full  sum_t KL(a(.|s_t) || b(.|s_t))     the exact divergence of each next-token distribution along a's samples
    All three estimate the same number; per token: the sum over responses divided by the sum of their tokens.
    Standard errors take the prompt as the unit that was drawn (a prompt's samples are not independent).

    neighbourhood of m on a domain: the policies nearer to m than the base is, KL(m || j) < KL(m || base), ranked
    transfer of m on a domain:      mean accuracy on that domain of the experts in its neighbourhood (never m itself;
                                    the nearest expert where none is nearer than the base)

M policies, D domains, S samples, N tokens, P prompts, V vocabulary, H hidden. Cost: one forward of a and of b over a's
tokens and one `linear_kl` per ordered pair, [N, V] never formed; two policies are in memory at once. k1 and k3:
Schulman, "Approximating KL divergence" (2020). The paper names "policy neighborhoods" and gives no formula; the
definitions above are ours.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from m2rl_kernels import plan_packing
from m2rl_kernels.linear_kl import linear_kl
from m2rl_kernels.linear_logprob import linear_logprob
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from m2rl.analyze import figures
from m2rl.analyze.output import PAPER, Analysis
from m2rl.analyze.sampling import sample_models
from m2rl.analyze.skills import rewards_of
from m2rl.command import named
from m2rl.config import Config
from m2rl.evaluate import Evaluator
from m2rl.objectives import trained_mask
from m2rl.policy import Packed, Policy, load_model, reading_model
from m2rl.samples import find, read_folder
from m2rl.types import InputError, Sample

ESTIMATORS = ("k1", "k3", "full")
TOKENS_PER_BIN = 8192
RESAMPLES = 2000

Source = str | Path | Policy  # a Hugging Face folder, or a policy in memory


Masked = tuple[Sequence[int], Sequence[bool] | np.ndarray]  # tokens, and which of them are scored


# ---- scoring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scored:
    """Some sequences laid out for one forward pass, and which of their tokens are scored."""

    packed: Packed
    rows_N: Tensor  # [N] int64: position whose hidden state predicts the target
    targets_N: Tensor  # [N] int64
    members: list[int]  # indices of the sequences
    counts: list[int]  # scored tokens of each


def scored_bins(
    sequences: Sequence[Masked],
    device: torch.device,
    tokens_per_bin: int = TOKENS_PER_BIN,
) -> Iterator[Scored]:
    """(tokens, mask of scored tokens) in packed bins, each in order of length; the first token of a sequence cannot be
    scored."""
    lengths = [len(tokens) for tokens, _ in sequences]
    plan = plan_packing(lengths, max(tokens_per_bin, max(lengths, default=2)), 1)
    for members in plan.bins[0]:
        members = sorted(members, key=lengths.__getitem__)
        chosen = [sequences[i] for i in members]
        if not chosen:
            continue
        packed = Packed.of([list(tokens) for tokens, _ in chosen], device)
        rows_N, targets_N = packed.targets(np.concatenate([np.asarray(m, dtype=bool) for _, m in chosen]))
        yield Scored(packed, rows_N, targets_N, members, [int(np.sum(m)) for _, m in chosen])


def sequence_of(sample: Sample) -> tuple[list[int], np.ndarray]:
    """A sample as (prompt and response tokens, mask of those the policy wrote)."""
    return [*sample.prompt.tokens, *sample.tokens], trained_mask(sample)


@torch.no_grad()
def token_logprobs(
    policy: Policy,
    sequences: Sequence[Masked],
    *,
    temperature: float = 1.0,
    tokens_per_bin: int = TOKENS_PER_BIN,
) -> list[np.ndarray]:
    """[scored tokens] float64 log-probabilities (nats) of each sequence's scored tokens under `policy`."""
    out: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    for b in scored_bins(sequences, policy.device, tokens_per_bin):
        logp = linear_logprob(policy.hidden(b.packed)[b.rows_N], policy.head, b.targets_N, temperature=temperature)
        parts = np.split(logp.double().cpu().numpy(), np.cumsum(b.counts)[:-1])
        for i, part in zip(b.members, parts):
            out[i] = part
    return out


# ---- divergences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Divergences:
    """KL(a || b) along samples of a, one entry per response; nats."""

    prompt: list[str]  # [S] prompt ids
    tokens: np.ndarray  # [S] scored tokens
    k1: np.ndarray  # [S]
    k3: np.ndarray  # [S]
    full: np.ndarray  # [S]

    def take(self, index: Sequence[int]) -> Divergences:
        i = list(index)
        return Divergences([self.prompt[j] for j in i], self.tokens[i], self.k1[i], self.k3[i], self.full[i])


@torch.no_grad()
def divergences(
    a: Policy, b: Policy, samples: Sequence[Sample], *, temperature: float = 1.0, tokens_per_bin: int = TOKENS_PER_BIN
) -> Divergences:
    """KL(a || b) along `samples`, which a drew at `temperature`. InputError if the vocabularies differ in size."""
    if a.head.shape[0] != b.head.shape[0]:
        raise InputError(
            f"two policies have different vocabularies ({a.head.shape[0]} and {b.head.shape[0]} tokens): no divergence "
            "is defined between them"
        )
    sums = np.zeros((3, len(samples)))
    counts_S = np.zeros(len(samples))
    for scored in scored_bins([sequence_of(s) for s in samples], a.device, tokens_per_bin):
        h_a, h_b = a.hidden(scored.packed, scored.rows_N), b.hidden(scored.packed, scored.rows_N)
        d = (
            linear_logprob(h_a, a.head, scored.targets_N, temperature=temperature)
            - linear_logprob(h_b, b.head, scored.targets_N, temperature=temperature)
        ).double()
        full = linear_kl(h_a, a.head, h_b, b.head, direction="reverse", temperature=temperature).double()
        values = torch.stack([d, torch.expm1(-d) + d, full]).cpu().numpy()
        segment = np.repeat(np.arange(len(scored.members)), scored.counts)
        for row, value in zip(sums, values):
            row[scored.members] = np.bincount(segment, value, len(scored.members))
        counts_S[scored.members] = scored.counts
    return Divergences([s.prompt.id for s in samples], counts_S, *sums)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One divergence with its standard errors, prompts being the sampling unit."""

    nats: float  # per response
    se: float
    nats_per_token: float
    se_per_token: float
    prompts: int


def per_prompt(values_S: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """[P] mean over each prompt's samples, in order of first appearance."""
    order = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    index = np.array([order[p] for p in prompts], dtype=np.int64)
    return np.bincount(index, values_S, len(order)) / np.bincount(index, minlength=len(order))


def estimate(values_S: np.ndarray, tokens_S: np.ndarray, prompts: Sequence[str]) -> Estimate:
    """Mean over prompts and its standard error; the ratio per token with its linearised one. NaN errors for P = 1."""
    y, n = per_prompt(values_S, prompts), per_prompt(tokens_S, prompts)
    P, tokens = len(y), max(n.sum(), 1e-300)
    ratio = float(y.sum() / tokens)
    if P < 2:
        return Estimate(float(y.mean()), float("nan"), ratio, float("nan"), P)
    spread = float(np.sqrt(((y - ratio * n) ** 2).sum() * P / (P - 1)) / tokens)
    return Estimate(float(y.mean()), float(y.std(ddof=1) / np.sqrt(P)), ratio, spread, P)


class Library:
    """Policies by name, at most `keep` of those given as folders in memory at once."""

    def __init__(
        self,
        models: Mapping[str, Source],
        keep: int = 2,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.models, self.keep, self.dtype = models, max(keep, 2), dtype
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.loaded: dict[str, Policy] = {}

    def __getitem__(self, name: str) -> Policy:
        source = self.models[name]
        if isinstance(source, Policy):
            return source
        if name in self.loaded:
            self.loaded[name] = self.loaded.pop(name)  # the youngest
        else:
            while len(self.loaded) >= self.keep:
                del self.loaded[next(iter(self.loaded))]
            self.loaded[name] = Policy(load_model(source, self.dtype)).to(self.device).eval().requires_grad_(False)
        return self.loaded[name]


@dataclass(frozen=True)
class KLMatrix:
    """Divergences of all ordered pairs: pairs[a, b] along a's samples, of all domains together."""

    names: list[str]
    domains: list[str]
    domain_of: dict[str, str]  # prompt id -> domain
    pairs: dict[tuple[str, str], Divergences]

    def of(self, a: str, b: str, domain: str | None = None) -> Divergences:
        """The responses to one domain's prompts, or all."""
        found = self.pairs[a, b]
        if domain is None:
            return found
        return found.take([i for i, p in enumerate(found.prompt) if self.domain_of[p] == domain])

    def estimate(self, a: str, b: str, domain: str | None = None, estimator: str = "full") -> Estimate:
        found = self.of(a, b, domain)
        return estimate(getattr(found, estimator), found.tokens, found.prompt)

    def matrix(self, domain: str | None = None, estimator: str = "full", per_token: bool = False) -> np.ndarray:
        """[M, M] nats; rows sampled."""
        key = "nats_per_token" if per_token else "nats"
        return np.array(
            [[getattr(self.estimate(a, b, domain, estimator), key) for b in self.names] for a in self.names]
        )


def check_models(models: Mapping[str, Source]) -> None:
    """InputError unless all folders load as models of one vocabulary and one tokenizer; weights are not read."""
    if len(models) < 2:
        raise InputError(f"divergences need at least two policies, got {len(models)}")
    sizes: dict[str, int] = {}
    vocabularies: dict[str, dict[str, int]] = {}
    for name, source in models.items():
        if isinstance(source, Policy):
            sizes[name] = source.head.shape[0]
            continue
        with reading_model(f"model {name} ({source}): not a Hugging Face model folder or id"):
            sizes[name] = AutoConfig.from_pretrained(source).vocab_size
            vocabularies[name] = AutoTokenizer.from_pretrained(source).get_vocab()
    first = next(iter(sizes))
    for name, size in sizes.items():
        if size != sizes[first]:
            raise InputError(f"{first} and {name} have different vocabularies: {sizes[first]} and {size} tokens")
    for name, vocabulary in vocabularies.items():
        reference = vocabularies[next(iter(vocabularies))]
        if vocabulary != reference:
            odd = sorted(set(vocabulary.items()) ^ set(reference.items()))
            raise InputError(
                f"{next(iter(vocabularies))} and {name} have different tokenizers: {len(odd)} entries differ, first "
                f"{odd[0][0]!r}"
            )


def kl_matrix(
    models: Mapping[str, Source],
    samples: Mapping[str, Sequence[Sample]],
    *,
    temperature: float = 1.0,
    tokens_per_bin: int = TOKENS_PER_BIN,
    keep: int = 2,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> KLMatrix:
    """Every ordered pair of `models` along the samples of the first of the pair.

    samples: by model, drawn from it at `temperature`; every model on the same prompts. keep: policies held in memory.
    InputError, before any weight is read, for unlike vocabularies or tokenizers, and for missing or empty samples.
    """
    names = list(models)
    order = [
        (a, b)
        for i, a in enumerate(names)
        for b in (names if i % 2 == 0 else names[::-1])  # back and forth: the last policy loaded is the next one used
    ]
    return _pairs(models, samples, order, temperature, tokens_per_bin, Library(models, keep, device, dtype))


def kl_to(
    models: Mapping[str, Source],
    samples: Mapping[str, Sequence[Sample]],
    base: str,
    *,
    temperature: float = 1.0,
    tokens_per_bin: int = TOKENS_PER_BIN,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> KLMatrix:
    """Only the column of `base`: every model against it, along the model's own samples. Otherwise as kl_matrix."""
    library = Library(models, 2, device, dtype)
    return _pairs(models, samples, [(m, base) for m in models], temperature, tokens_per_bin, library)


def _pairs(
    models: Mapping[str, Source],
    samples: Mapping[str, Sequence[Sample]],
    order: Sequence[tuple[str, str]],
    temperature: float,
    tokens_per_bin: int,
    library: Library,
) -> KLMatrix:
    check_models(models)
    for name in models:
        if not samples.get(name):
            raise InputError(f"no samples of {name}: its benchmark is empty")
        if any(not s.tokens or not s.prompt.tokens for s in samples[name]):
            raise InputError(f"the samples of {name} carry no tokens: divergences need prompt and response tokens")
    pairs: dict[tuple[str, str], Divergences] = {}
    for a, b in order:
        if a == b:
            zero = np.zeros(len(samples[a]))
            tokens = np.array([float(sequence_of(s)[1].sum()) for s in samples[a]])
            pairs[a, b] = Divergences([s.prompt.id for s in samples[a]], tokens, zero, zero, zero)
        else:
            pairs[a, b] = divergences(
                library[a], library[b], samples[a], temperature=temperature, tokens_per_bin=tokens_per_bin
            )
    domain_of = {s.prompt.id: s.prompt.domain for mine in samples.values() for s in mine}
    return KLMatrix(list(models), list(dict.fromkeys(domain_of.values())), domain_of, pairs)


# ---- neighbourhoods and what explains accuracy -----------------------------------------------------------------------


def neighbours(kl: KLMatrix, base: str, domain: str | None = None, estimator: str = "full") -> list[dict[str, Any]]:
    """For every policy but the base: the others by distance, and whether each is nearer than the base.

    `closer` = KL(m || base) - KL(m || j) with a standard error over paired prompts: both are along m's own samples.
    """
    out = []
    for m in kl.names:
        if m == base:
            continue
        to_base = kl.of(m, base, domain)
        found = []
        for j in kl.names:
            if j == m:
                continue
            mine = kl.of(m, j, domain)
            closer = estimate(getattr(to_base, estimator) - getattr(mine, estimator), mine.tokens, mine.prompt)
            found.append((kl.estimate(m, j, domain, estimator), closer, j))
        found.sort(key=lambda entry: entry[0].nats)
        for rank, (distance, closer, j) in enumerate(found, 1):
            out.append(
                {
                    "policy": m,
                    "domain": domain or "all",
                    "rank": rank,
                    "neighbour": j,
                    "nats": distance.nats,
                    "se": distance.se,
                    "nearer_than_base": j != base and closer.nats > 0,
                    "closer": closer.nats,
                    "closer_se": closer.se,
                }
            )
    return out


def transfer_table(
    kl: KLMatrix,
    accuracy: Mapping[str, Mapping[str, float]],
    *,
    base: str,
    experts: Mapping[str, str],
    estimator: str = "full",
) -> list[dict[str, Any]]:
    """One row per policy and domain, the domain's own expert left out (its divergence is 0 by definition).

    accuracy: policy -> domain -> Avg@K. experts: domain -> policy.
    """
    rows = []
    for domain, own in experts.items():
        for m in kl.names:
            if m == own:
                continue
            others = [e for e in dict.fromkeys(experts.values()) if e != m]
            distance = {j: kl.estimate(m, j, domain, estimator).nats for j in [*others, base]}
            near = [e for e in others if m == base or distance[e] < distance[base]]
            if m == base or not near:
                near = [min(others, key=distance.__getitem__)]
            rows.append(
                {
                    "policy": m,
                    "domain": domain,
                    "accuracy": accuracy[m][domain],
                    "own_teacher_kl": distance[own],
                    "neighbour_transfer": float(np.mean([accuracy[e][domain] for e in near])),
                    "neighbours": " ".join(near),
                }
            )
    return rows


@dataclass(frozen=True, slots=True)
class Regression:
    """Least squares with an intercept on standardised predictors; intervals resample whole groups."""

    predictors: list[str]
    coefficients: list[float]  # change of y per standard deviation of the predictor
    se: list[float]  # classical
    low: list[float]  # 95% percentile bootstrap over groups
    high: list[float]
    r2: float
    r2_low: float
    r2_high: float
    r2_left_out: float  # each group predicted by a fit to the others; below 0 = worse than the others' mean
    observations: int
    groups: int


def _fit(y_N: np.ndarray, X_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(coefficients with the intercept first, residuals, R^2)."""
    design = np.column_stack([np.ones(len(y_N)), X_NK])
    beta = np.linalg.lstsq(design, y_N, rcond=None)[0]
    residual = y_N - design @ beta
    total = ((y_N - y_N.mean()) ** 2).sum()
    return beta, residual, 1 - float((residual**2).sum() / total) if total > 0 else float("nan")


def regress(
    y_N: np.ndarray,
    X_NK: np.ndarray,
    groups: Sequence[str],
    predictors: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Regression:
    """Explain y by the columns of X. Rows of one group (a policy on its several domains) are resampled and left out
    together. InputError for fewer than K + 2 observations."""
    y, X = np.asarray(y_N, np.float64), np.asarray(X_NK, np.float64).reshape(len(y_N), -1)
    N, K = X.shape
    if N < K + 2:
        raise InputError(f"a regression on {K} predictors needs at least {K + 2} observations, got {N}")
    scale = X.std(0)
    Z = (X - X.mean(0)) / np.where(scale > 0, scale, 1.0)
    beta, residual, r2 = _fit(y, Z)
    design = np.column_stack([np.ones(N), Z])
    variance = (residual**2).sum() / (N - K - 1) * np.linalg.pinv(design.T @ design)
    names = list(dict.fromkeys(groups))
    rows_of = [np.flatnonzero(np.array(groups) == g) for g in names]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        index = np.concatenate([rows_of[g] for g in rng.integers(0, len(names), len(names))])
        if len(np.unique(y[index])) > 1:
            b, _, r = _fit(y[index], Z[index])
            drawn.append([*b[1:], r])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if drawn else np.full((2, K + 1), np.nan)
    wrong, spread = 0.0, 0.0
    for mine in rows_of:
        rest = np.setdiff1d(np.arange(N), mine)
        if len(rest) <= K + 1:
            wrong = spread = float("nan")
            break
        b, _, _ = _fit(y[rest], Z[rest])
        wrong += float(((y[mine] - b[0] - Z[mine] @ b[1:]) ** 2).sum())
        spread += float(((y[mine] - y[rest].mean()) ** 2).sum())
    return Regression(
        list(predictors),
        beta[1:].tolist(),
        np.sqrt(np.diag(variance))[1:].tolist(),
        low[:-1].tolist(),
        high[:-1].tolist(),
        r2,
        float(low[-1]),
        float(high[-1]),
        1 - wrong / spread if spread else float("nan"),
        N,
        len(names),
    )


def explain(table: Sequence[Mapping[str, Any]], *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Regression]:
    """Accuracy on own-teacher KL, on neighbour transfer, and on both; domain means are taken out first, because domains
    differ in difficulty."""
    groups = [str(row["policy"]) for row in table]
    domains = np.array([row["domain"] for row in table])
    columns = {k: np.array([float(row[k]) for row in table]) for k in ("accuracy", *PREDICTORS)}
    for values in columns.values():
        for d in dict.fromkeys(domains.tolist()):
            values[domains == d] -= values[domains == d].mean()
    models = {"own_teacher_kl": PREDICTORS[:1], "neighbour_transfer": PREDICTORS[1:], "mixture": PREDICTORS}
    return {
        name: regress(
            columns["accuracy"],
            np.column_stack([columns[k] for k in chosen]),
            groups,
            chosen,
            seed=seed,
            resamples=resamples,
        )
        for name, chosen in models.items()
    }


PREDICTORS = ("own_teacher_kl", "neighbour_transfer")


def accuracies(samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, float]]:
    """Policy -> domain -> Avg@K."""
    out: dict[str, dict[str, float]] = {}
    for name, mine in samples.items():
        by_domain: dict[str, list[float]] = {}
        domain_of = {s.prompt.id: s.prompt.domain for s in mine}
        for problem, r in rewards_of(mine).items():
            by_domain.setdefault(domain_of[problem], []).append(float(r.mean()))
        out[name] = {d: float(np.mean(v)) for d, v in by_domain.items()}
    return out


# ---- the analysis ----------------------------------------------------------------------------------------------------


def analyze(
    kl: KLMatrix,
    accuracy: Mapping[str, Mapping[str, float]],
    *,
    base: str,
    experts: Mapping[str, str],
    temperature: float = 1.0,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Analysis:
    """Matrices, neighbourhoods and regressions. accuracy: policy -> domain -> Avg@K; experts: domain -> policy."""
    for name in (base, *experts.values()):
        if name not in kl.names:
            raise InputError(f"no divergences of {name} (there are: {', '.join(kl.names)})")
    for domain in experts:
        if domain not in kl.domains:
            raise InputError(
                f"expert {experts[domain]}: no samples of domain {domain} (there are: {', '.join(kl.domains)})"
            )
    pairs = []
    for domain in kl.domains:
        for a in kl.names:
            for b in kl.names:
                row: dict[str, Any] = {"policy": a, "other": b, "domain": domain}
                for estimator in ESTIMATORS:
                    e = kl.estimate(a, b, domain, estimator)
                    row |= {
                        f"{estimator}": e.nats,
                        f"{estimator}_se": e.se,
                        f"{estimator}_per_token": e.nats_per_token,
                        f"{estimator}_per_token_se": e.se_per_token,
                        "prompts": e.prompts,
                    }
                pairs.append(row)
    near = [row for domain in kl.domains for row in neighbours(kl, base, domain)]
    table = transfer_table(kl, accuracy, base=base, experts=experts)
    models = explain(table, seed=seed, resamples=resamples)
    drawn = [
        figures.heat_map(
            f"kl-{d}",
            f"KL(row ‖ column) on {d} prompts, nats per response",
            kl.matrix(d),
            kl.names,
            kl.names,
            unit="nats",
        )
        for d in kl.domains
    ]
    for key, title in (
        ("own_teacher_kl", "KL to the domain's own expert, nats"),
        ("neighbour_transfer", "mean accuracy of the neighbouring experts"),
    ):
        series = [
            figures.Series(
                d,
                [float(r[key]) for r in table if r["domain"] == d],
                [float(r["accuracy"]) for r in table if r["domain"] == d],
                labels=[str(r["policy"]) for r in table if r["domain"] == d],
            )
            for d in experts
        ]
        drawn.append(
            figures.chart(
                f"accuracy-{key.replace('_', '-')}",
                "points",
                f"Accuracy against {title}",
                series,
                x_title=title,
                y_title="Avg@K",
            )
        )
    names = list(models)
    drawn.append(
        figures.chart(
            "explained",
            "bars",
            "Variance of accuracy explained (95% interval over policies)",
            [
                figures.Series(
                    "R^2",
                    names,
                    [models[n].r2 for n in names],
                    [models[n].r2_low for n in names],
                    [models[n].r2_high for n in names],
                )
            ],
            y_title="R²",
        )
    )
    return Analysis(
        "policies",
        {
            "kl": "KL(policy || other) in nats per response, along responses sampled from the policy at the "
            "temperature below; per_token divides the sum over responses by the sum of their tokens",
            "k1": "sum of log-probability differences",
            "k3": "sum of exp(-d) - 1 + d over tokens",
            "full": "sum of exact next-token divergences over the whole vocabulary, along the same responses",
            "se": "standard error over prompts (samples of one prompt are averaged first)",
            "nearer_than_base": "KL(policy || neighbour) < KL(policy || base) on the domain's prompts; `closer` is the "
            "difference, its error over paired prompts",
            "own_teacher_kl": "full-vocabulary KL(policy || expert of the domain)",
            "neighbour_transfer": "mean Avg@K on the domain of the experts nearer to the policy than the base is; of "
            "the nearest expert for the base itself and where none is nearer",
            "regression": "least squares of Avg@K on standardised predictors after removing domain means; the expert "
            "of the domain itself is left out; intervals resample policies; r2_left_out predicts each policy from the "
            "others",
        },
        f"Idea: {PAPER}, section on policy neighborhoods (no formula is given there). Estimators: Schulman 2020. "
        "Definitions of neighbourhood and transfer: ours.",
        {
            "policies": kl.names,
            "base": base,
            "experts": dict(experts),
            "domains": kl.domains,
            "temperature": temperature,
            "prompts": {d: sum(v == d for v in kl.domain_of.values()) for d in kl.domains},
            "seed": seed,
            "bootstrap_resamples": resamples,
        },
        {
            "kl": {e: {d: kl.matrix(d, e) for d in kl.domains} for e in ESTIMATORS},
            "kl_per_token": {d: kl.matrix(d, per_token=True) for d in kl.domains},
            "accuracy": {m: dict(v) for m, v in accuracy.items()},
            "regressions": models,
        },
        {"pairs": pairs, "neighbours": near, "transfer": table},
        drawn,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="every policy, base included")
    parser.add_argument("--base", required=True, help="name of the base policy")
    parser.add_argument("--experts", nargs="+", required=True, metavar="DOMAIN=NAME")
    parser.add_argument("--benchmarks", nargs="+", default=[], help="what to sample on (default: the experts' domains)")
    parser.add_argument("--samples", help="folder with <model>.jsonl: read where present, else sampled and written")
    parser.add_argument("--k", type=int, default=4, help="samples per prompt")
    parser.add_argument("--problems", type=int, default=64, help="prompts per benchmark, at most")
    parser.add_argument("--engine", choices=("native", "vllm"), default="native")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="0 = the benchmark's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens-per-bin", type=int, default=TOKENS_PER_BIN)
    parser.add_argument("--seed", type=int, default=0)


def gather(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str], dict[str, list[Sample]]]:
    """(models, experts, samples) of a command line; everything that can be wrong is checked before sampling."""
    models, experts = named(args.models, "--models"), named(args.experts, "--experts")
    for name in (args.base, *experts.values()):
        if name not in models:
            raise InputError(f"{name} is not among --models ({', '.join(models)})")
    check_models(models)
    return models, experts, sample(args, models, list(experts))


def sample(args: argparse.Namespace, models: Mapping[str, str], domains: Sequence[str]) -> dict[str, list[Sample]]:
    """The samples a command line asks for: read from --samples where they are, else drawn."""
    there = [find(args.samples, m, tokens=True) for m in models] if args.samples else [[]]
    if all(there):
        return read_folder(args.samples, list(models))
    config = Config()
    rollout = {"engine": args.engine} | ({"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {})
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, **rollout),
        model=dataclasses.replace(config.model, compute_dtype=args.dtype),
    )
    with Evaluator(models[next(iter(models))], config) as evaluator:
        return sample_models(
            evaluator,
            models,
            args.benchmarks or domains,
            k=args.k,
            problems=args.problems,
            seed=args.seed,
            folder=args.samples,
        )


def run(args: argparse.Namespace) -> Analysis:
    models, experts, samples = gather(args)
    kl = kl_matrix(models, samples, tokens_per_bin=args.tokens_per_bin, dtype=getattr(torch, args.dtype))
    return analyze(kl, accuracies(samples), base=args.base, experts=experts, seed=args.seed)
