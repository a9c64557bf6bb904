"""Skills: which problems a model solves, what it keeps of the single-domain experts, what it loses, what is new.

    S_m = {problems that model m passes}             rule "majority": mean reward > 0.5; "any": pass@K; "all"
    U   = union of S_e over the experts e            B = S_base
    inherited  S_m n (U - B)     what the experts learnt and m has          novel  S_m - (U u B)
    lost       (U - B) - S_m     what the experts learnt and m lacks        kept   S_m n B       forgotten  B - S_m
    overlap    |S_m n U| / |S_m u U|
    flips[i, j] = problems that i passes and j does not; the diagonal is the noise: what a model's even samples pass and
                  its odd samples do not, and the reverse, averaged

P problems, M models, K samples of a problem. Differences of Avg@K are tested by a bootstrap over paired problems,
differences of pass sets by McNemar's exact test; p-values are Holm-adjusted over the family shown. Source: the paper's
section "Do Multi-Task Learners and Merged Models Acquire the Same Skills as Single-Task Models?" gives findings without
a definition; this one is ours. McNemar, Psychometrika 12 (1947); Efron & Tibshirani (1993); Holm (1979).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from m2rl.analyze import figures
from m2rl.analyze.output import PAPER, Analysis
from m2rl.samples import read_folder
from m2rl.types import InputError, Sample

Rule = Literal["majority", "any", "all"]
Rewards = Mapping[str, Mapping[str, np.ndarray]]  # model -> problem id -> [K] rewards
RESAMPLES = 10_000


def rewards_of(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Problem id -> [K] rewards of one model's samples, in sample order; a missing reward (NaN) counts as 0."""
    found: dict[str, list[tuple[int, float]]] = {}
    for s in samples:
        found.setdefault(s.prompt.id, []).append((s.index, s.reward))
    return {p: np.nan_to_num(np.array([r for _, r in sorted(values)])) for p, values in found.items()}


def domain_of(problem: str) -> str:
    """Problem ids begin with their domain."""
    return problem.partition("/")[0]


def check_rewards(rewards: Rewards) -> list[str]:
    """The problems, in the first model's order. InputError unless every model has the same ones, and at least one."""
    if not rewards:
        raise InputError("skills need the rewards of at least one model, got none")
    first, *rest = rewards
    problems = list(rewards[first])
    if not problems:
        raise InputError(f"{first} has no scored problems: the benchmark is empty")
    for other in rest:
        odd = sorted(set(problems) ^ set(rewards[other]))
        if odd:
            raise InputError(
                f"{first} and {other} were not scored on the same problems: {len(odd)} differ, first {odd[0]}"
            )
    return problems


def passes(rewards_K: np.ndarray, rule: Rule = "majority") -> bool:
    """Whether a problem with these rewards counts as solved."""
    right = rewards_K > 0.5
    return bool(rewards_K.mean() > 0.5 if rule == "majority" else right.any() if rule == "any" else right.all())


def pass_sets(rewards: Rewards, rule: Rule = "majority") -> dict[str, frozenset[str]]:
    """S_m of every model."""
    return {m: frozenset(p for p, r in mine.items() if passes(r, rule)) for m, mine in rewards.items()}


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a n b| / |a u b|; NaN for two empty sets."""
    return len(a & b) / len(a | b) if a | b else float("nan")


@dataclass(frozen=True, slots=True)
class Flow:
    """Where the skills of one model come from, in problems; the six disjoint sets partition all problems."""

    kept: int  # the base and the model
    inherited: int  # an expert and the model, not the base
    novel: int  # the model alone
    forgotten: int  # the base, not the model
    lost: int  # an expert, neither the base nor the model
    unsolved: int  # none of them
    overlap: float  # Jaccard of the model's pass set and the union of the experts'
    coverage: float  # |S_m n U| / |U|
    inherited_share: float  # inherited / (inherited + lost)
    novel_share: float  # novel / |S_m|


def flow(
    model: frozenset[str], experts: Sequence[frozenset[str]], base: frozenset[str], problems: Sequence[str]
) -> Flow:
    """The flow of one model's pass set against the experts' and the base's, within `problems`."""
    every = frozenset(problems)
    m, b, u = model & every, base & every, frozenset().union(*experts) & every
    learnt = u - b

    def share(part: int, whole: int) -> float:
        return part / whole if whole else float("nan")

    return Flow(
        len(m & b),
        len(m & learnt),
        len(m - u - b),
        len(b - m),
        len(learnt - m),
        len(every - m - u - b),
        jaccard(m, u),
        share(len(m & u), len(u)),
        share(len(m & learnt), len(learnt)),
        share(len(m - u - b), len(m)),
    )


def flips(rewards: Rewards, rule: Rule = "majority") -> np.ndarray:
    """[M, M] counts, rows and columns in the order of `rewards`; the diagonal is split-half noise (NaN where K = 1)."""
    sets, names = pass_sets(rewards, rule), list(rewards)
    out = np.array([[float(len(sets[a] - sets[b])) for b in names] for a in names])
    for i, name in enumerate(names):
        halves = [(passes(r[::2], rule), passes(r[1::2], rule)) for r in rewards[name].values() if len(r) > 1]
        out[i, i] = sum(a != b for a, b in halves) / 2 if halves else float("nan")
    return out


# ---- significance ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """a minus b over paired problems."""

    mean: float
    low: float  # 95% percentile bootstrap
    high: float
    p: float  # two-sided, from the same bootstrap


def paired_bootstrap(a_P: np.ndarray, b_P: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Resample problems, keep their pairs. p = 2 min(P(mean* <= 0), P(mean* >= 0)), each with 1 added above and below,
    so that no finite bootstrap claims p = 0; 1 where the two agree on every problem."""
    difference_P = np.asarray(a_P, dtype=np.float64) - np.asarray(b_P, dtype=np.float64)
    return paired_bootstraps(difference_P[None], seed=seed, resamples=resamples)[0]


def paired_bootstraps(difference_DP: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Difference]:
    """D comparisons on the same P problems, all on the same resamples of them: drawing these is most of the work."""
    P = difference_DP.shape[1]
    if P == 0:
        raise InputError("a paired bootstrap needs at least one problem, got none")
    rng = np.random.default_rng(seed)
    drawn_RD = np.concatenate(
        [
            rng.multinomial(P, np.full(P, 1 / P), size=min(1000, resamples - at)) @ difference_DP.T / P
            for at in range(0, resamples, 1000)
        ]
    )
    low_D, high_D = np.quantile(drawn_RD, [0.025, 0.975], axis=0)
    tail_D = 1 + np.minimum((drawn_RD <= 0).sum(0), (drawn_RD >= 0).sum(0))
    p_D = np.minimum(1.0, 2 * tail_D / (resamples + 1))
    return [
        Difference(float(d.mean()), float(low), float(high), float(p)) if d.any() else Difference(0.0, 0.0, 0.0, 1.0)
        for d, low, high, p in zip(difference_DP, low_D, high_D, p_D)
    ]


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p: the discordant problems are fair coin tosses. 2 sum_{i <= min} C(n, i) / 2^n, at most 1."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**n))


def holm(p: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values, in the order given."""
    order, out, worst = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


# ---- the analysis ----------------------------------------------------------------------------------------------------


def analyze(
    rewards: Rewards,
    *,
    base: str,
    experts: Sequence[str],
    rule: Rule = "majority",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Analysis:
    """Flows of every model that is neither base nor expert (and of the experts against the others), per domain and over
    all; flips; every pair tested. InputError for models or problems that do not match."""
    problems = check_rewards(rewards)
    for name in (base, *experts):
        if name not in rewards:
            raise InputError(f"no rewards of {name} (there are: {', '.join(rewards)})")
    if not experts:
        raise InputError("skills need at least one single-domain expert to compare with, got none")
    sets = pass_sets(rewards, rule)
    domains = list(dict.fromkeys(map(domain_of, problems)))
    groups = {"all": problems, **{d: [p for p in problems if domain_of(p) == d] for d in domains}}
    flows: list[dict[str, Any]] = [
        {
            "model": m,
            "domain": group,
            "problems": len(mine),
            **plain_flow(flow(sets[m], [sets[e] for e in experts if e != m], sets[base], mine)),
        }
        for m in rewards
        if m != base
        for group, mine in groups.items()
    ]
    means = {m: np.array([rewards[m][p].mean() for p in problems]) for m in rewards}
    pairs: list[dict[str, Any]] = []
    everyone = list(combinations(rewards, 2))
    difference_DP = np.array([means[a] - means[b] for a, b in everyone])
    place = {p: i for i, p in enumerate(problems)}
    for group, mine in groups.items():
        columns = [place[p] for p in mine]
        inside = frozenset(mine)
        tested = paired_bootstraps(difference_DP[:, columns], seed=seed, resamples=resamples)
        for (a, b), d in zip(everyone, tested):
            only_a, only_b = len((sets[a] - sets[b]) & inside), len((sets[b] - sets[a]) & inside)
            pairs.append(
                {
                    "a": a,
                    "b": b,
                    "domain": group,
                    "difference": d.mean,
                    "low": d.low,
                    "high": d.high,
                    "p_bootstrap": d.p,
                    "only_a": only_a,
                    "only_b": only_b,
                    "p_mcnemar": mcnemar(only_a, only_b),
                }
            )
    for key in ("p_bootstrap", "p_mcnemar"):
        for row, adjusted in zip(pairs, holm([float(row[key]) for row in pairs])):
            row[f"{key}_holm"] = adjusted
    names = list(rewards)
    flips_MM = flips(rewards, rule)
    jaccard_MM = np.array([[jaccard(sets[a], sets[b]) for b in names] for a in names])
    targets = [m for m in names if m != base and m not in experts] or list(experts)
    whole = {row["model"]: row for row in flows if row["domain"] == "all"}
    drawn = [
        figures.bars(
            "flows",
            "Problems by where the skill comes from",
            {k: [float(whole[m][k]) for m in targets] for k in ("kept", "inherited", "novel", "forgotten", "lost")},
            targets,
            stacked=True,
            y_title="problems",
        ),
        figures.heat_map("flips", "Solved by the row, not by the column (diagonal: noise)", flips_MM, names, names),
        figures.heat_map("overlap", "Jaccard overlap of pass sets", jaccard_MM, names, names),
    ]
    return Analysis(
        "skills",
        {
            "pass": {
                "majority": "mean reward of a problem's samples > 0.5",
                "any": "at least one sample right",
                "all": "every sample right",
            }[rule],
            "inherited": "solved by the model and by an expert, not by the base (an expert: by another expert)",
            "lost": "solved by an expert, neither by the base nor by the model",
            "novel": "solved by the model, neither by an expert nor by the base",
            "kept": "solved by the base and the model",
            "forgotten": "solved by the base, not by the model",
            "overlap": "Jaccard of the model's pass set and the union of the experts'",
            "flips": "problems that the row solves and the column does not; diagonal: a model's even samples against "
            "its odd ones, one direction on average. It rests on half the samples, so it is an upper estimate of the "
            "noise off the diagonal",
            "difference": "Avg@K of a minus Avg@K of b; 95% percentile bootstrap over paired problems",
            "p_mcnemar": "exact McNemar test of the two pass sets, two-sided",
            "holm": "adjusted over all pairs and domains of this table",
        },
        f"Findings: {PAPER}, section on skills of multi-task and merged models. Definition: ours (pass sets over "
        "single problems); McNemar 1947, Holm 1979.",
        {
            "models": names,
            "base": base,
            "experts": list(experts),
            "rule": rule,
            "problems": {g: len(p) for g, p in groups.items()},
            "samples_per_problem": max(len(r) for r in rewards[names[0]].values()),
            "bootstrap_resamples": resamples,
            "seed": seed,
        },
        {
            "solved": {m: {g: len(sets[m] & frozenset(p)) for g, p in groups.items()} for m in names},
            "flips": flips_MM,
            "overlap": jaccard_MM,
        },
        {"flows": flows, "pairs": pairs},
        drawn,
    )


def plain_flow(f: Flow) -> dict[str, float]:
    return {name: getattr(f, name) for name in Flow.__slots__}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", required=True, help="folder with <model>.jsonl, or --out of m2rl.evaluate")
    parser.add_argument("--models", nargs="+", required=True, help="names of the models, base and experts included")
    parser.add_argument("--base", required=True)
    parser.add_argument("--experts", nargs="+", required=True, help="single-domain experts")
    parser.add_argument("--rule", choices=("majority", "any", "all"), default="majority")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> Analysis:
    names = list(dict.fromkeys([args.base, *args.experts, *args.models]))
    samples = read_folder(args.samples, names, tokens=False)
    return analyze(
        {m: rewards_of(s) for m, s in samples.items()},
        base=args.base,
        experts=args.experts,
        rule=args.rule,
        seed=args.seed,
    )
