"""Advantages, denominators and row selection against definitions; the learner's gradient against float64 autograd."""

import numpy as np
import pytest
import tiny
import torch

from m2rl.config import Objective, Optim
from m2rl.learner import Learner, added, make_bin
from m2rl.objectives import PolicyGradient, Supervised, TrainRow, group_stats, to_rows, token_weights
from m2rl.policy import ATTENTION, Policy
from m2rl.types import Prompt, Sample, StepStats


def sample(domain="math", prompt=0, index=0, reward=1.0, n=3, finish="stop", mask=None):
    return Sample(
        PROMPTS.setdefault((domain, prompt), Prompt(f"{domain}/{prompt}", domain, (5, 6), "", {})),
        index,
        list(range(10, 10 + n)),
        [-1.0 - 0.1 * i for i in range(n)],
        finish,
        0,
        mask,
        "",
        reward,
        "ok",
    )


PROMPTS: dict = {}


def test_groups_are_found_by_prompt_even_when_prompts_repeat_text():
    samples = [
        sample(prompt=p, index=i, reward=r)
        for p, rewards in enumerate([(1, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 1)])
        for i, r in enumerate(rewards)
    ]
    advantages, groups = group_stats(samples, Objective())
    want = []
    for rewards in [(1, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 1)]:
        r = np.array(rewards, float)
        want += list((r - r.mean()) / (r.std(ddof=1) + 1e-6) if r.std() else r * 0)
    np.testing.assert_allclose(advantages, want, atol=1e-6)
    assert [(g.live, g.mean) for g in groups] == [(True, 0.5), (False, 1.0), (True, 0.25)]


def test_the_same_prompt_twice_in_a_row_is_two_groups():
    """A file with fewer rows than the quota brings a prompt twice into one step."""
    samples = [sample(index=i, reward=r) for rewards in [(1, 0), (1, 1)] for i, r in enumerate(rewards)]
    _, groups = group_stats(samples, Objective())
    assert [(g.live, g.mean) for g in groups] == [(True, 0.5), (False, 1.0)]


def test_several_updates_of_one_rollout_are_reported_together():
    parts = [
        StepStats(1.0, 2.0, False, 10, 4, {"math": {"count": 3.0, "loss": 1.5}}),
        StepStats(3.0, float("nan"), True, 6, 2, {"math": {"count": 1.0, "loss": 0.5}}),
    ]
    whole = added(parts)
    assert (whole.loss, whole.skipped, whole.tokens, whole.trained_tokens) == (2.0, True, 16, 6)
    assert np.isnan(whole.grad_norm) and whole.per_domain == {"math": {"count": 4.0, "loss": 2.0}}
    assert added(parts[:1]) == parts[0]


@pytest.mark.parametrize(
    ("aggregation", "want"),
    [
        ("sequence", [1 / (3 * 2), 1 / (3 * 4), 0, 1 / (3 * 6)]),
        ("token", [1 / 12, 1 / 12, 0, 1 / 12]),
        ("constant", [1 / 300, 1 / 300, 0, 1 / 300]),
        ("domain", [1 / (2 * 6), 1 / (2 * 6), 0, 1 / (2 * 6)]),
    ],
)
def test_token_weights(aggregation, want):
    got = token_weights(
        np.array([2, 4, 5, 6]), np.array([0, 0, 1, 1]), np.array([True, True, False, True]), aggregation, 100
    )
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "domain"])
def test_weights_of_a_batch_add_up_to_one(aggregation):
    rng = np.random.default_rng(0)
    lengths, domains = rng.integers(1, 50, 40), rng.integers(0, 3, 40)
    weights = token_weights(lengths, domains, np.ones(40, bool), aggregation, 100)
    assert (weights * lengths).sum() == pytest.approx(1)


def test_dead_samples_drop_but_one_per_group_watches():
    samples = [
        sample(prompt=p, index=i, reward=r)
        for p, rewards in enumerate([(1, 0), (1, 1), (0, 0)])
        for i, r in enumerate(rewards)
    ]
    advantages, _ = group_stats(samples, Objective())
    rows = to_rows(samples, advantages, ["math"], Objective(), 10)
    assert [(r.weight > 0, r.advantage != 0) for r in rows] == [
        (True, True),
        (True, True),
        (False, False),
        (False, False),
    ]
    dense = to_rows(samples, advantages, ["math"], Objective(kl_coef=0.1), 10)
    assert all(r.weight > 0 for r in dense) and len(dense) == 6


def test_truncated_samples_can_be_masked_and_leave_every_denominator():
    samples = [sample(index=0, reward=1), sample(index=1, reward=0, finish="length"), sample(index=2, reward=0)]
    advantages, _ = group_stats(samples, Objective())
    rows = to_rows(samples, advantages, ["math"], Objective(mask_truncated=True), 10)
    assert [r.weight for r in rows] == pytest.approx([1 / (2 * 3)] * 2)


def test_environment_tokens_are_not_trained():
    s = sample(n=5, mask=[True, True, False, False, True])
    rows = to_rows([s, sample(index=1, reward=0)], np.array([1.0, -1.0]), ["math"], Objective(), 10)
    assert rows[0].trained.tolist() == [False, False, True, True, False, False, True]
    np.testing.assert_allclose(rows[0].behaviour_logp, [-1.0, -1.1, -1.4], rtol=1e-6)
    assert rows[0].weight == pytest.approx(1 / (2 * 3))


# ---- the learner ----


def learner(tokens_per_bin=1000, seed=0, **objective):
    policy = Policy(tiny.model(attention=ATTENTION, seed=seed))
    return Learner(policy, Optim(lr=1e-3), 10, tokens_per_bin, ["a", "b"]), PolicyGradient(Objective(**objective))


def gradient(made):
    return torch.cat([p.grad.flatten() for p in made.policy.parameters()])


def test_the_gradient_does_not_depend_on_bins_or_order():
    rows = tiny.rows()
    reference = None
    for tokens_per_bin, order in ((1000, 1), (31, 1), (60, -1)):
        made, objective = learner(tokens_per_bin)
        made.backward(rows[::order], objective)
        g = gradient(made)
        reference = g if reference is None else reference
        assert (g - reference).norm() / reference.norm() < 3e-6, tokens_per_bin


OPTIONS = [
    {},
    {"loss": "cispo"},
    {"loss": "gspo"},
    {"loss": "reinforce"},
    {"tis_cap": 0.0},
    {"kl_coef": 0.1, "kl": "k1"},
    {"kl_coef": 0.1, "kl": "k2"},
    {"kl_coef": 0.1, "kl": "k3"},
    {"entropy_coef": 0.05},
    {"dual_clip": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_that_of_the_published_loss_in_float64(options):
    """Whole model in float64, one sequence at a time, the loss written out by hand."""
    made, objective = learner(**options)
    rows = tiny.rows()
    rng = np.random.default_rng(3)
    for r in rows:
        n = int(r.trained.sum())
        r.old_logp = rng.uniform(-5.2, -4.2, n).astype(np.float32)
        r.ref_logp = rng.uniform(-5.2, -4.2, n).astype(np.float32)
        r.behaviour_logp = (r.old_logp + rng.normal(0, 0.5, n)).astype(np.float32)
    totals = made.backward(rows, objective)
    o = objective.options
    exact = tiny.model().double()
    total = torch.zeros((), dtype=torch.float64)
    for r in rows:
        dist = exact(input_ids=torch.tensor([r.tokens])).logits[0].log_softmax(-1)
        at = torch.from_numpy(np.flatnonzero(r.trained))
        logp = dist[at - 1].gather(1, torch.tensor(r.tokens)[at][:, None])[:, 0]
        entropy = -(dist[at - 1].exp() * dist[at - 1]).sum(-1)
        old, ref, behaviour = (torch.from_numpy(x).double() for x in (r.old_logp, r.ref_logp, r.behaviour_logp))
        ratio = (logp - old).exp()
        if o.loss == "gspo":
            ratio = (logp - old).mean().exp().expand(len(logp))
        clipped = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
        a = r.advantage
        if o.loss == "cispo":
            loss = -clipped.detach() * a * logp
        elif o.loss == "reinforce":
            loss = -a * logp
        else:
            loss = torch.maximum(-ratio * a, -clipped * a)
            if o.dual_clip and a < 0:
                loss = torch.minimum(loss, torch.tensor(-o.dual_clip * a, dtype=torch.float64))
        if o.tis_cap:
            loss = loss * (old - behaviour).exp().clamp(max=o.tis_cap)
        d = ref - logp
        kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[o.kl]
        total = total + r.weight * (loss + o.kl_coef * kl - o.entropy_coef * entropy).sum()
    total.backward()
    want = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert float(totals[0]) == pytest.approx(total.item(), rel=1e-4)
    assert (gradient(made).double() - want).norm() / want.norm() < 1e-5


def test_on_policy_needs_no_old_log_probabilities():
    """With one update per rollout the ratio is 1 and the gradient is that of -A * logp, whatever the clipping."""
    rows = tiny.rows()
    made, objective = learner(tis_cap=0.0)
    made.backward(rows, objective)
    plain, reinforce = learner(loss="reinforce", tis_cap=0.0)
    plain.backward(rows, reinforce)
    torch.testing.assert_close(gradient(made), gradient(plain), atol=1e-7, rtol=1e-5)


def test_supervised_loss_is_the_weighted_negative_log_likelihood():
    rows = tiny.rows()
    for r in rows:
        r.advantage, r.behaviour_logp = 1.0, None
    made, _ = learner()
    totals = made.backward(rows, Supervised())
    plain = tiny.model()
    want = 0.0
    for r in rows:
        dist = plain(input_ids=torch.tensor([r.tokens])).logits[0].log_softmax(-1).detach()
        at = np.flatnonzero(r.trained)
        want -= r.weight * sum(float(dist[i - 1, r.tokens[i]]) for i in at)
    assert float(totals[0]) == pytest.approx(want, rel=1e-5)


def test_a_non_finite_gradient_updates_nothing():
    made, objective = learner()
    before = [p.detach().clone() for p in made.policy.parameters()]
    rows = tiny.rows()
    rows[0].advantage = float("nan")
    stats = made.step(rows, objective, 0)
    assert stats.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, made.policy.parameters()))
    assert not made.step(tiny.rows(), objective, 1).skipped
    assert not all(torch.equal(a, b) for a, b in zip(before, made.policy.parameters()))


def test_score_is_the_log_probability_of_the_trained_tokens_in_the_order_of_the_rows():
    made, _ = learner(tokens_per_bin=40)
    rows = tiny.rows()
    plain = tiny.model()
    for r, got in zip(rows, made.score(rows)):
        dist = plain(input_ids=torch.tensor([r.tokens])).logits[0].log_softmax(-1).detach()
        np.testing.assert_allclose(got, [float(dist[i - 1, r.tokens[i]]) for i in np.flatnonzero(r.trained)], atol=2e-5)


def test_learning_rate_schedules():
    policy = Policy(tiny.model(attention=ATTENTION))

    def rates(**options):
        made = Learner(policy, Optim(lr=1.0, warmup_steps=2, min_lr_ratio=0.1, **options), 12, 100, ["a"])
        return [round(made.learning_rate(s), 3) for s in (0, 1, 2, 7, 12)]

    assert rates(schedule="constant") == [0.5, 1, 1, 1, 1]
    assert rates(schedule="linear") == [0.5, 1, 1, 0.55, 0.1]
    assert rates(schedule="cosine") == [0.5, 1, 1, 0.55, 0.1]


def test_a_bin_without_members_counts_for_nothing():
    """Ranks with too little to do run such bins, so that collectives stay in step."""
    made, objective = learner()
    empty = make_bin([], [], made.policy.device)
    logp, entropy = made.policy(empty.packed, empty.rows, empty.targets, 1.0, True)
    loss, stats = objective(logp, entropy, empty.fields, 2)
    loss.backward()
    assert float(loss) == 0
    assert not stats.any()
    assert not gradient(made).any()
    assert all(not b.members for b in made.bins([]))


def test_train_row_is_plain_data():
    assert TrainRow([1, 2], np.array([False, True]), 1.0, 0.0, 0).old_logp is None
