"""Pass sets, flows and flips on sets one can count; McNemar and the bootstrap against their closed forms."""

import json
import math

import numpy as np
import pytest
from without_torch import run_without_torch

from m2rl.analyze import skills
from m2rl.analyze.__main__ import main
from m2rl.analyze.skills import (
    analyze,
    flips,
    flow,
    holm,
    jaccard,
    mcnemar,
    paired_bootstrap,
    pass_sets,
    passes,
    rewards_of,
)
from m2rl.samples import write_samples
from m2rl.types import InputError, Prompt, Sample


def rewards(**solved: str) -> dict[str, dict[str, np.ndarray]]:
    """model="ab": of the problems math/a, math/b ... if/z, two samples each, those named are solved."""
    problems = [f"{'math' if c < 'e' else 'if'}/{c}" for c in "abcdefgh"]
    return {
        m: {p: np.array([1.0, 1.0]) if p[-1] in letters else np.array([0.0, 1.0]) for p in problems}
        for m, letters in solved.items()
    }


def test_the_rules_of_passing():
    r = np.array([1.0, 0.0, 0.0, 1.0])
    assert (passes(r, "majority"), passes(r, "any"), passes(r, "all")) == (False, True, False)
    assert passes(np.array([1.0, 1.0, 0.0]), "majority")


def test_flow_counts_a_hand_made_case():
    problems = list("abcdefgh")
    base, e1, e2, merged = (frozenset(x) for x in ("ab", "acd", "e", "bcfe"))
    f = flow(merged, [e1, e2], base, problems)
    assert (f.kept, f.inherited, f.novel, f.forgotten, f.lost, f.unsolved) == (1, 2, 1, 1, 1, 2)
    assert f.kept + f.inherited + f.novel + f.forgotten + f.lost + f.unsolved == len(problems)
    assert f.overlap == 2 / 6 and f.coverage == 2 / 4 and f.inherited_share == 2 / 3 and f.novel_share == 1 / 4


def test_flows_partition_random_sets():
    rng = np.random.default_rng(0)
    problems = [str(i) for i in range(60)]
    for _ in range(50):
        base, e1, e2, m = (frozenset(p for p in problems if rng.random() < q) for q in rng.random(4))
        f = flow(m, [e1, e2], base, problems)
        assert f.kept + f.inherited + f.novel + f.forgotten + f.lost + f.unsolved == 60
        assert f.kept + f.inherited + f.novel == len(m)


def test_flips_count_and_their_diagonal_is_split_half_noise():
    r = rewards(a="abc", b="bcde")
    m = flips(r)
    assert m[0, 1] == 1 and m[1, 0] == 2
    unstable = 8 - 3  # problems with samples (0, 1): even half fails, odd half passes
    assert m[0, 0] == unstable / 2
    assert np.isnan(flips({"a": {"math/a": np.array([1.0])}})[0, 0])


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(5, 0) == mcnemar(0, 5)
    for b, c in ((3, 9), (7, 8), (40, 60)):
        n = b + c
        pmf = [math.comb(n, i) * 0.5**n for i in range(n + 1)]
        two_sided = sum(p for i, p in enumerate(pmf) if abs(i - n / 2) >= abs(b - n / 2) - 1e-9)
        assert mcnemar(b, c) == pytest.approx(min(1.0, two_sided), rel=1e-12)


def test_the_bootstrap_of_a_binary_difference_is_binomial():
    """The sum of a resample of P zeros and ones is Binomial(P, mean): quantiles and tail have closed forms."""
    P, hits = 40, 6
    a = np.array([1.0] * hits + [0.0] * (P - hits))
    d = paired_bootstrap(a, np.zeros(P), resamples=20_000)
    pmf = np.array([math.comb(P, i) * (hits / P) ** i * (1 - hits / P) ** (P - i) for i in range(P + 1)])
    cdf = pmf.cumsum()
    assert d.mean == hits / P
    assert d.low == pytest.approx(np.searchsorted(cdf, 0.025) / P, abs=1 / P)
    assert d.high == pytest.approx(np.searchsorted(cdf, 0.975) / P, abs=1 / P)
    assert d.p == pytest.approx(2 * pmf[0], abs=4 * math.sqrt(2 * pmf[0] / 20_000))


def test_the_bootstrap_keeps_pairs_together():
    rng = np.random.default_rng(1)
    hard = rng.random(200)
    paired = paired_bootstrap(hard + 0.01, hard)
    assert paired.low > 0.0099 and paired.high < 0.0101 and paired.p < 0.001
    assert paired_bootstrap(hard, hard) == skills.Difference(0.0, 0.0, 0.0, 1.0)


def test_the_bootstrap_rejects_a_true_null_as_often_as_it_says():
    rng = np.random.default_rng(2)
    rejected = [
        paired_bootstrap(rng.normal(size=60), rng.normal(size=60), resamples=400, seed=i).p < 0.05 for i in range(300)
    ]
    assert 0.02 < np.mean(rejected) < 0.1


def test_holm_adjusts_step_by_step():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_analysis_agrees_with_its_parts():
    r = rewards(base="ab", e1="acd", e2="eb", mixed="bcfe")
    a = analyze(r, base="base", experts=["e1", "e2"], resamples=200)
    sets = pass_sets(r)
    whole = next(x for x in a.tables["flows"] if (x["model"], x["domain"]) == ("mixed", "all"))
    assert (whole["inherited"], whole["novel"]) == (2, 1)
    per_domain = [x for x in a.tables["flows"] if x["model"] == "mixed" and x["domain"] != "all"]
    assert sum(x["lost"] for x in per_domain) == whole["lost"]
    assert a.results["overlap"][1, 3] == jaccard(sets["e1"], sets["mixed"])
    assert all(x["p_mcnemar_holm"] >= x["p_mcnemar"] for x in a.tables["pairs"])
    expert = next(x for x in a.tables["flows"] if (x["model"], x["domain"]) == ("e1", "all"))
    assert expert["novel"] == 2  # c and d: an expert is not compared with itself


@pytest.mark.parametrize(
    ("r", "arguments", "message"),
    [
        ({}, {}, "at least one model"),
        ({"base": {}}, {}, "the benchmark is empty"),
        (rewards(base="a"), {"experts": ["math"]}, "no rewards of math"),
        (rewards(base="a", e="b"), {"experts": []}, "at least one single-domain expert"),
        (rewards(base="a") | {"e": {"math/a": np.ones(2)}}, {}, "not scored on the same problems: 7"),
    ],
)
def test_bad_input_is_one_sentence(r, arguments, message):
    with pytest.raises(InputError, match=message):
        analyze(r, **({"base": "base", "experts": ["e"]} | arguments))


def samples(right: set[int]) -> list[Sample]:
    out = []
    for i in range(6):
        p = Prompt(f"math/{i}", "math", (1, 2), f"problem {i}", {})
        out += [
            Sample(p, k, [5, 1], [-0.1, -0.2], "stop", 0, reward=float(i in right), status="ok", text="x")
            for k in (0, 1)
        ]
    return out


def test_the_command_writes_json_csv_and_svg(tmp_path):
    for name, right in (("base", {0}), ("math", {0, 1, 2}), ("mixed", {1, 2, 3})):
        write_samples(tmp_path / "s" / f"{name}.jsonl", samples(right), name)
    arguments = ["skills", "--samples", str(tmp_path / "s"), "--base", "base", "--experts", "math"]
    assert main([*arguments, "--models", "mixed", "--out", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o" / "skills.json").read_text())
    assert found["definitions"]["novel"] and "2602.12566" in found["source"]
    flows = next(r for r in found["tables"]["flows"] if (r["model"], r["domain"]) == ("mixed", "all"))
    assert (flows["inherited"], flows["novel"], flows["forgotten"]) == (2, 1, 1)
    assert (tmp_path / "o" / "skills-pairs.csv").read_text().startswith("a,b,domain,difference")
    assert (tmp_path / "o" / "skills-flows.svg").read_text().startswith("<svg")
    run_without_torch("m2rl.analyze.__main__", *arguments, "--models", "mixed", "--out", str(tmp_path / "o"))
    with pytest.raises(InputError, match=r"no samples of absent: neither absent.jsonl nor"):
        main([*arguments, "--models", "absent", "--out", str(tmp_path / "o")])


def test_rewards_are_ordered_by_sample_and_missing_ones_are_zero():
    s = samples({0})
    s[0].reward = float("nan")
    assert rewards_of(s[::-1])["math/0"].tolist() == [0.0, 1.0]
