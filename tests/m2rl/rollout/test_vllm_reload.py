"""The real vLLM on the CPU, as it is installed: weights go through its reload route."""

import dataclasses
import signal

import numpy as np
import psutil
import pytest
import served
import torch
import torch.distributed as dist
from served import CLOSE, CONFIG, CPU, END, perturb, prompt, requests, restore, worst

from m2rl.rollout.engine import Request, generate, sample_seed
from m2rl.rollout.native import NativeEngine
from m2rl.types import InputError

pytestmark = served.needs_vllm
HANDLERS = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)  # before there is an engine


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with served.engines(tmp_path_factory.mktemp) as start:
        yield start


@pytest.fixture
def one(started):
    """The built-in model's architecture, for what does not depend on it."""
    return started("qwen3", True)


@pytest.fixture(params=served.EACH)
def each(request, started):
    family, head = request.param.split()
    return started(family, head == "tied")


def test_logp_is_transformers_before_and_after_an_update(each):
    engine, policy = each
    assert engine.route == "reload"
    for version, temperature in enumerate((0.7, 1.0, 0.0)):
        asked = requests(8, temperature)
        answers = generate(engine, asked)
        assert {a.weight_version for a in answers} == {version}
        assert worst(served.transformers(policy), asked, answers) < CLOSE, f"temperature {temperature}"
        perturb(policy, version)
        assert worst(served.transformers(policy), asked, answers) > 0.1, "the update must be visible"
        engine.sync(policy, version + 1)
    assert worst(served.transformers(policy), asked, generate(engine, asked)) < CLOSE


def test_restored_weights_restore_the_output_bitwise(each):
    served.check_restored_weights_restore_the_output(*each)


def test_a_forgotten_prefix_cache_reset_would_be_seen(one, monkeypatch):
    served.check_a_forgotten_cache_reset_is_seen(*one, monkeypatch)


def test_group_members_differ_and_a_seed_repeats_in_any_batch(one):
    engine, _ = one
    same = [Request(i, prompt(3), sample_seed(0, 1, "p", i), 24) for i in range(8)]
    batch = generate(engine, same)
    assert len({tuple(a.tokens) for a in batch}) == 8
    alone = [generate(engine, [r])[0] for r in reversed(same)][::-1]
    assert [a.tokens for a in alone] == [a.tokens for a in batch]


def test_one_stream_per_engine_is_reseeded_by_every_version(tmp_path):
    """deterministic = false: no generator per request, yet group members differ and a resumed step is drawn anew."""
    from m2rl.rollout.vllm import VllmEngine

    folder = served.save(tmp_path)
    policy = served.policy(folder)
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, deterministic=False))
    engine = VllmEngine(config, str(folder), CPU, [END])
    same, drawn = [Request(i, prompt(3), 7, 24) for i in range(8)], []
    seeds = []
    for version in (4, 4, 5):
        engine.sync(policy, version)
        seeds.append(np.random.randint(2**31))  # vLLM's model runner for GPUs draws its seeds from here
        drawn.append([a.tokens for a in generate(engine, same)])
    assert len({tuple(tokens) for tokens in drawn[0]}) == 8
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2]
    assert seeds[0] == seeds[1] and seeds[0] != seeds[2]
    engine.close()


def test_the_models_own_sampling_defaults_are_ignored(one):
    """Its generation_config.json asks for top_k = 1, and for another end token."""
    engine, _ = one
    answers = generate(engine, [Request(i, prompt(1, 20), i, 40) for i in range(32)])
    assert len({a.tokens[0] for a in answers}) > 1
    assert any(5 in a.tokens[:-1] for a in answers)


def test_finish_reasons_and_end_tokens(one):
    engine, _ = one
    answers = generate(engine, [Request(i, prompt(i, 20), i, 40) for i in range(64)])
    for a in answers:
        assert len(a.tokens) == len(a.logp) and all(x <= 0 for x in a.logp)
        assert END not in a.tokens[:-1]
        assert a.finish == ("stop" if a.tokens[-1] == END else "length")
        assert a.finish == "stop" or len(a.tokens) == 40
    assert {a.finish for a in answers} == {"stop", "length"}


def test_results_come_one_by_one_while_others_decode(one):
    engine, _ = one
    engine.submit([Request(i, prompt(i, 30), i, new) for i, new in enumerate((2, 30, 4))])
    order = []
    while engine.pending:
        order += [(f.id, engine.pending) for f in engine.poll()]
    assert [i for i, _ in order] == [0, 2, 1]
    assert [left for _, left in order] == [2, 1, 0]


def test_cancel_returns_what_there_is_and_the_rest_goes_on(one):
    engine, policy = one
    asked = requests(4, temperature=1.0)
    whole = generate(engine, asked)
    engine.submit(asked)
    for _ in range(6):
        engine.poll()
    cut = engine.cancel([1, 3, 99])
    assert [c.id for c in cut] == [1, 3] and {c.finish for c in cut} == {"abort"}
    for c in cut:
        n = len(c.tokens)
        assert 0 < n < len(whole[c.id].tokens) and c.tokens == whole[c.id].tokens[:n] and c.logp == whole[c.id].logp[:n]
    rest = []
    while engine.pending:
        rest += engine.poll()
    assert {f.id: f.tokens for f in rest} == {i: whole[i].tokens for i in (0, 2)}
    engine.submit(asked)
    engine.poll()
    engine.cancel(range(4))
    engine.sync(policy, 40)  # nothing of the cancelled requests may keep the cache from being dropped
    assert [a.tokens for a in generate(engine, asked)] == [w.tokens for w in whole]


def test_more_prompt_tokens_than_one_step_takes(one):
    """Split over two steps, a seeded prompt made vLLM rewind a CPU generator, which raises."""
    engine, policy = one
    asked = [Request(i, prompt(i), i, 2, 1.0) for i in range(40)]  # 12,000 prompt tokens, no two prompts alike
    answers = generate(engine, asked)
    assert worst(served.transformers(policy), asked, answers) < CLOSE


def test_agrees_with_the_native_engine(one):
    """The same policy behind the same seam: greedy responses are equal token for token."""
    engine, policy = one
    native = NativeEngine(policy.config, CPU, torch.float32, 8, [END])
    native.sync(policy, 0)
    asked = requests(4, temperature=0.0)
    for a, b in zip(generate(engine, asked), generate(native, asked)):
        assert a.tokens == b.tokens and a.finish == b.finish
        assert torch.allclose(torch.tensor(a.logp), torch.tensor(b.logp), atol=CLOSE)


def test_misuse_is_refused_by_name(one, tmp_path):
    from m2rl.rollout.vllm import VllmEngine

    engine, policy = one
    for bad, why in (
        (Request(1, (), 0, 4), "must not be empty"),
        (Request(1, (2,), 0, 0), "at least 1, got 0"),
        (Request(1, prompt(0, 350), 0, 40), "exceed the engine's 360"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.submit([bad])
    engine.submit([Request(1, prompt(0), 0, 4)])
    with pytest.raises(ValueError, match="in flight already"):
        engine.submit([Request(1, prompt(0), 0, 4)])
    with pytest.raises(RuntimeError, match="1 requests in flight"):
        engine.sync(policy, 50)
    engine.cancel([1])
    unsynced = VllmEngine(CONFIG, str(served.save(tmp_path)), CPU, [END])
    unsynced.submit([Request(1, prompt(0), 0, 4)])
    with pytest.raises(RuntimeError, match="call sync first"):
        unsynced.poll()
    unsynced.close()


def test_longer_rollouts_than_the_model_takes_are_refused(tmp_path):
    from m2rl.rollout.vllm import VllmEngine

    longer = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, max_new_tokens=1000))
    with pytest.raises(InputError, match=r"takes 1024 tokens; .* ask for 1320"):
        VllmEngine(longer, str(served.save(tmp_path)), CPU, [END])


def test_a_cache_too_small_for_one_response_is_refused_by_its_key(tmp_path):
    """vLLM's own message asks for more gpu_memory_utilization, which no key of ours sets."""
    from m2rl.rollout.vllm import VllmEngine

    # 2 layers, 2 heads of 32, keys and values, 4 bytes; 360 tokens are three blocks of 128
    need = 2 * 2 * 32 * 2 * 4 * 384 / 2**30
    folder = str(served.save(tmp_path))
    small = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, kv_cache_gib=need * 0.99))
    with pytest.raises(InputError, match=r"rollout.kv_cache_gib must be at least .* the full 360 tokens .* got"):
        VllmEngine(small, folder, CPU, [END])
    enough = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, kv_cache_gib=need * 2))
    VllmEngine(enough, folder, CPU, [END]).close()


def test_a_missing_or_unknown_weight_is_named(one):
    engine, policy = one
    weights = dict(policy.model.named_parameters())
    gone = weights.pop("model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(RuntimeError, match=r"not in the policy \['model.layers.1.self_attn.k_proj.weight'\]"):
        engine.load(weights, 60)
    with pytest.raises(RuntimeError, match=r"not in vLLM \['extra'\]"):
        engine.load(weights | {"model.layers.1.self_attn.k_proj.weight": gone, "extra": gone}, 60)


def test_whole_tensors_load_as_a_policy_does(one):
    """A merge in a sweep: named tensors, never on disk."""
    engine, policy = one
    merged = {n: p * 0.9 for n, p in policy.model.named_parameters()}
    engine.load(merged, 70)
    asked = requests(4)
    answers = generate(engine, asked)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    for p in policy.parameters():
        p.mul_(0.9)
    assert worst(served.transformers(policy), asked, answers) < CLOSE
    restore(policy, before)
    engine.sync(policy, 71)


def test_many_syncs_do_not_grow_the_process(one):
    engine, policy = one
    process = psutil.Process()
    for version in range(5):
        engine.sync(policy, 80 + version)
    before = process.memory_info().rss
    for version in range(60):
        engine.sync(policy, 90 + version)
    assert process.memory_info().rss - before < 60 * 4 * sum(p.numel() for p in policy.parameters()) // 4


def test_the_trainers_process_is_left_as_it_was(one):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # vLLM's CPU worker replaces this function by one that does nothing
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == HANDLERS
    assert dist.is_initialized()  # vLLM's, where the trainer had none: collecting the engine would take it away


def test_sleep_and_wake_change_nothing_on_the_cpu(one):
    engine, _ = one
    asked = requests(2)
    before = generate(engine, asked)
    engine.sleep()
    engine.wake()
    assert [a.tokens for a in generate(engine, asked)] == [a.tokens for a in before]
