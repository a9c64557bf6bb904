"""Estimates against closed forms, rules against cases they must tell apart, the paper's numbers against its table."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import small_study

from m2rl import findings
from m2rl.findings import Comparison, Estimate, SeedResults, above, check, paper_value, t_interval, within
from m2rl.types import InputError

DOMAINS = small_study.DOMAINS


def seed_of(accuracy, problems=400, k=4, seed=0, noise=None) -> SeedResults:
    """A seed whose models pass each domain's problems with these chances; `noise` shares luck between models."""
    rng = np.random.default_rng(seed)
    luck = rng.random((len(DOMAINS), problems, k))
    rewards = {}
    for m, by in accuracy.items():
        mine = luck if noise is None else rng.random(luck.shape)
        rewards[m] = {
            f"{d}/{i}": (mine[n, i] < by[d]).astype(float) for n, d in enumerate(DOMAINS) for i in range(problems)
        }
    domain_of = {p: p.partition("/")[0] for p in rewards["sft"]}
    return SeedResults(seed, {}, rewards, domain_of, {}, None)


def chances(**changed):
    """Every model at 0.5, except as told: model=chance on all domains, or model={domain: chance}."""
    out = {}
    for m in small_study.MODELS:
        of = changed.get(m, 0.5)
        out[m] = {d: of.get(d, 0.5) if isinstance(of, dict) else of for d in DOMAINS}
    return out


def comparison(*seeds: SeedResults) -> Comparison:
    return Comparison(seeds, small_study.MODELS, DOMAINS)


def verdicts(c: Comparison) -> dict[str, str]:
    return {f.name: f.verdict for f in check(c)}


def test_one_seed_resamples_problems_within_domains():
    s = seed_of(chances(mixed=0.7), noise=0)
    c = comparison(s)
    x = {d: np.array([v.mean() for p, v in s.rewards["mixed"].items() if p.startswith(d)]) for d in DOMAINS}
    found = c.mean("mixed")
    assert found.value == pytest.approx(np.mean([v.mean() for v in x.values()]))
    half = 1.96 * math.sqrt(sum(v.var() / len(v) for v in x.values())) / len(DOMAINS)
    assert found.high - found.value == pytest.approx(half, rel=0.08)
    assert found.value - found.low == pytest.approx(half, rel=0.08)
    assert (found.n, found.over) == (1600, "problems")
    assert c.mean("mixed", "code").n == 400


def test_differences_are_paired():
    """With shared luck a difference is far less uncertain than its two sides."""
    c = comparison(seed_of(chances(mixed=0.55)))
    d, side = c.difference("mixed", "ties"), c.mean("mixed")
    assert d.high - d.low < 0.5 * (side.high - side.low)
    assert c.difference("mixed", "mixed") == Estimate(0.0, 0.0, 0.0, 1600, "problems")


def test_several_seeds_give_a_t_interval():
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.30 / math.sqrt(3), 2 + 4.30 / math.sqrt(3)))
    made = [seed_of(chances(mixed=p), seed=i) for i, p in enumerate((0.6, 0.7, 0.8))]
    c = comparison(*made)
    each = [comparison(s).mean("mixed").value for s in made]
    assert dataclasses.astuple(c.mean("mixed")) == pytest.approx((*t_interval(each), 3, "seeds"))


def test_gains_kept_are_ratios_of_paired_gains_and_absent_without_a_gain():
    c = comparison(seed_of(chances(math={"math": 0.9}, ties={"math": 0.7}, code={"code": 0.4})))
    kept = c.kept("ties", "math")
    assert kept.value == pytest.approx(0.5, abs=0.06) and 0.4 < kept.low < kept.value < kept.high < 0.6
    assert c.kept("ties", "code") is None


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
    assert found.verdict == findings.UNTESTED and found.estimate is None and "has no value" in found.note


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
    c = comparison(findings.read(study, small_study.MODELS))
    found = check(c)
    assert len({f.name for f in found}) == len(found) >= 20
    for f in found:
        if f.verdict == findings.UNTESTED:
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
    s = findings.read(study, small_study.MODELS)
    found = {f.name: f for f in check(comparison(s))}
    names = s.analyses["weights"]["inputs"]["models"]
    cosine = s.analyses["weights"]["results"]["projected_cosine"]
    pairs = [cosine[names.index(a)][names.index(b)] for a, b in itertools.combinations(DOMAINS, 2)]
    assert found["Weight shifts point the same way"].estimate.value == pytest.approx(np.mean(pairs))
    kl, order = s.analyses["policies"]["results"]["kl"]["full"], s.analyses["policies"]["inputs"]["policies"]
    at = {m: np.mean([kl[d][order.index(m)][order.index(d)] for d in DOMAINS]) for m in ("mixed", "ties")}
    nearer = found["The mixed policy lies further from the experts"].estimate
    assert nearer.value == pytest.approx(at["mixed"] - at["ties"])


def test_the_papers_number_is_the_same_expression_of_its_table():
    mixed = (73.85, 64.11, 59.77, 56.57, 53.66, 5.84, 90.34, 55.78, 80.00)
    ties = (71.67, 66.72, 57.80, 53.14, 56.19, 5.70, 89.83, 53.74, 79.91)
    assert paper_value(lambda at: at("mixed") - at("ties")) == pytest.approx((sum(mixed) - sum(ties)) / 900)
    assert paper_value(lambda at: at("math", "math")) == pytest.approx((71.51 + 63.54) / 200)
    assert paper_value(lambda at: at("tsv_m")) is None


def test_unlike_problems_and_missing_models_are_named(study, tmp_path):
    with pytest.raises(InputError, match="no samples of ties2"):
        findings.read(study, [*small_study.MODELS, "ties2"])
    with pytest.raises(InputError, match="at least one seed"):
        comparison()
    other = seed_of(chances())
    other = dataclasses.replace(other, domain_of={p: d for p, d in other.domain_of.items() if d != "if"})
    with pytest.raises(InputError, match="seed 0 has no scored problems of domain if"):
        comparison(other)


def test_a_domain_of_several_benchmarks_is_their_mean():
    s = seed_of(chances(mixed={"math": 0.9, "code": 0.7}))
    renamed = {"math": "aime24", "code": "aime25", "science": "gpqa_diamond", "if": "ifeval"}

    def new(p: str) -> str:
        return f"{renamed[p.partition('/')[0]]}/{p.partition('/')[2]}"

    rewards = {m: {new(p): v for p, v in by.items()} for m, by in s.rewards.items()}
    domain = {"aime24": "math", "aime25": "math", "gpqa_diamond": "science", "ifeval": "if"}
    s = dataclasses.replace(s, rewards=rewards, domain_of={p: domain[p.partition("/")[0]] for p in rewards["sft"]})
    c = Comparison([s], small_study.MODELS, ("math", "science", "if"))
    assert c.benchmarks == list(domain) and c.of["math"] == ["aime24", "aime25"]
    parts = [c.mean("mixed", b).value for b in domain]
    assert (
        c.mean("mixed", "math").value == pytest.approx((parts[0] + parts[1]) / 2) and c.mean("mixed", "math").n == 800
    )
    assert c.mean("mixed").value == pytest.approx(np.mean(parts))
