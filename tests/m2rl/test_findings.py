"""The rules of the findings against cases that they must tell apart, and against the analyses' own tables."""

import itertools

import numpy as np
import pytest
import small_study
from chance_seeds import DOMAINS, chances, comparison, seed_of

from m2rl.comparison import Comparison, Estimate, read
from m2rl.findings import UNTESTED, above, check, within


def verdicts(c: Comparison) -> dict[str, str]:
    return {f.name: f.verdict for f in check(c)}


def test_rules():
    e = Estimate(0.02, 0.01, 0.03, 9, "problems")
    assert above(e) == "holds" and above(e, 0.05) == "does not hold"
    assert above(e, 0.015) == above(e, 0.025) == "undecided"  # the estimate is on one side, the interval on both
    assert [within(e, m) for m in (0.04, 0.005, 0.02)] == ["holds", "does not hold", "undecided"]


@pytest.mark.parametrize(
    ("name", "changed", "verdict"),
    [
        ("Reasoning domains help each other", {"math": 0.6}, "holds"),
        ("Reasoning domains help each other", {"math": 0.4}, "does not hold"),
        ("Instruction following helps reasoning", {"if": 0.6}, "holds"),
        ("Instruction following helps reasoning", {"if": {"if": 0.6}}, "undecided"),
        ("The reverse effect is smaller", {"if": 0.6}, "holds"),
        ("The reverse effect is smaller", {d: {"if": 0.7} for d in ("math", "code", "science")}, "does not hold"),
        ("No interference", {"math": {"code": 0.3}}, "does not hold"),
        ("No interference", dict.fromkeys(DOMAINS, 0.6), "holds"),
        ("Mixing and merging are comparable", {"mixed": 0.505}, "holds"),
        ("Mixing and merging are comparable", {"mixed": 0.6}, "does not hold"),
        ("The mixed run beats every single expert", {"mixed": 0.6}, "holds"),
        ("The mixed run beats every single expert", {"if": 0.6}, "does not hold"),
        ("The TIES merge beats every single expert", {"ties": 0.6}, "holds"),
        ("TIES beats plain averaging", {"average": 0.6}, "does not hold"),
        ("Distillation is comparable with mixing", {"distill": 0.6}, "does not hold"),
        ("The mixed run beats the base on every domain", {"mixed": 0.6}, "holds"),
        ("The mixed run beats the base on every domain", {"mixed": dict.fromkeys(DOMAINS[1:], 0.6)}, "undecided"),
        ("The distilled model beats the base on every domain", {"distill": {"if": 0.4}}, "does not hold"),
    ],
)
def test_a_finding_follows_its_numbers(name, changed, verdict):
    assert verdicts(comparison(seed_of(chances(**changed))))[name] == verdict


def test_a_statistic_without_a_value_is_no_verdict():
    everything = seed_of(dict.fromkeys(small_study.MODELS, dict.fromkeys(DOMAINS, 0.0)))
    found = {f.name: f for f in check(comparison(everything))}["Merges inherit, mixing departs"]
    assert found.verdict == UNTESTED and found.estimate is None and "has no value" in found.note


def test_merges_inherit_where_they_solve_the_experts_problems_and_the_mixed_run_does_not():
    s = seed_of(chances(**{d: {d: 0.95} for d in DOMAINS}, ties=0.95, mixed=0.3))
    assert verdicts(comparison(s))["Merges inherit, mixing departs"] == "holds"
    s = seed_of(chances(**{d: {d: 0.95} for d in DOMAINS}, ties=0.3, mixed=0.95))
    assert verdicts(comparison(s))["Merges inherit, mixing departs"] == "does not hold"


def test_a_merge_that_keeps_half_fails_the_promise_and_says_why():
    weak = dict.fromkeys(DOMAINS, 0.65)
    c = comparison(seed_of(chances(**{d: {d: 0.9} for d in DOMAINS}, ties=weak, average=weak)))
    f = check(c)[-1]
    assert f.verdict == "does not hold" and f.ours and "the other experts change" in f.note


def test_without_an_analysis_a_finding_says_so():
    found = {f.name: f for f in check(comparison(seed_of(chances())))}
    for name in ("Update footprints overlap", "Neighbours explain accuracy better than distance"):
        assert found[name].verdict == "cannot be tested here" and "analysis is missing" in found[name].note


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return small_study.make(tmp_path_factory.mktemp("study"))


def test_no_verdict_without_an_interval_and_a_sample_size(study):
    c = comparison(read(study, small_study.MODELS))
    found = check(c)
    assert len({f.name for f in found}) == len(found) >= 20
    for f in found:
        if f.verdict == UNTESTED:
            assert f.estimate is None and f.note
        else:
            e = f.estimate
            assert e.low <= e.value <= e.high and e.n > 0 and e.over and f.test, f
    tested = {f.name for f in found if f.estimate}
    assert {"Update footprints overlap", "Weight shifts point the same way", "Merges inherit, mixing departs"} <= tested
    assert {
        "Neighbours explain accuracy better than distance",
        "The mixed policy lies further from the experts",
    } <= tested


def test_the_findings_from_analyses_agree_with_their_tables(study):
    s = read(study, small_study.MODELS)
    found = {f.name: f for f in check(comparison(s))}
    names = s.analyses["weights"]["inputs"]["models"]
    cosine = s.analyses["weights"]["results"]["projected_cosine"]
    pairs = [cosine[names.index(a)][names.index(b)] for a, b in itertools.combinations(DOMAINS, 2)]
    assert found["Weight shifts point the same way"].estimate.value == pytest.approx(np.mean(pairs))
    kl, order = s.analyses["policies"]["results"]["kl"]["full"], s.analyses["policies"]["inputs"]["policies"]
    at = {m: np.mean([kl[d][order.index(m)][order.index(d)] for d in DOMAINS]) for m in ("mixed", "ties")}
    nearer = found["The mixed policy lies further from the experts"].estimate
    assert nearer.value == pytest.approx(at["mixed"] - at["ties"])
