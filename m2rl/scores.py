"""Avg@K, pass@k and majority@K of verified samples, with bootstrap intervals over problems.

    Avg@K       mean over problems of the mean reward of the problem's K samples
    interval    percentile bootstrap that resamples problems, the unit that the benchmark drew, not samples
    pass@k      1 - C(K-c, k) / C(K, k), c of the K samples right: unbiased for every k <= K (Chen et al., arXiv
                2107.03374), meaned over problems
    majority@K  reward of the problem's most frequent final answer

A sample is right if its reward is above 0.5; a missing reward (NaN) counts as 0 and shows in the statuses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from m2rl.domains import THINK_END
from m2rl.domains.answers import final_answer
from m2rl.types import Sample

BOOTSTRAP = 2000
ANSWER_DOMAINS = ("math", "science")
"""Domains whose responses end in an answer that can be voted on."""


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
    majority_at_k: float | None = None  # reward of the most frequent final answer; None where answers have no such form
    pass_at: dict[int, float] = field(default_factory=dict)  # k -> pass@k, at 1, 2, 4 ... and K
    details: dict[str, float] = field(default_factory=dict)  # a benchmark's further numbers, e.g. ifeval's loose level

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
    """1 - C(n-c, k) / C(n, k), as a product that does not overflow; k <= n."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def score(samples: Sequence[Sample], seed: int = 0) -> dict[str, Score]:
    """Scores by domain, or by benchmark of samples whose rows name one (`m2rl.benchmarks` writes such rows)."""
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        groups.setdefault(s.prompt.spec.get("benchmark", s.prompt.domain), []).append(s)
    return {name: score_one(mine, seed) for name, mine in groups.items()}


def score_one(samples: Sequence[Sample], seed: int = 0) -> Score:
    """One score of all samples, whatever their domains."""
    if not samples:
        raise ValueError("samples must not be empty")
    problems: dict[str, list[Sample]] = {}
    for s in samples:
        problems.setdefault(s.prompt.id, []).append(s)
    rewards = [np.nan_to_num(np.array([s.reward for s in group])) for group in problems.values()]
    means = np.array([r.mean() for r in rewards])
    votes = [majority(group) for group in problems.values()]
    most = max(len(r) for r in rewards)
    curve = {
        k: float(np.mean([pass_at_k(int((r > 0.5).sum()), len(r), min(k, len(r))) for r in rewards]))
        for k in sorted({*(2**i for i in range(most.bit_length())), most})
    }
    return Score(
        float(means.mean()),
        bootstrap_ci(means, seed),
        curve[most],
        most,
        len(problems),
        float(np.mean([len(s.tokens) for s in samples])),
        float(np.mean([s.finish == "length" for s in samples])),
        dict(Counter(str(s.status) for s in samples)),
        None if all(v is None for v in votes) else float(np.mean([v or 0.0 for v in votes])),
        curve,
    )


def majority(group: Sequence[Sample]) -> float | None:
    """Mean reward of the samples that gave a problem's most frequent final answer, the first of them on a tie. Samples
    without an answer do not vote; None if the domain has no final answers."""
    if group[0].prompt.domain not in ANSWER_DOMAINS:
        return None
    answers = [vote(s) for s in group]
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]
    return float(np.mean([np.nan_to_num(s.reward) for s, a in zip(group, answers) if a == winner]))


def vote(sample: Sample) -> str | None:
    """The final answer of a response, normalised for counting votes, not for judging; None if there is none, or none
    that counts."""
    if sample.prompt.spec.get("think_gate") and THINK_END not in sample.text:
        return None
    found = final_answer(sample.text.rpartition(THINK_END)[2])
    if found is None:
        return None
    found = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", found)
    found = re.sub(r"\\[,;! ]|[\s$*]", "", found).strip(".,;:").lower()
    if sample.prompt.domain == "science" and (letter := re.match(r"\(?([a-z])(?:[).:]|$)", found)):
        return letter[1]
    return re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", found) or None  # 1,024 and 1{,}024


def average(scores: Mapping[str, Score]) -> float:
    """Unweighted mean of Avg@K over domains."""
    return float(np.mean([s.avg_at_k for s in scores.values()]))
