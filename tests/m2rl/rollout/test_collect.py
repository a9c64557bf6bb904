"""Rollouts: results in order, prompts shared by ranks, long tails carried over and never lost."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from commands import SUPPORT, torchrun

from m2rl.config import load
from m2rl.policy import Policy
from m2rl.rollout.carry import CarryOver
from m2rl.rollout.collect import collect
from m2rl.rollout.engine import Finished
from m2rl.rollout.native import NativeEngine
from m2rl.rollout.sharing import Sharing
from m2rl.types import InputError, Prompt, Verdict

TOKENIZER = SimpleNamespace(all_special_ids=[1], decode=lambda tokens, **_: " ".join(map(str, tokens)))


class Pool:
    """Verifies at once; the reward is the response's length."""

    def __init__(self):
        self.ready = []

    def submit(self, key, domain, response, spec):
        self.ready.append((key, Verdict(len(response.split()) / 100, "ok")))

    def poll(self, timeout_s):
        out, self.ready = self.ready, []
        return out


class Scripted:
    """One token per request and poll; a response to prompt (2, k) is the tokens k, k + 1, ... and k long in all."""

    def __init__(self):
        self.version, self.live, self.most = 0, {}, 0

    def submit(self, requests):
        for r in requests:
            length = r.tokens[1]  # of the whole response; a continuation has part of it already
            self.live[r.id] = [r, length - (len(r.tokens) - 2), []]
        self.most = max(self.most, len(self.live))

    @property
    def pending(self):
        return len(self.live)

    def poll(self):
        out = []
        for id, (r, length, tokens) in list(self.live.items()):
            tokens.append(1 if len(tokens) + 1 == length else r.tokens[-1] + len(tokens) + 1)
            if len(tokens) == length:
                out.append(self._finished(id, "stop"))
        return out

    def cancel(self, ids):
        return [self._finished(id, "abort") for id in list(ids) if id in self.live]

    def _finished(self, id, finish):
        _, _, tokens = self.live.pop(id)
        return Finished(id, tokens, [-0.5 - self.version] * len(tokens), finish, self.version)


def prompt(k):
    return Prompt(f"p/{k}", "math", (2, k), "", {})


def rollout(engine, lengths, n=2, step=0, **more):
    return collect(
        engine,
        Pool(),
        TOKENIZER,
        [prompt(k) for k in lengths],
        n,
        seed=0,
        step=step,
        max_new_tokens=100,
        temperature=1.0,
        **more,
    )


def test_results_are_in_the_prompts_order_whatever_finishes_first():
    seen = []
    samples = rollout(Scripted(), [9, 3, 30, 4], on_sample=seen.append)
    assert [(s.prompt.tokens[1], s.index) for s in samples] == [(k, i) for k in (9, 3, 30, 4) for i in range(2)]
    assert [len(s.tokens) for s in samples] == [9, 9, 3, 3, 30, 30, 4, 4]
    assert [s.reward for s in samples] == [len(s.tokens[:-1]) / 100 for s in samples]
    assert [len(s.tokens) for s in seen] == [3, 3, 4, 4, 9, 9, 30, 30]  # verified while others decode


def test_known_samples_are_not_generated_again():
    engine = Scripted()
    first = rollout(engine, [9, 3])
    known = {(s.prompt.id, s.index): s for s in first if s.index == 0}
    engine.most = 0
    again = rollout(engine, [9, 3], known=known)
    assert engine.most == 2 and [s.tokens for s in again] == [s.tokens for s in first]
    assert again[0] is first[0] and again[2] is first[2]


def test_a_long_tail_is_carried_and_completes_in_the_next_step():
    engine, carry = Scripted(), CarryOver(1)
    first = rollout(engine, [5, 60, 6], carry=carry)
    assert [s.prompt.tokens[1] for s in first] == [5, 5, 6, 6]
    assert carry.places == [(0, 1)] and engine.pending == 0
    engine.version = 1
    second = rollout(engine, [7, 90, 8], step=1, carry=carry)
    # The carried group comes first and had to complete; of this step's, another is left.
    assert [s.prompt.tokens[1] for s in second] == [60, 60, 7, 7, 8, 8] and carry.places == [(1, 1)]
    old = second[0]
    assert len(old.tokens) == 60 == len(old.logp) and old.tokens[-1] == 1
    assert old.weight_version == 0 and second[2].weight_version == 1
    switch = old.logp.index(-1.5)
    assert 0 < switch < 60 and old.logp == [-0.5] * switch + [-1.5] * (60 - switch)  # each token its own weights'
    carry.allowance = 0
    third = rollout(engine, [3], step=2, carry=carry)
    assert [s.prompt.tokens[1] for s in third] == [90, 90, 3, 3] and carry.places == []


def test_complete_members_of_a_carried_group_are_kept():
    engine, carry = Scripted(), CarryOver(1)
    submit = engine.submit

    def uneven(requests):  # the second sample of every group is long
        submit(requests)
        for r in requests:
            if r.tokens[1] == 20 and (r.id % 2 or len(r.tokens) > 2):
                engine.live[r.id][1] += 40

    engine.submit = uneven
    rollout(engine, [30, 20, 30], carry=carry)
    group = carry.groups[0]
    assert group.samples[0] is not None and group.samples[1] is None and len(group.begun[1].tokens) >= 30
    engine.version = 1
    kept = rollout(engine, [3], step=1, carry=carry)[:2]
    assert [len(s.tokens) for s in kept] == [20, 60]
    assert kept[0].weight_version == 0 and kept[0].reward == pytest.approx(0.19)


def test_restart_after_a_resume_begins_the_carried_prompts_again():
    engine, carry = Scripted(), CarryOver(1)
    carry.restart([((4, 2), prompt(12))], 2, Sharing())
    samples = rollout(engine, [5, 6], step=5, carry=carry)
    assert [s.prompt.tokens[1] for s in samples][:2] == [12, 12]


def test_carried_tokens_have_the_log_probabilities_of_the_weights_that_drew_them():
    """The default engine, between two different policies: each part of a response is scored by its own."""
    policies = [Policy(tiny.model(seed=s)) for s in (0, 1)]
    end = set(range(1, 97, 12))  # so many that lengths differ
    engine = NativeEngine(policies[0].config, torch.device("cpu"), torch.float32, 16, end)
    engine.sync(policies[0], 0)
    prompts = [Prompt(f"p/{i}", "math", tuple(t), "", {}) for i, t in enumerate(tiny.sequences((6, 9, 4, 7)))]
    carry = CarryOver(2)
    before = 0
    for step in range(2):
        samples = collect(
            engine, Pool(), TOKENIZER, prompts, 2, seed=0, step=step, max_new_tokens=40, temperature=0.8, carry=carry
        )
        assert len(samples) == 2 * (len(prompts) - len(carry.places)) + before
        before = 2 * len(carry.places)
        if step == 0:
            begun = {(g.prompt.id, i): f for g in carry.groups for i, f in g.begun.items()}
            assert begun
            engine.sync(policies[1], 1)
    carried = [s for s in samples if s.weight_version == 0 and (s.prompt.id, s.index) in begun]
    assert len(carried) == len(begun)
    for s in carried:
        mine = begun[s.prompt.id, s.index]
        n = len(mine.tokens)
        assert s.tokens[:n] == mine.tokens and not end & set(s.tokens[:-1])
        context = torch.tensor([[*s.prompt.tokens, *s.tokens]])
        start = len(s.prompt.tokens)
        by_policy = [
            (p.model(input_ids=context).logits[0, start - 1 : -1].detach() / 0.8)
            .log_softmax(-1)
            .gather(1, context[0, start:, None])[:, 0]
            for p in policies
        ]
        want = torch.cat([by_policy[0][:n], by_policy[1][n:]])
        np.testing.assert_allclose(s.logp, want.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout.carry-over", "0.2"], "needs rollout.deterministic = false"),
        (["--rollout.carry-over", "1", "--rollout.deterministic", "False"], r"carry_over must be in \[0, 1\)"),
        (
            ["--rollout.carry-over", "0.1", "--rollout.deterministic", "False", "--objective.tis-cap", "0"],
            "tis_cap above 0",
        ),
        (
            [
                "--rollout.carry-over",
                "0.1",
                "--rollout.deterministic",
                "False",
                "--rollout.dynamic-sampling-rounds",
                "1",
            ],
            "exclude each other",
        ),
    ],
)
def test_config_rules(options, message):
    with pytest.raises(InputError, match=message):
        load(options)


def test_ranks_pull_prompts_so_that_none_idles_and_none_is_lost(tmp_path):
    done = torchrun(str(SUPPORT / "two_sharing.py"), str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    dealt, pulled, carried = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("dealt", "pulled", "carried"))
    order = [[k, i] for k in range(2, 34) for i in range(2)]
    assert dealt["order"] == pulled["order"] == order
    assert dealt["mine"] == [16, 16]
    assert sum(pulled["mine"]) == 32 and pulled["mine"][1] > 1.5 * pulled["mine"][0]  # rank 0 is slow
    assert sorted(map(tuple, carried["all"])) == sorted((step, k) for step in range(3) for k in range(2, 34))
    assert carried["left"][0] and max(carried["left"]) <= 4 and carried["left"][-1] == 0
