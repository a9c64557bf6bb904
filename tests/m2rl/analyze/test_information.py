"""The KL budget against the inequality it rests on and against closed forms."""

import math

import numpy as np
import pytest

from m2rl.analyze.information import analyze, bernoulli_kl, budget, inside
from m2rl.analyze.policies import Divergences, KLMatrix
from m2rl.types import InputError


def test_bernoulli_kl():
    assert bernoulli_kl(0.5, 0.25) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert bernoulli_kl(0.3, 0.3) == 0 and bernoulli_kl(1, 0.25) == pytest.approx(math.log(4))
    assert bernoulli_kl(0.5, 0) == math.inf
    assert inside(1.0, 10) == 0.95 and inside(0.0, 10) == 0.05 and inside(0.4, 10) == 0.4


def test_no_policy_gains_accuracy_with_fewer_nats_than_needed():
    """Random distributions over nine responses on five prompts, some responses right: exact KL and accuracies."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, q = rng.dirichlet(np.full(9, 0.5), 5), rng.dirichlet(np.full(9, 0.5), 5)
        right = rng.random((5, 9)) < 0.4
        nats = (p * np.log(p / q)).sum(1)
        accuracy, base = (p * right).sum(1), (q * right).sum(1)
        b = budget(nats, np.ones(5), accuracy, base, 10**9, resamples=2)
        assert b["needed"] <= b["nats"] + 1e-9 and b["efficiency"] <= 1 + 1e-9
        assert abs(b["gain"]) <= b["pinsker"] + 1e-9


def test_the_tilted_base_wastes_nothing():
    """q reweighted by right and wrong only is the least divergence of its accuracy: efficiency 1."""
    q = np.array([0.1, 0.2, 0.3, 0.4])
    right = np.array([1, 0, 1, 0], bool)
    p = np.where(right, q / q[right].sum() * 0.9, q / q[~right].sum() * 0.1)
    b = budget(np.array([(p * np.log(p / q)).sum()]), np.ones(1), np.array([0.9]), np.array([0.4]), 10**9, resamples=2)
    assert b["efficiency"] == pytest.approx(1) and b["gain"] == pytest.approx(0.5)
    assert b["gain_per_nat"] == pytest.approx(0.5 / b["nats"])
    assert b["bits_per_token"] == pytest.approx(b["nats"] / math.log(2))


def test_intervals_have_the_standard_error_of_the_mean():
    rng = np.random.default_rng(1)
    nats = rng.gamma(4, 1, 400)
    b = budget(nats, np.ones(400), rng.random(400), np.zeros(400) + 0.2, 10**6, resamples=4000)
    half = 1.96 * nats.std() / 20
    assert b["nats_low"] == pytest.approx(nats.mean() - half, abs=0.02)
    assert b["nats_high"] == pytest.approx(nats.mean() + half, abs=0.02)


def matrix() -> KLMatrix:
    prompts = ["math/0", "math/0", "math/1", "if/0"]
    full = np.array([1.0, 3.0, 4.0, 0.5])
    found = Divergences(prompts, np.full(4, 2.0), full, full, full)
    zero = Divergences(prompts, np.full(4, 2.0), full * 0, full * 0, full * 0)
    return KLMatrix(["base", "m"], ["math", "if"], {p: p.split("/")[0] for p in prompts},
                    {("m", "base"): found, ("base", "base"): zero})  # fmt: skip


def test_budgets_per_domain_and_in_total():
    rewards = {
        "base": {"math/0": np.array([0.0, 1.0]), "math/1": np.array([0.0]), "if/0": np.array([1.0])},
        "m": {"math/0": np.array([1.0, 1.0]), "math/1": np.array([1.0]), "if/0": np.array([1.0])},
    }
    a = analyze(matrix(), rewards, base="base", kinds={"m": "merge"}, resamples=20)
    rows = {r["domain"]: r for r in a.tables["budgets"]}
    assert rows["math"]["nats"] == 3.0 and rows["math"]["gain"] == 0.75 and rows["math"]["kind"] == "merge"
    assert rows["if"]["nats"] == 0.5 and rows["if"]["gain"] == 0
    (total,) = a.tables["total"]
    assert total["nats"] == 1.75 and total["gain"] == 0.375
    del rewards["m"]["math/1"]
    with pytest.raises(InputError, match="no rewards of m and base on math/1"):
        analyze(matrix(), rewards, base="base")
    with pytest.raises(InputError, match="no rewards of m "):
        analyze(matrix(), {"base": rewards["base"]}, base="base")
    with pytest.raises(InputError, match="no divergences of x"):
        analyze(matrix(), rewards, base="x")
