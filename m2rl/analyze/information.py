"""Information: how many nats a model moved from the base on each domain, and how much accuracy it bought with them.

    nats(m, d)     KL(m || base) on d's prompts, nats per response: the extra length of m's responses in the base's code
    gain(m, d)     Avg@K of m minus Avg@K of the base
    needed(m, d)   kl(acc_m || acc_base) = p log(p/q) + (1-p) log((1-p)/(1-q)): the least divergence from the base that
                   any policy of m's accuracy can have. By the data-processing inequality (a verdict is a function of
                   the response) and convexity over prompts, needed <= nats.
    efficiency     needed / nats, in [0, 1] up to estimation error: the share of the nats that accuracy accounts for

"KL budget" and "information constraints" are named by the paper without a formula; this reading is ours. The inequality
bounds the gain as well: |gain| <= sqrt(nats / 2) (Pinsker), reported as `pinsker`. Accuracies of exactly 0 or 1 are
taken as half a sample short of it, else `needed` may be infinite. Intervals: paired bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from m2rl.analyze import figures, policies
from m2rl.analyze.output import PAPER, Analysis
from m2rl.analyze.policies import KLMatrix, per_prompt
from m2rl.analyze.skills import Rewards, rewards_of
from m2rl.types import InputError

RESAMPLES = 2000


def bernoulli_kl(p: float, q: float) -> float:
    """KL between two coins, nats; 0 log 0 = 0, infinite where p has mass and q has none."""

    def part(a: float, b: float) -> float:
        return 0.0 if a == 0 else math.inf if b == 0 else a * math.log(a / b)

    return max(0.0, part(p, q) + part(1 - p, 1 - q))


def inside(p: float, samples: int) -> float:
    """An accuracy held half a sample away from 0 and 1."""
    edge = 0.5 / max(samples, 1)
    return min(max(p, edge), 1 - edge)


def budget(
    nats_P: np.ndarray,
    tokens_P: np.ndarray,
    accuracy_P: np.ndarray,
    base_P: np.ndarray,
    samples: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, float]:
    """One model on one domain: P prompts with nats and tokens per response and the two models' mean rewards."""
    P = len(nats_P)
    rng = np.random.default_rng(seed)
    weights_BP = np.concatenate([np.ones((1, P)), rng.multinomial(P, np.full(P, 1 / P), size=resamples)])
    nats, tokens, p, q = (weights_BP @ v / P for v in (nats_P, tokens_P, accuracy_P, base_P))  # [1 + resamples]
    needed = np.array([bernoulli_kl(inside(x, samples), inside(y, samples)) for x, y in zip(p, q)])
    moved = np.where(nats > 0, nats, np.nan)
    values = {
        "nats": nats,
        "gain": p - q,
        "needed": needed,
        "efficiency": needed / moved,
        "gain_per_nat": (p - q) / moved,
        "bits_per_token": nats / math.log(2) / np.maximum(tokens, 1e-300),
        "pinsker": np.sqrt(np.maximum(nats, 0) / 2),
    }
    out = {key: float(v[0]) for key, v in values.items()}
    for key in ("nats", "gain", "efficiency", "gain_per_nat"):
        drawn = values[key][1:][np.isfinite(values[key][1:])]
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (float("nan"),) * 2
        out[f"{key}_low"], out[f"{key}_high"] = float(low), float(high)
    return out


def analyze(
    kl: KLMatrix,
    rewards: Rewards,
    *,
    base: str,
    models: Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Analysis:
    """Budgets of `models` (default: all but the base) per domain; kinds: model -> "expert", "merge", "mixed" ..., a
    column of the table. InputError where a model has no divergence from the base or no rewards on its prompts."""
    chosen = list(models) or [m for m in kl.names if m != base]
    for m in (base, *chosen):
        if m not in kl.names:
            raise InputError(f"no divergences of {m} (there are: {', '.join(kl.names)})")
        if m not in rewards:
            raise InputError(f"no rewards of {m} (there are: {', '.join(rewards)})")
    rows: list[dict[str, Any]] = []
    for m in chosen:
        for domain in kl.domains:
            found = kl.of(m, base, domain)
            prompts = list(dict.fromkeys(found.prompt))
            missing = [p for p in prompts if p not in rewards[m] or p not in rewards[base]]
            if missing or not prompts:
                raise InputError(f"no rewards of {m} and {base} on {missing[0] if missing else domain}")
            numbers = budget(
                per_prompt(found.full, found.prompt),
                per_prompt(found.tokens, found.prompt),
                np.array([rewards[m][p].mean() for p in prompts]),
                np.array([rewards[base][p].mean() for p in prompts]),
                sum(len(rewards[m][p]) for p in prompts),
                seed=seed,
                resamples=resamples,
            )
            rows.append(
                {"model": m, "kind": (kinds or {}).get(m, ""), "domain": domain, "prompts": len(prompts), **numbers}
            )
    total: list[dict[str, Any]] = []
    for m in chosen:
        mine = [r for r in rows if r["model"] == m]
        nats, gain, needed = (float(np.mean([r[k] for r in mine])) for k in ("nats", "gain", "needed"))
        total.append(
            {
                "model": m,
                "kind": (kinds or {}).get(m, ""),
                "nats": nats,
                "gain": gain,
                "needed": needed,
                "efficiency": needed / nats if nats > 0 else float("nan"),
            }
        )
    series = [
        figures.Series(
            d,
            [float(r["nats"]) for r in rows if r["domain"] == d],
            [float(r["gain"]) for r in rows if r["domain"] == d],
            [float(r["gain_low"]) for r in rows if r["domain"] == d],
            [float(r["gain_high"]) for r in rows if r["domain"] == d],
            [str(r["model"]) for r in rows if r["domain"] == d],
        )
        for d in kl.domains
    ]
    efficiency_MD = [
        [next(r["efficiency"] for r in rows if (r["model"], r["domain"]) == (m, d)) for d in kl.domains] for m in chosen
    ]
    return Analysis(
        "information",
        {
            "nats": "KL(model || base) per response, full vocabulary, along the model's own responses to the domain's "
            "prompts: the extra description length when they are coded with the base",
            "gain": "Avg@K of the model minus that of the base on the same prompts",
            "needed": "Bernoulli KL between the two accuracies: a lower bound of nats for any policy of this accuracy "
            "(data processing)",
            "efficiency": "needed / nats",
            "gain_per_nat": "gain / nats",
            "bits_per_token": "nats / log 2 / mean response tokens",
            "pinsker": "sqrt(nats / 2), an upper bound of |gain|",
            "intervals": "95% percentile bootstrap over prompts",
            "total": "unweighted means over domains",
        },
        f"Named by {PAPER} ('information constraints'), no formula given. Reading as a KL budget: ours.",
        {"base": base, "models": chosen, "domains": kl.domains, "seed": seed, "bootstrap_resamples": resamples},
        {"total": total},
        {"budgets": rows, "total": total},
        [
            figures.chart(
                "budget",
                "points",
                "Accuracy gained against nats moved from the base",
                series,
                x_title="KL(model ‖ base), nats per response",
                y_title="gain in Avg@K",
            ),
            figures.heat_map(
                "efficiency", "Share of the nats that accuracy accounts for", efficiency_MD, chosen, kl.domains
            ),
        ],
    )


add_arguments = policies.add_arguments


def run(args: argparse.Namespace) -> Analysis:
    models, experts, samples = policies.gather(args)
    kl = policies.kl_to(
        models, samples, args.base, tokens_per_bin=args.tokens_per_bin, dtype=getattr(torch, args.dtype)
    )
    kinds = dict.fromkeys(experts.values(), "expert")
    return analyze(kl, {m: rewards_of(s) for m, s in samples.items()}, base=args.base, kinds=kinds, seed=args.seed)
