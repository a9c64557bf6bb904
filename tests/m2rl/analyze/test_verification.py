"""AUROC, thresholds and the locus of the first error against brute force; scores against a plain forward pass."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from m2rl.analyze import verification
from m2rl.analyze.verification import (
    Scores,
    analyze,
    answer_tokens,
    auroc,
    auroc_resamples,
    balanced_accuracy,
    best_threshold,
    discrimination,
    first_wrong_sum,
    folds,
    locus,
    p_yes,
    score,
    step_ends,
    step_of_token,
    thresholds,
    trajectory,
)
from m2rl.policy import Policy, load_model
from m2rl.types import InputError, Prompt, Sample


@pytest.fixture(scope="module")
def tokenizer(embedded_folder):
    return AutoTokenizer.from_pretrained(embedded_folder)


@pytest.fixture(scope="module")
def policy(embedded_folder):
    return Policy(load_model(embedded_folder)).eval().requires_grad_(False)


def brute_auroc(scores, right, strata) -> float:
    pairs = [
        (a > b) + 0.5 * (a == b)
        for (a, x, s), (b, y, t) in itertools.product(zip(scores, right, strata), repeat=2)
        if x and not y and s == t
    ]
    return float(np.mean(pairs)) if pairs else float("nan")


def test_auroc_is_the_share_of_pairs_won_with_ties_and_strata():
    rng = np.random.default_rng(0)
    for n in (2, 5, 30):
        for _ in range(20):
            scores, right = rng.integers(0, 6, n).astype(float), rng.random(n) < 0.5
            strata = rng.integers(0, 3, n)
            assert auroc(scores, right) == pytest.approx(brute_auroc(scores, right, np.zeros(n)), nan_ok=True)
            assert auroc(scores, right, strata) == pytest.approx(brute_auroc(scores, right, strata), nan_ok=True)


def test_resampled_aurocs_are_those_of_resampled_responses():
    rng = np.random.default_rng(1)
    problems = [f"p{i // 3}" for i in range(24)]
    scores, right = rng.integers(0, 5, 24).astype(float), rng.random(24) < 0.5
    strata = np.array([i % 2 for i in range(24)])
    got = auroc_resamples(scores, right, problems, strata, seed=7, resamples=20)
    drawn = np.random.default_rng(7).multinomial(8, np.full(8, 1 / 8), size=20)
    for value, counts in zip(got, drawn):
        index = [i for p, c in enumerate(counts) for _ in range(c) for i in (3 * p, 3 * p + 1, 3 * p + 2)]
        assert value == pytest.approx(auroc(scores[index], right[index], strata[index]))


def test_the_interval_covers_the_true_auroc():
    """Scores N(1, 1) against N(0, 1): the area is Phi(1 / sqrt 2) = 0.760."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        right = rng.random(120) < 0.5
        d = discrimination(rng.normal(size=120) + right, right, [str(i) for i in range(120)], seed=seed, resamples=300)
        covered += d["auroc_low"] < 0.7602 < d["auroc_high"]
    assert covered >= 52


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(2)
    for _ in range(30):
        scores, right = rng.integers(0, 8, 15).astype(float), rng.random(15) < 0.5
        if right.all() or not right.any():
            continue
        got = balanced_accuracy(scores >= best_threshold(scores, right), right)
        assert got == pytest.approx(max(balanced_accuracy(scores >= t, right) for t in np.arange(-0.5, 9)))


def test_thresholds_come_from_the_other_half_of_the_problems():
    problems = ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert folds(problems).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    scores = np.array([0, 1, 10, 12, 0, 1, 10, 12], float)
    right = np.array([0, 1] * 4, bool)
    assert thresholds(scores, right, problems).tolist() == [11, 11, 0.5, 0.5, 11, 11, 0.5, 0.5]
    # A score without information is at chance on problems its threshold has not seen.
    rng = np.random.default_rng(3)
    d = discrimination(rng.normal(size=2000), rng.random(2000) < 0.5, [str(i) for i in range(2000)], resamples=10)
    assert abs(d["balanced_accuracy"] - 0.5) < 0.04


def test_domains_are_compared_inside_themselves():
    """Two domains whose levels differ, without information in either: pooled they would look informative."""
    rng = np.random.default_rng(4)
    easy = np.arange(800) < 400
    right = rng.random(800) < np.where(easy, 0.9, 0.1)
    scores = rng.normal(size=800) + 5 * easy
    problems, domains = [str(i) for i in range(800)], ["math" if e else "if" for e in easy]
    assert discrimination(scores, right, problems, resamples=10)["auroc"] > 0.85
    assert abs(discrimination(scores, right, problems, domains, resamples=10)["auroc"] - 0.5) < 0.08


def test_steps_are_lines_or_words():
    assert step_ends("4-3=1 1+6=7 \\boxed{7}") == [5, 11, 21]
    assert step_ends("first line\n\nsecond\n") == [10, 18]
    assert step_ends("") == []


def test_the_first_false_sum_is_found():
    assert first_wrong_sum("4-3=1 1+6=8 \\boxed{8}") == 1
    assert first_wrong_sum("4-3=1 1+6=7 \\boxed{7}") is None
    assert first_wrong_sum("2*3=6\n6-7=-1\n1+1=3") == 2


def sample(tokenizer, text: str, *, right: bool = True, i: int = 0, prompt: str = "math: what is 4-3+6") -> Sample:
    p = Prompt(f"math/{i}", "math", tuple(tokenizer.encode(prompt)), prompt, {})
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return Sample(p, 0, tokens, [0.0] * len(tokens), "stop", 0, text=text, reward=float(right), status="ok")


def test_every_token_knows_its_step(tokenizer):
    s = sample(tokenizer, "4-3=1 1+6=7 \\boxed{7}")
    at = step_of_token(s, tokenizer)
    parts = ["".join(tokenizer.decode([t]) for t, a in zip(s.tokens, at) if a == k) for k in range(3)]
    assert [p.strip() for p in parts[:2]] == ["4-3=1", "1+6=7"] and "boxed{7}" in parts[2]
    assert at.max() == 2 and (np.diff(at) >= 0).all()


def test_the_answer_is_written_as_the_response_wrote_it(tokenizer):
    tokens, is_answer = answer_tokens(sample(tokenizer, "4-3=1 1+6=7 \\boxed{7}"), tokenizer)
    assert is_answer and tokenizer.decode(tokens) == "\\boxed{7}"
    s = sample(tokenizer, "no answer here")
    assert answer_tokens(s, tokenizer) == (s.tokens, False)


def test_scores_are_means_of_log_probabilities_of_a_plain_forward(policy, tokenizer, embedded_folder):
    s = sample(tokenizer, "4-3=1 1+6=7 \\boxed{7}")
    other = sample(tokenizer, "4-3=2 \\boxed{8}", right=False, i=1)
    found = score(policy, [s, other], tokenizer, horizon=4)

    def plain(prompt, response) -> np.ndarray:
        with torch.no_grad():
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(embedded_folder)
            logp = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        return np.array([float(logp[len(prompt) + i - 1, t]) for i, t in enumerate(response)])

    logp, at = plain(s.prompt.tokens, s.tokens), step_of_token(s, tokenizer)
    for h in range(3):
        assert found.process[0, h] == pytest.approx(logp[at <= h].mean(), abs=1e-5)
        assert found.steps[0][h] == pytest.approx(logp[at == h].mean(), abs=1e-5)
    assert found.process[0, 3] == found.process[0, 2]  # beyond the last step nothing changes
    answer = tokenizer.encode("\\boxed{7}", add_special_tokens=False)
    assert found.outcome[0] == pytest.approx(plain(s.prompt.tokens, answer).mean(), abs=1e-5)
    assert found.right.tolist() == [True, False] and found.is_answer.all()


def test_p_yes_is_the_two_way_softmax(policy, tokenizer):
    s = sample(tokenizer, "4-3=1 1+6=7 \\boxed{7}")
    text = verification.QUESTION.format(problem=s.prompt.text, answer="7")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    ids = [tokenizer.encode(w, add_special_tokens=False)[0] for w in ("yes", "no")]
    with torch.no_grad():
        from m2rl.policy import Packed

        hidden = policy.hidden(Packed.of([prompt], policy.device))[-1]
        logits = (policy.head @ hidden)[ids]
    assert p_yes(policy, [s], tokenizer)[0] == pytest.approx(float(logits.softmax(0)[0]), abs=1e-5)


def made_scores(right, steps, problems=None) -> Scores:
    S = len(right)
    worst = np.array([min(s) for s in steps])
    return Scores(
        problems or [f"math/{i}" for i in range(S)],
        ["math"] * S,
        np.array(right, bool),
        worst,
        np.column_stack([worst, worst]),
        [np.array(s, float) for s in steps],
        np.ones(S, bool),
    )


def test_the_locus_of_the_first_error_is_the_first_step_below_the_threshold():
    right = [True, False, True, False] * 3
    steps = [[-1, -1, -1], [-1, -9, -1]] * 6
    texts = ["1+1=2 2+2=4 3+3=6", "1+1=2 2+2=5 3+3=6"] * 6
    found = locus(made_scores(right, steps, [f"math/{i // 2}" for i in range(12)]), texts)
    assert found["balanced_accuracy"] == 1 and found["wrong_called_wrong"] == 6
    assert found["histogram"] == [0, 0, 6, 0, 0] and found["mean_position"] == 0.5
    assert (found["known_first_errors"], found["exact"], found["chance"]) == (6, 1.0, pytest.approx(1 / 3))
    misplaced = locus(
        made_scores(right, [[-1, -1, -1], [-9, -1, -1]] * 6, [f"math/{i // 2}" for i in range(12)]), texts
    )
    assert misplaced["exact"] == 0 and misplaced["within_one_step"] == 1


def test_the_analysis_names_its_score_and_tracks_training():
    rng = np.random.default_rng(5)
    right = rng.random(40) < 0.5
    noise, sharp = ([[float(rng.normal() + g * r), 0.0] for r in right] for g in (0.0, 6.0))
    s0, s1 = made_scores(right, noise), made_scores(right, sharp)
    texts = {"m": ["1+1=2 x"] * 40}
    a = analyze({("m", "m"): s1}, texts, training={0: s0, 100: s1}, resamples=50)
    assert a.inputs["outcome_score"] == "logprob" and "log-probability" in a.definitions["outcome"]
    assert "P(yes)" in analyze({("m", "m"): s1}, texts, outcome="p_yes", resamples=5).definitions["outcome"]
    points = [r for r in a.tables["training"] if r["kind"] == "outcome"]
    assert [p["step"] for p in points] == [0, 100] and points[0]["auroc"] < points[1]["auroc"]
    assert trajectory({0: s0}, resamples=5)[0]["responses"] == 40
    assert {r["self"] for r in a.tables["discrimination"]} == {True}


def test_nothing_to_tell_apart_is_an_error(policy, tokenizer):
    with pytest.raises(InputError, match="every response is right, or every one is wrong"):
        analyze({("m", "m"): made_scores([True, True], [[-1], [-2]])}, {"m": ["", ""]})
    with pytest.raises(InputError, match="at least one response"):
        score(policy, [], tokenizer)
    assert math.isnan(auroc(np.array([1.0]), np.array([True])))
