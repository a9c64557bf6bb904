"""The default engine: right log-probabilities, draws that depend on the request alone, slots that never leak."""

import numpy as np
import pytest
import tiny
import torch

from m2rl.policy import Policy
from m2rl.rollout.engine import Request, generate, sample_seed
from m2rl.rollout.native import NativeEngine, sample, uniform

CPU = torch.device("cpu")


def engine(family="qwen3", tied=True, slots=16):
    model = tiny.model(family, tied)
    built = NativeEngine(model.config, CPU, torch.float32, slots, {1})
    built.sync(Policy(model), 3)
    return built, model


def requests(n, limit=12, temperature=1.0, group=4):
    prompts = tiny.sequences((5, 17, 1, 9, 8, 30), seed=1)
    return [
        Request(
            i,
            tuple(prompts[i // group % len(prompts)]),
            sample_seed(0, 0, str(i // group), i % group),
            limit,
            temperature,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_log_probabilities_are_those_of_the_model_at_the_sampling_temperature(family, tied):
    built, model = engine(family, tied)
    for request, finished in zip(requests(20, temperature=0.6), generate(built, requests(20, temperature=0.6))):
        logits = model(input_ids=torch.tensor([[*request.tokens, *finished.tokens]])).logits[0].detach()
        want = (
            (logits / 0.6)
            .log_softmax(-1)[len(request.tokens) - 1 : -1]
            .gather(1, torch.tensor(finished.tokens)[:, None])[:, 0]
        )
        np.testing.assert_allclose(finished.logp, want.numpy(), atol=1e-5)
        assert finished.weight_version == 3
        assert (finished.finish == "stop") == (finished.tokens[-1] == 1)
        assert finished.finish == "stop" or len(finished.tokens) == 12


def test_a_response_is_the_same_in_any_batch_order_and_number_of_slots():
    many, _ = engine(slots=16)
    few, _ = engine(slots=3)
    asked = requests(20)
    first = generate(many, asked)
    second = {f.id: f for f in generate(few, asked[::-1])}
    alone = [generate(many, [r])[0] for r in asked[:6]]
    for f in first:
        assert f.tokens == second[f.id].tokens
        np.testing.assert_allclose(f.logp, second[f.id].logp, atol=1e-5)
    assert [f.tokens for f in alone] == [f.tokens for f in first[:6]]
    assert len({tuple(f.tokens) for f in first[:4]}) > 1  # the samples of a group differ


def test_requests_submitted_while_others_decode_change_nothing():
    built, _ = engine(slots=8)
    asked = requests(20)
    want = {f.id: f.tokens for f in generate(built, asked)}
    got, waiting = {}, list(asked)
    while waiting or built.pending:
        built.submit(waiting[:3])
        del waiting[:3]
        for f in built.poll():
            got[f.id] = f.tokens
    assert got == want


def test_greedy_follows_the_argmax():
    built, model = engine()
    request = Request(0, tuple(tiny.sequences((6,))[0]), 1, 8, 0.0)
    tokens = list(request.tokens)
    for drawn in generate(built, [request])[0].tokens:
        assert drawn == int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(drawn)


def test_cancel_returns_what_there_is_and_leaves_the_others_alone():
    built, _ = engine()
    asked = requests(6, limit=10)
    want = {f.id: f.tokens for f in generate(built, asked)}
    built.submit(asked)
    early = [f for _ in range(4) for f in built.poll()]
    gone = [r.id for r in asked[::2] if r.id not in {f.id for f in early}]
    cancelled = built.cancel(gone)
    rest = list(early)
    while built.pending:
        rest += built.poll()
    assert sorted(f.id for f in cancelled) == gone
    assert all(f.finish == "abort" and want[f.id][: len(f.tokens)] == f.tokens for f in cancelled)
    assert all(want[f.id] == f.tokens for f in rest)
    assert len(rest) + len(cancelled) == 6


def test_sync_writes_in_place_and_takes_effect():
    built, model = engine()
    addresses = [p.data_ptr() for p in built.model.parameters()]
    asked = requests(8)
    before = generate(built, asked)
    other = tiny.model(seed=5)
    built.sync(Policy(other), 4)
    changed = generate(built, asked)
    built.sync(Policy(model), 5)
    restored = generate(built, asked)
    assert [p.data_ptr() for p in built.model.parameters()] == addresses
    assert [f.tokens for f in changed] != [f.tokens for f in before]
    assert [(f.tokens, f.logp) for f in restored] == [(f.tokens, f.logp) for f in before]


def test_sync_while_decoding_is_refused():
    built, model = engine()
    built.submit(requests(2))
    with pytest.raises(RuntimeError, match="2 requests in flight"):
        built.sync(Policy(model), 4)


def test_an_engine_without_weights_refuses_to_sample():
    built = NativeEngine(tiny.model().config, CPU, torch.float32, 4, {1})
    built.submit(requests(1))
    with pytest.raises(RuntimeError, match="call sync first"):
        built.poll()


def test_uniform_is_splitmix64():
    def reference(seed, position):
        z = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (((z ^ (z >> 31)) >> 11) + 0.5) * 2.0**-53

    rng = np.random.default_rng(0)
    seeds, positions = rng.integers(0, 2**63, 100), rng.integers(0, 40000, 100)
    got = uniform(torch.from_numpy(seeds), torch.from_numpy(positions))
    assert got.tolist() == [reference(int(s), int(p)) for s, p in zip(seeds, positions)]


def test_samples_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 11) * 2
    n = 40_000
    u = uniform(torch.arange(n) * 977, torch.zeros(n, dtype=torch.int64))
    token, logp = sample(logits.expand(n, -1), torch.full((n,), 0.7), u)
    p = (logits[0] / 0.7).softmax(-1)
    counts = torch.bincount(token, minlength=11)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 29.6  # 99.9% quantile of chi-square with 10 degrees of freedom
    torch.testing.assert_close(logp, p.log()[token], atol=1e-6, rtol=1e-6)
