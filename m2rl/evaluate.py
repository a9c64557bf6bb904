"""Avg@K and pass@K with bootstrap confidence intervals over problems.

Avg@K of a problem = mean reward of its K samples; of a domain = mean over problems. The interval resamples problems, the unit
that the benchmark drew, not samples; `pass@k` is the unbiased estimator 1 - C(n-c, k) / C(n, k) (Chen et al., 2107.03374).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from m2rl.types import Sample

BOOTSTRAP = 2000


@dataclass(frozen=True, slots=True)
class Score:
    """One domain or benchmark under one model."""

    avg_at_k: float  # in [0, 1]
    ci95: tuple[float, float]  # percentile bootstrap over problems
    pass_at_k: float
    k: int
    problems: int
    mean_tokens: float
    truncated: float  # share of samples cut by the token limit
    statuses: dict[str, int]

    def as_dict(self) -> dict:
        return asdict(self)


def bootstrap_ci(values_P: np.ndarray, seed: int = 0, resamples: int = BOOTSTRAP) -> tuple[float, float]:
    """95% percentile interval of the mean of P problem scores."""
    if len(values_P) < 2:
        return (float(values_P.mean()),) * 2 if len(values_P) else (float("nan"),) * 2
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(values_P), np.full(len(values_P), 1 / len(values_P)), size=resamples)
    low, high = np.quantile(counts @ values_P / len(values_P), [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(correct: int, n: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k), as a product that does not overflow."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def score(samples: Sequence[Sample], seed: int = 0) -> dict[str, Score]:
    """Scores per domain of samples that carry rewards; a missing reward (NaN) counts as 0 and shows in the statuses."""
    groups: dict[str, dict[str, list[Sample]]] = {}
    for s in samples:
        groups.setdefault(s.prompt.domain, {}).setdefault(s.prompt.id, []).append(s)
    out = {}
    for domain, problems in groups.items():
        rewards = [np.nan_to_num(np.array([s.reward for s in group])) for group in problems.values()]
        means = np.array([r.mean() for r in rewards])
        k = max(len(r) for r in rewards)
        flat = [s for group in problems.values() for s in group]
        out[domain] = Score(
            float(means.mean()), bootstrap_ci(means, seed), float(np.mean([(r > 0.5).any() for r in rewards])), k,
            len(problems), float(np.mean([len(s.tokens) for s in flat])),
            float(np.mean([s.finish == "length" for s in flat])), dict(Counter(str(s.status) for s in flat)))
    return out


def average(scores: Mapping[str, Score]) -> float:
    """Unweighted mean of Avg@K over domains."""
    return float(np.mean([s.avg_at_k for s in scores.values()]))
