"""Estimates against closed forms, the paper's numbers against its table."""

import dataclasses
import math

import numpy as np
import pytest
from chance_seeds import DOMAINS, chances, comparison, seed_of
from small_study import MODELS

from m2rl.comparison import Comparison, Estimate, paper_value, read, t_interval
from m2rl.types import InputError


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


def test_a_domain_of_several_benchmarks_is_their_mean():
    s = seed_of(chances(mixed={"math": 0.9, "code": 0.7}))
    renamed = {"math": "aime24", "code": "aime25", "science": "gpqa_diamond", "if": "ifeval"}

    def new(p: str) -> str:
        return f"{renamed[p.partition('/')[0]]}/{p.partition('/')[2]}"

    rewards = {m: {new(p): v for p, v in by.items()} for m, by in s.rewards.items()}
    domain = {"aime24": "math", "aime25": "math", "gpqa_diamond": "science", "ifeval": "if"}
    s = dataclasses.replace(s, rewards=rewards, domain_of={p: domain[p.partition("/")[0]] for p in rewards["sft"]})
    c = Comparison([s], MODELS, ("math", "science", "if"))
    assert c.benchmarks == list(domain) and c.of["math"] == ["aime24", "aime25"]
    parts = [c.mean("mixed", b).value for b in domain]
    assert (
        c.mean("mixed", "math").value == pytest.approx((parts[0] + parts[1]) / 2) and c.mean("mixed", "math").n == 800
    )
    assert c.mean("mixed").value == pytest.approx(np.mean(parts))


def test_unlike_problems_and_missing_models_are_named(tmp_path):
    with pytest.raises(InputError, match="no samples of ties2"):
        read(tmp_path, ["ties2"])
    with pytest.raises(InputError, match="at least one seed"):
        comparison()
    other = seed_of(chances())
    other = dataclasses.replace(other, domain_of={p: d for p, d in other.domain_of.items() if d != "if"})
    with pytest.raises(InputError, match="seed 0 has no scored problems of domain if"):
        comparison(other)


def test_the_papers_number_is_the_same_expression_of_its_table():
    mixed = (73.85, 64.11, 59.77, 56.57, 53.66, 5.84, 90.34, 55.78, 80.00)
    ties = (71.67, 66.72, 57.80, 53.14, 56.19, 5.70, 89.83, 53.74, 79.91)
    assert paper_value(lambda at: at("mixed") - at("ties")) == pytest.approx((sum(mixed) - sum(ties)) / 900)
    assert paper_value(lambda at: at("math", "math")) == pytest.approx((71.51 + 63.54) / 200)
    assert paper_value(lambda at: at("tsv_m")) is None
