"""The paper's findings, and what this repository promises of its study, tested on a comparison.

A finding is an expression of the models' scores (m2rl/comparison.py), or a statistic of an analysis, with a rule: it
holds if the whole interval is on its side, does not hold if the whole interval is on the other, and is undecided
otherwise. The paper states its findings without tests; tests and margins are ours.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from m2rl.analyze.output import PAPER, Analysis
from m2rl.comparison import RESAMPLES, At, Comparison, Estimate, SeedResults, paper_value, percentile_interval
from m2rl.scores import bootstrap_ci

MARGIN = 0.03  # Avg@K: a difference below 3 points counts as none where a finding says "comparable"
KEPT = 0.6  # the share of an expert's gain that the best merge should keep
REASONING = ("math", "code", "science")


@dataclass(frozen=True)
class Finding:
    """One claim, how it was tested, and what came out."""

    name: str
    claim: str
    test: str
    verdict: str  # "holds", "does not hold", "undecided", "cannot be tested here"
    estimate: Estimate | None = None
    unit: str = "points"  # "points" of Avg@K, "ratio", "share" (of 1), "nats"
    paper: float | None = None  # the same expression of the paper's table
    note: str = ""
    ours: bool = False  # a condition of this repository, not a finding of the paper


def above(e: Estimate, bound: float = 0.0) -> str:
    return "holds" if e.low > bound else "does not hold" if e.high < bound else "undecided"


def within(e: Estimate, margin: float = MARGIN) -> str:
    if -margin < e.low and e.high < margin:
        return "holds"
    return "does not hold" if e.low > margin or e.high < -margin else "undecided"


UNTESTED = "cannot be tested here"
VERDICTS = ("holds", "does not hold", "undecided", UNTESTED)


def check(c: Comparison) -> list[Finding]:
    """The paper's findings in the order of its sections, then what this repository promises of its own study."""
    out: list[Finding] = []
    has = set(c.models)
    domains = set(c.domains)
    reasoning = [d for d in REASONING if d in domains and d in has]

    def scores(
        name: str, claim: str, test: str, f: Callable[[At], Any], rule: Callable[[Estimate], str], note: str = ""
    ):
        try:
            e = c.estimate(f)
        except KeyError as missing:
            out.append(Finding(name, claim, test, UNTESTED, note=f"needs {missing.args[0]}, which this study has not"))
            return
        out.append(Finding(name, claim, test, rule(e), e, paper=paper_value(f), note=note))

    pairs = [(a, b) for a in reasoning for b in reasoning if a != b]
    margin = f"within ±{100 * MARGIN:g} points"
    if pairs:
        scores(
            "Reasoning domains help each other",
            "Training on one of math, code and science also lifts the other two.",
            f"mean gain over the base of {len(pairs)} expert and foreign reasoning domain pairs > 0",
            lambda at: sum(at(a, b) - at(c.base, b) for a, b in pairs) / len(pairs),
            above,
        )
    if reasoning and "if" in domains:
        scores(
            "Instruction following helps reasoning",
            "The instruction-following expert improves on the reasoning domains.",
            "mean gain of the if expert on math, code and science > 0",
            lambda at: sum(at("if", d) - at(c.base, d) for d in reasoning) / len(reasoning),
            above,
        )
        scores(
            "The reverse effect is smaller",
            "Reasoning experts change instruction following less than the reverse.",
            "gain of the if expert on reasoning minus gain of the reasoning experts on if > 0",
            lambda at: (
                sum(at("if", d) - at(c.base, d) - at(d, "if") + at(c.base, "if") for d in reasoning) / len(reasoning)
            ),
            above,
        )
    out.append(_interference(c))
    scores(
        "Mixing and merging are comparable",
        "One mixed run and a merge of the experts (TIES) end up about equal.",
        f"mixed minus TIES, average over domains, {margin}",
        lambda at: at("mixed") - at("ties"),
        within,
        "TIES is the merge the paper compares with; it was not picked by its score here",
    )
    for model, label in (("mixed", "The mixed run"), ("ties", "The TIES merge")):

        def over_experts(at: At, model: str = model) -> Any:
            return at(model) - np.maximum.reduce([at(d) for d in c.domains])

        scores(
            f"{label} beats every single expert",
            f"{label} is better on average than the best single-domain expert.",
            "its average minus the largest average of an expert > 0",
            over_experts,
            above,
        )
    scores(
        "TIES beats plain averaging",
        "Of the merges, TIES is ahead of the plain average.",
        "TIES minus average > 0",
        lambda at: at("ties") - at("average"),
        above,
    )
    scores(
        "Distillation is comparable with mixing",
        "Multi-teacher on-policy distillation ends up about equal to the mixed run.",
        f"distilled minus mixed, {margin}",
        lambda at: at("distill") - at("mixed"),
        within,
    )
    out += [_cost(c), _footprints(c), _cosines(c), _neighbours(c), _inherits(c), _nearer(c), *_verification(c)]
    out.append(
        Finding(
            "Information constraints",
            "Information constraints bound what mixing and merging can gain.",
            "none",
            UNTESTED,
            note="no definition is published; the section on information shows our reading, a budget of nats",
        )
    )
    # What this study promises of itself.
    for model, label in (("mixed", "The mixed run"), ("distill", "The distilled model")):
        if model in has:
            worst = min(c.domains, key=lambda d: c.gain(model, d).low)
            e = c.gain(model, worst)
            out.append(
                Finding(
                    f"{label} beats the base on every domain",
                    "No domain pays for the others.",
                    f"gain over the base on the domain where its interval is lowest ({worst}) > 0",
                    above(e),
                    e,
                    ours=True,
                )
            )
    out.append(_retention(c))
    return [_known(f) for f in out]


def _known(f: Finding) -> Finding:
    """A statistic that has no value (no problem solved, no variance) supports no verdict."""
    e = f.estimate
    if e is None or all(map(math.isfinite, (e.value, e.low, e.high))):
        return f
    return dataclasses.replace(f, verdict=UNTESTED, estimate=None, note="the statistic has no value on these samples")


def _interference(c: Comparison) -> Finding:
    """The lowest of all off-domain changes, with a family-wise interval: few interferences are shown only by intervals
    that exclude a loss of the margin."""
    cells = [(a, b) for a in c.domains for b in c.domains if a != b]
    normal = statistics.NormalDist().inv_cdf
    widen = normal(1 - 0.025 / len(cells)) / normal(0.975)  # from 95% of one to 95% of all, Bonferroni

    def wide(e: Estimate) -> Estimate:
        low, high = e.value - widen * (e.value - e.low), e.value + widen * (e.high - e.value)
        return Estimate(e.value, low, high, e.n, e.over)

    found = {(a, b): wide(c.gain(a, b)) for a, b in cells}
    a, b = min(cells, key=lambda pair: found[pair].low)
    below = sum(f.high < 0 for f in found.values())

    def lowest(at: At) -> float:
        return min(at(x, y) - at(c.base, y) for x, y in cells)

    margin = 100 * MARGIN
    return Finding(
        "No interference",
        "Training on one domain hardly hurts another.",
        f"all {len(cells)} changes off the own domain > -{margin:g} points, Bonferroni over cells; fails if one lies "
        f"below 0; shown: the lowest, {a} on {b}",
        "does not hold" if below else above(found[a, b], -MARGIN),
        found[a, b],
        paper=paper_value(lowest),
        note=f"{below} of {len(cells)} lie below 0",
    )


def _cost(c: Comparison) -> Finding:
    name, claim = "Mixing costs a third of separate training", "One mixed run needs 33.2% of the experts' device hours."
    if not c.analysed("efficiency"):
        return Finding(name, claim, "", UNTESTED, note="the efficiency analysis is missing")
    found = [s.analyses["efficiency"]["results"] for s in c.seeds]
    paper = found[0]["paper"]["mixed_over_experts_device_hours"]
    steps = float(np.mean([r["ratios"].get("mixed_over_experts_steps", float("nan")) for r in found]))
    measured = ", ".join(f"{r['ratios'].get('mixed_over_experts_device_hours', float('nan')):.0%}" for r in found)
    return Finding(
        name,
        claim,
        "device hours of the mixed run over those of the experts",
        UNTESTED,
        None,
        "share",
        paper,
        f"a choice of the recipe, not an outcome: here the mixed run takes {steps:.0%} of the experts' steps and took "
        f"{measured} of their hours",
    )


def _pairs_of(c: Comparison, s: SeedResults, level: str) -> list[dict[str, Any]]:
    rows = s.analyses["weights"]["tables"]["pairs"]
    return [r for r in rows if r["level"] == level and r["a"] in c.domains and r["b"] in c.domains]


def _footprints(c: Comparison) -> Finding:
    name, claim = "Update footprints overlap", "Experts change the same parameters more often than by chance."
    test = (
        "overlap |A and B| / min(|A|, |B|) of the largest tenth of two experts' updates minus its expectation under "
        "independence > 0, mean over pairs; interval over tensors"
    )
    if not c.analysed("weights"):
        return Finding(name, claim, test, UNTESTED, note="the weights analysis is missing")

    def one(s: SeedResults) -> tuple[float, float, float, int, str]:
        by: dict[str, list[float]] = {}
        for r in _pairs_of(c, s, "tensor"):
            if r["overlap_large"] is not None and r["expected_overlap_large"] is not None:
                by.setdefault(r["group"], []).append(r["overlap_large"] - r["expected_overlap_large"])
        means = np.array([np.mean(v) for v in by.values()])
        return float(means.mean()), *bootstrap_ci(means, resamples=RESAMPLES), len(means), "tensors"

    e = c.per_seed(one)
    return Finding(name, claim, test, above(e), e, "ratio")


def _cosines(c: Comparison) -> Finding:
    name = "Weight shifts point the same way"
    claim = "After random projection, the updates of different experts have positive cosines."
    test = "mean cosine of all pairs of experts after random projection > 0; interval from the projection's variance"
    if not c.analysed("weights"):
        return Finding(name, claim, test, UNTESTED, note="the weights analysis is missing")
    if any(p["cosine"] is None for s in c.seeds for p in _pairs_of(c, s, "model")):
        return Finding(name, claim, test, UNTESTED, note="the weights of an expert did not move")

    def one(s: SeedResults) -> tuple[float, float, float, int, str]:
        r, names = s.analyses["weights"]["results"], s.analyses["weights"]["inputs"]["models"]
        at = [(names.index(p["a"]), names.index(p["b"])) for p in _pairs_of(c, s, "model")]
        mean = float(np.mean([r["projected_cosine"][i][j] for i, j in at]))
        # the errors of pairs that share a model may add up: the widest case
        half = 1.96 * float(np.mean([r["projected_std_at_most"][i][j] for i, j in at]))
        return mean, mean - half, mean + half, len(at), "pairs"

    e = c.per_seed(one)
    exact = [p["cosine"] for s in c.seeds for p in _pairs_of(c, s, "model")]
    note = f"exact cosines {np.min(exact):.3f} to {np.max(exact):.3f}, mean {np.mean(exact):.3f}"
    return Finding(name, claim, test, above(e), e, "ratio", note=note)


def _neighbours(c: Comparison) -> Finding:
    name = "Neighbours explain accuracy better than distance"
    claim = "Transfer from neighbouring policies explains accuracy better than the KL to the domain's own expert."
    test = (
        "R² of accuracy on neighbour transfer minus R² on own-expert KL, domain means removed, > 0; policies resampled"
    )
    if not c.analysed("policies"):
        return Finding(name, claim, test, UNTESTED, note="the policies analysis is missing")

    def one(s: SeedResults) -> tuple[float, float, float, int, str]:
        table = s.analyses["policies"]["tables"]["transfer"]
        keys = ("accuracy", "neighbour_transfer", "own_teacher_kl")
        x = {k: np.array([r[k] for r in table], dtype=np.float64) for k in keys}
        domains, policies = (np.array([r[k] for r in table]) for k in ("domain", "policy"))
        for v in x.values():
            for d in set(domains.tolist()):
                v[domains == d] -= v[domains == d].mean()

        def r2(index: np.ndarray) -> float:
            y, n, k = (x[key][index] for key in keys)
            return _square(y, n) - _square(y, k)

        names = list(dict.fromkeys(policies.tolist()))
        rows = [np.flatnonzero(policies == p) for p in names]
        rng = np.random.default_rng(0)
        drawn = [r2(np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])) for _ in range(1000)]
        low, high = percentile_interval(np.array(drawn))
        return r2(np.arange(len(table))), float(low), float(high), len(names), "policies"

    e = c.per_seed(one)
    return Finding(name, claim, test, above(e), e, "ratio")


def _square(a: np.ndarray, b: np.ndarray) -> float:
    """Squared correlation: the R² of a line."""
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1] ** 2)


def _inherits(c: Comparison) -> Finding:
    name = "Merges inherit, mixing departs"
    claim = "A merge mostly inherits the experts' skills; the mixed run's skills differ more from theirs."
    test = "Jaccard overlap with the union of the experts' solved problems, TIES minus mixed > 0"
    if not {"ties", "mixed"} <= set(c.models):
        return Finding(name, claim, test, UNTESTED, note="needs ties and mixed")

    def difference(solved: Mapping[str, np.ndarray], weights_RP: np.ndarray) -> np.ndarray:
        union = np.logical_or.reduce([solved[d] for d in c.domains])

        def overlap(m: str) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                return (weights_RP @ (solved[m] & union)) / (weights_RP @ (solved[m] | union))

        return overlap("ties") - overlap("mixed")

    e = c.over_sets(difference)
    return Finding(name, claim, test, above(e), e, "ratio")


def _nearer(c: Comparison) -> Finding:
    name = "The mixed policy lies further from the experts"
    claim = "In KL, the mixed run diverges more from the single-task policies than the merge does."
    test = "KL to the domain's expert, mean over domains, mixed minus TIES > 0; standard errors over prompts"
    if not c.analysed("policies"):
        return Finding(name, claim, test, UNTESTED, note="the policies analysis is missing")
    if any({"ties", "mixed"} - set(s.analyses["policies"]["inputs"]["policies"]) for s in c.seeds):
        return Finding(name, claim, test, UNTESTED, note="needs the divergences of ties and mixed")

    def one(s: SeedResults) -> tuple[float, float, float, int, str]:
        at = {(r["policy"], r["other"], r["domain"]): r for r in s.analyses["policies"]["tables"]["pairs"]}
        rows = [(at["mixed", d, d], at["ties", d, d]) for d in c.domains]
        value = float(np.mean([m["full"] - t["full"] for m, t in rows]))
        errors = [(m["full_se"] or 0) ** 2 + (t["full_se"] or 0) ** 2 for m, t in rows]
        half = 1.96 * math.sqrt(sum(errors)) / len(rows)
        return value, value - half, value + half, sum(m["prompts"] for m, _ in rows), "prompts"

    e = c.per_seed(one)
    return Finding(name, claim, test, above(e), e, "nats")


def _verification(c: Comparison) -> list[Finding]:
    """Self-discrimination from the verification analysis, where the study has it."""
    name = "Training brings self-discrimination"
    claim = "Reinforcement learning makes a model's own probability tell its right responses from its wrong ones."
    test = "AUROC of own responses on the trained domain, expert minus base, mean over domains > 0"
    synergy = Finding(
        "Mixed training joins both ways of verifying",
        "The mixed run verifies others' responses across domains better than the experts do.",
        "AUROC of others' responses, mixed minus the mean of the experts, process score at the horizon > 0",
        UNTESTED,
        note="the verification analysis is missing",
    )
    if not c.analysed("verification"):
        return [Finding(name, claim, test, UNTESTED, note="the verification analysis is missing"), synergy]

    def rows(s: SeedResults, kind: str) -> dict[tuple[str, str, str], dict[str, Any]]:
        table = s.analyses["verification"]["tables"]["discrimination"]
        return {(r["verifier"], r["author"], r["domain"]): r for r in table if r["score"] == kind}

    def last(s: SeedResults) -> str:
        return f"process@{s.analyses['verification']['inputs']['horizon']}"

    def difference(s: SeedResults, plus: Sequence[tuple[str, str, str]], minus: Sequence[tuple[str, str, str]]):
        at = rows(s, last(s))
        sides, variance = [], 0.0
        for cells in (plus, minus):
            known = [at[k] for k in cells if k in at and at[k]["auroc"] is not None]
            if not known:
                raise KeyError(str(cells[:1]))
            sides.append(float(np.mean([r["auroc"] for r in known])))
            widths = [r["auroc_high"] - r["auroc_low"] for r in known if r["auroc_high"] is not None]
            variance += sum((w / 3.92) ** 2 for w in widths) / len(known) ** 2
        half = 1.96 * math.sqrt(variance)
        value = sides[0] - sides[1]
        return value, value - half, value + half, len(plus), "cells"

    out = []
    try:
        e = c.per_seed(
            lambda s: difference(s, [(d, d, d) for d in c.domains], [(c.base, c.base, d) for d in c.domains])
        )
        out.append(Finding(name, claim, test, above(e), e, "ratio"))
    except KeyError as missing:
        out.append(Finding(name, claim, test, UNTESTED, note=f"no AUROC of {missing}"))
    try:
        others = list(c.domains)
        e = c.per_seed(
            lambda s: difference(
                s,
                [("mixed", a, "all") for a in others],
                [(v, a, "all") for v in others for a in others if v != a],
            )
        )
        out.append(Finding(synergy.name, synergy.claim, synergy.test, above(e), e, "ratio"))
    except KeyError as missing:
        out.append(Finding(synergy.name, synergy.claim, synergy.test, UNTESTED, note=f"no AUROC of {missing}"))
    return out


def _retention(c: Comparison) -> Finding:
    name = f"The best merge keeps {KEPT:.0%} of every expert's gain"
    claim = "Merging does not dilute what was learnt."
    found = {d: c.kept(c.best_merge, d) for d in c.domains} if c.best_merge else {}
    known = {d: e for d, e in found.items() if e is not None}
    if not known:
        return Finding(
            name, claim, "", UNTESTED, note="no expert gained on its own domain, or there is no merge", ours=True
        )
    worst = min(known, key=lambda d: known[d].value)
    e = known[worst]
    test = f"share kept by {c.best_merge} on the domain that keeps least ({worst}) > {KEPT:.0%}"
    parts = [] if len(known) == len(found) else [f"no gain to keep on {', '.join(d for d in found if d not in known)}"]
    parts += [_why(c, worst)] if e.value < KEPT else []
    return Finding(name, claim, test, above(e, KEPT), e, "share", note="; ".join(parts), ours=True)


def _why(c: Comparison, domain: str) -> str:
    """What the analyses say about a domain that a merge keeps little of."""
    others = [d for d in c.domains if d != domain]
    e = c.estimate(lambda at: sum(at(o, domain) - at(c.base, domain) for o in others) / len(others))
    parts = [
        f"the other experts change {domain} by {100 * e.value:+.1f} points [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"
    ]
    s = c.seeds[0]
    if "weights" in s.analyses:
        cosines = [p["cosine"] for p in _pairs_of(c, s, "model") if domain in (p["a"], p["b"])]
        norms = {r["model"]: r["norm"] for r in s.analyses["weights"]["results"]["updates"]}
        parts.append(
            f"its expert's update has cosines {min(cosines):.2f} to {max(cosines):.2f} with theirs and "
            f"{norms[domain] / np.mean([norms[o] for o in others]):.2f} times their mean norm"
        )
    return "; ".join(parts)


def analysis(c: Comparison, found: Sequence[Finding]) -> Analysis:
    """The findings as files: findings.json and findings-checked.csv."""
    rows = []
    for f in found:
        row = {k: v for k, v in asdict(f).items() if k != "estimate"}
        e = f.estimate
        rows.append(row | (asdict(e) if e else dict.fromkeys(("value", "low", "high", "n", "over"))))
    return Analysis(
        "findings",
        {
            "holds": "the whole 95% interval is on the claim's side of the bound named in `test`",
            "does not hold": "the whole interval is on the other side",
            "undecided": "the interval holds both",
            "comparable": f"the whole interval lies within ±{100 * MARGIN:g} points",
            "paper": "the same expression of the paper's published table; a domain is the mean of its benchmarks",
        },
        f"Findings: {PAPER}. Tests and margins: ours.",
        {
            "seeds": [s.seed for s in c.seeds],
            "models": c.models,
            "domains": c.domains,
            "bootstrap_resamples": RESAMPLES,
        },
        {"verdicts": {f.name: f.verdict for f in found}},
        {"checked": rows},
    )
