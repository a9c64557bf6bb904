"""Models compared on the same problems: averages, differences and gains kept, each with its interval.

    at(m, b)      Avg@K of model m on benchmark b; at(m, d) of a domain is the unweighted mean of its benchmarks, at(m)
                  of all benchmarks. The embedded study has one benchmark per domain, of the same name.
    estimate(f)   f(at) with a 95% interval: f is any expression of such numbers, differences and ratios included
                  one seed       percentile bootstrap over held-out problems, each benchmark by itself; all
                                 models see the same problems, so differences and ratios are paired
                  several seeds  mean over seeds, Student's t interval over seeds: training and problems both vary

The same expression applied to the paper's published table gives the paper's own number.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2rl.analyze.skills import check_rewards, passes, rewards_of
from m2rl.analyze.skills import domain_of as benchmark_of
from m2rl.published import NINE, PUBLISHED
from m2rl.samples import read_folder
from m2rl.types import InputError, Sample

RESAMPLES = 4000
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # two-sided 95% quantiles of t, df 1 to 10

PAPER_NAMES = {  # our name -> the paper's
    **{"sft": "SFT", "math": "RL_Math", "code": "RL_Coding", "science": "RL_Science", "if": "RL_IF"},
    **{"mixed": "RL_Multi", "distill": "MT-OPD", "average": "Average", "ta": "TA", "ties": "TIES", "sce": "SCE"},
    **{"dare_ta": "TA+DARE", "dare_ties": "TIES+DARE"},
}
PAPER_BENCHMARKS = {  # by the domain of their problems
    "math": ("aime24", "aime25"),
    "code": ("lcb_v5", "lcb_v6"),
    "science": ("hle", "gpqa_diamond", "mmlu_redux"),
    "if": ("ifeval", "ifbench"),
}

At = Callable[..., Any]  # at(model, domain) or at(model): a number, or one per bootstrap draw


@dataclass(frozen=True)
class SeedResults:
    """One study: samples of every model on the same problems, and the analyses' JSON."""

    seed: int
    samples: dict[str, list[Sample]]
    rewards: dict[str, dict[str, np.ndarray]]  # model -> problem -> [K]
    domain_of: dict[str, str]  # problem -> domain
    analyses: dict[str, dict[str, Any]]
    folder: Path


def read(folder: str | Path, models: Sequence[str], seed: int = 0) -> SeedResults:
    """A study's folder. InputError where samples are missing or models were not sampled on the same problems."""
    folder = Path(folder)
    samples = read_folder(folder / "samples", models, tokens=False)
    rewards = {m: rewards_of(s) for m, s in samples.items()}
    check_rewards(rewards)
    analyses = {}
    for path in sorted((folder / "analysis").glob("*.json")):
        try:
            analyses[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path} is not valid JSON: run its stage again") from None
    domain_of = {s.prompt.id: s.prompt.domain for s in next(iter(samples.values()))}
    return SeedResults(seed, samples, rewards, domain_of, analyses, folder)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval; n problems, seeds, ... that the interval is over."""

    value: float
    low: float
    high: float
    n: int
    over: str


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of a sample, Student's t, 95%; the quantile of 10 degrees of freedom serves beyond."""
    v = np.asarray(values, dtype=np.float64)
    half = T95[min(len(v) - 1, len(T95)) - 1] * v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else float("nan")
    return float(v.mean()), float(v.mean() - half), float(v.mean() + half)


def percentile_interval(drawn_R: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of the draws that have a value; NaN where none has."""
    known = drawn_R[np.isfinite(drawn_R)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return float(low), float(high)


class Comparison:
    """All models of one or several seeds, and what can be estimated from them."""

    def __init__(self, seeds: Sequence[SeedResults], models: Sequence[str], domains: Sequence[str], base: str = "sft"):
        if not seeds:
            raise InputError("a report needs the results of at least one seed, got none")
        missing = [m for m in (base, *domains, "mixed", "distill") if m not in models]
        if missing or len(set(models)) < len(domains) + 4:
            raise InputError(
                f"a report compares with {missing[0] if missing else 'at least one merge'}, which is missing"
            )
        self.seeds, self.models, self.domains, self.base = list(seeds), list(models), list(domains), base
        self.merges = [m for m in models if m not in (base, "mixed", "distill", *domains)]
        self._points: list[dict[tuple[str, str], float]] = []  # of each seed: model and benchmark -> Avg@K
        self._draws: dict[tuple[str, str], np.ndarray] = {}  # of one seed: [R]
        self._counts: list[np.ndarray] = []  # of one seed, by benchmark: [R, P] how often each problem was drawn
        first = self.seeds[0]
        self.domain_of = {benchmark_of(p): d for p, d in first.domain_of.items() if d in self.domains}
        self.benchmarks = sorted(self.domain_of, key=lambda b: self.domains.index(self.domain_of[b]))
        self.of = {d: [b for b in self.benchmarks if self.domain_of[b] == d] for d in self.domains}
        self.problems = {b: [p for p in first.rewards[base] if benchmark_of(p) == b] for b in self.benchmarks}
        self.k = {b: len(first.rewards[base][self.problems[b][0]]) for b in self.benchmarks}
        rng = np.random.default_rng(0)
        for s in self.seeds:
            point: dict[tuple[str, str], float] = {}
            for d in self.domains:
                if d not in s.domain_of.values():
                    raise InputError(f"seed {s.seed} has no scored problems of domain {d}")
            for b in self.benchmarks:
                ids = [p for p in s.rewards[base] if benchmark_of(p) == b]
                x = {m: np.array([s.rewards[m][p].mean() for p in ids]) for m in self.models}
                point |= {(m, b): float(v.mean()) for m, v in x.items()}
                if len(self.seeds) == 1:
                    counts = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=RESAMPLES)
                    self._draws |= {(m, b): counts @ v / len(ids) for m, v in x.items()}
                    self._counts.append(counts)
            self._points.append(point)
        self.best_merge = max(self.merges, key=lambda m: self.mean(m).value) if self.merges else ""

    def _at(self, point: Mapping[tuple[str, str], Any], used: set[str]) -> At:
        def at(model: str, where: str | None = None) -> Any:
            mine = self.benchmarks if where is None else self.of.get(where) or [where]
            used.update(mine)
            return sum(point[model, b] for b in mine) / len(mine)

        return at

    def estimate(self, f: Callable[[At], Any]) -> Estimate:
        used: set[str] = set()
        values = [float(f(self._at(p, used))) for p in self._points]
        if len(values) > 1:
            return Estimate(*t_interval(values), len(values), "seeds")
        drawn = f(self._at(self._draws, used))
        # a ratio has no value in a draw whose denominator is not positive
        low, high = percentile_interval(np.broadcast_to(np.asarray(drawn, dtype=np.float64), (RESAMPLES,)))
        return Estimate(values[0], float(low), float(high), sum(len(self.problems[b]) for b in used), "problems")

    def over_sets(self, f: Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray]) -> Estimate:
        """f(solved, weights_RP) -> [R]; solved: model -> [P] bool of the problems it passes (majority of its samples),
        weights: how often each problem counts in each draw. For statistics of sets, which are no means."""
        results = []
        for s in self.seeds:
            ids = [p for b in self.benchmarks for p in s.rewards[self.base] if benchmark_of(p) == b]
            solved = {m: np.array([passes(s.rewards[m][p]) for p in ids]) for m in self.models}
            results.append(float(f(solved, np.ones((1, len(ids))))[0]))
        if len(results) > 1:
            return Estimate(*t_interval(results), len(results), "seeds")
        weights = np.concatenate(self._counts, axis=1)
        low, high = percentile_interval(f(solved, weights))
        return Estimate(results[0], float(low), float(high), len(ids), "problems")

    def per_seed(self, f: Callable[[SeedResults], tuple[float, float, float, int, str]]) -> Estimate:
        """(value, low, high, n, what the interval is over) of one seed, or the t interval of several."""
        found = [f(s) for s in self.seeds]
        return (
            Estimate(*found[0])
            if len(found) == 1
            else Estimate(*t_interval([v[0] for v in found]), len(found), "seeds")
        )

    def analysed(self, name: str) -> bool:
        """Whether every seed has this analysis."""
        return all(name in s.analyses for s in self.seeds)

    def mean(self, model: str, domain: str | None = None) -> Estimate:
        """Avg@K; a score lies in [0, 1], and so does its interval."""
        e = self.estimate(lambda at: at(model, domain))
        return dataclasses.replace(e, low=max(e.low, 0.0), high=min(e.high, 1.0))

    def difference(self, a: str, b: str, domain: str | None = None) -> Estimate:
        return self.estimate(lambda at: at(a, domain) - at(b, domain))

    def gain(self, model: str, domain: str | None = None) -> Estimate:
        return self.difference(model, self.base, domain)

    def kept(self, model: str, domain: str) -> Estimate | None:
        """(model - base) / (expert - base) on the expert's own domain; None where the expert's gain is not above 0."""
        if self.gain(domain, domain).low <= 0:
            return None

        def share(at: At) -> Any:
            whole = np.asarray(at(domain, domain) - at(self.base, domain))
            return np.divide(
                at(model, domain) - at(self.base, domain), whole, out=np.full(whole.shape, np.nan), where=whole > 0
            )

        return self.estimate(share)


def paper_value(f: Callable[[At], Any]) -> float | None:
    """The same expression of the paper's table: a domain is the mean of its benchmarks; None where it has none."""

    def at(model: str, domain: str | None = None) -> float:
        row = PUBLISHED[PAPER_NAMES[model]]
        return float(np.mean([row[b] for b in (PAPER_BENCHMARKS[domain] if domain else NINE)])) / 100

    try:
        return float(f(at))
    except KeyError:
        return None
