"""Scores of samples; the evaluator on the built-in model: one engine for several weights, the same draws every time."""

import dataclasses

import numpy as np
import pytest
import torch

from m2rl import embedded
from m2rl.config import Config, Evaluation, Rollout
from m2rl.evaluate import Evaluator, evaluate_model
from m2rl.evaluate.evaluator import cache_gib, fitted
from m2rl.policy import Policy, load_model
from m2rl.scores import bootstrap_ci, majority, pass_at_k, score, score_one, vote
from m2rl.types import InputError, Prompt, Sample

SMALL = Config(
    rollout=Rollout(max_prompt_tokens=40, max_new_tokens=8, max_sequences=32), evaluation=Evaluation(k=2, problems=4)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    embedded.save(path / "a", 0)
    embedded.save(path / "b", 1)
    return path


@pytest.fixture(scope="module")
def evaluator(folder):
    with Evaluator(folder / "a", SMALL) as made:
        yield made


def sample(prompt_id: str, reward: float, text: str = "", domain: str = "math", index: int = 0) -> Sample:
    prompt, status = Prompt(prompt_id, domain, (1,), "", {}), "ok" if reward else "wrong"
    return Sample(prompt, index, [1, 2], [0.0, 0.0], "stop", 0, text=text, reward=reward, status=status)


def test_avg_at_k_is_a_mean_over_problems_not_samples():
    made = score_one([sample("a", 1), sample("a", 1), sample("a", 1), sample("b", 0)])
    assert made.avg_at_k == 0.5 and made.problems == 2 and made.k == 3 and made.pass_at_k == 0.5


def test_a_missing_reward_counts_as_zero():
    assert score([sample("a", float("nan")), sample("a", 1)])["math"].avg_at_k == 0.5


@pytest.mark.parametrize(
    ("answers", "rewards", "want"),
    [
        (["4", "4", "5"], [1, 1, 0], 1.0),
        (["4", "5", "5"], [1, 0, 0], 0.0),
        (["4", "5"], [1, 0], 1.0),  # a tie: the first
        ([None, "5", "5"], [0, 1, 1], 1.0),
        ([None, None], [0, 0], 0.0),
    ],
)
def test_majority_is_the_reward_of_the_most_frequent_answer(answers, rewards, want):
    group = [
        sample("a", r, "" if a is None else f"so \\boxed{{{a}}}", index=i)
        for i, (a, r) in enumerate(zip(answers, rewards))
    ]
    assert majority(group) == want


@pytest.mark.parametrize(
    ("text", "domain", "want"),
    [
        ("so \\boxed{\\text{B}}", "science", "b"),
        ("Answer: (C) neon", "science", "c"),
        ("Answer: D) 1.5 g", "science", "d"),
        ("Answer: $1{,}024$", "math", "1024"),
        ("Answer: 1,024.", "math", "1024"),
        ("Answer: 1.5", "math", "1.5"),  # not 15
        ("Answer: (1, 2)", "math", "(1,2)"),  # not 12
        ("nothing", "math", None),
        ("Answer: 1</think>", "math", None),
        ("<think>Answer: 1</think>Answer: 2", "math", "2"),
    ],
)
def test_votes_are_normalised(text, domain, want):
    assert vote(sample("a", 0, text, domain)) == want


def test_behind_a_think_gate_only_what_it_lets_pass_votes():
    gated = dataclasses.replace(sample("a", 0).prompt, spec={"think_gate": True})
    texts = ["\\boxed{1}", "\\boxed{1}", "x</think>\\boxed{2}"]
    group = [Sample(gated, i, [1], [0.0], "stop", 0, text=t, reward=float(i == 2)) for i, t in enumerate(texts)]
    assert [vote(s) for s in group] == [None, None, "2"] and majority(group) == 1.0


def test_rows_that_name_their_benchmark_are_scored_apart():
    named = sample("b", 1)
    named.prompt = dataclasses.replace(named.prompt, spec={"benchmark": "aime24"})
    assert {n: s.avg_at_k for n, s in score([sample("a", 0), named]).items()} == {"math": 0.0, "aime24": 1.0}


def test_pass_at_every_k_is_meaned_over_problems():
    made = score_one([*(sample("a", i == 0) for i in range(6)), *(sample("b", 0) for _ in range(6))])
    assert made.pass_at == {k: pytest.approx(k / 12) for k in (1, 2, 4, 6)} and made.pass_at_k == made.pass_at[6]


def test_the_engine_is_asked_for_no_more_than_the_model_has_positions():
    paper = Config(rollout=Rollout(max_prompt_tokens=8192, max_new_tokens=32768))
    assert fitted(paper, 40960) is paper
    for positions in (32768, 4096):
        r = fitted(paper, positions).rollout
        assert r.max_prompt_tokens + r.max_new_tokens == positions and r.max_prompt_tokens >= 1
    longer = fitted(dataclasses.replace(paper, evaluation=Evaluation(max_new_tokens=65536)), 32768)
    assert longer.rollout.max_prompt_tokens + longer.evaluation.max_new_tokens < 32768


def test_the_cache_takes_what_weights_and_activations_leave():
    assert cache_gib(80 << 30, 8 << 30) == pytest.approx(60)
    assert cache_gib(4 << 30, 8 << 30) == 1


def test_domains_without_final_answers_have_no_majority():
    assert majority([sample("a", 1, domain="code")]) is None
    assert score_one([sample("a", 1, domain="if")]).majority_at_k is None


def test_pass_at_k_equals_the_share_of_subsets_that_hold_a_success():
    from itertools import combinations

    for correct in range(6):
        outcomes = [i < correct for i in range(5)]
        for k in range(1, 6):
            subsets = [any(c) for c in combinations(outcomes, k)]
            if correct <= 5:
                assert pass_at_k(correct, 5, k) == pytest.approx(np.mean(subsets))


def test_the_interval_narrows_with_problems_and_holds_the_mean():
    few, many = (bootstrap_ci(np.tile([0.0, 1.0], n)) for n in (10, 200))
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert bootstrap_ci(np.array([0.3])) == (0.3, 0.3)


def test_the_engine_is_built_once_and_takes_folders_state_dicts_and_policies(evaluator, folder):
    first = evaluator.score(folder / "a", ["math", "if"])
    state = load_model(folder / "a").state_dict()  # holds the tied head a second time, as checkpoints do
    assert evaluator.score(state, ["math", "if"]) == first
    assert evaluator.score(Policy(load_model(folder / "a")), ["math", "if"]) == first
    assert list(first) == ["math", "if"]
    assert first["math"].k == 2 and first["math"].problems == 4


def test_other_weights_give_other_samples_and_leave_no_trace(evaluator, folder):
    def texts(weights):
        evaluator.take(weights)
        return [s.tokens for s in evaluator.samples(evaluator.benchmark("math"))]

    before = texts(folder / "a")
    assert texts(folder / "b") != before
    assert texts(folder / "a") == before


def test_a_seed_is_another_draw(evaluator, folder):
    evaluator.take(folder / "a")
    task = evaluator.benchmark("math")
    one, two, again = (evaluator.samples(task, seed=s) for s in (0, 1, 0))
    assert [s.tokens for s in one] == [s.tokens for s in again] != [s.tokens for s in two]


def test_known_samples_are_not_generated_again(evaluator, folder):
    evaluator.take(folder / "a")
    task = evaluator.benchmark("math")
    full = evaluator.samples(task)
    known = {(s.prompt.id, s.index): dataclasses.replace(s, text="known") for s in full[:5]}
    seen = []
    resumed = evaluator.samples(task, known=known, on_sample=seen.append)
    assert [s.tokens for s in resumed] == [s.tokens for s in full]
    assert [s.text == "known" for s in resumed] == [True] * 5 + [False] * 3
    assert {(s.prompt.id, s.index) for s in seen} == {(s.prompt.id, s.index) for s in full[5:]}


def test_prompts_are_scored_by_domain(evaluator, folder):
    prompts = [*evaluator.benchmark("math").prompts[:2], *evaluator.benchmark("science").prompts[:2]]
    made = evaluator.score(folder / "a", prompts, k=3)
    assert {n: (s.k, s.problems) for n, s in made.items()} == {"math": (3, 2), "science": (3, 2)}


def test_evaluate_model_is_the_same_in_one_call(evaluator, folder):
    made = evaluate_model(folder / "a", ["science"], k=2, config=SMALL, max_sequences=7)
    assert made == evaluator.score(folder / "a", ["science"], k=2)


def test_a_model_of_another_shape_is_refused(evaluator, folder):
    state = dict(load_model(folder / "a").state_dict())
    wrong = {**state, "model.norm.weight": torch.zeros(3)}
    with pytest.raises(InputError, match=r"model.norm.weight is \(3,\), expected \(128,\)"):
        evaluator.take(wrong)
    del wrong["model.norm.weight"]
    with pytest.raises(InputError, match="1 tensors differ in name, first model\\.norm"):
        evaluator.take(wrong)
    with pytest.raises(InputError, match="not a Hugging Face model folder"):
        Evaluator(folder / "nothing", SMALL)
    with pytest.raises(InputError, match="unknown benchmark mth, did you mean math"):
        evaluator.benchmark("mth")
